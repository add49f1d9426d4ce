"""What the explorer answers, with real models, indexes and BM25."""

import sys

import pytest
import torch
from tiny_models import TEXTS

import lion_st
from lion_st.data import save_beir
from lion_st.data.fields import Fields
from lion_st.demo import Collection, Explorer, QueryError, build_page, markup, page, read_collection
from lion_st.demo.terms import Reason, Reasons, Segment
from lion_st.indexes import StorageError, create_index
from lion_st.retrieval import ModelRetriever, index_corpus

QUERY = "What is the capital of France?"


@pytest.fixture(scope="module")
def collection() -> Collection:
    documents = {f"d{number}": Fields(f"d{number}", f"Text {number}", text) for number, text in enumerate(TEXTS)}
    documents["long"] = Fields("long", "", f"The capital {'of the largest city ' * 60}ends here")
    return Collection("eight texts", documents, {QUERY: frozenset({"d1"})})


@pytest.fixture(scope="module")
def models(tiny_backbone):
    return lion_st.build(tiny_backbone(), "sparse"), lion_st.build(tiny_backbone(), "dense")


@pytest.fixture(scope="module")
def explorer(models, collection) -> Explorer:
    return Explorer(models[0], collection, models[1])


def test_both_rankings_are_what_the_models_find(explorer, models, collection) -> None:
    answer = explorer.answer(f"  {QUERY}\n")
    assert answer.query == QUERY
    assert [ranking.paradigm for ranking in answer.rankings] == ["sparse", "dense"]
    texts = {key: document.content for key, document in collection.documents.items()}
    for model, ranking in zip(models, answer.rankings, strict=True):
        retriever = ModelRetriever(model)
        retriever.index(texts)
        expected = retriever.search([QUERY], 5)[0]
        assert [hit.document.id for hit in ranking.hits] == [document for document, _ in expected]
        assert [hit.score for hit in ranking.hits] == pytest.approx([score for _, score in expected], rel=1e-5)
        assert [hit.rank for hit in ranking.hits] == [1, 2, 3, 4, 5]


def test_each_hit_says_where_the_other_ranking_has_it_and_whether_it_is_relevant(explorer) -> None:
    sparse, dense = explorer.answer(QUERY).rankings
    places = {hit.document.id: hit.rank for hit in dense.hits}
    assert any(hit.document.id in places for hit in sparse.hits)
    for hit in sparse.hits:
        assert hit.elsewhere == places.get(hit.document.id, hit.elsewhere)
        assert hit.relevant == (hit.document.id == "d1")


def test_the_reasons_are_the_whole_score_and_stand_in_the_text(explorer) -> None:
    for ranking in (*explorer.answer(QUERY).rankings, explorer.answer(QUERY, "BM25").rankings[1]):
        for hit in ranking.hits:
            shares = [reason.share for reason in hit.reasons.listed]
            assert sum(shares) + hit.reasons.more_share == pytest.approx(1.0)
            assert shares == sorted(shares, reverse=True)
            assert "".join(segment.text for segment in hit.title) == hit.document.title
            assert "".join(segment.text for segment in hit.text) == hit.document.text
            marked = {reason for segment in (*hit.title, *hit.text) for reason in segment.reasons}
            assert {reason for reason in hit.reasons.listed if reason.in_passage} == marked


def test_bm25_is_explained_by_the_words_it_adds_up(explorer) -> None:
    query = "capital capital city"
    ranking = explorer.answer(query, "BM25").rankings[1]
    assert ranking.paradigm == "lexical"
    hit = next(hit for hit in ranking.hits if hit.document.id == "d1")
    alone = {word: dict(explorer.beside["BM25"].search([word], 9)[0])["d1"] for word in ("capital", "city")}
    assert 2 * alone["capital"] + alone["city"] == pytest.approx(hit.score, rel=1e-5)
    assert {reason.name: reason.share for reason in hit.reasons.listed} == pytest.approx(
        {"capital": 2 * alone["capital"] / hit.score, "city": alone["city"] / hit.score}
    )
    assert explorer.answer("of the", "BM25").rankings[1].hits == []


