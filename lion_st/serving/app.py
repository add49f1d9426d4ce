"""The routes of a server: those of text-embeddings-inference, OpenAI's for dense vectors, and a search."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from time import perf_counter
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from scipy import sparse
from starlette.exceptions import HTTPException

from lion_st.encoding.vectors import HybridVectors, Vectors, to_csr, to_token_vectors
from lion_st.serving.bodies import (
    BothVectors,
    EmbedRequest,
    EmbedSparseRequest,
    OpenAIRequest,
    SearchRequest,
    SparseValue,
    Texts,
)
from lion_st.serving.errors import RequestError, invalid, too_large, wrong_model
from lion_st.serving.gate import Gate, as_json, error_response, json_response
from lion_st.serving.service import EncodedRequest, FoundDocument, Service

ROUTES = {"sparse": "/embed_sparse", "dense": "/embed", "multi_vector": "/embed_all", "hybrid": "/embed"}
LOOKS = {
    "sparse": '[[{"index": 5, "value": 0.5}, ...], ...]',
    "dense": "[[0.5, ...], ...]",
    "multi_vector": "[[[0.5, ...], ...], ...]",
    "hybrid": '[{"sparse": [{"index": 5, "value": 0.5}, ...], "dense": [0.5, ...]}, ...]',
}  # vectors of a request


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
    app.add_middleware(Gate, service=service)
    _answer_errors(app, service)
    add_routes(app, service)
    return app


def add_routes(app: FastAPI, service: Service) -> None:
    """Add what a server answers to, by the kind of its model's vectors."""
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
            return as_json({"object": "list", "data": data, "model": service.name, "usage": usage})

        return json_response(await service.in_thread(body))

    @app.post("/search")
    async def search(request: SearchRequest) -> Response:
        service.searched()
        if request.inputs is not None:
            vectors = (await service.encode(_listed(request.inputs), "query", request.truncate)).vectors
        else:
            vectors = _given_vectors(service, request.vectors or [])
        found = await service.search(vectors, request.k, request.reasons, request.texts)
        return json_response(
            await service.in_thread(lambda: as_json([[_shown(one) for one in hits] for hits in found]))
        )


async def _embed(service: Service, request: EmbedSparseRequest, rows: Any) -> Response:
    started = perf_counter()
    texts = _listed(request.inputs)
    encoded = await service.encode(texts, service.task_of(request.prompt_name), request.truncate)
    content = await service.in_thread(lambda: as_json(rows(encoded.vectors)))
    return json_response(content, _costs(texts, encoded, perf_counter() - started))


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


def _answer_errors(app: FastAPI, service: Service) -> None:
    def answer(request: Request, error: RequestError) -> Response:
        return error_response(service, request.url.path, error)

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
