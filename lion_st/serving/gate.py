"""What every request passes, and every answer is made by: the key, the longest body, counts, errors as JSON."""

from __future__ import annotations

import hmac
from time import perf_counter
from typing import Any

import orjson
from fastapi import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lion_st.serving.errors import RequestError, too_large
from lion_st.serving.service import Service

PUBLIC = ("/health", "/metrics")  # what probes and Prometheus ask for, without a key
METHODS = {"/": "embed", "/embed": "embed", "/embed_sparse": "embed_sparse", "/embed_all": "embed_all"}
METHODS |= {"/v1/embeddings": "openai", "/search": "search"}


class Gate:
    """Asks for the key, stops bodies that are too long, and counts requests."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(path, headers)
        if refusal is not None:
            await error_response(self.service, path, refusal)(scope, receive, send)
            return
        limit, taken = self.service.settings.payload_limit, 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise HTTPException(413, _too_long(limit))
            return message

        method = METHODS.get(path)
        if method is None:
            await self.app(scope, limited, send)
            return
        metrics, started = self.service.metrics, perf_counter()
        metrics.requests.labels(method).inc()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                metrics.successes.labels(method).inc()
                metrics.duration.observe(perf_counter() - started)
            await send(message)

        await self.app(scope, limited, counted)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> RequestError | None:
        settings = self.service.settings
        if settings.api_key is not None and path not in PUBLIC:
            expected = f"Bearer {settings.api_key}".encode()
            if not hmac.compare_digest(headers.get(b"authorization", b""), expected):
                challenge = {"WWW-Authenticate": "Bearer"}
                return RequestError(401, "Unauthorized", "Send `Authorization: Bearer KEY` with the key.", challenge)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > settings.payload_limit:
            return too_large(_too_long(settings.payload_limit))
        return None


def _too_long(limit: int) -> str:
    return f"A request has at most {limit:,} bytes: send fewer texts at a time."


def as_json(content: Any) -> bytes:
    """JSON of Python's and numpy's values."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def json_response(content: bytes, headers: dict[str, str] | None = None) -> Response:
    """An answer of JSON."""
    return Response(content, headers=headers, media_type="application/json")


def error_response(service: Service, path: str, error: RequestError) -> Response:
    """The answer to a request that fails, which is counted."""
    service.metrics.failures.labels(error.kind.lower()).inc()
    content = as_json(error.body(path.startswith("/v1/")))
    return Response(content, error.status, error.headers, media_type="application/json")
