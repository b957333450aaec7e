"""The picture of a run; told apart by markers and line styles, so that it reads as well in grey."""

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from n2n_fast.cli.record import LayerRecord, RunRecord, StageRecord
from n2n_fast.files.errors import BadInput
from n2n_fast.search.pareto import Point, front

Axes = Any  # matplotlib's; it is imported only where something is drawn

DRAWN_KINDS = ("conv", "depthwise", "linear")
DPI = 100
INK, GREY, LIGHT, ACCENT = "#1a1a1a", "#767676", "#c9c9c9", "#1f5fa8"
MARKERS = {"removal": "o", "shrinkage": "s"}
BIG, SMALL = 11, 8.5  # points


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def picture(record: RunRecord, table: str) -> bytes:
    """A run as one PNG; table: its final table as aligned text. Raises BadInput without matplotlib."""
    if not available():
        raise BadInput("report needs matplotlib: pip install 'n2n_fast[plot]'")
    from matplotlib.figure import Figure

    layers = [layer for layer in record.layers if layer.kind in DRAWN_KINDS and layer.teacher_channels]
    figure: Any = Figure(figsize=(16, 12.5 + 4.5 * bool(layers)), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.1)
    parts = figure.subfigures(2, height_ratios=(12.5, 4.5)) if layers else [figure]
    _panels(parts[0], record, table)
    if layers:
        _layers(parts[1].add_subplot(), layers)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": "n2n-fast"})
    return file.getvalue()


def _panels(figure: Any, record: RunRecord, table: str) -> None:
    """Rewards, costs and predictors, a row each; beside them the table and the legends."""
    grid = figure.add_gridspec(3, 3, width_ratios=(3, 3, 2))
    panels: dict[int, list[Axes]] = {
        row: [figure.add_subplot(grid[row, columns]) for columns in _columns(count)]
        for row, count in enumerate((len(record.stages), 2, len(record.stages)))
    }
    for stage, rewards, predictor in zip(record.stages, panels[0], panels[2], strict=True):
        _rewards(rewards, stage)
        _predictor(predictor, stage)
    for axes, by in zip(panels[1], ("params", "macs"), strict=True):
        _costs(axes, record, by)
    _final_table(figure.add_subplot(grid[0, 2]), table)
    for row in (1, 2):
        _legend(figure.add_subplot(grid[row, 2]), panels[row])


def _columns(count: int) -> list[slice]:
    """Where one or two panels of a row stand in the grid's first two columns; the last one is for text."""
    return [slice(0, 2)] if count == 1 else [slice(0, 1), slice(1, 2)]


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=BIG, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=SMALL + 1)
    axes.set_ylabel(y, fontsize=SMALL + 1)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color=LIGHT, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def _counted(axis: Any) -> None:
    """Label a logarithmic axis of counts at a few round numbers: 50 k, 2 M."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(EngFormatter())
    axis.set_minor_formatter(NullFormatter())


def _rewards(axes: Axes, stage: StageRecord) -> None:
    """Each rollout's reward and the best so far; degenerate ones at the edge; lines where the predictor learned."""
    _style(axes, f"{stage.name}: reward", "rollouts", "reward")
    numbers = range(1, len(stage.rollouts) + 1)
    marks = {(True, True): ("o", ACCENT, "rollout"), (True, False): ("x", GREY, "rollout, misses a limit")}
    for (evaluated, feasible), (marker, color, label) in marks.items():
        chosen = [
            (n, line["reward"])
            for n, line in zip(numbers, stage.rollouts, strict=True)
            if (line["predicted_accuracy"] is not None) == evaluated and line["feasible"] == feasible
        ]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), marker=marker, s=18, color=color, alpha=0.75, label=label)
    failed = [n for n, line in zip(numbers, stage.rollouts, strict=True) if line["predicted_accuracy"] is None]
    if failed:
        edge = axes.get_xaxis_transform()
        axes.scatter(failed, [0.02] * len(failed), marker="v", s=22, facecolor="none", edgecolor=GREY, transform=edge,
                     label="degenerate (−1, off the scale)")  # fmt: skip
    best = [(n, value) for n, value in zip(numbers, stage.best(), strict=True) if value is not None]
    if best:
        axes.step(*zip(*best, strict=True), where="post", color=INK, linewidth=1.6, label="best so far")
    for i, done in enumerate(sorted({done for done, _ in stage.predictors})):
        label = "" if i else "predictor learned"
        axes.axvline(done + 0.5, color=GREY, linestyle=":", linewidth=1.4, label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=SMALL, framealpha=0.9)


def _costs(axes: Axes, record: RunRecord, by: str) -> None:
    """Accuracy against params or MACs: expected and trained students, the front, the teacher, the final student."""
    name = {"params": "params", "macs": "MACs"}[by]
    _style(axes, f"validation accuracy against {name}", name, "validation accuracy")
    axes.set_xscale("log")
    _counted(axes.xaxis)
    _percent(axes.yaxis)
    for stage in record.stages:
        marker = MARKERS.get(stage.name, "o")
        for trained, faces in ((False, {"facecolor": "none", "edgecolor": GREY}), (True, {"color": ACCENT})):
            points = [point for point in stage.points() if point.trained == trained]
            label = f"{stage.name}: trained fully" if trained else f"{stage.name}: accuracy only expected"
            if points:
                axes.scatter(*_coordinates(points, by), marker=marker, s=34 if trained else 20, linewidth=0.9, **faces,
                             label=label)  # fmt: skip
    best = front(record.points(), by)
    axes.step(*_coordinates(best, by), where="post", color=INK, linewidth=1.2, linestyle="--", label="Pareto front")
    for part, marker in (("teacher", "*"), ("student", "D")) if record.table else ():
        held = record.table[part]  # type: ignore[index]
        axes.scatter([held[by]], [held["validation_accuracy"]], marker=marker, s=230 if marker == "*" else 110,
                     facecolor="none", edgecolor=INK, linewidth=1.6, zorder=5, label=part)  # fmt: skip


