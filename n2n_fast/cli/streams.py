"""stdout and stderr that no reader, locale or closed descriptor can turn into the end of a run."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

NO_READER = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ESHUTDOWN)  # EIO: the terminal has gone


class Stream:
    """A text stream that drops what nobody reads any more, and replaces characters that its encoding lacks."""

    def __init__(self, stream: TextIO, drops_all: bool) -> None:
        """drops_all: whatever fails is dropped, a full disk too."""
        self._stream, self._drops_all = stream, drops_all
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's own, but for its bytes: past this class nobody writes."""
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written; its whole length, as nobody is to try again."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        if text:  # click asks by an empty text what kind of stream this is
            with self._dropping():
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand over what is written."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # a signal's handler writes while the stream is being written
            pass
        except OSError as error:
            self._to_nowhere()
            if not self._drops_all and error.errno not in NO_READER:
                error.filename = "stdout"
                raise

    def _to_nowhere(self) -> None:
        """What is in the buffer, and all that comes, goes to the null device: else the interpreter's exit fails."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Within it, sys.stdout and sys.stderr are such streams; of stdout alone a full disk is an error."""
    _open_descriptors()
    with contextlib.ExitStack() as stack:
        out, err = (stream or stack.enter_context(_nowhere()) for stream in (sys.stdout, sys.stderr))
        stack.enter_context(contextlib.redirect_stdout(Stream(out, drops_all=False)))
        stack.enter_context(contextlib.redirect_stderr(Stream(err, drops_all=True)))
        yield


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123


def _open_descriptors() -> None:
    """Open closed ones of 0, 1, 2 on the null device: a file of the run would get the number, and C's messages."""
    for descriptor in range(3):
        if not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
