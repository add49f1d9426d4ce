"""One reader: what each kind of input means, in every command that can take it."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lion_st.data import load_beir, load_tuples, quickstart_data
from lion_st.data.lookup import TextLookup
from lion_st.data.records import BadRecord, Record, read_corpus, read_topics
from lion_st.data.sources import parse_source
from lion_st.data.tables import load_texts
from lion_st.data.text import iter_documents
from lion_st.data.trec import read_qrels, read_run

BOM = "\ufeff"
DOCUMENTS = {"d1": ("Lions", "Lions hunt at night."), "d 2": ("", "Paris is in France.")}
JSONL = "".join(
    json.dumps({"_id": key, "title": title, "text": text}) + "\n" for key, (title, text) in DOCUMENTS.items()
)
TSV = "id\ttext\ttitle\nd1\tLions hunt at night.\tLions\nd 2\tParis is in France.\t\n"

pytestmark = pytest.mark.usefixtures("datasets_cache")


def zst_file(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst_file}

DOCUMENT_FILES = {
    "plain.jsonl": JSONL,
    "bom.jsonl": BOM + JSONL,
    "concatenated.jsonl": "".join(BOM + line + "\n" for line in JSONL.splitlines()),
    "blank.jsonl": f"\n{JSONL}\n  \n",
    "crlf.jsonl": JSONL.replace("\n", "\r\n"),
    "header.tsv": TSV,
    "bom.tsv": BOM + TSV,
    "quoted.tsv": TSV.replace("Lions hunt at night.", '"Lions hunt at night."'),
    "table.csv": 'docid,title,contents\nd1,Lions,"Lions hunt at night."\nd 2,,Paris is in France.\n',
    "bom.csv": BOM + 'docid,title,contents\nd1,Lions,"Lions hunt at night."\nd 2,,Paris is in France.\n',
}


def read_lookup(path: Path, keys: list[str]) -> dict[str, str]:
    lookup = TextLookup(load_texts("unused", path, "document"))
    return dict(zip(keys, lookup.table.read(lookup.rows(keys)), strict=True))


@pytest.mark.parametrize("end", COMPRESS)
@pytest.mark.parametrize("name", DOCUMENT_FILES)
def test_documents_read_alike_in_encoding_evaluation_and_training(tmp_path, name, end):
    expected = {key: f"{title} {text}".strip() for key, (title, text) in DOCUMENTS.items()}
    file = tmp_path / "set" / f"corpus{Path(name).suffix}{end}"
    (file.parent / "qrels").mkdir(parents=True)
    file.write_bytes(COMPRESS[end](DOCUMENT_FILES[name].encode()))
    (file.parent / "queries.jsonl").write_text('{"_id": 1, "text": "when do lions hunt"}\n')
    (file.parent / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\td 2\t1\n")
    for source in (file, file.parent, str(file)):
        assert {record.id: record.text for record in read_corpus(source)} == expected
    corpus, queries, qrels = load_beir(file.parent)
    assert {key: (row["title"], row["text"]) for key, row in corpus.items()} == DOCUMENTS
    assert (queries, qrels) == ({"1": "when do lions hunt"}, {"1": {"d 2": 1}})
    assert load_tuples(file.parent, split="test")[:] == {"query": [queries["1"]], "positive": [expected["d 2"]]}
    assert read_lookup(file, list(expected)) == expected
    assert all(text in "\n".join(iter_documents(file)) for _, text in DOCUMENTS.values() if Path(name).suffix != ".csv")


QUERIES = {"1": "lions & tigers", "q 2": "capital of france"}
QUERY_FILES = {
    "queries.tsv": "1\tlions & tigers\nq 2\tcapital of france\n",
    "bom.tsv": BOM + "1\tlions & tigers\nq 2\tcapital of france\n",
    "topics.txt": "1\tlions & tigers\r\nq 2\tcapital of france\r\n",
    "queries.csv": "qid,query\n1,lions & tigers\nq 2,capital of france\n",
    "queries.jsonl": '{"_id": 1, "text": "lions & tigers"}\n{"_id": "q 2", "text": "capital of france"}\n\n',
    "udel.jsonl": '{"id": 1, "title": "title", "query": "lions & tigers"}\n{"id": "q 2", "query": "capital of france"}',
    "trec.txt": "<top>\n<num> Number: 1\n<title> lions &amp; tigers\n<desc> x\n</top>\n"
    "<top>\n<num>q</num><title>capital of\nfrance</title></top>",
    "covid.xml": '<topics task="COVID">\n<topic number="1">\n<query>lions &amp; tigers</query>\n'
    "<question>where?</question><narrative>n</narrative></topic>"
    '<topic number="q 2"><query>capital of france</query></topic></topics>',
    "web.xml": BOM + '<?xml version="1.0"?><web><topic number="1" type="single"><query>lions &amp; tigers</query>'
    '<description>d</description></topic><topic number="q 2"><query>capital of france</query></topic></web>',
    "clinical.xml": '<topics><topic number="1">lions &amp; tigers</topic><topic number="q 2">\ncapital of\nfrance'
    "</topic></topics>",
}


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", QUERY_FILES)
def test_queries_read_alike_in_searching_encoding_and_evaluation(tmp_path, name, end):
    expected = {key if name != "trec.txt" else key.split()[0]: text for key, text in QUERIES.items()}
    file = tmp_path / f"{name}{end}"
    file.write_bytes(COMPRESS[end](QUERY_FILES[name].encode()))
    assert read_topics(file) == expected
    assert list(read_corpus(file, task="query")) == [Record(*query) for query in expected.items()]


RUN = {"q1": {"d1": 9.5, "d2": 3.25}, "q2": {"d 2": 8.0}}
RUN_FILES = {
    "tabs.trec": "q1\tQ0\td1\t1\t9.5\tt\nq1\tQ0\td2\t2\t3.25\tt\nq2\tQ0\td 2\t1\t8.0\tt\n",
    "bom.trec": BOM + "q1\tQ0\td1\t1\t9.5\tt\nq1\tQ0\td2\t2\t3.25\tt\n\nq2\tQ0\td 2\t1\t8.0\tt\r\n",
    "marco.tsv": "q1\td1\t1\nq1\td2\t2\nq2\td 2\t1\n",
}
QRELS = {"q1": {"d1": 1, "d2": 0}, "q2": {"d 2": 2}}
QRELS_FILES = {
    "trec.qrels": "q1\t0\td1\t1\nq1\t0\td2\t0\nq2\t0\td 2\t2\n",
    "beir.tsv": BOM + "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td 2\t2\n\n",
    "repeated.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t1\nq1\td2\t0\nq2\td 2\t2\n",
    "noheader.tsv": "q1\td1\t1\nq1\td2\t0\nq2\td 2\t2\n",
    "columns.csv": "qid,docid,relevance\nq1,d1,1\nq1,d2,0\nq2,d 2,2\n",
    "rows.jsonl": '{"query-id": "q1", "corpus-id": "d1", "score": 1}\n'
    '{"query-id": "q1", "corpus-id": "d2", "score": 0.0}\n'
    '{"query-id": "q2", "corpus-id": "d 2", "score": 2}\n',
}


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", [*RUN_FILES, *QRELS_FILES])
def test_runs_and_judgements_read_alike_in_evaluation_comparison_and_fusion(tmp_path, name, end):
    file = tmp_path / f"{name}{end}"
    file.write_bytes(COMPRESS[end]((RUN_FILES | QRELS_FILES)[name].encode()))
    if name in QRELS_FILES:
        assert read_qrels(file) == QRELS
        return
    found = read_run(file)
    assert {query: list(hits) for query, hits in found.items()} == {query: list(hits) for query, hits in RUN.items()}
    assert found == (RUN if "marco" not in name else {"q1": {"d1": 1.0, "d2": 0.5}, "q2": {"d 2": 1.0}})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 d1 1 9.5 t", r"run:2 is 'q1 d1 1 9\.5 t', of 5 columns: a run is 'query Q0 document rank score tag'"),
        ("q1 Q0 Ada Moor 1 9.5 t", r"run:2 is .*, of 7 columns: .* separated by tabs where ids hold spaces"),
        ("q1 Q0 d1 1 nan t", r"run:2 has the score 'nan', which is not a finite number"),
        ("q1 Q0 d1 1 -inf t", r"run:2 has the score '-inf', which is not a finite number"),
        ("q1 Q0 d0 1 1 t", r"run:2: document 'd0' occurs twice for query 'q1'"),
        ("q1 Q0 caf\xe9 1 9.5 t", r"run:2 is not UTF-8 text \(byte 10, b'q1 Q0 caf\\xe9 1"),
    ],
)
def test_a_line_that_is_not_of_a_run_is_named_with_the_format(tmp_path, line, message):
    (tmp_path / "run").write_bytes(f"q1 Q0 d0 1 9.5 t\n{line}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q1 d1 0.5\n", r"run:1 has '0\.5' where a rank"),
        ("q1\td1\t1\nq1\td2\t1\n", r"run:2 has '1' where a rank of its own"),
        ("q1\td1\t17\nq1\td2\t12\n", r"run has no rank 1 for query 'q1'"),
    ],
)
def test_scores_are_not_taken_for_ranks(tmp_path, content, message):
    (tmp_path / "run").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run")


def test_dpr_passages_are_read_as_csv(tmp_path):
    (tmp_path / "psgs.tsv").write_text(
        'id\ttext\ttitle\n1\t"Aaron ( or ; ""Ahärôn"") is a prophet,\nhe said."\tAaron\n'
        '2\tHe said "hi.\tAaron\n3\t"Lions" is a film.\t\n4\tx\n'
    )
    *records, bad = read_corpus(tmp_path / "psgs.tsv")
    assert records == [
        Record("1", 'Aaron Aaron ( or ; "Ahärôn") is a prophet,\nhe said.'),
        Record("2", 'Aaron He said "hi.'),
        Record("3", '"Lions" is a film.'),
    ]
    assert bad == BadRecord("malformed", f"{tmp_path}/psgs.tsv:6 has 2 columns, '4\\tx': the header has 3.")
    collection = tmp_path / "collection.tsv"
    collection.write_text('1\t"Lions" hunt "at night.\n2\tand "\n')  # without a header quotes are text
    assert [record.text for record in read_corpus(collection)] == ['"Lions" hunt "at night.', 'and "']


def test_nulls_and_passages_of_ms_marco_v2(tmp_path):
    rows = [
        {"_id": "a", "title": None, "text": "only a text"},
        {"_id": "b", "title": "only a title", "text": None},
        {"pid": "p1", "passage": "a passage", "docid": "its document"},
        {"_id": "c", "title": None, "text": None},
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_corpus(tmp_path)) == [
        Record("a", "only a text"),
        Record("b", "only a title"),
        Record("p1", "a passage"),
        BadRecord("empty", f"{tmp_path}/corpus.jsonl:4 has the id 'c' and no text."),
    ]


def test_a_title_is_not_taken_for_the_document_where_the_text_has_another_name(tmp_path):
    file, row = tmp_path / "corpus.jsonl", {"docid": "a", "title": "Lions", "abstract": "They hunt at night."}
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"corpus\.jsonl:1 has a title and no text among its fields \['abstract', "):
        list(read_corpus(file))
    for name in ("segment", "content"):  # of TREC RAG, of many
        row = {"docid": "a", "title": "Lions", name: "They hunt at night.", "url": "https://lions"}
        file.write_text(json.dumps(row))
        assert list(read_corpus(file)) == [Record("a", "Lions They hunt at night.")]
        assert list(iter_documents(file)) == ["Lions\nThey hunt at night."]
    for row in ({"id": "a", "title": "Lions"}, {"id": "a", "title": "Lions", "text": None, "url": "x"}):
        assert list(read_corpus([row])) == [Record("a", "Lions")]
    assert list(read_corpus([{"id": "q", "title": "lions", "desc": "About lions."}], task="query")) == [
        Record("q", "lions")
    ]


@pytest.mark.parametrize("read", [list, dict], ids=["documents", "queries"])
def test_unknown_names_are_refused_at_the_first_record_with_those_that_are_known(tmp_path, read):
    (tmp_path / "a.jsonl").write_text('{"key": "a", "text": "x"}\n')
    (tmp_path / "b.csv").write_text("id,words\n1,x\n")
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"], "words": ["x"]}), tmp_path / "c.parquet")
    for name, message in (
        ("a.jsonl", r"a\.jsonl:1 has no id among its fields \['key', 'text'\]: accepted are _id, id, "),
        ("b.csv", r"b\.csv:1 is 'id,words', of 2 columns: .* header that names an id .* text"),
        ("c.parquet", r"Row 0 of .*c\.parquet has no text among its fields \['id', 'words'\]: accepted are text, "),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_corpus(tmp_path / name)) if read is list else read_topics(tmp_path / name)


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_archive_is_one_clear_line(tmp_path, end, damage):
    whole = COMPRESS[end]("".join(f'{{"_id": "{n}", "text": "text {n * n}"}}\n' for n in range(5000)).encode())
    half = len(whole) // 2
    flipped = whole[:half] + bytes(255 - byte for byte in whole[half : half + 40]) + whole[half + 40 :]
    file = tmp_path / f"corpus.jsonl{end}"
    file.write_bytes(whole[:half] if damage == "cut" else flipped)
    with pytest.raises(ValueError, match=rf"corpus\.jsonl\{end} ends early or is damaged .*: compress or copy it"):
        list(read_corpus(file))
    for read in (lambda: read_topics(file), lambda: read_lookup(file, ["1"]), lambda: list(iter_documents(file))):
        with pytest.raises(ValueError, match=rf"corpus\.jsonl\{end}(:\d+ is not JSON| ends early or is damaged)"):
            read()


def test_the_bundled_documents_are_read_by_their_own_name():
    data = quickstart_data()
    first = next(iter(read_corpus(data / "documents.parquet")))
    assert first == next(iter(read_corpus(data))) == next(iter(read_corpus(f"{data}:documents")))
    assert first.id == "d0"
    assert next(iter(read_corpus(data, task="query"))).id == next(iter(read_topics(data / "queries.parquet")))
    corpus, queries, qrels = load_beir(data / "scifact")
    assert (len(corpus), len(queries), len(qrels)) == (5183, 300, 300)


def test_the_bundled_data_set_is_read_by_its_hub_name_without_the_hub():
    source = "lion-st/lion-quickstart"
    assert (
        load_tuples(source, negatives=1, split="train[:9]")[:]
        == load_tuples(quickstart_data(), negatives=1, split="train[:9]")[:]
    )
    corpus, _, qrels = load_beir(f"{source}:scifact")
    assert (len(corpus), len(qrels)) == (5183, 300)
    assert parse_source(source, "train") == parse_source(f"hf://{source}/train")


def test_one_syntax_names_local_and_remote_sources(tmp_path):
    (tmp_path / "set").mkdir()
    for given, expected in {
        "owner/name": "owner/name",
        "owner/name:subset": "owner/name:subset",
        "hf://owner/name": "owner/name",
        "hf://owner/name/subset": "owner/name:subset",
        "hf:/owner/name/subset": "owner/name:subset",  # as pathlib writes it
        f"{tmp_path}/set": f"{tmp_path}/set",
        f"{tmp_path}/set:subset": f"{tmp_path}/set:subset",
    }.items():
        assert str(parse_source(given)) == expected
        assert (parse_source(given).repository is None) == (str(tmp_path) in given)
    assert str(parse_source("owner/name", "subset")) == "owner/name:subset"
    with pytest.raises(ValueError, match="names the subset 'a', beside 'b'"):
        parse_source("owner/name:a", "b")
    for missing in (
        "folder/missing.jsonl",
        "missing.tsv.gz",
        "a/b/c",
        "hf://name",
        "data/own",
        "runs/set:subset",
        f"{tmp_path}/missing",
    ):
        with pytest.raises(FileNotFoundError, match=f"{missing} is not a file or folder here"):
            parse_source(missing)


def test_a_folder_without_queries_does_not_give_its_documents_for_them(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(JSONL)
    with pytest.raises(FileNotFoundError, match=r"has corpus\.jsonl, but no queries or topics"):
        list(read_corpus(tmp_path, task="query"))


def test_text_files_beside_tables_are_said_to_be_left_out(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"id": "1", "text": "lions"}\n')
    (tmp_path / "b.txt").write_text("tigers\n")
    assert [record.id for record in read_corpus(tmp_path)] == ["1"]
    assert "b.txt beside tables not read" in caplog.text
    (tmp_path / "a.jsonl").unlink()
    assert [record.id for record in read_corpus(tmp_path)] == ["b.txt:1"]
