import sys

import pytest
import torch

from ifvit.errors import UserError
from ifvit.models.attention import load_attention

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
