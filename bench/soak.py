"""Whether a long search grows: python bench/soak.py [ROLLOUTS].

Resident memory, open files and threads of this process after every 100 of 2,000 rollouts of tiny students of the
digits; none is reused, and widths keep changing. Writes bench/results/soak.json.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import n2n_fast
from n2n_fast import SearchConfig, SearchProgress
from n2n_fast.training import teachers

OUT = Path(__file__).parent / "results" / "soak.json"
EVERY = 100
WARM_UP = 200


def state():
    """Resident MB, open files, native threads of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
        "python_threads": threading.active_count(),
    }


class Watch(SearchProgress):
    def __init__(self, wanted):
        self.wanted, self.done, self.rows, self.start = wanted, 0, [], time.perf_counter()

    def rollout(self, rollout, best, compression):
        self.done += 1
        if self.done % EVERY == 0:
            self.rows.append({"rollouts": self.done, "seconds": time.perf_counter() - self.start, **state()})
            print(self.rows[-1], flush=True)

    def stopping(self):
        return self.done >= self.wanted


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    data = n2n_fast.load("digits", validation=0.2)
    model = teachers.create("digits_resnet", data.classes, 1, seed=0)
    teachers.train_teacher(model, data, epochs=10.0, seed=0)
    config = SearchConfig(
        stages="shrinkage", updates=wanted, rollout_steps=2, anchors=0, reuse=False, shrinkage_learning_rate=0.001,
        batch_size=64, calibration_images=128, validation_images=128,
    )  # fmt: skip
    watch = Watch(wanted)
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(n2n_fast.Interrupted):
        n2n_fast.compress(model, data, config, Path(place) / "run", watch)
    steady = [row["rss_mb"] for row in watch.rows if row["rollouts"] >= WARM_UP]
    middle = statistics.median(steady)
    growth = {
        "of_memory": steady[-1] / steady[0] - 1,
        "farthest_from_median": max(abs(mb / middle - 1) for mb in steady),
    }
    growth |= {f"of_{key}": watch.rows[-1][key] - watch.rows[1][key] for key in ("files", "threads")}
    OUT.write_text(json.dumps({"growth": growth, "rows": watch.rows}, indent=1) + "\n")
    print(growth)
