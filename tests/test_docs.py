"""Everything that README and docs show is run, or at least understood, as it stands there."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import n2n_fast
from n2n_fast.cli import main
from n2n_fast.training import teachers
from n2n_fast.training.data import ImageData

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "bench").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LONGEST = 200  # lines of a page that is read once


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The n2n-fast commands of a page's shell blocks, without comments and joined where lines go on."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    found = [shlex.split(part, comments=True) for line in text.splitlines() for part in line.split("&&")]
    return [words[1:] for words in found if words[:1] == ["n2n-fast"]]


def anchors(page: Path) -> set[str]:
    """The names by which a link leads to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


EVERY_COMMAND = [(page.name, words) for page in PAGES for words in commands(page)]


def test_there_are_commands_and_blocks_to_try() -> None:
    assert len(EVERY_COMMAND) > 5
    assert all(blocks(ROOT / page, "python") for page in ("README.md", "docs/networks.md", "docs/embedding.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_and_benchmarks_are_run_with_the_installed_package(page: Path) -> None:
    """`python -m pytest` in a checkout imports that, where nothing is built."""
    assert "python -m pytest" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short_and_their_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target, section in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        if section:
            assert section in anchors(linked), f"{target}#{section}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_pages_name_exist(page: Path) -> None:
    named = re.findall(r"\b(?:python|pytest) ([\w/]+\.py)", page.read_text(encoding="utf-8"))
    assert [script for script in named if not (ROOT / script).exists()] == []


def test_settings_that_pages_name_exist() -> None:
    known = {field.name for field in fields(n2n_fast.SearchConfig)}
    named = {name for page in PAGES for name in re.findall(r"--set (\w+)=", page.read_text(encoding="utf-8"))}
    assert named - {"name"} <= known


@pytest.mark.parametrize(("page", "words"), EVERY_COMMAND, ids=lambda value: str(value)[:60])
def test_every_command_is_understood(page: str, words: list[str]) -> None:
    group = main.cli
    context = group.make_context("n2n-fast", list(words))
    if words[0].startswith("-"):
        return
    name, command, rest = group.resolve_command(context, list(words))
    assert command is not None
    command.make_context(name, rest, parent=context)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the blocks of a page take for granted: a teacher, its data and some images; searches are cut short."""
    monkeypatch.chdir(tmp_path)
    data: ImageData = n2n_fast.load("digits", validation=0.2)
    model = teachers.create("digits_resnet", data.classes, 1, seed=0)
    teachers.train_teacher(model, data, epochs=3.0, seed=0)
    short = {"updates": 1, "rollouts": 2, "anchors": 0, "stage_epochs": 0.2, "final_epochs": 0.5, "keep_top": 1}
    plain = n2n_fast.SearchConfig
    monkeypatch.setattr(n2n_fast, "SearchConfig", lambda **settings: plain(**{**settings, **short}))
    monkeypatch.setattr(n2n_fast, "load", lambda spec: data)
    return {"teacher": model, "images": data.train.batch(torch.arange(64))[0]}


@pytest.mark.parametrize("page", ["README.md", "docs/networks.md"])
def test_the_blocks_of_a_page_run(page: str, known: dict[str, object]) -> None:
    for block in blocks(ROOT / page, "python"):
        exec(compile(block, page, "exec"), known)


def test_the_blocks_on_embedding_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(ROOT / "docs" / "embedding.md", "python"):
        exec(compile(block, "embedding.md", "exec"), names)