def test_terms_of_the_query_are_told_apart(explorer) -> None:
    answer = explorer.answer(QUERY)
    weights = [term.weight for term in answer.terms]
    assert weights == sorted(weights, reverse=True)
    assert answer.active_dims >= len(answer.terms) == 20
    assert {term.in_text for term in answer.terms} == {True, False}
    for term in answer.terms:
        if term.in_text:
            assert term.name.casefold() in QUERY.casefold()


def test_what_a_model_does_not_read_is_said(explorer, models, collection) -> None:
    assert explorer.answer(QUERY).notes == []
    (note,) = explorer.answer("capital " * 200).notes
    assert "reads the first 64 of them" in note
    alone = Explorer(models[0], Collection("one text", {"long": collection.documents["long"]}))
    sparse, lexical = alone.answer("capital of the city where the road ends").rankings
    assert not sparse.hits[0].text[-1].read
    assert sparse.hits[0].text[-1].text.endswith("ends here")
    assert all(segment.read for segment in lexical.hits[0].text), "BM25 reads it all"
    assert "ends" in [segment.text for segment in lexical.hits[0].text if segment.reasons]
    assert "In italics" in markup.rankings(alone.answer("capital"))


@pytest.mark.parametrize(
    ("query", "says"),
    [("", "Type a query"), (" \n\t", "Type a query"), ("x" * 10_001, "10,001 characters"), ("a\ud800b", "not valid")],
)
def test_a_query_that_cannot_be_answered_gets_a_message(explorer, query: str, says: str) -> None:
    with pytest.raises(QueryError, match=says):
        explorer.answer(query)
    terms, results, _ = page.respond(explorer, query)
    assert 'role="alert"' in terms
    assert says in terms
    assert results == ""


def test_only_the_right_models_are_taken(models, collection, monkeypatch) -> None:
    sparse, dense = models
    with pytest.raises(ValueError, match="is a dense model, and a sparse one is needed"):
        Explorer(dense, collection)
    with pytest.raises(ValueError, match="is a sparse model, and a dense one is needed"):
        Explorer(sparse, collection, sparse)
    explorer = Explorer(sparse, collection)
    assert list(explorer.beside) == ["BM25"]
    with pytest.raises(ValueError, match=r"'dense': choose one of \['BM25'\]"):
        explorer.answer(QUERY, "dense")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'lion-st\[demo\]'"):
        build_page(explorer)


def test_a_folder_becomes_a_collection(tmp_path) -> None:
    corpus = {
        "a": {"title": "Lions", "text": "hunt"},
        "b": {"title": "", "text": "rest"},
        "c": {"title": "", "text": ""},
    }
    queries = {"q1": "who hunts", "q2": "who rests", "q3": "who?"}
    save_beir(tmp_path / "beir", corpus, queries, {"q1": {"a": 1, "b": 0}, "q2": {"b": 2}})
    read = read_collection(tmp_path / "beir")
    assert (read.name, list(read.documents)) == ("beir", ["a", "b"])
    assert read.documents["a"].content == "Lions hunt"
    assert read.relevant(" who hunts ") == {"a"}
    assert read.relevant("who?") == frozenset()
    assert read.examples() == ["who hunts", "who rests"]
    assert read.examples(1) == ["who hunts"]


