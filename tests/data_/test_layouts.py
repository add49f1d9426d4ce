"""Each published layout, written as it is published from real texts, reads as the same tuples."""

import gzip
import json

import pytest
from layout_files import TUPLES, read_sample, write_card, write_jsonl, write_parquet, write_tsv

from lion_st.data import load_beir, load_tuples, quickstart_data, save_beir

NAMES = ["query", "positive", "negative_1", "negative_2", "negative_3", "negative_4"]

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def sample():
    return read_sample()


def check_texts(tuples, sample, negatives=4):
    assert len(tuples) == TUPLES
    for row in range(TUPLES):
        assert list(tuples[row].values())[: 2 + negatives] == sample.texts(row)[: 2 + negatives]
        assert list(tuples[row])[: 2 + negatives] == NAMES[: 2 + negatives]


def check_labels(tuples, sample):
    for row in range(TUPLES):
        assert tuples[row]["label"] == pytest.approx(sample.tuples[row][2], abs=1e-5)


def ms_marco_texts(folder, sample):
    write_parquet(
        folder / "corpus/train-0.parquet", passage_id=list(sample.documents), passage=list(sample.documents.values())
    )
    write_parquet(
        folder / "queries/train-0.parquet", query_id=list(sample.queries), query=list(sample.queries.values())
    )
    return {"corpus": "corpus/train-*", "queries": "queries/train-*"}


def test_ids_with_scores_beside_queries_and_documents(tmp_path, sample):
    """lightonai/ms-marco-en-bge, in which documents stand in the order of the search that found them."""
    query, documents, scores = zip(*sample.tuples, strict=True)
    write_parquet(
        tmp_path / "dataset.parquet",
        query_id=query,
        document_ids=[row[1:3] + row[:1] + row[3:] for row in documents],
        scores=[row[1:3] + row[:1] + row[3:] for row in scores],
    )
    write_parquet(
        tmp_path / "english_queries.train.parquet", query_id=list(sample.queries), text=list(sample.queries.values())
    )
    write_parquet(
        tmp_path / "english_collection.parquet",
        document_id=list(sample.documents),
        text=list(sample.documents.values()),
    )
    card = {
        "queries": "english_queries.train.parquet",
        "documents": "english_collection.parquet",
        "train": "dataset.parquet",
    }
    tuples = load_tuples(write_card(tmp_path, card), teacher_scores=True, sampling="first")
    check_texts(tuples, sample)
    check_labels(tuples, sample)


def test_lists_of_ids_and_scores_published_as_text(tmp_path, sample):
    query, documents, scores = zip(*sample.tuples, strict=True)
    write_parquet(
        tmp_path / "train.parquet",
        query_id=query,
        document_ids=list(map(str, documents)),
        scores=list(map(str, scores)),
    )
    tuples = load_tuples(
        tmp_path / "train.parquet",
        queries=write_tsv(tmp_path / "queries.tsv", sample.queries),
        documents=write_tsv(tmp_path / "collection.tsv", sample.documents),
        teacher_scores=True,
        sampling="first",
    )
    check_texts(tuples, sample)
    check_labels(tuples, sample)


def test_ms_marco_margin_mse_triplets(tmp_path, sample):
    """sentence-transformers/msmarco, bert-ensemble-margin-mse: the score is a margin, which the label keeps."""
    card = ms_marco_texts(tmp_path, sample)
    margins = [scores[0] - scores[1] for _, _, scores in sample.tuples]
    write_parquet(
        tmp_path / "bert-ensemble-margin-mse/train-0.parquet",
        query_id=[query for query, _, _ in sample.tuples],
        positive_id=[documents[0] for _, documents, _ in sample.tuples],
        negative_id=[documents[1] for _, documents, _ in sample.tuples],
        score=margins,
    )
    write_card(tmp_path, {"bert-ensemble-margin-mse": "bert-ensemble-margin-mse/train-*"} | card)
    tuples = load_tuples(tmp_path, subset="bert-ensemble-margin-mse", negatives=1, teacher_scores=True)
    check_texts(tuples, sample, negatives=1)
    for row, margin in enumerate(margins):
        assert tuples[row]["label"] == pytest.approx([margin, 0.0], abs=1e-5)
    assert "label" not in load_tuples(tmp_path, negatives=1)[0]


