"""Checkpoints: everything needed to continue a run, complete or absent.

`checkpoints/step_00000500/` holds the parts, safetensors files of named whole tensors, and, written
last by one request, `manifest.json` with their sizes and hashes. A folder whose manifest is missing
or does not match is not a checkpoint; readers pass it over. Part names carry the attempt that wrote
them, so no object is ever written twice. Nothing depends on the number of processes, the engine or
the ZeRO stage: a part is only the share of one process at that time.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ifvit.errors import UserError
from ifvit.models.weights import step_name
from ifvit.object_store import StoreError
from ifvit.storage import (
    download,
    exists,
    is_remote,
    join,
    list_names,
    read_json,
    sha256_of,
    write_bytes,
    write_file,
    write_json,
)
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
