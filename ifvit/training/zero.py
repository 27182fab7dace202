"""The engine on DeepSpeed's ZeRO: the only file that knows DeepSpeed.

What it does not document is used in the two `_create_moments`: DeepSpeed makes AdamW's state at the
first step and only then links it to the parameters, but a resumed run has state before that.
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
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, distributed, nn

from ifvit.training.config import EngineConfig
from ifvit.training.engine import Engine, create_moments


class ZeroEngine(Engine):
    """Partitions the moments (ZeRO stage 1) and the gradients (stage 2); parameters stay whole."""

    _may_freeze = False

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Around each micro-batch; tells DeepSpeed which one is the last."""
        self._zero.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch's mean loss; DeepSpeed scales it."""
        if self.loss_scale is not None:
            self._optimizer.override_loss_scale(self.loss_scale.value)
        self._zero.backward(loss)

    def step(self) -> Tensor:
        """Update the parameters after the last micro-batch => global gradient norm, ().

        DeepSpeed looks at the norm on the host and refuses the update if it is not finite.
        """
        self._zero.step()
        applied = self._zero.was_step_applied()
        self._settle(finite=applied)
        norm = self._zero.get_global_grad_norm() if applied else torch.inf
        return torch.as_tensor(norm, dtype=torch.float32)

    @property
    def _zero(self) -> Any:
        return self._model

    def _connect(self, config: EngineConfig, micro_batch_size: int) -> Accelerator:
        """An Accelerator on DeepSpeed, with NCCL on CUDA and gloo elsewhere."""
        # Or they bury the progress line; DeepSpeed calls collectives by names that torch renames.
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed compiles its CPU communication with ninja, which lies beside the interpreter.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        # Without a launcher, this process is a world of one; DeepSpeed wants that spelled out.
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (*alone.items(), ("MASTER_PORT", str(get_free_port()))):
            os.environ.setdefault(name, value)
        return Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._settings(config, micro_batch_size)),
            gradient_accumulation_steps=self._num_micro_batches,
            kwargs_handlers=[
                InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")
            ],
        )

    def _settings(self, config: EngineConfig, micro_batch_size: int) -> dict[str, Any]:
        """DeepSpeed's configuration, derived from the recipe and written nowhere else."""
        partitioning: dict[str, Any] = {"stage": config.zero_stage}
        if config.offload_optimizer:
            pinned = torch.cuda.is_available()
            partitioning["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        return {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": self._num_micro_batches,
            "gradient_clipping": self._max_grad_norm or 0.0,
            "zero_optimization": partitioning,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW everywhere, and no compilation
            "steps_per_print": sys.maxsize,
        }

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self._optimizer.optimizer)

    def _create_moments(self) -> None:
        create_moments(self._adamw, self._optimizer.single_partition_of_fp32_groups)
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def _gather_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return cast(Tensor, safe_get_full_optimizer_state(parameter, key))

    def _load_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        parameter.copy_(whole)
        safe_set_full_fp32_param(parameter, whole)

    def _load_moment(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        safe_set_full_optimizer_state(parameter, whole, key)


class Zero3Engine(ZeroEngine):
    """Partitions the parameters too (ZeRO stage 3), and with them the averages."""

    def _create_moments(self) -> None:
        create_moments(self._adamw, self._optimizer.fp32_partitioned_groups_flat)

    def _pieces(self) -> list[Tensor]:
        return [cast(Any, parameter).ds_tensor for parameter in self._parameters.values()]

    def _gather(self, piece: Tensor, parameter: nn.Parameter) -> Tensor:
        """Pieces of equal size, the last one padded => a tensor of `parameter`'s shape."""
        shape = cast(Any, parameter).ds_shape
        whole = piece.new_empty(self.world.size * piece.numel())
        distributed.all_gather_into_tensor(whole, piece)
        return whole[: shape.numel()].view(shape)

    def _cut(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        size = cast(Any, parameter).ds_tensor.numel()
        piece = whole.flatten()[self.world.rank * size :][:size]
        return nn.functional.pad(piece, (0, size - piece.numel()))

    def _gather_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self._gather(safe_get_local_optimizer_state(parameter, key), parameter)

    def _load_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        piece, partitioned = self._cut(whole, parameter), cast(Any, parameter)
        safe_set_local_fp32_param(parameter, piece)
        partitioned.ds_tensor.copy_(piece)
        partitioned.partition()  # drops the old whole of a parameter that DeepSpeed keeps gathered

    def _load_moment(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        safe_set_local_optimizer_state(parameter, self._cut(whole, parameter), key)
