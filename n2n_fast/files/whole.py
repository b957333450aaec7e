"""Files written whole: whatever happens, a file is as it was before or as it should be."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from n2n_fast.files.errors import BadInput
from n2n_fast.files.states import on_cpu

KEPT = 4  # times the weights: a training has them and their momentum, both twice while it is written anew


def aside(path: Path) -> Path:
    """Where a file's new content is written first."""
    return path.with_name(f".{path.name}.new")


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file by `content`, which is on the disk by then. An OSError names the file and leaves it as it was."""
    new = aside(path)
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            new.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names none
        raise


def try_writing(directory: Path) -> None:
    """Raise OSError where nothing can be written in a directory, or its disk is full."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(1 << 16))
        os.fsync(file.fileno())


def check_room(path: Path, weights: Mapping[str, torch.Tensor], there: int = 0) -> None:
    """Refuse a place whose disk has clearly too little room to train a network of such weights and keep it meanwhile.

    path: a directory, or a file in one. there: bytes of what will be replaced. Raises BadInput.
    """
    needed = KEPT * sum(tensor.nbytes for tensor in weights.values()) - there
    usage = shutil.disk_usage(path if path.is_dir() else path.parent)
    if usage.total and usage.free < needed:  # some file systems tell nothing
        room = f"about {needed / 1e6:,.1f} MB are needed, its disk has {usage.free / 1e6:,.1f} MB"
        raise BadInput(f"{path}: {room}; make room, or give another --out")


def _sync_directory(path: Path) -> None:
    """Let a file's new name outlive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Replace a file by JSON."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def write_tensors(path: Path, content: Any) -> None:
    """Replace a file by what torch.save makes of tensors, of any device, and plain values."""
    file = io.BytesIO()
    torch.save(on_cpu(content), file)
    write_whole(path, file.getvalue())
