"""One training step on this hardware, and the state that it works on."""

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from ifvit.diffusion.objectives import NormalSampler
from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.rng import normal
from ifvit.training.config import EngineConfig, OptimConfig
from ifvit.training.timing import PhaseTimer


class EMA:
    """Shadow = decay x shadow + (1 - decay) x parameter, once an update, starting as a copy.

    fp32 throughout: at decay 0.9999 a bf16 average would round every update away.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.shadows = [parameter.detach().float().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Move the average towards the parameters, all tensors in one pass."""
        torch._foreach_lerp_(self.shadows, list(parameters), 1.0 - self.decay)


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors, one of each for every parameter and of its shape."""


def build_optimizer(parameters: Iterable[Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on everything, as U-ViT has it.

    The rate starts at 0: `learning_rate` sets it before every step.
    """
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def create_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Give AdamW the zero state for `tensors` that it would make at its first step only."""
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), device=tensor.device),
            **{key: torch.zeros_like(tensor, requires_grad=False) for key in MOMENTS},
        }


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Rate of the update that follows `step` finished ones: linear up from 0, flat, linear down."""
    rise = step / config.warmup_steps if config.warmup_steps else 1.0
    fall = (max_steps - step) / config.cooldown_steps if config.cooldown_steps else 1.0
    return config.learning_rate * min(rise, fall, 1.0)


GROWTH_INTERVAL = 2000
"""Finite updates in a row after which the scale doubles."""


@dataclass
class LossScale:
    """The loss is multiplied by `value` before the backward pass (Micikevicius et al. 2018, 3.2).

    A gradient that overflows halves the scale, down to 1.
    """

    value: float = 2.0**16
    finite_updates: int = 0
    """Finite updates since the scale last changed."""
    overflows: int = 0
    """Updates lost to a scale that was too large."""

    def adapt(self, finite: bool) -> bool:
        """Adapt to the last gradient => whether a smaller scale can mend it or it needs none."""
        if finite:
            self.finite_updates += 1
            if self.finite_updates == GROWTH_INTERVAL:
                self.value, self.finite_updates = 2 * self.value, 0
            return True
        if self.value == 1.0:
            return False
        self.value, self.finite_updates = self.value / 2, 0
        self.overflows += 1
        return True


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HALF_ONLY = ("flash", "cudnn")


def prepare_forward(
    backbone: Backbone, config: EngineConfig, device: torch.device, num_micro_batches: int = 1
) -> None:
    """Change the forward pass of `backbone` in place; parameters and their names stay.

    Raises UserError when this machine cannot compile, graphs cannot hold the gradients, or the
    attention kernel cannot take the precision.
    """
    if device.type == "cuda" and config.precision == "fp32" and config.attention in _HALF_ONLY:
        raise UserError(
            f"engine.attention: {config.attention} takes 16 bits on a GPU; set engine.precision "
            "to bf16 or engine.attention to sdpa"
        )
    if config.compile:
        _require_compiler(device)
    if config.cuda_graphs:
        _require_graphs(device, num_micro_batches)
    for block in backbone.blocks():
        if config.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if config.compile:
            # Static: the blocks see two or three shapes, and kernels made for each are faster.
            mode = "reduce-overhead" if config.cuda_graphs else None
            block.compile(dynamic=False, mode=mode)
    if config.precision in _AUTOCAST:
        # Inside the module, where DeepSpeed leaves autocast alone: the same arithmetic everywhere.
        autocast = torch.autocast(device.type, _AUTOCAST[config.precision])
        backbone.forward = autocast(backbone.forward)  # type: ignore[method-assign]


def prepare_draws(config: EngineConfig) -> NormalSampler:
    """How the objective draws its noise: compiled, the rounds of the generator are one kernel."""
    return torch.compile(normal) if config.compile else normal


def _require_graphs(device: torch.device, num_micro_batches: int) -> None:
    if device.type != "cuda":
        raise UserError("engine.cuda_graphs: needs a CUDA device; set it to false")
    if num_micro_batches > 1:
        # A replay writes to where the last one left its gradients (pytorch issue 169545).
        raise UserError(
            f"engine.cuda_graphs: cannot accumulate gradients over {num_micro_batches} "
            "micro-batches; raise micro_batch_size or set it to false"
        )


