"""The house: five wings above the ground, imports that go down only, and no circle within a wing."""

import ast
import graphlib
from pathlib import Path

import pytest

import n2n_fast

ROOT = Path(n2n_fast.__file__).parent
WINGS = ("cli", "search", "training", "networks", "native", "files")  # a wing may import from those behind it
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("*/*.py")}


def imported(path):
    """The modules of this package that a file imports, wherever in it, without `n2n_fast.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "n2n_fast":
            base = node.module.removeprefix("n2n_fast").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found = name if name in MODULES else base or name
                if found.partition(".")[0] in WINGS:  # and not the package's own names, such as its version
                    yield found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    wing = WINGS.index(module.partition(".")[0])
    for other in imported(MODULES[module]):
        assert WINGS.index(other.partition(".")[0]) >= wing, f"{module} imports {other}"


def test_there_is_no_circle():
    graphlib.TopologicalSorter({module: set(imported(path)) for module, path in MODULES.items()}).prepare()


def test_every_file_stands_in_a_wing():
    assert {path.name for path in ROOT.glob("*.py")} <= {"__init__.py", "__main__.py"}
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == set(WINGS)
