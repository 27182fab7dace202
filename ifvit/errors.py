"""How a process ends that cannot finish: mistakes, failures of a store, and preemption."""

EXIT_PREEMPTED = 75
"""Exit code after a stop signal, once all work is saved: run the same command again to continue.

The value is EX_TEMPFAIL of sysexits.h.
"""


EXIT_STORE = 74
"""Exit code after a failure of an object store: the same command may succeed later.

The value is EX_IOERR of sysexits.h.
"""


class UserError(ValueError):
    """A mistake of the user, as one line that names the file or key and the remedy.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2
