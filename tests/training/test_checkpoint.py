"""A checkpoint is complete or it is absent, and what was complete is never lost."""

import json
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from faulty_proxy import Fault, FaultyProxy
from run_files import write_evaluation
from torch import Tensor

from ifvit import storage
from ifvit import storage as object_store
from ifvit.distributed import ProcessGroup, World
from ifvit.errors import UserError
from ifvit.storage import join, list_names, remove
from ifvit.training import checkpoint as retention
from ifvit.training import hooks as checkpoint_saver
from ifvit.training.checkpoint import (
    Checkpoint,
    Part,
    Retention,
    fetch_newest,
    kept_steps,
    open_tensors,
    prune,
    saved_steps,
    step_url,
    write_part,
)
from ifvit.training.hooks import CheckpointSaver, HostCopy
from ifvit.training.state import TrainState

SHAPES = {"backbone.a": (40, 30), "backbone.b": (7,), "exp_avg.a": (40, 30), "ema0.9.a": (40, 30)}


class Exchange(ProcessGroup):
    """The side channel of ranks that are threads of one process."""

    def __init__(self, world: World, barrier: threading.Barrier, values: list[Any]) -> None:
        self.world, self._barrier, self._values = world, barrier, values

    def gather(self, value: Any) -> list[Any]:
        self._values[self.world.rank] = value
        self._barrier.wait()
        gathered = list(self._values)
        self._barrier.wait()
        return gathered


def savers(
    run: str,
    num_ranks: int = 1,
    attempt: str = "aaaa",
    finish: Callable[[int, dict[str, Tensor]], None] = lambda step, tensors: None,
    on_failure: Callable[[], None] = lambda: None,
    kept: Retention = Retention(last=2),  # noqa: B008
) -> list[CheckpointSaver]:
    """One saver per rank."""
    barrier, values = threading.Barrier(num_ranks), [None] * num_ranks
    worlds = [World(rank=rank, size=num_ranks, local_rank=rank) for rank in range(num_ranks)]
    return [
        CheckpointSaver(
            run,
            attempt,
            world,
            Exchange(world, barrier, values),
            exported=lambda name: name.startswith("backbone."),
            finish=finish,
            prune=lambda: prune(run, kept),
            on_failure=on_failure,
        )
        for world in worlds
    ]


def state_at(step: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors that tell their step and name."""
    for index, (name, shape) in enumerate(SHAPES.items()):
        yield name, torch.full(shape, float(100 * step + index))


def draft_at(step: int) -> Checkpoint:
    return Checkpoint(
        state=TrainState(step=step, samples_seen=8 * step, seconds=1.5),
        scalars={"num_updates": float(step)},
        backbone={"width": 32},
        recipe_sha256="r",
        shards_sha256="s",
        parts=(),
    )


def save(ranks: list[CheckpointSaver], step: int) -> None:
    """Save on all ranks and wait; raises what they raise."""
    for rank in ranks:
        rank.save(state_at(step), draft_at(step), lambda: None)
    for rank in ranks:
        rank.wait()


def restored_step(run: str, cache: Path) -> int | None:
    """Step that would be resumed; every tensor must be that step's."""
    found = fetch_newest(run, cache)
    if found is None:
        return None
    url, checkpoint = found
    with open_tensors(url, checkpoint, cache) as read:
        for name, tensor in state_at(checkpoint.state.step):
            assert torch.equal(read(name), tensor)
    assert sum(len(part.tensors) for part in checkpoint.parts) == len(SHAPES)
    return checkpoint.state.step


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run directory of either kind."""
    return (
        str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_bucket")
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that hang end after two seconds, and retries are left to us."""
    config = {"connect_timeout": 2, "read_timeout": 2, "retries": {"max_attempts": 1}}
    monkeypatch.setattr(object_store, "_S3_OPTIONS", {"config_kwargs": config})
    monkeypatch.setattr(object_store, "STALL_SECONDS", 2.0)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)


def test_what_cannot_be_removed_stays_until_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(url: str) -> None:
        raise OSError(39, "Directory not empty", url)

    run = str(tmp_path / "run")
    ranks = savers(run, kept=Retention(last=1))
    save(ranks, 1)
    with monkeypatch.context() as patched:
        patched.setattr(retention, "remove", refuse)
        save(ranks, 2)
    assert "older checkpoints stay until the next save" in capsys.readouterr().err
    assert saved_steps(run) == [1, 2]
    save(ranks, 3)
    assert saved_steps(run) == [3]


