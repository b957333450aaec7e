"""A run's student in the formats that others read, each file compared with the student once it is written."""

import contextlib
import functools
import io
import json
import logging
import operator
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.search.result import exported_program, load_student, program_bytes
from n2n_fast.training.distill import median_ms

SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "state-dict": ".pt"}
TOLERANCE = 1e-4  # of the logits, as a share of the largest where that is above 1
BATCHES = (1, 64)  # images that latencies are taken of; and 3, which no example had, is compared too
TURNS, TURN_SECONDS = 5, 0.1

aten = torch.ops.aten
FOLDABLE = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.linear.default),
)

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """A written file. batch: images that it takes at once, None: any number. norms, folded: batch norms of the student
    and how many of them are in the weights now. opset: of ONNX. difference: the largest between its logits and the
    student's. latencies: images -> (the student's, the file's) ms; bytes, student_bytes: sizes of the files.
    """

    path: Path
    batch: int | None
    norms: int
    folded: int
    opset: int | None
    difference: float
    latencies: dict[int, tuple[float, float]]
    bytes: int
    student_bytes: int


def export(
    run: Path,
    to: str,
    out: Path | None = None,
    opset: int | None = None,
    static_batch: int | None = None,
    fold_bn: bool = False,
) -> Exported:
    """Write the student of a run directory as "pt2", "onnx" or "state-dict".

    out: must not exist; default: the run's export.pt2, export.onnx or export.pt, which an earlier export may have
    written. opset: of ONNX; default: torch's. static_batch: for so
    many images at once and no other number. fold_bn: batch norms go into the convolutions before them. Raises BadInput
    where the run, the file or the options cannot be used, or the file's logits are not the student's.
    """
    own = run / f"export{SUFFIXES[to]}"
    if out is not None and os.path.lexists(out) and not (own.exists() and out.samefile(own)):
        raise BadInput(f"{out}: exists already; give another --out or remove it")
    out = own if out is None else out
    _check(to, opset, static_batch, fold_bn)
    student, changed = _student(run), _student(run)
    norms, folded = len(_norms(student)), fold_batch_norms(changed) if fold_bn else 0
    aside = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        aside.touch(exist_ok=False)
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    try:
        if to == "onnx":
            forward, opset = _onnx(changed, aside, opset, static_batch)
        else:
            forward = _pt2(changed, aside, static_batch) if to == "pt2" else _state_dict(changed, aside)
        difference = _compared(student, forward, static_batch)
        size = aside.stat().st_size
        latencies = _latencies(student, forward, static_batch)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    student_size = (run / "student.pt2").stat().st_size
    return Exported(out, static_batch, norms, folded, opset, difference, latencies, size, student_size)


def _student(run: Path) -> fx.GraphModule:
    return load_student(run).cpu()


def _check(to: str, opset: int | None, static_batch: int | None, fold_bn: bool) -> None:
    if opset is not None and to != "onnx":
        raise BadInput("--opset: only ONNX has one; give --to onnx")
    if to == "state-dict" and (static_batch is not None or fold_bn):
        raise BadInput("--to state-dict: holds the weights of the student as it is; give --to pt2 or onnx")
    if to == "onnx":
        check_onnx("--to onnx")


def check_onnx(what: str) -> None:
    """Refuse what needs ONNX where it is not installed."""
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            __import__(package)
    except ImportError as error:
        raise BadInput(f"{what} needs {error.name or 'onnx'}: pip install 'n2n_fast[onnx]'") from None


# The formats: each function writes a file and gives what that computes, read as its readers will read it


def _pt2(student: fx.GraphModule, path: Path, static_batch: int | None) -> Forward:
    path.write_bytes(program_bytes(_program(student, static_batch), student.meta["input"]))
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _state_dict(student: fx.GraphModule, path: Path) -> Forward:
    torch.save(student.state_dict(), path)
    with torch.no_grad():
        for tensor in student.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    student.load_state_dict(torch.load(path, weights_only=True))
    return student


def _onnx(student: fx.GraphModule, path: Path, opset: int | None, static_batch: int | None) -> tuple[Forward, int]:
    """What the file computes, and its opset."""
    import onnx

    program = _program(student, static_batch)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    how: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False, "opset_version": opset}
    try:
        with _quiet():
            torch.onnx.export(program, f=str(path), **names, **how)
    except Exception as error:  # noqa: BLE001 - an exporter fails in many ways
        raise_device_fault(error)
        raise BadInput(f"torch.onnx does not take this student ({first_line(error)}); give --to pt2") from None
    model = onnx.load(path)
    written = next(part.version for part in model.opset_import if part.domain in ("", "ai.onnx"))
    if opset not in (None, written):
        raise BadInput(f"--opset {opset}: this student cannot be written so; {written} can be had")
    for name, value in (student.meta["input"] or {}).items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.save(model, path)
    return run_by_onnx(path.read_bytes()), int(written)


