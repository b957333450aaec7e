"""A run's directory: what is written there survives a crash at any moment, and belongs to one process at a time."""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from n2n_fast.files.errors import BadInput
from n2n_fast.files.safe_load import parse_json, read_tensors, understood
from n2n_fast.files.states import on_cpu
from n2n_fast.search.journal import is_whole

KEEP_SECONDS = 30.0  # between two states of a training
SHOWN_KEYS = 5


class Interrupted(KeyboardInterrupt):
    """The search was asked to stop, and has kept all that was done."""


class RunDirectory:
    """One run's files. Use as a context: the directory is locked for as long as it lasts.

    history.jsonl is the journal: a line for each piece of work, on the disk before the work counts. checkpoint.pt is
    the state between two updates and how long the journal was then; lines behind it are recovered, and stay where they
    are: a search that goes on comes to the same lines, one after the other.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        resume: bool = False,
        command: Mapping[str, Any] | None = None,
    ) -> None:
        """settings: for config.json; a run that goes on must have been made by the same. command: noted beside them.

        Entering the context raises BadInput where the directory cannot be used.
        """
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._resume, self._command = resume, command
        self._stack = contextlib.ExitStack()
        self.checkpoint: dict[str, Any] | None = None
        self.recovered: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._length = 0  # of the journal, as far as this process has come
        self._ahead = b""  # what was recovered behind that

    def __enter__(self) -> "RunDirectory":
        with contextlib.ExitStack() as stack:
            self._make()
            self._lock(stack)
            self._check_settings()
            self.checkpoint = self.read_tensors("checkpoint.pt")
            (self.path / "history.jsonl").touch()
            self._history = stack.enter_context((self.path / "history.jsonl").open("r+b"))
            self._recover()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if not (self.path / "config.json").exists():  # nothing began: leave no trace
            for name in ("history.jsonl", ".lock"):
                (self.path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()
        self._stack.close()

    # Claiming

    def _make(self) -> None:
        if self._resume and not (self.path / "config.json").is_file():
            raise BadInput(f"{self.path}: no run to resume in it; give the directory of a run")
        if not self._resume and (self.path / "config.json").exists():
            raise BadInput(f"{self.path}: holds a run already; give another --out, or go on with --resume {self.path}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be written ({error.strerror}); give another --out") from None

    def _lock(self, stack: contextlib.ExitStack) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        file = stack.enter_context((self.path / ".lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(
                f"{self.path}: another process works on this run; wait for it or give another --out"
            ) from None

    def _check_settings(self) -> None:
        if not self._resume:
            return
        path = self.path / "config.json"
        held = read_settings(self.path)
        held.pop("command", None)
        keys = sorted(key for key in {**held, **self._settings} if held.get(key) != self._settings.get(key))
        if keys:
            shown = ", ".join(f"{k} ({held.get(k)!r} there, {self._settings.get(k)!r} here)" for k in keys[:SHOWN_KEYS])
            more = ", ..." if len(keys) > SHOWN_KEYS else ""
            raise BadInput(f"{path}: made by another configuration: {shown}{more}; give the same settings")

    def begin(self) -> None:
        """Write config.json, which makes the directory that of a run: all that can be wrong with it has been seen."""
        if not self._resume:
            noted = {} if self._command is None else {"command": dict(self._command)}
            self.write_json("config.json", {**self._settings, **noted})

    # The journal

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line to history.jsonl; it is on the disk when this returns."""
        text = json.dumps(line).encode() + b"\n"
        if self._ahead.startswith(text):  # recovered
            self._ahead = self._ahead[len(text) :]
        else:
            self._history.truncate(self._length)
            self._ahead = b""
            self._history.seek(self._length)
            self._history.write(text)
            self._history.flush()
            os.fsync(self._history.fileno())
        self._length += len(text)

    def _recover(self) -> None:
        """Learn what the journal holds behind the checkpoint; from a torn line on it is cut off."""
        length = 0 if self.checkpoint is None else self.checkpoint.get("history")
        if type(length) is not int or length < 0:
            raise BadInput(f"{self.path / 'checkpoint.pt'}: not written by n2n-fast run")
        text = (self.path / "history.jsonl").read_bytes()
        if len(text) < length:
            raise BadInput(f"{self.path}: history.jsonl is shorter than when checkpoint.pt was written; it was changed")
        self._length, whole = length, length
        for line in text[length:].splitlines(keepends=True):
            try:
                found = parse_json(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            if is_whole(found):
                self.recovered[found["kind"], found["stage"], found["update"], found["index"]] = found
            whole += len(line)
        self._ahead = text[length:whole]
        self._history.truncate(whole)

    # Files written whole

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace checkpoint.pt by `state`, of tensors, numbers, strings, lists and dictionaries."""
        self.write_tensors("checkpoint.pt", {**state, "history": self._length})

    def write(self, name: str, content: bytes) -> None:
        """Replace a file whole: whatever happens, it is as it was before or as it should be."""
        aside = self.path / f".{name}.new"
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path / name)
        with _opened_directory(self.path) as descriptor:
            os.fsync(descriptor)

    def write_json(self, name: str, content: Any) -> None:
        """Replace a file by JSON."""
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def write_tensors(self, name: str, content: Any) -> None:
        """Replace a file by what torch.save makes of tensors, of any device, and plain values."""
        file = io.BytesIO()
        torch.save(on_cpu(content), file)
        self.write(name, file.getvalue())

    def read_tensors(self, name: str) -> dict[str, Any] | None:
        """What `write_tensors` wrote; None where there is no such file."""
        path = self.path / name
        return read_state(path) if path.exists() else None

    def training(self, name: str, stopping: Callable[[], bool]) -> "KeptTraining":
        """A keeper for the training of this name."""
        return KeptTraining(self, name, stopping)

    def drop_training(self) -> None:
        """Forget the training at hand: it has ended, and the checkpoint holds what came of it."""
        (self.path / "training.pt").unlink(missing_ok=True)


class KeptTraining:
    """Keeps the training at hand in training.pt, every half minute and when the search is asked to stop."""

    def __init__(self, directory: RunDirectory, name: str, stopping: Callable[[], bool]) -> None:
        """stopping: whether the search has been asked to stop."""
        self._directory, self._name, self._stopping = directory, name, stopping
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state of this very training, if it was kept."""
        held = self._directory.read_tensors("training.pt")
        if held is None or held.get("name") != self._name:
            return None
        with understood(self._directory.path / "training.pt"):
            return dict(held["state"])

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Keep the state if it is time for it; raises Interrupted after that where the search was asked to stop."""
        stop = self._stopping()
        if stop or time.monotonic() - self._last > KEEP_SECONDS:
            self._directory.write_tensors("training.pt", {"name": self._name, "state": state()})
            self._last = time.monotonic()
        if stop:
            raise Interrupted(self._directory.path)


def read_settings(path: Path) -> dict[str, Any]:
    """What config.json of a run directory holds; BadInput where it is none."""
    file = path / "config.json"
    try:
        held = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise TypeError
    except (ValueError, TypeError):
        raise BadInput(f"{file}: not written by n2n-fast run") from None
    return held


def read_state(path: Path) -> dict[str, Any]:
    """A dictionary that `write_tensors` wrote; BadInput where the file holds anything else."""
    held = read_tensors(path)
    if not isinstance(held, dict):
        raise BadInput(f"{path}: not written by n2n-fast")
    return held


@contextlib.contextmanager
def _opened_directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
