"""Peak memory of 200 rollouts beside that of 2: python bench/memory.py.

A rollout is a student of a ResNet-18 with widths drawn at random, built on fitted weights and, where said, trained for
a step. The first is the whole teacher, so that both runs have met the largest.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
import torchvision

from n2n_fast import ArchitectureSpace, kd_loss
from n2n_fast.training.distill import recalibrate

WAYS = {  # whether a student is trained, and the environment
    "built": ("", {}),
    "built and trained": ("train", {}),
    "built and trained, oneDNN keeping no primitives": ("train", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}),
}


def rollouts(count, train):
    """Build `count` students; returns the process's peak memory, bytes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(256, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)
    teacher = recalibrate(torchvision.models.resnet18(num_classes=10), images.split(64)).eval()
    space = ArchitectureSpace(teacher, images[:1], images)
    with torch.no_grad():
        logits = teacher(images[:64])
    for n in range(count):
        ratios = (0.1 + 0.9 * torch.rand(len(space.layers), generator=generator)).tolist()
        arch = space.shrink(space.teacher, ratios) if n > 0 else space.teacher
        student = space.build(arch, "fitted").train()
        if train:
            kd_loss(student(images[:64]), logits, labels, 0.1).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(count, train, environment):
    """The same in a process of its own."""
    command = [sys.executable, __file__, str(count), train]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return int(done.stdout)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(rollouts(int(sys.argv[1]), bool(sys.argv[2])))
    else:
        results = {}
        for way, (train, environment) in WAYS.items():
            few, many = (measured(count, train, environment) for count in (2, 200))
            results[way] = {"rollouts_2_gb": few / 1e9, "rollouts_200_gb": many / 1e9, "ratio": many / few}
            print(f"{way}: {few / 1e9:.2f} GB, {many / 1e9:.2f} GB, {many / few:.3f}")
        (Path(__file__).parent / "results" / "memory.json").write_text(json.dumps(results, indent=1) + "\n")
