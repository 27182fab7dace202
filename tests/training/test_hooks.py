"""Saves are complete or absent whatever fails, and sample grids show the EMA weights."""

import json
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from faulty_proxy import Fault, FaultyProxy
from run_files import small_recipe, write_evaluation
from torch import Tensor

from ifvit import connections, storage
from ifvit.diffusion.config import ObjectiveConfig, Precision, Prediction, SolverConfig
from ifvit.diffusion.sampler import ConditionBatch, Sampler, generate_images
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.images import decode_png, make_grid
from ifvit.models.config import NullContext
from ifvit.models.weights import WeightsInfo, load_weights, step_name
from ifvit.sampling.config import SamplingConfig
from ifvit.shards.format import EncoderIdentity, TextEncoderIdentity
from ifvit.shards.reader import ShardReader
from ifvit.storage import join, list_names
from ifvit.training import hooks, saving
from ifvit.training.checkpoint import (
    Part,
    fetch_newest,
    open_tensors,
    saved_steps,
    step_url,
    write_part,
)
from ifvit.training.config import SampleGridConfig, TrainConfig
from ifvit.training.engine import EngineScalars
from ifvit.training.guards import StopRequest
from ifvit.training.loop import StepReport, TrainState
from ifvit.training.saving import SaveCheckpoint
from ifvit.training.train import train

SHAPES = {"backbone.a": (40, 30), "backbone.b": (7,), "exp_avg.a": (40, 30), "ema0.9.a": (40, 30)}
REPORT = StepReport(grad_norm=0.0, learning_rate=0.0)
ENCODER = EncoderIdentity(name="made-up", sha256="0" * 64)
INFO = WeightsInfo(
    step=0,
    ema_decay=None,
    scaling_factor=1.0,
    vae=ENCODER,
    text_encoder=TextEncoderIdentity(name="made-up", sha256="0" * 64),
    recipe_sha256="0" * 64,
)


class ThreadGroup(ProcessGroup):
    """The process group of ranks that are threads of one process."""

    def __init__(self, world: World, barrier: threading.Barrier, values: list[Any]) -> None:
        self.world, self._barrier, self._values = world, barrier, values

    def gather(self, value: Any) -> list[Any]:
        self._values[self.world.rank] = value
        self._barrier.wait()
        gathered = list(self._values)
        self._barrier.wait()
        return gathered


class StateOfStep:
    """The part of an engine that saves use; its tensors hold their step and number."""

    ema_decays = (0.9,)

    def __init__(self, group: ThreadGroup) -> None:
        self.group, self.world = group, group.world
        self.live = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.synchronized = threading.Event()

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.live.items()

    def scalars(self) -> EngineScalars:
        return EngineScalars(num_updates=7)

    def synchronize(self) -> None:
        self.synchronized.set()


def expected_state(step: int) -> dict[str, Tensor]:
    return {
        name: torch.full(shape, float(100 * step + index))
        for index, (name, shape) in enumerate(SHAPES.items())
    }


class Rank:
    """One process that saves: the hook under test with what it is given."""

    def __init__(self, config: TrainConfig, group: ThreadGroup, token: str) -> None:
        self.engine, self.stop = (
            StateOfStep(group),
            StopRequest(World(rank=0, size=1, local_rank=0)),
        )
        other = SimpleNamespace(token=token, check=lambda: None, publish=lambda: None)
        self.hook = SaveCheckpoint(
            config, cast(Any, self.engine), INFO, cast(Any, other), cast(Any, other), self.stop
        )

    def save(self, step: int) -> None:
        self.engine.live = expected_state(step)
        self.hook(TrainState(step=step, samples_seen=8 * step, seconds=1.5), REPORT)


@pytest.fixture
def ranks(shards: str) -> Callable[..., list[Rank]]:
    """Builds the ranks of one attempt at a run."""

    def build(run: str, num_ranks: int = 1, token: str = "aaaa", **fields: object) -> list[Rank]:
        barrier, values = threading.Barrier(num_ranks), [None] * num_ranks
        worlds = [World(rank=rank, size=num_ranks, local_rank=rank) for rank in range(num_ranks)]
        config = small_recipe(run, shards, **fields)
        return [Rank(config, ThreadGroup(world, barrier, values), token) for world in worlds]

    return build


Ranks = Callable[..., list[Rank]]