def _coordinates(points: Sequence[Point], by: str) -> tuple[list[int], list[float]]:
    return [getattr(point, by) for point in points], [point.accuracy for point in points]


def _predictor(axes: Axes, stage: StageRecord) -> None:
    """What accuracies after a few steps are taken to mean: the line, its standard error, its anchors."""
    found, error = stage.predictor, stage.predictor.error
    title = "too few anchors to predict" if not found.count else f"predicted from {found.count} anchors"
    told = "" if error is None else f"; leave-one-out error {100 * error:.1f} points"
    _style(axes, f"{stage.name}: {title}{told}", "accuracy after a few steps", "accuracy after a full training")
    anchors = [a for a in stage.anchors if a["full_accuracy"] is not None and a["short_accuracy"] is not None]
    seen = [line["short_accuracy"] for line in (*stage.rollouts, *anchors) if line["short_accuracy"] is not None]
    if not seen:
        return
    low, high = max(0.0, min(seen) - 0.02), min(1.0, max(seen) + 0.02)
    across = [low + (high - low) * i / 100 for i in range(101)]
    of_anchors = replace(found, remaining=1.0)
    line, errors = zip(*(of_anchors(x) for x in across), strict=True)
    bounds = [[min(1.0, max(0.0, y + sign * e)) for y, e in zip(line, errors, strict=True)] for sign in (-1, 1)]
    axes.fill_between(across, *bounds, color=LIGHT, alpha=0.6, linewidth=0, label="± its standard error")
    axes.plot(across, line, color=INK, linewidth=1.6, label="predicted")
    if found.remaining < 1:
        final = [found(x)[0] for x in across]
        axes.plot(across, final, color=INK, linestyle="-.", linewidth=1.2, label="after the final training")
    axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1, label="no change")
    pairs = [(line["short_accuracy"], line["full_accuracy"]) for line in anchors]
    if pairs:
        axes.scatter(*zip(*pairs, strict=True), marker="o", s=42, color=ACCENT, zorder=4, label="anchor")
    axes.scatter(seen, [0.015] * len(seen), marker="|", s=60, color=GREY, transform=axes.get_xaxis_transform(),
                 label="students evaluated")  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        _percent(axis)


def _layers(axes: Axes, layers: Sequence[LayerRecord]) -> None:
    """Teacher and student side by side: an outline as high as the teacher's layer is wide, a bar for the student's."""
    _style(axes, "convolutions and linear layers, teacher and student (channels; above: kernel)", "", "output channels")
    numbers = range(len(layers))
    heights = [layer.teacher_channels or 0 for layer in layers]
    axes.set_yscale("log", base=2)
    axes.bar(numbers, heights, width=0.8, facecolor="none", edgecolor=INK,
             linewidth=0.8, label="teacher")  # fmt: skip
    kept = [(n, layer.channels) for n, layer in zip(numbers, layers, strict=True) if layer.kept]
    axes.bar(*zip(*kept, strict=True), width=0.56, color=ACCENT, label="student")
    gone = [n for n, layer in zip(numbers, layers, strict=True) if not layer.kept]
    edge = axes.get_xaxis_transform()
    if gone:
        axes.scatter(gone, [0.06] * len(gone), marker="x", s=40, color=INK, transform=edge, label="removed")
    size = max(4.5, min(SMALL, 900 / len(layers)))
    shown = slice(None, None, 1 + len(layers) // 130)
    axes.set_xticks(numbers[shown], [layer.name for layer in layers[shown]], rotation=90, fontsize=size)
    above = axes.secondary_xaxis("top")
    kernels = [_kernels(layer) for layer in layers[shown]]
    above.set_xticks(numbers[shown], kernels, rotation=90 if len(layers) > 24 else 0, fontsize=size)
    above.spines["top"].set_visible(False)
    above.tick_params(length=0)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(1, 2 * max(heights))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.grid(visible=False, axis="x")
    axes.legend(fontsize=SMALL, framealpha=0.9, ncols=3, loc="upper left")


def _kernels(layer: LayerRecord) -> str:
    """The kernel's size, and what it became where that is smaller: "3×3", "3×3→1×1"."""
    before = "×".join(map(str, layer.teacher_kernel))
    if not layer.kept or layer.kernel == layer.teacher_kernel:
        return before
    return f"{before}→{'×'.join(map(str, layer.kernel))}"


def _final_table(axes: Axes, table: str) -> None:
    axes.set_axis_off()
    axes.text(0, 1, table, family="monospace", fontsize=SMALL, va="top", ha="left", linespacing=1.6)


def _legend(axes: Axes, row: Sequence[Axes]) -> None:
    """The legend of a row's panels in a panel of its own."""
    axes.set_axis_off()
    entries = {label: handle for of in row for handle, label in zip(*of.get_legend_handles_labels(), strict=True)}
    if entries:
        axes.legend(entries.values(), entries.keys(), loc="upper left", fontsize=SMALL, frameon=False, borderaxespad=0)
