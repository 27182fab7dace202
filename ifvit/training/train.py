"""The verb `train`: build the objects that a recipe describes, and start the loop."""

import hashlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor

from ifvit import storage
from ifvit.config import dump_config
from ifvit.diffusion.config import LatentScaling
from ifvit.diffusion.objectives import Objective
from ifvit.distributed import World, choose_device, one_line_for_lost_processes
from ifvit.errors import UserError
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.config import without_representation
from ifvit.models.pretrained import place_of
from ifvit.models.text_encoders import TextEncoder, load_text_encoder
from ifvit.models.weights import (
    WeightsInfo,
    find_weights,
    initial_weights,
    read_stored_weights,
    verify_weights,
)
from ifvit.sampling.load import check_text_encoder
from ifvit.shards.format import Manifest
from ifvit.shards.reader import ShardReader
from ifvit.storage import join
from ifvit.training.checkpoint import committed_steps
from ifvit.training.config import TrainConfig
from ifvit.training.data import Batches
from ifvit.training.engine import Engine, choose_normal_sampler
from ifvit.training.guards import (
    NonfiniteGradient,
    Preempted,
    StopRequest,
    check_dataset,
    check_features,
    check_held_out,
    check_recipe,
    differences,
    write_recipe,
)
from ifvit.training.hooks import SampleGrid, Validation
from ifvit.training.lease import Lease
from ifvit.training.loop import Hook, TrainState, fit
from ifvit.training.metrics_log import MetricsLog
from ifvit.training.order import BatchOrder, weigh_captions
from ifvit.training.replay import report_nonfinite
from ifvit.training.resume import resume, settle_branch
from ifvit.training.saving import SaveCheckpoint


def train(config: TrainConfig) -> TrainState:
    """Train the run `config.run` until `max_steps`, or resume it.

    Raises UserError when recipe, shards and run directory do not fit together, and Preempted when
    a signal ends the run early.
    """
    with one_line_for_lost_processes():
        return _train_on(ShardReader(config.shards, config.cache), config)


def _train_on(reader: ShardReader, config: TrainConfig) -> TrainState:
    encoder = load_encoder(config, reader)
    conditions = DatasetConditions(reader, config.null_context, encoder)
    check_dataset(conditions, config)
    check_features(reader, config)
    held_out = None
    if config.validation.shards is not None:
        held_out_reader = ShardReader(config.validation.shards, config.cache)
        held_out = DatasetConditions(held_out_reader, config.null_context, encoder)
        check_held_out(held_out, reader, config)
    initial = initial_tensors(config, reader)
    batches = _build_batches(config, conditions)
    engine = choose_engine(config)(config, initial, batches.num_micro_batches)
    engine.group.on_main(lambda: storage.require_no_links_out(config.run))
    lease = engine.group.on_main(lambda: Lease.acquire(config.run))
    with lease.held() if engine.world.is_main else nullcontext():
        return _train(config, conditions, held_out, batches, engine, lease)


def _build_objective(
    config: TrainConfig, scaling: LatentScaling, manifest: Manifest, engine: Engine
) -> Objective:
    return Objective(
        config.objective,
        scaling=scaling,
        deterministic=manifest.deterministic,
        seed=config.seed,
        device=engine.device,
        sample_normal=choose_normal_sampler(config.engine),
        representation=config.active_representation,
    )


def _train(
    config: TrainConfig,
    conditions: DatasetConditions,
    held_out: DatasetConditions | None,
    batches: Batches,
    engine: Engine,
    lease: Lease,
) -> TrainState:
    """Train while this job holds the lease of the run directory."""
    config = engine.group.on_main(lambda: settle_branch(config))
    engine.group.on_main(lambda: check_recipe(config))
    info = _weights_info(config, conditions)
    state = resume(config, engine, lease.token, info)
    objective = _build_objective(config, info.scaling, conditions.reader.manifest, engine)
    stop = StopRequest(engine.world, config.engine.timeout)
    metrics = MetricsLog(config, engine)
    checkpoints = SaveCheckpoint(config, engine, info, lease, metrics, stop)
    hooks: list[Hook] = [metrics, checkpoints]
    if held_out is not None:  # before the log, whose row takes its numbers
        hooks.insert(0, Validation(config.validation, held_out, engine, info, metrics))
    if config.sample_grid.every:
        hooks.append(SampleGrid(config, conditions, engine, info))
    engine.group.on_main(lambda: write_recipe(config))
    trace = join(config.run, "profile", f"rank_{engine.world.rank}.json")
    try:
        with (
            stop.listen(),
            checkpoints.open(),
            metrics.open(state),
            engine.timer.trace(trace if config.profile else None),
        ):
            return fit(
                state,
                config.max_steps,
                batches,
                objective,
                engine,
                hooks,
                stop,
                log_every=config.log_every,
            )
    except NonfiniteGradient as failure:
        report_nonfinite(failure, batches, objective, engine, config)
    except Preempted as preempted:
        if engine.world.is_main:
            sys.stderr.write(f"{preempted.message}\n")
        raise


