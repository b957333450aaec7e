"""The distillation loss and its gradient, beside the same in eager torch and under torch.compile."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import n2n_fast
from n2n_fast import native

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
SIZES = [(128, 10), (512, 100), (512, 1000), (256, 21000)]
KD_WEIGHT = 0.1
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def plain_loss(logits, teacher, labels):
    return F.cross_entropy(logits, labels) + KD_WEIGHT * F.mse_loss(logits, teacher) * logits.shape[1]


def backward(loss):
    def call(logits, teacher, labels):
        logits.grad = None
        loss(logits, teacher, labels).backward()
        return logits.grad

    return call


def fused(logits, teacher, labels):
    return n2n_fast.kd_loss_and_grad(logits, teacher, labels, KD_WEIGHT)[1]


def compiled(loss):
    """For one size: a second one would have all sizes share a slower program."""
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


WAYS = {
    "n2n_fast, loss and gradient": lambda: fused,
    "n2n_fast, backward": lambda: backward(lambda *a: n2n_fast.kd_loss(*a, KD_WEIGHT)),
    "eager": lambda: backward(plain_loss),
    "torch.compile": lambda: backward(compiled(plain_loss)),
}


def arguments(size, device):
    """Logits of student and teacher, (N, C), and labels."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(size, generator=generator) for _ in range(2))
    labels = torch.randint(size[1], size[:1], generator=generator)
    return logits.to(device), teacher.to(device), labels.to(device)


def checked(way, size, device):
    """A way's call on logits of a size, once its gradient has been compared with eager torch's."""
    logits, teacher, labels = arguments(size, device)
    wanted = backward(plain_loss)(logits.clone().requires_grad_(), teacher, labels)
    if way != "n2n_fast, loss and gradient":
        logits.requires_grad_()
    call = WAYS[way]()
    torch.testing.assert_close(call(logits, teacher, labels), wanted, rtol=1e-4, atol=1e-7)
    return lambda: call(logits, teacher, labels)


def relative_errors(sizes, device):
    """Relative errors of the fused gradient, by size and type, beside the reference in float64; all must be small."""
    errors = {}
    for size, (dtype, tolerance) in itertools.product(sizes, TOLERANCES.items()):
        logits, teacher, labels = arguments(size, device)
        logits, teacher = logits.to(dtype), teacher.to(dtype)
        loss, grad, correct = n2n_fast.kd_loss_and_grad(logits, teacher, labels, KD_WEIGHT)
        exact = native.kd_loss_and_grad_reference(logits.double(), teacher.double(), labels, KD_WEIGHT)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)
        assert int(correct) == int(exact[2]), (size, dtype)
        errors[f"{size} {dtype}"] = error = float((grad.double() - exact[1]).norm() / exact[1].norm())
        assert error < tolerance, (size, dtype, error)
    return errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_kd_loss(benchmark, size, way, device):
    benchmark.group = f"kd_loss: {size}" + " on a GPU" * (device == "cuda")
    call = checked(way, size, device)
    many = 200 if size[0] * size[1] < 1e6 else 40

    def timed():
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=many, iterations=10, warmup_rounds=10)
