"""Forward, backward, optimizer step and EMA on this hardware, and the state that they change.

`train` builds an engine, the loop drives it, and checkpoints read and restore its state.
`ifvit.training.zero` holds the engines that partition this state among processes.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ifvit.conditions import Condition
from ifvit.diffusion.objectives import NormalSampler
from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.weights import describe_backbone
from ifvit.records import NonNegativeInt, PositiveFloat, record
from ifvit.rng import normal
from ifvit.training.config import EngineConfig, TrainConfig
from ifvit.training.optimizers import build_optimizers, create_moments, learning_rate, state_names
from ifvit.training.profiling import StepTimer


class EMA:
    """Exponential moving average: ema = decay * ema + (1 - decay) * parameter at every update.

    It starts as a copy of the parameters and is always fp32: at decay 0.9999, bf16 would round
    every update away.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = [parameter.detach().float().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Move the EMA weights towards the parameters, all tensors in one pass."""
        torch._foreach_lerp_(self.tensors, list(parameters), 1.0 - self.decay)


def weights_prefix(ema_decay: float | None) -> str:
    """Prefix of the names of weights in the state: `backbone.` for None, else `ema0.9999.`."""
    return "backbone." if ema_decay is None else f"ema{ema_decay}."


GROWTH_INTERVAL = 2000
"""Number of consecutive finite updates after which the loss scale doubles."""


@record
class LossScale:
    """Factor on the loss that keeps fp16 gradients from underflow (Micikevicius et al. 2018, 3.2).

    A gradient that overflows halves the factor, down to 1.
    """

    value: PositiveFloat = 2.0**16
    finite_updates: NonNegativeInt = 0
    """Number of finite updates since the last change of the scale."""
    overflows: NonNegativeInt = 0
    """Number of updates that were lost because the scale was too large."""

    def adapt(self, finite: bool) -> "LossScale":
        """Return the scale after one more gradient, which was finite or not."""
        if not finite:
            smaller, overflows = max(self.value / 2, 1.0), self.overflows + 1
            return replace(self, value=smaller, finite_updates=0, overflows=overflows)
        if self.finite_updates + 1 == GROWTH_INTERVAL:
            return replace(self, value=2 * self.value, finite_updates=0)
        return replace(self, finite_updates=self.finite_updates + 1)


@record
class EngineScalars:
    """State of an engine besides tensors; equal on all processes."""

    num_updates: NonNegativeInt
    """Number of updates of the parameters, for AdamW's bias correction."""
    loss_scale: LossScale | None = None
    """None when the precision does not need one."""


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_forward(backbone: Backbone, config: EngineConfig, device: torch.device) -> None:
    """Set up precision, compilation and recomputation of `backbone`, in place.

    The parameters and their names stay the same. Raises UserError when this machine does not
    allow what `config` asks for.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and config.precision == "fp32" and config.attention in ("flash", "cudnn"):
        raise UserError(
            f"engine.attention: {config.attention} needs a 16-bit type on a GPU; set "
            "engine.precision to bf16 or engine.attention to sdpa"
        )
    compiler = os.environ.get("CXX", "g++")
    if config.compile and not on_gpu and shutil.which(compiler) is None:
        raise UserError(
            f"engine.compile: torch.compile on the CPU needs {compiler}, which is not on PATH; "
            "install it or set engine.compile to false"
        )
    for block in backbone.parts():
        if config.compile:
            # Static: the blocks see two or three shapes, and kernels made for each are faster.
            # Before `checkpoint`, because torch.compile skips a forward that begins with it.
            block.forward = torch.compile(block.forward, dynamic=False)
        if config.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if config.precision in _AUTOCAST:
        # Autocast lies inside the module, so that DeepSpeed computes the same as plain PyTorch.
        autocast = torch.autocast(device.type, _AUTOCAST[config.precision])
        backbone.forward = autocast(backbone.forward)  # type: ignore[method-assign]


def choose_normal_sampler(config: EngineConfig) -> NormalSampler:
    """The function that samples noise for the objective; compiled, it is a single kernel."""
    return torch.compile(normal) if config.compile else normal


class Engine:
    """Trains one backbone on one process, or on several with PyTorch's DDP.

    Parameters, the optimizers' state and EMA weights are fp32 in every precision. Here each process
    holds all of them; the subclasses in `ifvit.training.zero` hold shards. `iter_state` and
    `load_state` exchange full tensors by name, so a run that was saved by one engine continues
    with any other and on any number of processes.

    `initial(name)` returns the first value of one parameter on the CPU. Parameters are filled one
    by one, so that under ZeRO stage 3 no process ever holds the whole model.
    """

    _can_skip_on_device = True
    """Whether the optimizer itself skips an update, without the host looking at the gradient."""

    def __init__(
        self, config: TrainConfig, initial: Callable[[str], Tensor], num_micro_batches: int = 1
    ) -> None:
        self._optim, self._num_micro_batches = config.optim, num_micro_batches
        self._accelerator = self._connect(config.engine)
        self.device: torch.device = self._accelerator.device
        """The device that batches must be on."""
        self.world = World.from_environment()
        self.group = ProcessGroup(self.world, config.engine.timeout)
        """Exchanges small objects among the processes, over the CPU."""
        self.backbone = self._construct(config)
        """The network that is trained; under ZeRO stage 3 its parameters are partitioned."""
        self.backbone.set_attention(config.engine.attention)
        prepare_forward(self.backbone, config.engine, self.device)
        optimizers = build_optimizers(self.backbone, config.optim)
        self._model, *prepared = self._accelerator.prepare(self.backbone, *optimizers)
        # The first is torch's AdamW, or DeepSpeed's ZeRO around it.
        self._optimizers: list[Any] = [wrapped.optimizer for wrapped in prepared]
        self._parameters = dict(self.backbone.named_parameters())
        self._state_names = list(state_names(self.backbone, config.optim))
        self._create_moments()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._load_parameter(parameter, initial(name))
        self.ema_decays = config.ema_decays
        self._emas = {decay: EMA(self._shards(), decay) for decay in config.ema_decays}
        is_half = config.engine.precision == "fp16"
        self.loss_scale: LossScale | None = LossScale() if is_half else None
        """Factor on the loss; None when the precision does not need one."""
        self.timer = StepTimer(self.device)
        self.tolerate_nonfinite = config.tolerate_nonfinite
        """Number of skipped steps that the recipe allows for the whole run."""
        must_look = is_half or config.tolerate_nonfinite > 0
        self._freezes = self._can_skip_on_device and not must_look
        self._frozen_steps = torch.zeros((), device=self.device)
        self._skipped, self._update_applied = 0, True

    def predict(self, x_t: Tensor, timesteps: Tensor, condition: Condition, **options: bool) -> Any:
        """Run the backbone in the recipe's precision, as a TrainedPredictor of the objective."""
        return self._model(x_t, timesteps, condition, **options)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch; processes exchange gradients in the `last` one of a step."""
        if last:
            return nullcontext()
        return cast(AbstractContextManager[None], self._accelerator.no_sync(self._model))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's mean loss."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        (loss * (scale / self._num_micro_batches)).backward()  # type: ignore[no-untyped-call]

    def set_learning_rate(self, step: int, max_steps: int) -> float:
        """Set and return the learning rate of the update that follows `step` finished ones."""
        rate = learning_rate(step, max_steps, self._optim)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rate

    def step(self) -> Tensor:
        """Update the parameters after the last micro-batch => norm of the global gradient, ().

        When the gradient is not finite, every process skips the update; see `skipped_steps`.
        """
        parameters = list(self._parameters.values())
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        if self.loss_scale is not None:
            torch._foreach_div_(gradients, self.loss_scale.value)
        norm = nn.utils.get_total_norm(gradients)
        if self._optim.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._optim.max_grad_norm, norm)
        nonfinite = (~norm.isfinite()).float()
        if self._freezes:
            nonfinite = nonfinite.maximum(self._frozen_steps.sign())
            self._frozen_steps += nonfinite
        else:
            self._count_update(applied=not nonfinite.item())
        for optimizer in self._optimizers:
            optimizer.found_inf = nonfinite  # read on the device, where the update is then skipped
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def _count_update(self, *, applied: bool) -> None:
        """Count a skipped update as a skipped step, unless a smaller loss scale may remedy it."""
        self._update_applied = applied
        if self.loss_scale is not None and (applied or self.loss_scale.value > 1.0):
            self.loss_scale = self.loss_scale.adapt(applied)
        elif not applied:
            self._skipped += 1

    def skipped_steps(self, *, wait: bool) -> int:
        """Number of steps skipped since the last call because their gradient was not finite.

        When the recipe tolerates none, the first such gradient freezes the parameters on the
        device, and the host reads the number of skipped steps only in calls with `wait`, which
        wait for the device.
        """
        if self._freezes and wait:
            self._skipped = int(self._frozen_steps.item())
            self._frozen_steps.zero_()
        num_skipped, self._skipped = self._skipped, 0
        return num_skipped

    def update_ema(self) -> None:
        """Move all EMA weights towards the parameters, unless the step was skipped."""
        if self._update_applied:
            for ema in self._emas.values():
                ema.update(self._shards())

    def iter_weights(self, ema_decay: float | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the EMA weights or, for None, the trained weights, as full fp32 tensors by name.

        All processes iterate together; one that does not keep the tensors holds one at a time.
        Where nothing is partitioned they share memory with the engine: use them before the next
        update, and do not change them.
        """
        shards = self._shards() if ema_decay is None else self._emas[ema_decay].tensors
        for (name, parameter), shard in zip(self._parameters.items(), shards, strict=True):
            yield name, self._gather(shard, parameter)

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all learned state as full fp32 tensors; all processes call this together.

        The names are `backbone.NAME`, `ema0.9999.NAME` for each decay, and the optimizers' state
        as `exp_avg.NAME`, in the same order on every process. Copy a tensor to keep it beyond the
        next update.
        """
        for decay in (None, *self._emas):
            for name, tensor in self.iter_weights(decay):
                yield f"{weights_prefix(decay)}{name}", tensor
        for key, name in self._state_names:
            yield f"{key}.{name}", self._gather_moment(self._parameters[name], key)

    @torch.no_grad()
    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Restore the state that `iter_state` of any engine gave.

        `read(name)` returns a full tensor on the CPU; this process copies only its shard. Raises
        UserError when a tensor has another shape than the parameter.
        """
        described = describe_backbone(self.backbone.config).named_parameters()
        shapes = {name: tensor.shape for name, tensor in described}

        def read_full(prefix: str, name: str) -> Tensor:
            full = read(f"{prefix}{name}")
            if full.shape != shapes[name] or full.dtype != torch.float32:
                raise UserError(
                    f"{prefix}{name}: {full.dtype} {tuple(full.shape)} in the checkpoint, but the "
                    f"backbone has float32 {tuple(shapes[name])}; use the checkpoint of this run"
                )
            return full

        for name, parameter in self._parameters.items():
            self._load_parameter(parameter, read_full(weights_prefix(None), name))
        for key, name in self._state_names:
            self._load_moment(self._parameters[name], key, read_full(f"{key}.", name))
        for decay, ema in self._emas.items():
            for (name, parameter), shard in zip(self._parameters.items(), ema.tensors, strict=True):
                shard.copy_(self._scatter(read_full(weights_prefix(decay), name), parameter))

    def scalars(self) -> EngineScalars:
        """The state besides tensors."""
        num_updates = int(next(iter(self._adamw.state.values()))["step"].item())
        return EngineScalars(num_updates=num_updates, loss_scale=self.loss_scale)

    def load_scalars(self, scalars: EngineScalars) -> None:
        """Restore `scalars()` of any engine; call it after `load_state`."""
        for state in self._adamw.state.values():
            state["step"].fill_(scalars.num_updates)
        if self.loss_scale is not None:
            self.loss_scale = scalars.loss_scale or self.loss_scale

    def mean(self, value: Tensor) -> Tensor:
        """Average over all processes, returned on each of them."""
        return cast(Tensor, self._accelerator.reduce(value, reduction="mean"))

    def synchronize(self) -> None:
        """Wait until the device has finished all submitted work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    # The methods below depend on how the state is partitioned; `ifvit.training.zero` overrides
    # them.

    def _connect(self, config: EngineConfig) -> Accelerator:
        waiting = InitProcessGroupKwargs(timeout=config.timeout)
        return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[waiting])

    def _construct(self, config: TrainConfig) -> Backbone:
        """Build the backbone on the device; its parameters have no values yet."""
        return describe_backbone(config.backbone).to_empty(device=self.device)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self._optimizers[0])

    def _create_moments(self) -> None:
        for group in self._adamw.param_groups:
            create_moments(self._adamw, group["params"])

    def _shards(self) -> list[Tensor]:
        """The shard of each parameter that this process holds."""
        return [parameter.detach() for parameter in self._parameters.values()]

    def _gather(self, shard: Tensor, parameter: nn.Parameter) -> Tensor:
        """The full tensor of which every process holds a shard; `parameter` gives its shape."""
        return shard

    def _scatter(self, full: Tensor, parameter: nn.Parameter) -> Tensor:
        """The shard of this process of a full tensor in the shape of `parameter`."""
        return full

    def _gather_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        (state,) = (one.state[parameter] for one in self._optimizers if parameter in one.state)
        return cast(Tensor, state[key])

    def _load_parameter(self, parameter: nn.Parameter, full: Tensor) -> None:
        parameter.copy_(full)

    def _load_moment(self, parameter: nn.Parameter, key: str, full: Tensor) -> None:
        self._gather_moment(parameter, key).copy_(full)