def test_ms_marco_labeled_list(tmp_path, sample):
    card = ms_marco_texts(tmp_path, sample)
    write_parquet(
        tmp_path / "labeled-list/train-0.parquet",
        query_id=[query for query, _, _ in sample.tuples],
        doc_ids=[documents[1:] + documents[:1] for _, documents, _ in sample.tuples],
        labels=[[0, 0, 0, 0, 1]] * TUPLES,
    )
    tuples = load_tuples(write_card(tmp_path, {"labeled-list": "labeled-list/train-*"} | card), sampling="first")
    check_texts(tuples, sample)


def test_ms_marco_triplets_are_chosen_by_subset(tmp_path, sample):
    card = ms_marco_texts(tmp_path, sample)
    for name, negative in (("triplets", 1), ("labeled-list", 0)):
        write_parquet(
            tmp_path / f"{name}/train-0.parquet",
            query_id=[query for query, _, _ in sample.tuples],
            positive_id=[documents[0] for _, documents, _ in sample.tuples],
            negative_id=[documents[negative] for _, documents, _ in sample.tuples],
        )
    write_card(tmp_path, {"triplets": "triplets/train-*", "labeled-list": "labeled-list/train-*"} | card)
    check_texts(load_tuples(tmp_path, subset="triplets"), sample, negatives=1)
    with pytest.raises(ValueError, match=r"has the subsets .*'triplets'.* name one of them \(got 'triplet'\)"):
        load_tuples(tmp_path, subset="triplet")


def test_mined_negatives_as_integer_ids(tmp_path, sample):
    """The triplet-50-ids subsets of sentence-transformers; texts in sentence-transformers/msmarco-corpus."""
    columns = {f"negative_{i}": [int(documents[i]) for _, documents, _ in sample.tuples] for i in range(1, 5)}
    write_parquet(
        tmp_path / "mined/triplet-50-ids/train-0.parquet",
        query=[int(query) for query, _, _ in sample.tuples],
        positive=[int(documents[0]) for _, documents, _ in sample.tuples],
        **dict(reversed(columns.items())),
    )
    write_card(tmp_path / "mined", {"triplet-50-ids": "triplet-50-ids/train-*"})
    texts = tmp_path / "msmarco-corpus"
    for name, key, rows in (("passage", "pid", sample.documents), ("query", "qid", sample.queries)):
        write_parquet(texts / name / "train-0.parquet", **{key: list(map(int, rows)), "text": list(rows.values())})
    write_card(texts, {"passage": "passage/train-*", "query": "query/train-*"})
    tuples = load_tuples(tmp_path / "mined", documents=f"{texts}:passage", queries=f"{texts}:query", sampling="first")
    check_texts(tuples, sample)


def test_mined_negatives_as_texts(tmp_path, sample):
    texts = [sample.texts(row) for row in range(TUPLES)]
    columns = {name: [row[i] for row in texts] for i, name in enumerate(NAMES)}
    write_parquet(tmp_path / "train.parquet", **columns, label=[scores for _, _, scores in sample.tuples])
    tuples = load_tuples(tmp_path / "train.parquet", teacher_scores=True, sampling="first")
    check_texts(tuples, sample)
    check_labels(tuples, sample)


def test_negatives_by_system(tmp_path, sample):
    """msmarco-hard-negatives.jsonl.gz: ranks are read across the systems, each document once."""
    rows = [
        {
            "qid": int(query),
            "pos": [int(ids[0])],
            "neg": {"bm25": [int(ids[1]), int(ids[3])], "tas-b": [int(ids[2]), int(ids[1]), int(ids[4])]},
        }
        for query, ids, _ in sample.tuples
    ]
    path = tmp_path / "msmarco-hard-negatives.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    lookups = {
        "queries": write_tsv(tmp_path / "queries.tsv", sample.queries),
        "documents": write_tsv(tmp_path / "collection.tsv", sample.documents),
    }
    check_texts(load_tuples(path, sampling="first", **lookups), sample)
    check_texts(load_tuples(tmp_path, subset=path.name, sampling="first", **lookups), sample)
    for row in rows:
        row["neg"] = {name: [{"pid": pid, "ce-score": 1.0} for pid in pids] for name, pids in row["neg"].items()}
    check_texts(load_tuples(write_jsonl(tmp_path / "scored.jsonl", rows), sampling="first", **lookups), sample)


