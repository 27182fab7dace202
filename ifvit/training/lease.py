"""One job per run directory: a lease in generations, judged by observation and not by clocks.

`RUN/lease/000007.json` says who holds the run. It is created, never replaced, so of several takers
one wins. The holder counts up in `000007.beat`; whoever wants the run watches that file on its
own clock and takes generation 8 once it has stood still. A holder that was only asleep finds the
newer generation before it commits anything. Clocks of different machines are never compared.
"""

import itertools
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread

from ifvit.errors import UserError
from ifvit.storage import create, exists, join, list_names, read_json, remove, write_json

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""Time between two signs of life."""
SILENT_BEATS = 6
"""A holder that has missed so many is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that a lease names."""

    token: str
    """Random; no two attempts at a run share it."""
    host: str
    pid: int
    process: str | None
    """Boot, pid namespace, pid and start time; None where /proc does not tell."""
    job: str | None
    """SLURM job id."""
    restarts: int
    """How often SLURM has requeued that job."""
    since: str
    """When it took the run, by its own clock; for people only."""
    beat_seconds: float

    def __str__(self) -> str:
        job = f"SLURM job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host} since {self.since}"


class Lease:
    """The right to write a run directory, held by this process since `acquire`."""

    def __init__(self, run: str, generation: int, holder: Holder) -> None:
        self.token = holder.token
        self._run, self._generation, self._holder = run, generation, holder

    @classmethod
    def acquire(cls, run: str, beat_seconds: float = BEAT_SECONDS) -> "Lease":
        """Take the run, at once if it is free, or after watching its holder be silent.

        Raises UserError that names the holder when it is alive, or when nothing can be written.
        """
        holder = _this_process(beat_seconds)
        try:
            generation = _take_next(run, holder)
        except OSError as error:
            raise UserError(
                f"{run}: cannot be written ({error}); choose another run directory"
            ) from None
        # The generation before stays: others may be about to read it.
        for old in _generations(run):
            if old < generation - 1:
                remove(_url(run, old, "json"))
                remove(_url(run, old, "beat"))
        return cls(run, generation, holder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Show life inside; give the run free after, also after an error."""
        stop = Event()
        beating = Thread(target=self._beat, args=(stop,), name="lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()
            self._write_beat({"released": True})

    def check(self) -> None:
        """Raise UserError when another job has taken the run since."""
        newest = _newest(self._run)
        if newest != self._generation:
            taker = _read_holder(self._run, newest)
            raise UserError(
                f"{self._run}: taken over by {taker}, for this process had shown no sign of life; "
                "it stops here and leaves the run alone"
            )

    def _beat(self, stop: Event) -> None:
        for count in itertools.count():
            self._write_beat({"count": count})
            if stop.wait(self._holder.beat_seconds):
                return

    def _write_beat(self, beat: dict[str, int]) -> None:
        # A store that is away must not end training; the lease then lapses, or the store returns.
        try:
            write_json(_url(self._run, self._generation, "beat"), beat)
        except (UserError, OSError) as error:
            log.warning("%s; the lease of %s is not renewed for now", error, self._run)


def _take_next(run: str, holder: Holder) -> int:
    """The generation that `holder` gets, when the one before has ended."""
    while True:
        newest = _newest(run)
        if newest:
            _await_end(run, newest, holder)
        if create(_url(run, newest + 1, "json"), json.dumps(asdict(holder)).encode()):
            return newest + 1


def _await_end(run: str, generation: int, taker: Holder) -> None:
    """Return when the holder of `generation` is gone; raise UserError when it is alive."""
    holder = _read_holder(run, generation)
    beat = _read_beat(run, generation)
    if _is_requeued(holder, taker) or _has_died_here(holder):
        return
    silent = 0
    while silent < SILENT_BEATS and "released" not in beat:
        if silent == 0:
            log.warning("%s: held by %s; watching whether it lives", run, holder)
        time.sleep(holder.beat_seconds)
        started = time.monotonic()
        before, beat = beat, _read_beat(run, generation)
        if beat != before and "released" not in beat:
            raise UserError(
                f"{run}: in use by {holder}; wait for it, stop it, or choose another run directory "
                f"(a dead job's lease ends after {SILENT_BEATS * holder.beat_seconds:.0f} s)"
            )
        # A store that was away for us was perhaps away for the holder: start counting again.
        silent = silent + 1 if time.monotonic() - started < holder.beat_seconds else 0


def _is_requeued(holder: Holder, taker: Holder) -> bool:
    """Whether SLURM has ended `holder` itself, to start the same job again as `taker`."""
    return holder.job is not None and holder.job == taker.job and holder.restarts < taker.restarts


def _has_died_here(holder: Holder) -> bool:
    mine = _process(os.getpid())
    if mine is None or holder.process is None:
        return False
    is_this_machine = mine.split()[:2] == holder.process.split()[:2]
    return is_this_machine and _process(holder.pid) != holder.process


def _this_process(beat_seconds: float) -> Holder:
    return Holder(
        token=secrets.token_hex(4),
        host=socket.gethostname(),
        pid=os.getpid(),
        process=_process(os.getpid()),
        job=os.environ.get("SLURM_JOB_ID"),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        beat_seconds=beat_seconds,
    )


def _process(pid: int) -> str | None:
    """`BOOT NAMESPACE PID START`, which no two processes share; None for one that is not alive."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else f"{boot} {namespace} {pid} {numbers[18]}"


def _generations(run: str) -> list[int]:
    names = list_names(join(run, "lease"))
    return sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json"))


def _newest(run: str) -> int:
    return max(_generations(run), default=0)


def _url(run: str, generation: int, suffix: str) -> str:
    return join(run, "lease", f"{generation:06d}.{suffix}")


def _read_holder(run: str, generation: int) -> Holder:
    return Holder(**read_json(_url(run, generation, "json")))


def _read_beat(run: str, generation: int) -> dict[str, int]:
    url = _url(run, generation, "beat")
    beat: dict[str, int] = read_json(url) if exists(url) else {}
    return beat
