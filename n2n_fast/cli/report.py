"""A run as one picture and one page: its history as the search wrote it, and the student once it is finished.

What is drawn is told apart by markers and line styles, so that it reads as well in grey.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from n2n_fast.cli.data import data_lines
from n2n_fast.cli.tables import Rows, doubts, percent, result_rows, result_table
from n2n_fast.files.errors import BadInput, first_line
from n2n_fast.files.safe_load import parse_json
from n2n_fast.files.whole import write_whole

Line = dict[str, Any]  # of history.jsonl
Axes = Any  # matplotlib's; it is imported only where something is drawn

SHORT, PREDICTED, ERROR = "short_accuracy", "predicted_accuracy", "accuracy_error"  # of a rollout's line
EXPECTED, DEVIATION = "expected_accuracy", "expected_error"  # before it was evaluated
TRAINED = "full_accuracy"  # of the line of an anchor or of a fully trained student
COSTS = {"params": "params", "macs": "MACs"}
REMOVED = "removed"
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
    """One stage's lines of history.jsonl."""

    name: str
    lines: list[Line] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Line]:
        """The lines of these kinds: rollout, anchor, predictor, final."""
        return [line for line in self.lines if line["kind"] in kinds]

    def learned(self) -> list[int]:
        """How many rollouts were done when the predictor learned."""
        done = accumulate(line["kind"] == "rollout" for line in self.lines)
        return sorted({count for count, line in zip(done, self.lines, strict=True) if line["kind"] == "predictor"})

    def correction(self) -> str:
        """What corrects the stage's accuracies, by the last predictor, in words."""
        last = (self.of("predictor") or [{}])[-1]
        if not last.get("count"):
            return "too few anchors to correct accuracies"
        error = last.get("error")
        return f"corrected by {last['count']} anchors" + ("" if error is None else f", {100 * error:.1f} points off")


@dataclass(frozen=True)
class Run:
    """A run directory. table, front: of result.json and front.json; None, and no layers, until the run is finished.

    layers: of the teacher: name, kind, whether the student has it, and in teacher and student the channels and kernel.
    """

    path: Path
    stages: list[Stage]
    settings: Line
    table: Line | None
    front: dict[str, list[Line]] | None
    layers: list[Line]


def read_run(path: Path) -> Run:
    """Read a run directory, one of an unfinished run as well. Raises BadInput where it is none."""
    if not (path / "history.jsonl").is_file():
        raise BadInput(f"{path}: no history.jsonl in it; give the directory of a run")
    stages = _read(path / "history.jsonl", _stages)
    if not any(stage.of("rollout", "anchor") for stage in stages):
        raise BadInput(f"{path}: nothing was evaluated in this run yet")
    settings = _read(path / "config.json", parse_json) or {}
    table, front = (_read(path / name, parse_json) for name in ("result.json", "front.json"))
    return Run(path, stages, settings, table, front, _read(path / "architecture.json", _layers) or [])


def _read(path: Path, read: Callable[[bytes], Any]) -> Any:
    """What `read` makes of a file; None where there is none."""
    try:
        return read(path.read_bytes())
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: not written by n2n-fast run") from None


def _stages(content: bytes) -> list[Stage]:
    stages: dict[str, Stage] = {}
    for text in content.splitlines(keepends=True):
        if not text.endswith(b"\n"):  # the last one may be half written
            break
        line = {"kind": None, **parse_json(text)}
        stages.setdefault(line["stage"], Stage(line["stage"])).lines.append(line)
    return list(stages.values())


def _layers(content: bytes) -> list[Line]:
    """The first stage's layers beside what the last stage left of them, which knows only those that were kept."""
    stages = [dict(zip(stage["layers"], stage["sizes"], strict=True)) for stage in parse_json(content)]
    layers = []
    for name, first in stages[0].items() if stages else ():
        last = stages[-1].get(name, {**first, "kept": False})
        sizes = {size: (first[size][0], last[size][1]) for size in ("channels", "kernel")}
        layers.append({"name": name, "kind": first["kind"], "kept": first["kept"] and last["kept"], **sizes})
    return layers


