"""A run's directory: what is written there survives a crash at any moment, and belongs to one process at a time.

A run goes on from checkpoint.pt alone. history.jsonl is for readers: it is cut back to what the checkpoint knows of it,
and the work behind that, at most one update or one training, is done again.
"""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from n2n_fast.files.errors import BadInput
from n2n_fast.files.safe_load import parse_json, read_tensors, understood
from n2n_fast.files.whole import aside, try_writing, write_json, write_tensors, write_whole

CHECKPOINT, HISTORY, TRAINING, SETTINGS = "checkpoint.pt", "history.jsonl", "training.pt", "config.json"
LOCK = ".lock"
SECONDS_BETWEEN = 30.0  # two checkpoints of a training
SHOWN_KEYS, SHOWN = 5, 60  # of settings that differ, and the characters of each value


class Interrupted(KeyboardInterrupt):
    """The work was asked to stop, and what is done is kept in the directory that this names."""


class RunDirectory:
    """One run's files. Use as a context: the directory is locked for as long as it lasts."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        resume: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """settings: for config.json; a resumed run must have the same, but for its "command" and "data_read".

        stopping: whether the search was asked to stop. Entering the context raises BadInput where the directory cannot
        be used.
        """
        self.path, self._resume, self._stopping = path, resume, stopping
        self._settings = json.loads(json.dumps(settings))
        self._stack = contextlib.ExitStack()
        self.checkpoint: dict[str, Any] | None = None
        self._length = 0

    def __enter__(self) -> "RunDirectory":
        with self._stack:
            self._stack.enter_context(reserved(self.path, self._resume))
            if self._resume:
                _check_settings(self.path, self._settings)
                checkpoint = self.path / CHECKPOINT
                self.checkpoint = read_state(checkpoint) if checkpoint.exists() else None
                self._length = self._known_history()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _known_history(self) -> int:
        """How many bytes of it the checkpoint knows of."""
        length = 0 if self.checkpoint is None else self.checkpoint.get("history")
        if type(length) is not int or length < 0:
            raise BadInput(f"{self.path / CHECKPOINT}: not written by n2n-fast run")
        file = self.path / HISTORY
        if length > (file.stat().st_size if file.exists() else 0):
            raise BadInput(f"{self.path}: {HISTORY} is shorter than when {CHECKPOINT} was written; it was changed")
        return length

    def begin(self) -> None:
        """Write config.json, which makes the directory that of a run: its settings and teacher have been checked.

        Of a run that goes on, forget the history behind the checkpoint: the search will come to it again.
        """
        if not self._resume:
            self.write_json(SETTINGS, self._settings)
        (self.path / HISTORY).touch()
        self._history = self._stack.enter_context((self.path / HISTORY).open("r+b"))
        self._history.truncate(self._length)
        self._history.seek(self._length)

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to history.jsonl."""
        self._history.write(json.dumps(line).encode() + b"\n")
        self._history.flush()

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace checkpoint.pt by `state`, of tensors, numbers, strings, lists and dictionaries.

        The current training, if any, has ended with it. Raises Interrupted where the search was asked to stop.
        """
        os.fsync(self._history.fileno())
        self.write_tensors(CHECKPOINT, {**state, "history": self._history.tell()})
        (self.path / TRAINING).unlink(missing_ok=True)
        if self._stopping():
            raise Interrupted(self.path)

    def training(self, name: str) -> "TrainingCheckpointer":
        """The checkpointer of the training of this name."""
        return TrainingCheckpointer(self.path / TRAINING, name, self._stopping)

    def write(self, name: str, content: bytes) -> None:
        """Replace a file whole."""
        write_whole(self.path / name, content)

    def write_json(self, name: str, content: Any) -> None:
        """Replace a file by JSON."""
        write_json(self.path / name, content)

    def write_tensors(self, name: str, content: Any) -> None:
        """Replace a file by tensors, of any device, and plain values."""
        write_tensors(self.path / name, content)


class TrainingCheckpointer:
    """Keeps a training in a file, every half minute and when it is asked to stop."""

    def __init__(self, path: Path, name: Any, stopping: Callable[[], bool]) -> None:
        """name: plain values that tell this training from others. stopping: whether it was asked to stop."""
        self._path, self._name, self._stopping = path, name, stopping
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state of this very training, if it was kept."""
        saved = read_state(self._path) if self._path.exists() else None
        if saved is None or saved.get("name") != self._name:
            return None
        with understood(self._path):
            return dict(saved["state"])

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Keep the state if it is time for it; raises Interrupted after that where the training is to stop."""
        stop = self._stopping()
        if stop or time.monotonic() - self._last > SECONDS_BETWEEN:
            write_tensors(self._path, {"name": self._name, "state": state()})
            self._last = time.monotonic()
        if stop:
            raise Interrupted(self._path.parent)


def read_settings(path: Path) -> dict[str, Any]:
    """What config.json of a run directory holds; BadInput where it is none."""
    file = path / SETTINGS
    try:
        settings = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError
    except (ValueError, TypeError):
        raise BadInput(f"{file}: not written by n2n-fast run") from None
    return settings


def read_state(path: Path) -> dict[str, Any]:
    """A dictionary that `write_tensors` wrote; BadInput where the file holds anything else."""
    state = read_tensors(path)
    if not isinstance(state, dict):
        raise BadInput(f"{path}: not written by n2n-fast")
    return state


@contextlib.contextmanager
def reserved(path: Path, resume: bool = False) -> Iterator[None]:
    """The directory of a run for this process alone, made with its parents where there is none.

    A new run takes an empty directory; what is made for it is removed again unless the run begins meanwhile. resume:
    the directory has to be that of a run. Raises BadInput where it cannot be used or written.
    """
    with contextlib.ExitStack() as stack:
        with writing(path):
            if not resume:
                stack.callback(_remove_unbegun, path, _missing(path))
                path.mkdir(parents=True, exist_ok=True)  # first: where nothing was, a/../b may now be b
            _check_content(path, resume)
            stack.enter_context(locked(path / LOCK, path))
            try_writing(path)
        yield


@contextlib.contextmanager
def claimed(parent: Path) -> Iterator[Path]:
    """The first of parent/1, parent/2, ... that does not exist, made by this process; removed if it stays empty."""
    missing = _missing(parent)
    with writing(parent):
        for number in itertools.count(1):
            path = parent / str(number)
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                break
    try:
        yield path
    finally:
        _remove_unbegun(path, [path, *missing])


@contextlib.contextmanager
def locked(file: Path, what: Path) -> Iterator[None]:
    """`what` for this process alone: an empty file is locked, and removed afterwards. Raises BadInput, and OSError."""
    with file.open("a") as lock:
        if not _lock(lock):
            raise BadInput(f"{what}: another process works on it; wait for that or give another --out")
        try:
            yield
        finally:
            if lock.tell() == 0:
                with contextlib.suppress(OSError):
                    file.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, an OSError becomes the line that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); give another --out") from None


def _missing(path: Path) -> list[Path]:
    """Those of a directory and its parents that do not exist, the innermost first."""
    return [each for each in (path, *path.parents) if not each.exists()]


def _check_content(path: Path, resume: bool) -> None:
    """Raise BadInput for a directory that is not a run's, or one with anything in it for a new run."""
    begun = (path / SETTINGS).is_file()
    if resume and not begun:
        raise BadInput(f"{path}: no run to resume in it; give the directory of a run")
    if resume:
        return
    if begun:
        raise BadInput(f"{path}: holds a run already; give another --out, or go on with --resume {path}")
    names = sorted(file.name for file in path.iterdir() if not _is_leftover(file))
    if names:
        raise BadInput(f"{path}: is not empty, {names[0]} is in it; give another --out")


