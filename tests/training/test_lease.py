"""One job per run directory, whichever job dies, sleeps or has a wrong clock."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, Semaphore, Timer

import pytest

from ifvit.errors import UserError
from ifvit.records import dump_sealed
from ifvit.storage import join, list_names, read_bytes, write_sealed
from ifvit.training import lease as lease_module
from ifvit.training.lease import BEAT_SECONDS, SILENT_BEATS, Beat, Holder, Lease, process_identity

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


def leave_lease(run: str | Path, holder: Holder, generation: int = 1) -> None:
    """Write what a holder that is not this process has written."""
    write_sealed(join(str(run), "lease", f"{generation:06d}.json"), holder)


def leave_beat(run: str | Path, beat: Beat) -> None:
    write_sealed(join(str(run), "lease", "000001.beat"), beat)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes without waiting; collects the pauses."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_a_second_job_gets_an_error_that_names_the_first(run: str) -> None:
    in_use = pytest.raises(UserError, match=f"{run}: in use by process {os.getpid()} on .* since")
    with Lease.acquire(run, BEAT).held(), in_use:
        Lease.acquire(run, BEAT)


def test_a_run_whose_generations_have_seven_digits_is_taken(run: str) -> None:
    leave_lease(run, ELSEWHERE, generation=999_999)
    write_sealed(join(run, "lease", "999999.beat"), Beat(released=True))
    for _ in range(2):
        lease = Lease.acquire(run)
        lease.check()
        with lease.held():
            pass
    assert list_names(join(run, "lease"))[0] == "1000000.beat"


def test_a_released_lease_is_free_at_once_and_the_last_two_generations_stay(
    run: str, no_waiting: list[float]
) -> None:
    for _ in range(4):
        with Lease.acquire(run).held():
            pass
    names = ["000003.beat", "000003.json", "000004.beat", "000004.json"]
    assert list_names(join(run, "lease")) == names
    Lease.acquire(run).check()
    assert no_waiting == []


def test_a_job_elsewhere_loses_the_run_after_some_silent_beats_of_its_own_length(
    run: str, no_waiting: list[float]
) -> None:
    leave_lease(run, replace(ELSEWHERE, beat_seconds=7.0))  # its clock is years ahead
    lease = Lease.acquire(run, BEAT)
    assert no_waiting == [7.0] * SILENT_BEATS
    assert lease.token != ELSEWHERE.token
    assert json.loads(read_bytes(join(run, "lease", "000002.json")))["pid"] == os.getpid()


def test_of_many_takers_of_a_free_run_one_wins(run: str) -> None:
    leave_lease(run, ELSEWHERE)
    leave_beat(run, Beat(released=True))
    lost = Semaphore(0)

    def take(_: int) -> bool:
        try:
            lease = Lease.acquire(run, beat_seconds=1.0)
        except UserError:
            lost.release()
            return False
        with lease.held():
            assert all(lost.acquire(timeout=60) for _ in range(3))
            lease.check()
        return True

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(take, range(4))) == [False, False, False, True]


def test_a_killed_process_of_this_machine_is_known_to_be_dead(
    tmp_path: Path, no_waiting: list[float]
) -> None:
    code = "import os, sys; from ifvit.training.lease import Lease; Lease.acquire(sys.argv[1])"
    killed = f"{code}; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False).returncode
    Lease.acquire(str(tmp_path))
    assert no_waiting == []


def test_a_zombie_and_a_reused_pid_are_known_to_be_dead(
    tmp_path: Path, no_waiting: list[float]
) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        alive = process_identity(process.pid)
        assert alive is not None
        leave_lease(tmp_path / "zombie", replace(ELSEWHERE, pid=process.pid, process=alive))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        Lease.acquire(str(tmp_path / "zombie"))
    other = f"{process_identity(os.getpid())}0"
    leave_lease(tmp_path / "reused", replace(ELSEWHERE, pid=os.getpid(), process=other))
    Lease.acquire(str(tmp_path / "reused"))
    assert no_waiting == []


@pytest.mark.parametrize(
    ("job", "restarts", "is_free"), [("17", 0, True), ("17", 1, False), (None, 0, False)]
)
def test_only_a_later_start_of_the_same_slurm_job_takes_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str | None, restarts: int, is_free: bool
) -> None:
    leave_lease(tmp_path, replace(ELSEWHERE, job=job, restarts=restarts))
    leave_beat(tmp_path, Beat(count=1))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(time, "sleep", lambda seconds: leave_beat(tmp_path, Beat(count=2)))
    if is_free:
        Lease.acquire(str(tmp_path), BEAT)
        return
    with pytest.raises(UserError, match=r"in use by .*process 1 on node7"):
        Lease.acquire(str(tmp_path), BEAT)


def test_a_run_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written .* choose another"):
        Lease.acquire(str(tmp_path / "file" / "run"))


def test_a_holder_that_slept_too_long_finds_its_successor(tmp_path: Path) -> None:
    lease = Lease.acquire(str(tmp_path), BEAT_SECONDS)
    lease.check()
    leave_lease(tmp_path, ELSEWHERE, generation=2)
    with pytest.raises(UserError, match="taken over by process 1 on node7"):
        lease.check()


def test_a_store_that_comes_back_gives_the_holder_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_lease(tmp_path, ELSEWHERE)
    reads = 0

    def read(run: str, generation: int) -> Beat:
        nonlocal reads
        reads += 1
        if reads == SILENT_BEATS + 1:
            time.sleep(2 * BEAT)  # the second to last read waits for the store, as the holder does
        if reads == SILENT_BEATS + 3:
            leave_beat(tmp_path, Beat(count=1))
        return real(run, generation)

    real = lease_module._read_beat
    monkeypatch.setattr(lease_module, "_read_beat", read)
    with pytest.raises(UserError, match="in use by process 1 on node7"):
        Lease.acquire(str(tmp_path), BEAT)


def test_a_holder_that_ends_while_it_is_watched_gives_way_at_once(tmp_path: Path) -> None:
    leave_lease(tmp_path, replace(ELSEWHERE, beat_seconds=2.0))
    leave_beat(tmp_path, Beat(count=7))
    Timer(0.5, leave_beat, (tmp_path, Beat(released=True))).start()
    started = time.monotonic()
    Lease.acquire(str(tmp_path), BEAT)
    assert time.monotonic() - started < 2 * 2.0


def test_a_store_that_fails_for_long_does_not_end_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.acquire(str(tmp_path), BEAT)
    beats = []
    renewed = Event()

    def write(url: str, value: Beat) -> None:
        beats.append(value)
        if len(beats) < 3:
            raise OSError("no answer")
        real(url, value)
        renewed.set()

    real = lease_module.write_sealed
    monkeypatch.setattr(lease_module, "write_sealed", write)
    with lease.held():
        assert renewed.wait(60)
        assert (tmp_path / "lease" / "000001.beat").exists()
    assert beats[:3] == [Beat(count=1), Beat(count=2), Beat(count=3)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        dump_sealed(replace(ELSEWHERE, since="earlier")).replace(b"earlier", b"later"),
        *(
            dump_sealed({**vars(ELSEWHERE), key: value})
            for key, value in {
                "beat_seconds": 1e9,
                "pid": -1,
                "restarts": 10**40,
                "host": 3,
                "job": ["1"],
                "other": 1,
            }.items()
        ),
        dump_sealed({**vars(ELSEWHERE), "beat_seconds": float("inf")}),
        dump_sealed({**vars(ELSEWHERE), "beat_seconds": float("nan")}),
    ],
)
@pytest.mark.parametrize("name", ["000001.json", "000001.beat"])
def test_a_damaged_lease_is_one_line_and_nobody_waits_for_it(
    tmp_path: Path, no_waiting: list[float], name: str, content: bytes
) -> None:
    leave_lease(tmp_path, ELSEWHERE)
    (tmp_path / "lease" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*; if no job trains this run, remove") as error:
        Lease.acquire(str(tmp_path), BEAT)
    assert str(error.value).isprintable()
    assert no_waiting == []


def test_other_files_among_the_leases_are_left_alone(tmp_path: Path) -> None:
    names = [
        "notes.json",
        "00x.json",
        "-1.json",
        "1.json",
        "0000000001.json",
        "\u0660\u0660\u0660\u0660\u0660\u0667.json",
    ]
    (tmp_path / "lease").mkdir()
    for name in names:
        (tmp_path / "lease" / name).touch()
    for _ in range(3):
        with Lease.acquire(str(tmp_path)).held():
            pass
    assert set(names) < set(list_names(str(tmp_path / "lease")))


def test_a_holder_cannot_command_the_terminal(tmp_path: Path) -> None:
    assert str(replace(ELSEWHERE, host="\x1b[2J" + "x" * 1000)).isprintable()
    assert len(str(replace(ELSEWHERE, host="x" * 1000))) <= 200
