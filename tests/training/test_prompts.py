"""Sources of training data with prompts of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from tiny_runs import tiny_run, write_tuples

from lion_st.data import load_tuples
from lion_st.data.held_out import hold_out
from lion_st.data.tuples import reader_of
from lion_st.errors import UsageError
from lion_st.hub import render_card
from lion_st.training.dry_run import describe_run
from lion_st.training.progress.callbacks import EpochCallback
from lion_st.training.retriever import build_trainer, load_training_tuples, train_retriever
from lion_st.training.sampling import NoFalseNegativesBatchSampler, _read_candidates
from lion_st.training.starting import build_model


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """Two sources with the same queries and documents."""
    folder = tmp_path_factory.mktemp("sources")
    return [str(write_tuples(folder / f"{name}.jsonl")) for name in "ab"]


def prompts(sources: list[str]) -> dict[str, dict[str, str]]:
    """Of the first source for queries alone, of the second one for both."""
    own = {"query": "what do engines do\nlions: ", "document": "poems: "}
    return {sources[0]: {"query": "storms: "}, sources[1]: own}


def settings(sources: list[str], **more: Any) -> dict[str, Any]:
    return {"train_data": sources, "prompts": prompts(sources), "document_prompt": "rivers: "} | more


def test_each_batch_is_of_one_source_with_its_own_prompts(sources, tiny_backbone, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), "", tmp_path / "run", "sparse", "cl", **settings(sources))
    model = build_model(arguments)
    trainer = build_trainer(model, arguments, training, load_training_tuples(arguments, 0))
    loader = trainer.get_train_dataloader()
    for sampler in trainer._sampler.batch_samplers:  # which still knows ids and all judgements
        assert isinstance(sampler, NoFalseNegativesBatchSampler) and sampler.rows.func is _read_candidates
    seen = set()
    for batch in loader:
        begins = []
        for column in ("query", "positive", "negative_2"):
            texts = model.tokenizer.batch_decode(batch[f"{column}_input_ids"], skip_special_tokens=True)
            begins.append({text.strip().partition(":")[0] for text in texts})
        assert all(len(one) == 1 for one in begins), begins
        seen.add(tuple(one.pop() for one in begins))
    assert seen == {("storms", "rivers", "rivers"), ("what do engines do\nlions", "poems", "poems")}


def test_every_source_hears_of_each_epoch_once(sources, tiny_backbone, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), "", tmp_path / "run", "sparse", "cl", **settings(sources))
    tuples = load_training_tuples(arguments, 0)
    trainer = build_trainer(build_model(arguments), arguments, training, tuples)
    callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, EpochCallback)]
    assert len(callbacks) == 1  # of several, transformers warns
    callbacks[0].epoch = 3
    callbacks[0].on_epoch_begin(training, trainer.state, trainer.control)
    assert [reader_of(rows).epoch for rows in tuples.values()] == [3, 3]


def test_a_run_keeps_them_in_its_record_and_says_them_in_the_card(sources, tiny_backbone, tmp_path):
    arguments, training = tiny_run(
        tiny_backbone(), "", tmp_path / "run", **settings(sources, eval_share=0.1, max_steps=14, save_steps=7)
    )
    folder = train_retriever(arguments, training)  # more than one epoch
    assert json.loads((folder / "training.json").read_text())["settings"]["prompts"] == prompts(sources)
    assert SentenceTransformer(str(folder)).prompts["document"] == "rivers: "
    card = render_card(folder)
    shown = prompts([Path(source).name for source in sources])
    assert f"| prompts | `{json.dumps(shown)}` |" in card
    assert str(Path(sources[0]).parent) not in card
    again = tiny_run(tiny_backbone(), "", tmp_path / "run", **settings(sources, prompts=None, eval_share=0.1))
    with pytest.raises(ValueError, match=r"prompts was .* and is None"):
        train_retriever(*again)


def test_held_out_texts_have_the_prompts_of_their_source(sources):
    tuples = {source: load_tuples(source, negatives=1) for source in sources}
    _, plain = hold_out(tuples, 0.1)
    given = {sources[0]: {"query": "A "}, sources[1]: {"query": "B ", "document": "D "}}
    _, held = hold_out(tuples, 0.1, prompts=given)
    assert set(held.queries.values()) == {mark + text for text in plain.queries.values() for mark in ("A ", "B ")}
    assert set(held.corpus.values()) == {mark + text for text in plain.corpus.values() for mark in ("", "D ")}
    for query, documents in held.relevant.items():
        assert {held.corpus[one][:2] == "D " for one in documents} == {held.queries[query][:2] == "B "}


def test_the_evaluation_puts_no_further_prompt_in_front(sources, tiny_backbone, tmp_path):
    arguments, training = tiny_run(
        tiny_backbone(), "", tmp_path / "run", **settings(sources, eval_share=0.1, query_prompt="storms: ")
    )
    model = build_model(arguments)
    trainer = build_trainer(model, arguments, training, load_training_tuples(arguments, 0))
    evaluator = trainer.evaluator.evaluators[0]
    seen: list[str] = []
    preprocess = model.preprocess
    model.preprocess = lambda texts, prompt=None, **more: (
        seen.extend(f"{prompt or ''}{text}" for text in texts) or preprocess(texts, prompt=prompt, **more)
    )
    evaluator(model)
    assert set(seen) == {*evaluator.queries, *evaluator.corpus}
    assert {text.split(":")[0] for text in seen} == {"storms", "what do engines do\nlions", "rivers", "poems"}


def test_a_dry_run_prints_them(sources, tiny_backbone, tmp_path):
    found = describe_run(*tiny_run(tiny_backbone(), "", tmp_path / "run", **settings(sources)))
    assert json.loads(found[: found.index("\n\n")])["prompts"] == prompts(sources)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"other": {"query": "q: "}}, "'other', which is not one of --train_data"),
        ({"A": "q: "}, "give a mapping of 'query' and 'document'"),
        ({"A": {"positive": "d: "}}, "give a mapping of 'query' and 'document'"),
        ({"A": {"query": 3}}, "the query prompt 3, which is not a text"),
        ("q: ", "--query_prompt"),
    ],
)
def test_what_is_not_a_prompt_of_a_source_is_refused_before_anything_is_read(sources, given, message, tmp_path):
    if isinstance(given, dict):
        given = {sources[0] if source == "A" else source: prompt for source, prompt in given.items()}
    with pytest.raises(UsageError, match=message):
        tiny_run("nothing", "", tmp_path / "run", train_data=sources, prompts=given)


def test_a_prompt_that_leaves_nothing_of_a_text_is_refused_with_its_source(sources, tiny_backbone, tmp_path):
    own = {sources[1]: {"document": "poems " * 200}}
    arguments, training = tiny_run(tiny_backbone(), "", tmp_path / "run", train_data=sources, prompts=own)
    with pytest.raises(ValueError, match=r"Documents of .*b\.jsonl are cut to 128 tokens"):
        build_trainer(build_model(arguments), arguments, training, load_training_tuples(arguments, 0))
