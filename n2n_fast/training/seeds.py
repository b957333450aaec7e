"""Seeds of their own for everything that is random, so that nothing depends on the order of the work."""

import hashlib

import numpy as np
import torch


def derived(*parts: object) -> int:
    """A seed in 32 bits from the run's seed and what it is for."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def generator(*path: int) -> torch.Generator:
    """A CPU generator whose stream is settled by these numbers and unrelated to that of any others."""
    state = np.random.SeedSequence([number % 2**64 for number in path]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
