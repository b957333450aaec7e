"""What widths in multiples of 8 cost and gain: python bench/rounding.py.

Latency of students, 16 images of 64 pixels, at ratios that leave odd widths, beside the same rounded to multiples of 4,
8 and 16; medians of runs that take turns. Writes bench/results/rounding.json.
"""

import json
import statistics
import time
from pathlib import Path

import torch
import torchvision

from n2n_fast import ArchitectureSpace

NETS = ("resnet18", "resnet50", "mobilenet_v2", "regnet_x_400mf")
RATIOS = (0.33, 0.47, 0.61, 0.77)
STEPS = (1, 4, 8, 16)
ROUNDS = 15
OUT = Path(__file__).parent / "results" / "rounding.json"


def seconds(model, images):
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


@torch.no_grad()
def rows(name):
    teacher = torchvision.models.get_model(name, num_classes=10).eval()
    images = torch.randn(16, 3, 64, 64)
    spaces = {step: ArchitectureSpace(teacher, images, round_to=step) for step in STEPS}
    for ratio in RATIOS:
        archs = {step: s.shrink(s.teacher, [ratio] * len(s.layers)) for step, s in spaces.items()}
        students = {step: spaces[step].build(arch) for step, arch in archs.items()}
        times = {step: [] for step in STEPS}
        for n in range(ROUNDS + 2):
            for step, student in students.items():
                took = seconds(student, images)
                if n >= 2:
                    times[step].append(took)
        for step, arch in archs.items():
            yield {
                "net": name,
                "ratio": ratio,
                "round_to": step,
                "params": arch.params / archs[1].params - 1,
                "macs": arch.macs / archs[1].macs - 1,
                "ms": 1e3 * statistics.median(times[step]),
            }


if __name__ == "__main__":
    table = []
    for net in NETS:
        for row in rows(net):
            table.append(row)
            print(*(f"{v:+.1%}" if k in ("params", "macs") else f"{v:.4g}" if k == "ms" else v for k, v in row.items()))
    OUT.write_text(json.dumps(table, indent=1) + "\n")
