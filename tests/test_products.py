"""Convolutions as matrix products."""

import pytest
import torch
from torch import nn

from n2n_fast.networks import products
from n2n_fast.networks.products import as_products, convolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, (1, 2)])
@pytest.mark.parametrize("stride", [1, (2, 1)])
@pytest.mark.parametrize("kernel", [1, 2, (3, 1), 5])
def test_a_product_is_the_convolution(kernel, stride, padding, dilation, bias):
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, bias=bias).double()
    x = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(convolve(conv, images), conv(images))


def test_what_cannot_be_a_product_is_left_alone(monkeypatch):
    net = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3),
    )
    with as_products(net, CUDA):  # on tensors of the CPU
        assert ["forward" in vars(conv) for conv in net] == [False, False, False, True]
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            net[3](torch.zeros(1, 4, 2, 2))
    with as_products(net, CPU):
        assert not any("forward" in vars(conv) for conv in net)
    monkeypatch.setattr(products, "LARGEST", 0)
    assert convolve(net[3], torch.zeros(1, 4, 5, 5)).is_contiguous()  # as the convolution itself leaves it
