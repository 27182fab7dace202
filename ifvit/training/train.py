"""The verb `train`: a recipe => objects => the loop. Wiring only."""

import hashlib
import sys
from contextlib import nullcontext
from dataclasses import asdict

import torch

from ifvit.config import dump_config
from ifvit.diffusion.objectives import NoisePrediction
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.weights import WeightsInfo, build_backbone, load_weights
from ifvit.shards import ShardReader
from ifvit.training.checkpoint import resume, saved_steps
from ifvit.training.config import EngineConfig, TrainConfig
from ifvit.training.data import Batches, BatchOrder
from ifvit.training.engine import Engine, prepare_draws
from ifvit.training.guards import (
    Preempted,
    StopRequest,
    check_encoders,
    check_recipe,
    check_shapes,
    claim_space,
    differences,
    manifest_sha256,
)
from ifvit.training.hooks import SampleGrid, SaveCheckpoint
from ifvit.training.lease import Lease
from ifvit.training.loop import Hook, fit
from ifvit.training.metrics_log import MetricsLog
from ifvit.training.state import TrainState
from ifvit.training.timing import StepProfiler


def initial_backbone(config: TrainConfig, reader: ShardReader) -> Backbone:
    """The backbone of step 0; a run that has checkpoints does not need `initial_weights` again.

    Raises UserError for weights of another shape, or for latents of another scale.
    """
    backbone = build_backbone(config.backbone)
    if config.initial_weights is None or saved_steps(config.run):
        return backbone
    loaded, info = load_weights(config.initial_weights)
    scale = config.scaling_factor or reader.manifest.scaling_factor
    theirs = {"backbone": asdict(loaded.config), "scaling_factor": info.scaling_factor}
    ours = {"backbone": asdict(config.backbone), "scaling_factor": scale}
    for key, value in ours.items():
        for name, there, here in differences(key, theirs[key], value):
            raise UserError(
                f"{config.initial_weights}: has {name}: {there}, the recipe {here}; set it alike"
            )
    backbone.load_state_dict(loaded.state_dict())
    return backbone


def train(config: TrainConfig) -> TrainState:
    """Train, or go on training, the run of `config.run` until `max_steps`.

    Raises UserError when recipe, shards and run directory do not fit together, and Preempted when a
    signal ended it before.
    """
    reader = ShardReader(config.shards, config.cache)
    check_shapes(reader, config)
    check_encoders(reader, config)
    torch.manual_seed(config.seed)  # for the initial weights; nothing else draws from it
    backbone = initial_backbone(config, reader)
    backbone.set_attention(config.engine.attention)
    batches, engine = _build_engine(config, reader, backbone)
    channel = ProcessGroup(engine.world)
    lease = channel.on_main(lambda: Lease.acquire(config.run))
    with lease.held() if engine.world.is_main else nullcontext():
        return _train(config, reader, batches, engine, channel, lease)


def _train(
    config: TrainConfig,
    reader: ShardReader,
    batches: Batches,
    engine: Engine,
    channel: ProcessGroup,
    lease: Lease,
) -> TrainState:
    """The same once the run directory is ours."""
    channel.on_main(lambda: check_recipe(config))
    shards_sha256 = manifest_sha256(config.shards)
    state = resume(config, engine, channel, shards_sha256, lease.token)
    info = _weights_info(config, reader)
    objective = NoisePrediction(
        schedule=NoiseSchedule(engine.device),
        scaling_factor=info.scaling_factor,
        seed=config.seed,
        min_snr_gamma=config.min_snr_gamma,
        sample_normal=prepare_draws(config.engine),
    )
    metrics = MetricsLog(config, engine)
    stop = StopRequest(engine.world)
    checkpoints = SaveCheckpoint(
        config, engine, channel, lease, info, shards_sha256, metrics.publish, stop.request
    )
    hooks: list[Hook] = [metrics, checkpoints]
    if config.sample_grid.every:
        hooks.append(SampleGrid(config, engine, info))
    channel.on_main(lambda: claim_space(config))
    profiler = StepProfiler(config.run, engine.world, enabled=config.profile)
    try:
        with stop.listen(), checkpoints.saver.open(), metrics.open(state), profiler.open():
            return fit(state, batches, objective, engine, hooks, config, stop, profiler)
    except Preempted as preempted:
        if engine.world.is_main:
            sys.stderr.write(f"{preempted.message}\n")
        raise


def _build_engine(
    config: TrainConfig, reader: ShardReader, backbone: Backbone
) -> tuple[Batches, Engine]:
    order = BatchOrder(
        shard_sizes=reader.shard_sizes,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        shuffle_window=config.shuffle_window,
        random_flip=config.random_flip,
    )
    world = World.from_environment()
    batches = Batches(reader, order, config.micro_batch_size, world, config.num_workers)
    engine = _engine_class(config.engine)(
        backbone,
        config.engine,
        config.optim,
        ema_decays=config.ema_decays,
        micro_batch_size=config.micro_batch_size,
        num_micro_batches=batches.num_micro_batches,
        tolerate_nonfinite=config.tolerate_nonfinite > 0,
    )
    return batches, engine


def _weights_info(config: TrainConfig, reader: ShardReader) -> WeightsInfo:
    text = reader.manifest.text
    return WeightsInfo(
        step=0,
        ema_decay=None,
        scaling_factor=config.scaling_factor or reader.manifest.scaling_factor,
        vae=reader.manifest.vae,
        text_encoder=text.encoder if text else None,
        classes=reader.manifest.classes,
        recipe_sha256=hashlib.sha256(dump_config(config).encode()).hexdigest(),
    )


def _engine_class(config: EngineConfig) -> type[Engine]:
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
