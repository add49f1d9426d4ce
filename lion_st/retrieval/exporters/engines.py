"""Forms of engines that read JSON or SQL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy import sparse

from lion_st.encoding.vectors import keep_top_terms
from lion_st.retrieval.exporters.base import (
    CorpusFacts,
    Exporter,
    IntegerWeights,
    JsonLines,
    decimals,
    named,
    nine_bits,
    rows,
    to_json,
)

HASHED_TERMS = 65_536  # OpenSearch's sparse_vector counts terms modulo this
EF_SEARCH = 200  # candidates of pgvector's HNSW, whose 40 lose one in twenty of the best ten, see docs/deploy.md
POSTGRES_TERMS = 1000  # non-zeros of a vector under pgvector's HNSW
LEVELS = 255  # of OpenSearch's sparse_vector


class Anserini(IntegerWeights, JsonLines):
    """Anserini's and Pyserini's JsonVectorCollection, of integer weights."""

    def lines(self, one: str, row: int, terms: np.ndarray, weights: np.ndarray) -> list[Any]:
        """See `JsonLines.lines`."""
        return [{"id": one, "contents": "", "vector": named(terms, self.integers(weights).tolist())}]

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """Each term as often as its weight says."""
        pairs = zip(terms.tolist(), self.integers(weights).tolist(), strict=True)
        return " ".join(" ".join([str(term)] * count) for term, count in pairs)

    def finish(self, example: str) -> str:
        """See `Exporter.finish`."""
        if not (self.output / "queries.tsv").exists():
            (self.output / "queries.tsv").write_text(f"example\t{example}\n", "utf-8")
        return (
            "python -m pyserini.index.lucene --collection JsonVectorCollection --input documents --index index \\\n"
            "    --generator DefaultLuceneDocumentGenerator --threads 8 --impact --pretokenized\n"
            "# Anserini's program; queries.tsv repeats each term as often as its weight says\n"
            "bin/run.sh io.anserini.search.SearchCollection -index index -topics queries.tsv \\\n"
            "    -topicReader TsvString -output run.txt -impact -pretokenized -hits 1000"
        )


class OpenSearch(JsonLines):
    """OpenSearch's `rank_features`, which keep nine significant bits of a weight."""

    keeps = "nine significant bits"
    id_bytes = 512
    suffix = "ndjson"
    field: ClassVar[dict[str, Any]] = {"type": "rank_features"}

    def store(self, vectors: sparse.csr_array) -> sparse.csr_array:
        """Nine significant bits."""
        return nine_bits(vectors)

    def lines(self, one: str, row: int, terms: np.ndarray, weights: np.ndarray) -> list[Any]:
        """See `JsonLines.lines`."""
        action = {"index": {"_index": self.name, "_id": one}}
        return [action, {"id": one, "terms": named(terms, decimals(weights))}]

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """See `Exporter.query`."""
        tokens = named(terms, decimals(weights))
        return to_json({"size": 10, "_source": ["id"], "query": {"neural_sparse": {"terms": {"query_tokens": tokens}}}})

    def finish(self, example: str) -> str:
        """See `Exporter.finish`."""
        _write(self, "mapping.json", json.dumps(self.mapping(), indent=1))
        _write(self, "query.json", example)
        return _elastic_commands(self.name)

    def mapping(self) -> dict[str, Any]:
        """Settings and fields of the index."""
        return {"mappings": {"properties": {"id": {"type": "keyword"}, "terms": self.field}}}


