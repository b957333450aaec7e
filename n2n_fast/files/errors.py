"""The errors that this package raises on purpose, how it quotes those of others, and which of these end a run."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch


class BadInput(ValueError):
    """What a user handed over is wrong; the message is one line that says what and how to mend it."""


class DeviceFault(BadInput):
    """The device failed or its memory ran out, which says nothing of what was tried on it; the message is one line."""


class DegenerateArchitecture(ValueError):
    """A transition leads to a network that cannot exist; `reason` says why."""

    def __init__(self, reason: str) -> None:
        """Keep `reason`, which is the message as well."""
        super().__init__(reason)
        self.reason = reason


def check_type(name: str, value: object, types: Any, wanted: str) -> None:
    """Raise TypeError where an argument is of another type; wanted: those types, in words."""
    if not isinstance(value, types):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def described(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


# torch has types of its own for some of these errors, in some versions; the others are told by their text.
_FAULT_TYPE = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)  # the former from torch 2.8 on
_FAULT = re.compile(r"(CUDA|HIP)( driver)? error|.*(CUDNN|CUBLAS)_STATUS_")
_REFUSAL = re.compile(r"_STATUS_(NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE)")  # of an operation, and the device goes on
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|(CUDNN|CUBLAS)_STATUS_\w*ALLOC", re.IGNORECASE
)


def device_fault(error: BaseException) -> str | None:
    """One line for an error that the device is to blame for, or a lack of memory, on the CPU too; None for others.

    Where everything is caught that a student, a layer or an exporter may raise, these must not be: after an illegal
    access every later student would fail too.
    """
    if isinstance(error, DeviceFault):
        return str(error)
    reason, is_torchs = first_line(error), isinstance(error, RuntimeError)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (is_torchs and _NO_MEMORY.search(reason)):
        return f"out of memory ({reason}); lower --batch-size, or free memory"
    if isinstance(error, _FAULT_TYPE) or (is_torchs and _FAULT.match(reason) and not _REFUSAL.search(reason)):
        return f"the device failed ({reason}); if it does so again, CUDA_LAUNCH_BLOCKING=1 tells where"
    return None


def raise_device_fault(error: BaseException) -> None:
    """Raise DeviceFault in place of an error that is one; for those who catch everything."""
    fault = device_fault(error)
    if fault is not None:
        raise DeviceFault(fault) from error


@contextlib.contextmanager
def telling_device_faults() -> Iterator[None]:
    """Within it, what a failing device raises becomes DeviceFault; all other errors stay as they are."""
    try:
        yield
    except Exception as error:
        raise_device_fault(error)
        raise
