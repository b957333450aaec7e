"""Files made to harm: by code in them, by sizes they only claim, by damage, by values no run would write.

As a script it is the victim: it reads command lines as JSON from stdin, runs each as `n2n-fast` in this process, and
prints a line of JSON for each: exit code, stderr, seconds of the processor, peak memory so far.
"""

import collections
import contextlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from n2n_fast.networks.architecture import Architecture

Files = dict[str, bytes]
Cases = Iterator[tuple[str, Any]]  # by name what to write, or what to change
Change = Callable[[Any], Any]  # in place, of a value of JSON
Changes = dict[str, Change]
ADDRESS_SPACE = 16 << 30  # that a bomb at most takes before it is refused memory
MOST_SECONDS = 15  # of the processor, that one command gets


class Call:
    """Pickles to the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def payload(marker: Path) -> Call:
    """A pickle that leaves a file behind if it is run."""
    return Call(os.system, f"touch {marker}")


# Archives


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def members(content: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(parts: Files, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def changed(content: bytes, ending: str, change: Callable[[bytes], bytes]) -> bytes:
    """An archive with the member of this ending changed."""
    return archived({n: change(c) if n.endswith(ending) else c for n, c in members(content).items()})


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    """A torch file with bytes of its pickle replaced."""
    assert old in members(content)["archive/data.pkl"]
    return changed(content, "data.pkl", lambda data: data.replace(old, new))


def lying_archive(*parts: tuple[str, bytes, int, int]) -> bytes:
    """A zip of members (name, data as it is stored, method, size that its directory claims)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data, method, size in parts:
            archive.writestr(name, data)
            info = archive.getinfo(name)
            info.compress_type, info.file_size = method, size
    return file.getvalue()


