"""The command line: `main` reads a verb and its flags, runs the verb, and reports errors."""

import contextlib
import errno
import io
import logging
import os
import re
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from ifvit.config import read_config
from ifvit.errors import UserError
from ifvit.records import printable
from ifvit.verbs import VERBS, check_packages, load

_DISK_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
}
"""Errors of a folder or its disk that the user can repair, whatever the verb writes there."""


_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters except tab and newline; captions and names of strangers may hold them."""


class _SafeOutput(io.TextIOBase):
    """Writes text with escapes in place of characters that could command the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_COMMANDS.sub(lambda found: printable(found[0]), text))

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _COMMANDS.sub(lambda found: printable(found[0]), super().format(record))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb. A mistake of the user prints one line on stderr and exits with code 2."""
    # Their notices (no torchvision, no CUDA) would precede our one-line errors.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        # stdout is None when it is closed.
        output = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
        with contextlib.redirect_stdout(_SafeOutput(output)):
            try:
                _run_verb(list(sys.argv[1:] if argv is None else argv))
            finally:
                sys.stdout.flush()
    except UserError as error:
        _fail(error, error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            # As a process that SIGPIPE kills; the interpreter must not write the rest at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        no_tmpdir = "temporary directory" in str(error)  # of tempfile, with the code ENOENT
        if error.errno not in _DISK_ERRORS and not no_tmpdir:
            raise
        _fail(f"{error}; repair that or choose another folder", UserError.exit_code)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


def _run_verb(argv: list[str]) -> None:
    check_packages()
    name, flags = _split(argv)
    verb = VERBS[name]
    config = read_config(load(verb.config), flags, prog=f"ifvit {name}", positional=verb.positional)
    warnings = logging.StreamHandler()
    warnings.setFormatter(_SafeFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[warnings])
    load(verb.function)(config)


def _fail(error: object, exit_code: int) -> NoReturn:
    print(f"error: {printable(str(error))}", file=sys.stderr)
    sys.exit(exit_code)


def _reader_has_left() -> bool:
    """Whether stdout is a pipe that nobody reads, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """Split `["shards", "verify", "x"]` into `("shards verify", ["x"])`; print help if asked."""
    for num_words in (2, 1):
        name = " ".join(argv[:num_words])
        if name in VERBS:
            return name, argv[num_words:]
    if not argv or argv[-1] in ("-h", "--help"):
        _print_verbs(argv[0] if len(argv) > 1 else "")
        sys.exit(0)
    known = ", ".join(VERBS)
    raise UserError(f"ifvit: no verb `{' '.join(argv[:2])}`; choose one of {known}")


def _print_verbs(prefix: str) -> None:
    print("usage: ifvit VERB [--config RECIPE.yaml] [--flag value ...]\n")
    width = max(map(len, VERBS)) + 2
    for name, verb in VERBS.items():
        if name.startswith(prefix):
            print(f"  {name:<{width}}{verb.help}")
    print("\nifvit VERB --help lists the flags of a verb.")
