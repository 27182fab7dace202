"""The verb `train`: a recipe => objects => the loop. Wiring only."""

import hashlib
import sys
from contextlib import nullcontext

import torch

from ifvit.config import dump_config
from ifvit.diffusion.objective import NoisePrediction
from ifvit.diffusion.schedule import NoiseSchedule
from ifvit.distributed import World
from ifvit.models.backbone import Backbone
from ifvit.models.weights import WeightsInfo
from ifvit.shards import ShardReader
from ifvit.side_channel import SideChannel
from ifvit.training.batches import Batches
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine, engine_class
from ifvit.training.forward import prepare_draws
from ifvit.training.hooks import SampleGrid, SaveCheckpoint
from ifvit.training.initial import initial_backbone
from ifvit.training.lease import Lease
from ifvit.training.loop import Hook, fit
from ifvit.training.metrics_log import MetricsLog
from ifvit.training.order import BatchOrder
from ifvit.training.preflight import (
    check_encoders,
    check_recipe,
    check_shapes,
    claim_space,
    manifest_sha256,
)
from ifvit.training.profile import StepProfiler
from ifvit.training.resume import resume
from ifvit.training.state import TrainState
from ifvit.training.stop import Preempted, StopRequest


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
    channel = SideChannel(engine.world)
    lease = channel.on_main(lambda: Lease.acquire(config.run))
    with lease.held() if engine.world.is_main else nullcontext():
        return _train(config, reader, batches, engine, channel, lease)


def _train(
    config: TrainConfig,
    reader: ShardReader,
    batches: Batches,
    engine: Engine,
    channel: SideChannel,
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
        draw=prepare_draws(config.engine),
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
    engine = engine_class(config.engine)(
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
