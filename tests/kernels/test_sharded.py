"""The sparse head inside models whose weights are sharded (FSDP2)."""

import copy

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lion_st


@pytest.fixture
def one_process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("root", [True, False], ids=["model sharded", "layers and head sharded alone"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_sharded_model_gives_the_same_vectors_and_gradients(tiny_backbone, texts, one_process_group, tied, root):
    whole = lion_st.build(tiny_backbone(tied=tied), "sparse", device="cpu").train()
    sharded = copy.deepcopy(whole)
    lm = sharded[0].model
    for layer in lm.model.layers:
        fully_shard(layer, mesh=one_process_group)
    if root:
        fully_shard(sharded, mesh=one_process_group)
    elif not tied:
        fully_shard(lm.lm_head, mesh=one_process_group)
    features = whole.preprocess(texts)
    expected = whole(dict(features))["sentence_embedding"]
    actual = sharded(dict(features))["sentence_embedding"]
    torch.testing.assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    for (name, parameter), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        gradient = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
