"""Small sets of images that are all different."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from n2n_fast.files.errors import BadInput
from n2n_fast.training.data import ImageData, Split, from_tensors


def images(count: int, channels: int = 3, size: int = 8) -> Tensor:
    """Images all different from one another: the first two pixels count them."""
    random = torch.Generator().manual_seed(0)
    stack = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=random)
    stack[:, 0, 0, 0] = torch.arange(count) % 256
    stack[:, 0, 0, 1] = torch.arange(count) // 256
    return stack


def identity(split: Split) -> set[int]:
    """Which of the `images` are in the split."""
    first = split.images[:, 0, 0].long()
    return set((first[:, 0] + 256 * first[:, 1]).tolist())


def make(count: int = 100, classes: int = 4, **options: Any) -> ImageData:
    return from_tensors("some", (images(count), torch.arange(count) % classes), **options)


@contextlib.contextmanager
def refused(text: str) -> Iterator[pytest.ExceptionInfo[BadInput]]:
    """Within it, BadInput is raised with a message of one line in which the pattern `text` occurs."""
    with pytest.raises(BadInput, match=text) as error:
        yield error
    assert "\n" not in str(error.value)
