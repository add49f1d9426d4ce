import pytest
import torch

from lion_st.modules import LlamaPooling

STATES = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def pooled(mode, states=STATES, mask=MASK):
    features = {"token_embeddings": states.clone(), "attention_mask": mask}
    return LlamaPooling(8, mode)(features)["sentence_embedding"]


def test_the_default_is_the_mean_of_unit_states_not_normalised_again():
    unit = STATES / STATES.norm(dim=-1, keepdim=True)
    expected = torch.stack([unit[0, 2:].mean(0), unit[1].mean(0)])
    torch.testing.assert_close(pooled("mean_normalized"), expected)
    assert (pooled("mean_normalized").norm(dim=-1) < 0.95).all()


def test_other_modes_by_name():
    torch.testing.assert_close(pooled("mean"), torch.stack([STATES[0, 2:].mean(0), STATES[1].mean(0)]))
    torch.testing.assert_close(pooled("last_token"), STATES[:, -1])


@pytest.mark.parametrize("mode", ["mean_normalized", "mean", "last_token"])
def test_padding_side_and_what_is_padded_do_not_matter(mode):
    expected = pooled(mode)
    noisy = STATES.clone()
    noisy[0, :2] = 1e3
    torch.testing.assert_close(pooled(mode, noisy), expected)
    right = torch.stack([STATES[0, [2, 3, 0, 1]], STATES[1]])
    torch.testing.assert_close(pooled(mode, right, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])), expected)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'cls'"):
        LlamaPooling(8, "cls")


@pytest.mark.parametrize("mode", ["mean_normalized", "mean", "last_token"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_vector_that_is_not_finite_raises_when_encoding(mode, broken):
    states = STATES.clone()
    states[1, -1, 3] = broken
    pooling = LlamaPooling(8, mode).eval()
    features = {"token_embeddings": states, "attention_mask": MASK}
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"vectors of 1 texts \(numbers 1 of the batch\) are NaN or infinite"),
    ):
        pooling(dict(features))
    pooling(dict(features))  # training goes on without a look


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_of_zeros_stays_zero_in_half_precision(dtype):
    states = STATES.to(dtype)
    states[0, :2] = 0
    states.requires_grad_()
    vectors = pooled("mean_normalized", states)
    torch.testing.assert_close(vectors.float(), pooled("mean_normalized"), rtol=0.02, atol=5e-3)
    vectors.sum().backward()
    assert states.grad.isfinite().all()
