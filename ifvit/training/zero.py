"""Engines on DeepSpeed's ZeRO; `train` chooses one. No other file knows DeepSpeed.

The two `_create_moments` use what DeepSpeed does not document: it creates AdamW's state at the
first step and only then links it to the parameters, but a resumed run has state before that step.
"""

import logging
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from accelerate.utils.other import get_free_port
from deepspeed import zero
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, distributed, nn

from ifvit.models.backbone import Backbone
from ifvit.models.weights import construct_backbone
from ifvit.training.config import EngineConfig, TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.optimizers import create_moments


class ZeroEngine(Engine):
    """Partitions the moments (ZeRO stage 1) and the gradients (stage 2), but not the parameters."""

    _can_skip_on_device = False

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of each micro-batch; DeepSpeed exchanges gradients in the `last` of a step."""
        self._model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's mean loss; DeepSpeed applies the scale."""
        if self.loss_scale is not None:
            self._optimizers[0].override_loss_scale(self.loss_scale.value)
        self._model.backward(loss)

    def step(self) -> Tensor:
        """Update the parameters after the last micro-batch => norm of the global gradient, ().

        DeepSpeed reads the norm on the host and skips the update if it is not finite.
        """
        self._model.step()
        applied = self._model.was_step_applied()
        self._count_update(applied=applied)
        norm = self._model.get_global_grad_norm() if applied else torch.inf
        return torch.as_tensor(norm, dtype=torch.float32)

    def _connect(self, config: EngineConfig) -> Accelerator:
        """Build an Accelerator on DeepSpeed, with NCCL on CUDA and gloo elsewhere."""
        # These messages would bury the progress line.
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed compiles its CPU communication with ninja, which lies beside the interpreter.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        # Without a launcher, DeepSpeed still reads these variables; they describe one process.
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (*alone.items(), ("MASTER_PORT", str(get_free_port()))):
            os.environ.setdefault(name, value)
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._deepspeed_config(config)),
            gradient_accumulation_steps=self._num_micro_batches,
            kwargs_handlers=[
                InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo", timeout=config.timeout)
            ],
        )
        # Otherwise transformers loads every text encoder without its weights under stage 3.
        accelerator.state.deepspeed_plugin.dschf = None
        return accelerator

    def _deepspeed_config(self, config: EngineConfig) -> dict[str, Any]:
        partitioning: dict[str, Any] = {"stage": config.zero_stage}
        if config.offload_optimizer:
            pinned = torch.cuda.is_available()
            partitioning["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        return {
            "train_micro_batch_size_per_gpu": 1,  # required, but used only to report throughput
            "gradient_accumulation_steps": self._num_micro_batches,
            "gradient_clipping": self._optim.max_grad_norm or 0.0,
            "zero_optimization": partitioning,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW everywhere, and no compilation
            "steps_per_print": sys.maxsize,
        }

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self._optimizers[0].optimizer)

    def _create_moments(self) -> None:
        create_moments(self._adamw, self._optimizers[0].single_partition_of_fp32_groups)
        self._optimizers[0]._lazy_init_hp_params_optimizer_state()

    def _gather_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return cast(Tensor, safe_get_full_optimizer_state(parameter, key))

    def _load_parameter(self, parameter: nn.Parameter, full: Tensor) -> None:
        parameter.copy_(full)
        safe_set_full_fp32_param(parameter, full)

    def _load_moment(self, parameter: nn.Parameter, key: str, full: Tensor) -> None:
        safe_set_full_optimizer_state(parameter, full, key)


class Zero3Engine(ZeroEngine):
    """Partitions the parameters (ZeRO stage 3) and the EMA weights too."""

    def _construct(self, config: TrainConfig) -> Backbone:
        """Build the backbone; each parameter is partitioned as soon as it exists."""
        with zero.Init(config_dict_or_path=self._deepspeed_config(config.engine)):
            return construct_backbone(config.backbone)

    def _create_moments(self) -> None:
        create_moments(self._adamw, self._optimizers[0].fp32_partitioned_groups_flat)

    def _shards(self) -> list[Tensor]:
        return [cast(Any, parameter).ds_tensor for parameter in self._parameters.values()]

    def _gather(self, shard: Tensor, parameter: nn.Parameter) -> Tensor:
        """Join the shards, which have equal sizes because the last one is padded."""
        shape = cast(Any, parameter).ds_shape
        full = shard.new_empty(self.world.size * shard.numel())
        distributed.all_gather_into_tensor(full, shard)
        return full[: shape.numel()].view(shape)

    def _scatter(self, full: Tensor, parameter: nn.Parameter) -> Tensor:
        size = cast(Any, parameter).ds_tensor.numel()
        shard = full.flatten()[self.world.rank * size :][:size]
        return nn.functional.pad(shard, (0, size - shard.numel()))

    def _gather_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self._gather(safe_get_local_optimizer_state(parameter, key), parameter)

    def _load_parameter(self, parameter: nn.Parameter, full: Tensor) -> None:
        shard, partitioned = self._scatter(full, parameter), cast(Any, parameter)
        safe_set_local_fp32_param(parameter, shard)
        partitioned.ds_tensor.copy_(shard)
        partitioned.partition()  # drops the old tensor of a parameter that DeepSpeed keeps gathered

    def _load_moment(self, parameter: nn.Parameter, key: str, full: Tensor) -> None:
        safe_set_local_optimizer_state(parameter, self._scatter(full, parameter), key)
