"""Runs a reader under watch: what it returns, how long it takes, and what it does elsewhere."""

import contextlib
import errno
import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from ifvit.errors import UserError

SECONDS = 20.0
"""A reader that takes longer has hung; the slowest takes one second on an idle machine."""
MEMORY = 500 << 20
"""Bytes that a reader may take besides what the process had before."""
MESSAGE = 600
"""Characters of the longest message."""
CANARY = "canary-of-the-fuzz-test"
"""Text of the files outside, and of a sequence that would command a terminal."""
_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENOSPC, errno.EDQUOT, errno.ELOOP, errno.ENXIO),
}
"""Errors of the system that the command line prints in one line."""


class Hang(BaseException):
    """The reader took too long; no `except Exception` catches this."""


def digest(value: object) -> object:
    """The value as plain data that can be compared; NaN equals NaN."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: digest(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {str(key): digest(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [digest(item) for item in value]
    if isinstance(value, torch.Tensor):
        return digest(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    return value if isinstance(value, bytes) else repr(value)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Guard:
    """The folder `box` of one instance, and watch over what its readers do elsewhere."""

    def __init__(self, sandbox: Path) -> None:
        self.box, self._outside, self._temporary = (
            sandbox / name for name in ("box", "outside", "tmp")
        )
        for folder in (self.box, self._outside, self._temporary):
            folder.mkdir(parents=True)
        (self._outside / "secret").write_text(CANARY)
        (self._outside / "secret.json").write_text(json.dumps({"secret": CANARY}))
        self._state: dict[str, tuple[int, int]] = {}

    def restore(self, intact: dict[str, bytes]) -> None:
        """Make `box` hold these files only; a file that kept its time and size is intact."""
        for path in sorted(self.box.rglob("*"), reverse=True):
            name = path.relative_to(self.box).as_posix()
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.rmdir()  # fails for a folder that holds files
            elif name not in intact or self._state.get(name) != _stamp(path):
                path.unlink()
        for name, data in intact.items():
            path = self.box / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                self._state[name] = _stamp(path)
        for path in self._outside.glob("copy"):
            path.unlink()
        for path in self._temporary.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def call(self, reader: Callable[[Path], object]) -> object:
        """The result of an intact file."""
        with _quiet():
            return reader(self.box)

    def judge(
        self, reader: Callable[[Path], object], wanted: object, sealed: bool, is_link: bool
    ) -> tuple[str, str]:
        """Read the damaged file => verdict, and what is bad about it.

        The user may name a link to another file.
        """
        before, errors = self._list_outside(), ""
        result: object = None
        refused = False
        with _limited() as peak, _quiet() as printed, self._watched() as events:
            try:
                try:
                    result = digest(reader(self.box))
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except UserError as error:
                refused, errors = True, _check_message(str(error))
            except OSError as error:
                refused = error.errno in _DISK
                errors = "" if refused else _describe(error)
            except (Hang, MemoryError, Exception) as error:
                errors = _describe(error)
        problems = [errors] if errors else []
        problems += [f"{event} outside" for event in dict.fromkeys(events)]
        if peak() > MEMORY:
            problems.append(f"{peak() >> 20} MB of memory")
        if f"\x1b]0;{CANARY}" in printed.getvalue():
            problems.append("prints control characters")
        if self._list_outside() != before:
            problems.append("changes files outside")
        equal = not refused and not errors and result == wanted
        if not is_link and _holds_secret(result):
            problems.append("returns what a file outside holds")
        if sealed and not refused and not errors and not equal:
            problems.append("another result is accepted")
        if problems:
            return "BAD", "; ".join(problems)
        return ("refused" if refused else "equal" if equal else "other"), ""

    def _list_outside(self) -> list[tuple[str, int, int]]:
        return sorted((path.name, *_stamp(path)) for path in self._outside.iterdir())

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[str]]:
        """Collect what the code does outside of `box` and its temporary folder."""
        _install_hook()
        _watch.update(
            allowed=(str(self.box), str(self._temporary)), outside=str(self._outside), events=[]
        )
        kept, tempfile.tempdir = tempfile.tempdir, str(self._temporary)
        pipes = [path for path in self.box.rglob("*") if path.is_fifo()]
        # A reader in C repeats an interrupted `open`; this lets it go on after the time is up.
        opener = 'sleep 7; exec 3<>"$1"; sleep 1'
        openers = [subprocess.Popen(["sh", "-c", opener, "sh", str(path)]) for path in pipes]
        _watch["on"] = True
        try:
            yield _watch["events"]
        finally:
            _watch["on"] = False
            tempfile.tempdir = kept
            for process in openers:
                process.kill()
                process.wait()


def _holds_secret(result: object) -> bool:
    text = repr(result)
    return CANARY in text.replace(f"\\x1b]0;{CANARY}", "").replace(f"\\\\x1b]0;{CANARY}", "")


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.lstat()
    return stat.st_mtime_ns, stat.st_size


def _check_message(message: str) -> str:
    if not message.isprintable():
        return f"message with control characters: {message[:300]!r}"
    return f"message of {len(message)} characters" if len(message) > MESSAGE else ""


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame for frame in frames if "/ifvit/" in frame.filename or "pipeline/" in frame.filename
    ]
    ours += [frame for frame in frames if "/slurm/" in frame.filename]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "?"
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Collect what is printed and logged."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield printed
    finally:
        logging.getLogger().removeHandler(handler)


@contextlib.contextmanager
def _limited() -> Iterator[Callable[[], int]]:
    """Bound time and memory; yield a function that returns the bytes that were taken."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS:.0f} s")

    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, virtual = _bytes_of(status, "VmRSS"), _bytes_of(status, "VmSize")
    kept = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (3 << 29), kept[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)
    taken = [0]
    try:
        yield lambda: taken[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, kept)
        taken[0] = _bytes_of(status, "VmHWM") - before


def _bytes_of(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


_watch: dict[str, Any] = {"on": False, "installed": False}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = {
    *("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move"),
}
_STARTING = {
    *(
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "socket.getaddrinfo",
    ),
    *("socket.connect", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen"),
}


def _install_hook() -> None:
    if not _watch["installed"]:
        sys.addaudithook(_audit)
        _watch["installed"] = True


def _audit(event: str, values: tuple[Any, ...]) -> None:
    if not _watch["on"]:
        return
    if event == "open" and isinstance(values[0], str | bytes):
        path = os.path.abspath(os.fsdecode(values[0]))  # noqa: PTH100  links stay links
        flags = values[2] if isinstance(values[2], int) else 0
        is_written = flags & _WRITES and not _is_allowed(path)
        if is_written or path.startswith(_watch["outside"]):
            _watch["events"].append(f"opens {path}")
    elif event in _CHANGING:
        for value in values[: 2 if event in ("os.rename", "os.link") else 1]:
            if isinstance(value, str | bytes | os.PathLike):
                path = os.path.abspath(os.fsdecode(value))  # noqa: PTH100
                if not _is_allowed(path):
                    _watch["events"].append(f"{event} {path}")
    elif event in _STARTING:
        _watch["events"].append(f"{event} {str(values)[:80]}")


def _is_allowed(path: str) -> bool:
    return path.startswith(_watch["allowed"]) or "__pycache__" in path or path == "/dev/null"
