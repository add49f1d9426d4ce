"""Teachers: what scores a query with a document, each with all that its scores depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash

from lion_st.checkpoints import is_exported_pair, read_config
from lion_st.data.lookup import text_keys_of
from lion_st.encoding.fingerprints import model_fingerprint, model_name, model_revision
from lion_st.extras import require

PROMPT = (
    "Query: {query}\nDocument: {document}\n"
    "Does the document answer the query, or say what the query is about? Answer with yes or no.\nAnswer:"
)
ROLES = ("query", "document")  # of the messages that CrossEncoder makes of a pair
PAIRS_AT_ONCE = 1024  # whose vectors are multiplied together
COVERAGE = "each time that a term occurs in the query"  # part of the settings: changed when the same ones give others
SPARSE_MODULES = ("SpladePooling", "SpladeHead")


@runtime_checkable
class Teacher(Protocol):
    """Scores pairs of texts."""

    def settings(self) -> dict[str, Any]:
        """All that the scores depend on, as JSON."""
        ...

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """The score of each query with the document at its place, float [pairs]."""
        ...


class Reranker:
    """A cross-encoder, or a causal language model that answers yes or no, both as sentence-transformers' CrossEncoder.

    The score is the logit, before any activation: behind a sigmoid, documents far from 1/2 no longer differ. That of a
    causal language model is the logit of "yes" less that of "no".

    Args:
        model: A CrossEncoder of one label.
        batch_size: Pairs of a batch; batches are of like length.
        settings: Of the model, to be recorded beside its fingerprint.

    Raises:
        ValueError: If the model has several labels, or the batch size is not positive.
    """

    def __init__(self, model: Any, batch_size: int = 32, settings: dict[str, Any] | None = None) -> None:
        if model.num_labels != 1:
            raise ValueError(f"{model_name(model)} has {model.num_labels} labels, where a reranker has one score.")
        self.model = model
        self.batch_size = _at_least_1("batch_size", batch_size)
        self._settings = {"kind": "CrossEncoder"} | (settings or {})

    def settings(self) -> dict[str, Any]:
        """Kind, name, revision, fingerprint, type, length and batch size of the model, and its prompt."""
        length = {"max_tokens": self.model.max_seq_length}
        return self._settings | _describe(self.model) | length | {"batch_size": self.batch_size}

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """The logit of each pair, float32 [pairs]."""
        from torch import nn

        pairs = list(zip(queries, documents, strict=True))
        return self.model.predict(
            pairs, batch_size=self.batch_size, activation_fn=nn.Identity(), show_progress_bar=False
        )


class Encoder:
    """A SentenceTransformer, SparseEncoder or MultiVectorEncoder: the similarity of its vectors, by its own function.

    Args:
        model: The model; its prompts and lengths are those of `encode_query` and `encode_document`.
        batch_size: Texts of a batch; batches are of like length.
    """

    def __init__(self, model: Any, batch_size: int = 32) -> None:
        self.model = model
        self.batch_size = _at_least_1("batch_size", batch_size)

    def settings(self) -> dict[str, Any]:
        """Kind, name, revision, fingerprint, type, similarity and batch size of the model."""
        from sentence_transformers import MultiVectorEncoder, SparseEncoder

        kinds = (MultiVectorEncoder, SparseEncoder)
        kind = next((one.__name__ for one in kinds if isinstance(self.model, one)), "SentenceTransformer")
        similarity = {"similarity": str(self.model.similarity_fn_name), "batch_size": self.batch_size}
        return {"kind": kind} | _describe(self.model) | similarity

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """The similarity of each pair, float32 [pairs]; each text is encoded once."""
        import torch
        from sentence_transformers import MultiVectorEncoder

        vectors: list[Any] = []  # a tensor of rows, or a list with a tensor of token vectors for each text
        rows = []
        for texts, encode in ((queries, self.model.encode_query), (documents, self.model.encode_document)):
            places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
            options: dict[str, Any] = {"batch_size": self.batch_size, "show_progress_bar": False}
            if not isinstance(self.model, MultiVectorEncoder):
                options["convert_to_tensor"] = True
            vectors.append(encode(list(places), **options))
            rows.append(torch.tensor([places[text] for text in texts], device=vectors[-1][0].device))
        scores = [
            self.model.similarity_pairwise(*map(_taken, vectors, parts))
            for parts in zip(*(one.split(PAIRS_AT_ONCE) for one in rows), strict=True)
        ]
        return torch.cat(scores).float().cpu().numpy()


def _taken(vectors: Any, rows: Any) -> Any:
    """Some rows of vectors, which are a list where texts have several each."""
    return [vectors[row] for row in rows.tolist()] if isinstance(vectors, list) else vectors.index_select(0, rows)


class Bm25:
    """BM25 over a collection, through bm25s with the tokens of `Bm25Retriever`.

    Args:
        k1: Saturation of the term frequency.
        b: Length normalisation, 0 to 1.
        coverage: Divide by the sum of the idf of the query's terms, each as often as it occurs there, which BM25 in
            Lucene's form cannot reach: the share of the query's information that the document holds, from 0 to below 1.

    Example:
        >>> teacher = Bm25()
        >>> teacher.index(["Lions hunt at night.", "Tigers hunt alone."])
        >>> teacher.score(["do lions hunt"], ["Lions hunt at night."]).round(3)
        array([0.461], dtype=float32)
    """

    def __init__(self, k1: float = 0.9, b: float = 0.4, coverage: bool = False) -> None:
        if not (k1 >= 0 and 0 <= b <= 1):
            raise ValueError(f"k1 is at least 0 and b from 0 to 1, got k1={k1} and b={b}.")
        self.k1 = k1
        self.b = b
        self.coverage = coverage
        self.collection = ""  # checksum of what is indexed

    def index(self, documents: Iterable[str]) -> None:
        """Take the documents to score, and whose statistics count.

        Raises:
            ValueError: If there are none.
        """
        from scipy.sparse import csc_array

        bm25s = require("bm25s")
        texts = list(documents)
        if not texts:
            raise ValueError("BM25 needs at least one document.")
        bm25 = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
        bm25.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
        values, rows, starts = (bm25.scores[part] for part in ("data", "indices", "indptr"))
        self._weights = csc_array((values, rows, starts), shape=(len(texts), len(starts) - 1)).tocsr()
        frequency = np.diff(starts)
        self._idf = np.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
        self._terms: dict[str, int] = bm25.vocab_dict
        keys = text_keys_of(texts)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self.collection = xxhash.xxh3_128_hexdigest(keys.tobytes())

    def settings(self) -> dict[str, Any]:
        """Kind, parameters and a checksum of the documents."""
        parameters = {"k1": self.k1, "b": self.b, "coverage": self.coverage and COVERAGE}
        return {"kind": "BM25", **parameters, "documents_xxh3": self.collection}

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """BM25 of each pair, float32 [pairs].

        Raises:
            ValueError: If a document is not in the collection, or nothing was indexed.
        """
        from scipy.sparse import csr_array

        bm25s = require("bm25s")
        if not self.collection:
            raise ValueError("BM25 has no documents yet: call index(documents) before score.")
        asked = {query: place for place, query in enumerate(dict.fromkeys(queries))}
        tokens = bm25s.tokenize(list(asked), return_ids=False, show_progress=False)
        terms = [[self._terms[token] for token in row if token in self._terms] for row in tokens]
        weights = csr_array(
            (
                np.ones(sum(map(len, terms)), np.float32),
                np.array([term for row in terms for term in row], np.int64),
                np.cumsum([0, *map(len, terms)]),
            ),
            shape=(len(terms), self._weights.shape[1]),
        )
        rows = np.array([asked[query] for query in queries])
        scores = np.concatenate(
            [
                weights[rows[start : start + PAIRS_AT_ONCE]]
                .multiply(self._weights[self._rows(documents[start : start + PAIRS_AT_ONCE])])
                .sum(1)
                for start in range(0, len(rows), PAIRS_AT_ONCE)
            ]
        )
        if self.coverage:
            scores = scores / np.array([max(self._idf[row].sum(), 1e-6) for row in terms])[rows]
        return scores.astype(np.float32)

    def _rows(self, documents: Sequence[str]) -> np.ndarray:
        keys = text_keys_of(documents)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        unknown = np.flatnonzero(self._keys[places] != keys)
        if len(unknown):
            raise ValueError(
                f"BM25's collection lacks the document {documents[unknown[0]][:80]!r}: index the documents that the "
                "tuples were made from."
            )
        return self._order[places]


def load_teacher(
    model: str | Path,
    *,
    batch_size: int = 32,
    max_tokens: int | None = None,
    prompt: str | None = None,
    yes: str = " yes",
    no: str = " no",
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> Teacher:
    """Open a model as a teacher of its kind, which its configuration says.

    | model | score |
    |---|---|
    | CrossEncoder, or any model for sequence classification with one label | logit |
    | causal language model | logit of yes less that of no, behind the prompt |
    | SentenceTransformer, SparseEncoder, MultiVectorEncoder, Lion checkpoint | similarity, by its own function |

    Args:
        model: Folder or Hub repository.
        batch_size: Pairs, or texts, of a batch.
        max_tokens: Length to cut a pair to, in place of a reranker's own. Documents are cut, not what follows them.
        prompt: Of a causal language model, with {query} and, behind it, {document}: all that the model reads, with
            the marks of its dialogues if it has such.
        yes: Answer of a causal language model that means relevant, one token; with the space that follows the prompt.
        no: Answer that means not relevant.
        device: Torch device; under torchrun each process takes its own GPU.
        dtype: Of the weights; "auto" is the checkpoint's own.
        revision: Hub revision.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is of another kind, or a setting is not one of its kind or out of range.

    Example:
        ::

            teacher = load_teacher("cross-encoder/ms-marco-MiniLM-L6-v2")
            teacher.score(["what do lions eat"], ["Lions prey on zebras."])
    """
    name = str(model)
    is_pair = is_exported_pair(name, {"revision": revision})
    kind, modules = ("hybrid", []) if is_pair else _kind_of(name, revision)
    options: dict[str, Any] = {"device": device, "revision": revision}
    if dtype != "auto":
        options["model_kwargs"] = {"dtype": dtype}
    own = {"prompt": prompt is not None, "yes": yes != " yes", "no": no != " no"}
    _refuse(name, kind, [setting for setting, given in own.items() if given and kind != "causal"])
    if kind == "causal":
        return _causal_reranker(name, prompt or PROMPT, yes, no, max_tokens, batch_size, options)
    from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

    if kind == "CrossEncoder":
        return Reranker(CrossEncoder(name, max_length=max_tokens, **options), batch_size)
    _refuse(name, kind, ["max_tokens"] if max_tokens is not None else [])
    if is_pair or any(module.endswith("HybridHead") for module in modules):
        raise ValueError(
            f"{name} is a hybrid model, whose two scores have no common scale: give one of the two folders that "
            "lion_st.export writes of it, or both as two teachers."
        )
    if kind == "SentenceTransformer" and any(module.endswith(SPARSE_MODULES) for module in modules):
        from lion_st.models import load  # a sparse Lion model, whose rows would be dense there

        return Encoder(load(name, as_sparse_encoder=True, device=device, dtype=dtype, revision=revision), batch_size)
    kinds: dict[str, Any] = {"SparseEncoder": SparseEncoder, "MultiVectorEncoder": MultiVectorEncoder}
    return Encoder(kinds.get(kind, SentenceTransformer)(name, **options), batch_size)


def pair_template(prompt: str, begins_with_bos: bool) -> str:
    """A chat template (Jinja) that makes a pair's roles `query` and `document` into a prompt."""
    before, query, rest = prompt.partition("{query}")
    between, document, after = rest.partition("{document}")
    if not (query and document) or "{query}" in between + after or "{document}" in before + after:
        raise ValueError(
            f"The prompt is {prompt[:80]!r}: write {{query}} and, behind it, {{document}}, each once. Long documents "
            "are cut at their end."
        )
    roles = [f'messages | selectattr("role", "eq", "{role}") | map(attribute="content")' for role in ROLES]
    parts = [f"{role} | first" for role in roles]
    shown = [json.dumps(text, ensure_ascii=False) for text in (before, between, after)]
    texts = [shown[0], parts[0], shown[1], parts[1], shown[2]]
    return ("{{ bos_token }}" if begins_with_bos else "") + "".join(f"{{{{ {text} }}}}" for text in texts)


