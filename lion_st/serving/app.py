"""The routes of a server: those of text-embeddings-inference, OpenAI's for dense vectors, and a search."""

from __future__ import annotations

import asyncio
import base64
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import sparse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lion_st.encoding.vectors import HybridVectors, Vectors, to_csr, to_token_vectors
from lion_st.serving.errors import RequestError, invalid, too_large, wrong_model
from lion_st.serving.service import EncodedRequest, FoundDocument, Service

PUBLIC = ("/health", "/metrics")  # what probes and Prometheus ask for, without a key
METHODS = {"/": "embed", "/embed": "embed", "/embed_sparse": "embed_sparse", "/embed_all": "embed_all"}
METHODS |= {"/v1/embeddings": "openai", "/search": "search"}
ROUTES = {"sparse": "/embed_sparse", "dense": "/embed", "multi_vector": "/embed_all", "hybrid": "/embed"}
Texts = str | list[str]
LOOKS = {
    "sparse": '[[{"index": 5, "value": 0.5}, ...], ...]',
    "dense": "[[0.5, ...], ...]",
    "multi_vector": "[[[0.5, ...], ...], ...]",
    "hybrid": '[{"sparse": [{"index": 5, "value": 0.5}, ...], "dense": [0.5, ...]}, ...]',
}  # vectors of a request
LARGEST = 1e15  # of a number in a vector: sums of products of two such are far from the end of float32
Weight = Annotated[float, Field(ge=0, le=LARGEST)]
Coordinate = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]


class Body(BaseModel):
    """JSON whose values are of the types that are asked for: "5" is not a number."""

    model_config = ConfigDict(strict=True)


class EmbedSparseRequest(Body):
    """Body of `/embed_sparse` and `/embed_all`."""

    inputs: Texts
    truncate: bool | None = None
    truncation_direction: str | None = None
    prompt_name: str | None = None

    @model_validator(mode="after")
    def _cut_at_the_end(self) -> EmbedSparseRequest:
        if (self.truncation_direction or "right").lower() != "right":
            raise ValueError(f"texts are cut at the right alone, got truncation_direction={self.truncation_direction}")
        return self


class EmbedRequest(EmbedSparseRequest):
    """Body of `/embed`."""

    normalize: bool | None = None
    dimensions: int | None = None


class OpenAIRequest(Body):
    """Body of `/v1/embeddings`; `prompt_name` is not OpenAI's, whose clients send it as `extra_body`."""

    input: Texts
    prompt_name: str | None = None
    model: str | None = None
    user: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class SparseValue(Body):
    """A term of a sparse vector, as `/embed_sparse` answers with it."""

    index: Annotated[int, Field(ge=0, lt=2**31)]
    value: Weight


class BothVectors(Body):
    """Both vectors of a text, for an index of a hybrid model."""

    model_config = ConfigDict(extra="forbid")

    sparse: list[SparseValue]
    dense: list[Coordinate]


class SearchRequest(Body):
    """Body of `/search`: texts, or vectors as `/embed`, `/embed_sparse` and `/embed_all` answer with them."""

    model_config = ConfigDict(extra="forbid")

    inputs: Texts | None = None
    vectors: (
        list[list[SparseValue]] | list[list[Coordinate]] | list[list[list[Coordinate]]] | list[BothVectors] | None
    ) = None
    k: Annotated[int, Field(ge=1)] = 10
    reasons: Annotated[int, Field(ge=0, le=1000)] = 0
    texts: bool = True
    truncate: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> SearchRequest:
        if (self.inputs is None) == (self.vectors is None):
            raise ValueError("give inputs or vectors, one of both")
        return self