class OpenSearchSparseVector(OpenSearch):
    """OpenSearch's approximate `sparse_vector` (3.3 and later), with the used terms numbered anew below 65,536."""

    keeps = "8-bit weights, used terms numbered anew"

    def __init__(self, output: Path, name: str, facts: CorpusFacts, scale: float | None = None) -> None:
        super().__init__(output, name, facts, scale)
        if len(facts.used) > HASHED_TERMS:
            raise ValueError(
                f"OpenSearch's sparse_vector takes terms modulo {HASHED_TERMS:,}, and the documents have "
                f"{len(facts.used):,} terms: convert to 'opensearch' (rank_features), or prune the vocabulary."
            )
        self.scale = LEVELS / facts.largest

    def mapping(self) -> dict[str, Any]:
        """Settings and fields of the index."""
        parameters = {"quantization_ceiling_ingest": float(self.facts.largest)}
        field = {"type": "sparse_vector", "method": {"name": "seismic", "parameters": parameters}}
        properties = {"id": {"type": "keyword"}, "terms": field}
        return {"settings": {"index": {"sparse": True}}, "mappings": {"properties": properties}}

    def store(self, vectors: sparse.csr_array) -> sparse.csr_array:
        """255 levels of the largest weight."""
        return self.rounded(vectors, LEVELS)

    def lines(self, one: str, row: int, terms: np.ndarray, weights: np.ndarray) -> list[Any]:
        """With numbers in place of terms."""
        return super().lines(one, row, np.searchsorted(self.facts.used, terms), weights)

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """With numbers in place of terms; those that no document has are left out."""
        places = np.minimum(np.searchsorted(self.facts.used, terms), len(self.facts.used) - 1)
        is_used = self.facts.used[places] == terms
        return super().query(places[is_used], weights[is_used])

    def finish(self, example: str) -> str:
        """See `Exporter.finish`; terms.json has the model's term of each number."""
        _write(self, "terms.json", to_json(self.facts.used.tolist()))
        note = "# terms.json has the model's term id of each number; queries need these numbers\n"
        return note + super().finish(example)


class Elasticsearch(OpenSearch):
    """Elasticsearch's `sparse_vector` without pruning, which keeps nine significant bits of a weight."""

    field: ClassVar[dict[str, Any]] = {"type": "sparse_vector", "index_options": {"prune": False}}

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """See `Exporter.query`."""
        asked = {"field": "terms", "query_vector": named(terms, decimals(weights)), "prune": False}
        return to_json({"size": 10, "_source": ["id"], "query": {"sparse_vector": asked}})


class Qdrant(JsonLines):
    """Qdrant's sparse vectors; each file is the body of a request."""

    suffix = "json"

    def lines(self, one: str, row: int, terms: np.ndarray, weights: np.ndarray) -> list[Any]:
        """See `JsonLines.lines`; Qdrant's own ids are numbers, so the document's is in the payload."""
        vector = {"indices": terms.tolist(), "values": decimals(weights)}
        return [{"id": row, "payload": {"id": one}, "vector": {"terms": vector}}]

    def write_file(self, lines: list[str]) -> None:
        """The lines as one JSON value."""
        super().write_file(['{"points":[' + ",\n".join(lines) + "]}"])

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """See `Exporter.query`."""
        vector = {"indices": terms.tolist(), "values": decimals(weights)}
        return to_json({"query": vector, "using": "terms", "limit": 10, "with_payload": ["id"]})

    def finish(self, example: str) -> str:
        """See `Exporter.finish`."""
        _write(self, "collection.json", '{"sparse_vectors": {"terms": {}}}')
        _write(self, "query.json", example)
        place = f"localhost:6333/collections/{self.name}"
        json_type = "-H 'Content-Type: application/json'"
        return (
            f"curl -X PUT {place} {json_type} -d @collection.json\n"
            f"for file in documents/*; do curl -X PUT '{place}/points?wait=true' {json_type} -d @$file; done\n"
            f"curl -X POST {place}/points/query {json_type} -d @query.json"
        )


class Vespa(IntegerWeights, JsonLines):
    """A Vespa feed of weighted sets, of integer weights, for its `wand` operator."""

    def lines(self, one: str, row: int, terms: np.ndarray, weights: np.ndarray) -> list[Any]:
        """See `JsonLines.lines`."""
        fields = {"id": one, "terms": named(terms, self.integers(weights).tolist())}
        return [{"put": f"id:{self.name}:{self.name}::{one}", "fields": fields}]

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """See `Exporter.query`."""
        tokens = to_json(named(terms, self.integers(weights).tolist()))
        yql = f"select id from {self.name} where ({{targetHits: 10}}wand(terms, {tokens}))"
        return to_json({"yql": yql, "hits": 10, "ranking": "impact"})

    def finish(self, example: str) -> str:
        """See `Exporter.finish`."""
        schema = f"""schema {self.name} {{
    document {self.name} {{
        field id type string {{
            indexing: summary | attribute
        }}
        field terms type weightedset<string> {{
            indexing: attribute
            attribute: fast-search
        }}
    }}
    rank-profile impact {{
        first-phase {{
            expression: rawScore(terms)
        }}
    }}
}}
"""
        (self.output / "schemas").mkdir(exist_ok=True)
        _write(self, f"schemas/{self.name}.sd", schema)
        _write(self, "query.json", example)
        return (
            f"# schemas/{self.name}.sd belongs into your application package, which `vespa deploy` takes\n"
            "cat documents/*.jsonl | vespa feed -\n"
            "curl localhost:8080/search/ -H 'Content-Type: application/json' -d @query.json"
        )


