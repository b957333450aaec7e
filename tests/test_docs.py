"""Everything that README and docs show is run, or at least understood, as it stands there."""

import contextlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import n2n_fast
from n2n_fast.cli import main
from n2n_fast.training import teachers

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "bench").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LONGEST = 200  # lines of a page that is read once


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page):
    """The n2n-fast commands of a page's shell blocks, without comments and joined where lines go on."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    found = [shlex.split(part, comments=True) for line in text.splitlines() for part in line.split("&&")]
    return [words[1:] for words in found if words[:1] == ["n2n-fast"]]


def headings(page):
    """The names by which a link leads to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short_and_what_it_names_exists(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    scripts = re.findall(r"\b(?:python|pytest) ([\w/]+\.py)", text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    settings = set(re.findall(r"--set (\w+)=", text))
    assert settings - {"name"} <= {field.name for field in fields(n2n_fast.SearchConfig)}
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target, section in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        assert not section or section in headings(linked), f"{target}#{section}"


EVERY_COMMAND = [(page.name, words) for page in PAGES for words in commands(page)]
assert len(EVERY_COMMAND) > 5


@pytest.mark.parametrize(("page", "words"), EVERY_COMMAND, ids=lambda value: str(value)[:60])
def test_every_command_is_understood(page, words):
    context = main.cli.make_context("n2n-fast", list(words))
    if words[0].startswith("-"):
        return
    name, command, rest = main.cli.resolve_command(context, list(words))
    with contextlib.suppress(FileNotFoundError):  # --resume reads its run, once every option is known
        command.make_context(name, rest, parent=context)


def run_blocks(page, names):
    shown = blocks(ROOT / page, "python")
    assert shown
    for block in shown:
        exec(compile(block, page, "exec"), names)


@pytest.fixture
def known(tmp_path, monkeypatch):
    """What the blocks of a page take for granted: a teacher, its data and some images; searches are cut short."""
    monkeypatch.chdir(tmp_path)
    data = n2n_fast.load("digits", validation=0.2)
    model = teachers.create("digits_resnet", data.classes, 1, seed=0)
    teachers.train_teacher(model, data, epochs=3.0, seed=0)
    short = {"updates": 1, "rollouts": 2, "anchors": 0, "stage_epochs": 0.2, "final_epochs": 0.5, "keep_top": 1,
             "epoch_steps": 0}  # fmt: skip
    plain = n2n_fast.SearchConfig
    monkeypatch.setattr(n2n_fast, "SearchConfig", lambda **settings: plain(**{**settings, **short}))
    monkeypatch.setattr(n2n_fast, "load", lambda spec: data)
    return {"teacher": model, "images": data.train.batch(torch.arange(64))[0]}


@pytest.mark.parametrize("page", ["README.md", "docs/networks.md"])
def test_the_blocks_of_a_page_run(page, known):
    run_blocks(page, known)


def test_the_blocks_on_embedding_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_blocks("docs/embedding.md", {})
