"""One student's training and evaluation (section 3.3): BN statistics, distillation, latency."""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from n2n_fast import ops
from n2n_fast.reading import understood
from n2n_fast.states import checked, load_optimizer

CHECK_EVERY = 10
WARM_UP = 0.2
CLIP = 5.0  # norm of a gradient: a student far from its teacher has a very steep distillation loss


class Progress:
    """What a long piece of work tells while it goes on; override what you want to show."""

    def message(self, text: str) -> None:
        """Something worth a line happened."""

    def stage(self, name: str, length: int) -> None:
        """A part of the work begins: so many rollouts, or so many steps where it is a training."""

    def step(self, step: int, loss: float, accuracy: float) -> None:
        """So many steps of a training are done; loss and accuracy are means since the last call."""


class BatchSource(Protocol):
    """A known number of batches: images (n, C, H, W), labels (n,) and, or None, the teacher's logits (n, classes)."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]: ...
    def after(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The batches from step `start` on, counted from 0."""


class Keeper(Protocol):
    """Keeps a training, so that it can be cut off and goes on as if it had not been."""

    def load(self) -> dict[str, Any] | None:
        """The state that was kept last; None to begin."""

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Called after every step; keeps what `state` gives if it is time for it, and may raise to stop."""


class Diverged(ArithmeticError):
    """A training whose loss ceased to be finite."""


def fit(
    model: nn.Module,
    batches: BatchSource,
    *,
    learning_rate: float,
    kd_weight: float = 0.0,
    weight_decay: float = 5e-4,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
) -> nn.Module:
    """Train `model` in place by SGD on cross entropy plus kd_weight times the distillation loss; left in eval mode.

    Teacher logits of None leave the distillation out. The learning rate climbs to its peak over the first fifth of
    the steps, then falls to 0 along a cosine. `progress.step` is called every ten steps. With a `keeper` the training
    goes on where it was cut off. Raises Diverged.
    """
    # Batches are contiguous, not channels_last: for that layout oneDNN's AVX2 kernel for the weight gradient of 1x1
    # convolutions corrupts memory or never returns at some odd widths (torch 2.15), and it is hardly faster.
    steps = len(batches)
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(_decayed(model, weight_decay), learning_rate, momentum=0.9, nesterov=True, fused=True)
    model.train()
    tally = torch.zeros(3, device=device, dtype=torch.float64)  # loss, correct, images since the last report
    start = _restore(keeper.load() if keeper else None, model, optimizer)
    for step, (images, labels, teacher_logits) in enumerate(batches.after(start), start + 1):
        for group in optimizer.param_groups:
            group["lr"] = _scheduled(learning_rate, step, steps)
        with mixed_precision(device):
            logits = model(images)
        target, weight = (logits.detach(), 0.0) if teacher_logits is None else (teacher_logits, kd_weight)
        loss, grad, correct = ops.kd_loss_and_grad(logits, target.to(logits.dtype), labels, weight)
        logits.backward(grad)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        tally += torch.stack([loss.double() * len(labels), correct.double(), torch.full_like(correct, len(labels))])
        if step % CHECK_EVERY == 0 or step == steps:
            _report(step, tally, progress)
        if keeper is not None:
            keeper.offer(functools.partial(_state, step, model, optimizer))
    return model.eval()


def _state(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a training is after so many steps."""
    generators = {"cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(device)
    return {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "generators": generators}


def _restore(state: dict[str, Any] | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put back what `_state` gave; the number of steps done."""
    if state is None:
        return 0
    with understood("the training that was kept"):
        model.load_state_dict(state["model"])
        load_optimizer(optimizer, state["optimizer"])
        torch.set_rng_state(state["generators"]["cpu"])
        device = next(model.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["cuda"], device)
        return checked(state["step"], int)


def _report(step: int, tally: Tensor, progress: Progress | None) -> None:
    loss, correct, images = tally.tolist()
    tally.zero_()
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}")
    if progress is not None:
        progress.step(step, loss / images, correct / images)


def _scheduled(peak: float, step: int, steps: int) -> float:
    done = (step - 0.5) / steps
    if done < WARM_UP:
        return peak * done / WARM_UP
    return peak * (0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def _decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: biases and norms, which are vectors, are not decayed; it slows short trainings."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 where the hardware multiplies it natively, else no autocast.

    The hardware decides, never a timing, so that runs repeat. A CPU needs AMX: with AVX512_BF16 alone narrow students
    gain nothing and depthwise convolutions lose (bench/README.md), and with neither bfloat16 is emulated.
    """
    if device.type == "cuda":
        enabled = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        enabled = device.type == "cpu" and bool(has_amx())
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


@torch.no_grad()
def recalibrate(model: nn.Module, images: Iterable[Tensor]) -> nn.Module:
    """Re-estimate the statistics of every batch norm as the plain mean over batches of images; left in eval mode.

    Weights cut from a teacher leave statistics that no longer fit: without this a student starts at chance.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in images if norms else ():
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


@torch.no_grad()
def latency_ms(model: nn.Module, images: Tensor, seconds: float = 0.5) -> float:
    """Median milliseconds of a forward pass over images (n, C, H, W), in eval mode, after warming up."""
    model.eval()

    def forward() -> None:
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)

    return median_ms(forward, seconds)


def median_ms(call: Callable[[], object], seconds: float = 0.5) -> float:
    """Median milliseconds of a call, after warming up."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 8 or (time.perf_counter() - start < seconds and len(times) < 200):
        before = time.perf_counter()
        call()
        times.append((time.perf_counter() - before) * 1e3)
    return statistics.median(times[3:])


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's own generators (initial weights, dropout), and put their states back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
