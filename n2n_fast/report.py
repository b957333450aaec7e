"""Tables of what a search gave."""

from typing import Any

from n2n_fast.space import ArchitectureSpace


def result_table(table: dict[str, Any]) -> str:
    """The final table of result.json as aligned text: teacher and student side by side."""
    teacher, student = table["teacher"], table["student"]
    rows = [
        ("", "teacher", "student"),
        *((name, f"{teacher[key]:,}", f"{student[key]:,}") for name, key in (("params", "params"), ("MACs", "macs"))),
        ("size on disk", *(f"{part['bytes'] / 1e6:.2f} MB" for part in (teacher, student))),
        ("latency, 1 image", *(f"{part['latency_ms']:.2f} ms" for part in (teacher, student))),
        ("latency, 64 images", *(f"{part['latency_ms_64']:.2f} ms" for part in (teacher, student))),
        ("validation accuracy", *(_percent(part["validation_accuracy"]) for part in (teacher, student))),
        ("test accuracy", *(_percent(part["test_accuracy"]) for part in (teacher, student))),
        ("compression", "1.0x", f"{table['compression']:.1f}x"),
    ]
    return _aligned(rows)


def layer_table(space: ArchitectureSpace) -> str:
    """The layers as the policies see them, aligned text."""
    rows: list[tuple[str, ...]] = [
        ("layer", "kind", "k", "s", "p", "n", "skip", "removable", "shrinkable"),
    ]
    for layer in space.layers:
        sizes = ("x".join(map(str, size)) for size in (layer.kernel_size, layer.stride, layer.padding))
        skip = f"{layer.skip_start}/{layer.skip_end}" if layer.skip_start else ""
        removable = "yes" if layer.removable else f"no: {layer.note}"
        rows.append((layer.name, layer.kind, *sizes, str(layer.out_channels), skip, removable, _yes(layer.shrinkable)))
    return _aligned(rows, left=(0, 1, 7))


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


def _yes(value: bool) -> str:
    return "yes" if value else ""


def _aligned(rows: list[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
