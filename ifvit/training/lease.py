"""A lease: one job per run directory, without comparing the clocks of different machines.

`train` holds a lease while it trains; `SaveCheckpoint` checks it before each commit.

`RUN/lease/000007.json` names the job that holds the run. The file is created and never replaced,
so only one of several jobs gets it. The holder counts up in `000007.beat`. Another job watches
this file, measuring time with its own clock, and creates `000008.json` when the count has not
changed for long enough. A holder that only slept finds the newer file before it commits a
checkpoint.
"""

import itertools
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, TypeVar

from ifvit.connections import StoreError
from ifvit.errors import UserError
from ifvit.records import NonNegativeInt, PositiveInt, Rule, dump_sealed, record, shorten
from ifvit.storage import create, exists, join, list_names, read_sealed, remove, write_sealed

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""Time between two beats of the holder."""
SILENT_BEATS = 6
"""A holder that has missed this many beats is considered dead."""


_Record = TypeVar("_Record")
Seconds = Annotated[float, Rule("above 0 and at most 60", lambda value: 0 < value <= 60)]


@record
class Holder:
    """The process that a lease names."""

    token: str
    """Random and different for every attempt at a run."""
    host: str
    pid: PositiveInt
    process: str | None
    """Boot id, pid namespace, pid and start time; None where /proc does not exist."""
    job: str | None
    """SLURM job id."""
    restarts: NonNegativeInt
    """Number of times that SLURM has requeued that job."""
    since: str
    """Time by the clock of its host when it took the run; only shown to people."""
    beat_seconds: Seconds

    def __str__(self) -> str:
        job = f"SLURM job {self.job}, " if self.job else ""
        return shorten(f"{job}process {self.pid} on {self.host} since {self.since}", 200)


@record
class Beat:
    """What a holder writes again and again: a count, or at last that it has released the run."""

    count: NonNegativeInt = 0
    released: bool = False


class Lease:
    """The right to write a run directory, which this process has held since `acquire`."""

    def __init__(self, run: str, generation: int, holder: Holder) -> None:
        self.token = holder.token
        self._run, self._generation, self._holder = run, generation, holder

    @classmethod
    def acquire(cls, run: str, beat_seconds: float = BEAT_SECONDS) -> "Lease":
        """Take a free run at once, or a held run after its holder has been silent.

        Raises UserError that names the holder when it is alive, or when the run directory cannot
        be written.
        """
        holder = Holder(
            token=secrets.token_hex(4),
            host=socket.gethostname(),
            pid=os.getpid(),
            process=process_identity(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            beat_seconds=beat_seconds,
        )
        try:
            while True:
                newest = _newest(run)
                if newest:
                    _wait_for_end(run, newest, holder)
                if create(_url(run, newest + 1, "json"), dump_sealed(holder)):
                    break
        except OSError as error:
            raise UserError(
                f"{run}: cannot be written ({error}); choose another run directory"
            ) from None
        # The previous generation stays, because others may be about to read it.
        for old in _generations(run):
            if old < newest:
                remove(_url(run, old, "json"))
                remove(_url(run, old, "beat"))
        return cls(run, newest + 1, holder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Write beats inside; release the run at the end, also after an error."""
        stop = Event()
        beating = Thread(target=self._beat, args=(stop,), name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()
            self._write_beat(Beat(released=True))

    def check(self) -> None:
        """Raise UserError when another job has taken the run."""
        newest = _newest(self._run)
        if newest != self._generation:
            holder = _read(Holder, _url(self._run, newest, "json"))
            raise UserError(
                f"{self._run}: taken over by {holder}, because this "
                "process gave no sign of life; it stops and leaves the run to that job"
            )

    def _beat(self, stop: Event) -> None:
        beats = itertools.count(1)
        self._write_beat(Beat(count=next(beats)))
        while not stop.wait(self._holder.beat_seconds):
            self._write_beat(Beat(count=next(beats)))

    def _write_beat(self, beat: Beat) -> None:
        # A store that does not answer must not end training: it may return before the lease ends.
        try:
            write_sealed(_url(self._run, self._generation, "beat"), beat)
        except (UserError, OSError) as error:
            log.warning("%s; the lease of %s is not renewed for now", error, self._run)


def _wait_for_end(run: str, generation: int, taker: Holder) -> None:
    """Return when the holder of `generation` is gone. Raises UserError when it is alive."""
    holder = _read(Holder, _url(run, generation, "json"))
    beat = _read_beat(run, generation)
    if _is_known_dead(holder, taker):
        return
    silent = 0
    while silent < SILENT_BEATS and not beat.released:
        if silent == 0:
            log.warning("%s: held by %s; waiting to see whether it is alive", run, holder)
        time.sleep(holder.beat_seconds)
        started = time.monotonic()
        before, beat = beat, _read_beat(run, generation)
        if beat != before and not beat.released:
            raise UserError(
                f"{run}: in use by {holder}; wait for it, stop it, or choose another run directory "
                f"(a dead job's lease ends after {SILENT_BEATS * holder.beat_seconds:.0f} s)"
            )
        # If the store did not answer us, it may not have answered the holder: count anew.
        silent = silent + 1 if time.monotonic() - started < holder.beat_seconds else 0


def _is_known_dead(holder: Holder, taker: Holder) -> bool:
    """Whether SLURM has requeued the holder as `taker`, or the holder died on this machine."""
    if holder.job is not None and holder.job == taker.job and holder.restarts < taker.restarts:
        return True
    if taker.process is None or holder.process is None:
        return False
    same_machine = taker.process.split()[:2] == holder.process.split()[:2]
    return same_machine and process_identity(holder.pid) != holder.process


def process_identity(pid: int) -> str | None:
    """`BOOT NAMESPACE PID START`, unique among all processes; None if it is not alive."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else f"{boot} {namespace} {pid} {numbers[18]}"


def _generations(run: str) -> list[int]:
    names = list_names(join(run, "lease"))
    pattern = r"([0-9]{6}|[1-9][0-9]{6,})\.json"
    return [int(name[:-5]) for name in names if re.fullmatch(pattern, name)]


def _newest(run: str) -> int:
    return max(_generations(run), default=0)


def _url(run: str, generation: int, suffix: str) -> str:
    return join(run, "lease", f"{generation:06d}.{suffix}")


def _read_beat(run: str, generation: int) -> Beat:
    """The last beat; count 0 before the first."""
    url = _url(run, generation, "beat")
    return _read(Beat, url) if exists(url) else Beat()


def _read(cls: type[_Record], url: str) -> _Record:
    try:
        return read_sealed(cls, url)
    except StoreError:
        raise
    except UserError as error:
        folder = url.rpartition("/")[0]
        raise UserError(f"{error}; if no job trains this run, remove {folder}") from None
