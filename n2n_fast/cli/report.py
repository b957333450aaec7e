"""What a search gave: tables as text, a run's report as a picture and a page, its scalars for TensorBoard."""

import base64
import html
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from n2n_fast.cli import plots
from n2n_fast.cli.export import Exported
from n2n_fast.cli.record import LayerRecord, RunRecord, StageRecord, read_record
from n2n_fast.files.errors import BadInput, first_line
from n2n_fast.networks.graph import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.pareto import front
from n2n_fast.search.plan import Plan

Rows = list[tuple[str, ...]]

TENSORBOARD = "tensorboard"  # its directory in a run's
SCALARS = ("reward", "predicted_accuracy", "short_accuracy", "params", "macs")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2em auto; max-width: 1100px; padding: 0 1em }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px }
th, td { padding: 2px 12px; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
tr.removed td { color: #767676; text-decoration: line-through }
"""


def result_table(table: dict[str, Any]) -> str:
    """The final table of result.json as aligned text: teacher and student side by side."""
    return _aligned(_result_rows(table))


def _result_rows(table: dict[str, Any]) -> Rows:
    teacher, student = table["teacher"], table["student"]
    return [
        ("", "teacher", "student"),
        *((name, f"{teacher[key]:,}", f"{student[key]:,}") for name, key in (("params", "params"), ("MACs", "macs"))),
        ("size on disk", *(f"{part['bytes'] / 1e6:.2f} MB" for part in (teacher, student))),
        ("latency, 1 image", *(f"{part['latency_ms']:.2f} ms" for part in (teacher, student))),
        ("latency, 64 images", *(f"{part['latency_ms_64']:.2f} ms" for part in (teacher, student))),
        ("validation accuracy", *(_percent(part["validation_accuracy"]) for part in (teacher, student))),
        ("test accuracy", *(_percent(part["test_accuracy"]) for part in (teacher, student))),
        ("compression", "1.0x", f"{table['compression']:.1f}x"),
    ]


def write_report(run: Path) -> list[Path]:
    """Write report.png and report.html into a run directory, finished or not; gives both paths.

    Raises BadInput where there is no run, and without matplotlib.
    """
    record = read_record(run)
    table = "not finished yet" if record.table is None else result_table(record.table)
    drawn = plots.picture(record, table)
    png, page = run / "report.png", run / "report.html"
    png.write_bytes(drawn)
    page.write_text(_page(record, drawn), encoding="utf-8")
    return [png, page]


def draw_if_possible(run: Path, tensorboard: bool, warn: Callable[[str], None]) -> None:
    """The report of a run that has just ended, where matplotlib is; what fails is told to `warn`, nothing is raised."""
    for wanted, write in ((plots.available(), write_report), (tensorboard, write_tensorboard)):
        if wanted:
            try:
                write(run)
            except Exception as error:  # noqa: BLE001 - the search is done: no drawing may spoil it
                warn(f"warning: no report ({first_line(error)}); try n2n-fast report {run}")


def _page(record: RunRecord, drawn: bytes) -> str:
    """A run as one HTML page that needs no other file."""
    title = html.escape(f"n2n_fast: {record.path.resolve().name}")
    parts = [f"<h1>{title}</h1>"]
    if record.table is None:
        parts.append("<p>This run is not finished yet.</p>")
    else:
        parts += ["<h2>Teacher and student</h2>", _html_table(_result_rows(record.table))]
    source = base64.b64encode(drawn).decode()
    parts.append(f'<img alt="rewards, accuracies and layers of the run" src="data:image/png;base64,{source}">')
    for by, name in (("params", "params"), ("macs", "MACs")):
        parts += [f"<h2>Pareto front: accuracy against {name}</h2>", _html_table(_front_rows(record, by))]
    for stage in record.stages:
        parts += [f"<h2>Anchors of {html.escape(stage.name)}</h2>", f"<p>{_predictor_text(stage)}</p>"]
        parts.append(_html_table(_anchor_rows(stage)))
    if record.layers:
        removed = [not layer.kept for layer in record.layers]
        parts += ["<h2>Layers</h2>", _html_table(_layer_rows(record.layers), removed)]
    settings = html.escape(json.dumps(record.settings, indent=2))
    parts.append(f"<details><summary>Settings</summary><pre>{settings}</pre></details>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html_table(rows: Sequence[tuple[str, ...]], removed: Sequence[bool] = ()) -> str:
    """Rows as a table, the first one as its head. removed: rows to be struck out, one a row without the head."""
    head, *body = (tuple(html.escape(cell) for cell in row) for row in rows)
    lines = ["<table>", "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for i, row in enumerate(body):
        mark = ' class="removed"' if removed and removed[i] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _front_rows(record: RunRecord, by: str) -> Rows:
    rows: Rows = [("stage", "architecture", "params", "MACs", "validation accuracy", "")]
    for p in front(record.points(), by):
        known = "trained fully" if p.trained else "expected"
        rows.append((p.stage, p.architecture, f"{p.params:,}", f"{p.macs:,}", f"{p.accuracy:.2%}", known))
    return rows


def _predictor_text(stage: StageRecord) -> str:
    """What corrects a stage's accuracies, in a sentence."""
    found = stage.predictor
    if not found.count:
        return "Too few anchors to predict from: accuracies count as they are found."
    line = f"logit(accuracy) = {found.intercept:.2f} + {found.slope:.2f} · logit(accuracy after a few steps)"
    error = "" if found.error is None else f"; each anchor predicted by the others: {100 * found.error:.1f} points off"
    final = (
        ""
        if found.remaining == 1
        else f" The final training leaves {found.remaining:.0%} of the distance to the teacher,"
        f" but adds no more than {found.gain:.2f} logits."
    )
    return f"{line}, by {found.count} anchors{error}.{final}"


def _anchor_rows(stage: StageRecord) -> Rows:
    rows: Rows = [("architecture", "params", "MACs", "after a few steps", "trained fully", "predicted")]
    for line in stage.anchors:
        short = line["short_accuracy"]
        said = "none" if short is None else "{:.2%} ± {:.2%}".format(*stage.predictor(short))
        found = (_percent(short), _percent(line["full_accuracy"]), said)
        rows.append((line["architecture"], f"{line['params']:,}", f"{line['macs']:,}", *found))
    return rows


def _layer_rows(layers: Iterable[LayerRecord]) -> Rows:
    rows: Rows = [("layer", "kind", "channels, teacher", "student", "kernel, teacher", "student")]
    for layer in layers:
        widths = [str(width or "") for width in (layer.teacher_channels, layer.channels)]
        kernels = ["×".join(map(str, kernel)) for kernel in (layer.teacher_kernel, layer.kernel)]
        if not layer.kept:
            widths[1], kernels[1] = "removed", ""
        rows.append((layer.name, layer.kind, *widths, *kernels))
    return rows


def check_tensorboard() -> None:
    """Raise BadInput where TensorBoard's files cannot be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise BadInput("--tensorboard needs tensorboard: pip install tensorboard") from None


def write_tensorboard(run: Path) -> Path:
    """Write a run's history into its directory `tensorboard`, in place of what was there; gives that directory.

    Raises BadInput where there is no run, and without tensorboard.
    """
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    record, directory = read_record(run), run / TENSORBOARD
    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(directory)) as writer:
        for tag, value, step in _scalars(record):
            writer.add_scalar(tag, value, step)
    return directory


def _scalars(record: RunRecord) -> Iterator[tuple[str, float, int]]:
    """(tag, value, rollouts of the stage until then) of all that the picture shows against rollouts."""
    for stage in record.stages:
        for step, (line, best) in enumerate(zip(stage.rollouts, stage.best(), strict=True), 1):
            found = {key: line[key] for key in SCALARS}
            for key, value in {**found, "best_reward": best}.items():
                if value is not None:
                    yield f"{stage.name}/{key}", value, step
        for step, fitted in stage.predictors:
            if fitted.error is not None:
                yield f"{stage.name}/leave_one_out_error", fitted.error, step


def export_table(exported: Exported) -> str:
    """What was written and how it compares with the student, as aligned text."""
    rows: Rows = [("", "student", "exported")]
    rows.append(("size on disk", f"{exported.student_bytes / 1e6:.3f} MB", f"{exported.bytes / 1e6:.3f} MB"))
    for count, latencies in exported.latencies.items():
        name = f"latency, {count} image{'s' if count > 1 else ''}"
        rows.append((name, *(f"{latency:.3f} ms" for latency in latencies)))
    told = ["any batch size" if exported.batch is None else f"batches of {exported.batch}"]
    if exported.opset is not None:
        told.append(f"opset {exported.opset}")
    if exported.norms:
        told.append(f"{exported.folded} of {exported.norms} batch norms folded")
    told.append(f"largest difference of logits {exported.difference:.1e}")
    return f"{_aligned(rows)}\n\n{exported.path}: {', '.join(told)}"


def plan_table(plan: Plan) -> str:
    """A search to come, as aligned text."""
    rows: Rows = [("stage", "choices", "architectures", "rollouts", "one takes", "full trainings", "all of it")]
    for stage in plan.stages:
        size = f"10^{stage.architectures_log10:.1f}"
        times = (f"{stage.rollout_seconds:.2f} s", str(stage.trainings), _duration(stage.seconds))
        rows.append((stage.name, str(stage.choices), size, str(stage.rollouts), *times))
    told = f"teacher: {plan.params:,} params, {plan.macs:,} MACs"
    warnings = "".join(f"\nwarning: {warning}" for warning in plan.warnings)
    return f"{told}\n\n{_aligned(rows)}\n\nat most about {_duration(plan.seconds)} here; nothing was written{warnings}"


def _duration(seconds: float) -> str:
    """Seconds as they are said: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def layer_table(space: ArchitectureSpace) -> str:
    """The layers as the policies see them, aligned text."""
    rows: Rows = [
        ("layer", "kind", "k", "s", "p", "n", "skip", "group", "removable", "width", "kernel", "weights"),
    ]
    channels, kernels = space.choices(space.teacher)
    for layer, chooses, crops in zip(space.layers, channels, kernels, strict=True):
        sizes = ("x".join(map(str, size)) for size in (layer.kernel_size, layer.stride, layer.padding))
        skip = f"{layer.skip_start}/{layer.skip_end}" if layer.skip_start else ""
        groups = "+".join(map(str, layer.groups[:3])) + ("+..." if len(layer.groups) > 3 else "")
        removable = "yes" if layer.removable else f"no: {layer.note}"
        width = "chosen" if chooses else layer.width_note or "too narrow to shrink"
        fit = f"sliced: {layer.fit_note}" if layer.fit_note else ""
        rows.append(
            (layer.name, layer.kind, *sizes, str(layer.out_channels), skip, groups, removable, width, _yes(crops), fit)
        )
    return _aligned(rows, left=(0, 1, 8, 9, 11))


def space_summary(space: ArchitectureSpace) -> dict[str, Any]:
    """The same, and what can be reached, for programs; "smallest": every ratio 0.1, nothing removed."""
    channels, kernels = space.choices(space.teacher)
    smallest = _at(space, 0.1, 0.1)
    layers = [
        {**asdict(layer), "chooses_width": width, "chooses_kernel": kernel}
        for layer, width, kernel in zip(space.layers, channels, kernels, strict=True)
    ]
    return {
        "params": space.teacher.params,
        "macs": space.teacher.macs,
        "smallest_params": smallest.params,
        "smallest_macs": smallest.macs,
        "compression": space.teacher.params / smallest.params,
        "round_to": space.round_to,
        "rounding_costs": _rounding(space) if space.round_to > 1 else {},
        "features": space.features().tolist(),
        "layers": layers,
        "warnings": list(space.warnings),
    }


def reach(space: ArchitectureSpace) -> str:
    """What the smallest student saves, and what rounding costs."""
    smallest = _at(space, 0.1, 0.1)
    text = (
        f"{space.teacher.params:,} params, {space.teacher.macs:,} MACs; with every ratio at 0.1 "
        f"{_times(space.teacher.params, smallest.params)} times fewer params, "
        f"{_times(space.teacher.macs, smallest.macs)} times fewer MACs"
    )
    if space.round_to > 1:
        costs = (f"at ratio {ratio}: {cost:+.1%} params" for ratio, cost in _rounding(space).items())
        text += f"\nwidths in multiples of {space.round_to} cost, {', '.join(costs)}"
    return text


def _rounding(space: ArchitectureSpace) -> dict[str, float]:
    """How many more params a student has by rounding, as a share, at some ratios."""
    exact = space.unrounded()
    return {str(r): _at(space, r).params / _at(exact, r).params - 1 for r in (0.1, 0.25, 0.5, 0.75)}


def _at(space: ArchitectureSpace, ratio: float, kernel: float = 1.0) -> Architecture:
    count = len(space.layers)
    return space.shrink(space.teacher, [ratio] * count, [kernel] * count)


def _times(a: int, b: int) -> str:
    return f"{a / max(1, b):.{0 if a > 10 * b else 1}f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


def _yes(value: bool) -> str:
    return "yes" if value else ""


def _aligned(rows: Rows, left: tuple[int, ...] = (0,)) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
