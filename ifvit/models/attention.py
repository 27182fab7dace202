"""Attention backends: one function signature, chosen once by name (`engine.attention`).

Shapes: B batch, Q query tokens, K key tokens, H heads, E channels per head. `visible` is (B, K)
bool: false for keys that are padding, true for at least one key of a row; None if all are visible.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ifvit.errors import UserError

Backend = Literal["auto", "sdpa", "flash", "cudnn", "efficient", "xformers", "math"]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(B, Q, H, E) queries, (B, K, H, E) keys and values, visible -> (B, Q, H, E), scale 1/sqrt(E)."""
Bias = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]
"""(B, Q, H, E) queries, (B, K, H, E) keys, visible -> addend of the logits before the softmax, or
None.

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


def logits_of(query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
    """Logits q k / sqrt(E) of attention in float32 (B, H, Q, K), before the softmax.

    Keys that are not visible have -inf.
    """
    scale = query.shape[-1] ** -0.5
    logits = torch.einsum("bqhe,bkhe->bhqk", query.float() * scale, key.float())
    return _hide(logits, visible)


def attend_biased(
    attend: Attend,
    bias: Bias | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
) -> Tensor:
    """Compute `attend` for rows without bias, and SDPA with the addend of `bias` for the others."""
    addend = bias(query, key, visible) if bias else None
    if addend is None:
        return attend(query, key, value, visible)
    count = len(addend)
    addend = _hide(addend, None if visible is None else visible[:count])
    biased = _masked_sdpa(query[:count], key[:count], value[:count], addend)
    if count == len(query):
        return biased
    visible = None if visible is None else visible[count:]
    return torch.cat([biased, attend(query[count:], key[count:], value[count:], visible)])


def _hide(logits: Tensor, visible: Tensor | None) -> Tensor:
    """Set logits (B, H, Q, K) to -inf where the key is not visible."""
    return logits if visible is None else logits.masked_fill(~visible[:, None, None], -torch.inf)


def _masked_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA with torch's mask, which broadcasts to (B, H, Q, K): bool, or an addend of logits."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    mask = None if visible is None else visible[:, None, None]
    return _masked_sdpa(query, key, value, mask)


def _math(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    logits = torch.einsum("bqhe,bkhe->bhqk", query * query.shape[-1] ** -0.5, key)
    return torch.einsum("bhqk,bkhe->bqhe", _hide(logits, visible).softmax(dim=-1), value)


def _load_kernel(name: str, backend: SDPBackend) -> Attend:
    """SDPA restricted to one kernel; "sdpa" lets torch choose the kernel by the inputs."""
    if backend is not SDPBackend.FLASH_ATTENTION:
        _require_cuda(name)

    def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        if visible is not None and backend is SDPBackend.FLASH_ATTENTION:
            raise _unsupported(name, query, visible)  # on a GPU it takes no mask
        try:
            with sdpa_kernel(backend):
                return _sdpa(query, key, value, visible)
        except RuntimeError as error:
            if not str(error).startswith(_NO_KERNEL):
                raise
            raise _unsupported(name, query, visible) from None

    return attend


def _load_xformers() -> Attend:
    _require_cuda("xformers")
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        raise UserError(
            f"xformers is not installed; pip install 'ifvit[gpu]' or {_REMEDY}"
        ) from None

    def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        bias = None if visible is None else _xformers_bias(query, visible)
        try:
            attended: Tensor = memory_efficient_attention(query, key, value, attn_bias=bias)
        except NotImplementedError:
            raise _unsupported("xformers", query, visible) from None
        return attended

    return attend


def _xformers_bias(query: Tensor, visible: Tensor) -> Tensor:
    """Addend (B, H, Q, K) of the logits as xformers takes it: expanded, in the type of the query,
    and with rows that begin at multiples of 16 bytes (its fmha/cutlass.py).
    """
    batch, num_queries, num_heads, _ = query.shape
    num_keys = visible.shape[1]
    aligned = query.new_zeros(batch, 1, 1, -(-num_keys // 8) * 8)
    aligned[..., :num_keys].masked_fill_(~visible[:, None, None], -torch.inf)
    return aligned[..., :num_keys].expand(-1, num_heads, num_queries, -1)


def _require_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"{name} attention needs a CUDA device and none is visible; {_REMEDY}")


def _unsupported(name: str, query: Tensor, visible: Tensor | None) -> UserError:
    inputs = f"{query.dtype} on {query.device}, {query.shape[-1]} channels per head"
    if visible is not None:
        inputs += ", with a mask for captions of different lengths"
    return UserError(f"{name} has no attention operator for {inputs}; {_REMEDY}")


def _load_fastest() -> Attend:
    """Use xformers where it works without a mask, torch's own kernels elsewhere.

    With a mask, xformers calls a kernel of torch, and on fewer kinds of GPU than torch does.
    """
    try:
        attend = _load_xformers()
        # A wheel built for another PyTorch or CUDA can be imported but lacks its operators.
        probe = torch.zeros(1, 1, 1, 32, dtype=torch.float16, device="cuda")
        attend(probe, probe, probe, None)
    except UserError:
        return _sdpa

    def choose(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        chosen = attend if visible is None else _sdpa
        return chosen(query, key, value, visible)

    return choose


_LOADERS: dict[str, Callable[[], Attend]] = {
    "auto": _load_fastest,
    "sdpa": lambda: _sdpa,
    "flash": lambda: _load_kernel("flash", SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda: _load_kernel("cudnn", SDPBackend.CUDNN_ATTENTION),
    "efficient": lambda: _load_kernel("efficient", SDPBackend.EFFICIENT_ATTENTION),
    "xformers": _load_xformers,
    "math": lambda: _math,
}
