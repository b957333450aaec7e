"""Every path of the CUDA kernels, run on the CPU: csrc/*.cu compiled as C++ against tests/cuda_on_cpu/."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from n2n_fast import native
from n2n_fast.native.boundary import DTYPE_CODES
from n2n_fast.native.kd_loss import _loss_dtype
from n2n_fast.native.materialize import KernelSize, _check_materialize, _host_index, _table, _views
from test_native import DTYPES, Index, assert_results, by_indexing, logits, plan

HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SANITIZERS = os.environ.get("N2N_FAST_SANITIZE")  # set by .ci/sanitize
SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-g"] if SANITIZERS else []
SCHEDULES = [0, 1, 2, 3]
GUARD = 64  # bytes before and behind what a kernel writes, which it must leave alone

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compiled(source: Path, csrc: Path, to: Path) -> Path:
    """Return the object file of one source, written to the folder `to`."""
    target = to / f"{source.name}.o"
    flags = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{csrc}"]
    run([*flags, *SANITIZE, "-c", "-x", "c++", str(source), "-o", str(target)])
    return target


def run(arguments: Sequence[str]) -> None:
    done = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Kernels:
    """The launchers of both .cu files, from a shared library made of object files."""

    def __init__(self, objects: Sequence[Path], to: Path) -> None:
        library = to / "kernels.so"
        run(["-shared", "-pthread", *SANITIZE, *map(str, objects), "-o", str(library)])
        self.library = ctypes.CDLL(str(library))
        for name in ("kd_loss", "materialize_pack", "materialize"):
            getattr(self.library, name).restype = ctypes.c_char_p
        for name in ("materialize_pack_words", "kd_loss_workspace_words"):
            getattr(self.library, name).restype = ctypes.c_int64

    def call(self, name: str, *arguments: object) -> None:
        message = getattr(self.library, name)(*map(as_c, arguments))
        if message is not None:
            raise RuntimeError(message.decode())

    def kd_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kd_weight: float, with_grad: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        (loss, loss_guard), (correct, correct_guard) = (
            guarded((), _loss_dtype(student.dtype)),
            guarded((), torch.int64),
        )
        grad, grad_guard = guarded(tuple(student.shape), student.dtype)
        workspace, workspace_guard = guarded((self.library.kd_loss_workspace_words(),), torch.int64)
        inputs = (student.contiguous(), teacher.contiguous(), labels.contiguous())
        outputs = (grad if with_grad else None, loss, correct, workspace)
        self.call("kd_loss", DTYPE_CODES[student.dtype], *student.shape, *inputs, kd_weight, *outputs)
        for guard in (loss_guard, correct_guard, grad_guard, workspace_guard):
            guard()
        return loss, grad if with_grad else None, correct

    def materialize(
        self,
        weights: Sequence[Tensor],
        keep_out: Sequence[Index],
        keep_in: Sequence[Index],
        kernels: Sequence[KernelSize],
        spare: int = 0,
    ) -> list[Tensor]:
        layout = _check_materialize(weights, keep_out, keep_in, kernels)
        weights = [w.contiguous() for w in weights]
        rows, columns = [_host_index(i) for i in keep_out], [_host_index(i) for i in keep_in]
        table = _table(weights, rows, columns, layout)
        flat, guard = guarded((layout.numel + spare,), weights[0].dtype)
        packed, packed_guard = guarded((self.library.materialize_pack_words(as_c(table), len(weights)),), torch.int64)
        blocks = torch.zeros((), dtype=torch.int64)
        size = flat.element_size()
        self.call("materialize_pack", table, len(weights), size, flat.shape[0], packed, blocks)
        packed_guard()
        self.call("materialize", packed, len(weights), int(blocks), size, flat)
        guard()
        assert not flat[layout.numel :].any()
        return [view.clone() for view in _views(flat, layout)]


def as_c(value: object) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, array):
        return ctypes.c_void_p(value.buffer_info()[0])
    if isinstance(value, float):
        return ctypes.c_double(value)
    return value if value is None else ctypes.c_int64(value)  # type: ignore[arg-type]


def guarded(shape: tuple[int, ...], dtype: torch.dtype):
    """Return a tensor of NaN bytes amid guard bytes, and a function that asserts that these are as they were."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.full((count + 2 * GUARD + 64,), 0xFF, dtype=torch.uint8)
    start = GUARD + -(raw.data_ptr() + GUARD) % 64
    raw[:start] = 0xA5
    raw[start + count :] = 0xA5

    def check() -> None:
        assert (raw[:start] == 0xA5).all(), "written before the beginning"
        assert (raw[start + count :] == 0xA5).all(), "written beyond the end"

    return raw[start : start + count].view(dtype).view(shape), check


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Object files by the name of their source."""
    sources = [CSRC / name for name in ("kd_loss.cu", "materialize.cu", "materialize.cpp", "thread_pool.cpp")]
    to = tmp_path_factory.mktemp("cuda_on_cpu")
    return {source.name: compiled(source, CSRC, to) for source in [*sources, HERE / "exports.cpp"]}


@pytest.fixture(scope="module")
def kernels(objects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(list(objects.values()), tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"schedule{s}")
def schedule(request: pytest.FixtureRequest, kernels: Kernels):
    kernels.library.set_schedule(request.param)
    yield request.param
    kernels.library.set_schedule(0)


# Both ends of each path of kd_loss.cu: 1, 4 and 32 logits a lane; 8 logits a thread of a block; rows read twice.
SHAPES = [(1, 1), (9, 10), (5, 32), (6, 33), (3, 128), (5, 129), (3, 1024), (2, 1025), (1, 4096), (2, 4097), (1, 9001)]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_of_every_path_and_dtype(kernels, shape, dtype, rtol, atol):
    student, teacher, labels = logits(*shape, dtype)
    loss, grad, correct = kernels.kd_loss(student, teacher, labels, 0.3)
    wanted = native.kd_loss_and_grad_reference(student, teacher, labels, 0.3)
    torch.testing.assert_close(loss, wanted[0], rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)
    torch.testing.assert_close(grad, wanted[1], rtol=rtol, atol=atol)
    assert correct.item() == wanted[2].item()


@pytest.mark.parametrize("shape", [(9, 10), (3, 700), (3, 1500), (2, 5000)], ids=str)
def test_the_loss_is_the_same_in_any_order_of_threads(kernels, schedule, shape):
    student, teacher, labels = logits(*shape)
    kernels.library.set_schedule(0)
    wanted = kernels.kd_loss(student, teacher, labels, 0.3)
    kernels.library.set_schedule(schedule)
    for got, want in zip(kernels.kd_loss(student, teacher, labels, 0.3), wanted, strict=True):
        assert torch.equal(got, want)


def test_more_rows_than_blocks(kernels):
    student, teacher, labels = logits(4 * 1024 + 7, 3)
    loss, grad, correct = kernels.kd_loss(student, teacher, labels, 0.3)
    wanted = native.kd_loss_and_grad_reference(student, teacher, labels, 0.3)
    torch.testing.assert_close(loss, wanted[0])
    torch.testing.assert_close(grad, wanted[1])
    assert correct.item() == wanted[2].item()


@pytest.mark.parametrize("shape", [(0, 5), (4, 20), (2, 2000)], ids=str)
def test_the_loss_alone(kernels, shape):
    student, teacher, labels = logits(*shape)
    loss, grad, correct = kernels.kd_loss(student, teacher, labels, 0.3, with_grad=False)
    assert grad is None
    torch.testing.assert_close(loss, native.kd_loss_reference(student, teacher, labels, 0.3))
    assert correct.item() == native.kd_loss_and_grad_reference(student, teacher, labels, 0.3)[2].item()


@pytest.mark.parametrize("classes", [10, 100, 1100, 4500])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(kernels, classes, bad):
    student, teacher, labels = logits(2, classes)
    student[1, classes // 2] = bad
    loss, grad, correct = kernels.kd_loss(student, teacher, labels, 0.0)
    wanted = native.kd_loss_and_grad_reference(student, teacher, labels, 0.0)
    torch.testing.assert_close(loss, wanted[0], equal_nan=True, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[0], wanted[1][0])
    assert torch.equal(grad.isnan(), wanted[1].isnan())
    assert correct.item() == wanted[2].item()


@pytest.mark.parametrize("classes", [9, 1100, 4500])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_rows_of_one_value_that_is_not_finite(kernels, classes, value):
    student = torch.full((1, classes), value)
    loss, _, correct = kernels.kd_loss(student, torch.zeros(1, classes), torch.tensor([0]), 0.0)
    assert loss.isnan()
    assert correct.item() == 0


@pytest.mark.parametrize("classes", [5, 50, 1100, 4500])
@pytest.mark.parametrize("label", [-1, -100, 0])
def test_a_label_out_of_range_makes_its_row_nan(kernels, classes, label):
    student, teacher, labels = logits(2, classes)
    labels[1] = label if label < 0 else classes
    loss, grad, correct = kernels.kd_loss(student, teacher, labels, 0.3)
    assert loss.isnan()
    assert grad[1].isnan().all()
    assert grad[0].isfinite().all()
    assert correct.item() == int(student[0].argmax() == labels[0])


@pytest.mark.parametrize("classes", [5, 50, 1100, 4500])
def test_the_first_of_equal_logits_is_the_prediction(kernels, classes):
    student, labels = torch.zeros(3, classes), torch.tensor([0, 1, classes - 1])
    assert kernels.kd_loss(student, student, labels, 1.0)[2].item() == 1


@settings(max_examples=60, deadline=None)
@given(arguments=plan())
def test_materialize_is_indexing(kernels, arguments):
    if arguments[0][0].dtype not in DTYPE_CODES:
        return
    assert_results(kernels.materialize(*arguments), [by_indexing(*one) for one in zip(*arguments, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_materialize_of_many_tiles_and_many_weights(kernels, schedule, dtype):
    weight, vector, matrix = torch.randn(40, 48, 3, 3).to(dtype), torch.randn(5000).to(dtype), torch.randn(70, 64)
    weights = [weight, weight, vector, matrix.to(dtype), weight, vector, *[torch.randn(3).to(dtype)] * 50]
    keep_out = [torch.randperm(40)[:20], None, torch.randperm(5000), torch.arange(70).flip(0), None, None, *[None] * 50]
    keep_in = [torch.randperm(48)[:24], torch.arange(47), None, None, None, None, *[None] * 50]
    crops = [None, (1, 3), None, None, None, None, *[None] * 50]
    wanted = [by_indexing(*one) for one in zip(weights, keep_out, keep_in, crops, strict=True)]
    assert_results(kernels.materialize(weights, keep_out, keep_in, crops, spare=99), wanted)


def test_materialize_refuses_an_index_out_of_range(kernels):
    with pytest.raises(RuntimeError, match=re.escape("keep_in[0]: index 4 out of range for 4 input channels")):
        kernels.materialize([torch.randn(3, 4)], [None], [torch.tensor([1, 4])], [None])


def test_a_launch_that_cannot_be_is_reported(kernels):
    with pytest.raises(RuntimeError, match="CUDA error: invalid configuration argument, at materialize"):
        kernels.call("materialize", None, 0, 0, 4, None)


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
    "the wrong corner": ("materialize.cu", "(piece.kernel_h - piece.crop_h) / 2", "(piece.kernel_h - piece.crop_h)"),
}  # fmt: skip


def finds_something_wrong(kernels: Kernels) -> bool:
    """Whether a few of the comparisons above fail."""
    weights = [torch.randn(4, 3, 5, 5), torch.randn(7)]
    try:
        for schedule in SCHEDULES:
            kernels.library.set_schedule(schedule)
            for shape in ((2, 20), (3, 1100)):
                arguments = (*logits(*shape), 0.3)
                wanted = native.kd_loss_and_grad_reference(*arguments)
                torch.testing.assert_close(kernels.kd_loss(*arguments), wanted)
            results = kernels.materialize(weights, [None] * 2, [None] * 2, [(3, 3), None])
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
    assert finds_something_wrong(Kernels([*(objects | {name: compiled(copy, CSRC, tmp_path)}).values()], tmp_path))
