"""All that a GPU has to show of the package, in one call (gpu.md): python bench/gpu.py --device cuda --out DIR.

Stages run one after another, each in a process of its own with a limit of its own; one that fails or runs out of time
is noted as such, and the next begins. What a stage finds is in DIR/gpu.json as soon as it is found. `--device cpu` runs
the same stages on less, so that they are known to work where there is no GPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from gpu_times import both_us, device_ms, finished_ms

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("n2n_fast", "csrc", "CMakeLists.txt", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
COMMAND = (sys.executable, "-c", "from n2n_fast.cli.main import main; main()")  # n2n-fast of the build
SANITIZERS = ("memcheck", "racecheck", "synccheck")
DRIVER = ("bench/gpu_driver.cu", *(f"csrc/{name}" for name in ("kd_loss.cu", "materialize.cu", "materialize.cpp")))
STAGES = {}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything."""

    copied: int  # bytes
    product: int  # rows and columns of the matrices multiplied
    logits: tuple  # sizes of the loss
    cuts: tuple  # networks to cut students out of, and how many times smaller
    images: int  # of the patterns that stand in for Fashion-MNIST
    teacher_steps: int
    search: dict  # settings of rollouts and searches
    run: dict  # further ones of the whole search
    steps: dict  # of its trainings, which are told in epochs
    rollouts: int
    measured: int  # rollouts of a variant
    processes: tuple  # that share the device, one after another

    @property
    def batch_size(self):
        return self.search["batch_size"]


