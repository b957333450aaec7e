"""Every path of the CUDA kernels, run on the CPU: csrc/*.cu compiled as C++ against tests/cuda_on_cpu/."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from n2n_fast import native
from n2n_fast.native import _C
from n2n_fast.native.boundary import DTYPE_CODES
from test_native import (  # the tests among these run once more, by these kernels
    DTYPES,
    MANY_CLASSES,
    assert_loss,
    assert_results,
    assert_same,
    by_indexing,
    logits,
    plan,
    test_logits_that_are_not_finite_give_what_torch_gives,  # noqa: F401
    test_the_first_of_equal_logits_is_the_prediction,  # noqa: F401
)

HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SANITIZERS = os.environ.get("N2N_FAST_SANITIZE")  # set by .ci/sanitize
SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-g"] if SANITIZERS else []
SCHEDULES = [0, 1, 2, 3]
GUARD = 64  # bytes before and behind what a kernel writes, which it must leave alone

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compiled(source: Path, to: Path) -> Path:
    """Return the object file of one source, written to the folder `to`."""
    target = to / f"{source.name}.o"
    flags = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{CSRC}"]
    run([*flags, *SANITIZE, "-c", "-x", "c++", str(source), "-o", str(target)])
    return target


def run(arguments: Sequence[str]) -> None:
    done = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Kernels:
    """The launchers of both .cu files, from a shared library made of object files, as functions for `_C`."""

    def __init__(self, objects: Sequence[Path], to: Path) -> None:
        path = to / "kernels.so"
        run(["-shared", "-pthread", *SANITIZE, *map(str, objects), "-o", str(path)])
        self.library = ctypes.CDLL(str(path))
        self.library.materialize_pack_words.restype = ctypes.c_int64
        self.workspace_words = self.library.kd_loss_workspace_words()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let CPU tensors go to these kernels."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_C, "kd_loss_cpu", self.kd_loss)
            patch.setattr(_C, "materialize_cpu", self.materialize)
            yield

    def call(self, name: str, *arguments: float) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        as_c = [ctypes.c_double(a) if isinstance(a, float) else ctypes.c_int64(a) for a in arguments]
        message = function(*as_c)
        if message is not None:
            raise RuntimeError(message.decode())

    def kd_loss(self, dtype, rows, classes, student, teacher, labels, kd_weight, grad, loss, correct, *_) -> None:
        item = list(DTYPE_CODES)[dtype].itemsize
        outputs = (grad, rows * classes * item), (loss, max(4, item)), (correct, 8), (None, 8 * self.workspace_words)
        with contextlib.ExitStack() as stack:
            guards = [stack.enter_context(guarded(*output)) for output in outputs]
            self.call("kd_loss", dtype, rows, classes, student, teacher, labels, kd_weight, *guards)

    def materialize(self, table: np.ndarray, element_bytes: int, flat: int, elements: int, _: int) -> None:
        pieces, count, blocks = table.ctypes.data, len(table) // 12, ctypes.c_int64()
        words = self.library.materialize_pack_words(ctypes.c_int64(pieces), ctypes.c_int64(count))
        packed = np.empty(words, dtype=np.int64).ctypes
        with guarded(packed.data, 8 * words) as to:
            self.call("materialize_pack", pieces, count, element_bytes, elements, to, ctypes.addressof(blocks))
        with guarded(flat, elements * element_bytes) as to:
            self.call("materialize", packed.data, count, blocks.value, element_bytes, to)


@contextlib.contextmanager
def guarded(address: int | None, size: int) -> Iterator[int]:
    """Memory between guard bytes, for a kernel to write `size` bytes, which are copied to `address`; 0: no memory."""
    if address == 0:
        yield 0
        return
    raw = np.full(size + 2 * GUARD + 64, 0xA5, dtype=np.uint8)
    start = GUARD + -(raw.ctypes.data + GUARD) % 64
    inside = raw[start : start + size]
    inside[:] = 0xFF  # NaN in every type
    yield inside.ctypes.data
    assert (raw[:start] == 0xA5).all(), "written before the beginning"
    assert (raw[start + size :] == 0xA5).all(), "written beyond the end"
    if address is not None:
        ctypes.memmove(address, inside.ctypes.data, size)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Object files by the name of their source."""
    sources = [CSRC / name for name in ("kd_loss.cu", "materialize.cu", "materialize.cpp", "thread_pool.cpp")]
    to = tmp_path_factory.mktemp("cuda_on_cpu")
    return {source.name: compiled(source, to) for source in [*sources, HERE / "exports.cpp"]}


