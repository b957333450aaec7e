"""Ratios of medians within each benchmark group, as a table: python bench/ratios.py [RESULTS.json].

Without a file, runs the suites of the native core first (a few minutes, alone on the machine) and keeps their results
in bench/results/native.json. The baseline of a group is the first of its rows.
"""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent
SUITES = ("test_materialize.py", "test_kd_loss.py", "test_rollout_overhead.py")


def measured():
    """Run the suites; returns the file of their results."""
    path = BENCH / "results" / "native.json"
    path.parent.mkdir(exist_ok=True)
    suites = [str(BENCH / suite) for suite in SUITES]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *suites, f"--benchmark-json={path}"], check=True)
    results = json.loads(path.read_text())
    for benchmark in results["benchmarks"]:
        benchmark["stats"].pop("data", None)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def table(results):
    """Markdown, a line for each benchmark: its median, and how many times the baseline's that is."""
    lines = ["| group | | median | of the first |", "|---|---|---|---|"]
    groups = {}
    for benchmark in results["benchmarks"]:
        median = benchmark["stats"]["median"] / benchmark["extra_info"].get("rollouts", 1)
        groups.setdefault(benchmark["group"], []).append((benchmark["params"]["way"], median))
    for group, rows in groups.items():
        for way, median in rows:
            lines.append(f"| {group} | {way} | {1e3 * median:.3f} ms | {median / rows[0][1]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else measured()
    print(table(json.loads(given.read_text())))
