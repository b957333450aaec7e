"""What commands print as aligned text: results, exports, plans, layers."""

from dataclasses import asdict
from typing import Any

from n2n_fast.cli.export import Exported
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace

Rows = list[tuple[str, ...]]


def result_table(table: dict[str, Any]) -> str:
    """The final table of result.json as aligned text: teacher and student side by side."""
    return "\n".join([_aligned(result_rows(table)), *doubts(table)])


def doubts(table: dict[str, Any]) -> list[str]:
    """What the marks in the table mean, if there are any."""
    seen = table["teacher"].get("may_have_seen", ())
    return [f"* the teacher may have been trained on the {' and '.join(seen)} images"] if seen else []


def result_rows(table: dict[str, Any]) -> Rows:
    networks = table["teacher"], table["student"]
    parts = [part for part in ("validation", "test") if networks[1][f"{part}_accuracy"] is not None]
    accuracies = [(f"{part} accuracy", *(_with_error(network, part) for network in networks)) for part in parts]
    if _is_uneven(networks[1], parts):
        accuracies += [
            (f"{part}, balanced", *(percent(network[f"{part}_balanced_accuracy"]) for network in networks))
            for part in parts
        ]
    return [
        ("", "teacher", "student"),
        ("params", *(f"{network['params']:,}" for network in networks)),
        ("MACs", *(f"{network['macs']:,}" for network in networks)),
        ("size on disk", *(f"{network['bytes'] / 1e6:.2f} MB" for network in networks)),
        ("latency, 1 image", *(f"{network['latency_ms']:.2f} ms" for network in networks)),
        ("latency, 64 images", *(f"{network['latency_ms_64']:.2f} ms" for network in networks)),
        *accuracies,
        ("compression", "1.0x", f"{table['compression']:.1f}x"),
    ]


def _with_error(network: dict[str, Any], part: str) -> str:
    """An accuracy with its standard error; with a mark where the network may have been trained on these images."""
    mark = "*" if part in network.get("may_have_seen", ()) else ""
    return f"{percent(network[f'{part}_accuracy'])} ± {100 * network[f'{part}_standard_error']:.2f}{mark}"


def _is_uneven(network: dict[str, Any], parts: list[str]) -> bool:
    """Whether plain and balanced accuracy tell different things."""
    return any(
        abs(network[f"{part}_accuracy"] - network[f"{part}_balanced_accuracy"]) > 2 * network[f"{part}_standard_error"]
        for part in parts
    )


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


def plan_table(plan: dict[str, Any]) -> str:
    """A search to come, as aligned text."""
    rows: Rows = [("stage", "choices", "architectures, at most")]
    for name, count in plan["choices"].items():
        rows.append((name, str(count), f"10^{plan['architectures_log10'][name]:.1f}"))
    told = [
        f"teacher: {plan['params']:,} params, {plan['macs']:,} MACs, validation accuracy {percent(plan['accuracy'])}",
        f"\n{_aligned(rows)}\n",
        f"{plan['rollouts']} rollouts of {plan['rollout_seconds']:.2f} s",
        f"{plan['updates']} updates, after which the policy learns for {plan['learning_seconds']:.2f} s",
        f"full trainings of {plan['training_steps']:,} steps of {1e3 * plan['step_seconds']:.1f} ms",
        f"about {_duration(plan['seconds'])} here; nothing was written",
    ]
    for name, limit in plan["limits"].items():
        gap = plan["gaps"].get(name)
        met = "can be met" if gap is None else f"cannot be met, the smallest student misses it by {gap:.1%}"
        told.append(f"limit of {limit:,} on {name}: {met}")
    return "\n".join([*told, *(f"warning: {warning}" for warning in plan["warnings"])])


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
        notes = (removable, width, "yes" if crops else "", f"sliced: {layer.fit_note}" if layer.fit_note else "")
        rows.append((layer.name, layer.kind, *sizes, str(layer.out_channels), skip, groups, *notes))
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


def percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


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