SIZES = {
    "cuda": Size(
        copied=2**30,
        product=8192,
        logits=((128, 10), (512, 100), (512, 1000), (256, 21000)),
        cuts=(("resnet34", None), ("resnet18", 50)),
        images=60_000,
        teacher_steps=1200,
        search={"batch_size": 128, "rollout_steps": 20},  # by default there are none
        run={"updates": 5, "anchors": 3, "keep_top": 1, "epoch_steps": 0},
        steps={"anchor_epochs": 200, "stage_epochs": 200, "final_epochs": 1000},
        rollouts=30,
        measured=12,
        processes=(1, 4, 8, 16),
    ),
    "cpu": Size(
        copied=2**26,
        product=512,
        logits=((128, 10), (512, 100)),
        cuts=(("resnet18", None), ("resnet18", 50)),
        images=1_500,
        teacher_steps=40,
        search={"batch_size": 32, "rollout_steps": 4, "validation_images": 100},
        run={"updates": 1, "rollouts": 2, "anchors": 1, "keep_top": 1, "epoch_steps": 0},
        steps={"anchor_epochs": 5, "stage_epochs": 5, "final_epochs": 10},
        rollouts=4,
        measured=2,
        processes=(1, 2),
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a stage is told. work: for files that the stages after it need; site: where the build is."""

    stage: str
    device: str
    out: Path
    work: Path
    fashion_mnist: Path | None

    @property
    def size(self):
        return SIZES[self.device]

    @property
    def site(self):
        return self.work / "site"

    def note(self, **figures):
        """Keep figures under the stage's name; `says` is what the table shows."""
        print(json.dumps(figures, indent=1), flush=True)
        record(self.out, self.stage, **figures)


def record(out, stage, **figures):
    """Write figures into gpu.json, which is whole at every moment."""
    path, aside = out / "gpu.json", out / "gpu.json.new"
    found = json.loads(path.read_text()) if path.exists() else {}
    found.setdefault(stage, {}).update(figures)
    aside.write_text(json.dumps(found, indent=1) + "\n")
    aside.replace(path)


def stage(limit):
    """Register a stage of at most `limit` seconds."""

    def register(function):
        STAGES[function.__name__] = (function, limit)
        return function

    return register


def sh(*command, **environment):
    """Run a command away from the checkout, whose package has no native module; its output, or RuntimeError."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=Path(__file__).parent, env=os.environ | environment, text=True,
                          capture_output=True, check=False)  # fmt: skip
    if done.returncode:
        told = (done.stdout + done.stderr)[-2000:]
        raise RuntimeError(f"{' '.join(words)[:200]}: exit code {done.returncode}\n{told}")
    return done.stdout


def words(settings):
    """Settings as options of the command line."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]


# ---------------------------------------------------------------------------------------------------------------------
# The stages


@stage(limit=60)
def ceilings(run):
    """Versions; the device's copy bandwidth and bfloat16 product, which bound all else."""
    on_gpu = run.device == "cuda"
    properties = torch.cuda.get_device_properties(0) if on_gpu else None
    run.note(
        python=platform.python_version(),
        torch=torch.__version__,
        device=properties.name if on_gpu else platform.processor() or platform.machine(),
        multiprocessors=properties.multi_processor_count if on_gpu else None,
        cache_bytes=properties.L2_cache_size if on_gpu else None,
        cores=os.cpu_count(),
        driver=sh("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip() if on_gpu else None,
        compiler=sh("nvcc", "--version").strip().splitlines()[-1] if on_gpu else None,
    )
    source = torch.randn(run.size.copied // 4, device=run.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(2 * [run.size.product], device=run.device).bfloat16() for _ in range(2))
    copy = 2 * run.size.copied / device_ms(lambda: target.copy_(source), run.device) / 1e6
    product = 2 * run.size.product**3 / device_ms(lambda: a @ b, run.device) / 1e9
    says = f"copy {copy:.0f} GB/s, bfloat16 product {product:.3g} TFLOP/s"
    run.note(copy_gb_per_s=copy, product_tflops=product, says=says)


@stage(limit=150)
def build(run):
    """The package from source, for this device alone; the stages after this one import what it makes."""
    source = run.work / "source"
    for old in (source, run.site):
        shutil.rmtree(old, ignore_errors=True)
    source.mkdir()
    for name in PACKAGE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    choice = {"N2N_FAST_CUDA": "OFF"}
    if run.device == "cuda":
        arch = "".join(map(str, torch.cuda.get_device_capability()))
        choice = {"N2N_FAST_CUDA": "ON", "CMAKE_ARGS": f"-DCMAKE_CUDA_ARCHITECTURES={arch}"}
    alone = ["--no-build-isolation"] if importlib.util.find_spec("pybind11") else []  # where nothing can be fetched
    start = time.perf_counter()
    sh(sys.executable, "-m", "pip", "install", *alone, "--no-deps", "--target", run.site, source, **choice)
    seconds = time.perf_counter() - start
    script = "import json, n2n_fast; print(json.dumps([n2n_fast.__file__, n2n_fast.build_info()]))"
    path, info = json.loads(sh(sys.executable, "-c", script, PYTHONPATH=str(run.site)))
    assert Path(path).is_relative_to(run.site), path
    assert info["cuda"] == (run.device == "cuda"), info
    run.note(seconds_of_pip=seconds, build_info=info, says=f"{seconds:.0f} s; CUDA {info['cuda_archs'] or 'left out'}")


@stage(limit=90)
def sanitize(run):
    """The kernels, driven without torch, under compute-sanitizer; on a CPU under the compiler's own sanitizers."""
    driver, sources = run.work / "driver", [ROOT / name for name in (*DRIVER, "csrc/thread_pool.cpp")]
    include = f"-I{ROOT / 'csrc'}"
    if run.device == "cpu":
        flags = ["-std=c++17", "-O1", "-g", "-pthread", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
        shim = f"-I{ROOT / 'tests' / 'cuda_on_cpu'}"
        sh(os.environ.get("CXX", "c++"), *flags, shim, include, "-x", "c++", *sources, "-o", driver)
        sh(driver, ASAN_OPTIONS="detect_leaks=0")
        run.note(passed=["address", "undefined"], says="clean under address, undefined")
        return
    sh("nvcc", "-std=c++17", "-O3", "-arch=native", "-lineinfo", include, *sources, "-o", driver)
    sh(driver)
    for number, tool in enumerate(SANITIZERS, 1):
        sh("compute-sanitizer", "--tool", tool, "--error-exitcode", 9, driver)
        run.note(passed=SANITIZERS[:number], says=f"clean under {', '.join(SANITIZERS[:number])}")


@stage(limit=120)
def tests(run):
    """`pytest -m gpu` of the checkout, upon the build; on a CPU they are collected and skipped."""
    report = run.work / "tests.xml"
    failed = None
    try:
        sh(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={report}",
           ROOT / "tests")  # fmt: skip
    except RuntimeError as error:
        failed = error
    if failed and not report.exists():
        raise failed
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors")}
    run.note(**counts, says=", ".join(f"{count} {name}" for name, count in counts.items()))
    if failed:
        raise failed
    assert counts["tests"] > (counts["skipped"] if run.device == "cuda" else 0), counts


@stage(limit=110)
def kernels(run):
    """The kernels against float64; then their time on the device and of the call, beside other ways to do the same."""
    import test_kd_loss
    import test_materialize

    import n2n_fast

    times, device = {}, run.device
    assert device == "cpu" or n2n_fast.build_info()["cuda"], n2n_fast.__file__
    errors = test_kd_loss.relative_errors(run.size.logits, device)
    run.note(package=n2n_fast.__file__, relative_errors=errors, empty_us=1e3 * device_ms(lambda: None, device))
    for network, smaller in run.size.cuts:
        cut = test_materialize.Cut(network, device, smaller)
        for way in test_materialize.WAYS:
            cut.check(way)
            name = f"materialize {network} {'half' if smaller is None else f'/{smaller}'}, {way}"
            times[name] = {**both_us(lambda cut=cut, way=way: cut.call(way), device), "bytes": 4 * len(cut.out)}
    run.note(times=times)
    for size in run.size.logits:
        torch.compiler.reset()
        for way in test_kd_loss.WAYS:
            times[f"kd_loss {size}, {way}"] = both_us(test_kd_loss.checked(way, size, device), device)
        run.note(times=times)
    run.note(says=f"{len(errors)} gradients right beside float64; {len(times)} times")


@stage(limit=120)
def digits(run):
    """A search of the digits, interrupted and resumed; its student read again by a process that sees no GPU."""
    out, teacher = run.work / "digits", run.work / "digits.pt"
    shutil.rmtree(out, ignore_errors=True)
    teacher.unlink(missing_ok=True)
    sh(*COMMAND, "teach", "--data", "digits", "--arch", "digits_resnet", "--device", run.device, "--out", teacher)
    settings = {"updates": 3, "rollouts": 3, "anchors": 1, "anchor_epochs": 2, "stage_epochs": 2, "final_epochs": 10,
                "epoch_steps": 0}  # fmt: skip
    options = ("--teacher", teacher, "--device", run.device, "--out", out, "--keep-top", 1, *words(settings))
    process = subprocess.Popen([str(word) for word in (*COMMAND, "run", *options)], cwd=Path(__file__).parent)
    while rollouts_of(out) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, process.returncode
    kept = rollouts_of(out)
    sh(*COMMAND, "run", "--resume", out)
    assert rollouts_of(out) == 2 * 3 * 3 > kept, (kept, rollouts_of(out))
    there = json.loads((out / "result.json").read_text())["student"]["test_accuracy"]
    evaluate = (*COMMAND, "evaluate", out, "--device", "cpu", "--json")
    here = json.loads(sh(*evaluate, CUDA_VISIBLE_DEVICES=""))["accuracy"]
    assert abs(here - there) < 0.01, (here, there)  # TF32 may turn an image or two of 360
    says = f"interrupted after {kept} rollouts, resumed; {here:.2%} on the CPU, {there:.2%} on {run.device}"
    run.note(rollouts_before=kept, accuracy=there, accuracy_on_cpu=here, says=says)


def rollouts_of(directory):
    """Rollouts in a run's journal, as far as it is written."""
    path = directory / "history.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(line.startswith("{") and '"kind": "rollout"' in line for line in lines)


@stage(limit=120)
def rollouts(run):
    """A teacher is taught; rollouts of students 50 times smaller, their parts timed, and one profiled."""
    import gpu_students as students

    start = time.perf_counter()
    evaluator = students.evaluator_of(run)
    run.note(fashion_mnist=run.fashion_mnist is not None, teacher_accuracy=students.teacher_accuracy(evaluator),
             seconds_to_begin=time.perf_counter() - start)  # fmt: skip
    students.evaluated(evaluator, -1)  # the batches are made with the first
    found = [students.evaluated(evaluator, seed) for seed in range(run.size.rollouts)]
    again = [students.evaluated(evaluator, seed) for seed in range(4)]
    parts = students.medians(found)
    run.note(rollouts=[dataclasses.asdict(one) for one in found], median_seconds=parts,
             first_time=students.medians(found[:4]), again=students.medians(again))  # fmt: skip
    profile = students.profiled(lambda: students.evaluated(evaluator, 0), run.work / "trace.json")
    text = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in parts.items())
    busy = f"; {profile['launches']} launches, busy {profile['busy_share']:.0%}" * (run.device == "cuda")
    run.note(profile=profile, says=text + busy)


@stage(limit=200)
def variants(run):
    """One design for many small students on a device: rollouts a second of each variant, and what accuracy it gives."""
    import gpu_students as students

    run.note(full_width_seconds=students.full_width_seconds(students.evaluator_of(run)))
    workers = students.Workers(functools.partial(students.evaluator_of, run))
    seeds, table, accuracies = itertools.count(), {}, {}
    for name, how in students.VARIANTS.items():
        for processes in run.size.processes if name in students.SHARED else (1,):
            workers.grow(processes)
            jobs = list(itertools.islice(seeds, max(run.size.measured, 2 * processes)))  # widths never seen before
            found, seconds = workers.rollouts(jobs, processes, how)
            table[f"{name}, {processes}"] = found if isinstance(found, str) else round(len(jobs) / seconds, 3)
            run.note(rollouts_per_second=table)
        accuracies[name] = workers.rollouts([-2, -3, -4], 1, how)[0]
    workers.close()
    speeds = {name: speed for name, speed in table.items() if not isinstance(speed, str)}
    fastest = max((name for name in speeds if not name.startswith("no steps")), key=speeds.get)
    says = f"{speeds[f'{students.PLAIN}, 1']:.2f} rollouts/s; {fastest}: {speeds[fastest]:.2f}"
    run.note(accuracies=accuracies, says=says)
    assert len(speeds) == len(table), "a variant failed"


@stage(limit=120)
def search(run):
    """A whole `n2n-fast run` for 50 times fewer params."""
    import gpu_students as students

    teacher, out = students.teacher_file(run), run.work / "search"
    shutil.rmtree(out, ignore_errors=True)
    limit = students.params_of(teacher) // students.SMALLER
    data = ("--data", students.spec_of(run), "--image-size", students.PIXELS, "--device", run.device, "--out", out)
    settings = words(run.size.search | run.size.run | students.in_epochs(run, run.size.steps))
    start = time.perf_counter()
    sh(*COMMAND, "run", "--teacher", teacher, *data, "--max-params", limit, *settings)
    seconds = time.perf_counter() - start
    result = json.loads((out / "result.json").read_text())
    student, count = result["student"], rollouts_of(out)
    assert student["params"] <= limit, student
    says = f"{count} rollouts, {seconds:.0f} s; {student['params']:,} params, test {student['test_accuracy']:.2%}"
    run.note(seconds_of_run=seconds, rollouts=count, result=result, says=says)


@stage(limit=60)
def overhead(run):
    """From sampled actions to a student, beside Torch-Pruning where it is installed."""
    from test_rollout_overhead import ROLLOUTS, Setting

    setting = Setting("resnet18", run.device)
    calls = {"n2n_fast": setting.ours("sliced"), "n2n_fast, fitted": setting.ours("fitted"),
             "constructed anew": setting.anew}  # fmt: skip
    if importlib.util.find_spec("torch_pruning"):
        calls["Torch-Pruning"] = setting.torch_pruning
    times = {}
    for name, call in calls.items():
        params = sum(p.numel() for p in call().parameters())
        assert abs(params / setting.arch.params - 1) < 0.05, (name, params)  # Torch-Pruning rounds in its own way
        times[name] = finished_ms(call, run.device, calls=8) / (ROLLOUTS if name.startswith("n2n_fast") else 1)
    missing = "" if "Torch-Pruning" in times else "; Torch-Pruning is not installed"
    says = ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items()) + missing
    run.note(milliseconds=times, torch_pruning="Torch-Pruning" in times, says=says)


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def perform(run):
    """Run one stage in this process; its exit code."""
    try:
        STAGES[run.stage][0](run)
    except Exception as error:  # noqa: BLE001 - whatever a stage fails with is what it found
        traceback.print_exc()
        run.note(error=f"{type(error).__name__}: {error}"[:2000], says=(str(error).splitlines() or [""])[0][:100])
        return 1
    return 0


def supervised(name, seconds, site):
    """How a stage in a process of its own ended, which is stopped after so many seconds with all that it started."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}  # spinning starves others where cores are shared
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", name]
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    try:
        return "failed" if process.wait(seconds) else "passed"
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(names, out, site, seconds):
    """Run the stages in at most so many seconds; whether all passed."""
    end = time.perf_counter() + seconds
    for name in names:
        print(f"\n--- {name}: {STAGES[name][0].__doc__}", flush=True)
        start = time.perf_counter()
        left = min(STAGES[name][1], end - start)
        outcome = supervised(name, left, site) if left > 0 else "left out"
        record(out, name, outcome=outcome, seconds=round(time.perf_counter() - start, 1))
    return show(names, json.loads((out / "gpu.json").read_text()))


def show(names, found):
    """Print the table; whether all stages passed."""
    print(f"\n{'stage':<10}{'outcome':<13}{'seconds':>7}  what it found")
    for name in names:
        of = found[name]
        print(f"{name:<10}{of['outcome']:<13}{of['seconds']:>7}  {of.get('says', '')}")
    print(f"{'all':<23}{sum(found[name]['seconds'] for name in names):>7.1f}")
    return all(found[name]["outcome"] == "passed" for name in names)


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory of gpu.json")
    parser.add_argument("--work", type=Path, help="directory of what stages leave to others; default: build/gpu/DEVICE")
    parser.add_argument("--fashion-mnist", type=Path, metavar="DIR", help="its four files; default: made-up patterns")
    parser.add_argument("--only", choices=STAGES, action="append", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=535.0, help="of all stages together, after which none goes on")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # in this process
    return parser.parse_args()


def main():
    given = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage is not left behind
    out, work = given.out.resolve(), (given.work or ROOT / "build" / "gpu" / given.device).resolve()
    fashion_mnist = given.fashion_mnist and given.fashion_mnist.resolve()
    if given.stage:
        return perform(Run(given.stage, given.device, out, work, fashion_mnist))
    for directory in (out, work):
        directory.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").unlink(missing_ok=True)
    return 0 if run_all(given.only or list(STAGES), out, work / "site", given.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