def zeros_deflated(size: int, before: bytes = b"") -> bytes:
    """A deflate stream of `before` and about `size` zeros: one flushed block, over and over."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(before) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * (size >> 20) + packer.flush()


def truncations(content: bytes) -> Files:
    return {f"first {1 << n} bytes": content[: 1 << n] for n in range((len(content) - 1).bit_length())}


# Files of torch.save, whatever they are meant to be


def torch_files(good: bytes, marker: Path) -> Files:
    """good: a file as it should be."""
    return {**torch_code(marker), **torch_bombs(good), **torch_damage(good), **truncations(good)}


def torch_code(marker: Path) -> Files:
    evil = payload(marker)
    script = f"open({str(marker)!r}, 'w')"
    return {
        **{f"os.system, pickle protocol {protocol}": pickle.dumps(evil, protocol) for protocol in (0, 1, 2, 4, 5)},
        "eval": pickle.dumps(Call(eval, script)),
        "exec by INST": f"(S{script!r}\nibuiltins\nexec\n.".encode(),
        "os.system deep in a torch zip": saved({"a": [({"b": collections.OrderedDict(c=evil)},)]}),
        "os.system beside tensors": saved({"weight": torch.zeros(2), "x": evil}),
        "torch.load of another file": saved({"a": Call(torch.load, str(marker))}),
        "getattr": saved({"a": Call(getattr, Call(__import__, "os"), "system")}),
        "os.system, torch < 1.6": saved({"a": evil}, _use_new_zipfile_serialization=False),
        "a whole module": saved(torch.nn.Linear(2, 2)),
        "numpy object array": saved({"a": np.array([evil], dtype=object)}),
    }


def torch_bombs(good: bytes) -> Files:
    storage, huge = b"K\x04tq\x07Q", b"\x8a\x06" + (2**40).to_bytes(6, "little")
    four, wide = saved({"a": torch.zeros(4)}), (b"K\x04\x85", huge + b"\x85")
    pickled = {"archive/version": b"3\n", "archive/byteorder": b"little"}
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    laughs: list[Any] = []
    for _ in range(60):
        laughs = [laughs, laughs]
    deflated = zeros_deflated(4_000_000_000)
    return {
        "deflated 4 GB": lying_archive(("archive/data.pkl", deflated, zipfile.ZIP_DEFLATED, 4_000 << 20)),
        "stored, claims 4 GB": lying_archive(("archive/data.pkl", b"x" * 64, zipfile.ZIP_STORED, 4_000_000_000)),
        "whole file deflated": archived(members(good), zipfile.ZIP_DEFLATED),
        "storage of 2**40 in 16 bytes": replaced(four, storage, huge + storage[2:]),
        "tensor of 2**40 in 16 bytes": replaced(four, *wide),
        "both of 2**40 in 16 bytes": replaced(replaced(four, storage, huge + storage[2:]), *wide),
        "tensor of -4": replaced(four, b"K\x04\x85", b"\x8a\x01\xfc\x85"),
        "offset of 2**40": replaced(four, b"QK\x00K\x04", b"Q" + huge + b"K\x04"),
        "expanded to 2**20 x 2**20": saved({"conv1.weight": torch.zeros(1, 1).expand(2**20, 2**20)}),
        "sparse of 2**40": saved({"a": torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (2**40,))}),
        "meta of 2**40": saved({"a": torch.empty(2**40, device="meta")}),
        "quantized": saved({"a": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)}),
        "bytearray(2**36)": saved({"a": Call(bytearray, 2**36)}),
        "torch.Tensor(2**36)": saved({"a": Call(torch.Tensor, 2**36)}),
        "nested 200,000 deep": archived({"archive/data.pkl": deep, **pickled}),
        "4,000,000 operations": archived({"archive/data.pkl": b"\x80\x02" + b"N0" * 2_000_000 + b"N.", **pickled}),
        "2**60 references": saved({"a": laughs}),
    }


def torch_damage(good: bytes) -> Files:
    parts = members(good)
    return {
        "empty": b"",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "zip magic alone": b"PK\3\4" + bytes(100),
        "zip without a pickle": archived({"archive/readme": b"nothing"}),
        "zip of nothing": archived({}),
        "a member above the archive": archived({**parts, "../../above": b"x"}),
        "a member at the root": archived({**parts, "/etc/above": b"x"}),
        "a member above by backslashes": archived({**parts, "archive\\..\\..\\above": b"x"}),
        "storages missing": archived({n: c for n, c in parts.items() if "/data/" not in n}),
        "storages cut": archived({n: c[:-1] if "/data/" in n else c for n, c in parts.items()}),
        "one bit flipped": good[:-200] + bytes([good[-200] ^ 64]) + good[-199:],
        "a number": saved(3),
        "a list": saved([torch.zeros(2)]),
        "nothing": saved(None),
        "an empty dictionary": saved({}),
        "keys that are no strings": saved({3: torch.zeros(2), (1, 2): torch.zeros(2)}),
        "a key that clears the screen": saved({"\x1b[2J\n\x07x": 3, "y": "\u202e"}),
    }


# Teachers


def teachers(state: dict[str, torch.Tensor], marker: Path) -> Files:
    """state: that of a good teacher, a SmallResNet."""
    first, last = state["conv1.weight"], state["fc.weight"]
    huge = {key: torch.full_like(value, 3e38) if value.is_floating_point() else value for key, value in state.items()}
    changes: dict[str, dict[str, Any]] = {
        "complex": {"fc.weight": last.to(torch.complex64)},
        "strings for weights": {"fc.weight": "weight"},
        "no classes": {"fc.weight": last[:0], "fc.bias": torch.zeros(0)},
        "no channels": {"conv1.weight": first[:, :0]},
        "a kernel of none": {"conv1.weight": first[:, :, :0]},
        "a scalar for a weight": {"fc.weight": torch.zeros(())},
        "weights of int8": {key: value.to(torch.int8) for key, value in state.items()},
        "weights of bool": {key: value.bool() for key, value in state.items()},
        "all zeros": {key: torch.zeros_like(value) for key, value in state.items()},
        "all negative": {key: -value.abs() - 1 for key, value in state.items()},
        "all huge": huge,
    }
    return {
        **torch_files(saved(state), marker),
        **{name: saved({**state, **changed}) for name, changed in changes.items()},
        "keys of 10,000 letters": saved({f"{'x' * 10_000}{i}": torch.zeros(1) for i in range(9)}),
        "ten thousand keys": saved({f"layer{i}.weight": torch.zeros(1) for i in range(10_000)}),
    }


# Data sets


def npy(shape: tuple[Any, ...], data: bytes = b"", dtype: str = "'|u1'") -> bytes:
    return npy_of(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape!r}, }}", data)


def npy_of(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + data


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def data_sets(marker: Path) -> Files:
    images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40, dtype=np.uint8) % 10
    evil = np.array([payload(marker)] * 40, dtype=object)
    huge = npy((62_500_000, 8, 8))
    bomb = lying_archive(
        ("x.npy", zeros_deflated(4 << 30, huge), zipfile.ZIP_DEFLATED, 4_000_000_000 + len(huge)),
        ("y.npy", npy((62_500_000,)), zipfile.ZIP_STORED, len(npy((62_500_000,)))),
    )
    y = {"y.npy": npy((40,), labels.tobytes())}
    return {
        **truncations(npz(x=images, y=labels)),
        **{name: archived({"x.npy": x, **y}) for name, x in _image_arrays(marker).items()},
        "objects that run code": npz(x=evil, y=labels),
        "labels that run code": npz(x=images, y=evil),
        "a bare pickle": pickle.dumps(payload(marker)),
        "zip magic alone": b"PK\3\4" + bytes(100),
        "4 GB deflated": bomb,
        "256 MB by bzip2": archived({"x.npy": npy((4_000_000, 8, 8), bytes(256_000_000)), **y}, zipfile.ZIP_BZIP2),
        "a member above the archive": archived({"../x.npy": npy((40, 8, 8), bytes(2560)), **y}),
    }


def _image_arrays(marker: Path) -> Files:
    """What stands for the images in an archive whose labels are good."""
    return {
        "2**40 images in the header": npy((2**40, 8, 8), bytes(64)),
        "2**62 x 4 images": npy((2**62, 4, 8, 8), bytes(64)),
        "-40 images": npy((-40, 8, 8), bytes(2560)),
        "-8 x -8 images": npy((40, -8, -8), bytes(2560)),
        "a shape of text": npy_of("{'descr': '|u1', 'fortran_order': False, 'shape': 'abc', }", bytes(64)),
        "a header that calls": npy_of(f"__import__('os').system('touch {marker}')", bytes(64)),
        "a header nested deep": npy_of("(" * 9000 + ")" * 9000),
        "a header of records": npy((40, 8, 8), bytes(2560 * 9), "[('a', '|u1'), ('b', '<f8')]"),
        "a header that is cut": npy((40, 8, 8))[:20],
        "npy of version 9": b"\x93NUMPY\x09\x00" + npy((40, 8, 8), bytes(2560))[8:],
        "no npy": b"x" * 100,
    }


# Students


_OF_TENSORS = ("storages missing", "storages cut", "zip without a pickle", "one bit flipped")


def students(good: bytes, marker: Path) -> Files:
    """good: the student.pt2 of a run."""
    evil = saved({"a": payload(marker)})
    parts = members(good)
    top = next(iter(parts)).partition("/")[0]
    damaged = {name: content for name, content in torch_damage(good).items() if name not in _OF_TENSORS}
    deep = b"[" * 100_000 + b"]" * 100_000
    more = {
        "old weights that run code": ("data/weights/model.pt", evil),
        "old constants that run code": ("data/constants/model.pt", evil),
        "a compiled library": ("data/aotinductor/model/x.so", bytes(200)),
        "another program": ("models/other.json", parts[f"{top}/models/model.json"]),
    }
    return {
        **truncations(good),
        **{f"as a whole: {name}": content for name, content in {**damaged, **torch_code(marker)}.items()},
        **{name: archived({**parts, f"{top}/{member}": content}) for name, (member, content) in more.items()},
        **{name: changed_json(good, "models/model.json", change) for name, change in _programs(marker).items()},
        **{name: changed_json(good, "weights_config.json", change) for name, change in _weights().items()},
        **_constants(good, top, marker),
        "whole file deflated": archived(parts, zipfile.ZIP_DEFLATED),
        "deflated 4 GB": lying_archive((f"{top}/x", zeros_deflated(4_000_000_000), zipfile.ZIP_DEFLATED, 4_000 << 20)),
        "sample inputs that run code": changed(good, "sample_inputs/model.pt", lambda _: evil),
        "a program nested deep": changed(good, "models/model.json", lambda _: deep),
        "a program of a number": changed(good, "models/model.json", lambda _: b"3"),
        "a description of a number": changed(good, "student.json", lambda _: b"3"),
        "a description nested deep": changed(good, "student.json", lambda _: deep),
        "two descriptions": archived({**parts, f"{top}/data/student.json": parts[f"{top}/extra/student.json"]}),
        "an empty program": changed(good, "models/model.json", lambda _: b"{}"),
        "no program": archived({n: c for n, c in parts.items() if not n.endswith("models/model.json")}),
        "a weight of no bytes": changed(good, "weight_0", lambda _: b""),
        "weights of NaN": changed(good, "weight_0", lambda content: b"\xff" * len(content)),
    }


def changed_json(content: bytes, ending: str, change: Callable[[Any], Any]) -> bytes:
    def edit(text: bytes) -> bytes:
        value = json.loads(text)
        change(value)
        return json.dumps(value).encode()

    return changed(content, ending, edit)


def _node(**fields: Any) -> Change:
    """Change the first node of a program."""
    return lambda held: held["graph_module"]["graph"]["nodes"][0].update(fields)


def _call(target: str, argument: str) -> Change:
    return _node(target=target, inputs=[{"name": "x", "arg": {"as_string": argument}, "kind": 1}])


def _tree(text: str) -> Change:
    """Change how a program's inputs are nested."""
    return lambda held: held["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=text)


def _tree_of(kind: str, context: str) -> Change:
    return _tree(json.dumps([1, {"type": kind, "context": context, "children_spec": []}]))


def _size(text: str) -> Change:
    expression = {"as_expr": {"expr_str": text, "hint": None}}
    return lambda held: held["graph_module"]["graph"]["tensor_values"]["x"]["sizes"].__setitem__(0, expression)


def _weight_name(text: str) -> Change:
    return lambda held: held["graph_module"]["signature"]["input_specs"][0]["parameter"].update(parameter_name=text)


def _input_name(text: str) -> Change:
    return lambda held: held["graph_module"]["graph"]["inputs"].append({"as_tensor": {"name": text}})


def _programs(marker: Path) -> Changes:
    """What to change in a student's program."""
    code = f"__import__('os').system('touch {marker}')"
    return {
        "a call of os.system": _call("torch.os.system", f"touch {marker}"),
        "a call of torch.load": _call("torch.load", str(marker)),
        "a call of from_file": _call("torch.ops.aten.from_file.default", str(marker)),
        "a call of another library": _call("torch.ops.load_library", str(marker)),
        "a call of operator": _call("_operator.methodcaller", "system"),
        "a call of math": _node(target="math.__loader__.exec_module"),
        "an extension": _node(target="#os:system"),
        "an argument's name that is code": _node(inputs=[{"name": f"x={code}, y", "arg": {"as_int": 1}, "kind": 2}]),
        "a node's name that is code": _node(name=f"x\n{code}"),
        "a node without an operator": _node(target="torch.ops.aten.nothing.default"),
        "a node of wrong arguments": _node(inputs=[]),
        "a graph within": _node(inputs=[{"name": "x", "arg": {"as_graph": {"name": "g", "graph": {}}}, "kind": 1}]),
        "a weight's name that is code": _weight_name(f'a"), {code}, ("'),
        "an input's name that is code": _input_name(f"x={code}"),
        "a size that is code": _size(code),
        "a size without end": _size("9**9**9**9"),
        "a tree that imports": _tree_of("builtins.dict", '{"__enum__": "os.x"}'),
        "a tree of another class": _tree_of("collections.defaultdict", '{"module": "os"}'),
        "a tree nested deep": _tree("[" * 100_000 + "]" * 100_000),
        "a program of another version": lambda held: held["schema_version"].update(major=99),
    }


def _weights() -> Changes:
    """What to change in the list of a student's weights."""

    def first(**fields: Any) -> Change:
        return lambda held: next(iter(held["config"].values())).update(fields)

    def meta(**fields: Any) -> Change:
        return lambda held: next(iter(held["config"].values()))["tensor_meta"].update(fields)

    return {
        "a pickled weight": first(use_pickle=True),
        "a weight of another file": first(path_name="../../../etc/passwd"),
        "a weight missing": lambda held: held["config"].popitem(),
        "a weight of 2**40": meta(sizes=[{"as_int": 2**40}]),
        "a weight of -1": meta(sizes=[{"as_int": -1}]),
        "a weight at 2**40": meta(storage_offset={"as_int": 2**40}),
        "a weight expanded": meta(sizes=[{"as_int": 2**30}] * 2, strides=[{"as_int": 0}] * 2),
        "a weight of another shape": meta(sizes=[{"as_int": 1}] * 4, strides=[{"as_int": 1}] * 4),
    }


def _constants(good: bytes, top: str, marker: Path) -> Files:
    """Students with a pickled constant that runs code."""
    pickled = {"is_param": False, "use_pickle": True, "tensor_meta": None}
    made = {}
    for member, content in (
        ("tensor_0", saved({"a": payload(marker)})),
        ("opaque_obj_0", pickle.dumps(payload(marker))),
        ("custom_obj_0", saved({"a": payload(marker)})),
    ):
        listed = {"c": {"path_name": member, **pickled}}
        student = changed_json(good, "constants_config.json", lambda held, listed=listed: held["config"].update(listed))
        made[f"constant {member}"] = archived({**members(student), f"{top}/data/constants/{member}": content})
    return made


def configurations(good: dict[str, Any]) -> Cases:
    """good: the config.json of a run of the digits."""
    of_command: dict[str, tuple[Any, ...]] = {
        "data": (3, None, ["digits"], "nothing", "npz:/dev/null"),
        "validation": ([0.1], "nowhere", -3, 1e300, True),
        "test": ("nowhere", {}, float("nan"), 0),
        "class_order": (3, "a,b", [], ""),
        "skip_bad": ("yes", 3),
    }
    for name, values in of_command.items():
        for value in values:
            yield f"command {name} {str(value)[:20]}", {**good, "command": {**good["command"], name: value}}
    for value in (3, None, [], "text", {}):
        yield f"command {value!s}", {**good, "command": value, "data_read": value}
    of_data: dict[str, tuple[Any, ...]] = {
        "image_size": ("8", None, 8, [8], [0, 8], [-8, 8], [10**9, 8], [2.5, 8], [True, 8], [8, 8, 8]),
        "channels": ("1", None, 0, -1, 10**9),
        "mean": (3, None, "a", ["a"], [[0.1]], [0.1, 0.2], [], {"a": 1}),
        "std": ([0.0], [-1.0], [float("nan")], [float("inf")], [10**400]),
        "range": (None, 3, [1], ["a", "b"]),
        "digest": (None, 3),
    }
    for name, values in of_data.items():
        for value in values:
            yield f"{name} {str(value)[:20]}", {**good, "data": {**good["data"], name: value}}


# Runs that were cut off


def mutations(good: dict[str, Any], values: tuple[Any, ...]) -> Cases:
    """Each entry left out, and of each of these values."""
    for name in good:
        yield f"without {name}", {key: value for key, value in good.items() if key != name}
        for value in values:
            yield f"{name} of {str(value)[:9]!r}", {**good, name: value}


def checkpoints(good: dict[str, Any]) -> Cases:
    """good: the checkpoint of a run in its first stage."""
    (stage,) = good["stages"]
    wrong = ("text", {"a": 3}, torch.zeros(2))
    yield from mutations(good, wrong)
    yield "history of 2**70", {**good, "history": 2**70}
    yield "stages of nothing", {**good, "stages": [{}]}
    for name, case in mutations(stage, ("text",)):
        if name.startswith(("without", "evaluated", "generator")):  # text is a value of others
            yield f"stage {name}", {**good, "stages": [case]}
    for name, case in mutations(stage, wrong[1:]):
        if not name.startswith(("without", "evaluated", "generator")):
            yield f"stage {name}", {**good, "stages": [case]}
    for name, changed in _stages(stage):
        yield name, {**good, "stages": [{**stage, **changed}]}


def _stages(stage: dict[str, Any]) -> Cases:
    """What to change in the stage of a checkpoint."""
    policy = stage["policy"]
    yield "NaN in the policy", {"policy": {k: v * float("nan") for k, v in policy.items()}}
    yield "a policy of complex", {"policy": {k: v.to(torch.complex64) for k, v in policy.items()}}
    yield "NaN for a baseline", {"baseline": float("nan")}
    yield "a generator of zeros", {"generator": torch.zeros_like(stage["generator"])[:-1]}
    yield "an optimizer of others", {"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}}
    state = {
        number: {name: value if value.ndim == 0 else torch.zeros(2) for name, value in tensors.items()}
        for number, tensors in stage["optimizer"]["state"].items()
    }
    yield "optimizer states of other shapes", {"optimizer": {**stage["optimizer"], "state": state}}
    for kind, change in {**ARCHITECTURES, **EVALUATIONS}.items():
        evaluated = json.loads(stage["evaluated"])
        change(evaluated[0][kind in EVALUATIONS])  # a pair: the architecture, its evaluation
        yield kind, {"evaluated": json.dumps(evaluated)}
    yield "evaluations nested deep", {"evaluated": "[" * 100_000}
    yield "a student that nobody knows", {"finals": [["0" * 12, 0.5, {}]]}
    yield "an anchor that nobody knows", {"anchors": [["0" * 12, 0.5, None]]}
    yield "a stage done without a student", {"done": True}
    arch = Architecture.from_json(json.dumps(json.loads(stage["evaluated"])[0][0]))
    yield "a stage done of nothing", {"done": True, "finals": [[arch.key, 0.5, {}]]}
    yield "a stage that another search has", {"name": "third"}


ARCHITECTURES: Changes = {
    "an architecture of fewer layers": lambda arch: arch["keep"].pop(),
    "an architecture of more groups": lambda arch: arch["widths"].append(3),
    "an architecture of wider groups": lambda arch: arch.update(widths=[9 * n for n in arch["widths"]]),
    "an architecture of no width": lambda arch: arch.update(widths=[0 for _ in arch["widths"]]),
    "an architecture of 2**80 channels": lambda arch: arch.update(widths=[2**80 for _ in arch["widths"]]),
    "an architecture of large kernels": lambda arch: arch.update(kernels=[[n + 2 for n in k] for k in arch["kernels"]]),
    "an architecture of no kernels": lambda arch: arch.update(kernels=[[] for _ in arch["kernels"]]),
    "an architecture without its fixed layers": lambda arch: arch.update(keep=[False for _ in arch["keep"]]),
    "an architecture of other params": lambda arch: arch.update(params=1),
    "an architecture of negative MACs": lambda arch: arch.update(macs=-1),
    "an architecture of text": lambda arch: arch.update(keep="text"),
    "an architecture with a field more": lambda arch: arch.update(more=1),
}
EVALUATIONS: Changes = {
    "an evaluation of NaN": lambda evaluation: evaluation.update(short_accuracy=float("nan")),
    "an evaluation of 7": lambda evaluation: evaluation.update(short_accuracy=7.0),
    "an evaluation of text": lambda evaluation: evaluation.update(short_accuracy="good"),
    "an evaluation of nothing": lambda evaluation: evaluation.update(short_accuracy=None),
    "an evaluation of negative seconds": lambda evaluation: evaluation.update(seconds={"build": -1}),
    "an evaluation of a list": lambda evaluation: evaluation.update(seconds=[1]),
    "an evaluation of another field": lambda evaluation: evaluation.update(more=1),
}


def trainings(good: dict[str, Any]) -> Cases:
    """good: a training.pt."""
    state = good["state"]
    misshaped = {**state["optimizer"], "state": {0: {"momentum_buffer": torch.zeros(2)}}}
    cases = [*mutations(state, (-1, {"a": 3})), ("misshaped", {**state, "optimizer": misshaped}), ("text", "text")]
    return ((f"state {name}", {**good, "state": case}) for name, case in cases)


VALUES: tuple[Any, ...] = ([3], {"a": 3}, "\0", -7)  # of which no option takes any


def commands(good: dict[str, Any], marker: Path) -> Cases:
    """What to change in the command that a run's config.json notes."""
    pickled = marker.with_name("pickled.pt")
    pickled.write_bytes(pickle.dumps(payload(marker)))
    marker.with_name("factory.py").write_text(f"import os\nos.system('touch {marker}')\n")
    yield "a teacher that is a pickle", {"teacher": str(pickled), "allow_pickle": True}
    yield "a factory that runs code", {"arch": "factory:make"}
    yield "a teacher of os", {"arch": "os:getcwd"}
    for name in good:
        for value in VALUES:
            if name != "download" or value != -7:
                yield f"{name} of {str(value)[:9]!r}", {name: value}


# The victim


def main() -> None:
    from n2n_fast.cli import main

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for command in json.load(sys.stdin):
        print(json.dumps(_suffered(main.main, command)), flush=True)


def _suffered(run: Callable[[], None], command: list[str]) -> dict[str, Any]:
    sys.argv = ["n2n-fast", *command]
    start, errors, code = time.process_time(), io.StringIO(), None
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            run()
        except SystemExit as stop:
            code = stop.code
        except BaseException:  # noqa: BLE001 - what a user would see as a traceback
            traceback.print_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    peak = _peak_bytes()
    return {"code": code, "stderr": errors.getvalue(), "seconds": time.process_time() - start, "peak": peak}


def _peak_bytes() -> int:
    """The most memory that was resident in this process; ru_maxrss would begin with its parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _too_long(*_: Any) -> None:
    raise TimeoutError


if __name__ == "__main__":
    main()
