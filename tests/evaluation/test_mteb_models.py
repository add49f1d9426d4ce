"""What is proposed to mteb for the released checkpoints computes what their import computes."""

import ast
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import mteb
import mteb_models
import pytest
import torch
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType
from recipe_cards import RELEASED
from sentence_transformers import SentenceTransformer

from lion_st.hub import import_released
from lion_st.training.cost import TrainingCost
from lion_st.training.recipes import BACKBONES

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "h64_tied_rope_default"
TEXTS = ["what do lions eat", "Lions prey on zebras and wildebeest.", "night"]
METAS = [one for one in vars(mteb_models).values() if isinstance(one, ModelMeta)]


def encoded(wrapper: mteb_models.BidirectionalLlamaWrapper, task: str) -> torch.Tensor:
    batches = [{"text": TEXTS[:2]}, {"text": TEXTS[2:]}]
    about = {"task_metadata": SimpleNamespace(name="SciFact"), "hf_split": "test", "hf_subset": "default"}
    return wrapper.encode(batches, prompt_type=PromptType(task), **about)


def assert_alike(wrapper: mteb_models.BidirectionalLlamaWrapper, folder: Path) -> None:
    stock = SentenceTransformer(str(folder), device="cpu")
    found = {task: encoded(wrapper, task) for task in ("query", "document")}
    expected = {task: getattr(stock, f"encode_{task}")(TEXTS, convert_to_tensor=True) for task in found}
    for task, rows in found.items():
        torch.testing.assert_close(rows.to_dense(), expected[task].float(), rtol=0, atol=1e-5)
    products = expected["query"] @ expected["document"].T
    torch.testing.assert_close(wrapper.similarity(found["query"], found["document"]), products, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_an_adapter_of_the_paper_is_the_imported_model(tmp_path, tiny_backbone, paradigm) -> None:
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "model", base)
    for file in Path(tiny_backbone()).glob("*token*"):
        shutil.copy(file, base)
    folder = import_released(GOLDEN / f"lora_{paradigm}", base, tmp_path / "out")
    options = {"base": str(base), "torch_dtype": torch.float32, "device": "cpu"}
    meta = mteb_models.lion_sp_1b if paradigm == "sparse" else mteb_models.lion_ds_1b
    wrapper = mteb_models.BidirectionalLlamaWrapper(str(GOLDEN / f"lora_{paradigm}"), **meta.loader_kwargs, **options)
    assert_alike(wrapper, folder)


def test_a_merged_laconic_is_the_imported_model(tmp_path, tiny_backbone) -> None:
    folder = import_released(tiny_backbone(), tiny_backbone(), tmp_path / "out", contract="laconic")
    settings = mteb_models.laconic_1b.loader_kwargs | {"base": tiny_backbone()}
    wrapper = mteb_models.BidirectionalLlamaWrapper(
        tiny_backbone(), **settings, torch_dtype=torch.float32, device="cpu"
    )
    assert_alike(wrapper, folder)


def test_the_fields_fit_the_models() -> None:
    names = [meta.name for meta in METAS]
    assert set(RELEASED.values()) <= set(names) and len(set(names)) == len(names) == 7
    shapes = {backbone.model: backbone.shape for backbone in BACKBONES.values()}
    for meta in METAS:
        shape = shapes[meta.adapted_from]
        sparse = meta.model_type == ["sparse"]
        assert meta.embed_dim == (shape.vocab_size if sparse else shape.hidden_size)
        norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
        assert meta.n_parameters == TrainingCost(shape, has_head=sparse, lora_r=None).parameters + norms
        assert meta.n_embedding_parameters == shape.vocab_size * shape.hidden_size
        meta._check_requirements()


def test_the_models_pass_the_tests_that_mteb_has_for_them() -> None:
    """Its tests/test_models/test_model_meta.py, but for the revisions, which nobody here can look up."""
    tasks = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    for meta in METAS:
        assert meta.name != meta.adapted_from and meta.n_embedding_parameters is not None
        trained_on = meta.get_training_datasets()
        assert trained_on >= {"MSMARCO", "NanoMSMARCORetrieval"}  # with what mteb holds for alike
        assert meta.training_datasets <= tasks
        assert ModelMeta.model_validate(meta.model_dump()) == meta
        json.dumps(meta.to_dict(), default=str)
    assert mteb_models.REVISIONS.keys() == {meta.name for meta in METAS}
    from mteb.models.model_implementations.v_splade_models import RLHN_680K_TRAINING_DATA

    assert mteb_models.RLHN_680K == RLHN_680K_TRAINING_DATA


def test_the_file_stands_alone_and_is_read_without_torch() -> None:
    """mteb also reads the descriptions of its models where only mteb-core is installed, which has no torch."""
    tree = ast.parse(Path(mteb_models.__file__).read_text())

    def packages(nodes: Iterable[ast.AST]) -> set[str]:
        found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        return {name.split(".")[0] for name in found}

    assert packages(tree.body) == {"__future__", "typing", "mteb"}
    assert packages(list(ast.walk(tree))) == {"__future__", "typing", "mteb", "torch", "transformers", "peft"}
    run = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.If)]
    decorators = [one for node in run for part in ast.walk(node) for one in getattr(part, "decorator_list", [])]
    assert not [one for one in decorators if "torch" in ast.unparse(one)]
