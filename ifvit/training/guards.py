"""What ends a run early: checks before the first step, signals, and non-finite gradients."""

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed

from ifvit.config import dump_config
from ifvit.connections import is_remote
from ifvit.distributed import World
from ifvit.errors import EXIT_PREEMPTED, UserError
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.config import UNetConfig
from ifvit.models.pretrained import identify, place_of, resolve_pretrained
from ifvit.models.weights import describe_backbone
from ifvit.records import parse_value, parse_yaml, shorten
from ifvit.sampling.load import check_text_encoder
from ifvit.shards.format import EncoderIdentity
from ifvit.shards.reader import ShardReader
from ifvit.storage import exists, join, read_bytes, write_bytes
from ifvit.training.config import MAY_CHANGE, TrainConfig
from ifvit.training.optimizers import state_names

_OF_CHECKPOINTS = {"optim.optimizer", "objective.prediction", "scaling_factor", "shift_factor"}
"""Fields that a checkpoint must share with the run that continues it, besides the backbone."""


def check_dataset(conditions: DatasetConditions, config: TrainConfig) -> None:
    """Raise UserError when the shards do not fit the backbone or the encoders of the recipe."""
    reader, backbone = conditions.reader, config.backbone
    url, manifest = reader.url, reader.manifest
    size = backbone.latent_size
    _require_shape(
        f"{url}: latents",
        manifest.latent_shape,
        (backbone.latent_channels, size, size),
        "backbone.latent_channels and backbone.latent_size",
    )
    if backbone.context_shape is not None:
        _require_shape(
            f"{url}: contexts",
            conditions.context_shape,
            backbone.context_shape,
            "backbone.context_length and backbone.context_width",
        )
    elif not manifest.classes:
        raise UserError(
            f"{url}: holds captions, not classes; set backbone.context_length and "
            "backbone.context_width instead of num_classes"
        )
    elif len(manifest.classes) != backbone.num_classes:
        raise UserError(
            f"{url}: has {len(manifest.classes)} classes, but the backbone "
            f"{backbone.num_classes}; set backbone.num_classes to match"
        )
    _require_encoder("vae", config.vae, manifest.vae, url)
    if config.text_encoder is not None and config.context == "stored":
        _require_encoder("text_encoder", config.text_encoder, reader.text.encoder, url)


def check_features(reader: ShardReader, config: TrainConfig) -> None:
    """Raise UserError when the shards lack the features with which the recipe aligns tokens."""
    backbone = config.backbone
    if isinstance(backbone, UNetConfig) or backbone.representation_width is None:
        return
    if reader.features.width != backbone.representation_width:
        raise UserError(
            f"{reader.url}: features have {reader.features.width} channels, but "
            f"backbone.representation_width is {backbone.representation_width}; set it to match"
        )


def check_held_out(
    conditions: DatasetConditions, training: ShardReader, config: TrainConfig
) -> None:
    """Raise UserError when held-out shards are not encoded as the training shards, or are these."""
    check_dataset(conditions, config)
    url, found, wanted = conditions.reader.url, conditions.reader.manifest, training.manifest
    same = f"give validation.shards that were encoded as {training.url}"
    if found.vae.sha256 != wanted.vae.sha256:
        raise UserError(f"{url}: another vae, {found.vae.name}; {same}")
    if config.context == "stored" and found.text and wanted.text:
        check_text_encoder(f"{url}: text encoder", found.text.encoder, wanted.text.encoder)
    if found.classes != wanted.classes:
        raise UserError(f"{url}: other classes; {same}")
    shared = {entry.sha256 for entry in found.shards} & {entry.sha256 for entry in wanted.shards}
    if shared:
        raise UserError(
            f"{url}: {len(shared)} of its shards belong to the training shards {training.url}; "
            "give validation.shards that are not trained on"
        )


def check_recipe(config: TrainConfig) -> None:
    """Raise UserError when `config.run` holds a run whose fixed fields have other values.

    Warns on standard error when rise and fall of the learning rate take longer than the run.
    """
    ramps = config.optim.warmup_steps + config.optim.cooldown_steps
    if ramps > config.max_steps:
        sys.stderr.write(
            f"optim: warmup_steps and cooldown_steps are {ramps} together, but max_steps is "
            f"{config.max_steps}; the learning rate never reaches {config.optim.learning_rate:g}\n"
        )
    recipe = read_recipe(config.run)
    if recipe is None:
        return
    before, now = asdict(recipe), asdict(config)
    fixed = sorted(set(now) - MAY_CHANGE)
    if before["validation"]["shards"] and now["validation"]["shards"]:
        # Losses of two held-out sets would lie on one curve, and `keep_best` would compare them.
        before["validation"]["every"] = now["validation"]["every"]
        fixed.append("validation")
    for key in fixed:
        for name, old, new in differences(key, before[key], now[key]):
            # A checkpoint of another backbone, optimizer or prediction cannot be continued.
            fits = key not in ("backbone", "branch") and name not in _OF_CHECKPOINTS
            source = f" --branch {config.run}@latest" if fits else ""
            remedy = "continue" if fits else "train"
            raise UserError(
                f"{config.run}: started with {name}: {shorten(old)}, the recipe now says "
                f"{new}; restore that value, or {remedy} in a new run: --run NEW{source}"
            )


