"""ArchitectureSpace: a teacher's architectures, and the students they stand for (sections 3.1, 3.2)."""

import copy
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput, check_type
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.fitting import Calibration, WeightFitter
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.importance import activation_importance, l1_importance
from n2n_fast.networks.student import StudentFactory
from n2n_fast.networks.tracing import unwrapped
from n2n_fast.networks.transitions import Transitions

INITS = ("fitted", "sliced", "random")
IMPORTANCES = ("activations", "l1")


class ArchitectureSpace(Transitions):
    """All networks that removing and shrinking the layers of one teacher can give.

    teacher: nn.Module with one image input; DataParallel and other wrappers are taken off.
    example_input: (N, C, H, W), N >= 1, the images it will see.
    calibration: unlabelled training images (M, C, H, W) to which students' weights are fitted, a few hundred.
    importance: which channels a student keeps: "activations", those that tell most of all others on the calibration
    images, the default where there are such; or "l1", those of the largest weights.
    leaf: paths of submodules to be treated as one opaque layer each.
    round_to: shrunk widths are multiples of this many channels, where they are not the teacher's own.
    Raises BadInput if the teacher cannot be traced or does not accept the images.
    """

    def __init__(
        self,
        teacher: nn.Module,
        example_input: Tensor,
        calibration: Tensor | None = None,
        *,
        importance: str | None = None,
        leaf: Iterable[str] = (),
        round_to: int = 1,
    ) -> None:
        check_type("teacher", teacher, nn.Module, "a torch.nn.Module, not its file or state dict")
        check_type("example_input", example_input, Tensor, "images as a tensor (N, C, H, W)")
        check_type("calibration", calibration, Tensor | None, "images as a tensor (M, C, H, W), or None")
        check_type("round_to", round_to, int, "a whole number")
        if isinstance(leaf, str):
            raise TypeError(f"leaf: expected a list of names, got the name {leaf!r} alone")
        if round_to < 1:
            raise ValueError(f"round_to: expected at least 1, got {round_to}")
        importance = importance or ("l1" if calibration is None else "activations")
        if importance not in IMPORTANCES:
            raise ValueError(f"importance: expected one of {', '.join(IMPORTANCES)}, got {importance!r}")
        if importance == "activations" and calibration is None:
            raise ValueError("importance: 'activations' needs calibration images")
        self._factory = _narrowable(unwrapped(teacher), example_input, tuple(leaf), round_to)
        super().__init__(self._factory.traced, round_to)
        self._fitter: WeightFitter | None = None
        if calibration is not None:
            activations = Calibration(self._traced, calibration.to(self._traced.example))
            if importance == "activations":
                value = activation_importance(self._traced, activations.covariances, self._factory.importance)
                self._factory = StudentFactory(self._traced, self.classes, value)
            self._fitter = WeightFitter(activations, self._factory.importance)

    def build(self, arch: Architecture, init: str | None = None) -> fx.GraphModule:
        """The student of an architecture, in evaluation mode, on the teacher's device and of its dtype.

        init: "fitted" fits the weights, layer by layer, so that each rebuilds what the teacher's layer reads, and
        re-estimates batch norms; the default where calibration images were given. "sliced" cuts the teacher's weights,
        the default otherwise. "random" draws new ones from torch's generator.
        Its parameters are its own; its fx graph is shared with the space: deepcopy the student before editing that.
        """
        self._check(arch)
        init = init or ("sliced" if self._fitter is None else "fitted")
        if init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
        kept = self._factory.kept_channels(arch)
        student = self._factory.build(arch, kept)
        if init == "random":
            for module in student.modules():
                getattr(module, "reset_parameters", lambda: None)()
        elif init == "fitted":
            if self._fitter is None:
                raise ValueError(f"init: {init!r} needs the space to be made with calibration images")
            if arch != self.teacher:
                self._fitter.fit(student, arch, kept)
        return student

    def unrounded(self) -> "ArchitectureSpace":
        """The same space with widths of any number of channels; shares everything else."""
        space = copy.copy(self)
        space.round_to = 1
        return space


def _narrowable(teacher: nn.Module, example: Tensor, leaf: Sequence[str], round_to: int) -> StudentFactory:
    """Trace a teacher; nodes at which one of two narrow students fails are kept at full width."""
    fixed: set[str] = set()
    while True:
        traced = TracedTeacher(teacher, example, leaf, fixed)
        space = Transitions(traced, round_to)
        factory = StudentFactory(traced, space.classes, l1_importance(traced))
        rng = np.random.default_rng(0)  # equal ratios would hide groups that ought to be one
        ratios = [rng.uniform(least, 1, len(space.layers)).tolist() for least in (0.05, 0.5)]
        misfits = (factory.misfit(space.shrink(space.teacher, of_layers)) for of_layers in ratios)
        node = next(filter(None, misfits), None)
        if node is None:
            return factory
        if node in fixed:
            raise BadInput(f"the teacher cannot be narrowed at {node!r} of its graph; name the module as `leaf`")
        fixed.add(node)
