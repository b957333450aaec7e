"""Teachers: made anew by name, compared with the data, trained."""

import difflib
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.networks.tracing import logits_of
from n2n_fast.training.batches import Batches
from n2n_fast.training.data import ImageData
from n2n_fast.training.distill import Checkpointer, Diverged, Progress, seeded, train

# torchvision is imported where it is needed: that takes as long as torch itself, and `--help` needs none of it


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


def usual_channels(arch: str) -> int | None:
    """Input channels of an architecture's images; None where it takes as many as there are."""
    return None if arch in SMALL_RESNETS else 3


def create(
    arch: str,
    classes: int,
    channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    cifar_stem: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A network of random weights, settled by `seed`. arch: a key of SMALL_RESNETS, or torchvision's name.

    cifar_stem: for torchvision's ResNets, a 3x3 first convolution of stride 1 and no max-pooling, for small images.
    image_size: pixels of images that it must be able to take, of a square or (height, width). Raises BadInput.
    """
    with seeded(seed, torch.device("cpu")):
        if arch not in SMALL_RESNETS:
            model = _torchvision_model(arch, classes, channels, cifar_stem)
        elif cifar_stem:
            raise BadInput(f"{arch} is made for small images already; leave out the CIFAR stem")
        else:
            model = SmallResNet(SMALL_RESNETS[arch], classes, channels)
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        _try_forward(model, torch.zeros(2, channels, *sides), arch)
    return model


def _torchvision_model(arch: str, classes: int, channels: int, cifar_stem: bool) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if arch not in names:
        near = difflib.get_close_matches(arch, [*SMALL_RESNETS, *names], 3)
        told = f"give {', '.join(near)}" if near else "give a torchvision name such as resnet18"
        raise BadInput(f"{arch!r} is no known architecture; {told} or package.module:factory")
    extra = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(arch, weights=None, num_classes=classes, **extra)
    if cifar_stem and not isinstance(model, models.ResNet):
        raise BadInput(f"{arch} has no CIFAR stem, only torchvision's ResNets have; leave it out")
    if cifar_stem or channels != 3:
        _replace_first_conv(model, channels, cifar_stem)
    return model


def _replace_first_conv(model: nn.Module, channels: int, cifar_stem: bool) -> None:
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    size: Any = (3, 1, 1) if cifar_stem else (old.kernel_size, old.stride, old.padding)
    kernel, stride, padding = size
    new = nn.Conv2d(channels, old.out_channels, kernel, stride, padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(name, new)
    if cifar_stem:
        model.set_submodule("maxpool", nn.Identity())


def input_channels(model: nn.Module) -> int | None:
    """Channels of the images that `model` takes, by its first convolution; None where it has none."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def digest(model: nn.Module) -> str:
    """A short hash of a network's tensors in float32, which tells one network from another."""
    content = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        content.update(name.encode())
        values = tensor.float() if tensor.is_floating_point() else tensor
        content.update(values.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def check_teacher(model: nn.Module, data: ImageData) -> None:
    """Raise BadInput unless `model` takes images of `data`, one or two, and tells as many classes apart."""
    wanted = input_channels(model)
    if wanted is not None and wanted != data.train.channels:
        raise BadInput(
            f"the teacher takes images of {wanted} channels but {data.name} gives {data.train.channels};"
            " use a teacher that was trained on such images"
        )
    for count in (2, 1):
        index = torch.arange(count, device=data.train.labels.device) % len(data.train)
        logits = _try_forward(model, data.train.batch(index)[0], "the teacher")
        if logits.ndim != 2 or len(logits) != count:
            raise BadInput(
                f"the teacher gives an output of shape {tuple(logits.shape)}; expected logits ({count}, classes)"
            )
        if logits.shape[1] != data.classes:
            raise BadInput(
                f"the teacher tells {logits.shape[1]} classes apart but the data has {data.classes};"
                " give the data that it was trained on"
            )
        if not bool(logits.isfinite().all()):
            raise BadInput(f"the teacher gives NaN or infinite logits on {data.name}; its weights are damaged")


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


def train_teacher(
    model: nn.Module,
    data: ImageData,
    *,
    epochs: float,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
    checkpointer: Checkpointer | None = None,
) -> nn.Module:
    """Train `model` in place on `data.train`, on the data's device, as `distill.train` does; return it in eval mode.

    Keeps the last step's weights. Validation and test images are not touched. On a CPU the same seed gives the same
    weights, and so it does where a `checkpointer` lets the training go on. Raises BadInput, caused by Diverged, where
    the loss ceases to be finite.
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
                progress=progress,
                checkpointer=checkpointer,
            )
        except Diverged as error:
            raise BadInput(f"the training diverged: {error} of {len(batches)}; lower the learning rate") from error
