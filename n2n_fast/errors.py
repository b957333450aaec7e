"""The errors that this package raises on purpose, and how it quotes those of others."""


class BadInput(ValueError):
    """What a user handed over is wrong; the message is one line that says what and how to mend it."""


class DegenerateArchitecture(ValueError):
    """A transition leads to a network that cannot exist; `reason` says why."""

    def __init__(self, reason: str) -> None:
        """Keep `reason`, which is the message as well."""
        super().__init__(reason)
        self.reason = reason


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
