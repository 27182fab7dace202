"""Checkpoints: everything needed to continue a run, complete or absent.

`checkpoints/step_00000500/` holds the parts, safetensors files of named whole tensors, and, written
last by one request, `manifest.json` with their sizes and hashes. A folder whose manifest is missing
or does not match is not a checkpoint; readers pass it over. Part names carry the attempt that wrote
them, so no object is ever written twice. Nothing depends on the number of processes, the engine or
the ZeRO stage: a part is only the share of one process at that time.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ifvit.distributed import ProcessGroup
from ifvit.errors import UserError
from ifvit.evaluation.estimates import LOWER_IS_BETTER, Estimate
from ifvit.evaluation.rows import FOLDER, MetricsRow, main_series, read_rows
from ifvit.models.config import restore_config
from ifvit.models.weights import step_name
from ifvit.storage import (
    StoreError,
    download,
    exists,
    is_remote,
    join,
    list_names,
    read_json,
    remove,
    sha256_of,
    write_bytes,
    write_file,
    write_json,
)
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.state import TrainState

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of a checkpoint and what must come back when it is read."""

    name: str
    bytes: int
    sha256: str
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run at one step: its position, and where its named fp32 tensors are."""

    state: TrainState
    scalars: dict[str, float]
    """What the engine keeps besides tensors: loss scale, counters."""
    backbone: dict[str, object]
    """Fields of the backbone's configuration."""
    recipe_sha256: str
    """Hash of the recipe, as `weights.json` has it."""
    shards_sha256: str
    """Hash of the manifest of the shards that the run is trained on."""
    parts: tuple[Part, ...]


def step_url(run: str, step: int) -> str:
    """The folder of a step's checkpoint."""
    return join(run, "checkpoints", step_name(step))


def write_part(folder: str, name: str, tensors: dict[str, Tensor]) -> Part:
    """Write host tensors as one file, whole or not at all."""
    with write_file(join(folder, name)) as path:
        save_file(tensors, path)
        size, digest = path.stat().st_size, sha256_of(path)
    return Part(name=name, bytes=size, sha256=digest, tensors=tuple(tensors))


def commit(run: str, checkpoint: Checkpoint) -> None:
    """Make a checkpoint of finished parts: its manifest, then `latest`, which people read."""
    step = checkpoint.state.step
    write_json(join(step_url(run, step), MANIFEST), asdict(checkpoint))
    write_bytes(join(run, "checkpoints", "latest"), f"{step_name(step)}\n".encode())


def saved_steps(run: str) -> list[int]:
    """Steps with a checkpoint folder, rising; a folder need not be complete."""
    names = list_names(join(run, "checkpoints"))
    return sorted(int(name.removeprefix("step_")) for name in names if name.startswith("step_"))


def is_committed(run: str, step: int) -> bool:
    """Whether a save of this step was finished."""
    return exists(join(step_url(run, step), MANIFEST))


def fetch_newest(run: str, cache: Path) -> tuple[str, Checkpoint] | None:
    """The newest complete checkpoint and its folder's URL; None when there is none.

    Every byte of it is verified, and lies in `cache` if the run is remote. Raises UserError when
    saves were finished but all are damaged: starting over silently would throw the run away.
    """
    damage = []
    for step in reversed(saved_steps(run)):
        url = step_url(run, step)
        if not is_committed(run, step):
            log.warning("%s: incomplete, left by an interrupted save; passed over", url)
            continue
        try:
            return url, fetch(url, cache)
        except StoreError:
            raise  # a store that is away says nothing about the checkpoint
        except UserError as error:
            log.warning("%s; passed over", error)
            damage.append(error)
    if damage:
        folder = join(run, "checkpoints")
        raise UserError(f"{damage[0]}; no other complete checkpoint; remove {folder} to start anew")
    return None


def fetch(url: str, cache: Path) -> Checkpoint:
    """The checkpoint in folder `url`, its parts verified, in `cache` if it is remote.

    Raises UserError naming the file that is missing, damaged or no manifest.
    """
    checkpoint = _parse(url, read_json(join(url, MANIFEST)))
    for part in checkpoint.parts:
        path = _local(url, cache) / part.name
        if path.exists() and sha256_of(path) == part.sha256:
            continue
        if not is_remote(url):
            raise UserError(f"{path}: missing, or not what its manifest says")
        download(join(url, part.name), path, part.sha256)
    return checkpoint


@contextmanager
def open_tensors(
    url: str, checkpoint: Checkpoint, cache: Path
) -> Iterator[Callable[[str], Tensor]]:
    """A function name => whole fp32 tensor over a fetched checkpoint; only what is read is loaded.

    It raises UserError for a name that the checkpoint does not hold.
    """
    with ExitStack() as files:
        holder = {}
        for part in checkpoint.parts:
            file = files.enter_context(safe_open(_local(url, cache) / part.name, "pt"))
            holder.update(dict.fromkeys(part.tensors, file))

        def read(name: str) -> Tensor:
            if name not in holder:
                raise UserError(f"{url}: holds no {name}; the recipe asks for another model")
            tensor: Tensor = holder[name].get_tensor(name)
            return tensor

        yield read


def _local(url: str, cache: Path) -> Path:
    return cache if is_remote(url) else Path(url)