def _require_compiler(device: torch.device) -> None:
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"engine.compile: torch.compile on the CPU needs {compiler}, which is not on PATH; "
            "install it or set engine.compile to false"
        )


class Engine:
    """Forward, backward, update and averages of one backbone; several processes run PyTorch's DDP.

    Parameters, moments and averages are fp32 in every precision. Here each process keeps them
    whole; `ifvit.training.zero` partitions them. `iter_state` and `load_state` speak of whole
    tensors by name, so that a run saved under one engine continues under any other.
    """

    _may_freeze = True
    """Whether the host can do without looking at the gradient's norm after every step."""

    def __init__(
        self,
        backbone: Backbone,
        config: EngineConfig,
        optim: OptimConfig,
        *,
        ema_decays: Sequence[float],
        micro_batch_size: int,
        num_micro_batches: int,
        tolerate_nonfinite: bool = False,
    ) -> None:
        self._blank: Backbone = nn.Module.to(copy.deepcopy(backbone), "meta").eval()
        self._blank.set_attention("sdpa")  # the recipe's kernel may not take fp32
        self._max_grad_norm = optim.max_grad_norm
        self._num_micro_batches = num_micro_batches
        self._accelerator = self._connect(config, micro_batch_size)
        nn.Module.to(backbone, self.device)
        prepare_forward(backbone, config, self.device, num_micro_batches)
        optimizer = build_optimizer(backbone.parameters(), optim)
        prepared = self._accelerator.prepare(backbone, optimizer)
        self._model: nn.Module = prepared[0]
        self._optimizer: Any = prepared[1].optimizer  # torch's AdamW or DeepSpeed's ZeRO around it
        self._parameters = dict(backbone.named_parameters())
        self._create_moments()
        self._averages = {decay: EMA(self._pieces(), decay) for decay in ema_decays}
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        """What the loss is multiplied by; None where gradients do not need it."""
        self.timer = PhaseTimer(self.device)
        """Where the time goes."""
        self._freezes = self._may_freeze and self.loss_scale is None and not tolerate_nonfinite
        self._frozen_steps = torch.zeros((), device=self.device)
        self._refused = 0
        self._update_applied = True

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return cast(torch.device, self._accelerator.device)

    @property
    def world(self) -> World:
        """This process among all."""
        accelerator = self._accelerator
        return World(
            rank=accelerator.process_index,
            size=accelerator.num_processes,
            local_rank=accelerator.local_process_index,
        )

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """Decays of the averages, in the recipe's order."""
        return tuple(self._averages)

    def predict_noise(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The backbone in the recipe's precision; shapes as in `ifvit.diffusion.objectives`."""
        return cast(Tensor, self._model(x_t, timesteps, condition))

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around each micro-batch; gradients are exchanged at the `last` one of a step only."""
        if last:
            return nullcontext()
        return cast(AbstractContextManager[None], self._accelerator.no_sync(self._model))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's mean loss."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        (loss * (scale / self._num_micro_batches)).backward()  # type: ignore[no-untyped-call]

    def set_learning_rate(self, rate: float) -> None:
        """Rate of the coming update."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> Tensor:
        """Update the parameters after the last micro-batch => global gradient norm, ().

        A gradient that is not finite changes nothing, on any process; see `skipped_steps`.
        """
        parameters = list(self._parameters.values())
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        if self.loss_scale is not None:
            torch._foreach_div_(gradients, self.loss_scale.value)
        norm = nn.utils.get_total_norm(gradients)
        if self._max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        nonfinite = (~norm.isfinite()).float()
        if self._freezes:
            nonfinite = nonfinite.maximum(self._frozen_steps.sign())
            self._frozen_steps += nonfinite
        else:
            self._settle(finite=not nonfinite.item())
        # AdamW's fused kernel reads the flag on the device and leaves everything as it is.
        self._optimizer.found_inf = nonfinite
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _settle(self, *, finite: bool) -> None:
        """Count a gradient that is not finite, unless a smaller loss scale may mend it."""
        self._update_applied = finite
        mended = finite if self.loss_scale is None else self.loss_scale.adapt(finite)
        if not mended:
            self._refused += 1

    def skipped_steps(self, *, wait: bool) -> int:
        """Updates refused since the last call because their gradient was not finite.

        Where the recipe tolerates none, the first one freezes the parameters on the device. So
        the host need not look after every step; it learns of it when it can `wait` for the device.
        """
        if self._freezes and wait:
            self._refused = int(self._frozen_steps.item())
            self._frozen_steps.zero_()
        count, self._refused = self._refused, 0
        return count

    def update_ema(self) -> None:
        """Move every average towards the parameters, unless the update was refused."""
        if self._update_applied:
            for average in self._averages.values():
                average.update(self._pieces())

    def gather_backbone(self, ema_decay: float | None) -> Backbone:
        """A backbone with the averaged weights or, given None, the trained ones; collective.

        fp32, in eval mode. Where nothing is partitioned it shares the engine's memory: it is for
        sampling and export before the next update, and must not be changed.
        """
        pieces = self._pieces() if ema_decay is None else self._averages[ema_decay].shadows
        whole: Backbone = copy.deepcopy(self._blank)
        whole.load_state_dict(dict(self._gather_named("", pieces)), assign=True)
        return whole

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        """All that is learned, as whole fp32 tensors one after the other; collective.

        `backbone.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME` and for each decay `ema0.9999.NAME`, in
        the same order on every process. Copy what is to outlive the next update.
        """
        yield from self._gather_named("backbone.", self._pieces())
        for key in MOMENTS:
            for name, parameter in self._parameters.items():
                yield f"{key}.{name}", self._gather_moment(parameter, key)
        for decay, average in self._averages.items():
            yield from self._gather_named(f"{ema_name(decay)}.", average.shadows)

    @torch.no_grad()
    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Continue from `iter_state` of any engine and number of processes.

        `read(name)` returns a whole tensor on the CPU; only this process's piece is copied.
        """
        for name, parameter in self._parameters.items():
            self._load_parameter(parameter, read(f"backbone.{name}"))
            for key in MOMENTS:
                self._load_moment(parameter, key, read(f"{key}.{name}"))
        for decay, average in self._averages.items():
            named = zip(self._parameters.items(), average.shadows, strict=True)
            for (name, parameter), shadow in named:
                shadow.copy_(self._cut(read(f"{ema_name(decay)}.{name}"), parameter))

    def scalars(self) -> dict[str, float]:
        """What else a checkpoint must hold; the same on every process."""
        num_updates = next(iter(self._adamw.state.values()))["step"].item()
        scalars = {} if self.loss_scale is None else vars(self.loss_scale)
        return {"num_updates": num_updates, **scalars}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """Continue from `scalars()` of any engine; call it after `load_state`."""
        own = dict(scalars)
        self._set_num_updates(own.pop("num_updates"))
        if self.loss_scale is not None:
            vars(self.loss_scale).update(own)

    def mean(self, value: Tensor) -> Tensor:
        """Average over processes, on all of them."""
        return cast(Tensor, self._accelerator.reduce(value, reduction="mean"))

    def synchronize(self) -> None:
        """Wait until the device has done what was submitted."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    # What follows is all that depends on where parameters, moments and averages are kept.

    def _connect(self, config: EngineConfig, micro_batch_size: int) -> Accelerator:
        return Accelerator(cpu=not torch.cuda.is_available())

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self._optimizer)

    def _create_moments(self) -> None:
        create_moments(self._adamw, self._parameters.values())

    def _pieces(self) -> list[Tensor]:
        """What this process keeps of each parameter."""
        return [parameter.detach() for parameter in self._parameters.values()]

    def _gather(self, piece: Tensor, parameter: nn.Parameter) -> Tensor:
        """The whole of which each process has a piece, as it has of `parameter`."""
        return piece

    def _cut(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """This process's piece of a whole tensor of `parameter`'s shape."""
        return whole

    def _gather_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return cast(Tensor, self._adamw.state[parameter][key])

    def _load_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        parameter.copy_(whole)

    def _load_moment(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        self._adamw.state[parameter][key].copy_(whole)

    def _set_num_updates(self, count: float) -> None:
        for state in self._adamw.state.values():
            state["step"].fill_(count)

    def _gather_named(self, prefix: str, pieces: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        for (name, parameter), piece in zip(self._parameters.items(), pieces, strict=True):
            yield f"{prefix}{name}", self._gather(piece, parameter)


def ema_name(ema_decay: float) -> str:
    """`ema0.9999`, which opens the names of an average's tensors."""
    return f"ema{ema_decay}"
