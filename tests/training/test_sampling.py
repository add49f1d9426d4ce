"""What may stand together in a batch, over all devices."""

import json
import warnings
from functools import partial
from itertools import chain, islice

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler
from tiny_runs import tiny_run, write_tuples
from torch.utils.data import ConcatDataset, RandomSampler

from lion_st.data import load_tuples, set_epoch
from lion_st.data.beir import save_beir
from lion_st.training.mixing import WeightedBatchSampler
from lion_st.training.retriever import build_model, build_trainer, load_training_tuples
from lion_st.training.sampling import NoFalseNegativesBatchSampler

LABELS = ["label"]

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def shared(tmp_path):
    """48 rows; a negative of each is another row's positive."""
    return load_tuples(write_tuples(tmp_path / "a.jsonl", 48, shared=True), negatives=4, teacher_scores=True)


@pytest.fixture
def judged(tmp_path):
    """A BEIR folder of 12 queries with three relevant documents each, of which neighbours share one."""
    corpus = {f"d{n}": {"text": f"document {n}"} for n in range(24)}
    queries = {f"q{n}": f"query {n}" for n in range(12)}
    qrels = {f"q{n}": {f"d{2 * n}": 1, f"d{2 * n + 1}": 1, f"d{(2 * n + 2) % 24}": 1} for n in range(12)}
    return save_beir(tmp_path / "beir", corpus, queries, qrels, "train"), qrels


def sampler_of(dataset, batch_size, drop_last=True, seed=0, epoch=0):
    sampler = NoFalseNegativesBatchSampler(dataset, batch_size, drop_last, LABELS, seed=seed)
    sampler.set_epoch(epoch)
    return sampler


def texts_of(dataset, batch):
    return [text for name, column in dataset[batch].items() if name != "label" for text in column]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_no_text_is_twice_in_a_batch_over_all_devices(shared, devices):
    sampler = sampler_of(shared, 8)
    shards = [BatchSamplerShard(sampler_of(shared, 8), devices, n, split_batches=True) for n in range(devices)]
    steps = list(zip(*shards, strict=True))
    assert [list(chain(*parts)) for parts in steps] == list(sampler)  # what one process trains on
    assert len(steps) == len(sampler) == 6
    for parts in steps:
        texts = texts_of(shared, list(chain(*parts)))
        assert len(texts) == 8 * 6 == len(set(texts))


def test_every_row_is_drawn_once_where_it_fits(tmp_path):
    rows = load_tuples(write_tuples(tmp_path / "a.jsonl", 24), negatives=2)
    assert sorted(chain(*sampler_of(rows, 4))) == list(range(24))
    sizes = [len(batch) for batch in sampler_of(rows, 5, drop_last=False)]
    assert sizes == [5, 5, 5, 5, 4]


def test_batches_depend_on_seed_and_epoch_alone(shared):
    first = list(sampler_of(shared, 8))
    again = sampler_of(shared, 8)
    list(islice(again, 2))  # left in the middle, as a run that stops
    assert list(again) == first
    assert list(sampler_of(shared, 8, seed=1)) != first != list(sampler_of(shared, 8, epoch=1))


def test_the_negatives_of_the_epoch_are_compared(tmp_path):
    """One of four negatives is drawn anew in each epoch, so that other rows may stand together."""
    rows = load_tuples(write_tuples(tmp_path / "a.jsonl", 48, shared=True), negatives=1)
    seen = []
    for epoch in range(4):
        set_epoch(rows, epoch)
        batches = list(sampler_of(rows, 24))
        assert all(len(set(texts_of(rows, batch))) == 24 * 3 for batch in batches)
        seen.append([sorted(batch) for batch in batches])
    assert len({str(batches) for batches in seen}) > 1


def test_no_judged_positive_is_a_negative_in_the_batch(judged):
    folder, qrels = judged
    pairs = load_tuples(folder, negatives=0)
    assert len(pairs) == 36
    sampler = sampler_of(pairs, 3)
    assert len(list(sampler)) == len(sampler) == 12
    for batch in sampler:
        rows = [pairs[index] for index in batch]
        for row in rows:
            relevant = {f"document {key[1:]}" for key in qrels[f"q{row['query'].split()[1]}"]}
            others = {other["positive"] for other in rows if other is not row}
            assert others.isdisjoint(relevant), (row, others)


def test_documents_known_by_id_are_not_read(judged, monkeypatch):
    pairs = load_tuples(judged[0], negatives=0)
    reader = pairs.format["format_kwargs"]["transform"]
    monkeypatch.setattr(type(reader.documents), "read", None)
    assert len(list(sampler_of(pairs, 3))) == 12


def test_equal_texts_under_two_ids_are_kept_apart(tmp_path):
    texts = ["the same", "the same", "another", "a third"]
    corpus = {f"d{n}": {"text": text} for n, text in enumerate(texts)}
    queries = {f"q{n}": f"query {n}" for n in range(4)}
    qrels = {f"q{n}": {f"d{n}": 1} for n in range(4)}
    pairs = load_tuples(save_beir(tmp_path / "beir", corpus, queries, qrels, "train"), negatives=0)
    for epoch in range(8):
        for batch in sampler_of(pairs, 2, epoch=epoch):
            assert len(set(texts_of(pairs, batch))) == 4


