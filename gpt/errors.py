"""The two ways a run can end badly that a person can do something about."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where, and what to do. Exit code 2.
    """


class RunError(RuntimeError):
    """A run failed through no fault of its input (a loss that is not finite, say).

    The message is one line: what happened, where, and what to do. Exit code 1.
    """
