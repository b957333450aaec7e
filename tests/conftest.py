"""What several modules' tests share."""

import pytest

import n2n_fast
from quarters import TINY, quarters, taught


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The directory of a finished run of seconds."""
    data = quarters()
    return n2n_fast.compress(taught(data), data, TINY, tmp_path_factory.mktemp("runs") / "tiny").out


@pytest.fixture
def place(monkeypatch, tmp_path):
    """An empty directory, in which commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