def test_data_sets_of_texts_are_compared_without_their_labels():
    rows = {"anchor": [f"q{n}" for n in range(8)], "positive": [f"p{n // 2}{' ' * (n % 2)}" for n in range(8)]}
    dataset = Dataset.from_dict(rows | {"label": [1.0] * 8, "dataset_name": ["the same"] * 8})
    for epoch in range(8):
        batches = list(sampler_of(dataset, 4, epoch=epoch))
        for batch in batches:
            assert len({dataset[index]["positive"].strip() for index in batch}) == 4
        assert sorted(chain(*batches)) == list(range(8))  # what did not fit the first stands in the second


def test_rows_that_wait_for_longer_than_a_batch_are_not_lost():
    negatives = {f"negative_{n}": [f"p{n}", *(f"n{n} {row}" for row in range(1, 6))] for n in range(1, 4)}
    texts = {name: [f"{name}{row}" for row in range(6)] for name in ("query", "p")}
    dataset = Dataset.from_dict({"query": texts["query"], "positive": texts["p"]} | negatives)
    met = 0
    for epoch in range(30):
        batches = list(sampler_of(dataset, 2, epoch=epoch))
        if 0 in batches[0]:  # it keeps the rows 1, 2 and 3 out, and the others keep none out
            met += 1
            assert sorted(chain(*batches)) == list(range(6))
    assert met > 5


@pytest.mark.parametrize("layout", ["tuples", "texts"])
def test_rows_of_a_query_or_passage_that_more_have_than_there_are_batches_are_counted(tmp_path, layout):
    def sampled(rows):
        if layout == "texts":
            return list(sampler_of(Dataset.from_list(rows), 4))
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return list(sampler_of(load_tuples(tmp_path / "rows.jsonl"), 4))

    rows = [{"positive": f"p{n}", "query": f"q{n}"} for n in range(24)]
    six = [row | {"positive": "popular"} if n < 6 else row for n, row in enumerate(rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled(six)  # one for each batch
        if layout == "tuples":  # of several positives one is drawn
            sampled([{"query": f"q{n}", "pos": ["popular", f"p{n}"] if n < 9 else [f"p{n}"]} for n in range(24)])
    for changed in ({"positive": "same"}, {"query": "same"}, {"positive": "the same", "query": "same"}):
        frequent = [row | changed if n < 9 else row for n, row in enumerate(rows)]
        with pytest.warns(UserWarning, match="At least 3 of 24 rows are not drawn in an epoch"):
            batches = sampled(frequent)
        assert len(set(chain(*batches)) & set(range(9))) <= 6


def test_rows_that_fill_no_batch_are_refused_at_once():
    dataset = Dataset.from_dict({"query": [f"q{n}" for n in range(8)], "positive": ["the same"] * 8})
    with pytest.raises(ValueError, match=r"8 rows .* no batch of 2 .* Give more data or a smaller --batch_size"):
        sampler_of(dataset, 2)


def test_a_batch_of_several_sources_is_of_one_on_all_devices(tmp_path):
    sources = [load_tuples(write_tuples(tmp_path / f"{n}.jsonl", 24 * (n + 1)), negatives=1) for n in range(2)]
    make = partial(WeightedBatchSampler, ConcatDataset(sources), weights=[1, 1])
    shards = [
        BatchSamplerShard(make(batch_samplers=[sampler_of(one, 4) for one in sources]), 2, rank, split_batches=True)
        for rank in range(2)
    ]
    steps = list(zip(*shards, strict=True))
    assert len(steps) == 18
    assert all(len({index >= 24 for part in parts for index in part}) == 1 for parts in steps)


def test_shares_add_up_to_the_batches_of_an_epoch_and_come_in_an_order_of_its_own(tmp_path):
    sources = [load_tuples(write_tuples(tmp_path / f"{n}.jsonl", 12 * (n + 1)), negatives=1) for n in range(2)]

    def mixed(*weights, epoch=0):
        sampler = WeightedBatchSampler(
            ConcatDataset(sources), weights, batch_samplers=[sampler_of(one, 4) for one in sources]
        )
        sampler.set_epoch(epoch)
        return sampler

    assert [mixed(*weights).batches() for weights in ((2, 1), (1, 1), (1, 7))] == [[6, 3], [5, 4], [1, 8]]
    is_first = [batch[0] < 12 for batch in mixed(2, 1)]
    assert is_first not in (sorted(is_first), sorted(is_first)[::-1])
    assert is_first != [batch[0] < 12 for batch in mixed(2, 1, epoch=1)]
    for weights in ((1, 0), (1,)):
        with pytest.raises(ValueError, match="2 sources need as many positive weights, got"):
            mixed(*weights)


def test_a_run_that_resumes_in_a_later_epoch_mixes_random_batches_alike():
    def make():
        sources, generator = [list(range(12)), list(range(24))], torch.Generator().manual_seed(0)
        samplers = [
            DefaultBatchSampler(RandomSampler(one, generator=generator), 4, True, LABELS, generator) for one in sources
        ]
        return WeightedBatchSampler(ConcatDataset(sources), [2, 1], batch_samplers=samplers, generator=generator)

    def epoch(sampler, number):
        sampler.set_epoch(number)
        return list(sampler)

    whole = make()
    first, second = epoch(whole, 0), epoch(whole, 1)
    assert first != second == epoch(make(), 1)


def test_the_trainer_divides_batches_of_all_devices(tiny_backbone, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), write_tuples(tmp_path / "a.jsonl"), tmp_path / "out", "dense", "cl")
    trainer = build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 0))
    loader = trainer.get_train_dataloader()
    assert isinstance(loader.batch_sampler, NoFalseNegativesBatchSampler) and loader.batch_sampler.batch_size == 4
    assert not trainer.accelerator.split_batches
