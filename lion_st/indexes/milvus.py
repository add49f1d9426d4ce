"""Sparse, dense and hybrid search in Milvus: in a file with Milvus Lite, or on a cluster, with the same code."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from lion_st.encoding.storage import StorageError, read_folder
from lion_st.encoding.vectors import HybridVectors
from lion_st.errors import require_at_least
from lion_st.extras import require
from lion_st.indexes.base import (
    CAN_CHANGE,
    CONVERTERS,
    KIND,
    VERSION,
    Hits,
    Index,
    Paradigm,
    as_ids,
    refuse_texts,
)
from lion_st.indexes.fusion import require_weights

MAX_ID_BYTES = 512
METRIC = {"metric_type": "IP"}
SOURCE_PROPERTY = "lion_st.source"  # of a collection: the digest of what its documents come from


class MilvusIndex(Index):
    """A Milvus collection behind the index protocol.

    The collection is the store: `add` returns once Milvus has acknowledged the rows, and an acknowledged row survives
    the death of the process. Adding an id again replaces its vectors, so an interrupted load is simply repeated. `save`
    writes a small folder that says where the collection is, for `load_index`.

    A collection holds the documents of one `source`, whose digest is a property of the collection: documents of another
    one are refused before any is stored, and so is loading an index whose collection was filled anew since. Nothing is
    compared where the index or, in loading, the collection knows no source.

    A sparse document without terms, which no query can find, is left out; a hybrid one is refused.

    Args:
        paradigm: "sparse", "dense", or "hybrid", whose vectors and queries are pairs (sparse [N, V], dense [N, D]).
        uri: A file for Milvus Lite ("corpus.db", made if needed) or the address of a cluster ("http://host:19530").
        collection: Name of the collection; it is opened if it exists.
        token: "user:password" or API key of a cluster; never saved. By default that of the variable MILVUS_TOKEN, which
            in loading goes only to the address that the variable MILVUS_URI names.
        rows_per_request: Documents sent at once.
        dense_index_type: Milvus index of the dense field: FLAT, HNSW, IVF_FLAT or AUTOINDEX.
        candidates: Hybrid: documents taken from each side for fusion, at least k.
        weights: Hybrid: weights of the (sparse, dense) scores, each mapped to 0..1 by Milvus' arctangent; None fuses
            by reciprocal rank.
    """

    engine = "milvus"
    not_portable = "whose folder names a collection and does not hold it"
    paradigms = ("sparse", "dense", "hybrid")
    parameters = ("uri", "collection", "rows_per_request", "dense_index_type", "candidates", "weights")

    def __init__(
        self,
        paradigm: Paradigm,
        uri: str = "lion_st.db",
        collection: str = "lion_st",
        token: str | None = None,
        rows_per_request: int = 1000,
        dense_index_type: str = "FLAT",
        candidates: int = 200,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(paradigm)
        pymilvus = require("pymilvus")
        if weights is not None:
            require_weights(weights, 2)
        require_at_least(1, rows_per_request=rows_per_request, candidates=candidates)
        self.uri = str(uri) if "://" in str(uri) else str(Path(uri).resolve())
        self.collection = collection
        self.rows_per_request = rows_per_request
        self.dense_index_type = dense_index_type
        self.candidates = candidates
        self.weights = [float(weight) for weight in weights] if weights is not None else None
        # A cluster is asked for what was just added; Milvus Lite always answers so and knows no consistency levels.
        self._consistency = {"consistency_level": "Strong"} if "://" in self.uri else {}
        # Milvus Lite builds the index of rows that were not flushed anew in every search; an earlier process that died
        # may have left some.
        self._is_flushed = False
        self._is_claimed = False  # whether the collection was found to hold documents of this source
        try:
            self._client = pymilvus.MilvusClient(
                self.uri, token=os.environ.get("MILVUS_TOKEN", "") if token is None else token
            )
        except pymilvus.MilvusException as error:
            raise StorageError(
                f"Milvus at {self.uri} cannot be opened ({error.message}): name a file that ends in .db, or the "
                "address of a server that runs, such as http://localhost:19530."
            ) from error
        if self._client.has_collection(collection):
            self._check_collection()

    def __len__(self) -> int:
        if not self._client.has_collection(self.collection):
            return 0
        counted = self._client.query(self.collection, filter="", output_fields=["count(*)"], **self._consistency)
        return int(counted[0]["count(*)"])

    def add(self, ids: Sequence[str], vectors: Any) -> None:
        """Store documents; see `Index.add`. An id that is there already is replaced.

        Raises:
            ValueError: If hybrid vectors bring fitted weights and the index has none of its own.
            StorageError: If the collection holds documents of another source, or of none that is known.
        """
        ids = as_ids(ids)
        if len(set(ids)) < len(ids):
            raise ValueError("An id occurs twice among the documents to add: ids must be unique.")
        for one in ids:
            if not one or len(one.encode()) > MAX_ID_BYTES:
                raise ValueError(f"The id {one[:40]!r} has {len(one.encode())} bytes: give 1 to {MAX_ID_BYTES}.")
        fields = self._fields(vectors)
        for field, matrix in fields.items():
            if matrix.shape[0] != len(ids):
                raise ValueError(f"Got {len(ids)} ids for {matrix.shape[0]} {field} vectors: give one id per row.")
        if not self._client.has_collection(self.collection):
            self._create_collection(fields["dense"].shape[1] if "dense" in fields else None)
        elif not self._is_claimed:
            self._claim_collection()
        self._is_claimed = self.source is not None
        kept = list(range(len(ids)))
        if "sparse" in fields:
            empty = np.diff(fields["sparse"].indptr) == 0
            if self.paradigm == "hybrid" and empty.any():
                raise ValueError(f"The document {ids[int(empty.argmax())]!r} has no sparse term: leave it out.")
            kept = [row for row in kept if not empty[row]]
        for start in range(0, len(kept), self.rows_per_request):
            part = kept[start : start + self.rows_per_request]
            rows = [{"id": ids[row], **{name: _row(matrix, row) for name, matrix in fields.items()}} for row in part]
            self._is_flushed = False
            self._client.upsert(self.collection, rows)

    def search(self, queries: Any, k: int = 10, threads: int = 1, allowed: Collection[str] | None = None) -> list[Hits]:
        """Find the k best documents; see `Index.search`. Milvus sets its own threads, and takes no `allowed`."""
        if allowed is not None:
            raise NotImplementedError(
                f"The engine 'milvus' cannot search among some documents alone, {CAN_CHANGE} can."
            )
        if k < 1:
            raise ValueError(f"k is at least 1, got {k}.")
        fields = self._fields(queries)
        count = next(iter(fields.values())).shape[0]
        found: list[Hits] = [[] for _ in range(count)]
        k = min(k, len(self))
        if k == 0:
            return found
        if "://" not in self.uri:
            self._flush()
        if self.paradigm == "hybrid":
            for row in range(count):
                found[row] = self._hybrid_search({name: _row(matrix, row) for name, matrix in fields.items()}, k)
        else:
            ((name, matrix),) = fields.items()
            asked = [row for row in range(count) if len(_row(matrix, row))]
            for start in range(0, len(asked), 100):
                part = asked[start : start + 100]
                results = self._client.search(
                    self.collection,
                    [_row(matrix, row) for row in part],
                    anns_field=name,
                    search_params=METRIC,
                    limit=k,
                    output_fields=["id"],
                    **self._consistency,
                )
                for row, hits in zip(part, results, strict=True):
                    found[row] = [(hit["id"], float(hit["distance"])) for hit in hits]
        return found

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Flush the collection and write where it is; see `Index.save`."""
        self._flush()
        return self._write(path, overwrite, {}, {})

    @classmethod
    def load(
        cls, path: str | Path, *, memory_map: bool = False, verify: bool = True, token: str | None = None
    ) -> MilvusIndex:
        """Open the collection that `save` described; `token` is for a cluster.

        Raises:
            StorageError: If the file of Milvus Lite or the collection is not where it was, the collection holds
                documents of another source, or no such index was saved.
        """
        metadata = read_folder(path, KIND, VERSION, lambda metadata, _: metadata, verify)
        uri = str(metadata.get("parameters", {}).get("uri"))
        if "://" not in uri and not Path(uri).exists():
            raise StorageError(f"The collection of {path} was in {uri}, which is gone: build the index again.")
        if token is None and "://" in uri and os.environ.get("MILVUS_URI") != uri:
            token = ""  # the address is the index folder's, whoever wrote that
            if os.environ.get("MILVUS_TOKEN"):
                warnings.warn(
                    f"MILVUS_TOKEN is not sent to {uri}, an address that {path} names: set MILVUS_URI={uri} if it is "
                    "yours.",
                    stacklevel=2,
                )
        index = cls._opened(path, metadata, token=token)
        if not index._client.has_collection(index.collection):
            if metadata["documents"]:
                raise StorageError(
                    f"The collection {index.collection!r} of {path} is gone from {uri}: build the index again."
                )
        elif len(index) != metadata.get("documents"):
            raise StorageError(
                f"The collection {index.collection!r} at {uri} holds {len(index):,} documents and {path} was saved "
                f"with {metadata.get('documents')}: build the index again."
            )
        elif index.source is not None and index._stored_digest() not in (None, _digest(index.source)):
            raise StorageError(
                f"The collection {index.collection!r} at {uri} was filled anew since {path} was saved, from another "
                "model or corpus or with other pruning: build the index again, in a collection of another name."
            )
        return index

    def delete_collection(self) -> None:
        """Remove the collection and all its documents from Milvus."""
        if self._client.has_collection(self.collection):
            self._client.drop_collection(self.collection)
        self._is_claimed = False

    def close(self) -> None:
        """Close the connection; Milvus Lite then releases its file."""
        self._client.close()

    def _flush(self) -> None:
        if not self._is_flushed and self._client.has_collection(self.collection):
            self._client.flush(self.collection)
            self._is_flushed = True

    def _hybrid_search(self, query: dict[str, Any], k: int) -> Hits:
        from pymilvus import AnnSearchRequest, RRFRanker, WeightedRanker

        depth = max(self.candidates, k)
        requests = [AnnSearchRequest([vector], name, METRIC, depth) for name, vector in query.items() if len(vector)]
        is_weighted = self.weights is not None and len(requests) == 2
        ranker = WeightedRanker(*self.weights) if is_weighted else RRFRanker()  # type: ignore[misc]
        results = self._client.hybrid_search(
            self.collection, requests, ranker, limit=k, output_fields=["id"], **self._consistency
        )
        return [(hit["id"], float(hit["distance"])) for hit in results[0]]

    def require_weights(self, fitted: Sequence[float] | None) -> None:
        """Refuse a hybrid model's weights of fusion, which Milvus cannot take, unless the index has its own.

        Args:
            fitted: Weights of the model; None if it has none.

        Raises:
            ValueError: Naming them, and what to do.
        """
        if fitted is not None and self.weights is None:
            raise ValueError(
                f"The model's fusion weights {tuple(fitted)} are of scores from 0 to 1 by each query's least and "
                "greatest, and Milvus takes an arctangent in its place: use the engine exact or torch, or give this "
                "one weights of its own (--set weights=[0.5,0.5])."
            )

    def _fields(self, vectors: Any) -> dict[str, Any]:
        for part in vectors if isinstance(vectors, tuple) else (vectors,):
            refuse_texts(part)
        self.require_weights(vectors.weights if isinstance(vectors, HybridVectors) else None)
        found = CONVERTERS[self.paradigm](vectors)
        return {"sparse": found.sparse, "dense": found.dense} if self.paradigm == "hybrid" else {self.paradigm: found}

    def _create_collection(self, dense_dimensions: int | None) -> None:
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False)
        indexes = self._client.prepare_index_params()
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=MAX_ID_BYTES)
        if self.paradigm in ("sparse", "hybrid"):
            schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
            indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
        if dense_dimensions is not None:
            schema.add_field("dense", DataType.FLOAT_VECTOR, dim=dense_dimensions)
            indexes.add_index("dense", index_type=self.dense_index_type, metric_type="IP")
        properties = {} if self.source is None else {SOURCE_PROPERTY: _digest(self.source)}
        self._client.create_collection(self.collection, schema=schema, index_params=indexes, properties=properties)

    def _claim_collection(self) -> None:
        """Refuse a collection that holds documents of another source; an empty one takes this index's."""
        if self.source is None or self._stored_digest() == _digest(self.source):
            return
        if count := len(self):
            raise StorageError(
                f"The collection {self.collection!r} at {self.uri} already holds {count:,} documents that are not "
                "known to be of this model, corpus and pruning: name another collection, or delete this one first."
            )
        self._client.alter_collection_properties(self.collection, {SOURCE_PROPERTY: _digest(self.source)})

    def _stored_digest(self) -> str | None:
        return self._client.describe_collection(self.collection)["properties"].get(SOURCE_PROPERTY)

    def _check_collection(self) -> None:
        fields = {field["name"] for field in self._client.describe_collection(self.collection)["fields"]}
        wanted = {"id", *(("sparse", "dense") if self.paradigm == "hybrid" else (self.paradigm,))}
        if fields != wanted:
            raise ValueError(
                f"The collection {self.collection!r} at {self.uri} has the fields {sorted(fields)}, and a "
                f"{self.paradigm} index needs {sorted(wanted)}: name another collection."
            )
        self._client.load_collection(self.collection)

    def _bytes(self) -> int | None:
        path = Path(self.uri)
        if not path.exists():
            return None
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)


def _digest(source: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()


def _row(matrix: Any, row: int) -> Any:
    if isinstance(matrix, sparse.csr_array):
        span = slice(matrix.indptr[row], matrix.indptr[row + 1])
        return dict(zip(matrix.indices[span].tolist(), matrix.data[span].tolist(), strict=True))
    return matrix[row].tolist()
