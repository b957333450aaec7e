"""Teachers: made anew, trained, and read from files whose architecture is inferred from their keys and shapes."""

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.files.safe_load import WantsCode, read_tensors, read_trusted
from n2n_fast.networks.tracing import logits_of
from n2n_fast.training.batches import Batches
from n2n_fast.training.data import ImageData
from n2n_fast.training.distill import Diverged, Progress, seeded, train

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "teacher")
_PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "net.")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that GoogLeNet and Inception use in training alone


# ---------------------------------------------------------------------------------------------------------------------
# Making


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return functional.relu(out)


class SmallResNet(nn.Module):
    """The ResNet for small images (He et al. 2016, section 4.2): three stages of 16, 32 and 64 channels.

    images (N, channels, H, W), H and W at least 8 -> logits (N, classes). It has 6 * blocks + 2 layers with weights.
    """

    def __init__(self, blocks: int, classes: int, channels: int = 3) -> None:
        """blocks: residual blocks in each stage."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (N, classes) of images (N, channels, H, W)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    first = _Block(inputs, outputs, stride)
    return nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(blocks - 1)))


SMALL_RESNETS = {"digits_resnet": 2, "resnet20": 3, "resnet32": 5, "resnet56": 9}  # blocks in each stage


def architectures() -> list[str]:
    """The names that `create` knows: the small ResNets of this module and torchvision's classification models."""
    import torchvision.models

    return [*SMALL_RESNETS, *torchvision.models.list_models(module=torchvision.models)]


def usual_channels(arch: str) -> int | None:
    """Input channels of an architecture's images; None where it takes as many as there are."""
    return None if arch in SMALL_RESNETS else 3


