"""Nets as people write them: one idiom each, between a first convolution and a classifier (`networks.Tail`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from networks import Tail, conv_bn, settle


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Written(Tail):
    """A body made of functions, over modules given by name."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **modules: Any) -> None:
        super().__init__()
        self._body = body
        for name, module in modules.items():
            setattr(self, name, module)

    def body(self, x: Tensor) -> Tensor:
        return self._body(self, x)


class LinearGate(nn.Module):
    """Squeeze and excitation by linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(width, 4), nn.ReLU(inplace=True), nn.Linear(4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        count, width, _, _ = x.size()
        gate = self.fc(self.pool(x).view(count, width)).view(count, width, 1, 1)
        return x * gate.expand_as(x)


class SpatialGate(nn.Module):
    """Where to look, by mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        most, _ = torch.max(x, dim=1, keepdim=True)
        return x * torch.sigmoid(self.conv(torch.cat([torch.mean(x, dim=1, keepdim=True), most], dim=1)))


class Selective(nn.Module):
    """Two kernels and a softmax between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.small, self.large, self.squeeze = conv(width, width), conv(width, width, 5), nn.Linear(width, 4)
        self.gates = nn.ModuleList([nn.Linear(4, width), nn.Linear(4, width)])

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.small(x), self.large(x)], dim=1)
        z = self.squeeze(both.sum(1).mean(-1).mean(-1))
        weights = torch.softmax(torch.stack([gate(z) for gate in self.gates], dim=1), dim=1)
        return (both * weights[:, :, :, None, None]).sum(1)


class SplitAttention(nn.Module):
    """Two halves of the channels, and a softmax between them (ResNeSt)."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down, self.up = conv(12, 24), nn.Conv2d(12, 4, 1), nn.Conv2d(4, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.both(x))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w)
        gate = self.up(F.relu(self.down(x.sum(1).mean((2, 3), keepdim=True))))
        gate = torch.softmax(gate.view(n, 1, 2, -1).transpose(1, 2), 1).reshape(n, 2, -1, 1, 1)
        return (x * gate).sum(1)


def ghost(net: Any, x: Tensor) -> Tensor:
    made = net.made(x)
    return net.last(torch.cat([made, net.cheap(made)], 1)[:, :8, :, :])


def partial(net: Any, x: Tensor) -> Tensor:
    through, by = torch.split(x, [2, 6], dim=1)
    return net.last(F.relu(torch.cat([net.inner(through), by], 1)))


def added_in_place(net: Any, x: Tensor) -> Tensor:
    alias = y = net.inner(x)
    y += x
    return net.last(alias * 2)


def listed(net: Any, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = F.relu(layer(x))
    return x


def shuffled_by_numbers(net: Any, x: Tensor) -> Tensor:
    x = net.inner(x).view(-1, 2, 6, 16, 16).transpose(1, 2).reshape(-1, 12, 16, 16)
    return net.last(x)


def shuffled_by_permutation(net: Any, x: Tensor) -> Tensor:
    count, _, height, width = x.shape
    x = net.inner(x).reshape(count, 2, 6, height, width).permute(0, 2, 1, 3, 4).reshape(count, 12, height, width)
    return net.last(x)


def pooled_both_ways(net: Any, x: Tensor) -> Tensor:
    x = net.inner(x)
    return net.last(torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1))


