"""What mteb's leaderboard takes: results of a published checkpoint, below its commit, with what is known of it."""

import json
from pathlib import Path

import pytest
from mteb.models.model_meta import ModelMeta

import lion_st
from lion_st.encoding.fingerprints import model_revision
from lion_st.evaluation import evaluate_retrieval, open_retriever, trec_task
from lion_st.evaluation.mteb_meta import model_meta, training_datasets
from lion_st.hub import publish_folder

NAME = "org/lion-sp-tiny"


@pytest.fixture
def lions(tmp_path) -> Path:
    folder = tmp_path / "lions"
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": f"d{row}", "text": f"lion number {row} eats zebras"}) for row in range(12)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "lion number 3"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td3\t1\n")
    return folder


def test_results_of_a_published_checkpoint_are_filed_below_its_commit(connected, lions, tmp_path, tiny_backbone):
    model = lion_st.build(tiny_backbone(), "sparse", query_prompt="query: ", document_length=40, device="cpu")
    lion_st.export(model, tmp_path / "model", verify=False, create_model_card=False)
    header = "license: apache-2.0\nlanguage: [en]\ndatasets: [sentence-transformers/msmarco]\nbase_model: org/llama"
    (tmp_path / "model" / "README.md").write_text(f"---\n{header}\n---\n")
    publish_folder(tmp_path / "model", NAME, repo_type="model")
    commit = connected.repositories["model", NAME].resolve("main")
    assert model_revision(lion_st.load(NAME, device="cpu")) == commit
    evaluate_retrieval(NAME, lions, output_dir=tmp_path / "out")
    (folder,) = (tmp_path / "out" / "results" / "org__lion-sp-tiny").iterdir()
    assert folder.name == commit
    # Of a folder, whose name is anybody's: an experiment of its own below the same commit.
    (file,) = folder.rglob("lions.json")
    meta = json.loads((file.parent / "model_meta.json").read_text())
    ModelMeta.model_validate_json_resolved(json.dumps(meta | {"is_cross_encoder": None}))
    expected = {
        "name": NAME,
        "revision": commit,
        "loader": "SentenceTransformerEncoderWrapper",
        "n_parameters": sum(one.numel() for one in {one.data_ptr(): one for one in model.parameters()}.values()),
        "n_embedding_parameters": model[0].model.get_input_embeddings().weight.numel(),
        "max_tokens": 40,
        "embed_dim": model.get_embedding_dimension(),
        "license": "apache-2.0",
        "languages": ["eng-Latn"],
        "similarity_fn_name": "dot",
        "training_datasets": ["MSMARCO"],
        "use_instructions": True,
        "open_weights": True,
        "adapted_from": "org/llama",
        "model_type": ["sparse"],
        "reference": f"https://huggingface.co/{NAME}",
    }
    assert {name: meta[name] for name in expected} == expected

    evaluate_retrieval(NAME, lions, output_dir=tmp_path / "out", engine_parameters={"quantization": "uint8"})
    evaluate_retrieval(NAME, lions, output_dir=tmp_path / "out", top_k=20)
    loaded = lion_st.load(NAME, device="cpu")  # nobody knows what its owner did to it
    evaluate_retrieval(loaded, lions, output_dir=tmp_path / "out")
    others = {path.name for path in (tmp_path / "out" / "results" / "org__lion-sp-tiny").iterdir()} - {commit}
    assert len(others) >= 1 and len(list(folder.rglob("lions.json"))) == 1


@pytest.mark.parametrize(
    ("header", "license"),
    [
        ("license: llama3.2", "https://www.llama.com/llama3_2/license/"),
        ("license: other\nlicense_link: https://lions.org/licence", "https://lions.org/licence"),
        ("license: other\nlicense_link: LICENSE", None),
        ("tags: [lion]", None),
    ],
)
def test_the_licence_is_one_that_mteb_takes(tmp_path, tiny_backbone, header, license):
    model = lion_st.build(tiny_backbone(), "dense", device="cpu")
    lion_st.export(model, tmp_path / "model", verify=False, create_model_card=False)
    (tmp_path / "model" / "README.md").write_text(f"---\n{header}\n---\n")
    meta = model_meta(open_retriever(tmp_path / "model"))
    assert meta.license == license
    ModelMeta.model_validate(meta.model_dump())


def test_training_data_are_named_as_mteb_names_them():
    names = [
        "sentence-transformers/msmarco-bm25",
        "lightonai/ms-marco-en-bge",
        "sentence-transformers/natural-questions",
    ]
    assert training_datasets(names) == {"MSMARCO", "NQ"}
    assert training_datasets(["org/my-own", "org/nqueens"]) is None


def test_test_sets_of_texts_on_the_hub_are_told_apart_by_their_commits(connected, lions, tmp_path):
    (tmp_path / "topics.tsv").write_text("q\tlion number 3\n")
    (tmp_path / "qrels.txt").write_text("q 0 d3 1\n")

    def revision() -> str:
        task = trec_task("org/lions:corpus", tmp_path / "topics.tsv", tmp_path / "qrels.txt", "lions")
        return task.metadata.dataset["revision"]

    with pytest.raises(FileNotFoundError, match=r"org/lions:corpus .* the Hub gives no such data set"):
        revision()
    connected.add("org/lions", lions, "dataset")
    before = revision()
    assert revision() == before
    connected.add("org/lions", {"corpus.jsonl": b'{"_id": "d3", "text": "other"}'}, "dataset")
    assert revision() != before