@pytest.mark.parametrize("num_ranks", [1, 3, 6])
def test_what_any_number_of_ranks_saved_is_restored(run: str, cache: Path, num_ranks: int) -> None:
    assert fetch_newest(run, cache) is None
    save(savers(run, num_ranks), 7)
    found = fetch_newest(run, cache)
    assert found is not None
    assert found[1].state == TrainState(step=7, samples_seen=56, seconds=1.5)
    assert found[1].scalars == {"num_updates": 7.0}
    assert len(found[1].parts) == num_ranks
    assert restored_step(run, cache) == 7
    assert storage.read_bytes(join(run, "checkpoints", "latest")) == b"step_00000007\n"


def test_shares_are_balanced_and_only_the_main_rank_exports(tmp_path: Path) -> None:
    exported: dict[str, Tensor] = {}
    finished: list[int] = []

    def finish(step: int, tensors: dict[str, Tensor]) -> None:
        finished.append(step)
        exported.update(tensors)

    ranks = savers(str(tmp_path), 3, finish=finish)
    save(ranks, 1)
    assert finished == [1]
    found = fetch_newest(str(tmp_path), tmp_path)
    assert found is not None
    tensors = [part.tensors for part in found[1].parts]
    assert tensors == [("backbone.a",), ("backbone.b", "ema0.9.a"), ("exp_avg.a",)]
    assert exported.keys() == {"backbone.a", "backbone.b"}
    held = [set(rank._copy.tensors) for rank in ranks]  # host memory is not for what others write
    assert held == [set(exported), {"backbone.b", "ema0.9.a"}, {"exp_avg.a"}]


def test_host_copies_are_made_once_and_filled_at_every_save() -> None:
    copy = HostCopy()
    copy.update("a", torch.zeros(3))
    place = copy.tensors["a"].data_ptr()
    copy.update("a", torch.ones(3))
    assert copy.tensors["a"].data_ptr() == place
    assert copy.tensors["a"].tolist() == [1, 1, 1]


def test_training_goes_on_while_a_save_runs_and_does_not_touch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, release, copied = str(tmp_path), threading.Event(), threading.Event()

    def write_late(folder: str, name: str, tensors: dict[str, Tensor]) -> Part:
        assert copied.is_set()
        assert release.wait(60)
        return write_part(folder, name, tensors)

    monkeypatch.setattr(checkpoint_saver, "write_part", write_late)
    (saver,) = savers(run)
    live = dict(state_at(1))
    saver.save(live.items(), draft_at(1), copied.set)
    for tensor in live.values():
        tensor.fill_(-1.0)
    assert fetch_newest(run, tmp_path) is None
    release.set()
    saver.wait()
    assert restored_step(run, tmp_path) == 1


def test_a_failure_is_raised_by_the_next_save_on_every_rank(tmp_path: Path) -> None:
    def fail(step: int, tensors: dict[str, Tensor]) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")

    stops: list[int] = []
    ranks = savers(str(tmp_path), 2, finish=fail, on_failure=lambda: stops.append(1))
    save(ranks, 1)
    for rank in ranks:
        rank.save(state_at(2), draft_at(2), lambda: None)
    with ThreadPoolExecutor(2) as threads:
        failures = [
            threads.submit(rank.save, state_at(3), draft_at(3), lambda: None) for rank in ranks
        ]
        for failure in failures:
            with pytest.raises(
                UserError, match=r"step 2 failed on rank 0 .*No space left .*before"
            ):
                failure.result()
    assert len(stops) == 2
    assert restored_step(str(tmp_path), tmp_path) == 1


def test_an_end_that_promises_a_save_waits_for_it(tmp_path: Path) -> None:
    def fail(step: int, tensors: dict[str, Tensor]) -> None:
        raise OSError(28, "No space left on device")

    def preempt(saver: CheckpointSaver) -> None:
        with saver.open():
            saver.save(state_at(1), draft_at(1), lambda: None)
            raise SystemExit(75)

    def end(saver: CheckpointSaver) -> None:
        with saver.open():
            saver.save(state_at(1), draft_at(1), lambda: None)

    with pytest.raises(SystemExit, match="75"):
        preempt(*savers(str(tmp_path / "good")))
    assert restored_step(str(tmp_path / "good"), tmp_path) == 1
    for leave in (preempt, end):
        with pytest.raises(UserError, match="saving step 1 failed"):
            leave(*savers(str(tmp_path / "bad"), finish=fail))


