"""Checks before the first step, non-finite gradients, and signals."""

import hashlib
import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from ifvit.config import dump_config
from ifvit.diffusion.objectives import NoisePrediction
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.distributed import World, choose_device
from ifvit.errors import EXIT_PREEMPTED, UserError
from ifvit.models.backbone import Backbone
from ifvit.models.config import BackboneConfig, restore_config
from ifvit.models.cost import count_cost
from ifvit.models.pretrained import identify, resolve_pretrained
from ifvit.models.weights import restore_backbone, step_name
from ifvit.shards import EncoderIdentity, ShardReader
from ifvit.storage import exists, is_remote, join, read_bytes, write_bytes, write_file
from ifvit.training.config import EngineConfig, ReplayConfig, TrainConfig
from ifvit.training.data import Batch, Batches
from ifvit.training.engine import Engine, prepare_forward
from ifvit.training.state import TrainState

MAY_CHANGE = frozenset(
    {
        *("run", "shards", "cache", "vae", "text_encoder", "engine", "sample_grid", "max_steps"),
        *("micro_batch_size", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
        *("keep_every", "keep_best", "resume"),
        *("tolerate_nonfinite", "trackers", "profile"),
    }
)
"""Fields that a resumed run may set anew; any other would make it a different run."""


def check_shapes(reader: ShardReader, config: TrainConfig) -> None:
    """Raise UserError when the backbone was not made for these shards' latents and context."""
    backbone = config.backbone
    moments, height, width = reader.manifest.moments_shape
    _require_shape(
        f"{config.shards}: latents",
        (moments // 2, height, width),
        (backbone.latent_channels, backbone.latent_size, backbone.latent_size),
        "backbone.latent_channels and backbone.latent_size",
    )
    if backbone.context_shape is None:
        _require_classes(config.shards, reader.manifest.classes, backbone)
        return
    _require_shape(
        f"{config.shards}: context",
        tuple(reader.text.context_shape),
        backbone.context_shape,
        "backbone.context_length and backbone.context_width",
    )


def check_encoders(reader: ShardReader, config: TrainConfig) -> None:
    """Raise UserError when the shards come from other encoders than the recipe names."""
    _require_encoder("vae", config.vae, reader.manifest.vae, config.shards)
    if config.text_encoder is not None:
        _require_encoder("text_encoder", config.text_encoder, reader.text.encoder, config.shards)


def check_recipe(config: TrainConfig) -> None:
    """Raise UserError when `config.run` holds a run of a recipe that differs in substance."""
    path = join(config.run, "config.yaml")
    if not exists(path):
        return
    before: dict[str, Any] = yaml.safe_load(read_bytes(path))
    # With the defaults of fields that are younger than the run.
    before["backbone"] = yaml.safe_load(dump_config(restore_config(before["backbone"])))
    now = yaml.safe_load(dump_config(config))
    for key in sorted(set(asdict(config)) - MAY_CHANGE):
        for name, old, new in differences(key, before.get(key), now[key]):
            raise UserError(
                f"{config.run}: started with {name}: {old}, the recipe now says {new}; restore "
                f"that value, or go on in a new run: --run NEW --resume {config.run}"
            )


def differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Names of the fields that differ, `optim.learning_rate`, each with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            yield from differences(f"{name}.{key}", before.get(key), now[key])
    elif before != now:
        yield name, before, now


def claim_space(config: TrainConfig) -> None:
    """Write config.yaml, and raise UserError where the next checkpoint could not be written."""
    try:
        write_bytes(join(config.run, "config.yaml"), dump_config(config).encode())
    except OSError as error:
        raise UserError(
            f"{config.run}: cannot be written ({error}); choose another run directory"
        ) from None
    if is_remote(config.run):
        return
    # Parameters, two moments and averages; all but the moments once more in the exported weights.
    num_copies = (3 + len(config.ema_decays)) + (1 + len(config.ema_decays))
    needed = 4 * count_cost(config.backbone).params * num_copies
    free = shutil.disk_usage(config.run).free
    if free < needed:
        raise UserError(
            f"{config.run}: {free / 1e9:.1f} GB free, the next checkpoint takes "
            f"{needed / 1e9:.1f} GB; make room or choose another run directory"
        )


def manifest_sha256(shards: str) -> str:
    """Hash of the shards' manifest, which in turn holds the hash of every shard."""
    return hashlib.sha256(read_bytes(join(shards, "manifest.json"))).hexdigest()


def _require_shape(what: str, found: tuple[int, ...], wanted: tuple[int, ...], keys: str) -> None:
    if found != wanted:
        raise UserError(
            f"{what} are {'x'.join(map(str, found))}, but the backbone takes "
            f"{'x'.join(map(str, wanted))}; set {keys} to match, or encode again"
        )


def _require_classes(shards: str, classes: tuple[str, ...], backbone: BackboneConfig) -> None:
    if not classes:
        raise UserError(
            f"{shards}: holds captions, not classes; give backbone.context_length and "
            "backbone.context_width instead of num_classes"
        )
    if len(classes) != backbone.num_classes:
        raise UserError(
            f"{shards}: has {len(classes)} classes, the backbone {backbone.num_classes}; "
            "set backbone.num_classes to match"
        )


def _require_encoder(key: str, name: str | None, made_by: EncoderIdentity, shards: str) -> None:
    if name is None or name == made_by.name:
        return
    if identify(name, resolve_pretrained(name)).sha256 != made_by.sha256:
        raise UserError(
            f"{shards}: encoded with {key} {made_by.name}, the recipe names {name}; "
            f"encode again or change {key}"
        )


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(SystemExit):
    """A signal ended the run after a step, and what must be saved is saved.

    Exits with `EXIT_PREEMPTED`, or 130 after SIGINT, as shells expect.
    """

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__(130 if number is signal.SIGINT else EXIT_PREEMPTED)
        self.message = (
            f"{number.name}: stopped after step {step}; run the same command again to go on"
        )


class StopRequest:
    """Notes signals and asks all processes at every step whether one of them has any.

    The question is asked when a step begins and answered when it ends, so that the exchange runs
    beside the step. It goes over gloo, which leaves the device alone.
    """

    def __init__(self, world: World) -> None:
        self._group = distributed.new_group(backend="gloo") if world.size > 1 else None
        self._noted = 0
        self._asked = torch.zeros((), dtype=torch.int32)
        self._exchange: distributed.Work | None = None

    def request(self, number: int = signal.SIGTERM) -> None:
        """Have all processes stop after this step or the next; callable from any thread."""
        self._noted = number

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Note signals inside instead of dying from them.

        Programs started inside do not get them: SLURM and terminals send them to all processes,
        and a step that waits for a compiler that died of one fails, or never ends.
        """
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        ended = threading.Event()
        receiver = threading.Thread(target=ended.wait, name="signals", daemon=True)
        receiver.start()  # it takes the signals; this thread and all that it starts block them
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            ended.set()
            receiver.join()
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask(self) -> None:
        """Begin to ask all processes."""
        self._asked.fill_(self._noted)
        if self._group is not None:
            self._exchange = distributed.all_reduce(
                self._asked, distributed.ReduceOp.MAX, self._group, async_op=True
            )

    def answer(self) -> signal.Signals | None:
        """The signal for which all processes stop now, the same on each of them."""
        if self._exchange is not None:
            self._exchange.wait()
        number = int(self._asked)
        return signal.Signals(number) if number else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request(number)


_TENSORS = ("moments", "condition", "positions")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one micro-batch comes to: its mean loss and the norm of its gradient."""

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether training can go on with it."""
        return bool(torch.tensor([self.loss, self.grad_norm]).isfinite().all())


def report_nonfinite(
    state: TrainState,
    batches: Batches,
    objective: NoisePrediction,
    engine: Engine,
    config: TrainConfig,
) -> NoReturn:
    """Compute the step after `state` again and raise a UserError that names culprits; collective.

    The engine's parameters must still be those of `state`. A process that meets a loss or a
    gradient that is not finite leaves its first such micro-batch, with the weights, in a file
    that `replay` takes.
    """
    message = f"{config.run}: step {state.step + 1}, rank {engine.world.rank}: "
    backbone = engine.gather_backbone(None)
    prepare_forward(backbone, EngineConfig(precision=config.engine.precision), engine.device)
    found = _find_nonfinite(state, batches, objective, backbone, engine)
    if found is None:
        message += "the gradient is not finite, but no micro-batch of this process makes it so"
    else:
        batch, outcome = found
        name = f"{step_name(state.step + 1)}-rank_{engine.world.rank}.safetensors"
        path = join(config.run, "failures", name)
        _dump(path, batch, outcome, state, objective, backbone, config)
        positions = _culprits(batch, objective, backbone, state.step)
        message += (
            f"loss {outcome.loss}, gradient norm {outcome.grad_norm} at positions "
            f"{positions.tolist()} of the batch, images {batches.image_ids(state, positions)}; "
            f"see it again with: ifvit train --replay {path}"
        )
    engine.barrier()  # or a launcher would end the processes that are still writing
    raise UserError(message)


def replay(config: ReplayConfig) -> None:
    """Print what the micro-batch of `config.file` came to, and what it comes to here and now."""
    try:
        with safe_open(config.file, "pt") as file:
            facts = json.loads(file.metadata()["failure"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{config.file}: not written by a failed training step ({error})") from None
    device = torch.device(choose_device("auto"))
    batch = Batch(**{name: tensors.pop(name).to(device) for name in _TENSORS})
    backbone = nn.Module.to(restore_backbone(restore_config(facts["backbone"]), tensors), device)
    prepare_forward(backbone, EngineConfig(precision=facts["precision"]), device)
    objective = NoisePrediction(schedule=NoiseSchedule(device), **facts["objective"])
    now, then = _differentiate(backbone, objective, batch, facts["step"]), facts["outcome"]
    for what, (loss, norm) in {"then": then.values(), "now": asdict(now).values()}.items():
        sys.stdout.write(f"{what:<5}loss {loss}  gradient norm {norm}\n")


def _find_nonfinite(
    state: TrainState,
    batches: Batches,
    objective: NoisePrediction,
    backbone: Backbone,
    engine: Engine,
) -> tuple[Batch, Outcome] | None:
    with closing(batches.from_state(state, engine.device)) as stream:
        for batch in islice(stream, batches.num_micro_batches):
            outcome = _differentiate(backbone, objective, batch, state.step)
            if not outcome.is_finite:
                return batch, outcome
    return None


def _differentiate(
    backbone: Backbone, objective: NoisePrediction, batch: Batch, step: int
) -> Outcome:
    backbone.zero_grad()
    loss = objective(backbone, batch.moments, batch.condition, step, batch.positions).total
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.get_total_norm([p.grad for p in backbone.parameters() if p.grad is not None])
    return Outcome(loss=loss.item(), grad_norm=norm.item())


def _culprits(batch: Batch, objective: NoisePrediction, backbone: Backbone, step: int) -> Tensor:
    """Positions of the samples that are not finite by themselves, or of all if none is."""
    alone = [
        Batch(**{name: getattr(batch, name)[i : i + 1] for name in _TENSORS})
        for i in range(len(batch.positions))
    ]
    guilty = [one for one in alone if not _differentiate(backbone, objective, one, step).is_finite]
    return torch.cat([one.positions for one in guilty or alone]).cpu()


def _dump(
    path: str,
    batch: Batch,
    outcome: Outcome,
    state: TrainState,
    objective: NoisePrediction,
    backbone: Backbone,
    config: TrainConfig,
) -> None:
    facts = {
        "step": state.step,
        "outcome": asdict(outcome),
        "precision": config.engine.precision,
        "backbone": asdict(config.backbone),
        "objective": {
            "scaling_factor": objective.scaling_factor,
            "seed": objective.seed,
            "min_snr_gamma": objective.min_snr_gamma,
        },
    }
    tensors = {name: getattr(batch, name) for name in _TENSORS} | backbone.state_dict()
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with write_file(path) as temporary:
        save_file(contiguous, Path(temporary), {"failure": json.dumps(facts)})