@pytest.fixture(scope="module", autouse=True)
def kernels(objects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    """In place for all tests of this module."""
    kernels = Kernels(list(objects.values()), tmp_path_factory.mktemp("kernels"))
    with kernels.in_place():
        yield kernels


@pytest.fixture(params=SCHEDULES, ids="schedule{}".format)
def schedule(request: pytest.FixtureRequest, kernels: Kernels):
    kernels.library.set_schedule(request.param)
    yield request.param
    kernels.library.set_schedule(0)


# Both ends of each path of kd_loss.cu: 1, 4 and 32 logits a lane; 8 logits a thread of a block; rows read twice.
SHAPES = [
    *[(0, 5), (1, 1), (9, 10), (5, 32), (6, 33), (3, 128)],
    *[(5, 129), (3, 1024), (2, 1025), (1, 4096), (2, 4097), (1, 9001)],
]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_of_every_path_and_dtype(shape, dtype, rtol, atol):
    arguments = *logits(*shape, dtype), 0.3
    got = native.kd_loss_and_grad(*arguments)
    assert_loss(got, *arguments, rtol=rtol, atol=atol)
    assert torch.equal(native.kd_loss(*arguments), got[0])


def test_more_rows_than_blocks():
    arguments = *logits(4 * 1024 + 7, 3), 0.3
    assert_loss(native.kd_loss_and_grad(*arguments), *arguments)


@pytest.mark.parametrize("shape", [(9, 10), (3, 700), (3, 1500), (2, 5000)], ids=str)
def test_the_loss_is_the_same_in_any_order_of_threads(kernels, schedule, shape):
    arguments = *logits(*shape), 0.3
    got = native.kd_loss_and_grad(*arguments)
    kernels.library.set_schedule(0)
    assert_same(got, native.kd_loss_and_grad(*arguments))


@pytest.mark.parametrize("classes", MANY_CLASSES)
@pytest.mark.parametrize("label", [-1, -100, 0])
def test_a_label_out_of_range_makes_its_row_nan(classes, label):
    student, teacher, labels = logits(2, classes)
    labels[1] = label if label < 0 else classes
    loss, grad, correct = native.kd_loss_and_grad(student, teacher, labels, 0.3)
    assert loss.isnan()
    assert grad[1].isnan().all()
    assert grad[0].isfinite().all()
    assert correct.item() == int(student[0].argmax() == labels[0])


@settings(max_examples=60, deadline=None)
@given(arguments=plan())
def test_materialize_is_indexing(arguments):
    assert_results(native.materialize(*arguments), [by_indexing(*one) for one in zip(*arguments, strict=True)])


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_materialize_of_many_tiles_and_many_weights(schedule, dtype):
    weight, vector, matrix = torch.randn(40, 48, 3, 3).to(dtype), torch.randn(5000).to(dtype), torch.randn(70, 64)
    weights = [weight, weight, vector, matrix.to(dtype), weight, vector, *[torch.randn(3).to(dtype)] * 50]
    keep_out = [torch.randperm(40)[:20], None, torch.randperm(5000), torch.arange(70).flip(0), None, None, *[None] * 50]
    keep_in = [torch.randperm(48)[:24], torch.arange(47), None, None, None, None, *[None] * 50]
    crops = [None, (1, 3), None, None, None, None, *[None] * 50]
    needed = native.materialize_numel(weights, keep_out, keep_in, crops)
    out = torch.empty(needed + 99, dtype=dtype)
    wanted = [by_indexing(*one) for one in zip(weights, keep_out, keep_in, crops, strict=True)]
    assert_results(native.materialize(weights, keep_out, keep_in, crops, out), wanted)
    assert not out[needed:].any()


def test_materialize_refuses_an_index_out_of_range():
    with pytest.raises(RuntimeError, match=re.escape("keep_in[0]: index 4 out of range for 4 input channels")):
        native.materialize([torch.randn(3, 4)], [None], [torch.tensor([1, 4])], [None])


def test_a_launch_that_cannot_be_is_reported(kernels):
    with pytest.raises(RuntimeError, match="CUDA error: invalid configuration argument, at materialize"):
        kernels.call("materialize", 0, 0, 0, 4, 0)


# What a review might miss, planted into a copy of the sources: the tests above must be able to see it.
BARRIER_AFTER = "of_warp[threadIdx.x / kWarp] = value;\n    __syncthreads();"
SOME_ONLY = "if (threadIdx.x % 64 < 32) __syncthreads();"
BARRIER_BEFORE = "__syncthreads();  // whoever still reads the previous reduction"
MUTANTS = {
    "no barrier between writing and reading": ("kd_loss.cu", BARRIER_AFTER, BARRIER_AFTER.split("\n")[0]),
    "no barrier between reading and writing anew": ("kd_loss.cu", BARRIER_BEFORE, ""),
    "a barrier that some threads never reach": ("kd_loss.cu", BARRIER_BEFORE, SOME_ONLY),
    "a logit too many": ("kd_loss.cu", "if (c < row.classes) narrow", "if (c <= row.classes) narrow"),
    "a logit too few": ("kd_loss.cu", "const bool inside = c < row.classes", "const bool inside = c < row.classes - 1"),
    "an element too many": ("materialize.cu", "e < job.end; e += kThreads", "e <= job.end; e += kThreads"),
    "the wrong corner": ("materialize.cu", "piece.corner()", "(piece.corner() + 1)"),
}  # fmt: skip


def finds_something_wrong(kernels: Kernels) -> bool:
    """Whether a few of the comparisons above fail."""
    weights = [torch.randn(4, 3, 5, 5), torch.randn(7)]
    try:
        for schedule in SCHEDULES:
            kernels.library.set_schedule(schedule)
            with kernels.in_place():
                for shape in ((2, 20), (3, 1100)):
                    arguments = *logits(*shape), 0.3
                    assert_loss(native.kd_loss_and_grad(*arguments), *arguments)
                results = native.materialize(weights, [None] * 2, [None] * 2, [(3, 3), None])
            assert_results(results, [weights[0][:, :, 1:4, 1:4], weights[1]])
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_fault_is_seen(mutant, kernels, objects, tmp_path):
    assert not finds_something_wrong(kernels)
    name, right, wrong = MUTANTS[mutant]
    source = (CSRC / name).read_text()
    assert source.count(right) == 1
    copy = tmp_path / name
    copy.write_text(source.replace(right, wrong))
    assert finds_something_wrong(Kernels([*(objects | {name: compiled(copy, tmp_path)}).values()], tmp_path))
