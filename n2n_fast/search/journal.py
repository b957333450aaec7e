"""What recorded work must look like to be taken for done; of history.jsonl, a line that does not is done again."""

import math
from typing import Any

_POSITION = {"kind": str, "stage": str, "update": int, "index": int}


def is_whole(line: Any) -> bool:
    """Whether a line of history.jsonl holds an evaluation, or an anchor's training, as the search writes it."""
    if not isinstance(line, dict) or any(type(line.get(name)) is not kind for name, kind in _POSITION.items()):
        return False
    needed: tuple[str, ...] = ("architecture", "proxy_accuracy", "accuracy", "latency", "seconds", "error")
    if line["kind"] == "anchor":
        needed = (*needed, "final_accuracy", "training_seconds")
    return (
        line["kind"] in ("rollout", "anchor")
        and all(name in line for name in needed)
        and _is_optional_text(line["architecture"])
        and all(line.get(name) is None or _is_share(line[name]) for name in ("accuracy", "final_accuracy"))
        and is_evaluation(line["proxy_accuracy"], line["latency"], line["seconds"], line["error"])
    )


def is_evaluation(accuracy: Any, latency: Any, seconds: Any, error: Any) -> bool:
    """Whether these are the fields of an Evaluation: an accuracy or the error that tells why there is none."""
    return (
        (accuracy is None or _is_share(accuracy))
        and (latency is None or _is_number(latency))
        and isinstance(seconds, dict)
        and all(_is_number(time) for time in seconds.values())
        and _is_optional_text(error)
        and (accuracy is None) == (error is not None)
    )


def _is_optional_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_share(value: Any) -> bool:
    return _is_number(value) and bool(value <= 1)
