"""Training a teacher into a file: what is done is kept beside it, and the file is whole or not there."""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from n2n_fast.cli.progress import Bar
from n2n_fast.files.errors import BadInput, DeviceFault, telling_device_faults
from n2n_fast.files.safe_load import understood
from n2n_fast.files.whole import check_room, try_writing, write_json, write_tensors
from n2n_fast.search.checkpoint import TrainingCheckpointer, check_same, locked, read_state, writing
from n2n_fast.training import teachers
from n2n_fast.training.architectures import OnMeta
from n2n_fast.training.data import ImageData, accuracy
from n2n_fast.training.distill import Checkpointer, Diverged
from n2n_fast.training.teacher_files import MADE_BY, companion, read_companion

OF_TRAINING = ("epochs", "batch_size", "learning_rate", "seed")


def train_to_file(options: dict[str, Any], load: Callable[[int | None], ImageData]) -> list[str]:
    """Train the teacher that the options of `teach` name, write it with its companion, and tell how accurate it is.

    load: reads the data with so many channels. Raises BadInput, and Interrupted where a signal asked to stop; the
    training is kept then.
    """
    with _for_this_process(options["out"]):
        return _train_to_file(options, load)


def _train_to_file(options: dict[str, Any], load: Callable[[int | None], ImageData]) -> list[str]:
    out, arch, cifar_stem = options["out"], options["arch"], options["cifar_stem"]
    kept = Path(f"{out}.training")
    _check_beside(out, kept, options["resume"])
    with OnMeta():
        teachers.create(arch, 10, cifar_stem=cifar_stem)  # refuses what does not exist before the data are read
    images = load(options["channels"] or teachers.usual_channels(arch))
    settings = _settings(options, images)
    if options["resume"]:
        _check_kept(kept, settings)
    train = images.train
    model = teachers.create(arch, images.classes, train.channels, train.image_size, cifar_stem, options["seed"])
    check_room(out, model.state_dict(), kept.stat().st_size if options["resume"] else 0)
    with Bar(options["quiet"]) as bar, bar.stops_by_signals(), _telling_how_to_go_on(kept):
        checkpointer = TrainingCheckpointer(kept, settings, bar.stopping)
        trained(model, images, bar, checkpointer, **{name: options[name] for name in OF_TRAINING})
        accuracies = {n: accuracy(model, split) for n, split in images.parts.items() if n != "train"}
        write_json(companion(out), _made(model, images, settings, accuracies))  # first: out, once there, is complete
        write_tensors(out, dict(model.state_dict()))
    kept.unlink(missing_ok=True)
    return [f"{out}: {name} accuracy {share:.2%}" for name, share in accuracies.items()]


def trained(
    model: nn.Module, images: ImageData, bar: Bar, checkpointer: Checkpointer | None = None, **training: Any
) -> nn.Module:
    """Train a teacher under a progress bar."""
    start = time.perf_counter()
    model = teachers.train_teacher(model, images, progress=bar, checkpointer=checkpointer, **training)
    bar.message(f"teacher trained in {time.perf_counter() - start:.0f} s")
    return model


def resuming_command() -> str:
    """This command line, that it goes on."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join(["n2n-fast", *words, "--resume"])


@contextlib.contextmanager
def _for_this_process(out: Path) -> Iterator[None]:
    """Refuse a file that cannot be written; nobody else trains into it meanwhile."""
    if out.is_dir():
        raise BadInput(f"{out}: is a directory; give a file, --out FILE")
    if out.exists():
        raise BadInput(f"{out}: exists already; give another --out or remove it")
    if not out.parent.is_dir():
        raise BadInput(f"{out}: its directory does not exist; make it or give another --out")
    with contextlib.ExitStack() as stack:
        with writing(out):
            stack.enter_context(locked(out.with_name(f".{out.name}.lock"), out))
            try_writing(out.parent)
        yield


def _check_beside(out: Path, kept: Path, resume: bool) -> None:
    """Refuse a file beside which something stands in the way."""
    beside = companion(out)
    if beside.exists() and read_companion(beside) is None:
        raise BadInput(f"{beside}: would be overwritten, and is not by {MADE_BY}; give another --out or remove it")
    if kept.exists() and not resume:
        raise BadInput(f"{kept}: a training that was cut off; go on with --resume, remove it or give another --out")
    if resume and not kept.is_file():
        raise BadInput(f"{kept}: no training to go on with; leave out --resume")


def _check_kept(kept: Path, settings: dict[str, Any]) -> None:
    """Refuse a training that was kept unless it has these settings."""
    saved = read_state(kept)
    with understood(kept):
        there = dict(saved["name"])
    check_same(there, settings, kept)


def _settings(options: dict[str, Any], images: ImageData) -> dict[str, Any]:
    """Everything that the weights depend on, as plain values."""
    described = images.described()
    return {
        **{name: options[name] for name in ("arch", "cifar_stem", *OF_TRAINING)},
        **{name: described[name] for name in ("channels", "image_size", "mean", "std")},
        "augmentation": asdict(images.augmentation) if images.augmentation else None,
        "data": images.digest,
    }


def _made(
    model: nn.Module, images: ImageData, settings: dict[str, Any], accuracies: dict[str, float]
) -> dict[str, Any]:
    """What the companion says."""
    return {
        "made_by": MADE_BY,
        "weights": teachers.digest(model),
        "arch": settings["arch"],
        "settings": settings,
        "data": images.described(),
        "validation_accuracy": accuracies["validation"],
        "test_accuracy": accuracies.get("test"),
    }


@contextlib.contextmanager
def _telling_how_to_go_on(kept: Path) -> Iterator[None]:
    """Within it, a failing device or a full disk is told with the command that goes on, where a training was kept."""
    try:
        with telling_device_faults():
            yield
    except (DeviceFault, OSError) as error:
        if not kept.is_file():
            raise
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise BadInput(f"{reason}; what is done is kept, go on with: {resuming_command()}") from None
    except BadInput as error:
        if isinstance(error.__cause__, Diverged):
            kept.unlink(missing_ok=True)  # going on would end there again
        raise