def tevatron_rows(sample):
    def passages(ids):
        return [{"docid": key, "title": "-", "text": sample.documents[key]} for key in ids]

    return [
        {
            "query_id": query,
            "query": sample.queries[query],
            "positive_passages": passages(documents[:1]),
            "negative_passages": passages(documents[1:]),
        }
        for query, documents, _ in sample.tuples
    ]


def test_tevatron_passages(tmp_path, sample):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in tevatron_rows(sample)).encode()))
    tuples = load_tuples(tmp_path, negatives=3, sampling="first")
    for row in range(TUPLES):
        query, *documents = sample.texts(row)[:5]
        assert list(tuples[row].values()) == [query, *(f"- {text}" for text in documents)]


def test_tevatron_on_the_hub_is_read_past_its_loading_script(tmp_path, sample, monkeypatch):
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    path = write_jsonl(tmp_path / "cached" / "train.jsonl", tevatron_rows(sample))

    def no_scripts(name):
        raise RuntimeError("Dataset scripts are no longer supported, but found msmarco-passage.py")

    def download(repository, name, repo_type):
        assert (repository, repo_type) == ("Tevatron/msmarco-passage", "dataset")
        if name != "train.jsonl":
            raise EntryNotFoundError(name)
        return str(path)

    monkeypatch.setattr(datasets, "get_dataset_config_names", no_scripts)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(load_tuples("Tevatron/msmarco-passage", negatives=4)) == TUPLES
    with pytest.raises(ValueError, match="none of the files"):
        load_tuples("Tevatron/msmarco-passage", split="dev")


def test_tevatron_ids_beside_a_corpus_with_titles(tmp_path, sample):
    rows = [
        {
            "query_id": query,
            "query_text": sample.queries[query],
            "positive_document_ids": ids[:1],
            "negative_document_ids": ids[1:],
        }
        for query, ids, _ in sample.tuples
    ]
    corpus = [{"docid": key, "title": "Title", "text": text} for key, text in sample.documents.items()]
    tuples = load_tuples(
        write_jsonl(tmp_path / "train.jsonl", rows),
        documents=write_jsonl(tmp_path / "corpus.jsonl", corpus),
        sampling="first",
    )
    assert tuples[3]["negative_2"] == f"Title {sample.texts(3)[3]}"


def test_authors_contrastive_and_kl_files(tmp_path, sample):
    collection = write_tsv(tmp_path / "raw.tsv", sample.documents)
    rows = [
        {
            "question": sample.queries[query],
            "pos_pid": ids[0],
            "neg_pids": ids[1:],
            "pos_score": scores[0],
            "neg_scores": scores[1:],
        }
        for query, ids, scores in sample.tuples
    ]
    scored = load_tuples(
        write_jsonl(tmp_path / "kl.jsonl", rows), documents=collection, teacher_scores=True, sampling="first"
    )
    check_texts(scored, sample)
    check_labels(scored, sample)
    for row in rows:
        del row["pos_score"], row["neg_scores"]
    path = write_jsonl(tmp_path / "nce.jsonl", rows)
    check_texts(load_tuples(path, documents=collection, sampling="first"), sample)
    with pytest.raises(ValueError, match=r"nce\.jsonl has no teacher scores: .* contrastive objective alone"):
        load_tuples(path, documents=collection, teacher_scores=True)


def test_authors_margin_mse_file_has_its_positive_first(tmp_path, sample):
    rows = [
        {"query": sample.queries[query], "docids": ids, "scores": [scores[0] - 100, *scores[1:]]}
        for query, ids, scores in sample.tuples
    ]
    tuples = load_tuples(
        write_jsonl(tmp_path / "train.jsonl", rows),
        documents=write_tsv(tmp_path / "raw.tsv", sample.documents),
        negatives=1,
        teacher_scores=True,
        sampling="first",
    )
    check_texts(tuples, sample, negatives=1)
    assert tuples[0]["label"] == pytest.approx(rows[0]["scores"][:2], abs=1e-4)


