"""What a command tells while it works: a bar or lines on stderr, curves for TensorBoard."""

import contextlib
import functools
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
        self._bar: Any = None
        self._name, self._length, self._done = "", 0, 0
        self._start = self._told = 0.0
        self._asked = False

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
        if sys.stderr.isatty() and not self._quiet:
            self._bar = click.progressbar(
                length=length, label=f"{name:<30}", file=sys.stderr, item_show_func=lambda text: text, width=20
            )
            self._bar.__enter__()

    def rollout(self, rollout: Rollout, best: Rollout | None, compression: float | None) -> None:
        rate = 60 * (self._done + 1) / (time.perf_counter() - self._start)
        shown = "" if best is None or compression is None else f", best {best.reward:.3f} at {compression:.1f}x"
        if self._curves is not None:
            self._curves.add(rollout)
        self._advance(self._done + 1, f"reward {rollout.reward:.3f}{shown}, {rate:.1f} rollouts/min")

    def step(self, step: int, loss: float, accuracy: float) -> None:
        self._advance(step, f"loss {loss:.3f}, accuracy {accuracy:.1%}")

    def _advance(self, done: int, text: str) -> None:
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(done - self._done, text)
        elif not self._quiet and (now - self._told > LINE_SECONDS or done == self._length):
            left = (now - self._start) / done * (self._length - done)
            click.echo(f"{self._name}: {done}/{self._length}, {text}, {left:.0f} s left", err=True)
            self._told = now
        self._done = done

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
