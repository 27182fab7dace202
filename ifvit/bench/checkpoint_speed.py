"""The verb `bench checkpoint`: how long saves stop the training loop, and how they slow it down."""

import tempfile
from dataclasses import replace
from functools import partial

from ifvit.bench.config import BenchCheckpointConfig, BenchTrainConfig
from ifvit.bench.measurement import print_result, seconds_on
from ifvit.bench.training_speed import build_recipe
from ifvit.errors import UserError
from ifvit.models.presets import PRESETS
from ifvit.models.weights import WeightsInfo
from ifvit.shards.format import MANIFEST, EncoderIdentity, TextEncoderIdentity
from ifvit.storage import file_size, join, list_names, write_bytes, write_json
from ifvit.studies.step_time import EngineSteps
from ifvit.training.checkpoint import step_url
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.guards import StopRequest
from ifvit.training.lease import Lease
from ifvit.training.loop import TrainState
from ifvit.training.metrics_log import MetricsLog
from ifvit.training.profiling import device_name
from ifvit.training.saving import SaveCheckpoint


def bench_checkpoint(config: BenchCheckpointConfig) -> None:
    """Train the small preset on noise, first without and then with saves, and print the cost.

    `stall_share` is the fraction of wall time in which the loop waits for a save. `slowdown` is the
    relative increase of the remaining time, because the saving threads share the machine.
    `last_save_seconds` is the time that the end of a run waits for the last save.
    """
    if config.run and list_names(config.run):
        raise UserError(f"{config.run}: not empty; the benchmark writes to an empty folder only")
    with tempfile.TemporaryDirectory() as folder:
        recipe = _build_recipe(config.run or folder, config)
        training = EngineSteps(recipe)
        device = training.engine.device
        training(1)  # the first step also allocates the optimizer state
        quiet = seconds_on(device, partial(training, config.num_steps))
        training.state = TrainState()
        lease = Lease.acquire(recipe.run)
        hook = _build_hook(recipe, training.engine, lease)
        with lease.held(), hook.open():
            wall = seconds_on(device, partial(training, config.num_steps, [hook]))
            last_save = seconds_on(device, hook.wait)
        stall = training.engine.timer.take()[hook.name]
        url = step_url(recipe.run, config.num_steps)
        num_bytes = sum(file_size(join(url, name)) or 0 for name in list_names(url))
    result = {
        "stall_share": stall / wall,
        "slowdown": (wall - stall) / quiet - 1,
        "stall_seconds_per_save": stall / (config.num_steps // config.every),
        "last_save_seconds": last_save,
        "step_seconds": quiet / config.num_steps,
        "gigabytes": num_bytes / 1e9,
        "every": config.every,
        "device": device_name(device),
    }
    print_result(result, config.json)


def _build_recipe(run: str, config: BenchCheckpointConfig) -> TrainConfig:
    recipe = build_recipe(PRESETS["small"], BenchTrainConfig(batch_size=config.batch_size))
    return replace(recipe, run=run, shards=run, checkpoint_every=config.every)


def _build_hook(recipe: TrainConfig, engine: Engine, lease: Lease) -> SaveCheckpoint:
    # Saving a checkpoint reads the manifest of the shards and uploads the metrics log.
    write_json(join(recipe.run, MANIFEST), {})
    write_bytes(join(recipe.run, "metrics.jsonl"), b"")
    encoder = EncoderIdentity(name="none", sha256="0" * 64)
    info = WeightsInfo(
        step=0,
        ema_decay=None,
        scaling_factor=1.0,
        vae=encoder,
        text_encoder=TextEncoderIdentity(name="none", sha256="0" * 64),
        recipe_sha256="0" * 64,
    )
    metrics, stop = MetricsLog(recipe, engine), StopRequest(engine.world)
    return SaveCheckpoint(recipe, engine, info, lease, metrics, stop)
