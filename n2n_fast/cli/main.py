"""The commands; the work is done elsewhere."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from n2n_fast.cli import report, tables
from n2n_fast.cli.data import DIGITS, data_option, image_options, other_pixels, read_data, tell_data, whole_spec
from n2n_fast.cli.evaluate import student_accuracy
from n2n_fast.cli.export import SUFFIXES, export
from n2n_fast.cli.options import (
    OF_ONE_CALL,
    FilePath,
    Group,
    Number,
    assignments,
    device,
    given_settings,
    option,
    options,
    positive,
    setting_options,
    take_run,
    unknown_variables,
    version,
)
from n2n_fast.cli.progress import TENSORBOARD, Bar, Curves
from n2n_fast.cli.streams import lasting_streams
from n2n_fast.cli.teach import resuming_command, train_to_file, trained
from n2n_fast.files.errors import BadInput, DeviceFault, telling_device_faults
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.checkpoint import Interrupted, claimed, reserved
from n2n_fast.search.config import MOST, PROTOCOLS, SETTINGS, SearchConfig
from n2n_fast.search.plan import plan
from n2n_fast.search.reinforce import compress, prepared, read_policies
from n2n_fast.search.result import Result
from n2n_fast.search.workers import MOST as MOST_WORKERS
from n2n_fast.search.workers import Workers, ray_module
from n2n_fast.training import teacher_files, teachers
from n2n_fast.training.data import ImageData

INFEASIBLE = 3
INTERRUPTED = 130
DIGITS_TEACHER_EPOCHS = 30.0

FILE = FilePath()
COUNT = click.IntRange(1, MOST)
SEED = click.IntRange(-(2**63), 2**64 - 1)  # of torch
SHOWN = ("objective", "max_params", "max_macs", "max_latency", "min_accuracy", "max_drop", "seed")


def main() -> None:
    """Run the command line; every foreseen failure is one line on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing half made stays
    with lasting_streams():
        _run_and_exit()


def _run_and_exit() -> None:
    try:
        with telling_device_faults():
            sys.exit(cli(standalone_mode=False) or 0)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        _fail(error.format_message())
    except BadInput as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)


def _fail(message: str) -> None:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))  # names in files can be anything
    click.echo(f"n2n-fast: {line}", err=True)
    sys.exit(2)


# Options that several commands share

teacher_options = options(
    option("--teacher FILE", "The teacher's state dict.", type=FILE),
    option("--arch NAME", "torchvision name or package.module:factory; default: inferred."),
)
pickle_option = option("--allow-pickle", "Read a pickled module; runs code from the file.", shown=False)
device_option = option("--device NAME", "cpu, cuda, ...; default: cuda if there is one.", callback=device)
json_option = option("--json", "Print JSON on stdout, for programs.")
quiet_option = option("--quiet", "Show no progress, only warnings and the result.")
run_argument = click.argument("directory", metavar="RUN", type=FILE)


