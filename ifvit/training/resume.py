"""Where a run continues: its own newest checkpoint, or that of the run from which it branches.

A branch is paired with its parent: the data, captions, noise and timesteps of a step are functions
of (seed, step, position), and a checkpoint holds all else that decides the next steps. So the
branch without a changed field is the parent's own continuation.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ifvit.distributed import ProcessGroup
from ifvit.errors import UserError
from ifvit.models.config import BackboneConfig, restore_config
from ifvit.models.weights import WeightsInfo, describe_backbone
from ifvit.records import shorten
from ifvit.sampling.load import check_text_encoder
from ifvit.training.checkpoint import (
    Checkpoint,
    committed_steps,
    fetch,
    fetch_newest,
    manifest_sha256,
    open_tensors,
    step_url,
)
from ifvit.training.config import MAY_CHANGE, TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.guards import differences, read_recipe
from ifvit.training.loop import TrainState

_LATEST = "@latest"
_OPTIMIZER = "optim.optimizer"
_OF_DRAWS = ("seed", "global_batch_size", "shuffle_window")
"""Fields that change which samples and random numbers the later steps get."""


def settle_branch(config: TrainConfig) -> TrainConfig:
    """Replace `RUN@latest` in `branch` by the step where this run began, or begins now.

    Raises UserError when RUN holds no checkpoint.
    """
    if config.branch is None or not config.branch.endswith(_LATEST):
        return config
    parent, recipe = config.branch.removesuffix(_LATEST), read_recipe(config.run)
    if recipe and recipe.branch and recipe.branch.rpartition("@")[0] == parent:
        return replace(config, branch=recipe.branch)
    return replace(config, branch=f"{parent}@{_steps_of(parent)[-1]}")


def resume(config: TrainConfig, engine: Engine, token: str, info: WeightsInfo) -> TrainState:
    """Load the checkpoint from which the run continues, and return its position.

    All processes call this together. Remote parts are downloaded once per node, into a folder
    named by `token` under TMPDIR. Raises UserError when `branch` names no checkpoint, or when the
    checkpoint has other shards, tensors, target or text encoder than the recipe.
    """
    with _node_cache(engine, token) as cache:
        checkpoint = _choose_checkpoint(config, cache, engine.group)
        if checkpoint is None:
            return TrainState()
        if checkpoint.target not in (None, info.target):
            raise UserError(
                f"{checkpoint.url}: trained to predict {checkpoint.target}, but the recipe says "
                f"{info.target}; set objective.prediction, scaling_factor and shift_factor to match"
            )
        if checkpoint.text_encoder and info.text_encoder:
            trained_with, now = checkpoint.text_encoder, info.text_encoder
            check_text_encoder(f"{checkpoint.url}: text encoder", now, trained_with)
        with open_tensors(checkpoint, cache) as read:
            engine.load_state(read)
        engine.load_scalars(checkpoint.scalars)
        return checkpoint.state


def _choose_checkpoint(config: TrainConfig, cache: Path, group: ProcessGroup) -> Checkpoint | None:
    """Fetch the newest checkpoint of the run, or else that of `branch`; None without either."""
    checkpoint = fetch_newest(config.run, cache, group)
    if checkpoint is None and config.branch is None:
        return None
    if checkpoint is None:
        url = group.on_main(lambda: _check_branch(config))
        checkpoint = fetch(url, cache, group)
    if checkpoint.shards_sha256 != group.on_main(lambda: manifest_sha256(config.shards)):
        raise UserError(
            f"{checkpoint.url}: trained on other shards than {config.shards} holds now; restore "
            "them or train a new run with initial_weights"
        )
    trained = restore_config(checkpoint.backbone, checkpoint.url)
    _check_backbone(checkpoint.url, trained, config.backbone)
    return checkpoint


def _steps_of(parent: str) -> list[int]:
    """Steps of the complete checkpoints of a run. Raises UserError when there are none."""
    steps = committed_steps(parent)
    if not steps:
        raise UserError(f"branch: {parent} holds no checkpoint; name a run that has one")
    return steps


def _check_branch(config: TrainConfig) -> str:
    """Return the URL of the checkpoint that `branch` names; print the fields that differ.

    Raises UserError for a missing step, a run that would end there, another optimizer, and for a
    seed that changes beside other fields, which is taken for a mistake.
    """
    parent, _, number = (config.branch or "").rpartition("@")
    step, steps = int(number), _steps_of(parent)
    if step not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(
            f"branch: {parent} holds no checkpoint of step {step}; take one of {shorten(known)}, "
            "or set keep_every in the recipe of that run and train it again"
        )
    if step >= config.max_steps:
        raise UserError(
            f"branch: {config.branch} leaves nothing to train; set max_steps, which is "
            f"{config.max_steps}, to more than {step}"
        )
    recipe = read_recipe(parent)
    if recipe is None:
        raise UserError(f"{parent}: holds no config.yaml to compare the recipe with; restore it")
    before, now = asdict(recipe), asdict(config)
    keys = [key for key in now if key not in ("run", "branch")]
    changed = [change for key in keys for change in differences(key, before[key], now[key])]
    _check_changes(parent, changed)
    lines = [f"branch of {config.branch}"]
    lines += [f"{name}: {shorten(old)} -> {shorten(new)}" for name, old, new in changed]
    lines += [
        f"another {name} gives later steps other draws than those of the parent"
        for name, _, _ in changed
        if name in _OF_DRAWS
    ]
    sys.stderr.writelines(f"{config.run}: {line}\n" for line in lines)
    return step_url(parent, step)


def _check_changes(branch: str, changed: Sequence[tuple[str, Any, Any]]) -> None:
    values = {name: (old, new) for name, old, new in changed}
    if _OPTIMIZER in values:
        old, new = values[_OPTIMIZER]
        raise UserError(
            f"{branch}: holds the state of {_OPTIMIZER}: {old}, but the recipe says {new}; "
            "restore that value, or train a new run with initial_weights instead of branch"
        )
    others = [n for n in values if n != "seed" and n.partition(".")[0] not in MAY_CHANGE]
    if "seed" in values and others:
        old, new = values["seed"]
        raise UserError(
            f"{branch}: trained with seed: {old}, but the recipe says {new} beside other values of "
            f"{shorten(', '.join(others))}; set seed: {old}, so that both have the same draws"
        )


def _check_backbone(url: str, trained: BackboneConfig, wanted: BackboneConfig) -> None:
    """Raise UserError unless both backbones have parameters of the same names and shapes."""
    if trained == wanted:
        return
    first, second = (
        {name: tensor.shape for name, tensor in describe_backbone(config).named_parameters()}
        for config in (trained, wanted)
    )
    if first != second:
        changed = differences("backbone", asdict(trained), asdict(wanted))
        fields = ", ".join(f"{name}: {old} (recipe: {new})" for name, old, new in changed)
        raise UserError(
            f"{url}: has a backbone of other parameters than the recipe, with "
            f"{shorten(fields, 300)}; restore these values or train a new run without branch"
        )


@contextmanager
def _node_cache(engine: Engine, token: str) -> Iterator[Path]:
    """A folder that the processes of one node share; it is removed when all have left it."""
    folder = Path(tempfile.gettempdir(), f"ifvit-{token}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
    try:
        yield folder
        engine.barrier()
    finally:
        if engine.world.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
