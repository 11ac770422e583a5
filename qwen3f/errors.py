"""Errors with a message for the user."""


class UserError(ValueError):
    """Wrong input from the user: its message says what is wrong, where, and what to write instead.

    `launch.py` prints the message on one line and exits with 2; nothing has been overwritten when it is raised.
    """


class TrainingError(RuntimeError):
    """A run that had started cannot go on, e.g. because its loss is not finite. `launch.py` exits with 1."""