def create_app(service: Service) -> FastAPI:
    """Make the application that answers for a service; it ends the service when it is shut down.

    Args:
        service: Model, index and limits.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch_index())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await asyncio.get_running_loop().run_in_executor(None, service.close)

    from lion_st import __version__

    app = FastAPI(title="lion_st", version=__version__, lifespan=lifespan)
    app.add_middleware(_Gate, service=service)
    _answer_errors(app, service)
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    own_route = ROUTES[service.paradigm]

    def require(*paradigms: str) -> None:
        if service.paradigm not in paradigms:
            raise wrong_model(f"{service.name} is a {service.paradigm} model: POST to {own_route}.")

    @app.get("/health")
    async def health() -> Response:
        if not service.queue.is_alive:
            raise RequestError(503, "Unhealthy", "unhealthy")
        return Response()

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return service.info()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/embed_sparse")
    async def embed_sparse(request: EmbedSparseRequest) -> Response:
        require("sparse", "hybrid")
        return await _embed(service, request, lambda vectors: _sparse_values(_side(vectors, "sparse")))

    @app.post("/embed_all")
    async def embed_all(request: EmbedSparseRequest) -> Response:
        require("multi_vector")
        return await _embed(service, request, _token_rows)

    @app.post("/embed")
    async def embed(request: EmbedRequest) -> Response:
        require("dense", "hybrid")

        def rows(vectors: Any) -> Any:
            dense = _side(vectors, "dense")
            _require_dimensions(dense, request.dimensions)
            return _normalized(dense) if request.normalize else dense

        return await _embed(service, request, rows)

    of_route: dict[str, Any] = {"/embed": embed, "/embed_sparse": embed_sparse, "/embed_all": embed_all}
    app.post("/")(of_route[own_route])
    for path, probe in (("/health", health), ("/info", info), ("/metrics", metrics)):
        app.head(path, include_in_schema=False)(probe)

    @app.post("/v1/embeddings")
    async def openai(request: OpenAIRequest) -> Response:
        require("dense", "hybrid")
        encoded = await service.encode(_listed(request.input), service.task_of(request.prompt_name))
        dense = _side(encoded.vectors, "dense")
        _require_dimensions(dense, request.dimensions)

        def body() -> bytes:
            rows: Any = dense
            if request.encoding_format == "base64":
                rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows]
            data = [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(rows)]
            usage = {"prompt_tokens": encoded.tokens, "total_tokens": encoded.tokens}
            return _json({"object": "list", "data": data, "model": service.name, "usage": usage})

        return _response(await service.in_thread(body))

    @app.post("/search")
    async def search(request: SearchRequest) -> Response:
        service.searched()
        if request.inputs is not None:
            vectors = (await service.encode(_listed(request.inputs), "query", request.truncate)).vectors
        else:
            vectors = _given_vectors(service, request.vectors or [])
        found = await service.search(vectors, request.k, request.reasons, request.texts)
        return _response(await service.in_thread(lambda: _json([[_shown(one) for one in hits] for hits in found])))


async def _embed(service: Service, request: EmbedSparseRequest, rows: Any) -> Response:
    started = perf_counter()
    texts = _listed(request.inputs)
    encoded = await service.encode(texts, service.task_of(request.prompt_name), request.truncate)
    content = await service.in_thread(lambda: _json(rows(encoded.vectors)))
    return _response(content, _costs(texts, encoded, perf_counter() - started))


def _costs(texts: Sequence[str], encoded: EncodedRequest, seconds: float) -> dict[str, str]:
    """The headers in which text-embeddings-inference says what a request took; times are milliseconds."""
    milliseconds = {
        "x-total-time": seconds,
        "x-compute-time": seconds,
        "x-tokenization-time": encoded.tokenization_seconds,
        "x-queue-time": encoded.queue_seconds,
        "x-inference-time": encoded.inference_seconds,
    }
    counts = {"x-compute-characters": sum(map(len, texts)), "x-compute-tokens": encoded.tokens}
    times = {name: round(1000 * value) for name, value in milliseconds.items()}
    return {name: str(value) for name, value in (counts | times).items()}


def _listed(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _side(vectors: Any, name: Literal["sparse", "dense"]) -> Any:
    """The sparse or the dense ones of a hybrid model's vectors; those of other models as they are."""
    return getattr(vectors, name) if isinstance(vectors, HybridVectors) else vectors


def _sparse_values(vectors: Any) -> list[list[dict[str, Any]]]:
    bounds = zip(vectors.indptr[:-1], vectors.indptr[1:], strict=True)
    return [
        [
            {"index": index, "value": value}
            for index, value in zip(vectors.indices[start:stop].tolist(), vectors.data[start:stop], strict=True)
        ]
        for start, stop in bounds
    ]


def _token_rows(vectors: Any) -> list[np.ndarray]:
    """The vectors of each text's tokens, [L, D]."""
    return np.split(vectors.values, vectors.offsets[1:-1])


def _require_dimensions(vectors: Any, wanted: int | None) -> None:
    if wanted is not None and wanted != vectors.shape[1]:
        raise invalid(f"`dimensions` of this model are {vectors.shape[1]}, and no fewer: got {wanted}.")