def _parse(url: str, stored: dict[str, object]) -> Checkpoint:
    try:
        state = TrainState(**stored.pop("state"))  # type: ignore[arg-type]
        parts = tuple(
            Part(**{**part, "tensors": tuple(part["tensors"])})
            for part in stored.pop("parts")  # type: ignore[attr-defined]
        )
        return Checkpoint(state=state, parts=parts, **stored)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise UserError(f"{join(url, MANIFEST)}: not a checkpoint's manifest ({error})") from None


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The newest `last`, every step divisible by `every` (0: none), the best by `metric`."""

    last: int
    every: int = 0
    metric: str | None = None
    """Field of MetricsRow, looked up in the run's main evaluations (`main_series`)."""

    def __post_init__(self) -> None:
        """Refuse a metric that no evaluation has."""
        if self.metric is not None and self.metric not in MetricsRow.__dataclass_fields__:
            raise UserError(f"keep_best: evaluations have no number named {self.metric}")


def prune(run: str, retention: Retention) -> None:
    """Remove the checkpoints that need not stay, and all that interrupted saves have left."""
    steps = saved_steps(run)
    complete = [step for step in steps if is_committed(run, step)]
    best = _best_step(run, retention.metric, complete) if retention.metric else None
    kept = kept_steps(complete, retention, best)
    for step in steps:
        if step not in kept:
            # The manifest goes first: a half-removed checkpoint must not look complete.
            remove(join(step_url(run, step), MANIFEST))
            remove(step_url(run, step))
    _remove_leftovers(step_url(run, complete[-1]))


def kept_steps(complete: list[int], retention: Retention, best: int | None) -> set[int]:
    """Those of the rising `complete` steps that stay; never none."""
    kept = set(complete[-retention.last :])
    if retention.every:
        kept.update(step for step in complete if step % retention.every == 0)
    if best is not None:
        kept.add(best)
    return kept


def _best_step(run: str, metric: str, complete: Collection[int]) -> int | None:
    """The complete step whose evaluation has the best `metric`; the earliest of equals."""
    rows = main_series(list(read_rows(join(run, FOLDER)).values()))
    measured = {row.step: getattr(row, metric) for row in rows if row.step in complete}
    sign = 1 if metric in LOWER_IS_BETTER else -1
    scores = [
        (sign * estimate.value, step)
        for step, estimate in measured.items()
        if isinstance(estimate, Estimate)
    ]
    return min(scores)[1] if scores else None


def _remove_leftovers(url: str) -> None:
    """Remove the parts that an attempt before the one that finished has left in its folder."""
    named = {MANIFEST, *(part["name"] for part in read_json(join(url, MANIFEST))["parts"])}
    for name in set(list_names(url)) - named:
        remove(join(url, name))


@dataclass(frozen=True, kw_only=True)
class _Found:
    url: str
    checkpoint: Checkpoint


def resume(
    config: TrainConfig, engine: Engine, channel: ProcessGroup, shards_sha256: str, token: str
) -> TrainState:
    """Bring the engine to where the run goes on => its position; collective.

    The main process chooses and verifies; remote parts are downloaded once per node, into a folder
    named by `token` under TMPDIR. Raises UserError when the checkpoint belongs to other shards or
    another model, or when `config.resume` cannot be had.
    """
    with _cache(engine, token) as cache:
        found = channel.on_main(lambda: _choose(config.run, config.resume, cache))
        if found is None:
            return TrainState()
        checkpoint = found.checkpoint
        if checkpoint.shards_sha256 != shards_sha256:
            raise UserError(f"{found.url}: trained on other shards than {config.shards} holds now")
        if restore_config(checkpoint.backbone) != config.backbone:
            raise UserError(f"{found.url}: holds a backbone of another shape than the recipe's")
        if engine.world.local_rank == 0 and is_remote(found.url):
            fetch(found.url, cache)
        engine.barrier()
        with open_tensors(found.url, checkpoint, cache) as read:
            engine.load_state(read)
        engine.load_scalars(checkpoint.scalars)
        return checkpoint.state


def _choose(run: str, wanted: str, cache: Path) -> _Found | None:
    """What `resume: auto | never | URL` means for this run as it is now."""
    if wanted == "never":
        if any(is_committed(run, step) for step in saved_steps(run)):
            raise UserError(
                f"{run}: holds checkpoints, and resume is never; choose another run directory, "
                "or let resume be auto"
            )
        return None
    own = fetch_newest(run, cache)
    if own is None and wanted != "auto":
        return _choose_other(wanted, cache)
    return None if own is None else _Found(url=own[0], checkpoint=own[1])


def _choose_other(url: str, cache: Path) -> _Found:
    """The newest checkpoint of run `url`, or the one that `url` itself is the folder of."""
    if exists(join(url, MANIFEST)):
        return _Found(url=url, checkpoint=fetch(url, cache))
    newest = fetch_newest(url, cache)
    if newest is None:
        raise UserError(f"{url}: no checkpoint there; resume takes a run or its checkpoints/step_…")
    return _Found(url=newest[0], checkpoint=newest[1])


@contextmanager
def _cache(engine: Engine, token: str) -> Iterator[Path]:
    """A folder that the processes of one node share; removed when all have left it."""
    folder = Path(tempfile.gettempdir(), f"ifvit-{token}")
    try:
        yield folder
        engine.barrier()
    finally:
        if engine.world.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