def load_encoder(config: TrainConfig, reader: ShardReader) -> TextEncoder | None:
    """Load the text encoder that computes contexts on this process's device; None: stored ones.

    Raises UserError for a recipe that names none, if the shards do not either.
    """
    if config.context == "stored":
        return None
    device, stored = choose_device("auto"), reader.manifest.text
    if config.text_encoder is not None:
        return load_text_encoder(config.text_encoder, device, config.text)
    if stored is None:
        raise UserError(
            f"text_encoder: not set, and {reader.url} holds captions without contexts; name the "
            "text encoder that computes them"
        )
    encoder = load_text_encoder(stored.encoder.name, device, stored.encoder.settings)
    check_text_encoder("text encoder", encoder.identity, stored.encoder)
    return encoder


def initial_tensors(config: TrainConfig, reader: ShardReader) -> Callable[[str], Tensor]:
    """Return a function from the name of a parameter to its value at step 0, on the CPU.

    `initial_weights` is not read where a checkpoint replaces it. Raises UserError when these
    weights have another configuration, null context, prediction or scale of the latents.
    """
    if config.initial_weights is None or config.branch or committed_steps(config.run):
        return initial_weights(config.backbone, config.seed)
    folder = find_weights(config.initial_weights)
    stored = read_stored_weights(folder)
    backbone, path = verify_weights(folder, stored)
    for key, found, wanted in (
        ("backbone", asdict(backbone), asdict(without_representation(config.backbone))),
        ("scaling_factor", str(stored.info.scaling), str(find_scaling(config, reader.manifest))),
        ("null_context", stored.info.null_context, config.null_context),
        ("objective.prediction", stored.info.prediction, config.objective.prediction),
    ):
        for name, old, new in differences(key, found, wanted):
            raise UserError(
                f"{config.initial_weights}: has {name}: {old}, but the recipe says {new}; "
                f"set {name} to match"
            )
    tensors: Any = safe_open(path, "pt")
    stored_names, fresh = set(tensors.keys()), initial_weights(config.backbone, config.seed)

    def initial(name: str) -> Tensor:
        return cast(Tensor, tensors.get_tensor(name)) if name in stored_names else fresh(name)

    return initial  # exported weights lack the projector for representation alignment


def _build_batches(config: TrainConfig, conditions: DatasetConditions) -> Batches:
    reader = conditions.reader
    order = BatchOrder(
        shard_sizes=reader.shard_sizes,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        caption_weights=weigh_captions(config.captions, reader, config.caption_dropout),
        shuffle_window=config.shuffle_window,
        random_flip=config.random_flip,
        representation=config.active_representation,
    )
    world = World.from_environment()
    return Batches(reader, order, config.micro_batch_size, world, config.num_workers, conditions)


def _weights_info(config: TrainConfig, conditions: DatasetConditions) -> WeightsInfo:
    """What weights.json states; encoders are where the recipe names them, or the shards do."""
    manifest, encoder = conditions.reader.manifest, conditions.text_encoder
    vae, scaling = manifest.vae, find_scaling(config, manifest)
    if config.vae:
        vae = replace(vae, name=place_of(config.vae))
    if config.text_encoder and encoder:
        encoder = replace(encoder, name=place_of(config.text_encoder))
    return WeightsInfo(
        step=0,
        ema_decay=None,
        scaling_factor=scaling.scale,
        shift_factor=scaling.shift,
        vae=vae,
        text_encoder=encoder,
        null_context=config.null_context,
        prediction=config.objective.prediction,
        shift=config.objective.shift,
        classes=manifest.classes,
        recipe_sha256=hashlib.sha256(dump_config(config).encode()).hexdigest(),
    )


def find_scaling(config: TrainConfig, manifest: Manifest) -> LatentScaling:
    """Return the scaling of the recipe, or one from the shards' statistics.

    Raises UserError for a channel without deviation, which no factor brings to 1.
    """
    if config.given_scaling:
        return config.given_scaling
    if config.scaling_factor is None:
        return LatentScaling(scale=manifest.scaling_factor)
    if min(manifest.channel_std) < 1e-6:
        raise UserError(
            f"{config.shards}: channel {manifest.channel_std.index(min(manifest.channel_std))} of "
            "the latents is constant; set scaling_factor to a number or leave it unset"
        )
    scale = tuple(1.0 / std for std in manifest.channel_std)
    return LatentScaling(scale=scale, shift=manifest.channel_mean)


def choose_engine(config: TrainConfig) -> type[Engine]:
    """The engine for this recipe and number of processes.

    Raises UserError when the recipe asks plain PyTorch for what only DeepSpeed does.
    """
    engine, is_adamw = config.engine, config.optim.optimizer == "adamw"
    # One process has nothing to partition, and ZeRO would cost it a copy and a wait every step.
    is_useful = World.from_environment().size > 1 or engine.offload_optimizer
    if engine.backend == "deepspeed" or (
        engine.backend == "auto" and engine.zero_stage and is_useful and is_adamw
    ):
        from ifvit.training.zero import Zero3Engine, ZeroEngine  # takes seconds to import

        return ZeroEngine if engine.zero_stage < 3 else Zero3Engine
    if engine.offload_optimizer:
        raise UserError("engine.offload_optimizer: needs DeepSpeed; set engine.backend: deepspeed")
    return Engine
