"""The teacher as a search refers to it: its space of students, its logits, what it costs and how accurate it is."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput
from n2n_fast.files.states import load_finite
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.tracing import run
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.reward import Constraints, Cost
from n2n_fast.training.batches import TeacherLogits
from n2n_fast.training.data import ImageData, accuracy
from n2n_fast.training.distill import latency_ms
from n2n_fast.training.seeds import derived
from n2n_fast.training.teachers import check_teacher


@dataclass(frozen=True)
class Reference:
    """The teacher, to which every stage's logits and rewards refer.

    original: in float32 and eval mode, as it came, which may have more outputs. module: the same, gives logits alone.
    space: of all its students. calibration: unlabelled images (n, C, H, W). accuracy: on the validation split.
    """

    original: nn.Module
    module: nn.Module
    space: ArchitectureSpace
    calibration: Tensor
    cost: Cost
    accuracy: float
    logits: TeacherLogits

    @classmethod
    def of(cls, teacher: nn.Module, data: ImageData, config: SearchConfig) -> "Reference":
        """Try, trace and measure a copy of a teacher on the data's device. Raises BadInput where it cannot be used."""
        original = copy.deepcopy(teacher).eval().to(data.train.images.device, torch.float32)
        check_teacher(original, data)
        calibration = _calibration_images(data, config)
        space = space_of(original, calibration, config)
        module = giving_logits(original, space, calibration)
        validation_accuracy = _above_chance(module, data)
        cost = Cost(space.teacher.params, space.teacher.macs, latency_of(module, data, config))
        return cls(original, module, space, calibration, cost, validation_accuracy, TeacherLogits(module, data.train))

    @property
    def summary(self) -> str:
        """One line of it."""
        timed = "" if self.cost.latency is None else f", {self.cost.latency:.2f} ms"
        return f"teacher: {self.cost.params:,} params{timed}, validation accuracy {self.accuracy:.2%}"

    def limits(self, config: SearchConfig) -> Constraints:
        """The limits on students, that on the drop of accuracy below the teacher's among them."""
        least = config.min_accuracy
        if config.max_drop is not None:
            least = max(least or 0.0, self.accuracy - config.max_drop / 100)
        return Constraints(config.max_params, config.max_macs, config.max_latency, least)


def space_of(teacher: nn.Module, calibration: Tensor, config: SearchConfig) -> ArchitectureSpace:
    """The space of a teacher, or of an earlier stage's student; calibration: images (N, C, H, W)."""
    looks = config.init == "fitted" or config.importance == "activations"
    images = calibration if looks else None
    return ArchitectureSpace(
        teacher, calibration[:2], images, importance=config.importance, leaf=config.leaf, round_to=config.round_to
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
    return split.batch(index.to(split.images.device))[0]


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
