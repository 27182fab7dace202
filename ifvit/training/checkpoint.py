"""Checkpoints: everything that continues a run, complete or absent.

The folder `checkpoints/step_00000500/` holds parts and `manifest.json`. A part is a safetensors
file of named full tensors. The manifest lists the parts with their sizes and hashes; it is written
last, in one request, which commits the checkpoint. A checkpoint is complete if it is committed and
all parts match their hashes; readers skip all others. The name of a part holds the token of the
attempt that wrote it, so no object is written twice. A part holds the tensors that one process
happened to write; readers do not care which. So a run may be continued on another number of
processes, with another engine or ZeRO stage. `SaveCheckpoint` in `hooks` writes checkpoints,
`train` resumes from them.
"""

import hashlib
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.estimates import LOWER_IS_BETTER, Estimate
from ifvit.evaluation.rows import FOLDER, MetricsRow, main_series, read_rows
from ifvit.models.config import restore_config
from ifvit.models.weights import step_name
from ifvit.storage import StoreError, is_remote, join, list_names, read_json
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_HISTORY = 100
"""Number of steps over which the loss is averaged; the losses of the first ones are no spikes."""
_SPIKE = 6.0
"""A loss this many standard deviations above its running mean is a spike."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Position of a run; together with the tensors of a checkpoint it continues the run."""

    step: int = 0
    """Number of finished optimizer steps."""
    samples_seen: int = 0
    """Number of samples read so far; the whole state of the loader."""
    seconds: float = 0.0
    """Time spent in training steps, over all restarts."""
    data_wait: float = 0.0
    """Part of `seconds` that was spent waiting for batches."""
    nonfinite_steps: int = 0
    """Number of steps skipped because their gradient was not finite."""
    loss_spikes: int = 0
    """Number of losses far above the losses before them."""
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    """Exponential moving averages over about the last hundred steps."""

    def advance(self, num_samples: int, seconds: float, data_wait: float) -> "TrainState":
        """The state after one more step."""
        return replace(
            self,
            step=self.step + 1,
            samples_seen=self.samples_seen + num_samples,
            seconds=self.seconds + seconds,
            data_wait=self.data_wait + data_wait,
        )

    def observe(self, losses: Sequence[float]) -> "TrainState":
        """Add the losses of the last `len(losses)` steps to the running mean and count spikes.

        A spike lies more than six standard deviations above the running mean. Mean and variance
        are West's (1979) incremental ones with exponential weights; non-finite losses are ignored.
        """
        mean, variance, spikes = self.loss_mean, self.loss_variance, self.loss_spikes
        for step, loss in enumerate(losses, start=self.step - len(losses)):
            if not math.isfinite(loss):
                continue
            above = loss - mean
            if step >= _HISTORY and above > _SPIKE * variance**0.5:
                spikes += 1
            weight = 1 / min(step + 1, _HISTORY)
            mean += weight * above
            variance = (1 - weight) * (variance + weight * above**2)
        return replace(self, loss_mean=mean, loss_variance=variance, loss_spikes=spikes)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of a checkpoint, with the size and hash that it must have when it is read."""

    name: str
    bytes: int
    sha256: str
    tensors: Sequence[str]
    """Names of the tensors in this file."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run at one step: its position, and which part holds each fp32 tensor."""

    url: str
    """Folder of the checkpoint; the manifest, which lies there, does not repeat it."""
    state: TrainState
    scalars: dict[str, float]
    """State of the engine besides tensors: number of updates, loss scale."""
    backbone: dict[str, object]
    """Fields of the backbone's configuration."""
    recipe_sha256: str
    """Hash of the recipe, as in `weights.json`."""
    shards_sha256: str
    """Hash of the manifest of the training shards."""
    parts: tuple[Part, ...]

    def local_path(self, part: Part, cache: Path) -> Path:
        """File of a part on this machine; the parts of a remote checkpoint are in `cache`."""
        return (cache if is_remote(self.url) else Path(self.url)) / part.name


def manifest_sha256(shards: str) -> str:
    """Hash of the manifest of these shards, which in turn holds the hash of every shard."""
    return hashlib.sha256(storage.read_bytes(join(shards, MANIFEST))).hexdigest()