class Exports(dict[str, dict[str, Tensor]]):
    """Exported weights by folder; an export of step `fails_at` finds the disk full."""

    fails_at: int | None = None

    def save_weights(self, folder: str, weights: dict[str, Tensor], info: WeightsInfo) -> None:
        if info.step == self.fails_at:
            raise OSError(28, "No space left on device")
        self[folder] = {name: tensor.clone() for name, tensor in weights.items()}


@pytest.fixture(autouse=True)
def exports(request: pytest.FixtureRequest) -> Iterator[Exports]:
    """Records exports instead of writing them, because the tensors above are no backbone."""
    recorded = Exports()
    with pytest.MonkeyPatch.context() as patched:
        if "recipe" not in request.fixturenames:
            patched.setattr(saving, "exported_backbone", lambda config, weights: weights)
            patched.setattr(saving, "save_weights", recorded.save_weights)
        yield recorded


def save(ranks: list[Rank], step: int) -> None:
    """Save on all ranks and wait; raises what they raise."""
    for rank in ranks:
        rank.save(step)
    for rank in ranks:
        rank.hook.wait()


def restored_step(run: str, cache: Path) -> int | None:
    """Step that would be resumed; every tensor must be that step's."""
    saved = fetch_newest(run, cache)
    if saved is None:
        return None
    with open_tensors(saved, cache) as read:
        for name, tensor in expected_state(saved.state.step).items():
            assert torch.equal(read(name), tensor)
    assert sum(len(part.tensors) for part in saved.parts) == len(SHAPES)
    return saved.state.step


@pytest.mark.parametrize("num_ranks", [1, 3, 6])
def test_what_any_number_of_ranks_saved_is_restored(
    run: str, cache: Path, ranks: Ranks, num_ranks: int
) -> None:
    assert fetch_newest(run, cache) is None
    save(ranks(run, num_ranks), 7)
    saved = fetch_newest(run, cache)
    assert saved is not None
    assert saved.state == TrainState(step=7, samples_seen=56, seconds=1.5)
    assert saved.scalars == EngineScalars(num_updates=7)
    assert len(saved.parts) == num_ranks
    assert restored_step(run, cache) == 7
    assert storage.read_bytes(join(run, "checkpoints", "latest")) == b"step_00000007\n"


def test_partitions_are_balanced_and_named_in_a_plain_json_manifest(
    tmp_path: Path, ranks: Ranks, exports: Exports
) -> None:
    run = str(tmp_path)
    save(ranks(run, 3), 1)
    stored = json.loads(Path(step_url(run, 1), "manifest.json").read_text())
    assert stored["state"]["samples_seen"] == 8
    assert [part["tensors"] for part in stored["parts"]] == [
        ["backbone.a"],
        ["backbone.b", "ema0.9.a"],
        ["exp_avg.a"],
    ]
    for rank, part in enumerate(stored["parts"]):
        assert part["name"] == f"part-{rank:05d}-of-00003-aaaa.safetensors"
        assert part["bytes"] == Path(step_url(run, 1), part["name"]).stat().st_size
    state = expected_state(1)
    weights = f"{run}/weights/step_00000001"
    assert {folder: list(tensors) for folder, tensors in exports.items()} == {
        f"{weights}/raw": ["a", "b"],
        f"{weights}/ema": ["a"],
    }
    assert torch.equal(exports[f"{weights}/ema"]["a"], state["ema0.9.a"])


