"""One training step on this hardware, and the state that it works on."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.training.config import EngineConfig, OptimConfig
from ifvit.training.ema import EMA
from ifvit.training.forward import prepare_forward
from ifvit.training.loss_scale import LossScale
from ifvit.training.optim import MOMENTS, build_optimizer, create_moments
from ifvit.training.timing import PhaseTimer


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

    def denoise(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The backbone in the recipe's precision; shapes as in `ifvit.diffusion.objective`."""
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

        A gradient that is not finite changes nothing, on any process; see `refused_updates`.
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

    def refused_updates(self, *, wait: bool) -> int:
        """Updates refused since the last call because their gradient was not finite.

        Where the recipe tolerates none, the first one freezes the parameters on the device. So
        the host need not look after every step; it learns of it when it can `wait` for the device.
        """
        if self._freezes and wait:
            self._refused = int(self._frozen_steps.item())
            self._frozen_steps.zero_()
        count, self._refused = self._refused, 0
        return count

    def update_averages(self) -> None:
        """Move every average towards the parameters, unless the update was refused."""
        if self._update_applied:
            for average in self._averages.values():
                average.update(self._pieces())

    def whole_backbone(self, ema_decay: float | None) -> Backbone:
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
            yield from self._gather_named(f"{average_name(decay)}.", average.shadows)

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
                shadow.copy_(self._cut(read(f"{average_name(decay)}.{name}"), parameter))

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


def engine_class(config: EngineConfig) -> type[Engine]:
    """The engine that `config` asks for on this hardware.

    Raises UserError when it asks DeepSpeed's help of PyTorch alone.
    """
    # One process has nothing to partition, and ZeRO would cost it a copy and a wait every step.
    is_of_use = World.from_environment().size > 1 or config.offload_optimizer
    if config.backend == "deepspeed" or (
        config.backend == "auto" and config.zero_stage and is_of_use
    ):
        from ifvit.training.zero import Zero3Engine, ZeroEngine  # takes seconds to import

        return ZeroEngine if config.zero_stage < 3 else Zero3Engine
    if config.offload_optimizer:
        raise UserError("engine.offload_optimizer: needs DeepSpeed; set engine.backend: deepspeed")
    return Engine


def average_name(ema_decay: float) -> str:
    """`ema0.9999`, which opens the names of an average's tensors."""
    return f"ema{ema_decay}"
