"""The distillation loss and its gradient, beside the same in eager torch and under torch.compile."""

import pytest
import torch
import torch.nn.functional as F

import n2n_fast

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
SIZES = [(128, 10), (512, 100), (512, 1000), (256, 21000)]
KD_WEIGHT = 0.1


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_kd_loss(benchmark, size, way, device):
    benchmark.group = f"kd_loss: {size}" + " on a GPU" * (device == "cuda")
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(size, generator=generator) for _ in range(2))
    labels = torch.randint(size[1], size[:1], generator=generator)
    logits, teacher, labels = (tensor.to(device) for tensor in (logits, teacher, labels))
    wanted = backward(plain_loss)(logits.clone().requires_grad_(), teacher, labels)
    if way != "n2n_fast, loss and gradient":
        logits.requires_grad_()
    call = WAYS[way]()
    torch.testing.assert_close(call(logits, teacher, labels), wanted, rtol=1e-4, atol=1e-7)
    many = 200 if size[0] * size[1] < 1e6 else 40

    def timed():
        call(logits, teacher, labels)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=many, iterations=10, warmup_rounds=10)
