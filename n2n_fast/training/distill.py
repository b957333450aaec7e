"""One student's training and evaluation (section 3.3): BN statistics, distillation, latency."""

import contextlib
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from n2n_fast import native
from n2n_fast.files.safe_load import understood
from n2n_fast.files.states import checked, load_optimizer
from n2n_fast.training.clock import now

CHECK_EVERY = 10
WARM_UP = 0.2
EAGER_STEPS = 3  # before a step is recorded
CLIP = 5.0  # norm of a gradient: a student far from its teacher has a very steep distillation loss
BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Progress:
    """What a long piece of work tells while it goes on; override what you want to show."""

    def message(self, text: str) -> None:
        """Something worth a line happened."""

    def phase(self, name: str, length: int) -> None:
        """A part of the work begins: so many rollouts, or so many steps where it is a training."""

    def step(self, step: int, loss: float, accuracy: float) -> None:
        """So many steps of a training are done; loss and accuracy are means since the last call."""


class BatchSource(Protocol):
    """A known number of batches: images (n, C, H, W), labels (n,) and, or None, the teacher's logits (n, classes)."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]: ...
    def after(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The batches from step `start` on, counted from 0."""


class Checkpointer(Protocol):
    """Keeps the state of a training, so that it can be cut off and goes on as if it had not been."""

    def load(self) -> dict[str, Any] | None:
        """The state that was kept last; None to begin."""

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Called after every step; keeps what `state` gives if it is time for it, and may raise to stop."""


class Diverged(ArithmeticError):
    """A training whose loss ceased to be finite."""


def train(
    model: nn.Module,
    batches: BatchSource,
    *,
    learning_rate: float,
    kd_weight: float = 0.0,
    weight_decay: float = 5e-4,
    progress: Progress | None = None,
    checkpointer: Checkpointer | None = None,
    autocast: bool | None = None,
    capture: bool = False,
) -> nn.Module:
    """Train `model` in place by SGD on cross entropy plus kd_weight times the distillation loss; left in eval mode.

    Teacher logits of None leave the distillation out. The learning rate climbs to its peak over the first fifth of
    the steps, then falls to 0 along a cosine. `progress.step` is called every ten steps, and only then does the host
    wait for a GPU. With a `checkpointer` the training goes on where it was cut off. autocast: to bfloat16; None: where
    the hardware multiplies it natively. capture: on a GPU, record the step as a CUDA graph and replay it; batches must
    be of one size. Raises Diverged.
    """
    # Batches are contiguous, not channels_last: for that layout oneDNN's AVX2 kernel for the weight gradient of 1x1
    # convolutions corrupts memory or never returns at some odd widths (torch 2.15), and it is hardly faster.
    steps = len(batches)
    step = TrainingStep(model.train(), learning_rate, kd_weight, weight_decay, autocast)
    run = Replayed(step) if capture and step.device.type == "cuda" else step
    rates = torch.tensor([_scheduled(learning_rate, n, steps) for n in range(1, steps + 1)], device=step.device)
    start = step.restore(checkpointer.load() if checkpointer else None)
    for number, batch in enumerate(batches.after(start), start + 1):
        step.rate.copy_(rates[number - 1])
        run(*batch)
        if number % CHECK_EVERY == 0 or number == steps:
            _report(number, *step.tally(), progress)
        if checkpointer is not None:
            checkpointer.offer(functools.partial(step.state, number))
    return model.eval()


class TrainingStep:
    """One step of SGD: no scalar of it is the host's but the number of images, so that a CUDA graph can record it.

    rate: the learning rate, a tensor () that is read at each step.
    """

    def __init__(
        self, model: nn.Module, rate: float, kd_weight: float, weight_decay: float, autocast: bool | None
    ) -> None:
        self.model, self.kd_weight, self.autocast = model, kd_weight, autocast
        self.device = next(model.parameters()).device
        self.rate = torch.tensor(rate, device=self.device)
        groups = _decayed(model, weight_decay)
        self.optimizer = torch.optim.SGD(groups, self.rate, momentum=0.9, nesterov=True, fused=True)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        norms = (module for module in model.modules() if isinstance(module, BATCH_NORM) and module.momentum is not None)
        self._norms = [norm._buffers for norm in norms if norm.num_batches_tracked is not None]
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)  # sums since the last report
        self._correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.images = 0

    def __call__(self, images: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> None:
        """Take images (n, C, H, W), labels (n,), teacher_logits (n, classes) or None."""
        with mixed_precision(self.device, self.autocast), _uncounted(self._norms):
            logits = self.model(images)
        logits = logits.float() if logits.element_size() < 4 else logits  # the loss has more digits than bfloat16
        target, weight = (logits.detach(), 0.0) if teacher_logits is None else (teacher_logits, self.kd_weight)
        loss, grad, correct = native.kd_loss_and_grad(logits, target.to(logits.dtype), labels, weight)
        logits.backward(grad)
        nn.utils.clip_grad_norm_(self._parameters, CLIP, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._loss.add_(loss, alpha=len(labels))
        self._correct.add_(correct)
        self.images += len(labels)

    def tally(self) -> tuple[float, float]:
        """Mean loss and accuracy since the last call; the host waits for them."""
        loss, correct = torch.stack([self._loss, self._correct.double()]).tolist()
        mean = loss / self.images, correct / self.images
        self._loss.zero_()
        self._correct.zero_()
        self.images = 0
        return mean

    def state(self, number: int) -> dict[str, Any]:
        """All that the training is after so many steps."""
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"step": number, "model": model, "optimizer": optimizer, "generators": generators}

    def restore(self, state: dict[str, Any] | None) -> int:
        """Put back what `state` gave; the number of steps done."""
        if state is None:
            return 0
        with understood("the training that was kept"):
            self.model.load_state_dict(state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
            torch.set_rng_state(state["generators"]["cpu"])
            if self.device.type == "cuda" and "cuda" in state["generators"]:  # not where it was begun on a CPU
                torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)
            return checked(state["step"], int)


class Replayed:
    """A training step that runs a few times, is then recorded as a CUDA graph, and replayed on copies of batches.

    A step in which the host waits for the device cannot be recorded: it is run as it is.
    """

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        self._stream: torch.cuda.Stream = torch.cuda.Stream(step.device)  # type: ignore[no-untyped-call]
        self._eager = 0
        self._waits = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: tuple[Tensor, Tensor, Tensor | None]

    def __call__(self, images: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> None:
        """As the step itself; all batches are of one size."""
        if self._waits:
            self._step(images, labels, teacher_logits)
            return
        if self._eager < EAGER_STEPS:  # which make momentum buffers and choose convolutions
            self._stream.wait_stream(torch.cuda.current_stream(self._step.device))
            with torch.cuda.stream(self._stream), _noticed_waits() as waits:
                self._step(images, labels, teacher_logits)
            torch.cuda.current_stream(self._step.device).wait_stream(self._stream)
            self._eager += 1
            self._waits = bool(waits) and self._eager > 1  # the first makes what is needed once
            return
        if self._graph is None:
            self._record(images, labels, teacher_logits)
        for static, part in zip(self._static, (images, labels, teacher_logits), strict=True):
            if static is not None and part is not None:
                static.copy_(part)
        assert self._graph is not None
        self._graph.replay()
        self._step.images += len(labels)

    def _record(self, images: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> None:
        """Record the step, which is not run by that."""
        self._static = images.clone(), labels.clone(), None if teacher_logits is None else teacher_logits.clone()
        graph, counted = torch.cuda.CUDAGraph(), self._step.images
        with torch.cuda.graph(graph, stream=self._stream):
            self._step(*self._static)
        self._graph, self._step.images = graph, counted


@contextlib.contextmanager
def _noticed_waits() -> Iterator[list[warnings.WarningMessage]]:
    """What makes the host wait for the device meanwhile; it is to be read afterwards."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="called a synchronizing CUDA operation")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _uncounted(norms: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Spare batch norms, given their buffers, the counting of their batches: a kernel each, which nobody reads."""
    counters = [buffers["num_batches_tracked"] for buffers in norms]
    for buffers in norms:
        buffers["num_batches_tracked"] = None
    try:
        yield
    finally:
        for buffers, counter in zip(norms, counters, strict=True):
            buffers["num_batches_tracked"] = counter


def _report(step: int, loss: float, accuracy: float, progress: Progress | None) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}")
    if progress is not None:
        progress.step(step, loss, accuracy)


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


def mixed_precision(device: torch.device, enabled: bool | None = None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 where `enabled`; None: where the hardware multiplies it natively.

    The hardware decides, never a timing, so that runs repeat. A CPU needs AMX: with AVX512_BF16 alone narrow students
    gain nothing and depthwise convolutions lose (bench/README.md), and with neither bfloat16 is emulated.
    """
    if enabled is None and device.type == "cuda":
        enabled = torch.cuda.get_device_capability(device) >= (8, 0)
    elif enabled is None:
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        enabled = device.type == "cpu" and bool(has_amx())
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


@torch.no_grad()
def recalibrate(model: nn.Module, images: Iterable[Tensor]) -> nn.Module:
    """Re-estimate the statistics of every batch norm as the plain mean over batches of images; left in eval mode.

    Weights cut from a teacher leave statistics that no longer fit: without this a student starts at chance.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.track_running_stats]
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
        now(images.device)

    now(images.device)
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