def test_documents_alone_are_enough(tmp_path) -> None:
    file = tmp_path / "docs.tsv"
    file.write_text("id\ttext\ttitle\n1\tlions hunt\t\n2\t\t\n3\ttigers\tCats\n")
    read = read_collection(file, "cats")
    assert read.documents == {"1": Fields("1", "", "lions hunt"), "3": Fields("3", "Cats", "tigers")}
    assert read.examples() == []
    file.write_text("1\tlions\n1\ttigers\n")
    with pytest.raises(ValueError, match=r"docs\.tsv:2 repeats the id '1'"):
        read_collection(file)
    file.write_text("no tab\n")
    with pytest.raises(ValueError, match=r"docs\.tsv:1 is 'no tab'"):
        read_collection(file)
    file.write_text("1\t \n")
    with pytest.raises(ValueError, match="no document with a text"):
        read_collection(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_collection(tmp_path / "nowhere")


def test_no_text_is_taken_for_markup(explorer) -> None:
    evil = '<img src=x onerror="alert(1)">'
    reasons = Reasons([Reason(evil, 0.5, True, True)], 0, 0.0)
    text = [Segment(evil), Segment(evil, tuple(reasons.listed)), Segment(evil, read=False)]
    answer = explorer.answer(QUERY)
    ranking = answer.rankings[0]
    ranking.hits[0] = ranking.hits[0]._replace(document=Fields(evil, "", evil), title=[], text=text, reasons=reasons)
    html = markup.rankings(answer) + markup.message(evil) + markup.expansion(explorer.answer(evil))
    assert "<img" not in html
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in html


def test_long_passages_are_folded_without_losing_text(explorer) -> None:
    html = markup.passage([Segment("word " * 300)])
    assert html.count("word") == 300
    assert "<details" in html
    assert "<details" not in markup.passage([Segment("word " * 150)])


def test_a_second_start_reads_the_vectors_of_the_first(models, collection, tmp_path, monkeypatch) -> None:
    first = Explorer(models[0], collection, models[1], encoded_dir=tmp_path)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("shard-*")}
    assert len(kept) == 2, "the sparse vectors and the dense ones"
    again = Explorer(models[0], collection, models[1], encoded_dir=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("shard-*")} == kept
    for one, other in zip(first.answer(QUERY).rankings, again.answer(QUERY).rankings, strict=True):
        assert [hit.document.id for hit in one.hits] == [hit.document.id for hit in other.hits]
    (folder,) = {file.parent for file in kept if '"sparse"' in (file.parent / "manifest.json").read_text()}
    given = Explorer(models[0], collection, encoded=folder)
    assert [hit.document.id for hit in given.answer(QUERY).rankings[0].hits] == [
        hit.document.id for hit in first.answer(QUERY).rankings[0].hits
    ]
    index_corpus(folder, tmp_path / "index", sample=0)
    searched = Explorer(models[0], collection, index=tmp_path / "index")
    for one, other in zip(first.answer(QUERY).rankings[0].hits, searched.answer(QUERY).rankings[0].hits, strict=True):
        assert (one.document, one.score, one.reasons) == (other.document, other.score, other.reasons)
    for place in (folder, tmp_path / "index"):
        with pytest.raises(ValueError, match=r"holds vectors, and the page shows texts.*--encoded"):
            read_collection(place)
    changed = Collection("one more", {**collection.documents, "new": Fields("new", "", "a new text")})
    assert "new" in Explorer(models[0], changed, encoded_dir=tmp_path).index.ids
    edited = Collection("edited", {**collection.documents, "d0": Fields("d0", "", "another text")})
    for other in (changed, edited):
        with pytest.raises(StorageError, match="holds other documents than the"):
            Explorer(models[0], other, index=tmp_path / "index")
    unnamed = create_index("exact", "sparse")
    unnamed.add(first.index.ids, first.index.vectors(first.index.ids))
    with pytest.raises(StorageError, match="does not say what its vectors come from"):
        Explorer(models[0], collection, index=unnamed.save(tmp_path / "unnamed"))
    with torch.no_grad():
        other_model = lion_st.build(models[0][0].model.name_or_path, "sparse")
        other_model[0].model.get_input_embeddings().weight.mul_(1.1)
    with pytest.raises(StorageError, match="with other weights"):
        Explorer(other_model, collection, index=tmp_path / "index")


def test_the_server_says_its_address_and_nothing_else(explorer, capsys, monkeypatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "_serve", interrupt)
    built = build_page(explorer)
    address = page.launch(built, "127.0.0.1")
    assert capsys.readouterr().out == f"Lion explorer: {address} (Ctrl+C ends it)\n"
