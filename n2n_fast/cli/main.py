"""The command line: options, progress and tables; the work is done elsewhere."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from n2n_fast.cli import report
from n2n_fast.cli.export import SUFFIXES, export
from n2n_fast.cli.options import OF_ONE_CALL, Group, option, section, version
from n2n_fast.files.errors import BadInput, DeviceFault, first_line, raise_device_fault, telling_device_faults
from n2n_fast.files.safe_load import understood
from n2n_fast.networks.space import INITS, SALIENCIES, ArchitectureSpace
from n2n_fast.search.checkpoint import Interrupted, read_settings
from n2n_fast.search.config import PROTOCOLS, STAGES, SearchConfig
from n2n_fast.search.plan import plan
from n2n_fast.search.reinforce import Rollout, SearchProgress, compress, read_policies
from n2n_fast.search.result import load_student
from n2n_fast.search.reward import OBJECTIVES
from n2n_fast.search.workers import Workers
from n2n_fast.training import teachers
from n2n_fast.training.data import ImageData, accuracy
from n2n_fast.training.datasets import load

INFEASIBLE = 3
INTERRUPTED = 130
LINE_SECONDS = 20.0  # between lines of progress where there is no terminal
DIGITS = "digits"
# What suits 1,797 images of 8x8 pixels: an epoch is ten steps.
DIGITS_DEFAULTS = {
    "updates": 15,
    "anchor_epochs": 20.0,
    "stage_epochs": 20.0,
    "final_epochs": 60.0,
    "batch_size": 64,
    "learning_rate": 0.02,
}
DIGITS_VALIDATION = 0.2
DIGITS_TEACHER_EPOCHS = 30.0


def main() -> None:
    """Run the command line; every foreseen failure is one line on stderr."""
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


def _numbers(_: click.Context, option: click.Parameter, value: str | None) -> list[float] | None:
    """Comma-separated numbers, as --mean and --std take them."""
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number or a comma-separated list of them", param=option) from None


def _device(_: click.Context, option: click.Parameter, value: str | None) -> torch.device:
    try:
        device = torch.device(value or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{value!r} cannot be used ({first_line(error)})", param=option) from None
    return device


data_options = section(
    "Data",
    option("--data", default=DIGITS, show_default=True, metavar="SPEC",
           help="digits, cifar10:DIR, cifar100:DIR, svhn:DIR, fashion-mnist:DIR, imagefolder:DIR or npz:FILE."),
    option("--mean", callback=_numbers, metavar="M[,M,M]", help="Pixel mean, 0 to 1; default: the set's own."),
    option("--std", callback=_numbers, metavar="S[,S,S]", help="Pixel deviation; default: the set's own."),
    option("--image-size", type=click.IntRange(min=1), metavar="PX", help="Resize images to PX x PX."),
    option("--download", is_flag=True, help="Fetch a missing data set (cifar, svhn, fashion-mnist)."),
)  # fmt: skip
teacher_options = section(
    "Teacher",
    option("--teacher", "teacher_file", type=click.Path(path_type=Path), help="File with the state dict."),
    option("--arch", metavar="NAME", help="torchvision name or package.module:factory; default: inferred."),
    option("--allow-pickle", is_flag=True, help="Read a pickled module; runs code from the file."),
    option("--leaf", multiple=True, metavar="MODULE", help="Treat a submodule as one opaque layer; repeatable."),
    option("--round-to", type=click.IntRange(min=1), metavar="N", help="Shrink to multiples of N channels."),
)  # fmt: skip
seed_option = option(
    "--seed", default=0, show_default=True, type=int, help="Of all that is drawn; on a CPU it repeats a run."
)
device_option = option("--device", callback=_device, help="cpu, cuda, ...; default: cuda where there is one.")
json_option = option("--json", "as_json", is_flag=True, help="For programs: JSON on stdout.")
quiet_option = option("--quiet", is_flag=True, help="No progress; warnings and the result alone.")


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(version())
        context.exit()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
              help="Show the version, and what was built.")  # fmt: skip
def cli() -> None:
    """Compress a trained CNN into a much smaller one by N2N learning.

    Any option can be given by the environment too, N2N_FAST_<OPTION>, or in a file, --config FILE; the command line
    comes before the environment, and that before the file.
    """


@cli.command(example="n2n-fast run --teacher resnet18.pt --data cifar10:data")
@teacher_options
@data_options
@section(
    "Search",
    option("--stages", type=click.Choice(list(STAGES)), help="Remove layers, shrink them, or both."),
    option(
        "--protocol",
        type=click.Choice(list(PROTOCOLS)),
        default="fast",
        show_default=True,
        help="paper: random weights, five epochs for each student, nothing corrected; the control.",
    ),
    option("--updates", type=int, metavar="N", help="Policy updates in each stage."),
    option("--rollouts", type=int, metavar="N", help="Students evaluated for each update."),
    option("--rollout-steps", type=int, metavar="K", help="Training steps of each student; 0: none."),
    option("--epochs", type=float, metavar="E", help="Training of each student in epochs instead."),
    option("--validation-images", type=int, metavar="N", help="Images that each student is tried on."),
    option("--anchors", type=int, metavar="N", help="Students trained fully to correct accuracies; 0: none."),
    option("--anchor-every", type=int, metavar="N", help="Updates until another one is; 0: never."),
    option("--init", type=click.Choice(INITS), help="What students start from."),
    option("--saliency", type=click.Choice(SALIENCIES), help="Which channels students keep."),
    option("--policy", type=click.Path(path_type=Path), metavar="FILE", help="Start from another run's policies.pt."),
    seed_option,
)
@section(
    "Training",
    option("--anchor-epochs", type=float, metavar="E", help="Training of an anchor."),
    option("--stage-epochs", type=float, metavar="E", help="Training of stage 1's best student."),
    option("--final-epochs", type=float, metavar="E", help="Training of the last stage's best students."),
    option("--keep-top", type=int, metavar="M", help="How many of them are trained."),
    option("--batch-size", type=int, metavar="N", help="Images per training step."),
    option("--learning-rate", type=float, metavar="R", help="Peak learning rate of rollouts."),
    option("--final-learning-rate", type=float, metavar="R", help="Peak learning rate of the best students."),
    option("--kd-weight", type=float, metavar="λ", help="Weight of the distillation loss."),
    device_option,
)
@section(
    "Objective and limits",
    option("--objective", type=click.Choice(OBJECTIVES), help="What the compression in the reward counts."),
    option("--max-params", type=int, metavar="N", help="Students must have no more parameters."),
    option("--max-macs", type=int, metavar="N", help="Students must need no more MACs for an image."),
    option("--max-latency", type=float, metavar="MS", help="Students must take no longer on this device."),
    option("--latency-batch", type=int, metavar="N", help="Images of the latency."),
    option("--min-accuracy", type=float, metavar="A", help="Students must reach this validation accuracy, 0 to 1."),
    option("--max-drop", type=float, metavar="POINTS", help="They may lose no more of the teacher's accuracy."),
)
@section(
    "Workers",
    option("--workers", type=click.IntRange(min=1), metavar="N", help="Evaluate in N Ray workers (extra ray)."),
    option("--ray-address", metavar="ADDRESS", help="Of a Ray cluster; default: start Ray on this machine."),
    option(
        "--gpus-per-worker",
        type=click.FloatRange(min=0),
        metavar="G",
        help="May be a fraction; default: on a GPU an even share of all, else none.",
    ),
)
@section(
    "Run and output",
    option("--out", type=click.Path(path_type=Path), help="Run directory; default: runs/1, runs/2, ..."),
    option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with a run that was cut off."),
    option("--dry-run", is_flag=True, help="Tell what would be searched and for how long; write nothing."),
    option("--tensorboard", is_flag=True, help="Write the history for TensorBoard too, at the end."),
    json_option,
    quiet_option,
)
@click.pass_context
def run(context: click.Context, /, **options: Any) -> int:
    """Search for the best student of a teacher, train it and write it to a run directory.

    Without --teacher a small ResNet is trained on the data first. What --resume goes on with needs no other options.
    """
    if options["resume"] is not None:
        options = _as_before(context, options)
    if options["tensorboard"]:
        report.check_tensorboard()
    config = _config(options)
    if options["policy"] is not None:
        read_policies(options["policy"])  # before a teacher is trained, and in a dry run
    model, images = _teacher_and_data(options, config.seed)
    if options["dry_run"]:
        found = plan(model, images, config)
        _tell(options["as_json"], asdict(found), report.plan_table(found))
        return 0
    start, out = time.perf_counter(), options["resume"] or options["out"] or _free_directory()
    try:
        with _Bar(options["quiet"]) as bar, bar.stops_by_signals():
            result = compress(
                model,
                images,
                config,
                out,
                bar,
                resume=options["resume"] is not None,
                policies=options["policy"],
                workers=_workers(options),
                command={name: _plain(value) for name, value in options.items() if name not in OF_ONE_CALL},
            )
    except Interrupted as stopped:  # here, since click knows a KeyboardInterrupt alone
        click.echo(f"interrupted; go on with: n2n-fast run --resume {stopped}", err=True)
        return INTERRUPTED
    except DeviceFault as fault:
        if not (out / "config.json").is_file():
            raise
        raise DeviceFault(f"{fault}; what is done is kept, go on with: n2n-fast run --resume {out}") from None
    report.draw_if_possible(result.out, options["tensorboard"], bar.message)
    names = ("student.pt2", "student.pt", "result.json", "report.html", report.TENSORBOARD)
    written = ", ".join(n for n in names if (result.out / n).exists())
    seconds = time.perf_counter() - start
    text = f"\n{report.result_table(result.table)}\n\n{result.out}: {written}; {seconds:.0f} s"
    _tell(options["as_json"], {"out": str(result.out), **result.table}, text)
    if not result.feasible:
        missed = ", ".join(f"{name} by {gap:.1%}" for name, gap in result.table["gaps"].items())
        click.echo(f"no student met the limits; the nearest was saved, it misses {missed}", err=True)
        return INFEASIBLE
    return 0


def _workers(options: dict[str, Any]) -> Workers | None:
    if options["workers"] is None:
        if options["ray_address"] is not None:
            raise BadInput("--ray-address: give the number of workers too, --workers N")
        return None
    return Workers(options["workers"], options["ray_address"], options["gpus_per_worker"])


def _config(options: dict[str, Any]) -> SearchConfig:
    """The settings that the options ask for, over those that suit the protocol and the data."""
    defaults = {**PROTOCOLS[options["protocol"]], **(DIGITS_DEFAULTS if options["data"] == DIGITS else {})}
    given = {f.name: options[f.name] for f in fields(SearchConfig) if options.get(f.name) is not None}
    return SearchConfig(**{**defaults, **given})


def _teacher_and_data(options: dict[str, Any], seed: int) -> tuple[nn.Module, ImageData]:
    """The teacher, trained first where no file is given, and the data that it must fit."""
    file, data, device = options["teacher_file"], options["data"], options["device"]
    if file is None and data != DIGITS:
        raise BadInput(f"--data {data} needs a teacher trained on it: give --teacher FILE, made by n2n-fast teach")
    model = None
    if file is not None:
        model = teachers.load_teacher(file, options["arch"], allow_pickle=options["allow_pickle"])
    channels = None if model is None else teachers.input_channels(model)
    images = _load(data, options["mean"], options["std"], options["image_size"], options["download"], seed, device,
                   channels)  # fmt: skip
    if model is None:
        model = _teach(teachers.create("digits_resnet", images.classes, 1, seed=seed), images,
                       options["quiet"], epochs=DIGITS_TEACHER_EPOCHS, seed=seed)  # fmt: skip
    teachers.check_fits(model.to(device), images)
    return model, images


def _as_before(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that goes on: those of its own command, but for what is given anew."""
    held = read_settings(options["resume"]).get("command")
    if not isinstance(held, dict):
        raise BadInput(f"{options['resume']}: was not begun by n2n-fast run; go on from Python, compress(resume=True)")
    told = {name: value for name, value in held.items() if name in options and not _was_given(context, name)}
    if told.get("allow_pickle") or ":" in str(told.get("arch")):
        raise BadInput(
            f"{options['resume']}: was begun with --allow-pickle or --arch package.module:factory, which run code; "
            "give them again if you trust what they name"
        )
    for param in context.command.params:
        if param.name is not None and told.get(param.name) is not None:
            with understood(options["resume"] / "config.json"):
                told[param.name] = _retold(context, param, told[param.name])
    return {**options, **told}


