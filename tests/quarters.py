"""A teacher, its data and a search of seconds, which several modules' tests share."""

import json

import torch
from torch import nn

import n2n_fast
from n2n_fast.training.batches import Batches
from n2n_fast.training.data import ImageData
from n2n_fast.training.distill import seeded, train
from n2n_fast.training.teachers import SmallResNet

TINY = n2n_fast.SearchConfig(
    updates=2,
    rollouts=3,
    rollout_steps=4,
    anchors=4,
    anchor_epochs=0.5,
    anchor_every=1,
    stage_epochs=0.5,
    final_epochs=1,
    epoch_steps=0,
    batch_size=32,
    calibration_images=64,
)


def quarters() -> ImageData:
    """Four classes, told apart by which quarter of the image is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    images = 0.5 * torch.randn(400, 1, 8, 8, generator=generator)
    for n, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[n, :, row : row + 4, column : column + 4] += 1.0
    return n2n_fast.from_tensors("quarters", (images, labels))


def taught(data: ImageData) -> nn.Module:
    """A small teacher of the data."""
    with seeded(0, torch.device("cpu")):
        model = SmallResNet(1, data.classes, 1)
    return train(model, Batches(data.train, model, 6, 32, None, seed=0), learning_rate=0.1)


def history(out, *kinds):
    """The lines of a run's history, or those of some kinds, without what a clock said."""
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    clocks = {"seconds", "training_seconds"}
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines if not kinds or line["kind"] in kinds]


def equal(a, b):
    """Whether nested dictionaries hold the same, tensors among it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def outcome(out):
    """History, policies and student: what depends neither on who evaluates nor on how often a search is cut off."""
    tensors = {name: torch.load(out / name, weights_only=True) for name in ("policies.pt", "student.pt")}
    return {"history": history(out), **tensors}