def step_url(run: str, step: int) -> str:
    """Folder of the checkpoint of a step."""
    return join(run, "checkpoints", step_name(step))


def write_part(folder: str, name: str, tensors: dict[str, Tensor]) -> Part:
    """Write host tensors as one file, whole or not at all."""
    with storage.write_file(join(folder, name)) as path:
        save_file(tensors, path)
        size, digest = path.stat().st_size, storage.sha256_of(path)
    return Part(name=name, bytes=size, sha256=digest, tensors=tuple(tensors))


def commit(checkpoint: Checkpoint) -> None:
    """Write the manifest of a checkpoint whose parts are written, then `latest` for people."""
    manifest = asdict(checkpoint)
    url = manifest.pop("url")
    storage.write_json(join(url, MANIFEST), manifest)
    folder, _, name = url.rpartition("/")
    storage.write_bytes(join(folder, "latest"), f"{name}\n".encode())


def saved_steps(run: str) -> list[int]:
    """Steps that have a checkpoint folder, complete or not, in rising order."""
    names = list_names(join(run, "checkpoints"))
    return sorted(int(name.removeprefix("step_")) for name in names if name.startswith("step_"))


def is_committed(run: str, step: int) -> bool:
    """Whether the save of this step was completed."""
    return storage.exists(join(step_url(run, step), MANIFEST))