class Milvus(JsonLines):
    """Rows for Milvus' bulk import or `insert`; `lion-st index --engine milvus` fills a collection at once."""

    id_bytes = 512

    def lines(self, one: str, row: int, terms: np.ndarray, weights: np.ndarray) -> list[Any]:
        """See `JsonLines.lines`; Milvus takes no vector without terms, which no query would find."""
        return [{"id": one, "terms": named(terms, decimals(weights))}] if len(terms) else []

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """See `Exporter.query`."""
        return to_json(named(terms, decimals(weights)))

    def finish(self, example: str) -> str:
        """See `Exporter.finish`."""
        program = f"""import json
import sys
from pathlib import Path

from pymilvus import DataType, MilvusClient

client = MilvusClient(sys.argv[1])  # an address, or a file of Milvus Lite
schema = client.create_schema()
schema.add_field("id", DataType.VARCHAR, max_length=512, is_primary=True)
schema.add_field("terms", DataType.SPARSE_FLOAT_VECTOR)
parameters = client.prepare_index_params()
parameters.add_index("terms", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
client.create_collection("{self.name}", schema=schema, index_params=parameters)


def sparse(vector):
    return {{int(term): weight for term, weight in vector.items()}}


for file in sorted(Path("documents").iterdir()):
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    client.insert("{self.name}", [row | {{"terms": sparse(row["terms"])}} for row in rows])
query = sparse(json.loads(Path("query.json").read_text()))
print(client.search("{self.name}", [query], anns_field="terms", limit=10, search_params={{"metric_type": "IP"}}))
"""
        _write(self, "load.py", program)
        _write(self, "query.json", example)
        return "python load.py http://localhost:19530"


class PgVector(Exporter):
    """Rows for `COPY` of pgvector's `sparsevec`, whose HNSW takes at most 1,000 terms, counted from 1."""

    keeps = f"float32 weights of at most {POSTGRES_TERMS:,} terms"

    def store(self, vectors: sparse.csr_array) -> sparse.csr_array:
        """The heaviest terms."""
        return keep_top_terms(vectors, POSTGRES_TERMS) if vectors.nnz else vectors

    store_queries = store

    def add(self, ids: Sequence[str], stored: sparse.csr_array) -> None:
        """See `Exporter.add`."""
        with (self.output / "documents.tsv").open("a", encoding="utf-8") as file:
            for one, terms, weights in rows(ids, stored):
                file.write(f"{_copied(one)}\t{self.query(terms, weights)}\n")

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """A `sparsevec` as text."""
        pairs = (f"{term + 1}:{weight!r}" for term, weight in zip(terms.tolist(), decimals(weights), strict=True))
        return f"{{{','.join(pairs)}}}/{self.facts.dimensions}"

    def finish(self, example: str) -> str:
        """See `Exporter.finish`."""
        _write(
            self,
            "load.sql",
            "CREATE EXTENSION IF NOT EXISTS vector;\n"
            f"CREATE TABLE {self.name} (id text PRIMARY KEY, terms sparsevec({self.facts.dimensions}) NOT NULL);\n"
            f"\\copy {self.name} FROM 'documents.tsv'\n"
            f"CREATE INDEX ON {self.name} USING hnsw (terms sparsevec_ip_ops);\n",
        )
        order = f"terms <#> '{example}'"
        select = f"SELECT id, -({order}) AS score FROM {self.name} ORDER BY {order} LIMIT 10;\n"
        _write(self, "query.sql", f"SET hnsw.ef_search = {EF_SEARCH};\n{select}")
        return "psql -f load.sql\npsql -f query.sql"


def _copied(text: str) -> str:
    """Text as PostgreSQL's COPY reads it."""
    escapes = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
    return "".join(escapes.get(character, character) for character in text)


def _elastic_commands(name: str) -> str:
    json_type = "-H 'Content-Type: application/json'"
    return (
        f"curl -X PUT localhost:9200/{name} {json_type} -d @mapping.json\n"
        "for file in documents/*; do curl -X POST localhost:9200/_bulk -H 'Content-Type: application/x-ndjson' "
        "--data-binary @$file; done\n"
        f"curl -X POST localhost:9200/{name}/_refresh\n"
        f"curl -X POST localhost:9200/{name}/_search {json_type} -d @query.json"
    )


def _write(exporter: Exporter, name: str, text: str) -> None:
    (exporter.output / name).write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
