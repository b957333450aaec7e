"""Seeds of their own for everything that is random, so that nothing depends on the order of the work."""

import hashlib


def derived(*parts: object) -> int:
    """A seed in 32 bits from the run's seed and what it is for."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