def fetch_newest(run: str, cache: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, verified and fetched; None when there is none.

    The parts of a remote run are downloaded to `cache`. Raises UserError when saves were completed
    but all are damaged: starting over silently would throw the run away.
    """
    damage = []
    for step in reversed(saved_steps(run)):
        url = step_url(run, step)
        if not is_committed(run, step):
            log.warning("%s: skipped, because an interrupted save left it incomplete", url)
            continue
        try:
            return fetch(url, cache)
        except StoreError:
            raise  # a store that does not answer is no reason to take an older checkpoint
        except UserError as error:
            log.warning("%s; skipped", error)
            damage.append(error)
    if damage:
        folder = join(run, "checkpoints")
        raise UserError(
            f"{damage[0]}; no other complete checkpoint exists; remove {folder} to start anew"
        )
    return None


def fetch(url: str, cache: Path) -> Checkpoint:
    """Verify the checkpoint in folder `url`; download its parts to `cache` if it is remote.

    Raises UserError that names the missing or damaged file.
    """
    manifest = join(url, MANIFEST)
    stored = read_json(manifest)
    try:
        state, parts = TrainState(**stored.pop("state")), stored.pop("parts")
        parts = tuple(Part(**part) for part in parts)
        checkpoint = Checkpoint(url=url, state=state, parts=parts, **stored)
    except (KeyError, TypeError) as error:
        raise UserError(f"{manifest}: not a checkpoint's manifest ({error})") from None
    for part in checkpoint.parts:
        path = checkpoint.local_path(part, cache)
        if path.exists() and storage.sha256_of(path) == part.sha256:
            continue
        if not is_remote(url):
            raise UserError(f"{path}: missing, or its content is not what {MANIFEST} says")
        storage.download(join(url, part.name), path, part.sha256)
    return checkpoint


@contextmanager
def open_tensors(checkpoint: Checkpoint, cache: Path) -> Iterator[Callable[[str], Tensor]]:
    """Open a fetched checkpoint; give a function that loads a full fp32 tensor by its name.

    The function raises UserError for an unknown name.
    """
    with ExitStack() as files:
        file_of = {}
        for part in checkpoint.parts:
            file = files.enter_context(safe_open(checkpoint.local_path(part, cache), "pt"))
            file_of.update(dict.fromkeys(part.tensors, file))

        def read(name: str) -> Tensor:
            if name not in file_of:
                raise UserError(
                    f"{checkpoint.url}: holds no {name}; use the ema_decays and backbone of that "
                    "run"
                )
            tensor: Tensor = file_of[name].get_tensor(name)
            return tensor

        yield read


def check_retention(config: TrainConfig) -> None:
    """Raise UserError when no evaluation has the metric `keep_best`."""
    if config.keep_best is not None and config.keep_best not in MetricsRow.__dataclass_fields__:
        raise UserError(
            f"keep_best: evaluations have no metric named {config.keep_best}; "
            "use for example frechet_distance or clip_score"
        )


def prune(config: TrainConfig) -> None:
    """Remove the checkpoints that need not be kept, and the leftovers of interrupted saves."""
    run, steps = config.run, saved_steps(config.run)
    committed = [step for step in steps if is_committed(run, step)]
    kept = set(committed[-config.keep_checkpoints :])
    if config.keep_every:
        kept.update(step for step in committed if step % config.keep_every == 0)
    if config.keep_best:
        kept.update(_steps_by_metric(run, config.keep_best, committed)[:1])
    for step in set(steps) - kept:
        # The manifest goes first: a half-removed checkpoint must not look complete.
        storage.remove(join(step_url(run, step), MANIFEST))
        storage.remove(step_url(run, step))
    newest = step_url(run, committed[-1])
    parts = {part["name"] for part in read_json(join(newest, MANIFEST))["parts"]}
    for name in set(list_names(newest)) - parts - {MANIFEST}:
        storage.remove(join(newest, name))  # an earlier attempt at the same step left this part


def _steps_by_metric(run: str, metric: str, steps: Sequence[int]) -> list[int]:
    """Those of `steps` whose evaluation has this metric, the best first, the earlier of equals."""
    rows = main_series(list(read_rows(join(run, FOLDER)).values()))
    measured = [(getattr(row, metric), row.step) for row in rows if row.step in steps]
    sign = 1 if metric in LOWER_IS_BETTER else -1
    scores = [(sign * value.value, step) for value, step in measured if isinstance(value, Estimate)]
    return [step for _, step in sorted(scores)]


def resume(config: TrainConfig, engine: Engine, token: str) -> TrainState:
    """Load the checkpoint from which the run continues, and return its position.

    All processes call this together. The main process chooses and verifies the checkpoint. Remote
    parts are downloaded once per
    node, into a folder named by `token` under TMPDIR. Raises UserError when `config.resume`
    cannot be followed, or when the checkpoint has other shards or another backbone.
    """
    with _node_cache(engine, token) as cache:
        checkpoint = engine.group.on_main(lambda: _choose_checkpoint(config, cache))
        if checkpoint is None:
            return TrainState()
        if engine.world.local_rank == 0 and is_remote(checkpoint.url):
            fetch(checkpoint.url, cache)
        engine.barrier()
        with open_tensors(checkpoint, cache) as read:
            engine.load_state(read)
        engine.load_scalars(checkpoint.scalars)
        return checkpoint.state


def _choose_checkpoint(config: TrainConfig, cache: Path) -> Checkpoint | None:
    """Apply `resume: auto | never | URL` to the run, and check that the checkpoint fits."""
    run, url = config.run, config.resume
    if url == "never":
        if any(is_committed(run, step) for step in saved_steps(run)):
            raise UserError(
                f"{run}: holds checkpoints, but resume is never; choose another run directory "
                "or set resume: auto"
            )
        return None
    checkpoint = fetch_newest(run, cache)
    if checkpoint is None and url != "auto":
        is_folder = storage.exists(join(url, MANIFEST))
        checkpoint = fetch(url, cache) if is_folder else fetch_newest(url, cache)
        if checkpoint is None:
            raise UserError(
                f"{url}: holds no checkpoint; set resume to a run or to its "
                "checkpoints/step_XXXXXXXX"
            )
    if checkpoint is None:
        return None
    if checkpoint.shards_sha256 != manifest_sha256(config.shards):
        raise UserError(
            f"{checkpoint.url}: trained on other shards than {config.shards} holds now; restore "
            "them or train a new run with initial_weights"
        )
    if restore_config(checkpoint.backbone) != config.backbone:
        raise UserError(f"{checkpoint.url}: has another backbone than the recipe; set it to match")
    return checkpoint


@contextmanager
def _node_cache(engine: Engine, token: str) -> Iterator[Path]:
    """A folder that the processes of one node share; it is removed when all have left it."""
    folder = Path(tempfile.gettempdir(), f"ifvit-{token}")
    try:
        yield folder
        engine.barrier()
    finally:
        if engine.world.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
