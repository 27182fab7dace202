"""What a person did wrong, as opposed to what the program did wrong."""


class UserError(ValueError):
    """A one-line message that names the file or key at fault and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
