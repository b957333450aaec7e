"""Students by torch.export, read without running code from their files.

torch.export.load trusts what it reads: it unpickles without limits, resolves any name below `torch`, evaluates
expressions and writes names into source that it compiles. A student is therefore made anew in memory, of those parts
alone that were understood, before torch sees it.
"""

import io
import json
import logging
import math
import re
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from n2n_fast.files.errors import BadInput, first_line
from n2n_fast.files.inputs import INPUT, input_from
from n2n_fast.files.safe_load import WantsCode, check_archive, parse_json, tensors_in

_NAME = re.compile(r"[\w.]*", re.ASCII)
_TEXT = re.compile(r"[\w ,.>+-]{0,200}", re.ASCII)  # such as a padding mode or the equation of an einsum
# Sizes of a batch, in torch's own way of writing or in sympy's. No powers: those of numbers can be endless.
_EXPRESSION = re.compile(
    r"(?:Symbol\('[su]\d+'|[su]\d+|-?\d{1,18}|Symbol|Integer|Add|Mul|FloorDiv|CeilDiv|CleanDiv|Mod|Max|Min"
    r"|(?:positive|integer|nonnegative|evaluate)=(?:True|False)|\*(?!\*)|[-+/(), ]){1,64}"
)
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+")
_PLAIN_OPERATORS = {
    *(f"_operator.{name}" for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem")),
    *(f"_operator.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")),
    *(f"torch.sym_{name}" for name in ("int", "float", "max", "min", "not", "ite")),
    *(f"math.{name}" for name in ("ceil", "floor", "trunc")),
}
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict")
_NOT_NEEDED: dict[str, Any] = {"guards_code": [], "metadata": {}, "torch_version": "", "treespec_namedtuple_fields": {}}
_REFUSED = ("as_graph", "as_custom_obj", "as_operator")
_SMALL = 64  # bytes of a member that holds a version or a format


def read_student(path: Path) -> fx.GraphModule:
    """The module of a student.pt2; its meta["input"] says what it takes, or None.

    Raises BadInput for a file that is none, or asks for more than a student needs.
    """
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_archive(archive, len(content))
            members = {name: archive.read(name) for name in archive.namelist()}
        told = next((members.pop(name) for name in list(members) if name.endswith(f"/{INPUT}")), None)
        takes = None if told is None else input_from(told)
        student = _loaded(_made_anew(members))
        student.meta["input"] = takes
        return student
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except zipfile.BadZipFile:
        raise BadInput(f"{path}: not a student, or a truncated one; run the search again") from None
    except Exception as error:  # noqa: BLE001 - a damaged program can fail in any way that torch.export can
        raise BadInput(f"{path}: not a readable student ({first_line(error)}); run the search again") from None


def _loaded(content: bytes) -> fx.GraphModule:
    log = logging.getLogger("torch.export")
    before = log.level
    log.setLevel(logging.CRITICAL)  # it logs a traceback before it raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            student = torch.export.load(io.BytesIO(content)).module()
            assert isinstance(student, fx.GraphModule)
            student.eval = types.MethodType(lambda self: self, student)  # type: ignore[method-assign] # torch refuses it
    finally:
        log.setLevel(before)
    for name, value in student.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise BadInput(f"{name} holds NaN or infinite values; run the search again")
    return student


def _made_anew(members: dict[str, bytes]) -> bytes:
    """An archive of the same student, of what `_member` understands."""
    file = io.BytesIO()
    sizes = {name.rpartition("/")[2]: len(content) for name, content in members.items()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, _member(name, content, sizes))
    return file.getvalue()


