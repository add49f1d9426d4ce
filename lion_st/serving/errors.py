"""What goes wrong with a request, with the status and kind that text-embeddings-inference gives it."""

from __future__ import annotations

from typing import Any

LONGEST_MESSAGE = 1000  # characters of an answer, which may quote what was sent


class RequestError(Exception):
    """An error to answer with.

    Args:
        status: HTTP status.
        kind: `error_type` of the answer.
        message: What is wrong, and the remedy.
        headers: Of the answer.
    """

    def __init__(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.headers = headers

    def body(self, is_openai: bool) -> dict[str, Any]:
        """The answer's body, as of an OpenAI-compatible route or of any other."""
        message = self.message.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not Unicode
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}..."
        if is_openai:
            return {"message": message, "code": self.status, "type": self.kind}
        return {"error": message, "error_type": self.kind}


def too_large(message: str) -> RequestError:
    """Too many texts, bytes or tokens."""
    return RequestError(413, "Validation", message)


def invalid(message: str) -> RequestError:
    """Values that mean nothing here."""
    return RequestError(422, "Validation", message)


def wrong_model(message: str) -> RequestError:
    """Something that this model or index cannot do."""
    return RequestError(424, "Backend", message)