def _retold(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """The value of an option that config.json notes, as the command line would give it; TypeError for any other."""
    kind = float if option.callback is _numbers else str if option.multiple else None
    if kind is not None:
        if not isinstance(value, list) or not all(isinstance(part, kind) for part in value):
            raise TypeError(f"{option.name}: {str(value)[:40]!r}")
        return tuple(value) if option.multiple else value
    if not isinstance(value, str if isinstance(option.type, click.Path) else str | int | float):
        raise TypeError(f"{option.name}: {str(value)[:40]!r}")
    cast = option.type_cast_value(context, value)
    return cast if option.callback is None else option.callback(context, option, cast)


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _plain(value: Any) -> Any:
    """An option's value as JSON has it; files by their whole path, so that a run goes on from any directory."""
    if isinstance(value, Path):
        return str(value.absolute())
    return str(value) if isinstance(value, torch.device) else value


@cli.command(example="n2n-fast teach --arch resnet18 --data cifar10:data --out resnet18.pt")
@section(
    "Teacher",
    option(
        "--arch",
        default="resnet18",
        show_default=True,
        metavar="NAME",
        help="torchvision name, resnet20/32/56 or digits_resnet.",
    ),
    option("--cifar-stem", is_flag=True, help="3x3 first convolution without pooling, for torchvision's ResNets."),
    option(
        "--channels",
        type=click.IntRange(min=1),
        metavar="N",
        help="Input channels; default: 3 for torchvision, else the data's.",
    ),
    option("--out", default="teacher.pt", show_default=True, type=click.Path(path_type=Path), help="File to write."),
)
@data_options
@section(
    "Training",
    option("--epochs", default=10.0, show_default=True, type=float, metavar="E", help="Times through the data."),
    option(
        "--batch-size",
        default=128,
        show_default=True,
        type=click.IntRange(min=1),
        metavar="N",
        help="Images per training step.",
    ),
    option("--learning-rate", default=0.1, show_default=True, type=float, metavar="R", help="Its peak."),
    seed_option,
    device_option,
)
@quiet_option
def teach(
    arch: str,
    cifar_stem: bool,
    channels: int | None,
    data: str,
    mean: list[float] | None,
    std: list[float] | None,
    image_size: int | None,
    download: bool,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    out: Path,
    quiet: bool,
) -> None:
    """Train a teacher on a data set and save its state dict."""
    if out.exists():
        raise BadInput(f"{out}: exists already; give another --out or remove it")
    if not out.parent.is_dir():
        raise BadInput(f"{out}: its directory does not exist; make it or give another --out")
    channels = channels or teachers.usual_channels(arch)
    images = _load(data, mean, std, image_size, download, seed, device, channels)
    model = teachers.create(arch, images.classes, images.train.channels, images.train.image_size[0], cifar_stem, seed)
    model = _teach(model, images, quiet, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, out)
    click.echo(f"{out}: validation accuracy {accuracy(model, images.validation):.2%}")
    if images.test is not None:
        click.echo(f"{out}: test accuracy {accuracy(model, images.test):.2%}")


@cli.command(example="n2n-fast inspect --arch resnet18 --image-size 32")
@teacher_options
@option("--data", metavar="SPEC", help="Whose images it is to see; as of run.")
@option("--image-size", type=click.IntRange(min=1), metavar="PX", help="Their size; default: the data's, or 224.")
@json_option
def inspect(
    teacher_file: Path | None,
    arch: str | None,
    allow_pickle: bool,
    leaf: tuple[str, ...],
    round_to: int | None,
    data: str | None,
    image_size: int | None,
    as_json: bool,
) -> None:
    """Show a teacher's layers as the policies see them: what may be removed or shrunk, and why not.

    Takes a state dict by --teacher, or an architecture by --arch alone.
    """
    model, example = _inspected(teacher_file, arch, allow_pickle, data, image_size)
    space = ArchitectureSpace(model, example, leaf=leaf, round_to=round_to or 1)
    if as_json:
        click.echo(json.dumps(report.space_summary(space), indent=2))
        return
    click.echo(report.layer_table(space))
    click.echo(f"\n{report.reach(space)}")
    for warning in space.warnings:
        click.echo(f"warning: {warning}")


def _inspected(
    file: Path | None, arch: str | None, allow_pickle: bool, data: str | None, image_size: int | None
) -> tuple[nn.Module, torch.Tensor]:
    """A network to look at, and an image (1, C, H, W) as it is to see."""

    def given(channels: int | None) -> ImageData | None:
        return None if data is None else load(data, image_size=image_size, channels=channels)

    if file is not None:
        model = teachers.load_teacher(file, arch, allow_pickle=allow_pickle)
        images = given(teachers.input_channels(model))
    elif arch is not None:
        images = given(teachers.usual_channels(arch))
        classes, channels = (1000, 3) if images is None else (images.classes, images.train.channels)
        model = teachers.create(arch, classes, channels)
    else:
        raise BadInput("nothing to inspect: give --teacher FILE or --arch NAME")
    if images is None:
        size = image_size or 224
        return model, torch.zeros(1, teachers.input_channels(model) or 3, size, size)
    teachers.check_fits(model, images)
    return model, images.train.batch(torch.arange(1))[0]


@cli.command(example="n2n-fast evaluate runs/1")
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@option("--data", metavar="SPEC", help="Another data set than the run's own.")
@option("--download", is_flag=True, help="Fetch a missing data set.")
@device_option
@json_option
def evaluate(directory: Path, data: str | None, download: bool, device: torch.device, as_json: bool) -> None:
    """Measure the accuracy of a run's student on the test split of its data, preprocessed as in the run."""
    student = load_student(directory).to(device)
    settings = _settings(directory)
    images = load(data or settings["name"], image_size=settings["image_size"], channels=settings["channels"],
                  mean=settings["mean"], std=settings["std"], download=download, device=device)  # fmt: skip
    split = images.validation if images.test is None else images.test
    name = "validation" if images.test is None else "test"
    found = _exported_accuracy(student, images, split)
    content = {"data": images.name, "split": name, "images": len(split), "accuracy": found}
    _tell(as_json, content, f"{name} accuracy {found:.2%} on {len(split)} images of {images.name}")


@cli.command("report", example="n2n-fast report runs/1")
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@option("--tensorboard", is_flag=True, help="Write the same scalars for TensorBoard too.")
def report_command(directory: Path, tensorboard: bool) -> None:
    """Draw a run, finished or not: report.png and report.html in its directory."""
    if tensorboard:
        report.check_tensorboard()
    for path in report.write_report(directory):
        click.echo(path)
    if tensorboard:
        click.echo(report.write_tensorboard(directory))


@cli.command("export", example="n2n-fast export runs/1 --to onnx --fold-bn")
@click.argument("directory", metavar="RUN", type=click.Path(path_type=Path))
@option("--to", type=click.Choice(list(SUFFIXES)), required=True, help="What others shall read.")
@option("--out", type=click.Path(path_type=Path), help="File; default: export.pt2, .onnx or .pt in RUN.")
@option("--opset", type=click.IntRange(min=1), metavar="N", help="Of ONNX; default: torch's.")
@option("--static-batch", type=click.IntRange(min=1), metavar="N", help="For N images at once; default: any.")
@option("--fold-bn", is_flag=True, help="Batch norms into the convolutions before them.")
def export_command(
    directory: Path, to: str, out: Path | None, opset: int | None, static_batch: int | None, fold_bn: bool
) -> None:
    """Write a run's student for others, and compare the file with the student."""
    click.echo(report.export_table(export(directory, to, out, opset, static_batch, fold_bn)))


# What the commands are made of


def _exported_accuracy(student: nn.Module, images: ImageData, split: Any) -> float:
    """Accuracy of an exported module, which has no modes to switch; BadInput where it does not take the images."""
    correct = 0
    for batch, labels in split.batches(512):
        logits = _logits(student, batch)
        if logits.shape[1] != images.classes:
            raise BadInput(f"the student tells {logits.shape[1]} classes apart, {images.name} has {images.classes}")
        correct += int((logits.argmax(1) == labels).sum())
    return correct / len(split)


@torch.no_grad()
def _logits(student: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    try:
        logits = student(batch)
    except Exception as error:  # noqa: BLE001 - a student from a file can be any program
        raise_device_fault(error)
        raise BadInput(f"the student does not take images of {tuple(batch.shape)} ({first_line(error)})") from None
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(batch):
        raise BadInput("the student gives no logits; give the run of another")
    return logits


def _settings(directory: Path) -> dict[str, Any]:
    """What a run's config.json says of its data."""
    try:
        settings = read_settings(directory)["data"]
        found = {key: settings[key] for key in ("name", "image_size", "channels", "mean", "std")}
        sizes, numbers = (found["image_size"], found["channels"]), (*found["mean"], *found["std"])
        if not isinstance(found["name"], str) or not all(type(size) is int for size in sizes):
            raise TypeError
        if not (found["mean"] and found["std"] and all(type(n) in (int, float) and abs(n) < 1e9 for n in numbers)):
            raise TypeError
    except (KeyError, TypeError):
        raise BadInput(f"{directory / 'config.json'}: not written by n2n-fast run") from None
    return found


def _load(
    spec: str,
    mean: list[float] | None,
    std: list[float] | None,
    image_size: int | None,
    download: bool,
    seed: int,
    device: torch.device,
    channels: int | None,
) -> ImageData:
    validation = DIGITS_VALIDATION if spec == DIGITS else None
    return load(spec, image_size=image_size, channels=channels, mean=mean, std=std, download=download, seed=seed,
                validation=validation, device=device)  # fmt: skip


def _teach(model: nn.Module, images: ImageData, quiet: bool, **options: Any) -> nn.Module:
    """Train a teacher under a progress bar."""
    start = time.perf_counter()
    with _Bar(quiet) as bar:
        model = teachers.train_teacher(model, images, progress=bar, **options)
        bar.message(f"teacher trained in {time.perf_counter() - start:.0f} s")
    return model


def _tell(as_json: bool, content: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(content, indent=2) if as_json else text)


def _free_directory() -> Path:
    return next(path for number in range(1, sys.maxsize) if not (path := Path("runs") / str(number)).exists())


class _Bar(SearchProgress):
    """Progress on stderr: a bar for each part of the work; now and then a line where that is no terminal."""

    def __init__(self, quiet: bool) -> None:
        """quiet: tell warnings alone."""
        self._quiet = quiet
        self._bar: Any = None
        self._name, self._length, self._done = "", 0, 0
        self._start = self._told = 0.0
        self._asked = False

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextlib.contextmanager
    def stops_by_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM ask for a stop; a second one stops at once."""

        def ask(number: int, _: Any) -> None:
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True
            click.echo("stopping as soon as the work at hand is kept; once more to leave at once", err=True)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stopping(self) -> bool:
        return self._asked

    def message(self, text: str) -> None:
        self._close()
        if not self._quiet or text.startswith("warning"):
            click.echo(text, err=True)

    def phase(self, name: str, length: int) -> None:
        self._close()
        self._name, self._length, self._done = name, length, 0
        self._start = self._told = time.perf_counter()
        if sys.stderr.isatty() and not self._quiet:
            self._bar = click.progressbar(
                length=length, label=f"{name:<30}", file=sys.stderr, item_show_func=lambda text: text, width=20
            )
            self._bar.__enter__()

    def rollout(self, rollout: Rollout, best: Rollout | None, compression: float | None) -> None:
        rate = 60 * (self._done + 1) / (time.perf_counter() - self._start)
        shown = "" if best is None or compression is None else f", best {best.reward:.3f} at {compression:.1f}x"
        self._advance(self._done + 1, f"reward {rollout.reward:.3f}{shown}, {rate:.1f} rollouts/min")

    def step(self, step: int, loss: float, accuracy: float) -> None:
        self._advance(step, f"loss {loss:.3f}, accuracy {accuracy:.1%}")

    def _advance(self, done: int, text: str) -> None:
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(done - self._done, text)
        elif not self._quiet and (now - self._told > LINE_SECONDS or done == self._length):
            left = (now - self._start) / done * (self._length - done)
            click.echo(f"{self._name}: {done}/{self._length}, {text}, {left:.0f} s left", err=True)
            self._told = now
        self._done = done

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


if __name__ == "__main__":
    main()
