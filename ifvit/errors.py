"""How a process ends that cannot finish: the user's mistakes, and preemption."""

EXIT_PREEMPTED = 75
"""Exit code after a stop signal, once all work is saved: run the same command again to continue.

The value is EX_TEMPFAIL of sysexits.h.
"""


class UserError(ValueError):
    """A mistake of the user, as one line that names the file or key and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
