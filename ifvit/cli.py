"""The command line: `main` reads a verb and its flags, runs the verb, and reports errors."""

import errno
import logging
import os
import sys
from collections.abc import Sequence

from ifvit.config import read_config
from ifvit.errors import UserError
from ifvit.verbs import VERBS, load

_DISK_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR),
    *(errno.ENOSPC, errno.EDQUOT),
}
"""Errors of a folder or its disk that the user can repair, whatever the verb writes there."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb. A mistake of the user prints one line on stderr and exits with code 2."""
    # Their notices (no torchvision, no CUDA) would precede our one-line errors.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        name, flags = _split(list(sys.argv[1:] if argv is None else argv))
        verb = VERBS[name]
        config = read_config(
            load(verb.config), flags, prog=f"ifvit {name}", positional=verb.positional
        )
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        load(verb.function)(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"error: {error}; repair that or choose another folder", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


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