def _normalized(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _given_vectors(service: Service, rows: Sequence[Any]) -> Vectors:
    """A request's vectors as the index takes them."""
    limit = service.settings.max_client_batch_size
    if len(rows) > limit:
        raise too_large(f"batch size {len(rows)} > maximum allowed batch size {limit}: send fewer at a time.")
    if not rows:
        raise RequestError(400, "Empty", "`vectors` cannot be empty.")
    index = service.searched()
    if any(not _is_of(row, index.paradigm) for row in rows):
        raise invalid(f"The index holds {index.paradigm} vectors: `vectors` have to look like {LOOKS[index.paradigm]}.")
    if index.paradigm == "hybrid":
        sparse_rows = _sparse_rows([row.sparse for row in rows], service.dimensions("sparse"))
        dense_rows = _dense_rows([row.dense for row in rows], service.dimensions("dense"))
        return HybridVectors(sparse_rows, dense_rows, service.fusion_weights)
    if index.paradigm == "sparse":
        return _sparse_rows(rows, service.dimensions("sparse"))
    if index.paradigm == "multi_vector":
        if not all(rows):
            raise RequestError(400, "Empty", "A query of `vectors` has one token at least.")
        return to_token_vectors([_dense_rows(tokens, service.dimensions("dense")) for tokens in rows])
    return _dense_rows(rows, service.dimensions("dense"))


def _is_of(row: Any, paradigm: str) -> bool:
    """Whether a vector of a request is of this paradigm; one without terms is a sparse one."""
    if isinstance(row, BothVectors) or paradigm == "hybrid":
        return isinstance(row, BothVectors) and paradigm == "hybrid"
    kinds = {"sparse": SparseValue, "dense": float, "multi_vector": list}
    return all(isinstance(value, kinds[paradigm]) for value in row)


def _sparse_rows(rows: Sequence[Sequence[SparseValue]], dimensions: int) -> sparse.csr_array:
    terms = [value.index for row in rows for value in row]  # none of a text that no term stands for
    largest = max(terms, default=0)
    if largest >= dimensions:
        raise invalid(f"The index has the terms 0 to {dimensions - 1}, got {largest}: of another vocabulary?")
    ends = np.cumsum([0, *(len(row) for row in rows)])
    weights = np.array([value.value for row in rows for value in row], dtype=np.float32)
    shape = (len(rows), dimensions)
    return to_csr(sparse.csr_array((weights, np.array(terms, dtype=np.int64), ends), shape=shape))


def _dense_rows(rows: Sequence[Sequence[float]], dimensions: int) -> np.ndarray:
    for row in rows:
        if len(row) != dimensions:
            raise invalid(f"Vectors of the index have {dimensions} dimensions, got {len(row)}: of another model?")
    return np.array(rows, dtype=np.float32)


def _shown(found: FoundDocument) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": found.id, "score": found.score}
    if found.text is not None:
        shown["text"] = found.text
    if found.reasons:
        shown["reasons"] = [reason._asdict() for reason in found.reasons]
    return shown


def _json(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _response(content: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(content, headers=headers, media_type="application/json")


def _answer_errors(app: FastAPI, service: Service) -> None:
    def answer(request: Request, error: RequestError) -> Response:
        return _error_response(service, request.url.path, error)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError) -> Response:
        problems = error.errors()
        if isinstance(error.body, bytes):
            message = "Send JSON, with the header `Content-Type: application/json`."
            return answer(request, RequestError(415, "Validation", message))
        if problems[0]["loc"] == ("body",) and problems[0]["type"] == "missing":
            return answer(request, RequestError(400, "Validation", "The body is empty: send JSON."))
        is_json = all(problem["type"] != "json_invalid" for problem in problems)
        parts = [f"{'.'.join(str(part) for part in problem['loc'][1:])}: {problem['msg']}" for problem in problems[:3]]
        message = "; ".join(part.removeprefix(": ") for part in parts)
        if not is_json:
            message = f"The body is not JSON ({problems[0].get('ctx', {}).get('error', problems[0]['msg'])})."
        return answer(request, RequestError(422 if is_json else 400, "Validation", message))

    @app.exception_handler(UnicodeEncodeError)
    async def no_unicode(request: Request, error: UnicodeEncodeError) -> Response:  # pydantic, of what it would quote
        return answer(request, invalid(f"A string in the body is not valid Unicode ({error.reason})."))

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})  # which methods are allowed
        return answer(request, RequestError(error.status_code, "Validation", str(error.detail), headers))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return answer(
            request, RequestError(500, "Backend", f"Unexpected {type(error).__name__}: see the server's log.")
        )


def _error_response(service: Service, path: str, error: RequestError) -> Response:
    service.metrics.failures.labels(error.kind.lower()).inc()
    content = _json(error.body(path.startswith("/v1/")))
    return Response(content, error.status, error.headers, media_type="application/json")


class _Gate:
    """Asks for the key, stops bodies that are too long, and counts requests."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(path, headers)
        if refusal is not None:
            await _error_response(self.service, path, refusal)(scope, receive, send)
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