def test_json_pairs_and_lists_of_texts(tmp_path, sample):
    texts = [sample.texts(row) for row in range(TUPLES)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"query": row[0], "pos": row[1]} for row in texts])
    check_texts(load_tuples(pairs), sample, negatives=0)
    scores = [scores for _, _, scores in sample.tuples]
    lists = [
        {"query": row[0], "pos": [row[1]], "neg": row[2:], "pos_scores": score[:1], "neg_scores": score[1:]}
        for row, score in zip(texts, scores, strict=True)
    ]
    tuples = load_tuples(write_jsonl(tmp_path / "lists.jsonl", lists), teacher_scores=True, sampling="first")
    check_texts(tuples, sample)
    check_labels(tuples, sample)
    triplets = [dict(zip(("anchor", "positive", "negative"), row, strict=False)) for row in texts]
    check_texts(load_tuples(write_jsonl(tmp_path / "triplets.jsonl", triplets)), sample, negatives=1)


def test_beir_folder_gives_pairs_and_round_trips(tmp_path, sample):
    corpus = {key: {"title": "A title", "text": text} for key, text in sample.documents.items()}
    qrels = {query: {documents[0]: 1, documents[1]: 0} for query, documents, _ in sample.tuples}
    folder = save_beir(tmp_path / "set", corpus, sample.queries, qrels, split="train")
    assert load_beir(folder, split="train") == (corpus, sample.queries, qrels)
    tuples = load_tuples(folder)
    assert len(tuples) == TUPLES
    assert tuples[5] == {"query": sample.texts(5)[0], "positive": f"A title {sample.texts(5)[1]}"}


def test_the_bundled_data_set():
    tuples = load_tuples(quickstart_data(), negatives=4, teacher_scores=True)
    assert len(tuples) == 36_084
    batch = tuples[:512]
    assert list(batch) == [*NAMES, "label"]
    assert all(max(label[1:]) < label[0] for label in batch["label"])


def write(path, content):
    path.write_text(content)
    return path


ONE_PAIR = {"query": ["when do lions hunt"], "positive": ["At night."]}
PAIR_FILES = {
    "answers.jsonl": '{"question": "when do lions hunt", "answers": ["At night."]}\n',
    "squad.jsonl": '{"question": "when do lions hunt", "answers": {"text": ["At night."], "start": [3]}}',
    "answer.csv": "query,answer\nwhen do lions hunt,At night.\n",
    "dpr.tsv": "when do lions hunt\t['At night.']\n",
    "dpr.csv": "when do lions hunt\t['At night.', 'At night.']\n",
    "header.tsv": "\ufeffanchor\tpositive\nwhen do lions hunt\tAt night.\n",
    "sentences.jsonl": '{"sentence1": "when do lions hunt", "sentence2": "At night."}\n',
    "passage.jsonl": '{"query": "when do lions hunt", "passage": "At night."}\n',
}


@pytest.mark.parametrize("name", PAIR_FILES)
def test_pairs_and_questions_with_answers_are_training_data(tmp_path, name):
    assert load_tuples(write(tmp_path / name, PAIR_FILES[name]))[:] == ONE_PAIR


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answers": {"text": ["short"]}, "context": "A passage."},  # SQuAD
        {"question": "q", "answers": ["short"], "positive_ctxs": [{"text": "A passage."}], "negative_ctxs": []},  # DPR
        {"query": "q", "answers": ["short"], "passages": {"is_selected": [1], "passage_text": ["A passage."]}},
        {"question": "q", "answer": "short", "passage": "A passage.", "label": 1},
    ],
)
def test_an_answer_beside_its_passage_is_not_taken_for_what_is_to_be_found(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"have 'answers?' and '.*': call the one that is to be found 'positive'"):
        load_tuples(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "q", "answer": "short", "positive": "A passage."}))
    assert load_tuples(tmp_path / "rows.jsonl")[0]["positive"] == "A passage."