def read_recipe(run: str) -> TrainConfig | None:
    """Read config.yaml of a run; None if there is none.

    Fields that were added after the run began get their defaults; removed ones are ignored.
    """
    path = join(run, "config.yaml")
    if not exists(path):
        return None
    stored = parse_yaml(read_bytes(path), path)
    return parse_value(TrainConfig, stored, path, ignore_unknown=True)


def differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Names of the fields that differ, such as `optim.learning_rate`, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now | before:
            yield from differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield name, before, now


def write_recipe(config: TrainConfig) -> None:
    """Write config.yaml. Raises UserError when the disk is too full for the next checkpoint."""
    write_bytes(join(config.run, "config.yaml"), dump_config(config).encode())
    if is_remote(config.run):
        return
    # A checkpoint holds parameters, EMA weights and the optimizers' state; the exported weights
    # hold the parameters and the EMA weights again.
    backbone = describe_backbone(config.backbone)
    parameters = dict(backbone.named_parameters())
    num_values = 2 * (1 + len(config.ema_decays)) * sum(p.numel() for p in parameters.values())
    num_values += sum(parameters[name].numel() for _, name in state_names(backbone, config.optim))
    needed = 4 * num_values
    free = shutil.disk_usage(config.run).free
    if free < needed:
        raise UserError(
            f"{config.run}: {free / 1e9:.1f} GB free, but the next checkpoint takes "
            f"{needed / 1e9:.1f} GB; free some space or choose another run directory"
        )


def _require_shape(what: str, found: tuple[int, ...], wanted: tuple[int, ...], keys: str) -> None:
    if found != wanted:
        raise UserError(
            f"{what} are {'x'.join(map(str, found))}, but the backbone takes "
            f"{'x'.join(map(str, wanted))}; set {keys} to match, or encode again"
        )


def _require_encoder(key: str, name: str | None, encoder: EncoderIdentity, shards: str) -> None:
    if name is None or place_of(name) == encoder.name:
        return
    if identify(name, resolve_pretrained(name, f"--{key}")).sha256 != encoder.sha256:
        raise UserError(
            f"{shards}: encoded with {key} {encoder.name}, but the recipe names {name}; "
            f"encode again or change {key}"
        )


class NonfiniteGradient(Exception):  # noqa: N818  # named after the event, like Preempted
    """The gradient of the step after `step` is not finite, and the recipe tolerates no more."""

    def __init__(self, step: int, samples_seen: int) -> None:
        super().__init__(f"step {step + 1}: the gradient is not finite")
        self.step, self.samples_seen = step, samples_seen


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(SystemExit):
    """A signal ended the run after a step, and the state of the run is saved.

    The exit code is `EXIT_PREEMPTED`, or 130 after SIGINT, as shells expect.
    """

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(130 if number is signal.SIGINT else EXIT_PREEMPTED)
        self.message = (
            f"{number.name}: stopped after step {step}; run the same command again to continue"
        )


class StopRequest:
    """Receives signals and agrees with all processes at every step whether to stop.

    The processes begin to exchange their signals when a step begins and read the result when it
    ends, so that the exchange runs beside the step. It uses gloo, which does not use the device.
    """

    def __init__(self, world: World, timeout: timedelta | None = None) -> None:
        group = distributed.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None
        self._group = group
        self._received = 0
        self._exchanged = torch.zeros((), dtype=torch.int32)
        self._exchange: distributed.Work | None = None

    def request(self, number: int = signal.SIGTERM) -> None:
        """Make all processes stop after this step or the next one; any thread may call this."""
        self._received = number

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Receive signals while the context is open; they do not end the process.

        Programs started meanwhile do not get the signals. SLURM and terminals send signals to all
        processes, and a step fails or hangs when the compiler that it waits for is killed.
        """
        handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        ended = threading.Event()
        receiver = threading.Thread(target=ended.wait, name="signals", daemon=True)
        receiver.start()  # this thread takes the signals; the main thread and its children do not
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            ended.set()
            receiver.join()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def ask(self) -> None:
        """Begin to exchange the received signals among all processes."""
        self._exchanged.fill_(self._received)
        if self._group is not None:
            self._exchange = distributed.all_reduce(
                self._exchanged, distributed.ReduceOp.MAX, self._group, async_op=True
            )

    def answer(self) -> signal.Signals | None:
        """The signal for which all processes stop now; the same on each of them."""
        if self._exchange is not None:
            self._exchange.wait()
        number = int(self._exchanged)
        return signal.Signals(number) if number else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.request(number)
