"""States of networks and optimizers from files, put back only where they fit."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

Kind = TypeVar("Kind", int, float)


def checked(value: Any, kind: type[Kind]) -> Kind:
    """`value`, which must be a finite number of this very type and, where it is an int, not negative; ValueError."""
    if type(value) is not kind or value != value or abs(value) == float("inf") or (kind is int and value < 0):
        raise ValueError(f"{str(value)[:40]!r} where a number was expected")
    return value


def load_finite(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict that fits in keys, shapes and kind of numbers, and is finite; RuntimeError or ValueError."""
    for name, value in module.state_dict().items():
        given = state.get(name)
        if isinstance(given, torch.Tensor):
            if given.is_floating_point() != value.is_floating_point() or given.is_complex():
                raise ValueError(f"{name} is of {given.dtype} instead of {value.dtype}")
            if given.is_floating_point() and not bool(given.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinite values")
    module.load_state_dict(state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimizer of the same settings and the same parameters; ValueError otherwise."""
    if not isinstance(state, dict) or not isinstance(state["param_groups"], list):
        raise ValueError("its optimizer is none")
    given = [{**group, "lr": None} for group in state["param_groups"]]
    if given != [{**group, "lr": None} for group in optimizer.state_dict()["param_groups"]]:
        raise ValueError("its optimizer has other settings")
    optimizer.load_state_dict(dict(state))
    for group in optimizer.param_groups:
        group["lr"] = checked(float(group["lr"]), float)
        for parameter in group["params"]:
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"its optimizer's {name} has shape {tuple(value.shape)}")
