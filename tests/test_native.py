"""The native operators against their references in plain torch."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from n2n_fast import native
from n2n_fast.native import _C
from n2n_fast.native.materialize import KernelSize

Index = Tensor | None

# dtype, relative and absolute tolerance of a gradient; the loss is float32 or better for all of them.
DTYPES = [
    pytest.param(torch.float32, 1e-5, 1e-6, id="float32"),
    pytest.param(torch.float64, 1e-12, 1e-13, id="float64"),
    pytest.param(torch.float16, 2e-3, 1e-6, id="float16"),
    pytest.param(torch.bfloat16, 1.6e-2, 1e-6, id="bfloat16"),
]
# One lane, tails before and after every vector width, rows beyond the stack's scratch, more than one chunk of rows.
LOGIT_SHAPES = [
    (1, 1), (3, 2), (5, 7), (4, 8), (2, 9), (6, 16), (3, 17), (128, 10), (31, 33), (9, 63), (8, 65), (513, 100),
    (40, 1000), (3, 4099), (2, 21001), (70000, 1), (0, 5),
]  # fmt: skip


def logits(n: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, c, generator=generator, dtype=torch.float64) * 4
    teacher = torch.randn(n, c, generator=generator, dtype=torch.float64) * 4
    return student.to(dtype), teacher.to(dtype), torch.randint(0, c, (n,), generator=generator)


def refused(message: str):
    """The call fails by just these words."""
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


# --- kd_loss ----------------------------------------------------------------------------------------------------------


def assert_loss(got, *arguments, rtol=1e-5, atol=1e-6):
    """Loss, gradient and count are those of the reference."""
    loss, grad, correct = got
    wanted_loss, wanted_grad, wanted_correct = native.kd_loss_and_grad_reference(*arguments)
    loss_tolerance = {"rtol": 1e-12, "atol": 1e-13} if loss.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(loss, wanted_loss, equal_nan=True, **loss_tolerance)
    torch.testing.assert_close(grad, wanted_grad, equal_nan=True, rtol=rtol, atol=atol)
    torch.testing.assert_close(correct, wanted_correct)


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(params=range(_C.BEST_SIMD + 1), ids="simd{}".format)
def simd(request, monkeypatch):
    """Every level of this machine."""
    monkeypatch.setattr(_C, "BEST_SIMD", request.param)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), DTYPES)
@pytest.mark.parametrize("shape", LOGIT_SHAPES, ids=str)
def test_loss_gradient_and_count_are_the_references(shape, dtype, rtol, atol, simd):
    arguments = *logits(*shape, dtype), 0.3
    got = native.kd_loss_and_grad(*arguments)
    assert_loss(got, *arguments, rtol=rtol, atol=atol)
    assert torch.equal(native.kd_loss(*arguments), got[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_converted_as_torch_does(dtype, simd):
    # With one class the hard part of the gradient vanishes, and kd_weight 1/2 leaves (s - t) / N.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    labels, finite = torch.zeros(len(every), dtype=torch.int64), every.isfinite()
    for teacher in (torch.zeros_like(every), torch.full_like(every, 0.0123)):
        grad = native.kd_loss_and_grad(every, teacher, labels, len(every) / 2)[1]
        assert torch.equal(grad[finite], (every.float() - teacher.float()).to(dtype)[finite])
        assert grad[~finite].isnan().all()


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 40),
    c=st.integers(1, 70),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    kd_weight=st.sampled_from([0.0, 1e-3, 0.5, 2.0]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_scale(n, c, scale, kd_weight, seed):
    student, teacher, labels = logits(n, c, seed=seed)
    arguments = student * scale, teacher * scale, labels, kd_weight
    assert_loss(native.kd_loss_and_grad(*arguments), *arguments)


def test_the_formula_of_the_paper():
    student = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]])
    teacher = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([2, 1])
    hard = torch.nn.functional.cross_entropy(student, labels)
    soft = ((0 + 1 + 4) + (0.25 + 0 + 1)) / 2  # squared distances, summed over classes, averaged over the batch
    for loss in (native.kd_loss, native.kd_loss_reference):
        torch.testing.assert_close(loss(student, teacher, labels, 0.7), hard + 0.7 * soft)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), DTYPES)
@pytest.mark.parametrize("rows", [20, 0])
@pytest.mark.parametrize("seed", [1.0, -2.5, 0.0])
def test_backward_with_any_seed(dtype, rtol, atol, rows, seed):
    student, teacher, labels = logits(rows, 13, dtype)
    gradients = []
    for loss in (native.kd_loss, native.kd_loss_reference):
        leaf = student.clone().requires_grad_()
        (loss(leaf * 0.5, teacher, labels, 0.2) * seed).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=atol)


def test_backward_twice_accumulates_and_leaves_the_saved_gradient_alone():
    student, teacher, labels = logits(6, 5)
    loss = native.kd_loss(student.requires_grad_(), teacher, labels, 0.2)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    student.grad.zero_()
    loss.backward(retain_graph=True)
    assert torch.equal(student.grad, once)
    loss.backward()
    assert torch.equal(student.grad, 2 * once)


def test_only_the_student_gets_a_gradient():
    student, teacher, labels = logits(6, 5)
    student.requires_grad_()
    teacher.requires_grad_()
    loss = native.kd_loss(student, teacher, labels, 0.2)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)
    assert not native.kd_loss(student.detach(), teacher, labels, 0.2).requires_grad
    assert not any(t.requires_grad for t in native.kd_loss_and_grad(student, teacher, labels, 0.2))
    with torch.no_grad():
        assert not native.kd_loss(student, teacher, labels, 0.2).requires_grad


def test_gradient_of_the_gradient_is_refused():
    student, teacher, labels = logits(6, 5)
    loss = native.kd_loss(student.requires_grad_(), teacher, labels, 0.2)
    with pytest.raises(RuntimeError, match="kd_loss is differentiable once; kd_loss_reference has higher derivatives"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_non_contiguous_arguments():
    student, teacher, labels = logits(12, 14)
    wanted = native.kd_loss_and_grad(student, teacher, labels, 0.5)
    strided = torch.empty(12, 28)[:, ::2].copy_(student).requires_grad_()
    doubled, transposed = labels.repeat_interleave(2)[::2], teacher.t().contiguous().t()
    got = native.kd_loss_and_grad(strided, transposed, doubled, 0.5)
    assert_same(got, wanted)
    assert got[1].is_contiguous()
    native.kd_loss(strided, transposed, doubled, 0.5).backward()
    assert torch.equal(strided.grad, wanted[1])
    expanded = student[:1].expand(12, 14), teacher, labels, 0.5
    assert_loss(native.kd_loss_and_grad(*expanded), *expanded)


MANY_CLASSES = [3, 10, 40, 1100, 4500]  # each path of kd_loss.cu


@pytest.mark.parametrize(("dtype", "rtol", "atol"), DTYPES)
@pytest.mark.parametrize("classes", MANY_CLASSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_give_what_torch_gives(dtype, rtol, atol, classes, bad):
    for place, kd_weight in itertools.product((0, -1, slice(None)), (0.0, 0.5)):
        student, teacher, labels = logits(2, classes, dtype)
        student[1, place] = bad
        arguments = student, teacher, labels, kd_weight
        assert_loss(native.kd_loss_and_grad(*arguments), *arguments, rtol=rtol, atol=atol)


@pytest.mark.parametrize("classes", MANY_CLASSES)
def test_the_first_of_equal_logits_is_the_prediction(classes):
    student, labels = torch.zeros(3, classes), torch.tensor([0, 1, classes - 1])
    loss, _, correct = native.kd_loss_and_grad(student, student, labels, 1.0)
    assert correct.item() == 1
    torch.testing.assert_close(loss, torch.log(torch.tensor(float(classes))))


def test_a_confident_row_does_not_overflow():
    student = torch.tensor([[3e38, -3e38, 0.0], [-3e38, 0.0, 3e38]])
    loss, grad, correct = native.kd_loss_and_grad(student, student, torch.tensor([0, 2]), 1.0)
    assert loss.item() == 0.0
    assert not grad.any()
    assert correct.item() == 2


@pytest.fixture
def threads():
    """A function that sets torch's number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_same_to_the_last_bit_for_any_number_of_threads(threads):
    arguments = *logits(700, 501), 0.1
    threads(1)
    wanted = native.kd_loss_and_grad(*arguments)
    for count in (2, 3, 8) * 5:
        threads(count)
        assert_same(native.kd_loss_and_grad(*arguments), wanted)


def test_calls_from_many_threads_at_once():
    arguments = *logits(300, 500), 0.1
    wanted = native.kd_loss_and_grad(*arguments)
    with ThreadPoolExecutor(6) as pool:
        for got in pool.map(lambda _: native.kd_loss_and_grad(*arguments), range(120)):
            assert_same(got, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own():
    student, teacher, labels = logits(300, 500)
    weight = torch.randn(600, 300)
    wanted = native.kd_loss_and_grad(student, teacher, labels, 0.1)[0].item()
    pid = os.fork()
    if pid == 0:  # torch's own threads do not survive a fork, so nothing here may use them
        same = native.kd_loss_and_grad(student, teacher, labels, 0.1)[0].item() == wanted
        same &= bool((native.materialize([weight], [None], [None])[0].numpy() == weight.numpy()).all())
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


STUDENT, TEACHER, LABELS = logits(4, 3)
BAD_LOSS_ARGUMENTS = [
    (STUDENT.int(), TEACHER, LABELS, "student_logits: expected float32, float64, float16 or bfloat16, got torch.int32"),
    (STUDENT[0], TEACHER, LABELS, "student_logits: expected shape (N, C) with C >= 1, got (3,)"),
    (STUDENT[:, :0], TEACHER[:, :0], LABELS, "student_logits: expected shape (N, C) with C >= 1, got (4, 0)"),
    (STUDENT, TEACHER[:2], LABELS, "teacher_logits: expected shape (4, 3), as student_logits, got (2, 3)"),
    (STUDENT, TEACHER.half(), LABELS, "teacher_logits: expected torch.float32, as student_logits, got torch.float16"),
    (STUDENT, TEACHER.to("meta"), LABELS,
     "teacher_logits: expected a tensor on cpu, as student_logits, got one on meta"),
    (STUDENT, TEACHER, LABELS.int(), "labels: expected torch.int64, got torch.int32"),
    (STUDENT, TEACHER, LABELS[:3], "labels: expected shape (4,), one for each row, got (3,)"),
    (STUDENT, TEACHER, LABELS[:, None], "labels: expected shape (4,), one for each row, got (4, 1)"),
    (STUDENT, TEACHER, LABELS.to("meta"), "labels: expected a tensor on cpu, as student_logits, got one on meta"),
    (STUDENT, TEACHER, torch.tensor([0, 1, 3, 0]), "labels[2]: 3 out of range for 3 classes"),
    (STUDENT, TEACHER, torch.tensor([0, -100, 3, 0]), "labels[1]: -100 out of range for 3 classes"),
]  # fmt: skip


@pytest.mark.parametrize(("student", "teacher", "labels", "message"), BAD_LOSS_ARGUMENTS, ids=lambda v: "")
def test_bad_arguments_of_the_loss(student, teacher, labels, message):
    calls = (native.kd_loss, native.kd_loss_and_grad, native.kd_loss_reference, native.kd_loss_and_grad_reference)
    for call in calls:
        with refused(message):
            call(student, teacher, labels, 0.5)


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_loss(dtype, with_grad):
    student, teacher, labels = logits(5, 7, dtype)
    opcheck(torch.ops.n2n_fast.kd_loss, (student.requires_grad_(with_grad), teacher, labels, 0.7, with_grad))


def test_meta_tensors_give_meta_results():
    arguments = *(tensor.to("meta") for tensor in logits(5, 7, torch.float16)), 0.7
    cut = native.materialize([torch.empty(8, 4, 3, 3, device="meta")], [torch.tensor([1, 2])], [None], [(1, 1)])
    results = [*native.kd_loss_and_grad(*arguments), *cut]
    assert {result.device.type for result in results} == {"meta"}
    assert [tuple(result.shape) for result in results] == [(), (5, 7), (), (2, 4, 1, 1)]
    assert [result.dtype for result in results] == [torch.float32, torch.float16, torch.int64, torch.float32]


# --- materialize ------------------------------------------------------------------------------------------------------


@st.composite
def index(draw: st.DrawFn, channels: int) -> Index:
    kind = draw(st.sampled_from(["all", "any", "sorted", "runs"]))
    if kind == "all":
        return None
    if channels == 0:
        return torch.empty(0, dtype=torch.int64)
    chosen = draw(st.lists(st.integers(0, channels - 1), max_size=2 * channels))
    if kind == "sorted":
        chosen = sorted(set(chosen))
    if kind == "runs":
        first, last = draw(st.integers(0, channels)), draw(st.integers(0, channels))
        chosen = list(range(min(first, last), max(first, last))) + chosen[:2]
    return torch.tensor(chosen, dtype=draw(st.sampled_from([torch.int64, torch.int64, torch.int32])))


@st.composite
def plan(draw: st.DrawFn) -> tuple[list[Tensor], list[Index], list[Index], list[KernelSize]]:
    weights, keep_out, keep_in, kernels = [], [], [], []
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    for _ in range(draw(st.integers(1, 6))):
        dims = draw(st.sampled_from([1, 2, 4, 4]))
        shape = [draw(st.integers(0 if draw(st.booleans()) else 1, 40)) for _ in range(min(dims, 2))]
        if dims == 4:
            shape[1] = draw(st.sampled_from([1, shape[1]]))
            shape += [draw(st.sampled_from([1, 2, 3, 5, 7])) for _ in range(2)]
        weight = torch.randint(-100, 100, shape, generator=generator).to(dtype)
        if draw(st.booleans()) and dims > 1:
            weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
        weights.append(weight)
        keep_out.append(draw(index(shape[0])))
        keep_in.append(draw(index(shape[1])) if dims > 1 else None)
        crop = dims == 4 and draw(st.booleans())
        kernels.append(tuple(draw(st.sampled_from(range(k, 0, -2))) for k in shape[2:]) if crop else None)
    return weights, keep_out, keep_in, kernels


def by_indexing(weight: Tensor, rows: Index, columns: Index, kernel: KernelSize) -> Tensor:
    """One result by advanced indexing and slicing alone: the reference's own reference."""
    result = weight if rows is None else weight[rows.long()]
    result = result if columns is None else result[:, columns.long()]
    if kernel is None:
        return result
    top, left = (weight.shape[2] - kernel[0]) // 2, (weight.shape[3] - kernel[1]) // 2
    return result[:, :, top : top + kernel[0], left : left + kernel[1]]


def assert_results(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert len(results) == len(wanted)
    for result, want in zip(results, wanted, strict=True):
        assert result.is_contiguous()
        assert result.dtype == want.dtype
        assert torch.equal(result, want)


@settings(max_examples=int(os.environ.get("N2N_FAST_FUZZ", "400")), deadline=None)
@given(plan())
def test_results_are_the_references(arguments):
    wanted = [by_indexing(*one) for one in zip(*arguments, strict=True)]
    assert_results(native.materialize(*arguments), wanted)
    assert_results(native.materialize_reference(*arguments), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_sizes_that_take_several_chunks_and_threads(dtype, kernel):
    generator = torch.Generator().manual_seed(kernel)
    weight = torch.randn(256, 192, kernel, kernel, generator=generator).to(dtype)
    vector, matrix = torch.randn(5000, generator=generator).to(dtype), torch.randn(700, 300).to(dtype)
    half = torch.randperm(192, generator=generator)[:96]
    weights = [weight, weight, weight, weight, vector, matrix]
    keep_out = [None, half, torch.arange(10, 250), half.sort().values, torch.randperm(5000)[:2500], None]
    keep_in = [half, torch.arange(100, 180), None, half.sort().values, None, torch.arange(300).flip(0)]
    kernels = [None, (1, 1), (kernel, 1), (max(1, kernel - 2),) * 2, None, None]
    results = native.materialize(weights, keep_out, keep_in, kernels)
    assert_results(results, [by_indexing(*one) for one in zip(weights, keep_out, keep_in, kernels, strict=True)])


def test_results_are_aligned_views_of_one_buffer():
    weights = [torch.randn(3), torch.randn(5, 7), torch.randn(0, 2), torch.randn(2, 2, 3, 3)]
    results = native.materialize(weights, [None] * 4, [None] * 4)
    assert len({r.untyped_storage().data_ptr() for r in results}) == 1
    assert [r.storage_offset() * r.element_size() % 64 for r in results] == [0, 0, 0, 0]
    assert [r.storage_offset() for r in results] == [0, 16, 64, 64]
    assert native.materialize_numel(weights, [None] * 4, [None] * 4) == 112
    buffer = results[0].as_strided((112,), (1,), 0)
    assert buffer.count_nonzero() == sum(w.numel() for w in weights)  # the gaps are zero


def test_writing_into_one_result_does_not_invalidate_another():
    weight, running_mean = native.materialize([torch.randn(4, 3), torch.zeros(4)], [None, None], [None, None])
    weight = torch.nn.Parameter(weight)
    x = torch.randn(2, 3, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    running_mean += 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(2, 3))


def test_results_do_not_require_grad():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    (result,) = native.materialize([weight], [torch.tensor([1])], [None])
    assert not result.requires_grad
    assert not native.materialize_reference([weight], [torch.tensor([1])], [None])[0].requires_grad


@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("call", [native.materialize, native.materialize_reference])
@pytest.mark.parametrize("before", [0, 3])
def test_a_recycled_buffer(call, spare, before):
    arguments = [torch.randn(6, 4, 3, 3), torch.randn(6)], [torch.tensor([5, 1]), None], [None, None]
    out = torch.full((before + native.materialize_numel(*arguments) + spare,), float("nan"))[before:]
    results = call(*arguments, None, out)
    assert results[0].data_ptr() == out.data_ptr()
    assert_results(results, [arguments[0][0][[5, 1]], arguments[0][1]])
    assert out.isfinite().all()
    assert (out[len(out) - spare :] == 0).all()


W = torch.randn(8, 6, 3, 3)
V = torch.randn(8)
I8 = torch.tensor([0, 7])
NO_CROP = (
    "cannot be cropped at the centre of the (3, 3) kernels of weights[0]; "
    "both differences must be even and not negative"
)
NEEDED = "out: expected a contiguous 1-D tensor of at least 432 elements, torch.float32 on cpu"
BAD_PLANS = [
    (([W, V], [None], [None, None]), "keep_out: expected 2 entries, one for each of weights, got 1"),
    (([W, V], [None, None], [None] * 3), "keep_in: expected 2 entries, one for each of weights, got 3"),
    (([W], [None], [None], []), "kernel_size: expected 1 entries, one for each of weights, got 0"),
    (([W, V.double()], [None] * 2, [None] * 2),
     "weights[1]: expected torch.float32 on cpu, as weights[0], got torch.float64 on cpu"),
    (([W, V.to("meta")], [None] * 2, [None] * 2),
     "weights[1]: expected torch.float32 on cpu, as weights[0], got torch.float32 on meta"),
    (([W[0]], [None], [None]), "weights[0]: expected 1, 2 or 4 dimensions, got shape (6, 3, 3)"),
    (([V.sum()], [None], [None]), "weights[0]: expected 1, 2 or 4 dimensions, got shape ()"),
    (([W], [I8.float()], [None]), "keep_out[0]: expected int64 or int32 indices, got torch.float32"),
    (([W], [None], [I8.bool()]), "keep_in[0]: expected int64 or int32 indices, got torch.bool"),
    (([W], [I8[None]], [None]), "keep_out[0]: expected one dimension, got shape (1, 2)"),
    (([W], [I8.to("meta")], [None]), "keep_out[0]: expected a tensor on cpu or cpu, got one on meta"),
    (([V], [None], [I8]), "keep_in[0]: expected None, since weights[0] has one dimension, got a tensor"),
    (([V], [None], [None], [(1, 1)]), "kernel_size[0]: expected None, since weights[0] has no kernel, got (1, 1)"),
    (([W, V], [torch.tensor([8]), None], [None, None]),
     "keep_out[0]: index 8 out of range for 8 output channels of weights[0]"),
    (([V, W], [None, None], [None, torch.tensor([1, 2, 6, -1])]),
     "keep_in[1]: index 6 out of range for 6 input channels of weights[1]"),
    (([V], [torch.tensor([0, -1], dtype=torch.int32)], [None]),
     "keep_out[0]: index -1 out of range for 8 output channels of weights[0]"),
    (([W], [None], [None], None, torch.empty(431)), f"{NEEDED}, got shape (431,), torch.float32 on cpu"),
    (([W], [None], [None], None, torch.empty(432).double()), f"{NEEDED}, got shape (432,), torch.float64 on cpu"),
    (([W], [None], [None], None, torch.empty(900)[::2]), f"{NEEDED}, got shape (450,), torch.float32 on cpu"),
]  # fmt: skip
BAD_PLANS += [
    (([W], [None], [None], [crop]), f"kernel_size[0]: {crop} {NO_CROP}")
    for crop in [(2, 3), (5, 3), (0, 1), (-1, 1), (3, 4)]
]


@pytest.mark.parametrize(("arguments", "message"), BAD_PLANS, ids=lambda v: v[:40] if isinstance(v, str) else "")
@pytest.mark.parametrize("call", [native.materialize, native.materialize_reference])
def test_bad_plans(call, arguments, message):
    with refused(message):
        call(*arguments)


def test_a_bad_index_is_refused_before_anything_is_written():
    out = torch.full((500,), 7.0)
    with refused("keep_out[1]: index 9 out of range for 8 output channels of weights[1]"):
        native.materialize([V, V], [None, torch.tensor([9])], [None, None], None, out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (3, "materialize: result 0 takes 2 elements from 3 on, the flat buffer has 4"),
        (2**63 - 1, f"materialize: result 0 takes 2 elements from {2**63 - 1} on, the flat buffer has 4"),
        (-1, "materialize: result 0 overlaps the one before it"),
    ],
)
def test_the_native_side_refuses_what_would_overrun(offset, message):
    flat, piece = torch.zeros(4), np.array([0, 2, 1, 1, 1, 2, 1, 1, 1, 0, 0, offset])
    with refused(message):
        _C.materialize_cpu(piece, 4, flat.data_ptr(), 4, 1)
    with refused("table: expected twelve int64 for each piece, got 11 items of 8 bytes"):
        _C.materialize_cpu(piece[1:], 4, flat.data_ptr(), 4, 1)


@settings(max_examples=200, deadline=None)
@given(plan(), st.data())
def test_a_bank_cuts_as_materialize_does(arguments, data):
    weights, keep_out, keep_in, kernels = arguments
    count, ndims = len(weights), [weight.ndim for weight in weights]
    bank = native.WeightBank(weights, range(count), [None if n == 1 else count + k for k, n in enumerate(ndims)])
    chosen = np.array(data.draw(st.lists(st.sampled_from(range(count)), unique=True)), dtype=np.int64)
    kept = [None if index is None else index.long().numpy() for index in (*keep_out, *keep_in)]
    crops = np.array([kernels[k] or weights[k].shape[2:] or (1, 1) for k in chosen]).reshape(-1, 2)
    wanted = [by_indexing(*(part[k] for part in arguments)) for k in chosen]
    assert_results(bank.materialize(chosen, kept, crops), wanted)
    recycled = torch.full((sum(want.numel() + 32 for want in wanted),), 7).to(weights[0].dtype)
    assert_results(bank.materialize(chosen, kept, crops, recycled), wanted)
    if wanted:
        with pytest.raises(ValueError, match="out: expected a contiguous 1-D tensor"):
            bank.materialize(chosen, kept, crops, recycled.bool())


def test_a_bank_follows_its_weights_whose_channels_may_lie_on_one_axis():
    bank = native.WeightBank([torch.randn(3, 3), torch.randn(3)], [0, 0], [0, None])
    bank.weights[0].fill_(7)
    square, vector = bank.materialize(np.arange(2), [np.array([2, 0])])
    assert square.tolist() == [[7, 7], [7, 7]]
    assert torch.equal(vector, bank.weights[1][[2, 0]])


BANK = native.WeightBank([torch.randn(4, 3, 3, 3)], [0], [1])
BAD_CUTS = [
    ([np.array([4]), None], None, "keep_out[0]: index 4 out of range for 4 output channels of weights[0]"),
    ([None, np.array([-1])], None, "keep_in[0]: index -1 out of range for 3 input channels of weights[0]"),
    ([np.array([0.5]), None], None, "kept[0]: expected one dimension of int64 indices, got float64 of shape (1,)"),
    ([None, np.array([[1]])], None, "kept[1]: expected one dimension of int64 indices, got int64 of shape (1, 1)"),
    ([None], None, "kept: expected 2 entries, one for each axis, got 1"),
    ([None, None], np.array([[2, 3]]), f"kernel_size[0]: (2, 3) {NO_CROP}"),
]


@pytest.mark.parametrize(("kept", "crop", "message"), BAD_CUTS)
def test_a_bank_refuses(kept, crop, message):
    with refused(message):
        BANK.materialize(np.array([0]), kept, crop)


def test_a_bank_checks_its_weights_once():
    with refused("out_axes: expected 1 entries, one for each of weights, got 2"):
        native.WeightBank([V], [0, 1], [None])
    with refused("weights[1]: expected torch.float32 on cpu, as weights[0], got torch.float64 on cpu"):
        native.WeightBank([V, V.double()], [0, 0], [None, None])
    assert native.WeightBank([], [], []).materialize(np.array([], dtype=np.int64), []) == []


def test_memory_is_used_again_once_no_tensor_is_left_on_it():
    bank = native.WeightBank([torch.randn(64, 32)], [0], [1])
    chosen, half = np.array([0]), [np.arange(32), None]
    first = bank.materialize(chosen, half)[0]
    row = first[3].clone(), first[3]
    second = bank.materialize(chosen, [None, None])[0]
    assert second.data_ptr() != first.data_ptr()
    taken = (first.data_ptr(), second.data_ptr())
    del first  # but not the view of it
    assert bank.materialize(chosen, half)[0].data_ptr() not in taken
    assert torch.equal(*row)
    del row
    addresses = {bank.materialize(chosen, half)[0].data_ptr() for _ in range(20)}
    assert len(addresses) <= 2
    assert second.data_ptr() not in addresses
    assert torch.equal(second, bank.weights[0])


def test_recycled_memory_is_no_larger_than_the_results():
    bank = native.WeightBank([torch.randn(7, 5)], [0], [1])
    result = bank.materialize(np.array([0]), [np.array([1, 4]), None])[0]
    assert torch.equal(result, bank.weights[0][[1, 4]])
    assert result.data_ptr() % 64 == 0
    assert result.untyped_storage().nbytes() <= 64 + 40
    more = bank.materialize(np.array([0]), [np.zeros(100, np.int64), None])[0]  # beyond what the bank holds
    assert torch.equal(more, bank.weights[0][[0] * 100])


def test_nothing_to_do():
    assert native.materialize([], [], []) == []
    assert native.materialize_reference([], [], []) == []
    assert native.materialize_numel([], [], []) == 0
    (empty,) = native.materialize([torch.randn(3, 4)], [torch.empty(0, dtype=torch.int64)], [None])
    assert tuple(empty.shape) == (0, 4)


SMALL_PLAN = (
    [torch.randn(8, 6, 5, 5), torch.randn(8), torch.randn(8, 6)],
    [torch.tensor([1, 3, 7, 7]), torch.tensor([2]), None],
    [torch.tensor([0, 1, 5]), None, torch.empty(0, dtype=torch.int64)],
    [(3, 1), None, None],
)


def test_opcheck_of_materialize():
    opcheck(torch.ops.n2n_fast.materialize, (*SMALL_PLAN[:3], [3, 1, 0, 0, 0, 0], torch.randn(200)))


# --- under the compiler -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_loss_compiles_without_a_graph_break(dynamic):
    step = torch.compile(
        lambda s, t, y: native.kd_loss(s * 2, t, y, 0.7), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for n in (6, 9):
        student, teacher, labels = logits(n, 7)
        one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
        step(one, teacher, labels).backward()
        native.kd_loss(two * 2, teacher, labels, 0.7).backward()
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_everything_compiles_by_inductor():
    arguments = *logits(6, 7), 0.7
    got = torch.compile(native.kd_loss_and_grad, fullgraph=True)(*arguments)
    assert_loss(got, *arguments)
    cut = torch.compile(native.materialize, fullgraph=True)
    for out in ((), (torch.randn(200),)):
        assert_results(cut(*SMALL_PLAN, *out), native.materialize(*SMALL_PLAN))


def test_bad_shapes_are_refused_while_tracing():
    compiled = torch.compile(lambda *a: native.kd_loss(*a, 0.7), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=re.escape("labels: expected shape (4,)")):
        compiled(STUDENT, TEACHER, LABELS[:3])


# --- the build -------------------------------------------------------------------------------------------


def test_build_info_says_what_was_built():
    info = native.build_info()
    assert set(info) == {"compiler", "cuda", "cuda_version", "cuda_archs", "simd", "simd_used"}
    assert info["simd_used"] in info["simd"]
    assert info["cuda"] == bool(info["cuda_version"]) == bool(info["cuda_archs"])
