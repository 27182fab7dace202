"""Attention backends: one function signature, chosen once by name (`engine.attention`).

Shapes: B batch, Q query tokens, K key tokens, H heads, E channels per head.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ifvit.errors import UserError

Backend = Literal["auto", "sdpa", "flash", "cudnn", "efficient", "xformers", "math"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, Q, H, E) queries, (B, K, H, E) keys and values -> (B, Q, H, E), scale 1/sqrt(E), no mask."""
Bias = Callable[[Tensor, Tensor], Tensor | None]
"""(B, Q, H, E) queries, (B, K, H, E) keys -> addend of the logits before the softmax, or None.

The addend (b, H, Q, K) is for the first b <= B rows; the other rows have no bias.
"""

_REMEDY = "choose attention backend sdpa"
_NO_KERNEL = ("No available kernel", "No viable backend")  # torch on CUDA, torch on the CPU


def load_attention(backend: Backend) -> Attend:
    """Return the attention function of this name.

    Raises UserError for an unknown name and for a backend that this machine does not have. The
    function itself raises UserError for inputs that its kernel does not support.
    """
    if backend not in _LOADERS:
        raise UserError(f"attention backend must be one of {', '.join(_LOADERS)}: {backend}")
    return _LOADERS[backend]()


def logits_of(query: Tensor, key: Tensor) -> Tensor:
    """Logits q k / sqrt(E) of attention in float32 (B, H, Q, K), before the softmax."""
    scale = query.shape[-1] ** -0.5
    return torch.einsum("bqhe,bkhe->bhqk", query.float() * scale, key.float())


def attend_biased(
    attend: Attend, bias: Bias | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Compute `attend` for rows without bias, and SDPA with the addend of `bias` for the others."""
    addend = bias(query, key) if bias else None
    if addend is None:
        return attend(query, key, value)
    count = len(addend)
    biased = _sdpa(query[:count], key[:count], value[:count], addend)
    if count == len(query):
        return biased
    return torch.cat([biased, attend(query[count:], key[count:], value[count:])])


def _sdpa(query: Tensor, key: Tensor, value: Tensor, addend: Tensor | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=addend)
    return attended.transpose(1, 2)


def _math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = torch.einsum("bqhe,bkhe->bhqk", query * query.shape[-1] ** -0.5, key)
    return torch.einsum("bhqk,bkhe->bqhe", logits.softmax(dim=-1), value)


def _load_kernel(name: str, backend: SDPBackend) -> Attend:
    """SDPA restricted to one kernel; "sdpa" lets torch choose the kernel by the inputs."""
    if backend is not SDPBackend.FLASH_ATTENTION:
        _require_cuda(name)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        try:
            with sdpa_kernel(backend):
                return _sdpa(query, key, value)
        except RuntimeError as error:
            if not str(error).startswith(_NO_KERNEL):
                raise
            raise _unsupported(name, query) from None

    return attend


def _load_xformers() -> Attend:
    _require_cuda("xformers")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        raise UserError(
            f"xformers is not installed; pip install 'ifvit[gpu]' or {_REMEDY}"
        ) from None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        try:
            attended: Tensor = memory_efficient_attention(query, key, value)
        except NotImplementedError:
            raise _unsupported("xformers", query) from None
        return attended

    return attend


def _require_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"{name} attention needs a CUDA device and none is visible; {_REMEDY}")


def _unsupported(name: str, query: Tensor) -> UserError:
    inputs = f"{query.dtype} on {query.device}, {query.shape[-1]} channels per head"
    return UserError(f"{name} has no attention operator for {inputs}; {_REMEDY}")


def _load_fastest() -> Attend:
    """Use xformers where it works, torch's own kernels elsewhere."""
    try:
        attend = _load_xformers()
        # A wheel built for another PyTorch or CUDA can be imported but lacks its operators.
        probe = torch.zeros(1, 1, 1, 32, dtype=torch.float16, device="cuda")
        attend(probe, probe, probe)
    except UserError:
        return _sdpa
    return attend


_LOADERS: dict[str, Callable[[], Attend]] = {
    "auto": _load_fastest,
    "sdpa": lambda: _sdpa,
    "flash": lambda: _load_kernel("flash", SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda: _load_kernel("cudnn", SDPBackend.CUDNN_ATTENTION),
    "efficient": lambda: _load_kernel("efficient", SDPBackend.EFFICIENT_ATTENTION),
    "xformers": _load_xformers,
    "math": lambda: _math,
}