def test_training_continues_during_a_save_and_does_not_change_it(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, release = str(tmp_path), threading.Event()
    (rank,) = ranks(run)

    def write_late(folder: str, name: str, tensors: dict[str, Tensor]) -> Part:
        assert rank.engine.synchronized.is_set()
        assert release.wait(60)
        return write_part(folder, name, tensors)

    monkeypatch.setattr(saving, "write_part", write_late)
    rank.save(1)
    for tensor in rank.engine.live.values():
        tensor.fill_(-1.0)
    assert fetch_newest(run, tmp_path) is None
    release.set()
    rank.hook.wait()
    assert restored_step(run, tmp_path) == 1


def test_a_failed_save_stops_every_rank_and_is_raised_by_the_next_save(
    tmp_path: Path, ranks: Ranks, exports: Exports
) -> None:
    exports.fails_at = 2
    both = ranks(str(tmp_path), 2)
    save(both, 1)
    for rank in both:
        rank.save(2)
    with ThreadPoolExecutor(2) as threads:
        for failure in [threads.submit(rank.save, 3) for rank in both]:
            with pytest.raises(UserError, match=r"step 2 failed on rank 0 .*No space left .*again"):
                failure.result()
    for rank in both:
        rank.stop.ask()
        assert rank.stop.answer() is not None
    assert restored_step(str(tmp_path), tmp_path) == 1


def test_an_exit_that_promises_a_save_waits_for_it(
    tmp_path: Path, ranks: Ranks, exports: Exports
) -> None:
    def preempt(rank: Rank) -> None:
        with rank.hook.open():
            rank.save(1)
            raise SystemExit(75)

    def end(rank: Rank) -> None:
        with rank.hook.open():
            rank.save(1)

    with pytest.raises(SystemExit, match="75"):
        preempt(*ranks(str(tmp_path / "good")))
    assert restored_step(str(tmp_path / "good"), tmp_path) == 1
    exports.fails_at = 1
    for leave in (preempt, end):
        with pytest.raises(UserError, match="saving step 1 failed"):
            leave(*ranks(str(tmp_path / "bad")))


def test_a_full_disk_loses_only_the_save(tmp_path: Path, ranks: Ranks) -> None:
    run = str(tmp_path)
    save(ranks(run), 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to write, as it does when a disk is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        with pytest.raises(
            UserError, match=f"{run}: saving step 2 failed on rank 0 .*run the same"
        ):
            save(ranks(run, token="bbbb"), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert restored_step(run, tmp_path) == 1
    save(ranks(run, token="cccc"), 2)
    assert restored_step(run, tmp_path) == 2


def test_old_checkpoints_that_cannot_be_removed_stay_until_the_next_save(
    tmp_path: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(url: str) -> None:
        raise OSError(39, "Directory not empty", url)

    run = str(tmp_path / "run")
    one = ranks(run, keep_checkpoints=1)
    save(one, 1)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "remove", refuse)
        save(one, 2)
    assert "older checkpoints and weights stay until the next save" in capsys.readouterr().err
    assert saved_steps(run) == [1, 2]
    save(one, 3)
    assert saved_steps(run) == [3]


@pytest.mark.parametrize("done", [False, True])
def test_a_kill_at_any_file_of_a_local_save_leaves_a_complete_checkpoint(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    real = storage.publish
    for operation in range(100):
        run = str(tmp_path / str(operation))
        save(ranks(run, token="old"), 1)
        count = 0

        def dying(temporary: Path, path: Path, operation: int = operation) -> None:
            nonlocal count
            if (done and count <= operation) or (not done and count < operation):
                real(temporary, path)
            if count >= operation:
                raise KeyboardInterrupt
            count += 1

        monkeypatch.setattr(storage, "publish", dying)
        try:
            save(ranks(run, token="new"), 2)
        except KeyboardInterrupt:
            monkeypatch.setattr(storage, "publish", real)
        else:
            break
        assert restored_step(run, tmp_path) == (2 if operation + done >= 2 else 1)
        save(ranks(run, token="newer"), 2)
        assert restored_step(run, tmp_path) == 2
        folder = Path(run, "checkpoints", "step_00000002")
        assert {path.name for path in folder.iterdir()} == {
            "manifest.json",
            "part-00000-of-00001-newer.safetensors",
        }
    assert operation == 3  # a part, the manifest and `latest`


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["drop", "lose_answer"])
def test_a_kill_at_any_request_of_a_remote_save_leaves_a_complete_checkpoint(
    kind: Any,
    faulty_s3: FaultyProxy,
    s3_bucket: str,
    cache: Path,
    ranks: Ranks,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From one request on nothing changes the store, as when the client is killed."""
    for operation in range(1, 100):
        run = join(s3_bucket, str(operation))
        save(ranks(run, token="old", keep_checkpoints=1), 1)
        write = Fault(kind, method="[PD]*", first=operation)
        faulty_s3.plan(write, replace(write, kind="drop", first=operation + 1, times=None))
        monkeypatch.setenv("IFVIT_STORE_PATIENCE", "0")
        try:
            save(ranks(run, token="new", keep_checkpoints=1), 2)
        except UserError:
            pass
        else:
            if "older checkpoints" not in capsys.readouterr().err:
                break
        finally:
            faulty_s3.plan()
            monkeypatch.delenv("IFVIT_STORE_PATIENCE")
        is_committed = operation > 2 or (operation == 2 and kind == "lose_answer")
        assert restored_step(run, cache) == (2 if is_committed else 1)
        save(ranks(run, token="newer", keep_checkpoints=1), 2)
        assert restored_step(run, cache) == 2
        assert list_names(join(run, "checkpoints")) == ["latest", "step_00000002"]
        assert len(list_names(step_url(run, 2))) == 2
    assert operation == 6  # a part, the manifest, `latest`, the old manifest and the old folder


@pytest.mark.s3
@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, "PUT") for kind in ("status", "drop", "lose_answer", "hang", "delay")]
    + [("status", "HEAD"), ("hang", "HEAD")],
)
def test_a_store_that_fails_for_a_while_only_delays_a_save(
    kind: Any,
    method: str,
    faulty_s3: FaultyProxy,
    s3_bucket: str,
    cache: Path,
    ranks: Ranks,
    impatient: None,
) -> None:
    for key in ("*/part-*", "*/manifest.json"):
        times = 1 if kind == "hang" else 2  # each takes two seconds to be noticed
        faulty_s3.plan(Fault(kind, method=method, key=key, times=times, delay=0.2))
        save(ranks(s3_bucket, token=key[2:6]), 1)
        assert faulty_s3.hits
        faulty_s3.hits.clear()
        assert restored_step(s3_bucket, cache) == 1


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["status", "reset", "truncate", "shorten", "flip"])
def test_a_part_that_arrives_damaged_is_read_again(
    kind: Any, faulty_s3: FaultyProxy, s3_bucket: str, cache: Path, ranks: Ranks
) -> None:
    save(ranks(s3_bucket), 1)
    faulty_s3.plan(Fault(kind, method="GET", key="*/part-*", times=2))
    assert restored_step(s3_bucket, cache) == 1
    assert len(faulty_s3.hits) == 2


@pytest.mark.s3
def test_a_store_that_is_away_too_long_is_no_reason_to_take_an_older_checkpoint(
    faulty_s3: FaultyProxy,
    s3_bucket: str,
    cache: Path,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in (1, 2):
        save(ranks(s3_bucket), step)
    monkeypatch.setenv("IFVIT_STORE_PATIENCE", "0.5")
    faulty_s3.plan(Fault("status", method="GET", key="*/step_00000002/part-*", times=None))
    with pytest.raises(connections.StoreError, match="the store fails"):
        fetch_newest(s3_bucket, cache)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"keep_checkpoints": 2}, [4, 5]),
        ({"keep_every": 2}, [2, 4, 5]),
        ({"keep_best": "frechet_distance"}, [2, 5]),
        ({"keep_best": "count_accuracy", "keep_every": 3}, [1, 3, 5]),
    ],
)
def test_the_newest_every_mth_and_the_best_checkpoints_are_kept(
    run: str, ranks: Ranks, fields: dict[str, Any], kept: list[int]
) -> None:
    metric = fields.get("keep_best", "clip_score")
    write_evaluation(run, 8, metric, 1.0)  # of steps whose checkpoints are gone
    write_evaluation(run, 9, metric, 10.0)
    for step, value in enumerate((9.0, 5.0, None, 7.0, 6.0), start=1):
        write_evaluation(run, step, metric, value)
        save(ranks(run, **{"keep_checkpoints": 1, **fields}), step)
    assert saved_steps(run) == kept


@pytest.mark.parametrize(
    ("fields", "exported"),
    [
        ({}, [2, 4, 5, 6, 7]),
        ({"keep_best": None, "keep_exports": 1}, [7]),
        ({"export_every": 2, "keep_exports": 3}, [2, 4, 6, 7]),
    ],
)
def test_the_last_the_newest_and_the_best_exports_are_kept(
    recipe: Callable[..., TrainConfig], fields: dict[str, Any], exported: list[int]
) -> None:
    config = recipe(
        **{
            **{"max_steps": 7, "checkpoint_every": 1, "keep_exports": 4},
            **{"keep_best": "clip_score", **fields},
        }
    )
    write_evaluation(config.run, 2, "clip_score", 0.9)
    write_evaluation(config.run, 6, "clip_score", 0.5)
    train(config)
    folder = Path(config.run, "weights")
    assert sorted(path.name for path in folder.iterdir()) == list(map(step_name, exported))
    for step in exported:
        for kind in ("raw", "ema"):
            assert load_weights(str(folder / step_name(step) / kind))[1].step == step


def test_weights_of_others_are_not_pruned(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe(max_steps=1)
    train(config)
    folder = Path(config.run, "weights")
    (folder / step_name(1)).rename(folder / step_name(0))  # says step 1
    (folder / "step_3").mkdir()
    (folder / step_name(2) / "ema").mkdir(parents=True)
    (folder / step_name(2) / "ema" / "thesis.tex").write_text("precious")
    train(replace(config, max_steps=5, checkpoint_every=1, keep_exports=1))
    found = {path.name for path in folder.iterdir()}
    assert found == {step_name(0), step_name(2), "step_3", step_name(5)}
    assert (folder / step_name(2) / "ema" / "thesis.tex").read_text() == "precious"
    assert {path.name for path in (folder / step_name(0) / "ema").iterdir()} == {
        *("config.json", "weights.json", "diffusion_pytorch_model.safetensors")
    }


@pytest.mark.parametrize("name", ["beauty", "weights", "seconds_per_image"])
def test_a_metric_that_no_evaluation_has_is_an_error(
    tmp_path: Path, ranks: Ranks, name: str
) -> None:
    with pytest.raises(UserError, match=f"keep_best: evaluations have no metric named {name}"):
        ranks(str(tmp_path), keep_best=name)


def test_pruning_removes_what_interrupted_saves_left(run: str, ranks: Ranks) -> None:
    save(ranks(run), 1)
    for step in (2, 3):
        part = "part-00000-of-00002-dead.safetensors"
        storage.write_bytes(join(step_url(run, step), part), b"half")
    save(ranks(run), 3)
    assert list_names(join(run, "checkpoints")) == ["latest", "step_00000001", "step_00000003"]
    assert list_names(step_url(run, 3)) == ["manifest.json", "part-00000-of-00001-aaaa.safetensors"]


def decode(latents: Tensor) -> Tensor:
    """Three of four latent channels are the picture."""
    return latents[:, :3] / 0.5


@pytest.mark.parametrize(
    ("null_context", "prediction", "precision"),
    [("empty_caption", "epsilon", "fp32"), ("zeros", "flow", "bf16")],
)
def test_the_grid_shows_what_the_ema_weights_generate(
    recipe: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    null_context: NullContext,
    prediction: Prediction,
    precision: Precision,
) -> None:
    monkeypatch.setattr(hooks, "load_decoder", lambda info, device: decode)
    monkeypatch.setattr(hooks, "SamplingConfig", partial(SamplingConfig, batch_size=10))
    grid = SampleGridConfig(every=4, num_steps=3, guidance_scale=2.5, precision=precision)
    config = recipe(
        sample_grid=grid,
        checkpoint_every=4,
        scaling_factor=0.5,
        null_context=null_context,
        objective=ObjectiveConfig(prediction=prediction),
    )
    train(config)
    reader = ShardReader(config.shards)
    contexts = torch.from_numpy(np.stack([reader.context(i, 0) for i in range(16)]))
    null = torch.from_numpy(np.array(reader.null_context))[None]
    if null_context == "zeros":
        null.zero_()
    solver = SolverConfig(num_steps=3, guidance_scale=2.5, precision=precision)
    schedule = NoiseSchedule("cpu", prediction)
    grids = []
    for step in (4, 8):
        backbone, _ = load_weights(f"{config.run}/weights/step_{step:08d}/ema")
        # A grid of lower precision has not rounded the EMA weights.
        assert any((one != one.bfloat16()).any() for one in backbone.parameters())
        sampler = Sampler(backbone=backbone, schedule=schedule, decode=decode, null_condition=null)
        batch = ConditionBatch(positions=torch.arange(16), condition=contexts)
        (images,) = generate_images(sampler, [batch], solver)
        expected = np.asarray(make_grid(images, 8))
        found = decode_png(Path(config.run, "samples", f"step_{step:08d}.png").read_bytes())
        np.testing.assert_array_equal(found, expected)
        grids.append(found)
    assert (grids[0] != grids[1]).any()