def run_by_onnx(content: bytes) -> Forward:
    """What a file of ONNX computes, on the CPU."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _program(student: fx.GraphModule, static_batch: int | None) -> torch.export.ExportedProgram:
    return exported_program(student, _images(student, static_batch or 2), any_batch=static_batch is None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the terminal from exporters: what they say of themselves is no news of the student."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# What is written, beside the student


@torch.no_grad()
def _compared(student: fx.GraphModule, forward: Forward, static_batch: int | None) -> float:
    """The largest difference of logits; BadInput where it is too large."""
    worst = largest = 0.0
    for count in (*BATCHES, 3) if static_batch is None else (static_batch,):
        images = _images(student, count)
        expected, got = student(images), forward(images)
        worst = max(worst, float((expected - got).abs().nan_to_num(float("inf")).max()))
        largest = max(largest, float(expected.abs().max()))
    if not worst <= TOLERANCE * max(1.0, largest):
        raise BadInput(f"the file's logits are {worst:.2g} off the student's, of {largest:.2g}; it was not kept")
    return worst


@torch.no_grad()
def _latencies(student: fx.GraphModule, forward: Forward, static_batch: int | None) -> dict[int, tuple[float, float]]:
    """Images -> ms of the student and of the file, by as many threads of the CPU.

    Each is the least of some medians, taken by turns, so that what else the machine does falls on both or on neither.
    """
    latencies = {}
    for count in BATCHES if static_batch is None else (static_batch,):
        images = _images(student, count)
        turns = [
            [median_ms(functools.partial(call, images), TURN_SECONDS) for call in (student, forward)]
            for _ in range(TURNS)
        ]
        of_student, of_file = (min(times) for times in zip(*turns, strict=True))
        latencies[count] = of_student, of_file
    return latencies


def _images(student: fx.GraphModule, count: int) -> Tensor:
    """Standard normal images (count, C, H, W) as the student takes them, always the same."""
    value = next(node for node in student.graph.nodes if node.op == "placeholder").meta["val"]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *value.shape[1:], generator=generator).to(value.dtype)


# Folding


def fold_batch_norms(student: fx.GraphModule) -> int:
    """Fold each batch norm into the convolution or linear layer whose output it alone reads; how many were.

    student: as `load_student` gives it, changed in place.
    """
    folded = sum(_fold(student, norm) for norm in _norms(student))
    student.graph.eliminate_dead_code()
    student.delete_all_unused_submodules()
    student.recompile()
    return folded


def _norms(student: fx.GraphModule) -> list[Any]:
    return [node for node in student.graph.nodes if node.target == aten.batch_norm.default and node.args[5] is False]


@torch.no_grad()
def _fold(student: fx.GraphModule, norm: Any) -> bool:
    """Put the norm's scale and shift into the weight and bias of the layer before it; False where that cannot be."""
    layer = norm.args[0]
    if not _can_fold(student, layer, norm):
        return False
    scale, shift, mean, variance = (_value(student, node) for node in norm.args[1:5])
    weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    fused = fuse_conv_bn_weights(
        _value(student, weight), _value(student, bias), mean, variance, norm.args[7], scale, shift
    )
    if bias is None:
        with student.graph.inserting_before(weight):
            bias = student.graph.create_node("get_attr", f"{weight.target}_folded_bias")
        layer.args = (*layer.args[:2], bias, *layer.args[3:])
    for node, value in zip((weight, bias), fused, strict=True):
        path, _, name = str(node.target).rpartition(".")
        student.get_submodule(path).register_parameter(name, value)
    norm.replace_all_uses_with(layer)
    student.graph.erase_node(norm)
    return True


def _can_fold(student: fx.GraphModule, layer: Any, norm: Any) -> bool:
    """Whether the norm alone reads the layer, and the layer alone its weights."""
    if layer.target not in FOLDABLE or list(layer.users) != [norm]:
        return False
    weights = [node for node in layer.args[1:3] if node is not None]
    if not all(isinstance(node, fx.Node) and node.op == "get_attr" and list(node.users) == [layer] for node in weights):
        return False
    places = [_value(student, node).data_ptr() for node in student.graph.nodes if node.op == "get_attr"]
    return all(places.count(_value(student, node).data_ptr()) == 1 for node in weights)


def _value(student: fx.GraphModule, node: Any) -> Any:
    """The tensor that a node gets; None for no node."""
    return None if node is None else operator.attrgetter(str(node.target))(student)
