"""Which checkpoint a run resumes from, and which checkpoints are kept."""

import json
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from run_files import losses

from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.evaluation.runs import read_run
from ifvit.models.weights import load_weights
from ifvit.storage import join, list_names, read_json, remove
from ifvit.training.checkpoint import (
    TrainState,
    fetch_newest,
    open_tensors,
    resume,
    step_url,
)
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.lease import Lease
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]


def newest_step(run: str, cache: Path) -> int:
    saved = fetch_newest(run, cache)
    assert saved is not None
    return saved.state.step


def test_damaged_checkpoints_are_skipped_but_a_run_with_no_other_is_not_started_anew(
    recipe: Recipe, tmp_path: Path
) -> None:
    config = recipe(max_steps=2, checkpoint_every=1)
    train(config)
    run = config.run
    newest = fetch_newest(run, tmp_path)
    assert newest is not None
    with open_tensors(newest, tmp_path) as read, pytest.raises(UserError, match=r"no ema0\.5\.a"):
        read("ema0.5.a")

    assert newest_step(run, tmp_path) == 2
    (path,) = Path(newest.url).glob("part-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert newest_step(run, tmp_path) == 1
    path.write_bytes(data[:-4])
    assert newest_step(run, tmp_path) == 1
    path.unlink()
    assert newest_step(run, tmp_path) == 1
    Path(newest.url, "manifest.json").write_text('{"parts": 3}')
    assert newest_step(run, tmp_path) == 1
    (path,) = Path(step_url(run, 1)).glob("part-*")
    path.unlink()
    with pytest.raises(UserError, match=r"step_00000002.* remove .*checkpoints to start anew"):
        fetch_newest(run, tmp_path)


def test_a_spike_stands_out_of_the_losses_before_it() -> None:
    calm = np.random.default_rng(0).normal(1.0, 0.1, size=400).tolist()
    jumps = {20: 1.9, 200: 2.2, 300: 3.0, 350: float("nan")}

    def observe(values: list[float]) -> TrainState:
        state = TrainState()
        for start in range(0, 400, 10):
            state = replace(state, step=start + 10).observe(values[start : start + 10])
        return state

    assert observe(calm).loss_spikes == 0
    jumping = observe([jumps.get(step, loss) for step, loss in enumerate(calm)])
    assert jumping.loss_spikes == 2  # the first jump comes before there is a history
    assert jumping.loss_mean == pytest.approx(1.0, abs=0.1)


def test_the_running_mean_of_losses_does_not_depend_on_how_often_they_are_observed() -> None:
    values = [1.0, 2.0, 0.5, 4.0]
    at_once = replace(TrainState(), step=4).observe(values)
    state = TrainState()
    for loss in values:
        state = replace(state, step=state.step + 1).observe([loss])
    assert state == at_once
    assert at_once.loss_mean == pytest.approx(np.mean(values))
    assert at_once.loss_variance == pytest.approx(np.var(values))


def test_resume_never_is_an_error_for_a_run_that_has_checkpoints(recipe: Recipe) -> None:
    config = recipe(max_steps=2, resume="never")
    Path(config.run, "checkpoints", "step_00000001").mkdir(parents=True)  # never completed
    train(config)
    with pytest.raises(UserError, match="holds checkpoints, but resume is never; choose another"):
        train(replace(config, max_steps=3))


@pytest.mark.parametrize("names_the_run", [True, False])
def test_a_run_may_start_from_another_and_then_resumes_its_own_checkpoints(
    recipe: Recipe, whole: TrainConfig, names_the_run: bool
) -> None:
    first = recipe("first", max_steps=4)
    train(first)
    url = first.run if names_the_run else step_url(first.run, 4)
    branch = recipe("branch", max_steps=6, resume=url)
    assert train(branch).step == 6
    assert list_names(join(first.run, "checkpoints")) == ["latest", "step_00000004"]
    remove(first.run)
    assert train(replace(branch, max_steps=8)).step == 8
    assert losses(branch, first_step=5) == losses(whole)[4:]
    for kind, decay in (("raw", None), ("ema", 0.9)):
        (mine, info), (theirs, _) = (
            load_weights(run, prefer=kind)  # type: ignore[arg-type]
            for run in (branch.run, whole.run)
        )
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
        assert (info.step, info.ema_decay) == (8, decay)


def test_a_checkpoint_that_does_not_fit_the_recipe_is_an_error(
    recipe: Recipe, whole: TrainConfig, other_shards: str
) -> None:
    with pytest.raises(UserError, match="holds no checkpoint; set resume to a run or"):
        train(recipe("a", resume=recipe("nowhere").run))
    with pytest.raises(UserError, match="has another backbone than the recipe"):
        train(recipe("b", resume=whole.run, backbone=replace(whole.backbone, width=16)))
    with pytest.raises(UserError, match=r"holds no ema0\.5\."):
        train(recipe("c", resume=whole.run, ema_decays=(0.5,)))
    with pytest.raises(UserError, match="trained on other shards"):
        train(recipe("d", resume=whole.run, shards=other_shards))


def test_a_run_that_another_job_holds_is_left_alone(recipe: Recipe) -> None:
    config = recipe()
    held = pytest.raises(UserError, match=r"in use by process .* choose another run directory")
    with Lease.acquire(config.run, beat_seconds=0.2).held(), held:
        train(config)
    assert not Path(config.run, "config.yaml").exists()
    train(replace(config, max_steps=1))
    assert read_json(join(config.run, "lease", "000002.beat")) == {"released": True}


def test_a_run_from_before_architectures_is_resumed(recipe: Recipe) -> None:
    config = recipe(max_steps=2)
    train(config)
    for path in (*Path(config.run).rglob("config.json"), *Path(config.run).rglob("manifest.json")):
        stored = json.loads(path.read_text())
        stored.get("backbone", stored).pop("architecture", None)
        path.write_text(json.dumps(stored))
    recipe_file = Path(config.run, "config.yaml")
    recipe_file.write_text(recipe_file.read_text().replace("  architecture: fusion_uvit\n", ""))
    assert train(replace(config, max_steps=3)).step == 3
    assert load_weights(config.run)[0].config == config.backbone


class SecondNode(ProcessGroup):
    """Engine and group of a process that shares neither disk nor memory with the main one."""

    world = World(rank=2, size=4, local_rank=0)

    def __init__(self, tmp_path: Path) -> None:
        self.group, self._main, self._folder = self, tmp_path / "main", tmp_path / "tmp"
        self.held: list[int] = []
        self.restored: dict[str, float] = {}

    def on_main(self, action: Callable[[], Any]) -> Any:
        """What the main process finds, which has downloaded it to its own disk."""
        found = action()
        for path in self._folder.rglob("*.safetensors"):
            path.unlink()
        return found

    def barrier(self) -> None:
        """Note how many files the processes of this node share."""
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
    assert len(losses(config)) == 3
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    node = SecondNode(tmp_path)
    state = resume(config, cast(Engine, node), "token")
    assert state.step == 3
    assert node.restored == {"elements": 4, "num_updates": 3}
    assert node.held == [1, 1]  # before any process reads, and after all have read
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.s3
def test_a_run_in_a_store_is_resumed_and_read_from_there(
    recipe: Recipe,
    whole: TrainConfig,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IFVIT_CACHE", str(tmp_path / "cache"))
    far = replace(recipe(), run=s3_bucket)
    train(replace(far, max_steps=5))
    train(far)
    assert losses(far) == losses(whole)
    for _ in range(2):
        (here, _), (there, info) = load_weights(whole.run), load_weights(far.run)
        assert info.step == 8
        assert all(map(torch.equal, here.parameters(), there.parameters()))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    run = read_run(far.run, "far")
    assert run.recipe is not None
    assert len(run.curve) == 8
