"""The command line, run in this process as a user would run it."""

import contextlib
import io
import sys

import pytest

from n2n_fast.cli import main


def invoke(*words):
    """Run n2n-fast: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["n2n-fast", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main.main()
    return stop.value.code, out.getvalue(), err.getvalue()


def output(*words):
    """What a command prints that ends well."""
    code, out, err = invoke(*words)
    assert code == 0, err
    return out


def told(err):
    """The lines of stderr without warnings and what the data were taken to be."""
    return [line for line in err.splitlines() if not line.startswith(("data: ", "  ", "warning: "))]


def refusal(*words):
    """The one line in which a command is refused, with exit code 2."""
    code, _, err = invoke(*words)
    assert (code, len(told(err))) == (2, 1), err
    (line,) = told(err)
    assert line.startswith("n2n-fast: ")
    return f"{line}\n"
