"""Kills a small search 200 times and compares what each ends with: python bench/crash.py [KILLS] [SEED].

Half of the kills come at random moments, half in the midst of the run directory's own writes (tests/crash.py). Writes
bench/results/crash.json.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE / "results" / "crash.json"

if __name__ == "__main__":
    asked = sys.argv[1:] or ["200"]
    start = time.perf_counter()
    script = str(HERE.parent / "tests" / "crash.py")
    done = subprocess.run([sys.executable, script, *asked], check=True, stdout=subprocess.PIPE, text=True)
    found = {**json.loads(done.stdout.splitlines()[-1]), "seconds": round(time.perf_counter() - start)}
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(found)
