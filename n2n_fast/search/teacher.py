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
from n2n_fast.training.answers import Answers, answers
from n2n_fast.training.batches import TeacherLogits
from n2n_fast.training.data import ImageData, Split
from n2n_fast.training.datasets import NATURAL, natural
from n2n_fast.training.distill import latency_ms
from n2n_fast.training.seeds import derived
from n2n_fast.training.teachers import check_teacher

REMEMBERED = 2000  # training images on which a teacher's memory is tried


@dataclass(frozen=True)
class Reference:
    """The teacher, to which every stage's logits and rewards refer.

    original: in float32 and eval mode, as it came, which may have more outputs. module: the same, gives logits alone.
    space: of all its students. calibration: unlabelled images (n, C, H, W). answers: on the validation split. doubts:
    parts of the data that it may have been trained on; remembered: on training images, where there are such.
    """

    original: nn.Module
    module: nn.Module
    space: ArchitectureSpace
    calibration: Tensor
    cost: Cost
    answers: Answers
    logits: TeacherLogits
    doubts: tuple[str, ...] = ()
    remembered: Answers | None = None

    @classmethod
    def of(
        cls, teacher: nn.Module, data: ImageData, config: SearchConfig, trained_on: str | None = None
    ) -> "Reference":
        """Try, trace and measure a copy of a teacher on the data's device. Raises BadInput where it cannot be used.

        trained_on: digest of the data whose training images alone it has seen; None where that is not known.
        """
        original = copy.deepcopy(teacher).eval().to(data.train.images.device, torch.float32)
        check_teacher(original, data)
        calibration = _calibration_images(data, config)
        space = space_of(original, calibration, config)
        module = giving_logits(original, space, calibration)
        validation = _telling_classes_apart(module, data)
        cost = Cost(space.teacher.params, space.teacher.macs, latency_of(module, data, config))
        doubts = () if trained_on == data.digest else data.cut_from_train
        remembered = answers(module, _sample(data.train, REMEMBERED), data.classes) if doubts else None
        logits = TeacherLogits(module, data.train)
        return cls(original, module, space, calibration, cost, validation, logits, doubts, remembered)

    @property
    def accuracy(self) -> float:
        """On the validation split, in 0..1."""
        return self.answers.accuracy

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        timed = "" if self.cost.latency is None else f", {self.cost.latency:.2f} ms"
        return f"teacher: {self.cost.params:,} params{timed}, validation accuracy {self.answers}"

    @property
    def warnings(self) -> list[str]:
        """What of it is not understood, and what it may have seen."""
        if self.remembered is None:
            return list(self.space.warnings)
        doubt = (
            f"the teacher may have been trained on the {' and '.join(self.doubts)} images, which were cut from the "
            f"training images: it has {self.accuracy:.2%} there and {self.remembered.accuracy:.2%} on training images; "
            "if it was, give --validation and --test with images that it has not seen"
        )
        return [*self.space.warnings, doubt]

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


def _sample(split: Split, count: int) -> Split:
    """Images at even distances."""
    if len(split) <= count:
        return split
    return split.subset((torch.arange(count) * len(split) // count).to(split.labels.device))


def _telling_classes_apart(teacher: nn.Module, data: ImageData) -> Answers:
    """The teacher's answers on the validation split; BadInput where it cannot have been trained on such data."""
    measured = answers(teacher, data.validation, data.classes)
    if measured.unusable:
        raise BadInput(
            f"the teacher cannot be used on {data.name}: the logits of {measured.unusable} of {len(data.validation)} "
            "images are not finite; its weights are damaged"
        )
    order = measured.order()
    if order is not None:
        names = [data.class_names[label] for label in order]
        named = NATURAL if names == sorted(names, key=natural) else ",".join(names)
        right = measured.reordered(order)
        raise BadInput(
            f"the teacher numbers the classes of {data.name} in another order: as they are it has "
            f"{measured.accuracy:.2%}, in its own order {right.accuracy:.2%}; add --class-order {named}"
        )
    if not measured.is_above_chance:
        raise BadInput(
            f"the teacher does not tell the classes of {data.name} apart: its balanced accuracy on validation images, "
            f"the mean over classes, is {measured.balanced_accuracy:.2%}, no better than chance "
            f"({measured.chance:.2%}); "
            "set --mean, --std and --image-size to the preprocessing that it was trained with"
        )
    return measured
