"""The teacher as a search sees it: its space of students, its logits, what it costs and how accurate it is."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput
from n2n_fast.files.states import load_finite
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.tracing import run
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.reward import Cost
from n2n_fast.training.batches import TeacherLogits
from n2n_fast.training.data import ImageData, accuracy
from n2n_fast.training.distill import latency_ms
from n2n_fast.training.seeds import derived


@dataclass(frozen=True)
class Teacher:
    """The teacher, to which every stage's logits and rewards refer.

    module: in float32 and eval mode, gives logits alone. given: the same as it came, which may have more outputs.
    space: of all its students. calibration: unlabelled images (n, C, H, W). accuracy: on the validation split.
    """

    given: nn.Module
    module: nn.Module
    space: ArchitectureSpace
    calibration: Tensor
    cost: Cost
    accuracy: float
    logits: TeacherLogits

    @classmethod
    def of(cls, given: nn.Module, data: ImageData, config: SearchConfig) -> "Teacher":
        """Trace and measure a teacher in float32 and eval mode. Raises BadInput where it cannot be used."""
        calibration = _calibration_images(data, config)
        space = space_of(given, calibration, config)
        module = giving_logits(given, space, calibration)
        validation_accuracy = _above_chance(module, data)
        cost = Cost(space.teacher.params, space.teacher.macs, latency_of(module, data, config))
        return cls(given, module, space, calibration, cost, validation_accuracy, TeacherLogits(module, data.train))


def space_of(teacher: nn.Module, calibration: Tensor, config: SearchConfig) -> ArchitectureSpace:
    """The space of a teacher, or of an earlier stage's student; calibration: images (N, C, H, W)."""
    looks = config.init == "fitted" or config.saliency == "activations"
    images = calibration if looks else None
    return ArchitectureSpace(
        teacher, calibration[:2], images, saliency=config.saliency, leaf=config.leaf, round_to=config.round_to
    )


def giving_logits(teacher: nn.Module, space: ArchitectureSpace, images: Tensor) -> nn.Module:
    """The teacher, or where it has several outputs one that gives the logits alone."""
    return teacher if isinstance(run(teacher, images[:2]), Tensor) else space.build(space.teacher, "sliced")


def restored(space: ArchitectureSpace, arch: Architecture, state: dict[str, Tensor]) -> fx.GraphModule:
    """A student that was trained before."""
    student = space.build(arch, "sliced")
    load_finite(student, state)
    return student


def latency_of(model: nn.Module, data: ImageData, config: SearchConfig) -> float | None:
    """Median ms of a forward pass over `latency_batch` images, where the search asks for it."""
    if not config.times:
        return None
    images = data.validation
    index = torch.arange(config.latency_batch, device=images.labels.device) % len(images)
    return latency_ms(model, images.batch(index)[0])


def _calibration_images(data: ImageData, config: SearchConfig) -> Tensor:
    """Unlabelled training images, (n, C, H, W) normalised, drawn by the seed."""
    split = data.train
    generator = torch.Generator().manual_seed(derived(config.seed, "calibration"))
    index = torch.randperm(len(split), generator=generator)[: config.calibration_images]
    images, _ = split.batch(index.to(split.images.device))
    return images


def _above_chance(teacher: nn.Module, data: ImageData) -> float:
    """The teacher's validation accuracy; BadInput where it has learned nothing about this data."""
    try:
        measured = accuracy(teacher, data.validation, strict=True)
    except ArithmeticError as error:
        raise BadInput(f"the teacher cannot be used on {data.name}: {error}; its weights are damaged") from None
    chance = float(data.validation.labels.bincount().max()) / len(data.validation)
    if measured <= 1.2 * chance:
        raise BadInput(
            f"the teacher's validation accuracy on {data.name} is {measured:.1%}, no better than chance "
            f"({chance:.1%}): set --mean, --std and --image-size to the preprocessing that it was trained with"
        )
    return measured


def digest(teacher: nn.Module) -> str:
    """A short hash of a network's tensors, which tells one teacher from another."""
    content = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]
