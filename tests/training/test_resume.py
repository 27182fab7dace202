"""Where a run starts, and that a run in an object store is a run like any other."""

import json
import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from run_files import write_evaluation

from ifvit.diffusion.objectives import Losses, NoisePrediction
from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.evaluation.runs import read_run
from ifvit.models.backbone import Backbone
from ifvit.models.weights import WeightsInfo, load_weights, save_weights
from ifvit.storage import join, list_names, read_bytes, read_json, remove, write_json
from ifvit.training import checkpoint as resume_module
from ifvit.training import hooks
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.guards import manifest_sha256
from ifvit.training.lease import Lease, _read_beat
from ifvit.training.loop import StepReport
from ifvit.training.state import TrainState
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]


def losses(run: str) -> dict[int, float]:
    rows = [json.loads(line) for line in read_bytes(join(run, "metrics.jsonl")).splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def test_never_refuses_a_run_that_has_checkpoints(recipe: Recipe) -> None:
    config = recipe(max_steps=2, resume="never")
    Path(config.run, "checkpoints", "step_00000001").mkdir(parents=True)  # never finished
    train(config)
    with pytest.raises(UserError, match="holds checkpoints, and resume is never; choose another"):
        train(replace(config, max_steps=3))


def test_every_step_draws_anew_and_its_loss_is_remembered(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def note(objective: NoisePrediction, *arguments: Any) -> Losses:
        steps.append(arguments[3])
        return real(objective, *arguments)

    real = NoisePrediction.__call__
    monkeypatch.setattr(NoisePrediction, "__call__", note)
    config = recipe(max_steps=2)
    train(config)
    state = train(replace(config, max_steps=3))
    assert steps == [0, 1, 2]
    assert state.loss_mean == pytest.approx(sum(losses(config.run).values()) / 3)


def test_rows_after_the_checkpoint_that_a_run_goes_on_from_are_dropped(recipe: Recipe) -> None:
    whole, broken = recipe("whole", max_steps=4), recipe("broken", max_steps=3, checkpoint_every=2)
    train(whole)
    train(broken)
    remove(join(broken.run, "checkpoints", "step_00000003"))
    metrics = Path(broken.run, "metrics.jsonl")
    with metrics.open("a") as file:
        file.write('{"step": 4, "loss": 0.')  # cut where the process was killed
    train(replace(broken, max_steps=4))
    assert len(metrics.read_text().splitlines()) == 4
    assert losses(broken.run) == losses(whole.run)


@pytest.mark.parametrize("whole_run", [True, False])
def test_a_run_may_start_from_another_and_then_goes_on_by_itself(
    recipe: Recipe, whole_run: bool
) -> None:
    first, whole = recipe("first", max_steps=4), recipe("whole")
    train(first)
    train(whole)
    url = first.run if whole_run else join(first.run, "checkpoints", "step_00000004")
    branch = recipe("branch", max_steps=6, resume=url)
    assert train(branch).step == 6
    assert list_names(join(first.run, "checkpoints")) == ["latest", "step_00000004"]
    remove(first.run)
    assert train(replace(branch, max_steps=8)).step == 8
    expected = losses(whole.run)
    assert losses(branch.run) == {step: expected[step] for step in (5, 6, 7, 8)}
    for kind, decay in (("raw", None), ("ema", 0.9)):
        (mine, info), (theirs, _) = (
            load_weights(run, prefer=kind)  # type: ignore[arg-type]
            for run in (branch.run, whole.run)
        )
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
        assert (info.step, info.ema_decay) == (8, decay)


def test_a_start_that_does_not_fit_is_refused(recipe: Recipe) -> None:
    first = recipe("first", max_steps=2)
    train(first)
    with pytest.raises(UserError, match="no checkpoint there; resume takes a run or"):
        train(recipe("a", resume=recipe("nowhere").run))
    with pytest.raises(UserError, match="holds a backbone of another shape"):
        train(recipe("b", resume=first.run, backbone=replace(first.backbone, width=16)))
    with pytest.raises(UserError, match=r"holds no ema0\.5\."):
        train(recipe("c", resume=first.run, ema_decays=(0.5,)))


def test_a_run_that_another_job_holds_is_refused(recipe: Recipe) -> None:
    config = recipe()
    refused = pytest.raises(UserError, match=r"in use by process .* choose another run directory")
    with Lease.acquire(config.run, beat_seconds=0.2).held(), refused:
        train(config)
    assert not Path(config.run, "config.yaml").exists()
    train(replace(config, max_steps=1))
    assert read_json(join(config.run, "lease", "000002.beat")) == {"released": True}


def test_a_save_that_fails_ends_the_run_soon_after(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, done = threading.Event(), count(1)

    def fail(folder: str, backbone: Backbone, info: WeightsInfo) -> None:
        if info.step == 8:
            failed.set()
            raise OSError(28, "No space left on device")
        save_weights(folder, backbone, info)

    def step(engine: Engine) -> torch.Tensor:
        assert next(done) <= 8 or failed.wait(60)
        return real(engine)

    real = Engine.step
    config = recipe(max_steps=1_000_000, checkpoint_every=4)
    monkeypatch.setattr(hooks, "save_weights", fail)
    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(UserError, match=r"saving step 8 failed on rank 0 .*No space left"):
        train(config)
    assert max(losses(config.run)) < 12  # where the next save would have told
    assert list_names(join(config.run, "checkpoints", "step_00000004"))[0] == "manifest.json"


def test_checkpoints_stay_as_the_recipe_says(recipe: Recipe) -> None:
    config = recipe(
        max_steps=8, checkpoint_every=1, keep_checkpoints=2, keep_every=3, keep_best="fid"
    )
    write_evaluation(config.run, 2, "fid", 1.0)
    train(config)
    kept = ["latest", *(f"step_0000000{step}" for step in (2, 3, 6, 7, 8))]
    assert list_names(join(config.run, "checkpoints")) == kept


def test_a_run_that_was_taken_over_commits_nothing_more(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(max_steps=1)

    def lose_lease(folder: str, backbone: Backbone, info: WeightsInfo) -> None:
        holder = read_json(join(config.run, "lease", "000001.json"))
        write_json(join(config.run, "lease", "000002.json"), {**holder, "host": "node7"})

    monkeypatch.setattr(hooks, "save_weights", lose_lease)
    with pytest.raises(UserError, match=r"taken over by process \d+ on node7"):
        train(config)
    assert not Path(config.run, "checkpoints", "latest").exists()
    (part,) = Path(config.run, "checkpoints", "step_00000001").iterdir()
    assert part.suffix == ".safetensors"


def test_rows_are_on_disk_before_the_checkpoint_that_goes_on_from_them(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_on_disk: list[int] = []

    def sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "metrics.jsonl":
            rows_on_disk.append(len(path.read_text().splitlines()))
        assert rows_on_disk or not path.name.startswith(".manifest.json.")

    def save(hook: hooks.SaveCheckpoint, state: TrainState, report: StepReport) -> None:
        assert list(losses(config.run)) == [1, 2]
        assert "released" not in _read_beat(config.run, 1)
        real(hook, state, report)

    real = hooks.SaveCheckpoint.__call__
    config = recipe(max_steps=2)
    monkeypatch.setattr(hooks.SaveCheckpoint, "__call__", save)
    monkeypatch.setattr(os, "fsync", sync)
    train(config)
    assert rows_on_disk == [2]


class SecondNode(ProcessGroup):
    """Engine and channel of a process that shares neither disk nor memory with the main one."""

    world = World(rank=2, size=4, local_rank=0)

    def __init__(self, config: TrainConfig, tmp_path: Path) -> None:
        self._config, self._elsewhere = config, tmp_path / "elsewhere"
        self._folder = tmp_path / "tmp"
        self.held: list[int] = []
        self.restored: dict[str, float] = {}

    def on_main(self, action: object) -> Any:
        """What the main process finds, and has downloaded to itself."""
        return resume_module._choose(self._config.run, "auto", self._elsewhere)

    def barrier(self) -> None:
        """Note how many files the processes of this node have in common."""
        self.held.append(sum(path.is_file() for path in self._folder.rglob("*")))

    def load_state(self, read: Callable[[str], torch.Tensor]) -> None:
        self.restored["elements"] = read("backbone.final_layer.bias").numel()

    def load_scalars(self, scalars: dict[str, float]) -> None:
        self.restored |= scalars


def test_every_node_fetches_the_checkpoint_for_its_processes_and_leaves_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(recipe(max_steps=3), run=f"memory://{uuid.uuid4().hex}")
    train(config)
    assert list(losses(config.run)) == [1, 2, 3]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    node = SecondNode(config, tmp_path)
    shards = manifest_sha256(config.shards)
    state = resume_module.resume(config, cast(Engine, node), node, shards, "token")
    assert state.step == 3
    assert node.restored == {"elements": 4, "num_updates": 3}
    assert node.held == [1, 1]  # when all may read, and when all have read
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.s3
def test_a_run_in_a_store_is_resumed_and_read_from_there(
    recipe: Recipe, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IFVIT_CACHE", str(tmp_path / "cache"))
    near, far = recipe("near"), replace(recipe(), run=s3_bucket)
    train(near)
    train(replace(far, max_steps=5))
    train(far)
    assert losses(far.run) == losses(near.run)
    for _ in range(2):
        (here, _), (there, info) = load_weights(near.run), load_weights(far.run)
        assert info.step == 8
        assert all(map(torch.equal, here.parameters(), there.parameters()))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    run = read_run(far.run, "far")
    assert run.recipe is not None
    assert len(run.curve) == 8