def _member(name: str, content: bytes, sizes: dict[str, int]) -> bytes:
    """A member's content as torch may read it."""
    last = name.rpartition("/")[2]
    if name.endswith("models/model.json") or last == "serialized_exported_program.json":
        return json.dumps(_program(parse_json(content))).encode()
    if name.endswith(("model_weights_config.json", "model_constants_config.json")):
        return json.dumps(_payloads(parse_json(content), sizes)).encode()
    if name.endswith("sample_inputs/model.pt") or last == "serialized_example_inputs.pt":
        tensors_in(content, last)
        return b""  # the images that it was traced with, which nobody needs
    if last in ("serialized_state_dict.pt", "serialized_constants.pt"):
        file = io.BytesIO()
        torch.save(tensors_in(content, last), file)
        return file.getvalue()
    if _PAYLOAD.fullmatch(last) or len(content) <= _SMALL:
        return content
    raise BadInput(f"holds {name[:60]!r}, which no student needs")


def _payloads(config: Any, sizes: dict[str, int]) -> Any:
    """The list of weights or constants, none of them pickled, none larger than its member."""
    for name, payload in config["config"].items():
        path, meta = payload["path_name"], payload["tensor_meta"]
        if payload["use_pickle"] is not False or not _PAYLOAD.fullmatch(path):
            raise WantsCode(f"its {name[:60]!r} is pickled, which could run code")
        if math.prod(size["as_int"] for size in meta["sizes"]) > sizes.get(path, 0):
            raise BadInput(f"its {name[:60]!r} declares more elements than the file holds; run the search again")
    return _cleaned(config)


def _program(program: Any) -> Any:
    """A program without what is noted of its origin; WantsCode where it asks for more than operators on tensors."""
    module = program["graph_module"]
    calls = [entry for entry in module["module_call_graph"] if entry["fqn"] == ""]
    return _cleaned({**program, "graph_module": {**module, "module_call_graph": calls}})


def _cleaned(value: Any, key: str = "") -> Any:
    """Every name and text of a JSON value checked; key: of the value."""
    if isinstance(value, dict):
        if refused := [name for name in value if name in _REFUSED or not _NAME.fullmatch(name)]:
            raise WantsCode(f"has {refused[0][:60]!r} in its program, which could run code")
        return {
            name: _NOT_NEEDED[name] if name in _NOT_NEEDED else _cleaned(part, name) for name, part in value.items()
        }
    if isinstance(value, list):
        return [_cleaned(part, key) for part in value]
    if isinstance(value, str) and not _VALID.get(key, _NAME.fullmatch)(value):
        raise WantsCode(f"has {value[:60]!r} as {key or 'a value'} in its program, which could run code")
    return value


def _is_operator(name: str) -> bool:
    """Whether it is arithmetic, or an ATen operator that has to do with tensors and not with files."""
    if name in _PLAIN_OPERATORS:
        return True
    parts = name.split(".")
    if parts[:3] != ["torch", "ops", "aten"] or len(parts) != 5 or not all(part.isidentifier() for part in parts):
        return False
    found = getattr(getattr(torch.ops.aten, parts[3], None), parts[4], None)
    if not isinstance(found, torch._ops.OpOverload):
        return False
    types = [str(part.type) for part in (*found._schema.arguments, *found._schema.returns)]
    names = [argument.name for argument in found._schema.arguments]
    return any("Tensor" in kind for kind in types) and "filename" not in names


def _is_tree(text: str) -> bool:
    """Whether it describes nested tuples, lists and dictionaries."""
    try:
        _, root = parse_json(text)
        trees = [root]
        for tree in trees:
            keys = parse_json(tree["context"] or "[]")  # of a dictionary
            names = keys is None or (isinstance(keys, list) and all(map(_NAME.fullmatch, keys)))
            if tree["type"] not in _TREES or not names:
                return False
            trees.extend(tree["children_spec"])
    except (ValueError, TypeError, KeyError):
        return False
    return True


_VALID: dict[str, Callable[[str], object]] = {
    "target": _is_operator,
    "expr_str": _EXPRESSION.fullmatch,
    "in_spec": _is_tree,
    "out_spec": _is_tree,
    "as_string": _TEXT.fullmatch,
    "as_strings": _TEXT.fullmatch,
}
