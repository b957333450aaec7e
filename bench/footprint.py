"""What the package costs to have: python bench/footprint.py. Writes bench/results/footprint.json.

Seconds of `pip install .` into an environment that has torch, MB of the wheel without CUDA, and the milliseconds that
importing n2n_fast takes once torch is imported, a median of RUNS processes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "bench" / "results" / "footprint.json"
RUNS = 15
IMPORT = "import time, torch; start = time.perf_counter(); import n2n_fast; print(time.perf_counter() - start)"


def pip(*arguments):
    without = {**os.environ, "N2N_FAST_CUDA": "OFF"}
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True, env=without)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        start = time.perf_counter()
        pip("install", "--no-deps", "--target", str(place / "installed"), str(ROOT))
        seconds = time.perf_counter() - start
        pip("wheel", "--no-deps", "--wheel-dir", str(place), str(ROOT))
        (wheel,) = place.glob("*.whl")
        path = {**os.environ, "PYTHONPATH": str(place / "installed")}
        command = [sys.executable, "-c", IMPORT]
        times = [float(subprocess.check_output(command, env=path, cwd=place)) for _ in range(RUNS)]
        found = {
            "install_s": round(seconds, 1),
            "wheel_mb": round(wheel.stat().st_size / 1e6, 3),
            "import_ms": round(1e3 * statistics.median(times[1:])),
        }
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(found)
