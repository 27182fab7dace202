"""How the blocks are computed: autocast, compiled, with activations kept or computed again."""

import os
import shutil
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from ifvit.diffusion.objective import NormalDraw
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.randomness import normal
from ifvit.training.config import EngineConfig

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


def prepare_draws(config: EngineConfig) -> NormalDraw:
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
