import sys

import pytest
import torch

from ifvit.conditions import is_visible
from ifvit.errors import UserError
from ifvit.models.attention import attend_biased, load_attention, logits_of

# (queries, keys, heads, channels per head): image, text, concat and cross-attention blocks of the
# paper's size, the widest heads (U-ViT-H), and the demo's size.
SHAPES = [
    (257, 257, 2, 64),
    (77, 77, 2, 64),
    (334, 334, 2, 64),
    (257, 334, 2, 64),
    (257, 334, 1, 72),
    (17, 17, 5, 32),
    (17, 37, 5, 32),
]


def random_heads(num_queries, num_keys, num_heads, channels):
    generator = torch.Generator().manual_seed(0)
    sizes = (num_queries, num_keys, num_keys)
    return [torch.randn(2, n, num_heads, channels, generator=generator) for n in sizes]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash", "math"])
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree_with_attention_in_float64(backend, shape, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    query, key, value = random_heads(*shape)
    logits = torch.einsum("bqhe,bkhe->bhqk", query.double(), key.double()) / shape[-1] ** 0.5
    expected = torch.einsum("bhqk,bkhe->bqhe", logits.softmax(-1), value.double())

    attended = load_attention(backend)(query, key, value, None)

    torch.testing.assert_close(attended.double(), expected, atol=1e-5, rtol=0)


def masked_attention(query, key, value, addend, visible):
    """Attention in float64, with the keys that are not visible cut off."""
    rows = []
    for n, length in enumerate(visible.sum(dim=1).tolist()):
        k, v = (x[n, :length].double() for x in (key, value))
        logits = torch.einsum("qhe,khe->hqk", query[n].double(), k) / query.shape[-1] ** 0.5
        logits = logits + addend[n, ..., :length]
        rows.append(torch.einsum("hqk,khe->qhe", logits.softmax(-1), v))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_that_are_not_visible_have_no_effect(backend, shape, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    heads = random_heads(*shape)
    visible = is_visible(torch.tensor([1, shape[1] - 5]), shape[1])
    attended = load_attention(backend)(*heads, visible)
    expected = masked_attention(*heads, torch.zeros(2, 1, 1, 1), visible)
    torch.testing.assert_close(attended.double(), expected, atol=1e-5, rtol=0)
    addend = torch.randn(2, shape[2], shape[0], shape[1])
    addend[1] = 0  # attend_biased has a bias for the first row only
    biased = attend_biased(load_attention(backend), lambda *inputs: addend[:1], *heads, visible)
    expected = masked_attention(*heads, addend, visible)
    torch.testing.assert_close(biased.double(), expected, atol=1e-5, rtol=0)


def test_flash_attention_says_that_it_takes_no_mask():
    heads, visible = random_heads(17, 37, 5, 32), is_visible(torch.tensor([3, 37]), 37)
    with pytest.raises(UserError, match=r"flash has no .* with a mask .* choose .* backend sdpa"):
        load_attention("flash")(*heads, visible)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_keys", [1, 8, 37])
def test_xformers_gets_the_mask_in_the_layout_that_it_demands(num_keys, dtype, monkeypatch):
    class Operators:
        @staticmethod
        def memory_efficient_attention(query, key, value, attn_bias):
            # As its fmha/common.py and fmha/cutlass.py check it.
            assert attn_bias.dtype == query.dtype
            assert attn_bias.shape == (*query.transpose(1, 2).shape[:3], key.shape[1])
            alignment = 128 // torch.finfo(query.dtype).bits
            assert all(stride % alignment == 0 for stride in attn_bias.stride()[:-1])
            assert attn_bias.stride(-1) <= 1
            weights = (logits_of(query, key) + attn_bias).softmax(-1)
            return torch.einsum("bhqk,bkhe->bqhe", weights, value.float())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "xformers", Operators())
    monkeypatch.setitem(sys.modules, "xformers.ops", Operators())
    heads = [x.to(dtype) for x in random_heads(17, num_keys, 5, 32)]
    visible = is_visible(torch.tensor([1, num_keys]), num_keys)
    attended = load_attention("xformers")(*heads, visible)
    expected = load_attention("math")(*(x.float() for x in heads), visible)
    torch.testing.assert_close(attended, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "efficient", "xformers"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_of_this_gpu_take_the_mask(backend, shape):
    if backend == "xformers":
        pytest.importorskip("xformers")
    heads = [x.cuda().bfloat16().requires_grad_() for x in random_heads(*shape)]
    visible = is_visible(torch.tensor([1, shape[1] - 5], device="cuda"), shape[1])
    attended = load_attention(backend)(*heads, visible)
    expected = masked_attention(*heads, torch.zeros(2, 1, 1, 1, device="cuda"), visible)
    torch.testing.assert_close(attended.double(), expected, atol=0.03, rtol=0)
    attended.float().sum().backward()
    assert all(x.grad.isfinite().all() for x in heads)
    assert (heads[2].grad[~visible] == 0).all()


@pytest.mark.parametrize("backend", ["cudnn", "efficient", "xformers"])
def test_a_kernel_without_its_cuda_device_is_one_clear_error(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"{backend} attention needs a CUDA device.*backend sdpa"):
        load_attention(backend)


@pytest.fixture
def hollow_xformers(monkeypatch):
    """Stands for a wheel of another PyTorch or CUDA: it can be imported but has no operators."""

    class Operators:
        @staticmethod
        def memory_efficient_attention(query, key, value, attn_bias):
            raise NotImplementedError("No operator found\nfor these\ninputs")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "xformers", Operators())
    monkeypatch.setitem(sys.modules, "xformers.ops", Operators())


@pytest.mark.usefixtures("hollow_xformers")
def test_an_operator_that_xformers_lacks_is_one_clear_error():
    attend = load_attention("xformers")
    with pytest.raises(UserError, match=r"no attention operator for torch\.float32 on cpu, 32 ch"):
        attend(*random_heads(17, 17, 5, 32), None)


@pytest.mark.usefixtures("hollow_xformers")
def test_auto_falls_back_from_an_xformers_that_lacks_its_operators(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: torch.empty(size))
    assert load_attention("auto") is load_attention("sdpa")


def test_inputs_that_a_kernel_cannot_take_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"cudnn has no attention operator for torch\.float32 on c"):
        load_attention("cudnn")(*random_heads(17, 17, 5, 32), None)


def test_an_unknown_backend_is_one_clear_error():
    with pytest.raises(UserError, match=r"one of auto, sdpa, .*, math: fast"):
        load_attention("fast")
