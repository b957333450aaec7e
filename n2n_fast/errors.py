"""The errors that this package raises on purpose."""


class BadInput(ValueError):
    """What a user handed over is wrong; the message is one line that says what and how to mend it."""


class DegenerateArchitecture(ValueError):
    """A transition leads to a network that cannot exist; `reason` says why."""

    def __init__(self, reason: str) -> None:
        """Keep `reason`, which is the message as well."""
        super().__init__(reason)
        self.reason = reason
