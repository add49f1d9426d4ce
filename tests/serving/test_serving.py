"""The server, asked by the clients that people use, over loopback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tiny_models import TEXTS

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import uvicorn
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from scipy.sparse import csr_array

import lion_st
from lion_st.encoding import encode_corpus, encode_texts, to_csr
from lion_st.indexes import StorageError, create_index, load_index
from lion_st.retrieval import index_corpus, search_texts
from lion_st.serving import ServerSettings, Service, batching, create_app
from lion_st.serving.launch import _bound_socket, _config
from lion_st.serving.live_index import TextStore

DOCUMENTS = {f"d{number}": text for number, text in enumerate(TEXTS)}
PATIENCE = 240  # seconds until a test gives up


@pytest.fixture(scope="module")
def models(tiny_backbone) -> dict[str, Any]:
    return {
        paradigm: lion_st.build(tiny_backbone(), paradigm, query_length=16, document_length=24)
        for paradigm in ("sparse", "dense", "hybrid", "multi_vector")
    }


def write_corpus(file: Path, texts: dict[str, str] = DOCUMENTS) -> str:
    file.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items()))
    return str(file)


@pytest.fixture(scope="module")
def index(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    records = [{"id": key, "text": text} for key, text in DOCUMENTS.items()]
    encode_corpus(models["sparse"], records, folder / "encoded", show_progress=False)
    index_corpus(folder / "encoded", folder / "index")
    return folder / "index"


class Running:
    """A server in a thread: its service, its address, and a client of it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.socket = _bound_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(_config(create_app(service), service.settings))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@contextmanager
def serving(model: Any, texts: Any = None, **settings: Any) -> Iterator[Running]:
    running = Running(Service(model, ServerSettings("unused", **settings), texts))
    try:
        yield running
    finally:
        running.stop()


def wait_until(condition: Callable[[], Any], every: float = 0.01) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(every)


@contextmanager
def held(model: Any) -> Iterator[tuple[list[int], threading.Event, threading.Event]]:
    """A model that notes how many texts each pass has, sets the first event in a pass and waits for the second."""
    passes: list[int] = []
    holding, release = threading.Event(), threading.Event()
    forward = model.forward

    def hold(features: dict[str, Any], **options: Any) -> Any:
        holding.set()
        assert release.wait(PATIENCE)
        out = forward(features, **options)
        passes.append(out["sentence_embedding"].shape[0])
        return out

    model.forward = hold
    try:
        yield passes, holding, release
    finally:
        release.set()
        del model.forward


