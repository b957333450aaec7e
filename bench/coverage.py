"""Every classifier of torchvision in the space: python bench/coverage.py [NAME ...].

For each of them, at a small image: layers, removable and shrinkable ones, groups, the reachable compression, time to
trace and time for a student; and over DRAWS random architectures whether (a) each builds and runs or is refused
before, (b) its params and MACs are those counted on the student, (c) the whole architecture computes what the teacher
does, to the last bit, (d) a teacher with dead channels loses nothing where exactly these go. A channel of zeros that a
layer or group norm averages over is not dead: it counts in the mean; there (d) is asked of the other channels. The
twelve transformers come last.

--times measures again, on a quiet machine, only the two times of the nets whose row is there.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from n2n_fast import ArchitectureSpace
from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.student import slots_of

DRAWS = 20
SIZES = {"inception_v3": 80, "maxvit_t": 224, "vit_h_14": 56}
TRANSFORMERS = ("vit", "swin", "maxvit")
OUT = Path(__file__).parent / "results" / "coverage.json"


def network(name):
    if name.startswith(TRANSFORMERS):
        sized = {"image_size": SIZES.get(name, 64)} if name.startswith("vit") else {}
        return torchvision.models.get_model(name, num_classes=10, **sized).eval()
    quick = {"init_weights": False} if name.startswith(("googlenet", "inception", "vgg", "densenet")) else {}
    model = torchvision.models.get_model(name, num_classes=10, **({} if name.startswith("densenet") else quick))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():  # norms that have seen something, so that nothing is exact by chance
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    for part, parameter in model.named_parameters():
        if part.endswith("layer_scale"):
            nn.init.ones_(parameter)  # 1e-6 would hide what the blocks do
    return model.eval()


def timed(call, rounds):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


def draws(space, images, rng):
    """How many of the drawn architectures are degenerate; asserts (a) and (b) on the others."""
    degenerate = 0
    for _ in range(DRAWS):
        keep = (rng.random(len(space.layers)) >= 0.2).tolist()
        channels, kernels = (rng.uniform(0.3, 1, len(space.layers)).tolist() for _ in range(2))
        try:
            arch = space.shrink(space.remove(space.teacher, keep), channels, kernels)
        except DegenerateArchitecture:
            degenerate += 1
            continue
        student = space.build(arch)
        assert sum(p.numel() for p in student.parameters()) == arch.params
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            student(images[:1])
        assert counter.get_total_flops() == 2 * arch.macs
        student.train()(images).sum().backward()
    return degenerate


def averaged(traced):
    """Of each group, whether a norm takes means over its channels."""
    norms = [i for i, module in enumerate(traced.modules) if isinstance(module, (nn.LayerNorm, nn.GroupNorm))]
    return traced.occurrences[traced.in_axis[norms]].any(0)


def dead_channels(name, images, rng):
    """Relative difference that (d) leaves; None where no channel can be dead."""
    teacher = network(name)
    space = ArchitectureSpace(teacher, images)
    traced = space._traced
    lives = averaged(traced)
    left = [1.0] * len(space.layers)
    for g, units in enumerate(traced.units):
        spare = len(units) // 3
        if traced.pinned[g] or lives[g] or not traced.writers[g] or spare == 0:
            continue
        left[traced.writers[g][0]] = 1 - spare / len(units)
        dead = rng.choice(units, spare, replace=False)
        for slot in slots_of(traced):
            if slot.is_parameter:
                slot.tensor[torch.from_numpy(np.isin(traced.axes[slot.rows], dead))] = 0
    space = ArchitectureSpace(teacher, images)
    with torch.no_grad():
        wanted, got = teacher(images), space.build(space.shrink(space.teacher, left))(images)
    return float((got - wanted).norm() / wanted.norm())


def images_for(name):
    size = SIZES.get(name, 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def times(name):
    """Medians: tracing, s; a student of half the widths, ms."""
    teacher, images = network(name), images_for(name)
    space, tracing = timed(lambda: ArchitectureSpace(teacher, images), 3)
    half = space.shrink(space.teacher, [0.5] * len(space.layers))
    return {"trace_s": tracing, "student_ms": 1e3 * timed(lambda: space.build(half), 9)[1]}


def row(name):
    images, rng = images_for(name), np.random.default_rng(0)
    teacher = network(name)
    space = ArchitectureSpace(teacher, images)
    smallest = space.shrink(space.teacher, [0.1] * len(space.layers))
    with torch.no_grad():
        assert torch.equal(space.build(space.teacher)(images), teacher(images))
    return {
        "layers": len(space.layers),
        "removable": sum(layer.removable for layer in space.layers),
        "shrinkable": sum(space.choices(space.teacher)[0]),
        "groups": len(space.teacher.widths),
        "compression": space.teacher.params / smallest.params,
        **times(name),
        "degenerate": draws(space, images, rng),
        "dead_channels_error": None if name.startswith(TRANSFORMERS) else dead_channels(name, images, rng),
        "warnings": space.warnings,
    }


COLUMNS = ("layers", "removable", "shrinkable", "groups", "compression", "trace_s", "student_ms", "degenerate")


def markdown(table):
    """The table as bench/README.md links to it."""
    lines = [f"| model | {' | '.join(COLUMNS)} | error of (d) |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, values in table.items():
        if "failed" in values:
            lines.append(f"| {name} | failed: {values['failed']} |")
            continue
        cells = [f"{values[c]:.{2 if c == 'trace_s' else 1}f}" if c in COLUMNS[4:7] else values[c] for c in COLUMNS]
        error = values["dead_channels_error"]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {'' if error is None else f'{error:.1g}'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    every = sorted(torchvision.models.list_models(module=torchvision.models), key=lambda n: n.startswith(TRANSFORMERS))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=every)
    parser.add_argument("--times", action="store_true")
    asked = parser.parse_args()
    table = json.loads(OUT.read_text()) if OUT.exists() else {}
    for chosen in asked.names:
        try:
            table[chosen] = {**table[chosen], **times(chosen)} if asked.times else row(chosen)
        except Exception as error:  # noqa: BLE001 - a net that fails is a line of the table
            table[chosen] = {"failed": f"{type(error).__name__}: {error}"[:200]}
        print(chosen, table[chosen], flush=True)
        table = {name: table[name] for name in every if name in table}
        OUT.write_text(json.dumps(table, indent=1) + "\n")
        OUT.with_suffix(".md").write_text(markdown(table))