def create(
    arch: str,
    classes: int,
    channels: int = 3,
    image_size: int | None = None,
    cifar_stem: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A network of random weights, settled by `seed`.

    cifar_stem: for torchvision's ResNets, a 3x3 first convolution of stride 1 and no max-pooling, for small images.
    image_size: pixels of square images that it must be able to take. Raises BadInput.
    """
    with seeded(seed, torch.device("cpu")):
        model = _make(arch, classes, channels, cifar_stem)
    if image_size is not None:
        _try_forward(model, torch.zeros(2, channels, image_size, image_size), f"{arch}")
    return model


def _make(arch: str, classes: int, channels: int, cifar_stem: bool = False) -> nn.Module:
    if arch in SMALL_RESNETS:
        if cifar_stem:
            raise BadInput(f"{arch} is made for small images already; leave out the CIFAR stem")
        return SmallResNet(SMALL_RESNETS[arch], classes, channels)
    import torchvision.models

    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise BadInput(f"{arch!r} is no known architecture; {_near_names(arch)} or package.module:factory")
    extra: dict[str, Any] = {}
    if arch in ("googlenet", "inception_v3"):
        extra = {"aux_logits": False, "init_weights": True}
    model: nn.Module = torchvision.models.get_model(arch, weights=None, num_classes=classes, **extra)
    if cifar_stem:
        _put_cifar_stem(model, arch, channels)
    elif channels != 3:
        _put_first_conv(model, channels)
    return model


def _near_names(arch: str) -> str:
    import difflib

    near = difflib.get_close_matches(arch, architectures(), 3)
    return f"give {', '.join(near)}" if near else "give a torchvision name such as resnet18"


def _put_cifar_stem(model: nn.Module, arch: str, channels: int) -> None:
    from torchvision.models import ResNet

    if not isinstance(model, ResNet):
        raise BadInput(f"{arch} has no CIFAR stem, only torchvision's ResNets have; leave it out")
    model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def _put_first_conv(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one of `channels` input channels."""
    name, old = _first_conv(model)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _first_conv(model: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def input_channels(model: nn.Module) -> int | None:
    """Channels of the images that `model` takes, by its first convolution; None where it has none."""
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return next((conv.in_channels for conv in convs), None)


def check_fits(model: nn.Module, data: ImageData, name: str = "the teacher") -> None:
    """Raise BadInput unless `model` takes images of `data`, one or two, and tells as many classes apart."""
    wanted = input_channels(model)
    if wanted is not None and wanted != data.train.channels:
        raise BadInput(
            f"{name} takes images of {wanted} channels but {data.name} gives {data.train.channels};"
            " use a teacher that was trained on such images"
        )
    for count in (2, 1):
        index = torch.arange(count, device=data.train.labels.device) % len(data.train)
        logits = _try_forward(model, data.train.batch(index)[0], name)
        if logits.ndim != 2 or len(logits) != count:
            raise BadInput(f"{name} gives an output of shape {tuple(logits.shape)}; expected logits ({count}, classes)")
        _check_class_count(name, logits.shape[1], data.classes)
        if not bool(logits.isfinite().all()):
            raise BadInput(f"{name} gives NaN or infinite logits on {data.name}; its weights are damaged")


@torch.no_grad()
def _try_forward(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """The logits of images (n, C, H, W) in eval mode, or BadInput where the network cannot take their size."""
    training = model.training
    try:
        output = model.eval()(images)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise_device_fault(error)
        height, width = images.shape[2:]
        raise BadInput(
            f"{name} cannot take images of {width}x{height} pixels ({first_line(error)}); set another --image-size"
        ) from error
    finally:
        model.train(training)
    logits = logits_of(output)
    assert isinstance(logits, Tensor)
    return logits


def _check_class_count(name: str, has: int, wanted: int) -> None:
    if has != wanted:
        raise BadInput(
            f"{name} tells {has} classes apart but the data has {wanted}; give the data that it was trained on"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_teacher(
    model: nn.Module,
    data: ImageData,
    *,
    epochs: float,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Train `model` in place on `data.train`, on the data's device, as `distill.train` does; return it in eval mode.

    Keeps the last step's weights. Validation and test images are not touched. On a CPU the same seed gives the same
    weights. Raises BadInput where the loss ceases to be finite.
    """
    if len(data.train) < 2:
        raise BadInput(f"{data.name}: 1 training image; batch normalisation needs at least 2")
    device = data.train.images.device
    batches = Batches(data.train, None, epochs, batch_size, data.augmentation, seed)
    if progress is not None:
        progress.phase("training the teacher", len(batches))
    with seeded(seed, device):
        try:
            return train(
                model.to(device),
                batches,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                progress=progress,
            )
        except Diverged as error:
            raise BadInput(f"the training diverged: {error} of {len(batches)}; lower the learning rate") from None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_state_dict_file(path: str | Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The state dict in a file of torch.save, out of its wrappers and common prefixes, on the CPU.

    allow_pickle: also read files that run code when they are read, such as a pickled module; only for files that you
    trust. Raises BadInput, also where a weight is NaN or infinite.
    """
    held = _read(path, allow_pickle)
    return strip_prefixes(_unwrap(held.state_dict() if isinstance(held, nn.Module) else held, path))


def load_teacher(
    path: str | Path,
    arch: str | None = None,
    classes: int | None = None,
    channels: int | None = None,
    allow_pickle: bool = False,
) -> nn.Module:
    """The network in a file, float32, in eval mode, on the CPU.

    arch: a name that `create` knows, or `package.module:factory`; inferred where it is None. classes, channels: those
    of the data, which must fit; grey data fits a network of 3 channels. Raises BadInput.
    """
    held = _read(path, allow_pickle)
    if isinstance(held, nn.Module):
        _unwrap(held.state_dict(), path)
        model = held
    else:
        state = _unwrap(held, path)
        model = _from_factory(arch, classes, state, path) if arch and ":" in arch else _from_name(arch, state, path)
    has = input_channels(model)
    if channels is not None and has is not None and has != channels and (channels, has) != (1, 3):
        raise BadInput(f"{path} takes images of {has} channels but the data has {channels}; give fitting data")
    if classes is not None and not isinstance(held, nn.Module) and not (arch and ":" in arch):
        _check_class_count(str(path), _class_count(model), classes)
    return model.float().eval()


def _class_count(model: nn.Module) -> int:
    """Outputs of the last layer with weights, which in every architecture that `create` knows is the classifier."""
    return len(list(model.parameters())[-1])


def _read(path: str | Path, allow_pickle: bool) -> Any:
    """What the file holds, or BadInput."""
    if allow_pickle:
        return read_trusted(path)
    try:
        return read_tensors(path)
    except WantsCode as error:
        raise BadInput(
            f"{error}; save model.state_dict() by torch.save instead, or add --allow-pickle if you trust it"
        ) from None


def _unwrap(held: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict within `held`, its weights checked."""
    while isinstance(held, Mapping) and not _is_state_dict(held):
        inner = next((held[key] for key in _WRAPPERS if isinstance(held.get(key), Mapping | nn.Module)), None)
        if inner is None:
            keys = ", ".join(str(key) for key in list(held)[:5]) or "nothing"
            raise BadInput(f"{path} holds no state dict but {keys}; save model.state_dict()")
        held = inner.state_dict() if isinstance(inner, nn.Module) else inner
    if not isinstance(held, Mapping):
        raise BadInput(f"{path} holds a {type(held).__name__}; save model.state_dict()")
    for key, value in held.items():
        if value.is_complex():
            raise BadInput(f"{path}: {key} holds complex numbers; give the weights of a network")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise BadInput(f"{path}: {key} holds NaN or infinite values; the weights are damaged, give another file")
    return dict(held)


def _is_state_dict(held: Mapping[Any, Any]) -> bool:
    return bool(held) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in held.items())


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that DataParallel, compile and training frameworks put before every key."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while prefix := next((p for p in _PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _from_name(arch: str | None, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    state = {key: value for key, value in strip_prefixes(state).items() if not key.startswith(_AUXILIARY)}
    try:
        name, options = infer_architecture(state) if arch is None else _fit(arch, state)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    if options["classes"] < 1 or options["channels"] < 1:
        raise BadInput(f"{path}: {options['classes']} classes and {options['channels']} channels; give a whole network")
    model = _make(name, **options)
    _load(model, state)
    return model


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights that are known to fit; counters of batches, which no evaluation reads, need not."""
    wanted = _shapes(model.state_dict())
    fitting = {key: value for key, value in state.items() if wanted.get(key) == tuple(value.shape)}
    model.load_state_dict(fitting)


def _from_factory(arch: str, classes: int | None, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """The module that `package.module:factory` makes, with the weights of `state`."""
    factory = _import_factory(arch)
    try:
        parameters = inspect.signature(factory).parameters
        takes = "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        model = factory(num_classes=classes) if takes and classes is not None else factory()
    except Exception as error:  # the factory is the user's: whatever it raises is about what it was handed
        raise_device_fault(error)
        raise BadInput(f"{arch} failed ({type(error).__name__}: {first_line(error)})") from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"{arch} gives a {type(model).__name__}; it must give a torch.nn.Module")
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    fits = [s for s in (dict(state), strip_prefixes(state)) if not _Misfit.of(wanted, _shapes(s), wanted)]
    if not fits:
        raise BadInput(f"{path} does not fit {arch}: {_Misfit.of(wanted, _shapes(strip_prefixes(state)), wanted)}")
    _load(model, fits[0])
    return model


def _import_factory(arch: str) -> Callable[..., Any]:
    """The object behind `package.module:factory`; modules in the current directory can be imported."""
    module, _, name = arch.partition(":")
    path = sys.path.copy()
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code
        raise BadInput(
            f"{arch} cannot be imported ({type(error).__name__}: {first_line(error)}); write package.module:factory"
        ) from error
    finally:
        sys.path[:] = path
    if not callable(found):
        raise BadInput(f"{arch} is a {type(found).__name__}; it must be a class or function that gives a module")
    return found  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------------
# Inferring


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Misfit:
    """How the keys and shapes of a file differ from those of a network; false where they do not."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]
    total: int

    @classmethod
    def of(cls, wanted: Shapes, given: Shapes, expected: Shapes) -> "_Misfit":
        """`wanted` settles the keys, `expected` the shapes: those of `wanted`, as far as they are free to differ."""
        wanted = {key: shape for key, shape in wanted.items() if not key.endswith("num_batches_tracked")}
        given = {key: shape for key, shape in given.items() if not key.endswith("num_batches_tracked")}
        missing = tuple(key for key in wanted if key not in given)
        unexpected = tuple(key for key in given if key not in wanted)
        misshaped = tuple(
            f"{key} {given[key]} instead of {expected[key]}"
            for key in wanted
            if key in given and given[key] != expected[key]
        )
        return cls(missing, unexpected, misshaped, len(wanted) + len(unexpected))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    @property
    def share(self) -> float:
        """Share of all keys that differ."""
        return (len(self.missing) + len(self.unexpected) + len(self.misshaped)) / self.total

    def __str__(self) -> str:
        parts = []
        for kind in ("missing", "unexpected", "misshaped"):
            keys: tuple[str, ...] = getattr(self, kind)
            if keys:
                parts.append(f"{len(keys)} keys {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
        return ", ".join(parts)


@dataclass(frozen=True)
class _Form:
    """The keys and shapes of one architecture, and what in them is free: the classes, the channels, a ResNet's stem."""

    name: str
    shapes: Shapes
    is_resnet: bool

    def fit(self, given: Shapes) -> tuple[_Misfit, dict[str, Any]]:
        """How `given` differs, and the options of `_make` that leave no difference where there need be none."""
        stem = next(key for key, shape in self.shapes.items() if len(shape) == 4)
        head = list(self.shapes)[-1].rpartition(".")[0]
        channels = given.get(stem, self.shapes[stem])[1:2]
        classes = given.get(f"{head}.weight", self.shapes[f"{head}.weight"])[:1]
        cifar_stem = self.is_resnet and given.get(stem, ())[2:] == (3, 3)
        kernel = (3, 3) if cifar_stem else self.shapes[stem][2:]
        expected = {**self.shapes, stem: (*self.shapes[stem][:1], *channels, *kernel)}
        for key in {f"{head}.weight", f"{head}.bias"} & self.shapes.keys():  # not every classifier has a bias
            expected[key] = (*classes, *self.shapes[key][1:])
        options = {"classes": math.prod(classes), "channels": math.prod(channels), "cifar_stem": cifar_stem}
        return _Misfit.of(self.shapes, given, expected), options


class _OnMeta(TorchFunctionMode):
    """Allocate parameters and buffers on the meta device, so that a network of any size is made at once.

    `torch.device("meta")` would not do: RegNet computes its widths with tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]  # there is nothing to fill, and finding that out takes most of the time
        if func in (torch.empty, torch.zeros, torch.ones):
            options["device"] = "meta"
        return func(*args, **options)


def _form(name: str) -> _Form:
    with _OnMeta():
        model = _make(name, 1000, 3)
    from torchvision.models import ResNet

    return _Form(name, _shapes(model.state_dict()), isinstance(model, ResNet))


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def _fit(name: str, state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The name and the options of `create` for a state dict of a given architecture."""
    misfit, options = _form(name).fit(_shapes(state))
    if misfit:
        raise BadInput(f"does not fit {name}: {misfit}")
    return name, options


def infer_architecture(state_dict: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The name and the options (classes, channels, cifar_stem) with which `create` makes a network of this state dict.

    Raises BadInput that names the nearest architecture and what differs.
    """
    given = {key: shape for key, shape in _shapes(state_dict).items() if not key.startswith(_AUXILIARY)}
    nearest: tuple[float, str] = (math.inf, "")
    for form in _candidates(given):
        misfit, options = form.fit(given)
        if not misfit:
            return form.name, options
        nearest = min(nearest, (misfit.share, f"{form.name}: {misfit}"))
    raise BadInput(
        f"fits no known architecture; nearest is {nearest[1]}; give --arch package.module:factory for your own"
    )


def _candidates(given: Shapes) -> Iterator[_Form]:
    """Every architecture whose keys look like these: all of the families whose first member does."""
    patterns = _patterns(given)
    for family in _families():
        first = _form(family[0])
        yield first
        ours = _patterns(first.shapes)
        if len(ours & patterns) >= 0.6 * len(ours | patterns):
            yield from (_form(name) for name in family[1:])


def _patterns(shapes: Shapes) -> set[str]:
    """The keys with their numbers left out, in which the members of a family are alike."""
    return {re.sub(r"\d+", "#", key) for key in shapes if not key.endswith("num_batches_tracked")}


def _families() -> list[list[str]]:
    """Names of `create` that come from the same module, ResNets first since they are met most."""
    import torchvision.models

    names = torchvision.models.list_models(module=torchvision.models)
    families: dict[str, list[str]] = {"resnet": []}
    for name in sorted(names, key=_natural_order):
        family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        families.setdefault(family, []).append(name)
    return [list(SMALL_RESNETS), *families.values()]


def _natural_order(name: str) -> list[tuple[int, str]]:
    """A key that puts resnet50 before resnet101: small members of a family are met more and made sooner."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
