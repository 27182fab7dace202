"""Checkpoints: everything that continues a run, complete or absent.

The folder `checkpoints/step_00000500/` holds parts and `manifest.json`. A part is a safetensors
file of named full tensors. The manifest lists the parts with their sizes and hashes; it is written
last, in one request, which commits the checkpoint. A checkpoint is complete if it is committed and
all parts match their hashes; readers skip all others. The name of a part holds the token of the
attempt that wrote it, so no object is written twice. A part holds the tensors that one process
happened to write; readers do not care which. So a run may be continued on another number of
processes, with another engine or ZeRO stage. `SaveCheckpoint` in `saving` writes checkpoints,
`resume` continues from them.
"""

import hashlib
import logging
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ifvit import storage
from ifvit.connections import StoreError, is_remote
from ifvit.distributed import ALONE, ProcessGroup
from ifvit.errors import UserError
from ifvit.models.pretrained import reading
from ifvit.models.weights import step_name
from ifvit.records import NonNegativeInt, Rule, Sha256, parse_value, path_inside, record, shorten
from ifvit.shards.format import TextEncoderIdentity
from ifvit.storage import join, list_names
from ifvit.training.engine import EngineScalars
from ifvit.training.loop import TrainState

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PART = re.compile(r"part-[0-9]{5,9}-of-[0-9]{5,9}-[0-9a-z]{1,32}\.safetensors")
_ALONE = ProcessGroup(ALONE)
_NUM_READERS = 4
"""Number of parts that one process reads at the same time."""


def is_part_name(name: str) -> bool:
    """Whether this is the name of a part of a checkpoint."""
    return _PART.fullmatch(name) is not None


PartName = Annotated[str, Rule("the name of a part of a checkpoint", is_part_name)]


@record
class Part:
    """One file of a checkpoint, with the size and hash that it must have when it is read."""

    name: PartName
    bytes: NonNegativeInt
    sha256: Sha256
    tensors: tuple[str, ...]
    """Names of the tensors in this file."""


@record
class Checkpoint:
    """A run at one step: its position, and which part holds each fp32 tensor."""

    url: str
    """Folder of the checkpoint; the manifest, which lies there, does not repeat it."""
    state: TrainState
    scalars: EngineScalars
    backbone: dict[str, Any]
    """Fields of the backbone's configuration."""
    target: str | None = None
    """What the backbone predicts, as `WeightsInfo.target`; None in earlier checkpoints."""
    text_encoder: TextEncoderIdentity | None = None
    """What made the contexts; None for classes and in earlier checkpoints."""
    recipe_sha256: Sha256
    """Hash of the recipe, as in `weights.json`."""
    shards_sha256: Sha256
    """Hash of the manifest of the training shards."""
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        tensors = [name for part in self.parts for name in part.tensors]
        if len(set(names)) != len(names) or len(set(tensors)) != len(tensors):
            raise UserError(f"{self.url}: {MANIFEST} names a part or a tensor twice")
        if self.url.rpartition("/")[2] != step_name(self.state.step):
            raise UserError(
                f"{self.url}: {MANIFEST} says step {self.state.step}; the folder of that step is "
                f"{step_name(self.state.step)}"
            )

    def local_path(self, part: Part, cache: Path) -> Path:
        """File of a part on this machine; the parts of a remote checkpoint are in `cache`."""
        return path_inside(cache if is_remote(self.url) else Path(self.url), part.name)


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
    storage.write_sealed(join(url, MANIFEST), manifest)
    folder, _, name = url.rpartition("/")
    storage.write_bytes(join(folder, "latest"), f"{name}\n".encode())


def saved_steps(run: str) -> list[int]:
    """Steps that have a checkpoint folder, complete or not, in rising order."""
    return step_folders(join(run, "checkpoints"))


