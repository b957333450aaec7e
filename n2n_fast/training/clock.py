"""The clock by which work on a device is timed."""

import time

import torch


def now(device: torch.device) -> float:
    """Seconds, read once the device has done all that it was asked for: a GPU works behind the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
