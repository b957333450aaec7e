"""Teachers in files of torch.save: out of their wrappers, in the architecture that is asked for or inferred."""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from n2n_fast.files.errors import BadInput, described, raise_device_fault
from n2n_fast.files.inputs import input_of
from n2n_fast.files.safe_load import WantsCode, parse_json, read_tensors, read_trusted
from n2n_fast.networks.tracing import unwrapped
from n2n_fast.training.architectures import differences, infer_architecture, options_for, shapes_of
from n2n_fast.training.teachers import create, digest

MADE_BY = "n2n-fast teach"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "teacher")
_PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "net.")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that GoogLeNet and Inception use in training alone


def load_teacher(path: str | Path, arch: str | None = None, allow_pickle: bool = False) -> nn.Module:
    """The network in a file, float32, in eval mode, on the CPU.

    arch: a name that `create` knows, or `package.module:factory`; inferred where it is None. allow_pickle: also read
    files that run code when they are read, such as a pickled module; only for files that you trust. Raises BadInput,
    also where a weight is NaN or infinite.
    """
    content = _read(path, allow_pickle)
    if isinstance(content, nn.Module):
        model = unwrapped(content)
        _state_dict_in(model.state_dict(), path)
    else:
        state = _state_dict_in(content, path)
        model = _from_factory(arch, state, path) if arch and ":" in arch else _from_name(arch, state, path)
    return model.float().eval()


def companion(path: Path) -> Path:
    """The file that says how a teacher's file was made: teacher.pt.json for teacher.pt."""
    return path.with_name(f"{path.name}.json")


def read_companion(file: Path) -> dict[str, Any] | None:
    """What stands in a companion; None where it is not by `n2n-fast teach`."""
    try:
        content = parse_json(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("made_by") == MADE_BY else None


def made_from(path: str | Path, model: nn.Module) -> dict[str, Any] | None:
    """How the teacher in a file was made, by its companion, where that tells of these very weights; otherwise None.

    model: as `load_teacher` gives it. "data" is as `ImageData.described` gives it: what the teacher has seen, and its
    preprocessing.
    """
    path = Path(path)
    for file in (companion(path), path.with_suffix(".json")):  # as it was named before
        made = read_companion(file)
        if made and made.get("weights") == digest(model) and _is_description(made.get("data")):
            return made
    return None


def _is_description(data: Any) -> bool:
    """Whether it has what can be relied on in a description of data."""
    try:
        input_of(data)
    except BadInput:
        return False
    return isinstance(data.get("name"), str) and isinstance(data.get("digest"), str)


def _read(path: str | Path, allow_pickle: bool) -> Any:
    if allow_pickle:
        return read_trusted(path)
    try:
        return read_tensors(path)
    except WantsCode as error:
        raise BadInput(
            f"{error}; save model.state_dict() by torch.save instead, or add --allow-pickle if you trust it"
        ) from None


def _state_dict_in(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict within a file's content, its weights checked."""
    while isinstance(content, Mapping) and not _is_state_dict(content):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping | nn.Module)), None)
        if inner is None:
            keys = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
            raise BadInput(f"{path} holds no state dict but {keys}; save model.state_dict()")
        content = inner.state_dict() if isinstance(inner, nn.Module) else inner
    if not isinstance(content, Mapping):
        raise BadInput(f"{path} holds a {type(content).__name__}; save model.state_dict()")
    for key, value in content.items():
        if value.is_complex():
            raise BadInput(f"{path}: {key} holds complex numbers; give the weights of a network")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise BadInput(f"{path}: {key} holds NaN or infinite values; the weights are damaged, give another file")
    return dict(content)


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that DataParallel, compile and training frameworks put before every key."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while prefix := next((p for p in _PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _from_name(arch: str | None, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    state = {key: value for key, value in _without_prefixes(state).items() if not key.startswith(_AUXILIARY)}
    try:
        name, options = infer_architecture(state) if arch is None else (arch, options_for(arch, state))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    if options["classes"] < 1 or options["channels"] < 1:
        raise BadInput(f"{path}: {options['classes']} classes and {options['channels']} channels; give a whole network")
    return _filled(create(name, **options), state)


def _filled(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The network with weights that are known to fit; counters of batches, which no evaluation reads, need not."""
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in own and own[k].shape == v.shape})
    return model


def _from_factory(arch: str, state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """The module that `package.module:factory` makes, with the weights of `state`."""
    factory = _import_factory(arch)
    try:
        model = factory()
    except Exception as error:  # the factory is the user's: whatever it raises is about what it was handed
        raise_device_fault(error)
        raise BadInput(f"{arch} failed ({described(error)})") from error
    if not isinstance(model, nn.Module):
        raise BadInput(f"{arch} gives a {type(model).__name__}; it must give a torch.nn.Module")
    text = ""
    for tried in (state, _without_prefixes(state)):
        share, text = differences(shapes_of(model.state_dict()), shapes_of(tried))
        if not share:
            return _filled(model, tried)
    raise BadInput(f"{path} does not fit {arch}: {text}")


def _import_factory(arch: str) -> Callable[[], Any]:
    """The object behind `package.module:factory`; modules in the current directory can be imported."""
    module, _, name = arch.partition(":")
    path = sys.path.copy()
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code
        raise BadInput(f"{arch} cannot be imported ({described(error)}); write package.module:factory") from error
    finally:
        sys.path[:] = path
    if not callable(factory):
        raise BadInput(f"{arch} is a {type(factory).__name__}; it must be a class or function that gives a module")
    return factory  # type: ignore[no-any-return]
