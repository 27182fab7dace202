"""Where a run starts: at its newest checkpoint, at another run's, or at step 0."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ifvit.errors import UserError
from ifvit.models.config import restore_config
from ifvit.side_channel import SideChannel
from ifvit.storage import exists, is_remote, join
from ifvit.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    fetch,
    fetch_newest,
    is_committed,
    open_tensors,
    saved_steps,
)
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class _Found:
    url: str
    checkpoint: Checkpoint


def resume(
    config: TrainConfig, engine: Engine, channel: SideChannel, shards_sha256: str, token: str
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
