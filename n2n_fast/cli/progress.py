"""What a command tells while it works: a bar or lines on stderr, curves for TensorBoard."""

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from n2n_fast.files.errors import BadInput
from n2n_fast.search.reinforce import Rollout, SearchProgress

LINE_SECONDS = 20.0  # between lines of progress where there is no terminal
REDRAW_SECONDS = 0.1
USUAL_COLUMNS = 80
TENSORBOARD = "tensorboard"  # its directory in a run's


class Curves:
    """Every number of every rollout, for TensorBoard, as soon as it is known."""

    def __init__(self, run: Path, rollouts: int) -> None:
        """run: its directory, in which nothing is written before the first rollout. rollouts: of an update.

        Raises BadInput without the package tensorboard.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BadInput("--tensorboard needs tensorboard: pip install tensorboard") from None
        self._open: Callable[[], Any] = functools.partial(SummaryWriter, str(run / TENSORBOARD))
        self._rollouts = rollouts
        self._writer: Any = None

    def add(self, rollout: Rollout) -> None:
        """Write a rollout's numbers; a run that goes on continues its curves."""
        self._writer = self._writer or self._open()
        step = rollout.update * self._rollouts + rollout.index + 1
        for name, value in asdict(rollout).items():
            if type(value) in (int, float) and name not in ("update", "index"):
                self._writer.add_scalar(f"{rollout.stage}/{name}", value, step)

    def close(self) -> None:
        """Write what is not yet written."""
        if self._writer is not None:
            self._writer.close()


class Bar(SearchProgress):
    """Progress on stderr: a bar for each part of the work; now and then a line where that is no terminal."""

    def __init__(self, quiet: bool, curves: "Curves | None" = None) -> None:
        """quiet: tell warnings alone. curves: of TensorBoard, drawn as well."""
        self._quiet, self._curves = quiet, curves
        self._name, self._length, self._done = "", 0, 0
        self._start = self._told = 0.0
        self._drawn = self._asked = False

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._curves is not None:
            self._curves.close()

    @contextlib.contextmanager
    def stops_by_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM ask for a stop; a second one stops at once."""

        def ask(number: int, _: Any) -> None:
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True
            self._close()
            click.echo("stopping as soon as the work at hand is kept; once more to leave at once", err=True)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stopping(self) -> bool:
        return self._asked

    def message(self, text: str) -> None:
        self._close()
        if not self._quiet or text.startswith("warning"):
            click.echo(text, err=True)

    def phase(self, name: str, length: int) -> None:
        self._close()
        self._name, self._length, self._done = name, length, 0
        self._start = self._told = time.perf_counter()
        self._advance(0, "")

    def rollout(self, rollout: Rollout, best: Rollout | None, compression: float | None) -> None:
        rate = 60 * (self._done + 1) / (time.perf_counter() - self._start)
        shown = "" if best is None or compression is None else f", best {best.reward:.3f} at {compression:.1f}x"
        if self._curves is not None:
            self._curves.add(rollout)
        self._advance(self._done + 1, f"reward {rollout.reward:.3f}{shown}, {rate:.1f} rollouts/min")

    def step(self, step: int, loss: float, accuracy: float) -> None:
        self._advance(step, f"loss {loss:.3f}, accuracy {accuracy:.1%}")

    def _advance(self, done: int, text: str) -> None:
        self._done, now = done, time.perf_counter()
        since, is_last = now - self._told, done == self._length
        left = f"{(now - self._start) / done * (self._length - done):.0f} s left" if done else ""
        if self._quiet:
            return
        if _can_redraw():
            if is_last or not self._drawn or since > REDRAW_SECONDS:
                width = _columns() - 1  # in the last column some terminals begin a new line
                line = progress_line(self._name, done / max(1, self._length), left, text, width)
                click.echo("\r" + line.ljust(width), nl=False, err=True)
                self._drawn, self._told = True, now
        elif done and (is_last or since > LINE_SECONDS):
            click.echo(f"{self._name}: {done}/{self._length}, {text}, {left}", err=True)
            self._told = now

    def _close(self) -> None:
        """End the line of a bar."""
        if self._drawn:
            click.echo(err=True)
        self._drawn = False


def progress_line(name: str, share: float, left: str, text: str, width: int) -> str:
    """The name of the work, a bar, what is done, the time left and `text`: as much of it as `width` characters take."""
    bar, percents = f"[{'#' * int(20 * share):-<20}]", f"{share:4.0%}"
    choices = [
        (name.ljust(30), bar, percents, left, text),
        (name, bar, percents, left, text),
        (name, percents, left, text),
        (name, percents, text),
    ]
    lines = ["  ".join(filter(None, parts)) for parts in choices]
    return next((line for line in lines if len(line) <= width), lines[-1][:width])


def _can_redraw() -> bool:
    """Whether stderr is a terminal that goes back to the start of a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _columns() -> int:
    """Width of the terminal behind stderr."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS
