"""``kd_loss``: cross entropy plus distillation, its gradient and the correct rows, in one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from n2n_fast.native import _C
from n2n_fast.native.boundary import DTYPE_CODES, is_native, on_short_path, register


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, kd_weight: float) -> Tensor:
    """Return cross entropy plus distillation, L = L_hard + λ L_KD (section 3.3 of the paper), as a scalar.

    L_hard is the mean cross entropy with ``labels``; L_KD is the mean over the batch of the squared Euclidean distance
    between student and teacher logits. Differentiable, once, in ``student_logits`` alone; the gradient is made in the
    same pass. NaN or infinite logits give the NaN or infinite loss that they give in torch.

    Args:
        student_logits: (N, C), C >= 1; float32, float64, float16 or bfloat16. With N = 0 the loss is 0.
        teacher_logits: (N, C), of the same dtype and device.
        labels: (N,), int64, in [0, C), on the same device.
        kd_weight: λ.

    Returns:
        (): float64 for float64 logits, else float32; accumulated in that precision within a row, in double over rows,
        and the same to the last bit for any number of threads.

    Raises:
        ValueError: naming the argument, what was expected and what came. On a GPU, where seeing a label's value would
            mean waiting for the device, a label out of range gives a NaN loss instead.
    """
    needs_grad = student_logits.requires_grad and torch.is_grad_enabled()
    if not on_short_path((student_logits, teacher_logits, labels)):
        loss, _, _ = torch.ops.n2n_fast.kd_loss(
            student_logits, teacher_logits.detach(), labels, float(kd_weight), needs_grad
        )
        return loss  # type: ignore[no-any-return]
    if needs_grad:
        return _KdLoss.apply(student_logits, teacher_logits, labels, kd_weight)  # type: ignore[no-any-return]
    return _kd_loss_op(student_logits, teacher_logits, labels, kd_weight, False)[0]


def kd_loss_and_grad(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, kd_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of ``kd_loss``, its gradient and the number of correct rows, in one pass over the logits.

    For loops that seed autograd themselves, with ``student_logits.backward(grad)``; nothing returned requires grad.
    Arguments and errors are those of ``kd_loss``.

    Returns:
        loss: (), as of ``kd_loss``.
        grad: (N, C), d loss / d student_logits, contiguous, in the logits' dtype.
        correct: (), int64, rows whose label's logit is the first of their largest; a row with NaN is not correct.
    """
    if on_short_path((student_logits, teacher_logits, labels)):
        return _kd_loss_op(student_logits, teacher_logits, labels, kd_weight, True)
    loss, grad, correct = torch.ops.n2n_fast.kd_loss(
        student_logits.detach(), teacher_logits.detach(), labels, float(kd_weight), True
    )
    return loss, grad, correct


def kd_loss_reference(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, kd_weight: float) -> Tensor:
    """Do what ``kd_loss`` does, in plain torch; differentiable as often as wanted."""
    _check_kd_loss(student_logits, teacher_logits, labels)
    _check_labels(labels, student_logits.shape[1])
    precise = _loss_dtype(student_logits.dtype)
    student, teacher = student_logits.to(precise), teacher_logits.detach().to(precise)
    hard = F.cross_entropy(student, labels, reduction="sum")
    return (hard + kd_weight * (student - teacher).square().sum()) / max(1, student.shape[0])


def kd_loss_and_grad_reference(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, kd_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what ``kd_loss_and_grad`` does, in plain torch."""
    loss = kd_loss_reference(student_logits.detach(), teacher_logits, labels, kd_weight)
    precise = _loss_dtype(student_logits.dtype)
    student, teacher = student_logits.detach().to(precise), teacher_logits.detach().to(precise)
    hard = student.softmax(1) - F.one_hot(labels, student.shape[1])
    grad = (hard + 2 * kd_weight * (student - teacher)) / max(1, student.shape[0])
    cross_entropy = F.cross_entropy(student, labels, reduction="none")
    correct = ((student.argmax(1) == labels) & ~cross_entropy.isnan()).sum()
    return loss, grad.to(student_logits.dtype), correct


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _check_kd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    """Validate everything but the values of labels."""
    shape, dtype, device = student.shape, student.dtype, student.device
    if dtype not in DTYPE_CODES:
        raise ValueError(f"student_logits: expected float32, float64, float16 or bfloat16, got {dtype}")
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"student_logits: expected shape (N, C) with C >= 1, got {tuple(shape)}")
    if teacher.shape != shape:
        raise ValueError(
            f"teacher_logits: expected shape {tuple(shape)}, as student_logits, got {tuple(teacher.shape)}"
        )
    if teacher.dtype is not dtype:
        raise ValueError(f"teacher_logits: expected {dtype}, as student_logits, got {teacher.dtype}")
    if labels.dtype is not torch.int64:
        raise ValueError(f"labels: expected torch.int64, got {labels.dtype}")
    if labels.shape != shape[:1]:
        raise ValueError(f"labels: expected shape {tuple(shape[:1])}, one for each row, got {tuple(labels.shape)}")
    if teacher.device != device or labels.device != device:
        name, other = ("labels", labels) if teacher.device == device else ("teacher_logits", teacher)
        raise ValueError(f"{name}: expected a tensor on {device}, as student_logits, got one on {other.device}")


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.is_meta:
        return
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if wrong.numel() > 0:
        position = int(wrong[0, 0])
        raise ValueError(f"labels[{position}]: {int(labels[position])} out of range for {classes} classes")


def _kd_loss_fake(
    student: Tensor, teacher: Tensor, labels: Tensor, kd_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Validate everything but the values of labels; allocate (loss, grad, correct)."""
    _check_kd_loss(student, teacher, labels)
    rows, classes = student.shape
    grad = student.new_empty((rows if with_grad else 0, classes))
    return student.new_empty((), dtype=_loss_dtype(student.dtype)), grad, labels.new_empty(())


def _kd_loss_op(
    student: Tensor, teacher: Tensor, labels: Tensor, kd_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (loss, grad, correct); without `with_grad` the grad is (0, C)."""
    loss, grad, correct = _kd_loss_fake(student, teacher, labels, kd_weight, with_grad)
    if not is_native(student):
        loss, full, correct = kd_loss_and_grad_reference(student, teacher, labels, kd_weight)
        return loss, (full if with_grad else grad), correct
    student, teacher, labels = student.contiguous(), teacher.contiguous(), labels.contiguous()
    rows, classes = student.shape
    arguments = (
        *(DTYPE_CODES[student.dtype], rows, classes, student.data_ptr(), teacher.data_ptr(), labels.data_ptr()),
        *(kd_weight, grad.data_ptr(), loss.data_ptr(), correct.data_ptr()),
    )
    if student.is_cpu:
        _C.kd_loss_cpu(*arguments, torch.get_num_threads(), _C.BEST_SIMD)
        return loss, grad, correct
    with torch.cuda.device(student.device):
        workspace = labels.new_empty(_C.KD_LOSS_WORKSPACE_WORDS)
        stream = torch.cuda.current_stream(student.device).cuda_stream
        _C.kd_loss_cuda(*arguments, workspace.data_ptr(), stream)
    return loss, grad, correct


class _KdLoss(Function):
    """The eager short path: the forward pass makes the gradient, the backward pass scales it."""

    @staticmethod
    def forward(ctx: FunctionCtx, student: Tensor, teacher: Tensor, labels: Tensor, kd_weight: float) -> Tensor:
        loss, grad, _ = _kd_loss_op(student, teacher, labels, kd_weight, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True: a gradient without a graph would be wrong without a word
            raise RuntimeError("kd_loss is differentiable once; kd_loss_reference has higher derivatives")
        (grad,) = ctx.saved_tensors
        # The usual seed is 1; on the CPU looking costs less than multiplying.
        scaled = grad if grad_loss.is_cpu and grad_loss.item() == 1.0 else grad * grad_loss
        return scaled, None, None, None


def _setup_kd_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad, correct = output
    ctx.mark_non_differentiable(grad, correct)
    ctx.save_for_backward(grad)


def _kd_loss_backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
    (grad,) = ctx.saved_tensors
    return grad * grad_loss, None, None, None, None


register(
    "kd_loss",
    "(Tensor student_logits, Tensor teacher_logits, Tensor labels, float kd_weight, bool with_grad)"
    " -> (Tensor loss, Tensor grad, Tensor correct)",
    _kd_loss_op,
    _kd_loss_fake,
)
torch.library.register_autograd("n2n_fast::kd_loss", _kd_loss_backward, setup_context=_setup_kd_loss)