def test_a_disk_that_is_full_loses_only_the_save(tmp_path: Path) -> None:
    run = str(tmp_path)
    save(savers(run), 1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, unlimited[1])
    )  # the kernel refuses, as it would
    try:
        with pytest.raises(
            UserError, match=f"{run}: saving step 2 failed on rank 0 .*run the same"
        ):
            save(savers(run, attempt="bbbb"), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert restored_step(run, tmp_path) == 1
    save(savers(run, attempt="cccc"), 2)
    assert restored_step(run, tmp_path) == 2


@pytest.mark.parametrize("done", [False, True])
def test_a_kill_at_any_file_of_a_local_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    real = storage.publish
    for operation in range(100):
        run = str(tmp_path / str(operation))
        save(savers(run, attempt="old"), 1)
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
            save(savers(run, attempt="new"), 2)
        except KeyboardInterrupt:
            monkeypatch.undo()
        else:
            break
        assert restored_step(run, tmp_path) == (2 if operation + done >= 2 else 1)
        save(savers(run, attempt="newer"), 2)
        assert restored_step(run, tmp_path) == 2
        folder = Path(run, "checkpoints", "step_00000002")
        assert {path.name for path in folder.iterdir()} == {
            "manifest.json",
            "part-00000-of-00001-newer.safetensors",
        }
    assert operation == 3  # a part, the manifest, `latest`, and then nothing was left to break


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["drop", "lose_answer"])
def test_a_kill_at_any_request_of_a_remote_save_leaves_a_whole_checkpoint(
    kind: Any,
    faulty_s3: FaultyProxy,
    s3_bucket: str,
    cache: Path,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From one request on nothing changes the store any more: to it that is a killed client."""
    for operation in range(1, 100):
        run = join(s3_bucket, str(operation))
        save(savers(run, attempt="old", kept=Retention(last=1)), 1)
        write = Fault(kind, method="[PD]*", first=operation)
        faulty_s3.plan(write, replace(write, kind="drop", first=operation + 1, times=None))
        monkeypatch.setenv("IFVIT_STORE_PATIENCE", "0")
        try:
            save(savers(run, attempt="new", kept=Retention(last=1)), 2)
        except UserError:
            pass
        else:
            if "older checkpoints stay" not in capsys.readouterr().err:
                break
        finally:
            faulty_s3.plan()
            monkeypatch.delenv("IFVIT_STORE_PATIENCE")
        is_committed = operation > 2 or (operation == 2 and kind == "lose_answer")
        assert restored_step(run, cache) == (2 if is_committed else 1)
        save(savers(run, attempt="newer", kept=Retention(last=1)), 2)
        assert restored_step(run, cache) == 2
        assert list_names(join(run, "checkpoints")) == ["latest", "step_00000002"]
        assert len(list_names(step_url(run, 2))) == 2
    assert operation == 6  # a part, the manifest, `latest`; the old manifest and the old folder go


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
    impatient: None,
) -> None:
    for key in ("*/part-*", "*/manifest.json"):
        faulty_s3.plan(Fault(kind, method=method, key=key, times=2, delay=0.2))
        save(savers(s3_bucket, attempt=key[2:6]), 1)
        assert faulty_s3.hits
        faulty_s3.hits.clear()
        assert restored_step(s3_bucket, cache) == 1


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["status", "reset", "truncate", "shorten", "flip"])
def test_what_arrives_damaged_is_read_again(
    kind: Any, faulty_s3: FaultyProxy, s3_bucket: str, cache: Path
) -> None:
    save(savers(s3_bucket), 1)
    faulty_s3.plan(Fault(kind, method="GET", key="*/part-*", times=2))
    assert restored_step(s3_bucket, cache) == 1
    assert len(faulty_s3.hits) == 2


@pytest.mark.s3
def test_a_store_that_is_away_for_too_long_is_no_reason_to_start_over(
    faulty_s3: FaultyProxy, s3_bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(savers(s3_bucket), 1)
    save(savers(s3_bucket), 2)
    monkeypatch.setenv("IFVIT_STORE_PATIENCE", "0.5")
    faulty_s3.plan(Fault("status", method="GET", key="*/step_00000002/part-*", times=None))
    with pytest.raises(object_store.StoreError, match="the store fails"):
        fetch_newest(s3_bucket, cache)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step in (1, 2):
        save(savers(run), step)
    (path,) = Path(step_url(run, 2)).glob("part-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert restored_step(run, tmp_path) == 1
    path.write_bytes(data[:-4])
    assert restored_step(run, tmp_path) == 1
    path.unlink()
    assert restored_step(run, tmp_path) == 1
    Path(step_url(run, 2), "manifest.json").write_text('{"parts": 3}')
    assert restored_step(run, tmp_path) == 1


def test_a_run_with_only_damaged_checkpoints_is_not_started_over(run: str, cache: Path) -> None:
    save(savers(run), 1)
    (name,) = set(list_names(step_url(run, 1))) - {"manifest.json"}
    remove(join(step_url(run, 1), name))
    with pytest.raises(UserError, match=f"{name}.* remove .*checkpoints to start anew"):
        fetch_newest(run, cache)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    save(savers(str(tmp_path)), 1)
    found = fetch_newest(str(tmp_path), tmp_path)
    assert found is not None
    with open_tensors(*found, tmp_path) as read, pytest.raises(UserError, match=r"no ema0\.5\.a"):
        read("ema0.5.a")


@pytest.mark.parametrize(
    ("retention", "best", "kept"),
    [
        (Retention(last=1), None, {70}),
        (Retention(last=3), None, {50, 60, 70}),
        (Retention(last=99), None, {10, 20, 30, 40, 50, 60, 70}),
        (Retention(last=1, every=30), None, {30, 60, 70}),
        (Retention(last=2, every=40), 10, {10, 40, 60, 70}),
    ],
)
def test_kept_are_the_newest_every_mth_and_the_best(
    retention: Retention, best: int | None, kept: set[int]
) -> None:
    assert kept_steps([10, 20, 30, 40, 50, 60, 70], retention, best) == kept


@pytest.mark.parametrize(
    ("metric", "best"), [("frechet_distance", "step_00000002"), ("count_accuracy", "step_00000001")]
)
def test_the_best_evaluation_keeps_its_checkpoint(run: str, metric: str, best: str) -> None:
    write_evaluation(run, 8, metric, 1.0)  # of steps whose checkpoints are gone
    write_evaluation(run, 9, metric, 10.0)
    for step, value in ((1, 9.0), (2, 5.0), (3, None), (4, 7.0)):
        write_evaluation(run, step, metric, value)
        save(savers(run, kept=Retention(last=1, metric=metric)), step)
    assert list_names(join(run, "checkpoints")) == ["latest", best, "step_00000004"]
    with pytest.raises(UserError, match="keep_best: evaluations have no number named beauty"):
        Retention(last=1, metric="beauty")


def test_pruning_removes_what_interrupted_saves_left(run: str) -> None:
    save(savers(run), 1)
    storage.write_bytes(join(step_url(run, 2), "part-00000-of-00002-dead.safetensors"), b"half")
    storage.write_bytes(join(step_url(run, 3), "part-00000-of-00002-dead.safetensors"), b"half")
    save(savers(run), 3)
    assert list_names(join(run, "checkpoints")) == ["latest", "step_00000001", "step_00000003"]
    assert list_names(step_url(run, 3)) == ["manifest.json", "part-00000-of-00001-aaaa.safetensors"]


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    save(savers(str(tmp_path), 2), 1)
    stored = json.loads(Path(step_url(str(tmp_path), 1), "manifest.json").read_text())
    assert stored["state"]["samples_seen"] == 8
    assert [part["name"] for part in stored["parts"]] == [
        "part-00000-of-00002-aaaa.safetensors",
        "part-00001-of-00002-aaaa.safetensors",
    ]
    for part in stored["parts"]:
        assert part["bytes"] == Path(step_url(str(tmp_path), 1), part["name"]).stat().st_size