def test_pairs_with_scores_are_gathered_by_query(tmp_path):
    scored = write(
        tmp_path / "scored.csv", "query,passage,score\na,near,3.5\nb,only,1.25\na,best,7\na,far,-2\na,best,7\n"
    )
    with pytest.warns(UserWarning, match=r"scored\.csv: left out 1 negatives that are positives"):
        tuples = load_tuples(scored, negatives=2, teacher_scores=True, sampling="first", drop_short=True)
    assert tuples[:] == {
        "query": ["a"], "positive": ["best"], "negative_1": ["near"], "negative_2": ["far"], "label": [[7, 3.5, -2]]
    }  # fmt: skip
    assert load_tuples(scored, negatives=0, teacher_scores=True)[1] == {
        "query": "b",
        "positive": "only",
        "label": [1.25],
    }
    rows = [(1, 7, 0), (1, 8, 1), (1, 9, 1), (2, 9, 0)]
    labelled = write_jsonl(
        tmp_path / "labels.jsonl", [dict(zip(("qid", "pid", "label"), row, strict=True)) for row in rows]
    )
    texts = {
        "queries": write_tsv(tmp_path / "q.tsv", {"1": "one", "2": "two"}),
        "documents": write_tsv(tmp_path / "d.tsv", {"7": "seven", "8": "eight", "9": "nine"}),
    }
    with pytest.warns(UserWarning, match=r"labels\.jsonl: left out 1 queries without a positive"):
        tuples = load_tuples(labelled, sampling="first", **texts)
    assert tuples[:] == {"query": ["one"], "positive": ["eight"], "negative_1": ["seven"]}
    graded = write(tmp_path / "graded.csv", "query,passage,grade\na,near,1\na,far,0\nb,other,0\na,best,2\n")
    with pytest.warns(UserWarning, match="left out 1 queries without a positive"):
        assert load_tuples(graded, sampling="first")[:] == {"query": ["a"], "positive": ["best"], "negative_1": ["far"]}
    bad = write(tmp_path / "bad.csv", "query,passage,score\na,near,3.5\na,far,inf\n")
    with pytest.raises(ValueError, match=r"bad\.csv:3 has 'inf' in the field 'score': a score is a finite number"):
        load_tuples(bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("query,positive,score\na,b,0.9\na,c,0.2\n", "several documents in 'positive', and their 'score' does not say"),
        ("sentence1,sentence2,score\na,b,4.2\nc,d,0.2\n", "one document with a 'score', .* whether it is relevant"),
        ("query,passage,label\na,b,yes\na,c,no\n", r"pairs\.csv:2 has 'yes' in the field 'label': a score is a finite"),
    ],
)
def test_scores_that_do_not_say_what_is_relevant_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_tuples(write(tmp_path / "pairs.csv", content))


def test_a_positive_may_have_a_score_of_its_own(tmp_path):
    rows = [{"anchor": "a", "positive": "b", "score": 0.9}, {"anchor": "c", "positive": "d", "score": 0.8}]
    tuples = load_tuples(write_jsonl(tmp_path / "train.jsonl", rows), teacher_scores=True)
    assert [tuples[row]["label"] for row in range(2)] == [pytest.approx([0.9]), pytest.approx([0.8])]


