"""The build: what is declared, what is refused, and that torch has no part in it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake")
FOREIGN = {"torch", "ATen", "c10", "pybind11", "Python"}


@pytest.mark.skipif(CMAKE is None or shutil.which("ninja") is None, reason="needs cmake and ninja")
@pytest.mark.parametrize(
    ("choice", "code", "message"),
    [
        ("OFF", 0, "n2n_fast: CUDA for ''"),
        ("ON", 1, "N2N_FAST_CUDA=ON, but CMake found no CUDA compiler"),
        ("maybe", 1, "expected AUTO, ON or OFF, got 'maybe'"),
    ],
)
def test_the_choice_of_cuda(tmp_path, monkeypatch, choice, code, message):
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is only installed where the package is built")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-such-compiler"))
    options = [f"-DN2N_FAST_CUDA={choice}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert message in " ".join((done.stdout + done.stderr).split())


def test_native_sources_know_neither_torch_nor_python():
    for source in (ROOT / "csrc").iterdir():
        foreign = {name for name in re.findall(r'#include [<"](\w+)', source.read_text()) if name in FOREIGN}
        assert foreign == ({"pybind11"} if source.name == "bindings.cpp" else set())


def test_only_its_own_wing_imports_the_native_module():
    files = (ROOT / "n2n_fast").rglob("*.py")
    assert {p.parent.name for p in files if re.search(r"import _C\b|native\._C\b", p.read_text())} == {"native"}


def test_a_checkout_that_is_not_built_says_so(tmp_path):
    shutil.copytree(ROOT / "n2n_fast", tmp_path / "n2n_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "import n2n_fast"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: n2n_fast was imported from {tmp_path / 'n2n_fast'}, where its native core")
    assert last.endswith("pip install -e .")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
@pytest.mark.parametrize("name", ["kd_loss", "materialize"])
def test_kernels_do_not_spill_registers(name, tmp_path):
    arch = [flag for sm in (80, 90, 100) for flag in ("-gencode", f"arch=compute_{sm},code=sm_{sm}")]
    command = ["nvcc", "-std=c++17", "-O3", *arch, "-Xptxas", "-v", "-c", str(ROOT / "csrc" / f"{name}.cu")]
    done = subprocess.run([*command, "-o", str(tmp_path / "x.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    assert len(spills) >= 9
    assert set(spills) == {"0"}