def step_folders(url: str) -> list[int]:
    """Steps of the folders `step_N` in folder `url`, in rising order."""
    names = list_names(url)
    steps = [int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{8,18}", name)]
    return sorted(step for step in steps if step_name(step) in names)


def committed_steps(run: str) -> list[int]:
    """Steps whose save was completed, in rising order."""
    steps = saved_steps(run)
    return [step for step in steps if storage.exists(join(step_url(run, step), MANIFEST))]


def read_checkpoint(url: str) -> Checkpoint:
    """Read the manifest in folder `url`. Raises UserError when it is damaged or contradictory."""
    url = url.rstrip("/")
    manifest = join(url, MANIFEST)
    stored = storage.read_sealed(dict[str, Any], manifest)
    return parse_value(Checkpoint, {**stored, "url": url}, manifest)


def fetch_newest(run: str, cache: Path, group: ProcessGroup = _ALONE) -> Checkpoint | None:
    """The newest complete checkpoint of a run, verified and fetched; None when there is none.

    All processes of `group` call this together; see `fetch`. Raises UserError when saves were
    completed but all are damaged: starting over silently would throw the run away.
    """
    damage = []
    report = log.warning if group.world.is_main else log.debug
    for step in reversed(group.on_main(lambda: committed_steps(run))):
        try:
            return fetch(step_url(run, step), cache, group)
        except StoreError:
            raise  # a store that does not answer is no reason to take an older checkpoint
        except UserError as error:
            report("%s; skipped", error)
            damage.append(error)
    if damage:
        folder = join(run, "checkpoints")
        raise UserError(
            f"{damage[0]}; no other complete checkpoint exists; remove {folder} to start anew"
        )
    return None


def fetch(url: str, cache: Path, group: ProcessGroup = _ALONE) -> Checkpoint:
    """Verify the checkpoint in folder `url`; download its parts to `cache` if it is remote.

    All processes of `group` call this together and divide the parts: those of one node the parts of
    a remote checkpoint, of which each node needs a copy, and all of them the parts on a shared
    disk. Raises UserError that names the missing or damaged file.
    """
    checkpoint = group.on_main(lambda: read_checkpoint(url))
    place = socket.gethostname() if is_remote(url) else "shared disk"
    places = group.gather(place)
    number = places[: group.world.rank].count(place)
    own = checkpoint.parts[number :: places.count(place)]

    def verify_own() -> None:
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            list(readers.map(partial(_fetch_part, checkpoint, cache), own))

    group.on_all(verify_own)
    return checkpoint


def _fetch_part(checkpoint: Checkpoint, cache: Path, part: Part) -> None:
    path, url = checkpoint.local_path(part, cache), join(checkpoint.url, part.name)
    is_whole = path.is_file() and path.stat().st_size == part.bytes
    if is_whole and storage.sha256_of(path) == part.sha256:
        return
    if not is_remote(url) or storage.file_size(url) != part.bytes:
        raise UserError(f"{url}: missing, or its content is not what {MANIFEST} says")
    storage.download(url, path, part.sha256)


@contextmanager
def open_tensors(checkpoint: Checkpoint, cache: Path) -> Iterator[Callable[[str], Tensor]]:
    """Open a fetched checkpoint; give a function that loads a full fp32 tensor by its name.

    The function raises UserError for an unknown name.
    """
    with ExitStack() as files:
        file_of = {}
        for part in checkpoint.parts:
            path = checkpoint.local_path(part, cache)
            with reading(f"{path}: not a safetensors file"):
                file = files.enter_context(safe_open(path, "pt"))
            file_of.update(dict.fromkeys(part.tensors, file))

        def read(name: str) -> Tensor:
            if name not in file_of:
                raise UserError(
                    f"{checkpoint.url}: holds no {name}; use the ema_decays, the backbone and the "
                    "optim.optimizer of that run"
                )
            with reading(f"{checkpoint.url}: {shorten(name)} cannot be read"):
                tensor: Tensor = file_of[name].get_tensor(name)
            return tensor

        yield read
