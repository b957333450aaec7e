"""A run's student in the formats that others read, each file compared with the student once it is written."""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.search.result import exported_program, load_student
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

    out: default: the run's export.pt2, export.onnx or export.pt. opset: of ONNX; default: torch's. static_batch: for so
    many images at once and no other number. fold_bn: batch norms go into the convolutions before them. Raises BadInput
    where the run, the file or the options cannot be used, or the file's logits are not the student's.
    """
    out = run / f"export{SUFFIXES[to]}" if out is None else out
    _check(to, out, opset, static_batch, fold_bn)
    student, worked_on = load_student(run).cpu(), load_student(run).cpu()
    norms, folded = _norms(student), fold_batch_norms(worked_on) if fold_bn else 0
    aside = out.with_name(f".{out.name}.new")
    try:
        aside.touch()
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    try:
        written = _write(worked_on, to, aside, opset, static_batch)
        forward = _reader(run, to, aside)
        difference = _compared(student, forward, static_batch)
        size = aside.stat().st_size
        latencies = _latencies(student, forward, static_batch)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return Exported(
        out, static_batch, norms, folded, written, difference, latencies, size, (run / "student.pt2").stat().st_size
    )


def _check(to: str, out: Path, opset: int | None, static_batch: int | None, fold_bn: bool) -> None:
    if out.exists():
        raise BadInput(f"{out}: exists already; give another --out or remove it")
    if opset is not None and to != "onnx":
        raise BadInput("--opset: only ONNX has one; give --to onnx")
    if to == "state-dict" and (static_batch is not None or fold_bn):
        raise BadInput("--to state-dict: holds the weights of the student as it is; give --to pt2 or onnx")
    if to == "onnx":
        try:
            for package in ("onnx", "onnxscript", "onnxruntime"):
                __import__(package)
        except ImportError as error:
            raise BadInput(f"--to onnx needs {error.name or 'onnx'}: pip install 'n2n_fast[onnx]'") from None


# Writing


def _write(student: nn.Module, to: str, path: Path, opset: int | None, static_batch: int | None) -> int | None:
    """Write the student; the opset that it has, if it is ONNX."""
    if to == "state-dict":
        torch.save(student.state_dict(), path)
        return None
    program = exported_program(student, _images(student, static_batch or 2), any_batch=static_batch is None)
    if to == "pt2":
        file = io.BytesIO()  # torch.export.save goes by the name's ending
        torch.export.save(program, file)
        path.write_bytes(file.getvalue())
        return None
    return _write_onnx(program, path, opset)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, opset: int | None) -> int:
    import onnx

    try:
        with _quiet():
            torch.onnx.export(
                program,
                f=str(path),
                input_names=["images"],
                output_names=["logits"],
                opset_version=opset,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # noqa: BLE001 - an exporter fails in many ways
        raise_device_fault(error)
        raise BadInput(f"torch.onnx does not take this student ({first_line(error)}); give --to pt2") from None
    held = next(part.version for part in onnx.load(path).opset_import if part.domain in ("", "ai.onnx"))
    if opset not in (None, held):
        raise BadInput(f"--opset {opset}: this student cannot be written so; {held} can be had")
    return int(held)


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


# Reading back


def _reader(run: Path, to: str, path: Path) -> Forward:
    """What the written file computes, read by who will read it."""
    if to == "onnx":
        return _onnx_reader(path)
    if to == "pt2":
        return torch.export.load(io.BytesIO(path.read_bytes())).module()
    student = load_student(run).cpu()
    with torch.no_grad():
        for tensor in student.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    student.load_state_dict(torch.load(path, weights_only=True))
    return student


def _onnx_reader(path: Path) -> Forward:
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def _compared(student: nn.Module, forward: Forward, static_batch: int | None) -> float:
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
def _latencies(student: nn.Module, forward: Forward, static_batch: int | None) -> dict[int, tuple[float, float]]:
    """Images -> ms of the student and of the file, by as many threads of the CPU.

    Each is the least of some medians, taken by turns, so that what else the machine does falls on both or on neither.
    """
    found = {}
    for count in BATCHES if static_batch is None else (static_batch,):
        images = _images(student, count)
        turns = [
            [median_ms(functools.partial(call, images), TURN_SECONDS) for call in (student, forward)]
            for _ in range(TURNS)
        ]
        one, other = (min(times) for times in zip(*turns, strict=True))
        found[count] = one, other
    return found


def _images(student: nn.Module, count: int) -> Tensor:
    """Standard normal images (count, C, H, W) as the student takes them, always the same."""
    value = next(node for node in _graph(student).nodes if node.op == "placeholder").meta["val"]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *value.shape[1:], generator=generator).to(value.dtype)


# Folding


def fold_batch_norms(student: nn.Module) -> int:
    """Fold each batch norm into the convolution or linear layer whose output it alone reads; how many were.

    student: as `load_student` gives it, changed in place.
    """
    graph = _graph(student)
    folded = 0
    for norm in _norm_nodes(graph):
        before = norm.args[0]
        if _can_fold(student, before, norm):
            _fold(student, before, norm)
            folded += 1
    graph.eliminate_dead_code()
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        graph.erase_node(node)
    if isinstance(student, fx.GraphModule):
        student.delete_all_unused_submodules()
        student.recompile()
    return folded


def _norms(student: nn.Module) -> int:
    return len(_norm_nodes(_graph(student)))


def _norm_nodes(graph: fx.Graph) -> list[Any]:
    return [node for node in graph.nodes if node.target == aten.batch_norm.default and node.args[5] is False]


def _can_fold(student: nn.Module, layer: Any, norm: Any) -> bool:
    """Whether the norm alone reads the layer, and the layer alone its weights."""
    if layer.target not in FOLDABLE or list(layer.users) != [norm]:
        return False
    weights = [node for node in layer.args[1:3] if node is not None]
    if not all(isinstance(node, fx.Node) and node.op == "get_attr" and list(node.users) == [layer] for node in weights):
        return False
    held = [_value(student, node).data_ptr() for node in _graph(student).nodes if node.op == "get_attr"]
    return all(held.count(_value(student, node).data_ptr()) == 1 for node in weights)


@torch.no_grad()
def _fold(student: nn.Module, layer: Any, norm: Any) -> None:
    """Put the norm's scale and shift into the layer's weight and bias, which it is given if it has none."""
    scale, shift, mean, variance = (_optional(student, node) for node in norm.args[1:5])
    weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    fused = fuse_conv_bn_weights(
        _value(student, weight), _optional(student, bias), mean, variance, norm.args[7], scale, shift
    )
    if bias is None:
        graph = _graph(student)
        with graph.inserting_before(weight):
            bias = graph.create_node("get_attr", f"{weight.target}_folded_bias")
        layer.args = (*layer.args[:2], bias, *layer.args[3:])
    for node, value in zip((weight, bias), fused, strict=True):
        owner, name = _place(student, node)
        owner.register_parameter(name, value)
    norm.replace_all_uses_with(layer)
    _graph(student).erase_node(norm)


def _place(student: nn.Module, node: Any) -> tuple[nn.Module, str]:
    """The submodule that holds what a node gets, and its name there."""
    path, _, name = str(node.target).rpartition(".")
    return student.get_submodule(path), name


def _value(student: nn.Module, node: Any) -> Tensor:
    owner, name = _place(student, node)
    value: Tensor = getattr(owner, name)
    return value


def _optional(student: nn.Module, node: Any) -> Any:
    return None if node is None else _value(student, node)


def _graph(student: nn.Module) -> fx.Graph:
    graph: Any = student.graph
    return cast("fx.Graph", graph)