def best_so_far(rollouts: Iterable[Line]) -> list[float]:
    """After each rollout that gave an accuracy the reward of the best, feasible before infeasible."""
    return [reward for _, reward in accumulate(((line["feasible"], line["reward"]) for line in rollouts), max)]


def write_report(path: Path) -> list[Path]:
    """Write report.png and report.html into a run directory, finished or not; gives both paths.

    Raises BadInput where there is no run, and without matplotlib.
    """
    run = read_run(path)
    if not _can_draw():
        raise BadInput("report needs matplotlib: pip install 'n2n_fast[plot]'")
    drawn = _picture(run)
    png, page = path / "report.png", path / "report.html"
    for file, content in ((png, drawn), (page, _page(run, drawn).encode(errors="replace"))):
        write_whole(file, content)
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
    """A run as one PNG: rewards, costs, expectations, predictions, a row each, and layers; table and legends beside."""
    from matplotlib.figure import Figure

    layers = [layer for layer in run.layers if layer["kind"] in DRAWN_KINDS and layer["channels"][0]]
    first, last = run.stages[0].name, run.stages[-1].name  # a single stage takes both columns
    panels = [[f"reward of {first}", f"reward of {last}", "table"], [*COSTS, "legend of costs"]]
    panels += [[f"expectation of {first}", f"expectation of {last}", "legend of expectations"]]
    panels += [[f"prediction of {first}", f"prediction of {last}", "legend of predictions"]]
    panels += [["layers"] * 3] if layers else []
    figure: Any = Figure(figsize=(16, 21 if layers else 16.5), dpi=100, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    axes = figure.subplot_mosaic(panels, width_ratios=(3, 3, 2))
    for stage in run.stages:
        _draw_rewards(axes[f"reward of {stage.name}"], stage)
        _draw_expectations(axes[f"expectation of {stage.name}"], stage)
        _draw_predictions(axes[f"prediction of {stage.name}"], stage)
    for by in COSTS:
        _draw_costs(axes[by], run, by)
    table = "not finished yet" if run.table is None else result_table(run.table)
    axes["table"].set_axis_off()
    axes["table"].text(0, 1, table, family="monospace", fontsize=SMALL, va="top", ha="left", linespacing=1.6)
    for row in panels[1:4]:
        _put_legend(axes[row[2]], [axes[name] for name in row[:2]])
    if layers:
        _draw_layers(axes["layers"], layers)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": "n2n-fast"})
    return file.getvalue()


def _put_legend(place: Axes, panels: Iterable[Axes]) -> None:
    """One legend for several panels, in a place of its own."""
    place.set_axis_off()
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    place.legend(entries.values(), entries.keys(), loc="upper left", fontsize=SMALL, frameon=False)


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
    rollouts = list(enumerate(stage.of("rollout"), 1))
    evaluated = [(n, line) for n, line in rollouts if line[PREDICTED] is not None]
    for feasible, label, style in (
        (True, "rollout", {"marker": "o", "color": ACCENT}),
        (False, "rollout, misses a limit", {"marker": "x", "color": GREY}),
    ):
        chosen = [(n, line["reward"]) for n, line in evaluated if line["feasible"] == feasible]
        _scatter(axes, chosen, label, s=18, alpha=0.75, **style)
    failed = [(n, 0.02) for n, line in rollouts if line[PREDICTED] is None]
    _scatter(axes, failed, "degenerate (−1, off the scale)", marker="v", s=22, facecolor="none", edgecolor=GREY,
             transform=axes.get_xaxis_transform())  # fmt: skip
    if evaluated:
        best = best_so_far(line for _, line in evaluated)
        axes.step([n for n, _ in evaluated], best, where="post", color=INK, linewidth=1.6, label="best so far")
    for i, done in enumerate(stage.learned()):
        label = "" if i else "predictor learned"
        axes.axvline(done + 0.5, color=GREY, linestyle=":", linewidth=1.4, label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=SMALL, framealpha=0.9)


def _draw_costs(axes: Axes, run: Run, by: str) -> None:
    """Accuracy against params or MACs: predicted and trained students, the front, the teacher, the final student."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    _style(axes, f"validation accuracy against {COSTS[by]}", COSTS[by], "validation accuracy", [axes.yaxis])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))  # 50 k, 2 M
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    for stage in run.stages:
        marker = MARKERS.get(stage.name, "o")
        predicted = [(line[by], line[PREDICTED]) for line in stage.of("rollout") if line[PREDICTED] is not None]
        _scatter(axes, predicted, f"{stage.name}: accuracy only predicted", marker=marker, s=20, linewidth=0.9,
                 facecolor="none", edgecolor=GREY)  # fmt: skip
        trained = [(line[by], line[TRAINED]) for line in stage.of("anchor", "final") if line[TRAINED] is not None]
        _scatter(axes, trained, f"{stage.name}: trained fully", marker=marker, s=34, color=ACCENT)
    if run.front:
        front = zip(*((point[by], point["accuracy"]) for point in run.front[by]), strict=True)
        axes.step(*front, where="post", color=INK, linewidth=1.2, linestyle="--", label="Pareto front")
    for name, marker, size in (("teacher", "*", 230), ("student", "D", 110)) if run.table else ():
        point = run.table[name][by], run.table[name]["validation_accuracy"]  # type: ignore[index]
        _scatter(axes, [point], name, marker=marker, s=size, facecolor="none", edgecolor=INK, linewidth=1.6, zorder=5)


def _draw_expectations(axes: Axes, stage: Stage) -> None:
    """What was expected of students before they were evaluated, and what was found then; the last half apart."""
    expected = [line for line in stage.of("rollout") if line[EXPECTED] is not None and line[SHORT] is not None]
    new = [line for line in expected if not line["cached"]]
    first, last = new[: len(new) // 2], new[len(new) // 2 :]
    ranks = rank_correlation([(line[EXPECTED], line[SHORT]) for line in last])
    told = "" if ranks is None else f", rank correlation {ranks:.2f} in the last half"
    _style(axes, f"{stage.name}: what was expected{told}", "accuracy expected before the evaluation",
           "accuracy found by it", [axes.xaxis, axes.yaxis])  # fmt: skip
    for label, lines, color in (("first half", first, LIGHT), ("last half", last, ACCENT)):
        if lines:
            x, y, error = zip(*((line[EXPECTED], line[SHORT], line[DEVIATION]) for line in lines), strict=True)
            axes.errorbar(x, y, xerr=error, fmt="o", markersize=3, color=color, ecolor=LIGHT, label=f"rollout, {label}")
    if new:
        low, high = axes.get_ylim()
        axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1, label="as expected")


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, of pairs; None where there are too few or all are alike."""
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return None
    ranks = np.argsort(np.argsort(np.array(pairs), 0, kind="stable"), 0)
    return float(np.corrcoef(ranks.T)[0, 1])


def _draw_predictions(axes: Axes, stage: Stage) -> None:
    """What accuracies when evaluated were taken to mean, with the error then, and what anchors came to."""
    _style(axes, f"{stage.name}: {stage.correction()}", "accuracy when evaluated", "accuracy after a full training",
           [axes.xaxis, axes.yaxis])  # fmt: skip
    predicted = [line for line in stage.of("rollout") if line[PREDICTED] is not None]
    if predicted:
        x, y, error = zip(*((line[SHORT], line[PREDICTED], line[ERROR] or 0.0) for line in predicted), strict=True)
        axes.errorbar(x, y, error, fmt="o", markersize=3, color=GREY, ecolor=LIGHT, label="rollout, ± standard error")
    anchors = [(line[SHORT], line[TRAINED]) for line in stage.of("anchor") if None not in (line[SHORT], line[TRAINED])]
    _scatter(axes, anchors, "anchor, trained", marker="o", s=42, color=ACCENT, zorder=4)
    if predicted or anchors:
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1, label="no change")