def attended(net: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    tokens = tokens + net.attention(tokens, tokens, tokens)[0]
    return net.last(tokens.transpose(1, 2).reshape(x.shape[0], 8, 16, 16))


def pruned(layer: nn.Conv2d) -> nn.Conv2d:
    prune.random_unstructured(layer, "weight", 0.3)
    return layer


def in_between(function: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda net, x: net.last(function(net.inner(x)))


def through(net: Any, x: Tensor) -> Tensor:
    """inner, the operation, last."""
    return net.last(net.operation(net.inner(x)))


@dataclass(frozen=True)
class Case:
    """make: the net. shrinkable: layers that choose a width, by name. warning: part of the only one expected, if any.

    exact: whether dropping channels of zero weight changes nothing; not so where the mean of all is taken, or where a
    norm gives them a constant.
    """

    make: Callable[[], nn.Module]
    shrinkable: str
    warning: str = ""
    exact: bool = True


BOTH = "stem inner last"


def case(body: Any, shrinkable: str = BOTH, warning: str = "", exact: bool = True, **modules: Any) -> Case:
    """modules: what makes each."""
    return Case(lambda: Written(body, **{k: make() for k, make in modules.items()}), shrinkable, warning, exact)


def operation(make: Callable[[], nn.Module], outputs: int = 12, *rest: Any, **options: Any) -> Case:
    """A module between two convolutions of 12 channels; outputs: what it makes of them."""
    last = {"last": lambda: conv(outputs, 8), "inner": lambda: conv(8, 12)}
    return case(through, *rest, operation=make, **last, **options)


def function(of: Callable[[Tensor], Tensor], outputs: int = 12, *rest: Any, **options: Any) -> Case:
    """The same with a function."""
    return case(in_between(of), *rest, inner=lambda: conv(8, 12), last=lambda: conv(outputs, 8), **options)


WRITTEN: dict[str, Case] = {
    "linear_gate": operation(lambda: LinearGate(12), 12, "stem inner operation.fc.0 last"),
    "spatial_gate": operation(SpatialGate, exact=False),
    "selective": operation(lambda: Selective(12), 12, "stem inner operation.small operation.squeeze last"),
    "split_attention": operation(SplitAttention, 12, "stem inner operation.both operation.down last"),
    "sum_of_halves": function(lambda x: x.view(x.shape[0], 2, x.shape[1] // 2, 16, 16).sum(1), 6),
    "tensor_split": function(lambda x: torch.sub(*[torch.tensor_split(x, 2, 1)[i] for i in (0, 1)]), 6),
    "uneven_split": function(lambda x: torch.cat([torch.split(x, [4, 2, 6], 1)[i] for i in (2, 0, 1)], 1)),
    "ghost": case(ghost, "stem made last", made=lambda: conv(8, 6, 1), cheap=lambda: conv(6, 6, groups=6),
                  last=lambda: conv(8, 8)),
    "partial": case(partial, inner=lambda: conv(2, 2), last=lambda: conv(8, 8)),
    "added_in_place": case(added_in_place, "stem last", inner=lambda: conv(8, 8), last=lambda: conv(8, 8)),
    "listed": case(listed, "stem layers.0 layers.1 layers.2",
                   layers=lambda: nn.ModuleList([conv(8, 12), conv(12, 12), conv(12, 8)])),
    "shuffled_by_numbers": case(shuffled_by_numbers, inner=lambda: conv(8, 12), last=lambda: conv(12, 8)),
    "shuffled_by_permutation": case(shuffled_by_permutation, inner=lambda: conv(8, 12), last=lambda: conv(12, 8)),
    "channel_shuffle": operation(lambda: nn.ChannelShuffle(3)),
    "pixel_shuffle": operation(lambda: nn.PixelShuffle(2), 3),
    "pixel_shuffle_function": function(lambda x: F.pixel_shuffle(x, 2), 3),
    "pixel_unshuffle": operation(lambda: nn.PixelUnshuffle(2), 48),
    "transposed": operation(lambda: nn.ConvTranspose2d(12, 10, 2, stride=2), 10, "stem inner operation last"),
    "transposed_depthwise": operation(lambda: nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12)),
    "transposed_grouped": operation(lambda: nn.ConvTranspose2d(12, 24, 3, padding=1, groups=4), 24),
    "prelu": operation(lambda: nn.PReLU(12)),
    "group_norm": operation(lambda: nn.GroupNorm(4, 12)),
    "instance_norm": operation(lambda: nn.InstanceNorm2d(12, affine=True, track_running_stats=True)),
    "batch_norm_without_weights": operation(lambda: nn.BatchNorm2d(12, affine=False), exact=False),
    "weight_norm": operation(lambda: parametrizations.weight_norm(conv(12, 10)), 10, "stem inner operation last"),
    "weight_norm_by_hook": operation(lambda: weight_norm(conv(12, 10)), 10, "stem inner operation last"),
    "spectral_norm": operation(lambda: parametrizations.spectral_norm(conv(12, 10)), 10, "stem inner operation last"),
    "pruned": operation(lambda: pruned(conv(12, 10)), 10, "stem inner operation last"),
    "bias_parameter": case(lambda net, x: net.last(F.relu(net.inner(x) + net.bias)), inner=lambda: conv(8, 12),
                           bias=lambda: nn.Parameter(torch.ones(1, 12, 1, 1)), last=lambda: conv(12, 8)),
    "view_to_numbers": case(lambda net, x: net.last(net.inner(x.mean((2, 3))).view(-1, 12, 4, 4)),
                            inner=lambda: nn.Linear(8, 192), last=lambda: conv(12, 8)),
    "padded": operation(lambda: nn.ZeroPad2d(2)),
    "padded_by_reflection": function(lambda x: F.pad(x, (1, 1, 1, 1), "reflect")),
    "upsampled": operation(lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "pooled_both_ways": case(pooled_both_ways, inner=lambda: conv(8, 12), last=lambda: conv(24, 8, 1)),
    "halves": case(lambda net, x: net.last(F.relu(net.inner(x)[:, :6]) * torch.sigmoid(net.again(x)[:, 6:])),
                   inner=lambda: conv(8, 12), again=lambda: conv(8, 12),
                   last=lambda: conv(6, 8)),
    "maxout": function(lambda x: x.view(x.size(0), 6, 2, x.size(2), x.size(3)).max(2)[0], 6),
    "unusual_activation": operation(lambda: nn.Hardshrink(0.1)),
    "attention_over_positions": function(lambda x: x * x.flatten(2).softmax(-1).view(x.shape)),
    "deviations": function(lambda x: x - x.mean((2, 3), keepdim=True) / (x.std((2, 3), keepdim=True) + 1)),
    "repeated": function(lambda x: x.repeat(1, 2, 1, 1), 24),
    "same_padding": case(lambda net, x: net.last(net.inner(x)), inner=lambda: nn.Conv2d(8, 12, 5, padding="same"),
                         last=lambda: conv(12, 8)),
    "called_twice": case(lambda net, x: net.inner(F.relu(net.inner(x))), "stem", inner=lambda: conv(8, 8)),
    "nested": case(lambda net, x: net.inner(x), "stem inner.0.0",
                   inner=lambda: nn.Sequential(nn.Sequential(*conv_bn(8, 8), nn.ReLU()), nn.Identity())),
    # held at full width, and said so
    "local_response_norm": operation(lambda: nn.LocalResponseNorm(3), 12, "stem last", "LocalResponseNorm"),
    "gated_linear_unit": function(lambda x: F.glu(x, 1), 6, "stem last", "glu is not understood"),
    "split_without_end": function(lambda x: torch.cat(torch.split(x, 4, dim=1)[::-1], 1), 12, "stem last", "cat"),
    "reversed": function(lambda x: x.flip(1), 12, "stem last", "flip is not understood"),
    "across_channels": case(lambda net, x: x * net.inner(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1),
                            "", "Conv1d runs across channels", inner=lambda: nn.Conv1d(1, 1, 3, padding=1)),
    "multihead_attention": case(attended, "last", "MultiheadAttention is not understood",
                                attention=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
                                last=lambda: conv(8, 8)),
}  # fmt: skip


def net_of(name: str) -> nn.Module:
    """A net of WRITTEN, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settle(WRITTEN[name].make())
