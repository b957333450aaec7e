"""How many times faster the native core is than its rivals, from medians of one run.

python bench/ratios.py [RESULTS.json]   a table of all suites; without a file, runs them first (a few minutes, alone on
                                        the machine) and keeps their results in bench/results/native.json
python bench/ratios.py --reference      writes bench/results/ratios.json from the quick suites
python bench/ratios.py --check          runs these again; exit code 1 where a ratio fell by more than 30 %

Ratios, not times, are compared, so that another machine may check what this one measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BENCH = Path(__file__).parent
SUITES = ("test_materialize.py", "test_kd_loss.py", "test_rollout_overhead.py")
QUICK = ("test_materialize.py", "test_kd_loss.py", "-k", "not compile and not memcpy and not cuda")
REFERENCE = BENCH / "results" / "ratios.json"
LEAST = 0.7  # of a reference ratio
TRIES = 3  # a machine that does something else may spoil one


def run(path, what):
    """Run suites; path: of the file for their results, which are returned."""
    suites = [str(BENCH / part) if part.endswith(".py") else part for part in what]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *suites, f"--benchmark-json={path}"], check=True, cwd=BENCH)
    results = json.loads(path.read_text())
    for benchmark in results["benchmarks"]:
        benchmark["stats"].pop("data", None)
    return results


def medians(results):
    """Seconds of every way, by group."""
    groups = {}
    for benchmark in results["benchmarks"]:
        median = benchmark["stats"]["median"] / benchmark["extra_info"].get("rollouts", 1)
        groups.setdefault(benchmark["group"], {})[benchmark["params"]["way"]] = median
    return groups


def table(results):
    """Markdown, a line for each benchmark: its median, and how many times that of the group's first row that is."""
    lines = ["| group | | median | of the first |", "|---|---|---|---|"]
    for group, ways in medians(results).items():
        first = next(iter(ways.values()))
        lines += [f"| {group} | {way} | {1e3 * median:.3f} ms | {median / first:.2f} |" for way, median in ways.items()]
    return "\n".join(lines)


def ratios():
    """By group and pair of ways, how many times longer a rival takes than we do, in the quick suites."""
    with tempfile.TemporaryDirectory() as place:
        groups = medians(run(Path(place) / "quick.json", QUICK))
    found = {}
    for group, ways in groups.items():
        ours = [way for way in ways if way.startswith("n2n_fast")]
        rivals = [way for way in ways if way not in ours]
        for us, rival in ((us, rival) for us in ours for rival in rivals):
            found[f"{group}: {us} / {rival}"] = round(ways[rival] / ways[us], 2)
    return found


def check():
    """Compare with the reference; the pairs that fell, in every try, below what is allowed."""
    fallen = json.loads(REFERENCE.read_text())
    for _ in range(TRIES):
        found = ratios()
        for pair, reference in list(fallen.items()):
            held = found[pair] >= LEAST * reference
            print(f"{pair}: {found[pair]:.2f} times faster, reference {reference:.2f}{'' if held else ', too slow'}")
            if held:
                del fallen[pair]
        if not fallen:
            break
    return fallen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    if asked.check:
        sys.exit(1 if check() else 0)
    elif asked.reference:
        REFERENCE.write_text(json.dumps(ratios(), indent=1) + "\n")
    elif asked.results:
        print(table(json.loads(asked.results.read_text())))
    else:
        path = BENCH / "results" / "native.json"
        found = run(path, SUITES)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(table(found))
