"""Checkpoints: everything needed to continue a run, complete or absent.

`checkpoints/step_00000500/` holds safetensors parts and, written last, a manifest with their sizes
and hashes. A folder without a manifest that matches is not a checkpoint; readers pass it over.
Nothing in it depends on the number of processes or on the engine that wrote it.
"""

import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ifvit.errors import UserError
from ifvit.storage import list_names, publish, read_json, sha256_of, write_bytes, write_json
from ifvit.training.state import TrainState

log = logging.getLogger(__name__)

PARTS = ("backbone", "optimizer", "ema")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run at one step: its position and the named fp32 tensors of each part."""

    state: TrainState
    shards_sha256: str
    """Hash of the manifest of the shards that the run is trained on."""
    backbone: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """`exp_avg.NAME` and `exp_avg_sq.NAME`; empty before the first update."""
    ema: dict[str, Tensor]


def step_name(step: int) -> str:
    """`step_00000500`, so that names sort like steps."""
    return f"step_{step:08d}"


def save_checkpoint(run: str, checkpoint: Checkpoint) -> None:
    """Write the parts, then the manifest, then `latest`; a kill at any moment leaves no half."""
    root = Path(run, "checkpoints")
    folder = root / step_name(checkpoint.state.step)
    _discard(folder)
    folder.mkdir(parents=True)
    files = {}
    for part in PARTS:
        path = folder / f"{part}.safetensors"
        _write_tensors(path, getattr(checkpoint, part))
        files[part] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {
        "state": asdict(checkpoint.state),
        "shards_sha256": checkpoint.shards_sha256,
        "files": files,
    }
    write_json(str(folder / "manifest.json"), manifest)
    write_bytes(str(root / "latest"), f"{folder.name}\n".encode())


def restore_checkpoint(run: str) -> Checkpoint | None:
    """The newest complete checkpoint of the run, every byte verified; None when there is none.

    Raises UserError when folders with a manifest exist but all of them are damaged: starting over
    silently would throw the run away.
    """
    root = Path(run, "checkpoints")
    damage = []
    for name in reversed(_steps(root)):
        folder = root / name
        if not (folder / "manifest.json").exists():
            log.warning("%s: incomplete, left by an interrupted save; passed over", folder)
            continue
        problem = _find_damage(folder)
        if problem is None:
            return _load(folder)
        log.warning("%s; passed over", problem)
        damage.append(problem)
    if damage:
        raise UserError(f"{damage[0]}; no other complete checkpoint; remove {root} to start anew")
    return None


def prune_checkpoints(run: str, keep: int) -> None:
    """Remove all but the `keep` newest complete checkpoints, and what interrupted saves left."""
    root = Path(run, "checkpoints")
    complete = [name for name in _steps(root) if (root / name / "manifest.json").exists()]
    kept = complete[-keep:]
    for name in _steps(root):
        if name not in kept:
            _discard(root / name)


def _steps(root: Path) -> list[str]:
    return [name for name in list_names(str(root)) if name.startswith("step_")]


def _discard(folder: Path) -> None:
    # The manifest goes first: a half-removed checkpoint must not look complete.
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    publish(partial, path)


def _find_damage(folder: Path) -> str | None:
    files = read_json(str(folder / "manifest.json"))["files"]
    for part in PARTS:
        path = folder / f"{part}.safetensors"
        if not path.exists() or path.stat().st_size != files[part]["bytes"]:
            return f"{path}: missing or of another size than its manifest says"
        if sha256_of(path) != files[part]["sha256"]:
            return f"{path}: its content does not match the hash in its manifest"
    return None


def _load(folder: Path) -> Checkpoint:
    manifest = read_json(str(folder / "manifest.json"))
    parts = {part: load_file(folder / f"{part}.safetensors") for part in PARTS}
    return Checkpoint(
        state=TrainState(**manifest["state"]), shards_sha256=manifest["shards_sha256"], **parts
    )