def _causal_reranker(
    name: str, prompt: str, yes: str, no: str, max_tokens: int | None, batch_size: int, options: dict[str, Any]
) -> Reranker:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore
    from transformers import AutoTokenizer

    hub = {"revision": options["revision"]}
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    answers = []
    for answer in (yes, no):
        tokens = tokenizer.encode(answer, add_special_tokens=False)
        if len(tokens) != 1:
            raise ValueError(
                f"The answer {answer!r} is {len(tokens)} tokens of {name}, where one is compared: give another, as yes "
                "and no."
            )
        answers += tokens
    if answers[0] == answers[1]:
        raise ValueError(f"The answers {yes!r} and {no!r} are the same token of {name}: give others, as yes and no.")
    transformer = Transformer(
        name,
        transformer_task="text-generation",
        model_kwargs={**hub, **options.get("model_kwargs", {})},
        config_kwargs=hub,
        processor_kwargs={**hub, "chat_template": pair_template(prompt, begins_with_bos)},
        max_seq_length=max_tokens,
    )
    model = CrossEncoder(modules=[transformer, LogitScore(*answers)], device=options["device"])
    return Reranker(model, batch_size, {"kind": "causal language model", "prompt": prompt, "yes": yes, "no": no})


def _kind_of(name: str, revision: str | None) -> tuple[str, list[str]]:
    """The kind of a model, and the classes of its modules if it is of sentence-transformers."""
    files = ("config_sentence_transformers.json", "modules.json", "config.json")
    stock, modules, config = (read_config(name, file, {"revision": revision}) for file in files)
    classes = [module["type"] for module in modules]
    if stock.get("model_type") in ("CrossEncoder", "SentenceTransformer", "SparseEncoder", "MultiVectorEncoder"):
        return stock["model_type"], classes
    if str(stock.get("similarity_fn_name")).lower() == "maxsim":  # PyLate's, which name no class
        return "MultiVectorEncoder", classes
    if classes:
        return "SparseEncoder" if any("sparse_encoder" in one for one in classes) else "SentenceTransformer", classes
    architecture = (config.get("architectures") or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return "CrossEncoder", classes
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal", classes
    if not config:
        raise FileNotFoundError(f"{name} is not a folder with a model, nor one that the Hub gives.")
    raise ValueError(
        f"{name} is a {architecture or 'model of an unknown class'}, which scores no pairs: name a CrossEncoder, a "
        "causal language model, a SentenceTransformer, a SparseEncoder or a MultiVectorEncoder."
    )


def _describe(model: Any) -> dict[str, Any]:
    return {
        "model": model_name(model),
        "revision": model_revision(model),
        "model_xxh3": model_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _refuse(name: str, kind: str, settings: list[str]) -> None:
    if settings:
        raise ValueError(f"{name} is a {kind}, which has no {' and no '.join(settings)}: leave it out.")


def _at_least_1(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is at least 1, got {value}.")
    return value
