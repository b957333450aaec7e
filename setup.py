"""Builds ``n2n_fast.native._C`` by driving CMake and Ninja; torch is neither imported nor needed.

``N2N_FAST_CUDA`` (environment): ``AUTO`` (default: CUDA where CMake finds a CUDA compiler), ``ON`` or ``OFF``.
``CMAKE_ARGS`` (environment): further arguments for CMake, separated by spaces.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NOT_BUILT = """
n2n_fast could not be built; CMake says above why. It needs a C++17 compiler (`apt-get install g++`, or CXX=PATH) and
nothing of torch. N2N_FAST_CUDA=OFF leaves the CUDA kernels out, if it is those that fail."""


def tool(name: str) -> str:
    """Path of a build tool: the one installed beside this interpreter, else the one on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"{name} was not found; `pip install {name}` provides it")
    return found


class CMakeBuild(build_ext):
    """Configures and builds the CMake project, and lets CMake put the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DN2N_FAST_OUTPUT_DIRECTORY={output.parent}",
            f"-DN2N_FAST_OUTPUT_NAME={output.name}",
            f"-DN2N_FAST_CUDA={os.environ.get('N2N_FAST_CUDA', 'AUTO')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for step in (["-S", str(ROOT), "-B", str(build), "-G", "Ninja", *configure], ["--build", str(build)]):
            if subprocess.run([tool("cmake"), *step], check=False).returncode:
                raise SystemExit(NOT_BUILT)


setup(ext_modules=[Extension("n2n_fast.native._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
