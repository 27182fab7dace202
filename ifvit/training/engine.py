"""One training step on this hardware: the only file that knows accelerate and DeepSpeed."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from ifvit.distributed import World
from ifvit.training.config import EngineConfig, OptimConfig
from ifvit.training.optim import build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors, one of each for every parameter and of its shape."""

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165.2e12}
"""Dense bf16 tensor-core FLOP/s from the vendors' data sheets, by a part of the device's name."""


class Engine:
    """Forward, backward and update of one backbone, on one process or many.

    Parameters stay fp32 and whole on every process; DeepSpeed partitions the optimizer state
    (ZeRO stage 1) and the gradients (stage 2).
    """

    def __init__(
        self,
        backbone: nn.Module,
        config: EngineConfig,
        optim: OptimConfig,
        *,
        micro_batch_size: int,
        num_micro_batches: int,
    ) -> None:
        self._deepspeed = _use_deepspeed(config)
        if self._deepspeed:
            settings = _deepspeed_settings(config, optim, micro_batch_size, num_micro_batches)
            self._accelerator = _deepspeed_accelerator(settings, num_micro_batches)
        else:
            self._accelerator = Accelerator(
                gradient_accumulation_steps=num_micro_batches,
                cpu=not torch.cuda.is_available(),
            )
        # DeepSpeed autocasts by itself, see its settings.
        self._autocasts = config.precision == "bf16" and not self._deepspeed
        self._max_grad_norm = optim.max_grad_norm
        self.backbone = backbone.to(self.device)
        optimizer = build_optimizer(backbone.parameters(), optim)
        prepared = self._accelerator.prepare(backbone, optimizer)
        self._model: nn.Module = prepared[0]
        self._optimizer: Any = prepared[1].optimizer  # torch's AdamW or DeepSpeed's ZeRO wrapper

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return cast(torch.device, self._accelerator.device)

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of all processes' devices together, None for unknown devices."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        peaks = [peak for key, peak in PEAK_FLOPS.items() if key in name]
        return peaks[0] * self.world.size if peaks else None

    @property
    def world(self) -> World:
        """This process among all."""
        accelerator = self._accelerator
        return World(
            rank=accelerator.process_index,
            size=accelerator.num_processes,
            local_rank=accelerator.local_process_index,
        )

    def denoise(self, x_t: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The backbone in the recipe's precision: (B, C, H, W), (B,), (B, M, D) => (B, C, H, W)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocasts):
            return cast(Tensor, self._model(x_t, timesteps, context))

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Around each micro-batch; gradients are exchanged at the last one of a step only."""
        with self._accelerator.accumulate(self._model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's mean loss; DeepSpeed also updates at the last."""
        self._accelerator.backward(loss)

    def set_learning_rate(self, rate: float) -> None:
        """Rate of the coming update; set before the step's last backward pass."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def step(self) -> Tensor:
        """Update the parameters after the last micro-batch => global gradient norm, ()."""
        if self._deepspeed:
            # accelerator.backward has clipped and stepped already.
            norm = cast(Any, self._model).get_global_grad_norm()
            return torch.as_tensor(norm, dtype=torch.float32)
        parameters = self.backbone.parameters()
        if self._max_grad_norm is not None:
            norm = self._accelerator.clip_grad_norm_(parameters, self._max_grad_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._optimizer.step()
        self._optimizer.zero_grad()
        return cast(Tensor, norm).detach()

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

    def optimizer_state(self) -> dict[str, Tensor]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME`, fp32, of every parameter, whole; collective.

        Empty before the first update.
        """
        state: dict[str, Tensor] = {}
        for name, parameter in self.backbone.named_parameters():
            for key in MOMENTS:
                value = self._moment(parameter, key)
                if value is not None:
                    state[f"{key}.{name}"] = value
        return state

    def load_optimizer_state(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Continue from `optimizer_state()` of any backend and number of processes."""
        if self._deepspeed:
            self._create_partitioned_state(num_updates)
        for name, parameter in self.backbone.named_parameters():
            moments = {key: state[f"{key}.{name}"] for key in MOMENTS}
            if self._deepspeed:
                from deepspeed.utils import safe_set_full_optimizer_state

                for key, value in moments.items():
                    safe_set_full_optimizer_state(parameter, value.to(self.device), key)
            else:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(num_updates), device=self.device),
                    **{key: value.to(self.device) for key, value in moments.items()},
                }

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        if not self._deepspeed:
            value = self._optimizer.state[parameter].get(key)
            return None if value is None else cast(Tensor, value)
        from deepspeed.utils import safe_get_full_optimizer_state

        return cast(Tensor | None, safe_get_full_optimizer_state(parameter, key))

    def _create_partitioned_state(self, num_updates: int) -> None:
        """Give DeepSpeed's flat partitions AdamW state, which it makes at the first step only."""
        inner = self._optimizer.optimizer
        for partition in self._optimizer.single_partition_of_fp32_groups:
            inner.state[partition] = {
                "step": torch.tensor(float(num_updates), device=self.device),
                **{key: torch.zeros_like(partition) for key in MOMENTS},
            }
        self._optimizer._lazy_init_hp_params_optimizer_state()


def _use_deepspeed(config: EngineConfig) -> bool:
    if config.backend == "auto":
        return torch.cuda.is_available() or World.from_environment().size > 1
    return config.backend == "deepspeed"


def _deepspeed_settings(
    config: EngineConfig, optim: OptimConfig, micro_batch_size: int, num_micro_batches: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from the recipe and written nowhere else."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": optim.max_grad_norm or 0.0,
        "zero_optimization": {"stage": config.zero_stage},
        # Autocast with fp32 parameters, the same arithmetic as the plain engine's.
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": sys.maxsize,
    }


def _deepspeed_accelerator(settings: dict[str, Any], num_micro_batches: int) -> Accelerator:
    """An Accelerator on DeepSpeed, with NCCL on CUDA and gloo elsewhere."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # or it buries the progress line
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed compiles its CPU communication with ninja, which lies beside the interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Started without a launcher, this process is a world of one; DeepSpeed wants that spelled out.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (*alone.items(), ("MASTER_PORT", str(_free_port()))):
        os.environ.setdefault(name, value)
    return Accelerator(
        gradient_accumulation_steps=num_micro_batches,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")
        ],
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
