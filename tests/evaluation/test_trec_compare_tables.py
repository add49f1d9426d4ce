from itertools import product
from pathlib import Path

import numpy as np
import pytest

from lion_st.encoding import to_csr
from lion_st.evaluation import (
    compare_runs,
    drop_self_matches,
    format_table,
    prune_report,
    read_qrels,
    read_run,
    read_topics,
    trade_off_figure,
    write_qrels,
    write_run,
)
from lion_st.evaluation.compare import holm, randomization_test
from lion_st.indexes import Pruning


def test_a_run_file_comes_back_as_written(tmp_path: Path) -> None:
    run = {"q1": {"d1": 1.25, "d2": 7.0000001, "d3": 1e-8}, "q2": {"é": -1.0}}
    path = write_run(tmp_path / "runs" / "a.trec", run, tag="lion-sp")
    lines = path.read_text().splitlines()
    assert lines[0] == "q1 Q0 d2 1 7.0000001 lion-sp"
    assert [line.split()[3] for line in lines] == ["1", "2", "3", "1"]
    assert read_run(path) == run


def test_malformed_run_files_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for content, message in [
        ("q Q0 d 1 0.5 tag\nq Q0 d 1 0.5\n", "run:2 is .* 5 columns: a run is"),
        ("q Q0 d 1 high tag\n", "run:1 has the score 'high', which is not a number"),
        ("q Q0 d 1 2 t\nq Q0 d 2 1 t\n", "run:2: document 'd' occurs twice"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_run(path)


def test_ids_with_spaces_are_written_with_tabs(tmp_path: Path) -> None:
    run, qrels = {"query 0": {"Ada Moor": 2.0, "é": 1.0}}, {"query 0": {"Ada Moor": 1, "x\u00a0y": 0}}
    path = write_run(tmp_path / "run", run, tag="a b")
    assert path.read_text().splitlines()[0] == "query 0\tQ0\tAda Moor\t1\t2\ta_b"
    assert read_run(path) == run
    assert read_qrels(write_qrels(tmp_path / "qrels", qrels)) == qrels
    for bad in ("a\tb", "a\nb", "", " "):
        with pytest.raises(ValueError, match="id"):
            write_run(tmp_path / "bad", {bad: {"d": 1.0}})
        with pytest.raises(ValueError, match="id"):
            write_qrels(tmp_path / "bad", {"q": {bad: 1}})
    with pytest.raises(ValueError, match="'d' has the score nan for query 'q'"):
        write_run(tmp_path / "bad", {"q": {"d": float("nan")}})


def test_both_layouts_of_judgements_are_read(tmp_path: Path) -> None:
    (tmp_path / "trec").write_text("q1 0 d1 2\nq1 0 d2 0\n\nq2 0 d1 -1\n")
    (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\n")
    assert read_qrels(tmp_path / "trec") == {"q1": {"d1": 2, "d2": 0}, "q2": {"d1": -1}}
    assert read_qrels(tmp_path / "beir.tsv") == {"q1": {"d1": 2}}
    assert read_qrels(write_qrels(tmp_path / "new" / "qrels", {"q1": {"d1": 2, "é": 0}})) == {"q1": {"d1": 2, "é": 0}}
    (tmp_path / "bad").write_text("q1 0 d1 yes\n")
    with pytest.raises(ValueError, match="bad:1 has the grade 'yes', which is not a number"):
        read_qrels(tmp_path / "bad")


def test_both_layouts_of_topics_are_read(tmp_path: Path) -> None:
    (tmp_path / "tsv").write_text("1\twhat is a lion\n2\twhy not\n")
    assert read_topics(tmp_path / "tsv") == {"1": "what is a lion", "2": "why not"}
    (tmp_path / "crlf").write_bytes("1\tlions\u2028eat\x0bor\x0csleep\x85all day\r\n2\twhy\r\n".encode())
    assert read_topics(tmp_path / "crlf") == {"1": "lions\u2028eat\x0bor\x0csleep\x85all day", "2": "why"}
    (tmp_path / "trec").write_text(
        "<top>\n<num> Number: 301\n<title> International\nOrganized Crime\n<desc> Identify\n</top>\n"
        "<top><num>302</num><title>Poliomyelitis</title></top>"
    )
    assert read_topics(tmp_path / "trec") == {"301": "International Organized Crime", "302": "Poliomyelitis"}
    (tmp_path / "bad").write_text("no tab here\n")
    with pytest.raises(ValueError, match="bad:1"):
        read_topics(tmp_path / "bad")


def test_self_matches_are_dropped_before_the_cut() -> None:
    run = {"a": {"a": 9.0, "b": 2.0, "c": 1.0}}
    assert drop_self_matches(run, k=1) == {"a": {"b": 2.0}}
    assert drop_self_matches(run) == {"a": {"b": 2.0, "c": 1.0}}


def test_the_randomisation_test_approaches_the_exact_p_value() -> None:
    a = np.array([0.1, 0.4, 0.3, 0.8, 0.5, 0.2, 0.6, 0.1])
    b = np.array([0.3, 0.5, 0.6, 0.7, 0.9, 0.3, 0.6, 0.4])
    flips = [abs(np.dot(signs, b - a)) for signs in product([-1, 1], repeat=8)]
    exact = np.mean(np.array(flips) >= abs((b - a).sum()) - 1e-12)
    assert randomization_test(a, b, 50_000) == pytest.approx(exact, abs=0.01)
    assert randomization_test(a, a, 1000) == 1.0


def test_holm_is_monotone_and_capped() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_runs_are_compared_with_wins_losses_and_the_queries_behind_them() -> None:
    qrels = {f"q{number}": {"good": 1} for number in range(20)}
    poor = {query: {"bad": 2.0, "good": 1.0} for query in qrels}
    better = {query: {"good": 2.0} for query in qrels} | {"q3": {"bad": 1.0}, "q4": {"bad": 2.0, "good": 1.0}}
    (only,) = compare_runs(qrels, {"poor": poor, "better": better}, ["MRR@10"], permutations=5000)
    assert (only.wins, only.ties, only.losses) == (18, 1, 1)
    assert only.difference == pytest.approx((18 * 0.5 - 0.5) / 20)
    assert only.p_value < 0.01
    assert only.drops == (("q3", -0.5),)
    assert len(only.gains) == 5
    three = compare_runs(qrels, {"poor": poor, "better": better, "same": poor}, ["MRR@10"], baseline="poor")
    assert [(one.a, one.b) for one in three] == [("poor", "better"), ("poor", "same")]
    assert three[0].p_holm == pytest.approx(2 * three[0].p_value)
    (graded,) = compare_runs(qrels, {"poor": poor, "better": better}, ["MRR@10"], permutations=10, relevance_level=2)
    assert graded.mean_a == graded.mean_b == 0.0  # no grade is as high
    with pytest.raises(ValueError, match="'none'"):
        compare_runs(qrels, {"poor": poor, "better": better}, baseline="none")
    with pytest.warns(UserWarning, match="'part' lacks 19 of the 20 judged queries, such as 'q1'"):
        compare_runs(qrels, {"poor": poor, "part": {"q0": {"good": 1.0}}}, permutations=10)
    with pytest.raises(ValueError, match="'foreign' has no query that is judged"):
        compare_runs(qrels, {"poor": poor, "foreign": {"x1": {"good": 1.0}}})


def test_tables_align_numbers_and_escape_text() -> None:
    rows = [{"model": "a|b_1", "nDCG@10": 0.12345, "bytes": 1234567}, {"model": "<c>", "nDCG@10": None}]
    assert format_table(rows).splitlines() == [
        "| model | nDCG@10 | bytes |",
        "|---|---:|---:|",
        "| a\\|b_1 | 0.123 | 1,234,567 |",
        "| <c> |  |  |",
    ]
    assert "<td>&lt;c&gt;</td>" in format_table(rows, style="html")
    assert r"a|b\_1 & 0.123 & 1,234,567 \\" in format_table(rows, style="latex")
    with pytest.raises(ValueError, match="'csv'"):
        format_table(rows, style="csv")


def test_the_pruning_report_shows_the_trade_off(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = to_csr(rng.random((60, 200)) * (rng.random((60, 200)) < 0.3))
    ids = [f"d{row}" for row in range(60)]
    queries = to_csr(vectors[:10].toarray() * (rng.random((10, 200)) < 0.3))
    qrels = {f"q{row}": {f"d{row}": 1} for row in range(10)}
    settings = [Pruning(), Pruning(top_terms=30), Pruning(top_terms=2)]
    rows = prune_report((ids, vectors), (list(qrels), queries), qrels, settings)
    assert [row["documents"] for row in rows] == ["none", "top_terms=30", "top_terms=2"]
    assert rows[0]["nDCG@10"] > rows[2]["nDCG@10"] > 0
    assert rows[0]["index_bytes"] > rows[1]["index_bytes"] > rows[2]["index_bytes"]
    assert rows[2]["document_terms"] == 2.0
    figure = trade_off_figure(rows, tmp_path / "figure.svg").read_text()
    assert "top_terms=30" in figure and "unpruned" in figure