@pytest.fixture(scope="module")
def sparse(models, index, tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("texts")
    limits: dict[str, Any] = {"max_client_batch_size": 8, "payload_limit": 20_000, "max_k": 5}
    limits["corpus"] = write_corpus(folder / "corpus.jsonl")
    with serving(models["sparse"], folder / "shared", index=str(index), api_key="secret", **limits) as running:
        running.client.headers["Authorization"] = "Bearer secret"
        yield running


@pytest.fixture(scope="module")
def dense(models) -> Iterator[Running]:
    with serving(models["dense"]) as running:
        yield running


def test_dense_vectors_are_those_of_encode_texts_for_every_client(dense, models):
    expected = {task: encode_texts(models["dense"], TEXTS, task) for task in ("query", "document")}
    hub = InferenceClient(dense.url)
    np.testing.assert_allclose(hub.feature_extraction(TEXTS), expected["document"], atol=1e-5)
    queries = hub.feature_extraction(TEXTS, prompt_name="query")
    np.testing.assert_allclose(queries, expected["query"], atol=1e-5)
    assert np.abs(queries - expected["document"]).max() > 1e-3  # documents are read further
    one = dense.post("/embed", inputs=TEXTS[0], normalize=True)
    np.testing.assert_allclose(np.linalg.norm(one.json(), axis=1), 1, atol=1e-6)
    assert one.headers["x-compute-characters"] == str(len(TEXTS[0]))
    body = dense.post("/v1/embeddings", input=TEXTS).json()
    np.testing.assert_allclose([row["embedding"] for row in body["data"]], expected["document"], atol=1e-5)


def test_openai_s_client_reads_the_vectors_and_the_errors(dense, models):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{dense.url}/v1", api_key="none", max_retries=0)
    answer = client.embeddings.create(model="any", input=TEXTS)  # it asks for base64
    expected = encode_texts(models["dense"], TEXTS, "document")
    np.testing.assert_allclose([row.embedding for row in answer.data], expected, atol=1e-5)
    assert answer.usage.prompt_tokens > len(TEXTS)
    answer = client.embeddings.create(model="any", input=TEXTS, extra_body={"prompt_name": "query"})
    expected = encode_texts(models["dense"], TEXTS, "query")
    np.testing.assert_allclose([row.embedding for row in answer.data], expected, atol=1e-5)
    with pytest.raises(openai.UnprocessableEntityError, match="`dimensions` of this model are 32"):
        client.embeddings.create(model="any", input=TEXTS, dimensions=8)
    with pytest.raises(openai.APIStatusError, match="batch size 33 > maximum allowed batch size 32"):
        client.embeddings.create(model="any", input=["a"] * 33)


def test_langchain_s_client_of_openai_reads_the_vectors(dense, models):
    """Its check of lengths would send token ids of OpenAI's models; that for text-embeddings-inference takes no URL."""
    langchain = pytest.importorskip("langchain_openai")
    client = langchain.OpenAIEmbeddings(
        base_url=f"{dense.url}/v1", api_key="-", model="any", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(client.embed_documents(TEXTS), encode_texts(models["dense"], TEXTS, "document"), 1e-6)
    answer = dense.post("/v1/embeddings", input=[[15339, 1917]], model="any")
    assert answer.status_code == 422 and "valid string" in answer.json()["message"]


def test_sparse_vectors_come_by_term_and_weight(sparse, models):
    answer = sparse.post("/embed_sparse", inputs=TEXTS).json()
    expected = encode_texts(models["sparse"], TEXTS, "document")
    for row, values in enumerate(answer):
        assert [value["index"] for value in values] == sorted(expected[[row]].indices.tolist())
        np.testing.assert_allclose([value["value"] for value in values], to_csr(expected[[row]]).data, atol=1e-5)
    assert sparse.post("/", inputs=TEXTS[0]).json()[0][0].keys() == {"index", "value"}  # as TEI: by the kind of model


def test_an_option_that_is_null_is_one_that_is_left_out(dense, sparse):
    options = dict.fromkeys(("truncate", "truncation_direction", "prompt_name", "normalize", "dimensions"))
    assert dense.post("/embed", inputs="a", **options).json() == dense.post("/embed", inputs="a").json()
    options = dict.fromkeys(("model", "user", "encoding_format", "dimensions"))
    answer = dense.post("/v1/embeddings", input="a", **options).json()
    assert answer["data"] == dense.post("/v1/embeddings", input="a").json()["data"]
    options = dict.fromkeys(("truncate", "truncation_direction", "prompt_name"))
    assert sparse.post("/embed_sparse", inputs="a", **options).json() == sparse.post("/embed_sparse", inputs="a").json()


def test_a_vector_without_terms_finds_what_search_finds(sparse, index):
    own = sparse.post("/embed_sparse", inputs=TEXTS[0], prompt_name="query").json()[0]
    engine = load_index(index)
    (empty,) = engine.search(csr_array((1, engine.dimensions), dtype=np.float32), k=3)
    for vectors in ([[]], [[], own]):
        answer = sparse.post("/search", vectors=vectors, k=3)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()) == len(vectors)
        assert [(hit["id"], hit["score"]) for hit in answer.json()[0]] == empty


def test_an_index_of_milvus_is_searched_by_texts_and_vectors(models, index, tmp_path):
    pytest.importorskip("milvus_lite")
    folder = tmp_path / "index"
    parameters = {"uri": str(tmp_path / "milvus.db")}
    index_corpus(index.with_name("encoded"), folder, "milvus", engine_parameters=parameters, sample=0).index.close()
    with serving(models["sparse"], index=str(folder)) as running:
        (by_text,) = running.post("/search", inputs=TEXTS[0], k=3).json()
        (vector,) = running.post("/embed_sparse", inputs=TEXTS[0], prompt_name="query").json()
        (by_vector,) = running.post("/search", vectors=[vector], k=3).json()
        assert len(by_text) == 3 and [hit["id"] for hit in by_vector] == [hit["id"] for hit in by_text]
        answer = running.post("/search", vectors=[[{"index": 10**6, "value": 1.0}]])
        assert answer.status_code == 422 and "got 1000000: of another vocabulary" in answer.json()["error"]
        answer = running.post("/search", inputs="lions", reasons=3)
        assert answer.status_code == 422 and "engine 'milvus'" in answer.json()["error"]


def test_a_search_takes_texts_or_vectors_and_gives_reasons(sparse, models, index):
    expected = search_texts(models["sparse"], load_index(index), [TEXTS[0]], k=3, explain=True)
    found = sparse.post("/search", inputs=TEXTS[0], k=3, reasons=4).json()[0]
    assert [hit["id"] for hit in found] == [result.document for result in expected]
    for hit, result in zip(found, expected, strict=True):
        assert hit["score"] == pytest.approx(result.score, rel=1e-4)
        assert hit["text"] == DOCUMENTS[hit["id"]]
        assert [reason["term"] for reason in hit["reasons"]] == [term.term for term in result.terms[:4]]
        assert hit["reasons"][0]["share"] == pytest.approx(result.terms[0].share, rel=1e-3)
    vectors = sparse.post("/embed_sparse", inputs=TEXTS[0], prompt_name="query").json()
    again = sparse.post("/search", vectors=vectors, k=3, texts=False).json()[0]
    assert [(hit["id"], pytest.approx(hit["score"], rel=1e-4)) for hit in again] == [
        (hit["id"], hit["score"]) for hit in found
    ]
    assert again[0].keys() == {"id", "score"}


def test_terms_of_texts_and_vectors_are_weighed_by_their_rarity_in_the_index(models, index):
    expected = search_texts(models["sparse"], load_index(index), [TEXTS[0]], k=3, explain=True, idf=True)
    plain = search_texts(models["sparse"], load_index(index), [TEXTS[0]], k=3)
    with serving(models["sparse"], index=str(index), idf=True) as running:
        assert running.client.get("/info").json()["index"]["idf"]
        vectors = running.post("/embed_sparse", inputs=TEXTS[0], prompt_name="query").json()
        for asked in ({"inputs": TEXTS[0]}, {"vectors": vectors}):
            hits = running.post("/search", k=3, reasons=1, **asked).json()[0]
            assert [hit["id"] for hit in hits] == [result.document for result in expected]
            assert [hit["score"] for hit in hits] == pytest.approx([result.score for result in expected], rel=1e-4)
            assert [hit["reasons"][0]["term"] for hit in hits] == [result.terms[0].term for result in expected]
    assert expected[0].score > plain[0].score


def test_a_hybrid_model_answers_with_either_vector_and_searches_by_both(models, tmp_path):
    model = models["hybrid"]
    model[1].fusion_weights = (0.3, 0.7)
    records = [{"id": key, "text": text} for key, text in DOCUMENTS.items()]
    encode_corpus(model, records, tmp_path / "encoded", show_progress=False)
    index_corpus(tmp_path / "encoded", tmp_path / "index")
    found = encode_texts(model, TEXTS, "query")
    expected = search_texts(model, load_index(tmp_path / "index"), TEXTS[:2], k=3)
    with serving(model, index=str(tmp_path / "index")) as running:
        dense = running.post("/embed", inputs=TEXTS, prompt_name="query").json()
        np.testing.assert_allclose(dense, found.dense, atol=1e-5)
        np.testing.assert_allclose(running.post("/", inputs=TEXTS, prompt_name="query").json(), dense, atol=1e-5)
        openai = running.post("/v1/embeddings", input=TEXTS).json()["data"]
        np.testing.assert_allclose(
            [row["embedding"] for row in openai], encode_texts(model, TEXTS, "document").dense, atol=1e-5
        )
        sparse = running.post("/embed_sparse", inputs=TEXTS, prompt_name="query").json()
        assert [value["index"] for value in sparse[0]] == sorted(found.sparse[[0]].indices.tolist())
        answers = [running.post("/search", inputs=TEXTS[:2], k=3)]
        both = [{"sparse": terms, "dense": row} for terms, row in zip(sparse, dense, strict=True)]
        answers.append(running.post("/search", vectors=both[:2], k=3))
        for answer in answers:
            hits = [(hit["id"], hit["score"]) for row in answer.json() for hit in row]
            assert hits == [(one.document, pytest.approx(one.score, rel=1e-4)) for one in expected]
        info = running.client.get("/info").json()
        assert (info["paradigm"], info["fusion_weights"]) == ("hybrid", [0.3, 0.7])
        assert info["model_type"] == {"embedding": {"pooling": "mean"}} and info["index"]["paradigm"] == "hybrid"
        for body, message in (
            ({"vectors": sparse[:1]}, 'look like [{"sparse": [{"index": 5'),
            ({"vectors": [{"sparse": [], "dense": [0.5]}]}, "have 32 dimensions, got 1"),
            ({"inputs": "a", "reasons": 1}, "hybrid"),
        ):
            answer = running.post("/search", **body)
            assert answer.status_code == 422 and message in answer.json()["error"], answer.text
    other = lion_st.build(model[0].model.name_or_path, "sparse")
    with pytest.raises(StorageError, match=r"holds hybrid vectors, and .* is a sparse model"):
        Service(other, ServerSettings("unused", index=str(tmp_path / "index")))


def test_a_multi_vector_model_answers_with_the_vectors_of_tokens_and_searches_by_maxsim(models, tmp_path):
    model = models["multi_vector"]
    records = [{"id": key, "text": text} for key, text in DOCUMENTS.items()]
    encode_corpus(model, records, tmp_path / "encoded", show_progress=False)
    index_corpus(tmp_path / "encoded", tmp_path / "index", sample=0)
    scores = model.similarity(model.encode_query(TEXTS[:2]), model.encode_document(TEXTS)).numpy()
    with serving(model, index=str(tmp_path / "index")) as running:
        for task in ("query", "document"):
            expected = getattr(model, f"encode_{task}")(TEXTS)
            for path in ("/embed_all", "/"):
                found = running.post(path, inputs=TEXTS, prompt_name=task).json()
                for one, own in zip(found, expected, strict=True):
                    np.testing.assert_allclose(one, own.numpy(), atol=1e-5)
        vectors = running.post("/embed_all", inputs=TEXTS[:2], prompt_name="query").json()
        for body in ({"inputs": TEXTS[:2]}, {"vectors": vectors}):
            for row, hits in enumerate(running.post("/search", k=3, **body).json()):
                best = np.argsort(-scores[row])[:3]
                assert [hit["id"] for hit in hits] == [f"d{number}" for number in best]
                np.testing.assert_allclose([hit["score"] for hit in hits], scores[row, best], rtol=1e-4)
        info = running.client.get("/info").json()
        assert info["paradigm"] == "multi_vector" and info["model_type"] == {"embedding": {"pooling": None}}
        for path, body, status, message in (
            ("/embed", {"inputs": "a"}, 424, "multi_vector model: POST to /embed_all"),
            ("/embed_sparse", {"inputs": "a"}, 424, "POST to /embed_all"),
            ("/v1/embeddings", {"input": "a"}, 424, "POST to /embed_all"),
            ("/search", {"vectors": [[0.5]]}, 422, "have to look like [[[0.5"),
            ("/search", {"vectors": [[]]}, 400, "one token at least"),
            ("/search", {"vectors": [[[0.5]]]}, 422, "have 128 dimensions, got 1"),
            ("/search", {"inputs": "a", "reasons": 1}, 422, "multi_vector"),
        ):
            answer = running.post(path, **body)
            assert answer.status_code == status and message in answer.text, answer.text
    with serving(models["dense"]) as running:
        answer = running.post("/embed_all", inputs="a")
        assert answer.status_code == 424 and "is a dense model: POST to /embed." in answer.json()["error"]


def test_the_pooling_of_a_model_that_takes_the_last_token_is_said(tiny_backbone):
    service = Service(lion_st.build(tiny_backbone(), "dense", pooling="last_token"), ServerSettings("unused"))
    assert service.info()["model_type"] == {"embedding": {"pooling": "last_token"}}
    service.close()


def test_info_health_and_metrics_say_how_the_server_is(sparse, models):
    info = sparse.client.get("/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "splade"}}
    assert (info["model_dtype"], info["max_client_batch_size"], info["max_input_length"]) == ("float32", 8, 24)
    assert info["index"] == {"engine": "exact", "paradigm": "sparse", "documents": 8, "idf": False}
    with httpx.Client(base_url=sparse.url) as anyone:
        assert anyone.get("/health").status_code == 200
        metrics = anyone.get("/metrics").text
    assert re.search(r'^te_request_success_total{method="search"} \d', metrics, re.M)
    assert re.search(r"^te_batch_next_size_count [1-9]", metrics, re.M)
    assert "lion_st_index_documents 8.0" in metrics


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "message"),
    [
        ("/embed_sparse", {"inputs": []}, 400, "Empty", "cannot be empty"),
        ("/embed_sparse", {"inputs": ["a", " "]}, 400, "Empty", "cannot be empty"),
        ("/embed_sparse", {"inputs": ["a"] * 9}, 413, "Validation", "batch size 9 > maximum allowed batch size 8"),
        ("/embed_sparse", {"inputs": "long " * 40, "truncate": False}, 413, "Validation", "at most 24 tokens"),
        ("/embed_sparse", {"inputs": "x" * 20_001}, 413, "Validation", "at most 20,000 bytes"),
        ("/embed_sparse", {"inputs": "a", "prompt_name": "q"}, 422, "Validation", "got 'q'"),
        ("/embed_sparse", {"inputs": "a", "truncation_direction": "left"}, 422, "Validation", "at the right alone"),
        ("/embed_sparse", {"inputs": [[1, 2]]}, 422, "Validation", "inputs"),
        ("/embed_sparse", {"texts": "a"}, 422, "Validation", "inputs: Field required"),
        ("/embed_sparse", {"inputs": "a\ud800"}, 422, "Validation", "not valid Unicode"),
        ("/embed", {"inputs": "a"}, 424, "Backend", "sparse model: POST to /embed_sparse"),
        ("/search", {"inputs": "a", "k": 6}, 422, "Validation", "`k` is at most 5, got 6"),
        ("/search", {"inputs": "a", "top_k": 6}, 422, "Validation", "top_k"),
        ("/search", {}, 422, "Validation", "inputs or vectors"),
        ("/search", {"vectors": [[{"index": 99_999, "value": 1}]]}, 422, "Validation", "got 99999: of another vocab"),
        ("/search", {"vectors": [[{"index": 5, "value": -1}]]}, 422, "Validation", "greater than or equal to 0"),
        ("/search", {"vectors": [[0.5, 0.5]]}, 422, "Validation", "The index holds sparse vectors"),
        ("/search", {"vectors": [[{"index": 5, "value": 1e38}]]}, 422, "Validation", "less than or equal to 1"),
        ("/search", {"vectors": [[{"index": 5, "value": float("nan")}]]}, 422, "Validation", "equal to"),
        ("/search", {"vectors": [[{"index": 2**70, "value": 1}]]}, 422, "Validation", "less than 2147483648"),
        ("/search", {"vectors": [[{"index": "5", "value": 1}]]}, 422, "Validation", "valid integer"),
        ("/search", {"vectors": []}, 400, "Empty", "`vectors` cannot be empty"),
        ("/search", {"inputs": "a", "k": 10**30}, 422, "Validation", "`k` is at most 5, got 1000"),
        ("/search", {"inputs": "a", "k": True}, 422, "Validation", "k: Input should be a valid integer"),
        ("/search", {"inputs": "a", "k": 0}, 422, "Validation", "k: Input should be greater than"),
        ("/search", {"inputs": "a", "texts": "no"}, 422, "Validation", "texts: Input should be a valid boolean"),
        ("/search", {"inputs": "a", "\ud800": 6}, 422, "Validation", "unicode string"),
        ("/embed_sparse", {"inputs": "a", "truncation_direction": "\ud800"}, 422, "Validation", "not valid Unicode"),
        ("/embed_sparse", {"inputs": "a", "prompt_name": "q" * 9_000}, 422, "Validation", "qqq..."),
        ("/embed_sparse", None, 422, "Validation", "valid dictionary"),
        ("/embed_sparse", "text", 422, "Validation", "valid dictionary"),
        ("/nothing", {}, 404, "Validation", "Not Found"),
    ],
)
def test_a_bad_request_gets_the_status_and_the_body_of_tei(sparse, path, body, status, kind, message):
    answer = sparse.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error", "error_type"}
    assert answer.json()["error_type"] == kind and message in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"inputs": "\xff"}', 400),
        (b"[" * 15_000, 400),  # deeper than Python reads
        (b'{"inputs": "a", "k": ' + b"1" * 5_000 + b"}", 400),  # a longer number than Python reads
        ('{"inputs": "a"}'.encode("utf-16"), 200),  # JSON may be so
    ],
    ids=["empty", "cut", "encoding", "deep", "long number", "utf-16"],
)
def test_a_body_that_cannot_be_read_is_refused(sparse, content, status):
    answer = sparse.client.post("/embed_sparse", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert status == 200 or (answer.json()["error_type"] == "Validation" and answer.json()["error"])


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_called_json_is_refused_with_what_to_send(sparse, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = sparse.client.post("/embed_sparse", content=b'{"inputs": "a"}', headers=headers)
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["error"]


def test_other_methods_get_what_http_says(sparse):
    for path in ("/health", "/info", "/metrics"):  # load balancers ask for the head alone
        answer = sparse.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    for method, path, allowed in (("OPTIONS", "/embed_sparse", "POST"), ("GET", "/search", "POST")):
        answer = sparse.client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["error_type"] == "Validation"


def test_a_header_that_does_not_end_ends_the_connection(sparse):
    host, port = sparse.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /embed_sparse HTTP/1.1\r\nHost: a\r\nX-Long: ")
        answer = b""
        with suppress(ConnectionError):  # the server may have closed it by now
            for _ in range(64):
                connection.sendall(b"x" * 65_536)
        with suppress(ConnectionError):
            answer = connection.recv(100)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert sparse.client.get("/health").status_code == 200


def test_what_is_no_json_or_has_no_key_is_refused(sparse):
    json_type = {"Content-Type": "application/json"}
    answer = sparse.client.post("/embed_sparse", content=b'{"inputs": "a"', headers=json_type)
    assert (answer.status_code, answer.json()["error_type"]) == (400, "Validation")
    chunks = iter([b'{"inputs": "' + b"x" * 15_000, b"x" * 15_000 + b'"}'])  # without a length that it could be told by
    assert sparse.client.post("/embed_sparse", content=chunks, headers=json_type).status_code == 413
    for key in (None, "Bearer wrong", "secret"):
        with httpx.Client(headers={} if key is None else {"Authorization": key}) as other:
            answer = other.post(f"{sparse.url}/embed_sparse", json={"inputs": "a"})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["error_type"] == "Unauthorized"


def test_requests_that_wait_together_are_encoded_in_one_pass(models):
    model = models["sparse"]
    with (
        serving(model, max_client_batch_size=4, max_concurrent_requests=9) as running,
        held(model) as (passes, holding, release),
    ):
        with ThreadPoolExecutor(16) as clients:

            def ask(texts: list[str], task: str = "document") -> Any:
                return clients.submit(running.post, "/embed_sparse", inputs=texts, prompt_name=task)

            answers = [ask([TEXTS[0]])]  # which the model holds
            assert holding.wait(PATIENCE)
            answers += [ask([text]) for text in TEXTS[1:5]] + [ask(TEXTS[5:8])]
            wait_until(lambda: len(running.service.queue) == 7)
            answers.append(ask([TEXTS[0]], "query"))  # of another kind, in a pass of its own
            wait_until(lambda: len(running.service.queue) == 8)
            full = running.post("/embed_sparse", inputs="one more")
            assert (full.status_code, full.json()["error_type"]) == (429, "Overloaded")
            assert full.headers["retry-after"] == "1"
            release.set()
            rows = [row for answer in answers[:-1] for row in answer.result().json()]
            assert answers[-1].result().status_code == 200
        assert passes == [1, 7, 1]
    expected = encode_texts(model, TEXTS, "document")
    for row, values in enumerate(rows):
        assert [value["index"] for value in values] == to_csr(expected[[row]]).indices.tolist()


def test_a_pass_has_no_more_tokens_than_the_budget(models):
    model = models["sparse"]
    with serving(model, max_batch_tokens=60) as running, held(model) as (passes, holding, release):
        with ThreadPoolExecutor(16) as clients:
            first = clients.submit(running.post, "/embed_sparse", inputs="held")
            assert holding.wait(PATIENCE)
            others = [clients.submit(running.post, "/embed_sparse", inputs="long " * 40) for _ in range(5)]  # 24 tokens
            wait_until(lambda: len(running.service.queue) == 5)
            release.set()
            assert [one.result().status_code for one in (first, *others)] == [200] * 6
        assert passes == [1, 2, 2, 1]


def test_one_request_that_the_model_fails_on_is_no_error_of_the_others(models):
    model = models["sparse"]
    with serving(model) as running, held(model) as (_, holding, release):
        hold = model.forward
        failed: list[Any] = []
        held_on_to: list[bool] = []  # whether vectors of a failed pass still take memory when the next one begins

        def fail_on_long(features: dict[str, Any], **options: Any) -> Any:
            held_on_to.append(any(one() is not None for one in failed))
            out = hold(features, **options)
            if features["input_ids"].numel() > 40:
                failed.append(weakref.ref(out["sentence_embedding"]))
                raise RuntimeError("out of memory")
            return out

        model.forward = fail_on_long
        with ThreadPoolExecutor(4) as clients:
            first = clients.submit(running.post, "/embed_sparse", inputs="held")
            assert holding.wait(PATIENCE)
            large = clients.submit(running.post, "/embed_sparse", inputs=["long " * 40] * 2)
            small = clients.submit(running.post, "/embed_sparse", inputs="small")
            wait_until(lambda: len(running.service.queue) == 3)
            release.set()
            assert [first.result().status_code, small.result().status_code] == [200, 200]
            assert large.result().status_code == 424 and "out of memory" in large.result().json()["error"]
        assert len(failed) == 2 and held_on_to == [False] * 4
        assert running.client.get("/health").status_code == 200


def test_a_server_whose_gpu_fails_at_everything_is_not_healthy(models, monkeypatch):
    def illegal_access(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", illegal_access)
    assert batching.is_lost(torch.device("cuda:1")) and not batching.is_lost(torch.device("cpu"))
    model = models["dense"]
    with serving(model) as running, held(model):
        model.forward = lambda *_, **__: illegal_access(torch.device("cuda"))
        assert running.post("/embed", inputs="a").status_code == 424
        assert running.client.get("/health").status_code == 200  # the next request may go well
        monkeypatch.setattr(batching, "is_lost", lambda device: True)
        assert running.post("/embed", inputs="a").status_code == 424
        assert running.client.get("/health").status_code == 503  # so that the server is started anew


def test_a_request_that_takes_too_long_ends_and_leaves_the_queue(models):
    model = models["dense"]
    with serving(model, timeout=0.3) as running, held(model) as (passes, _, release):
        with ThreadPoolExecutor(2) as clients:
            asked = [clients.submit(running.post, "/embed", inputs=text) for text in TEXTS[:2]]
            answers = [one.result() for one in asked]
        assert [answer.status_code for answer in answers] == [504, 504]
        assert answers[0].json()["error_type"] == "Timeout"
        with pytest.raises(HfHubHTTPError):
            InferenceClient(running.url).feature_extraction("too long")
        release.set()
        assert running.post("/embed", inputs="now").status_code == 200
        assert sum(passes) <= 3  # those whose clients had gone were not encoded, but for the one that had begun


def test_a_shutdown_answers_what_is_under_way(models):
    model = models["dense"]
    running = Running(Service(model, ServerSettings("unused")))
    with held(model) as (_, holding, release), ThreadPoolExecutor(2) as clients:
        asked = clients.submit(httpx.post, f"{running.url}/embed", json={"inputs": TEXTS[0]}, timeout=PATIENCE)
        assert holding.wait(PATIENCE)
        running.server.should_exit = True
        wait_until(lambda: not running.server.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError):
            httpx.post(f"{running.url}/embed", json={"inputs": "late"})
        release.set()
        assert asked.result().status_code == 200
    running.stop()
    assert not running.service.queue.is_alive


def test_an_index_that_was_built_anew_is_searched_without_a_pause(models, index, tmp_path):
    model = models["sparse"]
    rows = encode_texts(model, TEXTS, "document")
    source = load_index(index).source

    def build(prefix: str, vectors: Any) -> None:
        built = create_index("exact", "sparse")
        built.source = source
        built.add([f"{prefix}{number}" for number in range(vectors.shape[0])], vectors)
        write_corpus(corpus, {f"{prefix}{number}": f"{prefix} text" for number in range(vectors.shape[0])})
        built.save(tmp_path / "index", overwrite=True)

    corpus = tmp_path / "corpus.jsonl"
    build("old", rows)
    settings = {"index": str(tmp_path / "index"), "corpus": str(corpus), "reload_seconds": 0.02}
    with serving(model, tmp_path / "texts", **settings) as running:
        seen: list[set[str]] = []

        def search() -> set[str]:
            answer = running.post("/search", inputs=TEXTS[3], k=8)
            assert answer.status_code == 200, answer.text
            assert all(hit["text"] == f"{hit['id'][:3]} text" for hit in answer.json()[0])
            seen.append({hit["id"][:3] for hit in answer.json()[0]})
            return seen[-1]

        assert search() == {"old"}
        build("new", rows[::-1])
        wait_until(lambda: search() == {"new"})
        assert all(len(names) == 1 for names in seen)  # never of both
        build("bad", to_csr(rows.toarray()[:, :300]))  # of another vocabulary
        failed = 'lion_st_index_reloads_total{result="failure"} 1.0'
        wait_until(lambda: failed in running.client.get("/metrics").text)
        assert search() == {"new"}
        corpus.unlink()
        build_alone = create_index("exact", "sparse")
        build_alone.source = source
        build_alone.add(["x"], rows[:1])
        build_alone.save(tmp_path / "index", overwrite=True)  # whose texts are not there
        wait_until(lambda: failed.replace("1.0", "2.0") in running.client.get("/metrics").text)
        assert search() == {"new"}
        assert len([one for one in (tmp_path / "texts").iterdir() if one.is_dir()]) == 1


def test_of_texts_with_one_id_the_first_is_shown_which_is_encoded(tmp_path):
    rows = [{"id": "a", "text": "first"}, {"id": "b", "text": "other"}, {"id": "a", "text": "second"}]
    texts = TextStore(TextStore.write(rows, tmp_path / "texts"))
    assert [texts.get(one) for one in ("a", "b", "c")] == ["first", "other", None]


def test_an_index_of_another_model_is_refused(models, index, tiny_backbone):
    other = lion_st.build(tiny_backbone(tied=False), "sparse")
    with pytest.raises(StorageError, match=r"other weights.*allow_other_model=True"):
        Service(other, ServerSettings("unused", index=str(index)))
    service = Service(other, ServerSettings("unused", index=str(index), allow_other_model=True))
    service.close()
    for settings in ({"activation": "double_log1p"}, {"causal": True}):  # of the same weights
        with pytest.raises(StorageError, match="another attention or head"):
            Service(lion_st.build(tiny_backbone(), "sparse", **settings), ServerSettings("unused", index=str(index)))
    with pytest.raises(StorageError, match=r"holds sparse vectors, and .* is a dense model"):
        Service(models["dense"], ServerSettings("unused", index=str(index)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"port": 65_536},
        {"timeout": float("nan")},
        {"reload_seconds": -1.0},
        {"max_client_batch_size": 600},
        {"api_key": ""},
        {"corpus": "documents.jsonl"},
        {"corpus": "-", "index": "index"},
        {"idf": True},
    ],
)
def test_settings_that_make_no_server_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerSettings("model", **wrong)


def test_workers_of_the_command_share_a_socket_an_index_and_their_metrics(models, index, tmp_path):
    lion_st.export(models["sparse"], tmp_path / "model", create_model_card=False, verify=False)
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    command = [sys.executable, "-m", "lion_st", "serve", str(tmp_path / "model"), "--port", "0", "--workers", "2"]
    command += ["--index", str(index), "--corpus", corpus, "--allow-other-model", "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LION_ST_API_KEY": "secret"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            url = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())[0]
            wait_until(lambda: process.poll() is not None or _is_up(url), every=0.5)
            for _ in range(8):  # on a connection each, which any worker may take
                answer = httpx.post(
                    f"{url}/search", json={"inputs": TEXTS[2]}, headers={"Authorization": "Bearer secret"}, timeout=60
                )
                assert answer.json()[0][0]["text"] in TEXTS
            assert 'te_request_success_total{method="search"} 8.0' in httpx.get(f"{url}/metrics").text
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False