def _is_leftover(file: Path) -> bool:
    """Whether a run that was killed before it began may have left this file."""
    return file.name == aside(file.with_name(SETTINGS)).name or (
        file.name == LOCK and file.is_file() and file.stat().st_size == 0
    )


def _remove_unbegun(path: Path, made: list[Path]) -> None:
    """Leave no trace of a run that did not begin; made: its directories, the innermost first."""
    if not (path / SETTINGS).exists():
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _lock(file: IO[str]) -> bool:
    """Lock an open file, until it is closed; whether it could be, and the file is still there."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except ImportError:  # no such locks on Windows
        return True
    except (BlockingIOError, FileNotFoundError):
        return False


def _check_settings(path: Path, here: Mapping[str, Any]) -> None:
    """Raise BadInput where the run was begun with other settings than these."""
    there = read_settings(path)
    ignored = dict.fromkeys(("command", "data_read"))
    check_same({**there, **ignored}, {**here, **ignored}, path / SETTINGS)


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], file: Path) -> None:
    """Raise BadInput that names the settings in `file` which differ from those here."""
    old, new = _flat(there), _flat(here)
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if names:
        other = [f"{n} ({old.get(n)!r:.{SHOWN}} there, {new.get(n)!r:.{SHOWN}} here)" for n in names[:SHOWN_KEYS]]
        more = ", ..." if len(names) > SHOWN_KEYS else ""
        raise BadInput(f"{file}: made by another configuration: {', '.join(other)}{more}; give the same settings")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those within one as "data.mean"."""
    plain = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    within = (item for item in settings.items() if isinstance(item[1], dict))
    return {**plain, **{f"{name}.{key}": value for name, inner in within for key, value in inner.items()}}