@click.group(
    cls=Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(message=version(), help="Show the version, and what was built.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compress a trained CNN into a much smaller one by N2N learning.

    Any option can also be given by an environment variable, N2N_FAST_<OPTION>, or in a file, --config FILE. The command
    line comes first, then the environment, then the file.
    """
    for warning in unknown_variables(cli):
        click.echo(warning, err=True)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# run


PROTOCOL = "fast, or paper: random weights, five epochs for each student, nothing corrected; the control."
GPUS = "GPUs of a worker, may be a fraction; default: on a GPU an even share of all, else none."


@cli.command(example="n2n-fast run --teacher resnet18.pt --data cifar10:data")
@teacher_options
@data_option
@setting_options(*SHOWN)
@device_option
@option("--workers N", "Evaluate students in N Ray workers (extra ray).", type=click.IntRange(1, MOST_WORKERS))
@option("--out DIR", "Run directory; default: runs/1, runs/2, ...", type=FILE)
@option("--resume DIR", "Go on with a run that was cut off.", type=FILE, is_eager=True, callback=take_run)
@option("--set NAME=VALUE", "Any other setting; repeatable.", multiple=True, callback=assignments)
@option("--dry-run", "Tell what would be searched and for how long; write nothing.")
@json_option
@quiet_option
@option("--protocol NAME", PROTOCOL, shown=False, type=click.Choice(list(PROTOCOLS)), default="fast")
@option("--policy FILE", "Start from another run's policies.pt.", shown=False, type=FILE)
@option("--tensorboard", "Write curves for TensorBoard while the search runs.", shown=False)
@option("--ray-address ADDRESS", "Address of a Ray cluster; default: start Ray on this machine.", shown=False)
@option("--gpus-per-worker G", GPUS, shown=False, type=Number(0, MOST))
@pickle_option
@image_options(shown=False)
@setting_options(*(name for name in SETTINGS if name not in SHOWN), shown=False)
@click.pass_context
def run(context: click.Context, /, **options: Any) -> int:
    """Search for the best student of a teacher, train it and write it to a run directory.

    Without --teacher a small ResNet is trained on the data first. --resume DIR needs no other options. n2n-fast run
    --help-all shows every option and setting.
    """
    config = SearchConfig(**{**PROTOCOLS[options["protocol"]], **given_settings(context)})
    named = options["resume"] or options["out"]
    with contextlib.nullcontext(named) if named else claimed(Path("runs")) as out:
        return _run(options, config, out)


def _run(options: dict[str, Any], config: SearchConfig, out: Path) -> int:
    """Search, or in a dry run tell of it; the exit code."""
    start, workers = time.perf_counter(), _workers(options)
    curves = Curves(out, config.rollouts) if options["tensorboard"] else None
    how: dict[str, Any] = {"resume": options["resume"] is not None, "policies": options["policy"]}
    with reserved(out, how["resume"]):  # what is refused is so before a teacher is trained
        if options["policy"] is not None:
            read_policies(options["policy"])
    model, images, how["trained_on"] = _teacher_and_data(options, config.seed)
    if options["dry_run"]:
        with prepared(model, images, config, out, **how) as (_, teacher, _):
            found = plan(teacher, images, config)
        _tell(options["json"], found, tables.plan_table(found))
        return 0
    command = {name: _plain(name, value) for name, value in options.items() if name not in (*OF_ONE_CALL, *SETTINGS)}
    with Bar(options["quiet"], curves) as bar:
        try:
            with bar.stops_by_signals(), _telling_how_to_go_on(out):
                result = compress(model, images, config, out, bar, workers=workers, command=command, **how)
        except Interrupted as stopped:  # here, since click knows a KeyboardInterrupt alone
            click.echo(f"interrupted; go on with: n2n-fast run --resume {stopped}", err=True)
            return INTERRUPTED
        report.draw_if_possible(result.out, bar.message)
    return _conclude(result, options["json"], time.perf_counter() - start)


@contextlib.contextmanager
def _telling_how_to_go_on(out: Path) -> Iterator[None]:
    """Within it, a fault of the device names the run directory that was begun, if one was."""
    try:
        yield
    except DeviceFault as fault:
        if not (out / "config.json").is_file():
            raise
        raise DeviceFault(f"{fault}; what is done is kept, go on with: n2n-fast run --resume {out}") from None


def _conclude(result: Result, as_json: bool, seconds: float) -> int:
    """Print what a search gave; its exit code."""
    names = ("student.pt2", "student.pt", "result.json", "report.html", TENSORBOARD)
    written = ", ".join(n for n in names if (result.out / n).exists())
    text = f"\n{tables.result_table(result.table)}\n\n{result.out}: {written}; {seconds:.0f} s"
    _tell(as_json, {"out": str(result.out), **result.table}, text)
    if result.feasible:
        return 0
    gaps = {name.replace("accuracy", "validation accuracy"): gap for name, gap in result.table["gaps"].items()}
    missed = ", ".join(f"{name} by {gap:.1%}" for name, gap in gaps.items())
    click.echo(f"no student met the limits; the nearest was saved, it misses {missed}", err=True)
    return INFEASIBLE


def _workers(options: dict[str, Any]) -> Workers | None:
    if options["workers"] is None:
        if options["ray_address"] is not None:
            raise BadInput("--ray-address: give the number of workers too, --workers N")
        return None
    workers = Workers(options["workers"], options["ray_address"], options["gpus_per_worker"])
    ray_module()  # before a teacher is trained
    return workers


def _teacher_and_data(options: dict[str, Any], seed: int) -> tuple[nn.Module, ImageData, str | None]:
    """The teacher, trained first where there is no file of it, its data, and the digest of those it was trained on."""
    file, data = options["teacher"], options["data"]
    trained_on: str | None = None
    if file is None and data != DIGITS:
        raise BadInput(f"--data {data} needs a teacher trained on it: give --teacher FILE, made by n2n-fast teach")
    if file is None:
        images = _read(options, None)
        model = teachers.create("digits_resnet", images.classes, 1, seed=seed)
        with Bar(options["quiet"]) as bar:
            trained(model, images, bar, epochs=DIGITS_TEACHER_EPOCHS, seed=seed)
        trained_on = images.digest
    else:
        model = teacher_files.load_teacher(file, options["arch"], allow_pickle=options["allow_pickle"])
        made = teacher_files.made_from(file, model)
        seen = made["data"] if made else {}
        for name in ("image_size", "mean", "std"):  # as it was trained, if that is known
            options[name] = options[name] or seen.get(name)
        images = _read(options, teachers.input_channels(model))
        trained_on = seen.get("digest")
        if seen and (text := other_pixels(seen, images.described())):
            click.echo(f"warning: {text} as in the teacher's training", err=True)
    return model, images, trained_on


def _plain(name: str, value: Any) -> Any:
    """An option's value as JSON has it; files by their whole path, so that a run goes on from any directory."""
    if name == "data":
        return whole_spec(value)
    if name == "image_size" and value is not None:
        return "x".join(map(str, value))
    if isinstance(value, Path):
        return str(value.absolute())
    return str(value) if isinstance(value, torch.device) else value


# The other commands


@cli.command(example="n2n-fast teach --arch resnet18 --data cifar10:data --out resnet18.pt")
@option("--arch NAME", "torchvision name, resnet20/32/56 or digits_resnet.", default="resnet18", show_default=True)
@option("--cifar-stem", "3x3 first convolution without pooling, for torchvision's ResNets.")
@option("--channels N", "Input channels; default: 3 for torchvision, else the data's.", type=COUNT)
@option("--out FILE", "File to write.", default="teacher.pt", show_default=True, type=FILE)
@data_option
@image_options(shown=True)
@option("--epochs E", "Times through the data.", default=10.0, show_default=True, callback=positive)
@option("--batch-size N", "Images per training step.", default=128, show_default=True, type=click.IntRange(2, MOST))
@option("--learning-rate R", "Peak learning rate.", default=0.1, show_default=True, callback=positive)
@option("--seed N", "Seed of all that is drawn.", default=0, show_default=True, type=SEED)
@option("--resume", "Go on with a training that was cut off, by the same options.")
@device_option
@quiet_option
def teach(**options: Any) -> int:
    """Train a teacher on a data set and save its state dict, and beside it how it was made."""
    try:
        lines = train_to_file(options, lambda channels: _read(options, channels))
    except Interrupted:
        click.echo(f"interrupted; go on with: {resuming_command()}", err=True)
        return INTERRUPTED
    click.echo("\n".join(lines))
    return 0


@cli.command(example="n2n-fast inspect --arch resnet18 --image-size 32")
@teacher_options
@pickle_option
@setting_options("leaf", "round_to")
@option("--data SPEC", "Data set whose images the network takes; as of run.")
@image_options(shown=False)
@json_option
@click.pass_context
def inspect(context: click.Context, /, **options: Any) -> None:
    """Show a teacher's layers as the policies see them: what may be removed or shrunk, and why not.

    Takes a state dict by --teacher, or an architecture by --arch alone.
    """
    model, example = _inspected(options)
    space = ArchitectureSpace(model, example, **given_settings(context))
    if options["json"]:
        click.echo(json.dumps(tables.space_summary(space), indent=2))
        return
    warnings = (f"warning: {text}" for text in space.warnings)
    click.echo("\n".join([tables.layer_table(space), "", tables.reach(space), *warnings]))


def _inspected(options: dict[str, Any]) -> tuple[nn.Module, torch.Tensor]:
    """A network to look at, and an image (1, C, H, W) as it is to see."""
    file, arch, size = options["teacher"], options["arch"], options["image_size"] or (224, 224)

    def loaded(channels: int | None) -> ImageData | None:
        if options["data"] is None:
            return None
        images = _read(options, channels)
        return images

    if file is not None:
        model = teacher_files.load_teacher(file, arch, allow_pickle=options["allow_pickle"])
        images = loaded(teachers.input_channels(model))
    elif arch is not None:
        images = loaded(teachers.usual_channels(arch))
        classes, channels = (1000, 3) if images is None else (images.classes, images.train.channels)
        model = teachers.create(arch, classes, channels)
    else:
        raise BadInput("nothing to inspect: give --teacher FILE or --arch NAME")
    if images is None:
        return model, torch.zeros(1, teachers.input_channels(model) or 3, *size)
    teachers.check_teacher(model, images)
    return model, images.train.batch(torch.arange(1))[0]


@cli.command(example="n2n-fast evaluate runs/1")
@click.argument("student", metavar="RUN|FILE", type=FILE)
@option("--data SPEC", "Another data set than the run's own; for a FILE it is needed.")
@option("--download", "Fetch a missing data set.")
@device_option
@json_option
def evaluate(student: Path, data: str | None, download: bool, device: torch.device, **options: Any) -> None:
    """Measure the accuracy of a run's student on the test split of its data, preprocessed as in the run.

    FILE: a .pt2 or .onnx file of a student alone, which says itself what images it takes.
    """
    content = student_accuracy(student, data, download, device)
    name, uneven = content["data"]["name"], abs(content["accuracy"] - content["balanced_accuracy"]) > 0.01
    balanced = f", balanced {content['balanced_accuracy']:.2%}" if uneven else ""
    text = "{split} accuracy {accuracy:.2%} ± {standard_error:.2%}".format(**content)
    for warning in content["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    _tell(options["json"], content, f"{text}{balanced} on {content['images']} images of {name}")


@cli.command("report", example="n2n-fast report runs/1")
@run_argument
def report_command(directory: Path) -> None:
    """Draw a run, finished or not: report.png and report.html in its directory."""
    for path in report.write_report(directory):
        click.echo(path)


@cli.command("export", example="n2n-fast export runs/1 --to onnx --fold-bn")
@run_argument
@option("--to FORMAT", f"{', '.join(SUFFIXES)}.", type=click.Choice(list(SUFFIXES)), required=True)
@option("--out FILE", "File to write; default: export.pt2, .onnx or .pt in RUN.", type=FILE)
@option("--opset N", "ONNX opset; default: torch's.", type=COUNT)
@option("--static-batch N", "Take exactly N images at once; default: any number.", type=COUNT)
@option("--fold-bn", "Fold batch norms into the convolutions before them.")
def export_command(directory: Path, **options: Any) -> None:
    """Write a run's student for other programs, and compare the file with the student."""
    click.echo(tables.export_table(export(directory, **options)))


# What the commands are made of


def _read(options: dict[str, Any], channels: int | None) -> ImageData:
    """The data that the options name; says what they were taken to be, before anything is computed."""
    images = read_data(options, channels)
    if not options.get("quiet"):
        tell_data(images)
    return images


def _tell(as_json: bool, content: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(content, indent=2) if as_json else text)


if __name__ == "__main__":
    main()
