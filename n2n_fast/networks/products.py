"""Convolutions as matrix products, for students that are run a few times and never again.

On a GPU cuDNN plans every convolution of a shape that it has not met, 1 to 2 ms each (bench/gpu.md), and the shapes of
students hardly repeat. A matrix product needs no plan.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 2**27  # numbers of a matrix of patches; where there are more, a plan is soon repaid


@contextlib.contextmanager
def as_products(model: nn.Module, device: torch.device) -> Iterator[None]:
    """On a GPU, let the model's 2-d convolutions of one group be matrix products meanwhile; elsewhere nothing changes.

    What they compute stays the same but for rounding.
    """
    modules = model.modules() if device.type == "cuda" else ()
    convs = [conv for conv in modules if isinstance(conv, nn.Conv2d) and _is_product(conv)]
    for conv in convs:
        conv.forward = functools.partial(convolve, conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


def _is_product(conv: nn.Conv2d) -> bool:
    plain = type(conv) is nn.Conv2d and "forward" not in vars(conv)
    return plain and conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` of one group applied to x (n, C, H, W): patches times weights, (n, O, H', W'), channels last."""
    assert not isinstance(conv.padding, str)
    (high, wide), (down, right) = conv.padding, conv.stride
    spans = [(size - 1) * step + 1 for size, step in zip(conv.kernel_size, conv.dilation, strict=True)]
    padded = F.pad(x, (wide, wide, high, high)) if high or wide else x
    if padded.ndim != 4 or min(side - span for side, span in zip(padded.shape[2:], spans, strict=True)) < 0:
        return nn.Conv2d.forward(conv, x)  # which says what is wrong
    patches = padded.unfold(2, spans[0], down).unfold(3, spans[1], right)[..., :: conv.dilation[0], :: conv.dilation[1]]
    if patches.numel() > LARGEST:
        return nn.Conv2d.forward(conv, x)
    rows = patches.permute(0, 2, 3, 4, 5, 1).flatten(3)  # (n, H', W', kh kw C)
    return F.linear(rows, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias).movedim(-1, 1)
