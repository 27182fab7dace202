"""A checkpoint is complete or it is absent."""

import json
from pathlib import Path

import pytest
import torch

from ifvit.errors import UserError
from ifvit.training import checkpoint as checkpoint_module
from ifvit.training.checkpoint import (
    Checkpoint,
    prune_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from ifvit.training.state import TrainState


def at_step(step: int) -> Checkpoint:
    """A checkpoint whose tensors tell its step."""
    value = {"weight": torch.full((3, 2), float(step))}
    return Checkpoint(
        state=TrainState(step=step, samples_seen=8 * step, seconds=1.5),
        shards_sha256="s",
        backbone=value,
        optimizer={"exp_avg.weight": value["weight"]},
        ema=value,
    )


def restored_step(run: Path) -> int:
    """Step of the checkpoint that would be resumed; its tensors must be that step's."""
    checkpoint = restore_checkpoint(str(run))
    assert checkpoint is not None
    for part in (checkpoint.backbone, checkpoint.optimizer, checkpoint.ema):
        assert all((tensor == checkpoint.state.step).all() for tensor in part.values())
    return checkpoint.state.step


def test_what_is_saved_is_restored(tmp_path: Path) -> None:
    assert restore_checkpoint(str(tmp_path)) is None
    save_checkpoint(str(tmp_path), at_step(7))
    restored = restore_checkpoint(str(tmp_path))
    assert restored is not None
    assert restored.state == TrainState(step=7, samples_seen=56, seconds=1.5)
    assert restored_step(tmp_path) == 7
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000007\n"


@pytest.mark.parametrize("operation", range(5))
def test_a_save_that_dies_anywhere_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    save_checkpoint(str(tmp_path), at_step(1))
    count = 0

    def dying(real):  # type: ignore[no-untyped-def]
        def call(*arguments: object) -> None:
            nonlocal count
            if count == operation:
                raise KeyboardInterrupt
            count += 1
            real(*arguments)

        return call

    # Three parts, the manifest and `latest`: every write of a save goes through these two.
    for name in ("_write_tensors", "write_json", "write_bytes"):
        monkeypatch.setattr(checkpoint_module, name, dying(getattr(checkpoint_module, name)))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(str(tmp_path), at_step(2))
    monkeypatch.undo()
    assert restored_step(tmp_path) == (2 if operation == 4 else 1)
    save_checkpoint(str(tmp_path), at_step(2))
    assert restored_step(tmp_path) == 2


@pytest.mark.parametrize("part", ["backbone", "optimizer", "ema"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, part: str) -> None:
    save_checkpoint(str(tmp_path), at_step(1))
    save_checkpoint(str(tmp_path), at_step(2))
    path = tmp_path / "checkpoints" / "step_00000002" / f"{part}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert restored_step(tmp_path) == 1
    path.write_bytes(data[:-4])
    assert restored_step(tmp_path) == 1


def test_a_run_with_only_damaged_checkpoints_is_not_started_over(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path), at_step(1))
    (tmp_path / "checkpoints" / "step_00000001" / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors: missing .* remove .* to start anew"):
        restore_checkpoint(str(tmp_path))


def test_pruning_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(str(tmp_path), at_step(step))
    unfinished = tmp_path / "checkpoints" / "step_00000004"
    unfinished.mkdir()
    (unfinished / "backbone.safetensors").write_bytes(b"half")
    prune_checkpoints(str(tmp_path), keep=2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step_00000002", "step_00000003"]
    assert restored_step(tmp_path) == 3


def test_the_manifest_lists_size_and_hash_of_every_part(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path), at_step(1))
    folder = tmp_path / "checkpoints" / "step_00000001"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for part in ("backbone", "optimizer", "ema"):
        assert files[part]["bytes"] == (folder / f"{part}.safetensors").stat().st_size
        assert len(files[part]["sha256"]) == 64
