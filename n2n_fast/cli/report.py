"""A run as one picture and one page: its history as the search wrote it, and the student once it is finished.

What is drawn is told apart by markers and line styles, so that it reads as well in grey.
"""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from n2n_fast.cli.tables import Rows, percent, result_rows, result_table
from n2n_fast.files.errors import BadInput, first_line
from n2n_fast.files.safe_load import parse_json

Line = dict[str, Any]  # of history.jsonl
Axes = Any  # matplotlib's; it is imported only where something is drawn

SHORT, PREDICTED, ERROR = "short_accuracy", "predicted_accuracy", "accuracy_error"  # of a rollout's line
TRAINED = "full_accuracy"  # of the line of an anchor or of a fully trained student
COSTS = {"params": "params", "macs": "MACs"}
DRAWN_KINDS = ("conv", "depthwise", "linear")
INK, GREY, LIGHT, ACCENT = "#1a1a1a", "#767676", "#c9c9c9", "#1f5fa8"
MARKERS = {"removal": "o", "shrinkage": "s"}
BIG, SMALL = 11, 8.5  # points
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2em auto; max-width: 1100px; padding: 0 1em }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px }
th, td { padding: 2px 12px; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
tr.removed td { color: #767676; text-decoration: line-through }
"""


# What a run directory holds


@dataclass(frozen=True)
class Stage:
    """One stage's lines of history.jsonl. predictors: how many rollouts were done when one learned, and its line."""

    name: str
    rollouts: list[Line] = field(default_factory=list)
    anchors: list[Line] = field(default_factory=list)
    finals: list[Line] = field(default_factory=list)
    predictors: list[tuple[int, Line]] = field(default_factory=list)

    def best(self) -> list[float | None]:
        """After each rollout the reward of the best so far, feasible before infeasible; None: nothing evaluated yet."""
        none = False, -math.inf
        ranks = ((line["feasible"], line["reward"]) if line[PREDICTED] is not None else none for line in self.rollouts)
        return [None if reward == -math.inf else reward for _, reward in accumulate(ranks, max)]

    def trained(self) -> list[Line]:
        """The students trained fully, as anchors or at the end."""
        return [line for line in (*self.anchors, *self.finals) if line[TRAINED] is not None]


@dataclass(frozen=True)
class Layer:
    """A layer of the teacher, and what the student has of it. Channels: of its output; None: it has none."""

    name: str
    kind: str
    kept: bool
    teacher_channels: int | None
    channels: int | None
    teacher_kernel: tuple[int, ...]
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """A run directory. table, front: of result.json and front.json; None, and no layers, until the run is finished."""

    path: Path
    stages: list[Stage]
    settings: Line
    table: Line | None
    front: dict[str, list[Line]] | None
    layers: list[Layer]


def read_run(path: Path) -> Run:
    """Read a run directory, one of an unfinished run as well. Raises BadInput where it is none."""
    if not (path / "history.jsonl").is_file():
        raise BadInput(f"{path}: no history.jsonl in it; give the directory of a run")
    stages = _read(path / "history.jsonl", _stages)
    if not any(stage.rollouts or stage.anchors for stage in stages):
        raise BadInput(f"{path}: nothing was evaluated in this run yet")
    table, front, layers = (
        _read(path / name, read) if (path / name).exists() else None
        for name, read in (("result.json", parse_json), ("front.json", parse_json), ("architecture.json", _layers))
    )
    settings = _read(path / "config.json", parse_json) if (path / "config.json").exists() else {}
    return Run(path, stages, settings, table, front, layers or [])


def _read(path: Path, read: Callable[[bytes], Any]) -> Any:
    try:
        return read(path.read_bytes())
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: not written by n2n-fast run") from None


def _stages(content: bytes) -> list[Stage]:
    stages: dict[str, Stage] = {}
    for text in content.splitlines(keepends=True):
        if not text.endswith(b"\n"):  # the last one may be half written
            break
        line = parse_json(text)
        stage = stages.setdefault(line["stage"], Stage(line["stage"]))
        if line["kind"] == "predictor":
            stage.predictors.append((len(stage.rollouts), line))
        elif line["kind"] in ("rollout", "anchor", "final"):
            {"rollout": stage.rollouts, "anchor": stage.anchors, "final": stage.finals}[line["kind"]].append(line)
    return list(stages.values())


def _layers(content: bytes) -> list[Layer]:
    """The first stage's layers beside what the last stage left of them, which knows only those that were kept."""
    stages = [dict(zip(stage["layers"], stage["sizes"], strict=True)) for stage in parse_json(content)]
    layers = []
    for name, size in stages[0].items() if stages else ():
        after = stages[-1].get(name, {**size, "kept": False})
        (before, _), (kernel, _) = size["channels"], size["kernel"]
        kept = size["kept"] and after["kept"]
        sizes = (before, after["channels"][1], tuple(kernel), tuple(after["kernel"][1]))
        layers.append(Layer(name, size["kind"], kept, *sizes))
    return layers


def write_report(path: Path) -> list[Path]:
    """Write report.png and report.html into a run directory, finished or not; gives both paths.

    Raises BadInput where there is no run, and without matplotlib.
    """
    run = read_run(path)
    if not _can_draw():
        raise BadInput("report needs matplotlib: pip install 'n2n_fast[plot]'")
    drawn = _picture(run)
    png, page = path / "report.png", path / "report.html"
    png.write_bytes(drawn)
    page.write_text(_page(run, drawn), encoding="utf-8")
    return [png, page]


def draw_if_possible(path: Path, warn: Callable[[str], None]) -> None:
    """The report of a run that has just ended, where matplotlib is; what fails is told to `warn`, nothing is raised."""
    if _can_draw():
        try:
            write_report(path)
        except Exception as error:  # noqa: BLE001 - the search is done: no drawing may spoil it
            warn(f"warning: no report ({first_line(error)}); try n2n-fast report {path}")


def _can_draw() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


# The picture


def _picture(run: Run) -> bytes:
    """A run as one PNG."""
    from matplotlib.figure import Figure

    layers = [layer for layer in run.layers if layer.kind in DRAWN_KINDS and layer.teacher_channels]
    figure: Any = Figure(figsize=(16, 12.5 + 4.5 * bool(layers)), dpi=100, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    parts = figure.subfigures(2, height_ratios=(12.5, 4.5)) if layers else [figure]
    _panels(parts[0], run)
    if layers:
        _draw_layers(parts[1].add_subplot(), layers)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": "n2n-fast"})
    return file.getvalue()


def _panels(figure: Any, run: Run) -> None:
    """Rewards, costs and predictions, a row each; beside them the table and the legends."""
    grid = figure.add_gridspec(3, 3, width_ratios=(3, 3, 2))

    def row(number: int, count: int) -> list[Axes]:
        columns = [slice(0, 2)] if count == 1 else [slice(0, 1), slice(1, 2)]
        return [figure.add_subplot(grid[number, column]) for column in columns]

    rows = [row(0, len(run.stages)), row(1, 2), row(2, len(run.stages))]
    for stage, rewards, predictions in zip(run.stages, rows[0], rows[2], strict=True):
        _draw_rewards(rewards, stage)
        _draw_predictions(predictions, stage)
    for axes, by in zip(rows[1], COSTS, strict=True):
        _draw_costs(axes, run, by)
    beside = [figure.add_subplot(grid[number, 2]) for number in range(3)]
    table = "not finished yet" if run.table is None else result_table(run.table)
    beside[0].text(0, 1, table, family="monospace", fontsize=SMALL, va="top", ha="left", linespacing=1.6)
    for axes, panels in zip(beside, ([], *rows[1:]), strict=True):
        axes.set_axis_off()
        entries = {
            label: handle for of in panels for handle, label in zip(*of.get_legend_handles_labels(), strict=True)
        }
        if entries:
            axes.legend(entries.values(), entries.keys(), loc="upper left", fontsize=SMALL, frameon=False)


def _style(axes: Axes, title: str, x: str, y: str, shares: Sequence[Any] = ()) -> None:
    """Titles and grid. shares: axes of accuracies, labelled in percent."""
    from matplotlib.ticker import PercentFormatter

    axes.set_title(title, fontsize=BIG, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=SMALL + 1)
    axes.set_ylabel(y, fontsize=SMALL + 1)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color=LIGHT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in shares:
        axis.set_major_formatter(PercentFormatter(1.0))


def _scatter(axes: Axes, points: Iterable[tuple[Any, Any]], label: str, **style: Any) -> None:
    """Points (x, y), where there are any."""
    points = list(points)
    if points:
        axes.scatter(*zip(*points, strict=True), label=label, **style)


def _draw_rewards(axes: Axes, stage: Stage) -> None:
    """Each rollout's reward and the best so far; degenerate ones at the edge; lines where the predictor learned."""
    _style(axes, f"{stage.name}: reward", "rollouts", "reward")
    lines = list(enumerate(stage.rollouts, 1))
    for feasible, marker, color, label in (
        (True, "o", ACCENT, "rollout"),
        (False, "x", GREY, "rollout, misses a limit"),
    ):
        chosen = [(n, x["reward"]) for n, x in lines if x[PREDICTED] is not None and x["feasible"] == feasible]
        _scatter(axes, chosen, label, marker=marker, s=18, color=color, alpha=0.75)
    failed = [(n, 0.02) for n, line in lines if line[PREDICTED] is None]
    _scatter(axes, failed, "degenerate (−1, off the scale)", marker="v", s=22, facecolor="none", edgecolor=GREY,
             transform=axes.get_xaxis_transform())  # fmt: skip
    best = [(n, reward) for n, reward in enumerate(stage.best(), 1) if reward is not None]
    if best:
        axes.step(*zip(*best, strict=True), where="post", color=INK, linewidth=1.6, label="best so far")
    for i, done in enumerate(sorted({done for done, _ in stage.predictors})):
        label = "" if i else "predictor learned"
        axes.axvline(done + 0.5, color=GREY, linestyle=":", linewidth=1.4, label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=SMALL, framealpha=0.9)


def _draw_costs(axes: Axes, run: Run, by: str) -> None:
    """Accuracy against params or MACs: predicted and trained students, the front, the teacher, the final student."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    title, accuracy = f"validation accuracy against {COSTS[by]}", "validation accuracy"
    _style(axes, title, COSTS[by], accuracy, [axes.yaxis])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # 50 k, 2 M
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    for stage in run.stages:
        marker = MARKERS.get(stage.name, "o")
        predicted = [(line[by], line[PREDICTED]) for line in stage.rollouts if line[PREDICTED] is not None]
        _scatter(axes, predicted, f"{stage.name}: accuracy only predicted", marker=marker, s=20, linewidth=0.9,
                 facecolor="none", edgecolor=GREY)  # fmt: skip
        trained = [(line[by], line[TRAINED]) for line in stage.trained()]
        _scatter(axes, trained, f"{stage.name}: trained fully", marker=marker, s=34, color=ACCENT)
    if run.front:
        front = [(point[by], point["accuracy"]) for point in run.front[by]]
        axes.step(
            *zip(*front, strict=True), where="post", color=INK, linewidth=1.2, linestyle="--", label="Pareto front"
        )
    for part, marker, size in (("teacher", "*", 230), ("student", "D", 110)) if run.table else ():
        point = run.table[part][by], run.table[part]["validation_accuracy"]  # type: ignore[index]
        _scatter(axes, [point], part, marker=marker, s=size, facecolor="none", edgecolor=INK, linewidth=1.6, zorder=5)


def _draw_predictions(axes: Axes, stage: Stage) -> None:
    """What accuracies after a few steps were taken to mean, with the error then, and what anchors came to."""
    _style(axes, f"{stage.name}: {_corrected(stage)}", "accuracy after a few steps", "accuracy after a full training",
           [axes.xaxis, axes.yaxis])  # fmt: skip
    predicted = [line for line in stage.rollouts if line[PREDICTED] is not None]
    if predicted:
        x, y, error = zip(*((line[SHORT], line[PREDICTED], line[ERROR] or 0.0) for line in predicted), strict=True)
        axes.errorbar(x, y, error, fmt="o", markersize=3, color=GREY, ecolor=LIGHT, label="rollout, ± standard error")
    anchors = [(line[SHORT], line[TRAINED]) for line in stage.anchors if None not in (line[SHORT], line[TRAINED])]
    _scatter(axes, anchors, "anchor, trained", marker="o", s=42, color=ACCENT, zorder=4)
    if predicted or anchors:
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1, label="no change")


def _corrected(stage: Stage) -> str:
    """What corrects a stage's accuracies, by the last predictor."""
    last = stage.predictors[-1][1] if stage.predictors else {}
    if not last.get("count"):
        return "too few anchors to correct accuracies"
    error = last.get("error")
    return f"corrected by {last['count']} anchors" + ("" if error is None else f", {100 * error:.1f} points off")


def _draw_layers(axes: Axes, layers: Sequence[Layer]) -> None:
    """Teacher and student side by side: an outline as high as the teacher's layer is wide, a bar for the student's."""
    _style(axes, "convolutions and linear layers, teacher and student (channels; above: kernel)", "", "output channels")
    numbers = range(len(layers))
    heights = [layer.teacher_channels or 0 for layer in layers]
    axes.set_yscale("log", base=2)
    axes.bar(numbers, heights, width=0.8, facecolor="none", edgecolor=INK, linewidth=0.8, label="teacher")
    widths = [layer.channels if layer.kept else 0 for layer in layers]
    axes.bar(numbers, widths, width=0.56, color=ACCENT, label="student")
    gone = [(n, 0.06) for n, layer in enumerate(layers) if not layer.kept]
    _scatter(axes, gone, "removed", marker="x", s=40, color=INK, transform=axes.get_xaxis_transform())
    size = max(4.5, min(SMALL, 900 / len(layers)))
    shown = slice(None, None, 1 + len(layers) // 130)
    axes.set_xticks(numbers[shown], [layer.name for layer in layers[shown]], rotation=90, fontsize=size)
    above = axes.secondary_xaxis("top")
    kernels = ["→".join(_kernels(layer)) for layer in layers[shown]]
    above.set_xticks(numbers[shown], kernels, rotation=90 if len(layers) > 24 else 0, fontsize=size)
    above.spines["top"].set_visible(False)
    above.tick_params(length=0)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(1, 2 * max(heights))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.grid(visible=False, axis="x")
    axes.legend(fontsize=SMALL, framealpha=0.9, ncols=3, loc="upper left")


def _kernels(layer: Layer) -> list[str]:
    """The kernel's size in the teacher, and in the student where that is another: "3×3", "1×1"."""
    sizes = [layer.teacher_kernel, *([layer.kernel] if layer.kept and layer.kernel != layer.teacher_kernel else [])]
    return ["×".join(map(str, size)) for size in sizes]


# The page


def _page(run: Run, drawn: bytes) -> str:
    """A run as one HTML page that needs no other file."""
    title = html.escape(f"n2n_fast: {run.path.resolve().name}")
    parts = [f"<h1>{title}</h1>"]
    if run.table is None:
        parts.append("<p>This run is not finished yet.</p>")
    else:
        parts += ["<h2>Teacher and student</h2>", _html_table(result_rows(run.table))]
    source = base64.b64encode(drawn).decode()
    parts.append(f'<img alt="rewards, accuracies and layers of the run" src="data:image/png;base64,{source}">')
    for by, points in (run.front or {}).items():
        parts += [f"<h2>Pareto front: accuracy against {COSTS[by]}</h2>", _html_table(_front_rows(points))]
    for stage in run.stages:
        parts += [f"<h2>Anchors of {html.escape(stage.name)}</h2>", f"<p>Accuracies are {_corrected(stage)}.</p>"]
        parts.append(_html_table(_anchor_rows(stage)))
    if run.layers:
        parts += ["<h2>Layers</h2>", _html_table(_layer_rows(run.layers), [not layer.kept for layer in run.layers])]
    settings = html.escape(json.dumps(run.settings, indent=2))
    parts.append(f"<details><summary>Settings</summary><pre>{settings}</pre></details>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html_table(rows: Rows, removed: Sequence[bool] = ()) -> str:
    """Rows as a table, the first one as its head. removed: rows to be struck out, one a row without the head."""
    head, *body = (tuple(html.escape(cell) for cell in row) for row in rows)
    lines = ["<table>", "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for i, row in enumerate(body):
        mark = ' class="removed"' if removed and removed[i] else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _front_rows(points: Iterable[Line]) -> Rows:
    rows: Rows = [("stage", "architecture", "params", "MACs", "validation accuracy", "")]
    for p in points:
        known = "trained fully" if p["trained"] else "predicted"
        accuracy = percent(p["accuracy"])
        rows.append((p["stage"], p["architecture"], f"{p['params']:,}", f"{p['macs']:,}", accuracy, known))
    return rows


def _anchor_rows(stage: Stage) -> Rows:
    rows: Rows = [("architecture", "params", "MACs", "after a few steps", "trained fully")]
    for line in stage.anchors:
        accuracies = (percent(line[SHORT]), percent(line[TRAINED]))
        rows.append((line["architecture"], f"{line['params']:,}", f"{line['macs']:,}", *accuracies))
    return rows


def _layer_rows(layers: Iterable[Layer]) -> Rows:
    rows: Rows = [("layer", "kind", "channels, teacher", "student", "kernel, teacher", "student")]
    for layer in layers:
        width = str(layer.channels or "") if layer.kept else "removed"
        kernels = ("×".join(map(str, size)) for size in (layer.teacher_kernel, layer.kernel if layer.kept else ()))
        rows.append((layer.name, layer.kind, str(layer.teacher_channels or ""), width, *kernels))
    return rows
