"""How the blocks are computed: autocast, compiled, with activations kept or computed again."""

import os
import shutil
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ifvit.errors import UserError
from ifvit.models.layers import Block
from ifvit.training.config import EngineConfig

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_forward(backbone: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Change the forward pass of `backbone` in place; parameters and their names stay.

    Raises UserError when this machine cannot compile.
    """
    blocks = [module for module in backbone.modules() if isinstance(module, Block)]
    for block in blocks:
        if config.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if config.compile:
            _require_compiler(device)
            block.compile()
    if config.precision in _AUTOCAST:
        # Inside the module, where DeepSpeed leaves autocast alone: the same arithmetic everywhere.
        autocast = torch.autocast(device.type, _AUTOCAST[config.precision])
        backbone.forward = autocast(backbone.forward)


def _require_compiler(device: torch.device) -> None:
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"engine.compile: torch.compile on the CPU needs {compiler}, which is not on PATH; "
            "install it or set engine.compile to false"
        )
