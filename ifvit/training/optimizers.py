"""AdamW and Muon: which optimizer updates which parameter, their state, and the learning rate."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from ifvit.models.backbone import Backbone
from ifvit.training.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state tensors that AdamW keeps for each parameter, in the parameter's shape."""
MOMENTUM = "momentum_buffer"
"""The one state tensor that Muon keeps for each matrix."""
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def build_adamw(
    module: nn.Module, config: OptimConfig, others: Iterable[Tensor] = ()
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) for all parameters of `module` except `others`.

    Norms decay only if `config.decay_norms` is set. The learning rate is 0 until
    `Engine.set_learning_rate` sets it.
    """
    norms = [part for part in module.modules() if isinstance(part, _NORMS)]
    exempt = [] if config.decay_norms else [p for norm in norms for p in norm.parameters()]
    excluded = {*others, *exempt}
    decayed = [p for p in module.parameters() if p not in excluded]
    pairs = [(decayed, config.weight_decay), (exempt, 0.0)]
    groups = [{"params": found, "weight_decay": decay} for found, decay in pairs if found]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)


def build_optimizers(backbone: Backbone, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or AdamW, and Muon for the matrices of the blocks."""
    if config.optimizer == "adamw":
        return [build_adamw(backbone, config)]
    matrices = list(backbone.block_matrices().values())
    return [build_adamw(backbone, config, matrices), Muon(matrices, config.weight_decay)]


def state_names(backbone: Backbone, config: OptimConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, name of the parameter) of every state tensor that the optimizers keep."""
    matrices = backbone.block_matrices() if config.optimizer == "muon" else {}
    names = [name for name, _ in backbone.named_parameters()]
    for key in MOMENTS:
        yield from ((key, name) for name in names if name not in matrices)
    yield from ((MOMENTUM, name) for name in names if name in matrices)


def create_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Create AdamW's zero state for `tensors` now instead of at the first step."""
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), device=tensor.device),
            **{key: torch.zeros_like(tensor, requires_grad=False) for key in MOMENTS},
        }


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Learning rate of the update after `step` steps: linear rise, constant, linear fall."""
    rise = step / config.warmup_steps if config.warmup_steps else 1.0
    fall = (max_steps - step) / config.cooldown_steps if config.cooldown_steps else 1.0
    return config.learning_rate * min(rise, fall, 1.0)


_DECAY = 0.95
"""Decay of Muon's momentum."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_BATCH_VALUES = 2**24
"""Number of values of the matrices that are orthogonalised together, which bounds the memory."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose singular values are all brought near 1.

    It equals `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")` up to rounding. That one takes
    the matrices one by one, always in bf16, which CPUs without instructions for it compute twenty
    times slower than fp32, and it cannot skip an update. This one stacks matrices of equal shape,
    and where `found_inf`, a tensor () on the device, is 1, it changes nothing.
    """

    def __init__(self, matrices: Sequence[Tensor], weight_decay: float) -> None:
        """Take parameters of two dimensions; the learning rate is 0 until it is set."""
        groups = []
        for shape, equal in groupby(sorted(matrices, key=_shape), key=_shape):
            found, size = list(equal), max(1, _BATCH_VALUES // math.prod(shape))
            groups += [{"params": found[i : i + size]} for i in range(0, len(found), size)]
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay})
        for matrix in matrices:
            self.state[matrix] = {MOMENTUM: torch.zeros_like(matrix, requires_grad=False)}
        self.found_inf = torch.zeros((), device=matrices[0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices, without a closure."""
        keep = 1 - self.found_inf
        for group in self.param_groups:
            matrices, rate = group["params"], group["lr"]
            buffers = [self.state[matrix][MOMENTUM] for matrix in matrices]
            momentum = torch.stack(buffers)
            gradient = torch.stack([matrix.grad for matrix in matrices]).nan_to_num_(0.0, 0.0, 0.0)
            momentum.lerp_(gradient, keep * (1 - _DECAY))
            update = orthogonalise(gradient.lerp_(momentum, _DECAY)).float()
            # An update has the root mean square of AdamW's, about 0.2 (Liu et al. 2025, 2.2).
            update *= keep * (-0.2 * rate * max(matrices[0].shape) ** 0.5)
            torch._foreach_copy_(buffers, momentum.unbind())
            torch._foreach_mul_(matrices, 1 - keep * (rate * group["weight_decay"]))
            torch._foreach_add_(matrices, update.unbind())


def _shape(matrix: Tensor) -> tuple[int, ...]:
    return tuple(matrix.shape)


def orthogonalise(matrices: Tensor) -> Tensor:
    """U V^T, up to a factor of 0.7 to 1.2 for each singular value, of (N, R, C) = U S V^T.

    Five Newton-Schulz iterations x => (a + b x x^T + c (x x^T)^2) x; in bf16 on a GPU, else in
    fp32, where the same polynomials are applied to the smaller matrix x x^T.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalise(matrices.mT.contiguous()).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    on_gpu, is_square = x.is_cuda, x.shape[1] == x.shape[2]
    return iterate(x.bfloat16() if on_gpu else x) if on_gpu or is_square else iterate_gram(x)


def iterate(x: Tensor) -> Tensor:
    """Iterate on x (N, R, C) itself; bf16 changes the result by 1 % if x has full rank.

    Beyond the rank of x, rounding to bf16 is all there is, and the iterations enlarge it 485 times.
    """
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def iterate_gram(x: Tensor) -> Tensor:
    """The same in fp32 on the smaller x x^T, with which polynomials p of it commute: p x x^T p."""
    gram = x @ x.mT
    factor = product = _polynomial(gram)
    for _ in range(_NUM_ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _polynomial(gram)
        product = factor @ product
    return product @ x


def _polynomial(gram: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    value = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    value.diagonal(dim1=1, dim2=2).add_(a)
    return value
