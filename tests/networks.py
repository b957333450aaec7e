"""Small hand-written networks that the tests share; each shows one habit of the nets found in the wild."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.student import slots_of


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def chain() -> nn.Sequential:
    """Layers by number: 0 conv, 3 conv 5x5, 6 pool, 7 conv, 10 conv, 15 linear; norm and relu between."""
    return nn.Sequential(
        *(*conv_bn(3, 8), nn.ReLU(inplace=True)),
        *(*conv_bn(8, 12, 5), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2),
        *(*conv_bn(12, 12), nn.ReLU()),
        *(*conv_bn(12, 16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


class Vgg(nn.Module):
    """Convolutions with biases, and a classifier on the flattened map; for images of 16 px."""

    def __init__(self, by_number: bool) -> None:
        super().__init__()
        self.by_number = by_number
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.fc1, self.drop, self.fc2 = nn.Linear(12 * 4 * 4, 20), nn.Dropout(0.5), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x)), inplace=True), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 12 * 4 * 4) if self.by_number else x.view(x.size(0), -1)
        return self.fc2(self.drop(F.relu(self.fc1(x))))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs)
        self.shortcut = nn.Sequential(*(conv_bn(inputs, outputs, 1, stride) if stride > 1 else ()))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """ResNet in the CIFAR style, functional relu and `+=`: two blocks of 8 channels, two of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 8)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16, 1))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer2(self.layer1(out))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class Bottleneck(nn.Module):
    """1x1, (grouped) 3x3, 1x1 around a shortcut, with one in-place relu called three times."""

    def __init__(self, inputs: int, width: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, width, 1)
        self.conv2, self.bn2 = conv_bn(width, width, 3, groups=groups)
        self.conv3, self.bn3 = conv_bn(width, outputs, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(*conv_bn(inputs, outputs, 1)) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def bottlenecks(groups: int = 1) -> nn.Sequential:
    """ResNet-50 in small; with groups > 1 ResNeXt in small."""
    return nn.Sequential(
        *(*conv_bn(3, 8), nn.ReLU(inplace=True)),
        *(Bottleneck(8, 8, 24, groups), Bottleneck(24, 8, 24, groups)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 3 * inputs
        self.residual = stride == 1 and inputs == outputs
        self.expand = nn.Sequential(*conv_bn(inputs, wide, 1), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(*conv_bn(wide, wide, 3, stride, wide), nn.ReLU6(inplace=True))
        self.project = nn.Sequential(*conv_bn(wide, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


def mobile() -> nn.Sequential:
    """MobileNetV2 in small."""
    return nn.Sequential(
        *(*conv_bn(3, 6), nn.ReLU6(inplace=True)),
        *(InvertedResidual(6, 6, 1), InvertedResidual(6, 8, 2), InvertedResidual(8, 8, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 10)),
    )


class Tail(nn.Module):
    """A first convolution of `width` channels, a subclass's `body` that keeps them, a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.fc = nn.Linear(width, 10)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


class ReadAgain(Tail):
    """An in-place relu whose input is read again later, and so is read after the relu."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.relu(y) * 2 + y


class ReadAgainTwice(ReadAgain):
    """The same, where it is the relu's second call whose input is read again."""

    def body(self, x: Tensor) -> Tensor:
        return super().body(self.relu(x))


class Twice(Tail):
    """A convolution and a norm called twice, at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv_bn(8, 8)

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return F.relu(self.norm(self.conv(F.max_pool2d(x, 2))))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Gated(Tail):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(8)

    def body(self, x: Tensor) -> Tensor:
        return self.gate(F.relu(x))


class Dense(Tail):
    """Two maps side by side, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.norm, self.mix = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.mix(F.relu(self.norm(torch.cat([x, self.grow(F.relu(x))], 1))))


class Branch(nn.Module):
    """Data-dependent control flow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Branching(Tail):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def body(self, x: Tensor) -> Tensor:
        return self.branch(x)


class NotUnderstood(Tail):
    """An operation over channels that only the pixels' owner understands, between two convolutions."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = operation
        self.conv, self.free = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 8, 3, padding=1)
        self.turn = nn.Parameter(torch.randn(8, 8))

    def body(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(x))
        x = torch.cumsum(x, 1) if self.operation == "cumsum" else torch.einsum("nchw,cd->ndhw", x, self.turn)
        return self.last(F.relu(self.free(x)))


def settle(net: nn.Module, seed: int = 0) -> nn.Module:
    """`net` in evaluation mode with norms whose statistics and weights all differ from those of a new one."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return net.eval()


class ChannelLast(Tail):
    """ConvNeXt in small: layer scale, linear layers and a norm over the last dimension, stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.widen, self.narrow = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.drop = torchvision.ops.StochasticDepth(0.3, "row")
        self.last_norm = torchvision.models.convnext.LayerNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(nn.functional.gelu(self.widen(y))).permute(0, 3, 1, 2)
        return self.last_norm(x + self.drop(self.scale * y))


class Shuffled(Tail):
    """ShuffleNetV2 in small: one half of the channels passes by, then both are shuffled; also by a size in numbers."""

    def __init__(self) -> None:
        super().__init__(12)
        self.first, self.second = (nn.Sequential(*conv_bn(6, 6), nn.ReLU()) for _ in range(2))

    def body(self, x: Tensor) -> Tensor:
        by, through = x.chunk(2, dim=1)
        x = torch.cat([by, self.first(through)], 1)
        count, channels, height, width = x.size()
        x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(count, -1, height, width)
        by, through = torch.split(x, 6, dim=1)
        return torch.channel_shuffle(torch.cat([by, self.second(through)], 1), 2)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "vgg_size": functools.partial(Vgg, by_number=False),
    "vgg_number": functools.partial(Vgg, by_number=True),
    "cifar_resnet": CifarResNet,
    "bottlenecks": bottlenecks,
    "resnext": functools.partial(bottlenecks, groups=4),
    "mobile": mobile,
    "read_again": ReadAgain,
    "twice": Twice,
    "gated": Gated,
    "dense": Dense,
    "channel_last": ChannelLast,
    "shuffled": Shuffled,
}
LARGE = ("resnet18", "resnet50", "wide_resnet50_2", "vgg11_bn", "mobilenet_v2", "shufflenet_v2_x0_5")


def make(name: str, seed: int = 0) -> nn.Module:
    """A net of SMALL or LARGE, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in SMALL:
            return settle(SMALL[name](), seed)
        quick = {"init_weights": False} if name.startswith("vgg") else {}
        return settle(torchvision.models.get_model(name, num_classes=10, **quick), seed)


def images(name: str = "", count: int = 2) -> Tensor:
    """Images (count, 3, H, W) for the net `name`."""
    size = 32 if name in LARGE else 16
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@functools.cache
def teacher_of(name: str) -> nn.Module:
    """`make(name)`, shared by all tests that only read it."""
    return make(name)


@functools.cache
def space_of(name: str) -> ArchitectureSpace:
    """The space of `teacher_of(name)`, shared like it."""
    return ArchitectureSpace(teacher_of(name), images(name))


def position(space: ArchitectureSpace, name: str) -> int:
    """Index of the layer `name`."""
    return [layer.name for layer in space.layers].index(name)


def without(space: ArchitectureSpace, *names: str) -> list[bool]:
    """The `keep` that removes the layers `names`."""
    return [layer.name not in names for layer in space.layers]


def ratios(space: ArchitectureSpace, **of: float) -> list[float]:
    """Ratios of 1 but for the layers named; write "__" for a dot and "_" before a number."""
    chosen = {name.lstrip("_").replace("__", "."): ratio for name, ratio in of.items()}
    assert chosen.keys() <= {layer.name for layer in space.layers}
    return [chosen.get(layer.name, 1.0) for layer in space.layers]


def check_student(space: ArchitectureSpace, x: Tensor, seed: int, least: float = 0.1) -> Any:
    """A student at random of ratios from `least` on, None if degenerate: params, MACs and gradients as foreseen."""
    rng = np.random.default_rng(seed)
    keep = (rng.random(len(space.layers)) >= 0.2).tolist()
    channels, kernels = (rng.uniform(least, 1, len(space.layers)).tolist() for _ in range(2))
    try:
        arch = space.shrink(space.remove(space.teacher, keep), channels, kernels)
    except DegenerateArchitecture:
        return None
    student = space.build(arch)
    assert sum(p.numel() for p in student.parameters()) == arch.params
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        student(x[:1])
    assert counter.get_total_flops() == 2 * arch.macs
    student.train()(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    return student


def kill_channels(traced: TracedTeacher, share: int) -> list[float]:
    """Zero all that writes one in `share` units of each group that can shrink; the ratios that drop just these.

    Not where a norm averages over channels: there a channel of zeros counts in the mean.
    """
    rng, left = np.random.default_rng(0), [1.0] * len(traced.layers)
    averaging = [i for i, m in enumerate(traced.modules) if isinstance(m, nn.LayerNorm)]
    averaged = traced.occurrences[traced.in_axis[averaging]].any(0)
    for g, units in enumerate(traced.units):
        spare = len(units) // share
        if traced.pinned[g] or averaged[g] or not traced.writers[g] or spare == 0:
            continue
        left[traced.writers[g][0]] = 1 - spare / len(units)
        dead = rng.choice(units, spare, replace=False)
        for slot in slots_of(traced):
            if slot.is_parameter:
                written = slot.columns if slot.transposed and slot.columns is not None else slot.rows
                weight = slot.tensor if written == slot.rows else slot.tensor.transpose(0, 1)
                weight[torch.from_numpy(np.isin(traced.axes[written], dead))] = 0
    return left
