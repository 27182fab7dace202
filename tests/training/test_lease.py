"""One job per run directory, whoever dies, sleeps or has a wrong clock."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Semaphore

import pytest

from ifvit.errors import UserError
from ifvit.storage import join, read_json, write_json
from ifvit.training import lease as lease_module
from ifvit.training.lease import Holder, Lease

BEAT = 0.2
ELSEWHERE = Holder(
    token="feedbeef",
    host="node7",
    pid=1,
    process="another-boot pid:[1] 1 1",
    job=None,
    restarts=0,
    since="2031-01-01T00:00:00+00:00",
    beat_seconds=BEAT,
)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run directory of either kind."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_bucket")


def leave_lease(run: str, holder: Holder, generation: int = 1) -> None:
    """What a holder that is not this process has written."""
    write_json(join(run, "lease", f"{generation:06d}.json"), asdict(holder))


def test_a_second_job_is_refused_with_the_name_of_the_first(run: str) -> None:
    refused = pytest.raises(UserError, match=f"{run}: in use by process {os.getpid()} on .* since")
    with Lease.acquire(run, BEAT).held(), refused:
        Lease.acquire(run, BEAT)


def test_a_lease_given_back_is_free_at_once(run: str) -> None:
    with Lease.acquire(run).held():
        pass
    started = time.monotonic()
    lease = Lease.acquire(run)
    assert time.monotonic() - started < lease_module.BEAT_SECONDS
    lease.check()


def test_a_dead_job_elsewhere_is_outlived_whatever_its_clock_said(run: str) -> None:
    leave_lease(run, ELSEWHERE)
    lease = Lease.acquire(run, BEAT)
    assert lease.token != ELSEWHERE.token
    assert read_json(join(run, "lease", "000002.json"))["pid"] == os.getpid()


def test_of_many_takers_of_a_free_run_one_wins(run: str) -> None:
    leave_lease(run, ELSEWHERE)
    write_json(join(run, "lease", "000001.beat"), {"released": True})
    refused = Semaphore(0)

    def take(_: int) -> bool:
        try:
            lease = Lease.acquire(run, beat_seconds=1.0)
        except UserError:
            refused.release()
            return False
        with lease.held():
            assert all(refused.acquire(timeout=60) for _ in range(3))
            lease.check()
        return True

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(take, range(4))) == [False, False, False, True]


def test_a_killed_process_of_this_machine_is_known_to_be_dead(tmp_path: Path) -> None:
    code = "import os, sys; from ifvit.training.lease import Lease; Lease.acquire(sys.argv[1])"
    killed = f"{code}; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False).returncode
    started = time.monotonic()
    Lease.acquire(str(tmp_path))
    assert time.monotonic() - started < lease_module.BEAT_SECONDS


def refuse_to_sleep(seconds: float) -> None:
    raise AssertionError(f"waits for {seconds} s")


def test_a_dead_process_that_nobody_has_reaped_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", refuse_to_sleep)
    with subprocess.Popen(["sleep", "60"]) as process:
        alive = lease_module._process(process.pid)
        assert alive is not None
        leave_lease(str(tmp_path), replace(ELSEWHERE, pid=process.pid, process=alive))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        Lease.acquire(str(tmp_path))


def test_a_process_that_has_got_a_dead_ones_number_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", refuse_to_sleep)
    mine = lease_module._process(os.getpid())
    assert mine is not None
    leave_lease(str(tmp_path), replace(ELSEWHERE, pid=os.getpid(), process=f"{mine}0"))
    Lease.acquire(str(tmp_path))


def test_a_holder_is_watched_for_beats_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    leave_lease(str(tmp_path), replace(ELSEWHERE, beat_seconds=7.0))
    Lease.acquire(str(tmp_path), BEAT)
    assert pauses == [7.0] * lease_module.SILENT_BEATS


@pytest.mark.parametrize("job", ["17", None])
def test_only_a_later_start_of_the_same_slurm_job_need_not_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None
) -> None:
    leave_lease(str(tmp_path), replace(ELSEWHERE, job=job, restarts=1 if job else 0))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    beats = iter([{"count": 1}, {"count": 2}])
    monkeypatch.setattr(lease_module, "_read_beat", lambda run, generation: next(beats))
    with pytest.raises(UserError, match=r"in use by .*process 1 on node7"):
        Lease.acquire(str(tmp_path), BEAT)


def test_a_requeued_slurm_job_takes_its_own_lease_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = replace(ELSEWHERE, job="17", restarts=0, beat_seconds=1000.0)
    leave_lease(str(tmp_path), holder)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Lease.acquire(str(tmp_path))


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written .* choose another"):
        Lease.acquire(str(tmp_path / "file" / "run"))


def test_only_the_last_two_generations_stay(tmp_path: Path) -> None:
    for _ in range(4):
        with Lease.acquire(str(tmp_path)).held():
            pass
    names = sorted(path.name for path in (tmp_path / "lease").iterdir())
    assert names == ["000003.beat", "000003.json", "000004.beat", "000004.json"]


def test_a_holder_that_slept_too_long_finds_its_successor(tmp_path: Path) -> None:
    lease = Lease.acquire(str(tmp_path))
    lease.check()
    leave_lease(str(tmp_path), ELSEWHERE, generation=2)
    with pytest.raises(UserError, match="taken over by process 1 on node7"):
        lease.check()


def test_a_store_that_comes_back_gives_the_holder_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lease(str(tmp_path), ELSEWHERE)
    beat = tmp_path / "lease" / "000001.beat"
    reads = 0

    def read(run: str, generation: int) -> dict[str, int]:
        nonlocal reads
        reads += 1
        if reads == lease_module.SILENT_BEATS + 1:
            time.sleep(2 * BEAT)  # the read before the last waits for the store, as the holder does
        if reads == lease_module.SILENT_BEATS + 3:
            beat.write_text(json.dumps({"count": 1}))
        return real(run, generation)

    real: Callable[[str, int], dict[str, int]] = lease_module._read_beat
    monkeypatch.setattr(lease_module, "_read_beat", read)
    with pytest.raises(UserError, match="in use by process 1 on node7"):
        Lease.acquire(str(tmp_path), BEAT)


def test_a_holder_that_ends_while_it_is_watched_gives_way_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lease(str(tmp_path), ELSEWHERE)
    beats = iter([{"count": 7}, {"count": 7}, {"released": True}])
    monkeypatch.setattr(lease_module, "_read_beat", lambda run, generation: next(beats))
    Lease.acquire(str(tmp_path), BEAT)
    assert next(beats, None) is None


def test_a_store_that_fails_for_long_does_not_end_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.acquire(str(tmp_path), BEAT)
    beats = []
    renewed = Event()

    def write(url: str, value: dict[str, int]) -> None:
        beats.append(value)
        if len(beats) < 3:
            raise OSError("no answer")
        real(url, value)
        renewed.set()

    real = lease_module.write_json
    monkeypatch.setattr(lease_module, "write_json", write)
    with lease.held():
        assert renewed.wait(60)
        assert (tmp_path / "lease" / "000001.beat").exists()
    assert beats[:3] == [{"count": 0}, {"count": 1}, {"count": 2}]
