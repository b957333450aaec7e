"""Files that anyone may have made: read without running code in them, and refused where they lie about their size."""

import contextlib
import io
import json
import os
import pickletools
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor, nn

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault

MAX_OPERATIONS = 3_000_000  # of a pickle: enough for a hundred thousand tensors
FREE_BYTES = 1 << 26  # a tensor may be so large without its file holding that much: expanded ones are saved small
LEGACY_PICKLES = 5  # that a file of torch < 1.6 begins with

# What tensors and plain values need. torch's own list is longer: it has calls that allocate what they are told to.
_PLAIN = {
    "collections": {"OrderedDict", "Counter"},
    "builtins": {"set", "complex"},
    "__builtin__": {"set", "complex"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage"},
}
_CALLS = ("GLOBAL", "INST", "STACK_GLOBAL")  # operations that ask for a function or class
_NEVER_SAVED = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4")


class WantsCode(BadInput):
    """A file asks for functions or classes that tensors and plain values do not need."""


def read_tensors(path: str | Path) -> Any:
    """What torch.save wrote of tensors, numbers, strings, lists and dictionaries, on the CPU; no code in it is run.

    Raises BadInput for any other file, and WantsCode, which is one, where the file would have code run.
    """
    with _damage(path):
        with Path(path).open("rb") as file:
            sizes = _check(file)
        # mapped, a tensor cannot reach beyond its file, whatever size it claims
        return _loaded(os.fspath(path), sizes, mmap=sizes is not None)


def tensors_in(content: bytes, name: str) -> Any:
    """The same of a file's content; name: for errors."""
    with _damage(name):
        return _loaded(io.BytesIO(content), _check(io.BytesIO(content)), mmap=False)


def _loaded(file: str | IO[bytes], sizes: Counter[int] | None, mmap: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd pickles, which are refused
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    _check_values(content, sizes)
    return content


def read_trusted(path: str | Path) -> Any:
    """What torch.save wrote of anything; runs the code in it. Raises BadInput where it cannot be read."""
    with _damage(path):
        return torch.load(path, map_location="cpu", weights_only=False)


def parse_json(text: str | bytes) -> Any:
    """A JSON value; ValueError for anything else, values nested too deep among it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


@contextlib.contextmanager
def understood(what: str | Path) -> Iterator[None]:
    """Within it, content that does not have the expected form or does not fit raises BadInput; what: its file."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise_device_fault(error)
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise BadInput(f"{what}: does not fit this run, or is damaged ({reason})") from None


def check_archive(archive: zipfile.ZipFile, length: int) -> None:
    """Refuse members that lead out of the archive, occur twice or unpack to more than the file's length.

    torch stores members as they are, so that together they are no longer than the file. Raises ValueError.
    """
    members = archive.infolist()
    for name, count in Counter(member.filename for member in members).items():
        if ".." in PurePosixPath(name.replace("\\", "/")).parts or name.startswith(("/", "\\")) or ":" in name:
            raise ValueError(f"its member {name[:60]!r} leads out of it")
        if count > 1:
            raise ValueError(f"it holds {name[:60]!r} twice")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its member {member.filename[:60]!r} is compressed, which torch.save never does")
    total = sum(member.file_size for member in members)
    if total > length:
        raise ValueError(f"its members declare {total:,} bytes, it has {length:,}")


@contextlib.contextmanager
def _damage(path: str | Path) -> Iterator[None]:
    """Make one line of whatever can go wrong with a file."""
    try:
        yield
    except BadInput as error:
        raise type(error)(f"{path} {error}") from None
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; give a file that torch.save wrote") from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a directory; give a file that torch.save wrote") from None
    except PermissionError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except Exception as error:  # noqa: BLE001 - a damaged file can fail in any of the ways that unpickling can
        raise BadInput(
            f"{path} is no file that torch.save wrote, or a damaged one ({type(error).__name__}:"
            f" {first_line(error)}); save it anew"
        ) from None


def _check(file: IO[bytes]) -> Counter[int] | None:
    """Look at a file before torch does. Returns the sizes of its storages in bytes; None for one of torch < 1.6."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) != b"PK\3\4":
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            _check_pickle(file)
        return None
    with zipfile.ZipFile(file) as archive:
        check_archive(archive, length)
        for name in archive.namelist():
            if name.endswith(".pkl"):
                _check_pickle(io.BytesIO(archive.read(name)))
        return Counter(member.file_size for member in archive.infolist() if "/data/" in member.filename)


def _check_pickle(file: IO[bytes]) -> None:
    """Refuse a pickle that asks for more than tensors and plain values, or is endless; leaves `file` behind it."""
    strings = ["", ""]
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count > MAX_OPERATIONS:
            raise ValueError(f"its pickle has more than {MAX_OPERATIONS:,} operations")
        if isinstance(argument, str):
            strings = [strings[1], argument]
        if operation.name in _CALLS:
            called = " ".join(strings) if operation.name == "STACK_GLOBAL" else str(argument)
            if not _is_plain(called):
                raise WantsCode(f"is a pickle that wants to run code ({called.replace(' ', '.')[:60]})")
        if operation.name in _NEVER_SAVED:
            raise ValueError(f"its pickle has the operation {operation.name}")


def _is_plain(called: str) -> bool:
    """Whether a pickle may ask for this: "module name"."""
    module, _, name = called.partition(" ")
    if module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)):
        return True
    return name in _PLAIN.get(module, ())


def _check_values(content: Any, records: Counter[int] | None) -> None:
    """Refuse tensors that are not plain, or of other sizes than the file's storages. Raises ValueError."""
    seen, left = set(), [content]
    sizes: dict[int, int] = {}  # of storages, by address
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            _check_tensor(value)
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
    wrong = Counter(size for size in sizes.values() if size) - (records or Counter())
    if records is not None and wrong:
        raise ValueError(f"a tensor has {next(iter(wrong)):,} bytes, of which the file holds others")


def _check_tensor(value: Tensor) -> None:
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized
    if not plain or value.device.type != "cpu":
        raise ValueError(f"it holds a {value.layout} tensor of {value.dtype} on {value.device.type}")
    size = value.numel() * value.element_size()
    if size > max(FREE_BYTES, value.untyped_storage().nbytes()):
        raise ValueError(f"a tensor of shape {tuple(value.shape)} declares more bytes than it holds")
