"""States of networks and optimizers: taken to the CPU for files, and put back from these only where they fit."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

Kind = TypeVar("Kind", int, float)


def on_cpu(value: Any) -> Any:
    """`value` with every tensor in its dictionaries, lists and tuples on the CPU; those that are there stay the same.

    A file of tensors remembers their device, and cannot be read plainly where there is no such device.
    """
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        moved = copy.copy(value)  # a state dict has attributes besides
        moved.update((key, on_cpu(part)) for key, part in value.items())
        return moved
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(part) for part in value)
    return value


def checked(value: Any, kind: type[Kind]) -> Kind:
    """`value`, which must be a finite number of this very type and, where it is an int, not negative; ValueError."""
    if type(value) is not kind or value != value or abs(value) == float("inf") or (kind is int and value < 0):
        raise ValueError(f"{str(value)[:40]!r} where a number was expected")
    return value


def load_finite(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict that fits in keys, shapes and kind of numbers, and is finite; RuntimeError or ValueError."""
    for name, value in module.state_dict().items():
        saved = state.get(name)
        if isinstance(saved, torch.Tensor):
            if saved.is_floating_point() != value.is_floating_point() or saved.is_complex():
                raise ValueError(f"{name} is of {saved.dtype} instead of {value.dtype}")
            if saved.is_floating_point() and not bool(saved.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinite values")
    module.load_state_dict(state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of an optimizer of the same settings and the same parameters; ValueError otherwise."""
    if not isinstance(state, dict) or not isinstance(state["param_groups"], list):
        raise ValueError("its optimizer is none")
    groups = [{**group, "lr": None} for group in state["param_groups"]]
    if groups != [{**group, "lr": None} for group in optimizer.state_dict()["param_groups"]]:
        raise ValueError("its optimizer has other settings")
    optimizer.load_state_dict(dict(state))
    for group in optimizer.param_groups:
        group["lr"] = checked(float(group["lr"]), float)
        for parameter in group["params"]:
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"its optimizer's {name} has shape {tuple(value.shape)}")