def _draw_layers(axes: Axes, layers: Sequence[Line]) -> None:
    """Teacher and student side by side: an outline as high as the teacher's layer is wide, a bar for the student's."""
    _style(axes, "convolutions and linear layers, teacher and student", "", "output channels")
    numbers = range(len(layers))
    axes.set_yscale("log", base=2)
    heights = [layer["channels"][0] for layer in layers]
    axes.bar(numbers, heights, width=0.8, facecolor="none", edgecolor=INK, linewidth=0.8, label="teacher")
    widths = [layer["channels"][1] if layer["kept"] else 0 for layer in layers]
    axes.bar(numbers, widths, width=0.56, color=ACCENT, label="student")
    removed = [(n, 0.06) for n, layer in enumerate(layers) if not layer["kept"]]
    _scatter(axes, removed, REMOVED, marker="x", s=40, color=INK, transform=axes.get_xaxis_transform())
    shown = slice(None, None, 1 + len(layers) // 130)
    size = max(4.5, min(SMALL, 900 / len(layers)))
    axes.set_xticks(numbers[shown], [layer["name"] for layer in layers[shown]], rotation=90, fontsize=size)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(1, 2 * max(heights))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.grid(visible=False, axis="x")
    axes.legend(fontsize=SMALL, framealpha=0.9, ncols=3, loc="upper left")


# The page


def _page(run: Run, drawn: bytes) -> str:
    """A run as one HTML page that needs no other file."""
    title = html.escape(f"n2n_fast: {run.path.resolve().name}")
    body = [f"<h1>{title}</h1>"]
    if run.table is None:
        body.append("<p>This run is not finished yet.</p>")
    else:
        body += ["<h2>Teacher and student</h2>", _html_table(result_rows(run.table))]
        data = "\n".join([*doubts(run.table), *data_lines(run.table["data"])])
        body.append(f"<pre>{html.escape(data)}</pre>")
    source = base64.b64encode(drawn).decode()
    body.append(f'<img alt="rewards, accuracies and layers of the run" src="data:image/png;base64,{source}">')
    for by, points in (run.front or {}).items():
        body += [f"<h2>Pareto front: accuracy against {COSTS[by]}</h2>", _html_table(_front_rows(points))]
    for stage in run.stages:
        body += [f"<h2>Anchors of {html.escape(stage.name)}</h2>", f"<p>Accuracies are {stage.correction()}.</p>"]
        body.append(_html_table(_anchor_rows(stage)))
    if run.layers:
        body += ["<h2>Layers</h2>", _html_table(_layer_rows(run.layers))]
    settings = html.escape(json.dumps(run.settings, indent=2))
    body.append(f"<details><summary>Settings</summary><pre>{settings}</pre></details>")
    return "\n".join([
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head>\n<body>",
        *body,
        "</body></html>\n",
    ])  # fmt: skip


def _html_table(rows: Rows) -> str:
    """Rows as a table, the first one as its head; those of removed layers are struck out."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        start = '<tr class="removed">' if REMOVED in row else "<tr>"
        lines.append(start + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "\n".join(["<table>", *lines, "</table>"])


def _sizes(line: Mapping[str, Any]) -> tuple[str, str, str]:
    return line["architecture"], f"{line['params']:,}", f"{line['macs']:,}"


def _front_rows(points: Iterable[Line]) -> Rows:
    rows: Rows = [("stage", "architecture", "params", "MACs", "validation accuracy", "")]
    for point in points:
        known = "trained fully" if point["trained"] else "predicted"
        rows.append((point["stage"], *_sizes(point), percent(point["accuracy"]), known))
    return rows


def _anchor_rows(stage: Stage) -> Rows:
    head = ("architecture", "params", "MACs", "when evaluated", "trained fully")
    anchors = stage.of("anchor")
    return [head, *((*_sizes(line), percent(line[SHORT]), percent(line[TRAINED])) for line in anchors)]


def _layer_rows(layers: Iterable[Line]) -> Rows:
    rows: Rows = [("layer", "kind", "channels, teacher", "student", "kernel, teacher", "student")]
    for layer in layers:
        before, after = (str(count or "") for count in layer["channels"])
        kernel, cropped = ("×".join(map(str, size)) for size in layer["kernel"])
        student = (after, cropped) if layer["kept"] else (REMOVED, "")
        rows.append((layer["name"], layer["kind"], before, student[0], kernel, student[1]))
    return rows