def test_labels_that_are_no_grades_are_refused(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"query": "a", "positive": ["b", "c"], "labels": [0.9, 0.2]}])
    with pytest.raises(ValueError, match=r"the label 0\.9 is no grade, a whole number"):
        load_tuples(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "one\ttwo\n", r"a\.tsv:1 .*'two' is not a list of answers; tuples need a header"),
        ("b.tsv", "1\t2\t3\n", r"b\.tsv:1 is .*, of 3 columns: tuples need a header"),
        ("c.csv", "one,two\n", r"c\.csv:1 is .*, of 2 columns: tuples need a header"),
        (
            "d.jsonl",
            '{"query": ["Instruct", "a"], "pos": [["", "b"]]}',
            r"d\.jsonl:1 has \['Instruct', 'a'\] .*'query'",
        ),
        ("e.jsonl", '{"query": "a", "pos": [["", "b"]]}', r"e\.jsonl:1 has \['', 'b'\] in the field 'pos'"),
        ("f.jsonl", '{"query": "a", "pos": ["b"], "pos_scores": [NaN]}', r"f\.jsonl:1 has .* nan in the field 'pos_s"),
        ("g.csv", "query,positive,negative\na,b,c\nd,e\n", r"g\.csv:3 has 2 columns, 'd,e': the header has 3"),
    ],
)
def test_a_table_that_is_not_of_tuples_is_refused_with_the_forms_that_are(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_tuples(write(tmp_path / name, content))


def test_rows_may_lack_some_negative_columns(tmp_path):
    rows = [
        {"query": "a", "positive": "b", "negative_1": None, "negative_2": "d", "label": [3, 2, 1]},
        {"query": "e", "positive": "f", "negative_1": "g", "negative_2": "h", "label": [6, 5, 4]},
    ]
    tuples = load_tuples(write_jsonl(tmp_path / "a.jsonl", rows), negatives=1, teacher_scores=True, sampling="first")
    assert tuples[0] == {"query": "a", "positive": "b", "negative_1": "d", "label": [3, 1]}
    with pytest.raises(ValueError, match=r"Row 0 of .*a\.jsonl has 1 negatives to choose from, 2 are needed"):
        load_tuples(tmp_path / "a.jsonl")


# Each layout with the positive among its negatives, a negative twice and, where documents are ids, the positive's text
# and a negative's under another id; "x" is the one negative that stays. Ids: 1 lion, 2 the same text, 3 x, 4 the same.
TEXTS = {"1": "a lion", "2": "a lion", "3": "x", "4": "x"}
REPEATS = {
    "scored ids": {"query_id": 9, "document_ids": [1, 1, 2, 3, 3, 4], "scores": [9, 8, 7, 6, 5, 4]},
    "question": {"question": "q", "pos_pid": 1, "neg_pids": [1, 2, 3, 3, 4]},
    "positive first": {"query": "q", "docids": [1, 1, 2, 3, 3, 4], "scores": [9, 8, 7, 6, 5, 4]},
    "labeled": {"query_id": 9, "doc_ids": [1, 1, 2, 3, 3, 4], "labels": [1, 0, 0, 0, 0, 0]},
    "triplet": {"query_id": 9, "positive_id": 1, "negative_id": 2},
    "systems": {"qid": 9, "pos": [1], "neg": {"a": [1, 2, 3], "b": [3, 4]}},
    "passages": {
        "query": "q",
        "positive_passages": [{"title": "", "text": "a lion"}],
        "negative_passages": [{"title": "", "text": text} for text in ("a lion", "x", "x ")],
    },
    "document ids": {"query": "q", "positive_document_ids": [1], "negative_document_ids": [1, 2, 3, 3, 4]},
    "texts": {"query": "q", "pos": "a lion", "neg": ["a lion", " a lion", "x", "x"]},
    "columns": {"query": "q", "positive": "a lion", "negative_1": "a lion", "negative_2": "x", "negative_3": "x"},
}


@pytest.mark.parametrize("layout", REPEATS)
def test_no_document_is_a_negative_of_itself_or_twice(tmp_path, layout):
    path = write_jsonl(tmp_path / "train.jsonl", [REPEATS[layout]])
    lookups = {
        "queries": write_tsv(tmp_path / "q.tsv", {"9": "q"}),
        "documents": write_tsv(tmp_path / "d.tsv", TEXTS),
    }
    if layout in ("passages", "texts", "columns"):
        lookups = {}
    elif "q" in REPEATS[layout].values():
        del lookups["queries"]
    scored = "scores" in REPEATS[layout]
    with pytest.warns(UserWarning, match=r"train\.jsonl: left out \d negatives"):
        (row,) = load_tuples(path, sampling="first", teacher_scores=scored, **lookups)
    label = {"label": [9, 6]} if scored else {}
    expected = {"query": "q", "positive": "a lion", "negative_1": "x"} | label
    if layout == "triplet":
        del expected["negative_1"]
    assert {key: value.strip() if isinstance(value, str) else value for key, value in row.items()} == expected


def test_pairs_with_a_document_that_the_collection_lacks_are_left_out(tmp_path):
    folder = save_beir(tmp_path / "set", {"d1": {"text": "a lion"}}, {"q1": "q"}, {"q1": {"d1": 1}}, split="train")
    write(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\tgone\t1\n")
    with pytest.warns(UserWarning, match="left out 1 pairs whose document the corpus lacks"):
        assert load_tuples(folder)[:] == {"query": ["q"], "positive": ["a lion"]}
    with pytest.warns(UserWarning, match="judges 1 document.* lacks, such as 'gone': they count as never found"):
        assert load_beir(folder, "train")[2] == {"q1": {"d1": 1, "gone": 1}}
    write(folder / "qrels" / "train.tsv", "q1\tgone\t1\n")
    with pytest.raises(ValueError, match="None of the 1 documents"):
        load_tuples(folder)
