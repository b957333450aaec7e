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

Files = dict[str, bytes]
Cases = Iterator[tuple[str, Any]]  # by name what to write, or what to change
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

    def with_(**tensors: torch.Tensor) -> bytes:
        return saved({**state, **{name.replace("__", "."): value for name, value in tensors.items()}})

    weight, name = state["fc.weight"], "conv1__weight"
    return {
        **torch_files(saved(state), marker),
        "NaN": with_(fc__bias=torch.full((10,), float("nan"))),
        "infinite": with_(fc__bias=torch.full((10,), float("inf"))),
        "complex": with_(fc__weight=weight.to(torch.complex64)),
        "strings for weights": saved({**state, "fc.weight": "weight"}),
        "no classes": with_(fc__weight=weight[:0], fc__bias=torch.zeros(0)),
        "no channels": with_(**{name: state["conv1.weight"][:, :0]}),
        "a kernel of none": with_(**{name: state["conv1.weight"][:, :, :0]}),
        "a scalar for a weight": with_(fc__weight=torch.zeros(())),
        "another shape": with_(fc__weight=weight[:, 1:]),
        "a key more": with_(more=torch.zeros(3)),
        "a key less": saved({k: v for k, v in state.items() if k != "fc.bias"}),
        "weights of int8": saved({k: v.to(torch.int8) for k, v in state.items()}),
        "weights of bool": saved({k: v.bool() for k, v in state.items()}),
        "all zeros": saved({k: torch.zeros_like(v) for k, v in state.items()}),
        "all negative": saved({k: -v.abs() - 1 for k, v in state.items()}),
        "all huge": saved({k: torch.full_like(v, 3e38) if v.is_floating_point() else v for k, v in state.items()}),
        "keys of 10,000 letters": saved({f"{'x' * 10_000}{i}": torch.zeros(1) for i in range(9)}),
        "ten thousand keys": saved({f"layer{i}.weight": torch.zeros(1) for i in range(10_000)}),
    }


# Data sets


def npy(shape: tuple[Any, ...], data: bytes = b"", dtype: str = "|u1") -> bytes:
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    return npy_of(header, data)


def npy_of(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + data


def data_sets(marker: Path) -> Files:
    labels = np.arange(40) % 10
    images = np.zeros((40, 8, 8), np.uint8)
    evil = np.array([payload(marker)] * 40, dtype=object)

    def npz(**arrays: Any) -> bytes:
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    def raw(x: bytes, y: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
        return archived({"x.npy": x, "y.npy": y or npy((40,), labels.astype(np.uint8).tobytes())}, compression)

    good = npz(x=images, y=labels)
    header = npy((62_500_000, 8, 8))
    zeros = zeros_deflated(4 << 30, header)
    bomb = lying_archive(
        ("x.npy", zeros, zipfile.ZIP_DEFLATED, 4_000_000_000 + len(header)),
        ("y.npy", npy((62_500_000,)), zipfile.ZIP_STORED, len(npy((62_500_000,)))),
    )
    bzip2 = raw(npy((4_000_000, 8, 8), bytes(256_000_000)), compression=zipfile.ZIP_BZIP2)
    return {
        **truncations(good),
        "objects that run code": npz(x=evil, y=labels),
        "labels that run code": npz(x=images, y=evil),
        "a bare pickle": pickle.dumps(payload(marker)),
        "empty": b"",
        "text": b"no arrays",
        "zip magic alone": b"PK\3\4" + bytes(100),
        "4 GB deflated": bomb,
        "256 MB by bzip2": bzip2,
        "2**40 images in the header": raw(npy((2**40, 8, 8), bytes(64))),
        "2**62 x 4 images": raw(npy((2**62, 4, 8, 8), bytes(64))),
        "-40 images": raw(npy((-40, 8, 8), bytes(2560))),
        "-8 x -8 images": raw(npy((40, -8, -8), bytes(2560))),
        "a shape of text": raw(npy_of("{'descr': '|u1', 'fortran_order': False, 'shape': 'abc', }", bytes(64))),
        "a header that calls": raw(npy_of(f"__import__('os').system('touch {marker}')", bytes(64))),
        "a header nested deep": raw(npy_of("(" * 9000 + ")" * 9000)),
        "a header of records": raw(npy((40, 8, 8), bytes(2560 * 9), "[('a', '|u1'), ('b', '<f8')]")),
        "a header that is cut": raw(npy((40, 8, 8))[:20]),
        "npy of version 9": raw(b"\x93NUMPY\x09\x00" + npy((40, 8, 8), bytes(2560))[8:]),
        "no npy": raw(b"x" * 100),
        "NaN": npz(x=np.full((40, 8, 8), np.nan, np.float32), y=labels),
        "infinite": npz(x=np.full((40, 8, 8), np.inf, np.float32), y=labels),
        "beyond float32": npz(x=np.full((40, 8, 8), 1e300), y=labels),
        "negative pixels": npz(x=images.astype(np.int16) - 1, y=labels),
        "negative labels": npz(x=images, y=labels - 5),
        "labels of 2**62": npz(x=images, y=labels + 2**62),
        "labels of float": npz(x=images, y=labels + 0.5),
        "complex pixels": npz(x=images.astype(np.complex64), y=labels),
        "dates": npz(x=images.astype("datetime64[s]"), y=labels),
        "texts": npz(x=images.astype("U5"), y=labels),
        "no dimensions": npz(x=np.uint8(3), y=np.int64(3)),
        "images of no pixels": npz(x=images[:, :0], y=labels),
        "a member above the archive": archived({"../x.npy": npy((40, 8, 8), bytes(2560)), "y.npy": npy((40,))}),
    }


# Students


def students(good: bytes, marker: Path) -> Files:
    """good: the student.pt2 of a run."""
    evil = saved({"a": payload(marker)})
    code = f"__import__('os').system('touch {marker}')"
    parts = members(good)
    top = next(iter(parts)).partition("/")[0]

    def program(change: Callable[[dict[str, Any]], None]) -> bytes:
        return changed_json(good, "models/model.json", change)

    def weights(change: Callable[[dict[str, Any]], None]) -> bytes:
        return changed_json(good, "model_weights_config.json", lambda held: change(held["config"]))

    def constants(payloads: dict[str, Any], **more: bytes) -> bytes:
        with_one = changed_json(good, "model_constants_config.json", lambda held: held["config"].update(payloads))
        return archived({**members(with_one), **{f"{top}/data/constants/{n}": c for n, c in more.items()}})

    def node(position: int, **fields: Any) -> bytes:
        return program(lambda held: held["graph_module"]["graph"]["nodes"][position].update(fields))

    def text(argument: str) -> dict[str, Any]:
        return {"name": "x", "arg": {"as_string": argument}, "kind": 1}

    pickled = {"path_name": "", "is_param": False, "use_pickle": True, "tensor_meta": None}
    calling = {"target": "torch.os.system", "inputs": [text(f"touch {marker}")]}
    first = next(iter(json.loads(parts[f"{top}/data/weights/model_weights_config.json"])["config"]))
    deep = b"[" * 100_000 + b"]" * 100_000
    return {
        **{f"as a whole: {name}": content for name, content in torch_damage(good).items() if name not in _OF_TENSORS},
        **truncations(good),
        **{f"as a whole: {name}": content for name, content in torch_code(marker).items()},
        "whole file deflated": archived(parts, zipfile.ZIP_DEFLATED),
        "deflated 4 GB": lying_archive((f"{top}/x", zeros_deflated(4_000_000_000), zipfile.ZIP_DEFLATED, 4_000 << 20)),
        "sample inputs that run code": changed(good, "sample_inputs/model.pt", lambda _: evil),
        "old weights that run code": archived({**parts, f"{top}/data/weights/model.pt": evil}),
        "old constants that run code": archived({**parts, f"{top}/data/constants/model.pt": evil}),
        "a pickled weight": archived({
            **members(weights(lambda held: held[first].update(use_pickle=True))),
            f"{top}/data/weights/weight_0": evil}),
        "a pickled constant": constants({"c": {**pickled, "path_name": "tensor_0"}}, tensor_0=evil),
        "an opaque constant": constants({"c": {**pickled, "path_name": "opaque_obj_0"}},
                                        opaque_obj_0=pickle.dumps(payload(marker))),
        "a custom object": constants({"c": {**pickled, "path_name": "custom_obj_0"}}, custom_obj_0=evil),
        "a compiled library": archived({**parts, f"{top}/data/aotinductor/model/x.so": bytes(200)}),
        "another program": archived({**parts, f"{top}/models/other.json": parts[f"{top}/models/model.json"]}),
        "a call of os.system": node(0, **calling),
        "a call of torch.load": node(0, target="torch.load", inputs=[text(str(marker))]),
        "a call of from_file": node(0, target="torch.ops.aten.from_file.default", inputs=[text(str(marker))]),
        "a call of another library": node(0, target="torch.ops.load_library", inputs=[text(str(marker))]),
        "a call of math": node(0, target="math.__loader__.exec_module"),
        "a call of operator": node(0, target="_operator.methodcaller", inputs=[text("system")]),
        "an extension": node(0, target="#os:system"),
        "an argument's name that is code": node(0, inputs=[{"name": f"x={code}, y", "arg": {"as_int": 1}, "kind": 2}]),
        "a node's name that is code": node(0, name=f"x\n{code}"),
        "a weight's name that is code": program(
            lambda held: _signature(held)[0]["parameter"].update(parameter_name=f'a"), {code}, ("')),
        "an input's name that is code": program(
            lambda held: held["graph_module"]["graph"]["inputs"].append({"as_tensor": {"name": f"x={code}"}})),
        "a size that is code": program(lambda held: _tensors(held)["x"]["sizes"].__setitem__(
            0, {"as_expr": {"expr_str": code, "hint": None}})),
        "a size without end": program(lambda held: _tensors(held)["x"]["sizes"].__setitem__(
            0, {"as_expr": {"expr_str": "9**9**9**9", "hint": None}})),
        "a tree that imports": program(lambda held: _calls(held)[0]["signature"].update(in_spec=json.dumps(
            [1, {"type": "builtins.dict", "context": '{"__enum__": "os.x"}', "children_spec": []}]))),
        "a tree of another class": program(lambda held: _calls(held)[0]["signature"].update(in_spec=json.dumps(
            [1, {"type": "collections.defaultdict", "context": '{"module": "os"}', "children_spec": []}]))),
        "a tree nested deep": program(lambda held: _calls(held)[0]["signature"].update(in_spec=deep.decode())),
        "a graph within": node(0, inputs=[{"name": "x", "arg": {"as_graph": {"name": "g", "graph": {}}}, "kind": 1}]),
        "a program nested deep": changed(good, "models/model.json", lambda _: deep),
        "a program of a number": changed(good, "models/model.json", lambda _: b"3"),
        "an empty program": changed(good, "models/model.json", lambda _: b"{}"),
        "no program": archived({n: c for n, c in parts.items() if not n.endswith("models/model.json")}),
        "a program of another version": program(lambda held: held["schema_version"].update(major=99)),
        "a node without an operator": node(0, target="torch.ops.aten.nothing.default"),
        "a node of wrong arguments": node(0, inputs=[]),
        "a weight of 2**40": weights(lambda held: held[first]["tensor_meta"].update(sizes=[{"as_int": 2**40}])),
        "a weight of -1": weights(lambda held: held[first]["tensor_meta"].update(sizes=[{"as_int": -1}])),
        "a weight at 2**40": weights(lambda held: held[first]["tensor_meta"].update(storage_offset={"as_int": 2**40})),
        "a weight expanded": weights(lambda held: held[first]["tensor_meta"].update(
            sizes=[{"as_int": 2**30}] * 2, strides=[{"as_int": 0}] * 2)),
        "a weight of no bytes": archived({n: b"" if n.endswith("weight_0") else c for n, c in parts.items()}),
        "a weight of another file": weights(lambda held: held[first].update(path_name="../../../etc/passwd")),
        "a weight missing": weights(lambda held: held.pop(first)),
        "weights of NaN": archived({
            n: b"\xff" * len(c) if n.endswith("weight_0") else c for n, c in parts.items()}),
        "a weight of another shape": weights(lambda held: held[first]["tensor_meta"].update(
            sizes=[{"as_int": 1}] * 4, strides=[{"as_int": 1}] * 4)),
    }  # fmt: skip


_OF_TENSORS = ("storages missing", "storages cut", "zip without a pickle", "one bit flipped")


def changed_json(content: bytes, ending: str, change: Callable[[dict[str, Any]], None]) -> bytes:
    def edit(text: bytes) -> bytes:
        held = json.loads(text)
        change(held)
        return json.dumps(held).encode()

    return changed(content, ending, edit)


def _signature(program: dict[str, Any]) -> list[Any]:
    return program["graph_module"]["signature"]["input_specs"]


def _tensors(program: dict[str, Any]) -> dict[str, Any]:
    return program["graph_module"]["graph"]["tensor_values"]


def _calls(program: dict[str, Any]) -> list[Any]:
    return program["graph_module"]["module_call_graph"]


def configurations() -> Cases:
    """What to change in the data of a run's config.json."""
    for name, values in {
        "name": (3, None, ["digits"], "nothing", "npz:/dev/null"),
        "image_size": ("8", None, 0, -8, 10**9, 2.5, True, [8]),
        "channels": ("1", None, 0, -1, 10**9),
        "mean": (3, None, "a", ["a"], [[0.1]], [0.1, 0.2], [], {"a": 1}),
        "std": ([0.0], [-1.0], [float("nan")], [float("inf")], [10**400]),
    }.items():
        for value in values:
            yield f"{name} {str(value)[:20]}", {name: value}


# Runs that were cut off


def mutations(good: dict[str, Any], values: tuple[Any, ...]) -> Cases:
    """Each entry left out, and of each of these values."""
    for name in good:
        yield f"without {name}", {key: value for key, value in good.items() if key != name}
        for value in values:
            yield f"{name} of {str(value)[:9]!r}", {**good, name: value}


def checkpoints(good: dict[str, Any]) -> Cases:
    """good: the checkpoint of a run in its first stage."""
    wrong = ("text", {"a": 3}, torch.zeros(2))
    stage = good["stage"]
    yield from mutations(good, wrong)
    for name, case in mutations({key: value for key, value in stage.items() if key != "name"}, wrong):
        yield f"stage {name}", {**good, "stage": {"name": stage["name"], **case}}
    for name, changed in _stages(stage):
        yield name, {**good, "stage": {**stage, **changed}}
    for name, changed in _finished():
        yield name, {**good, **changed}


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


def _finished() -> Cases:
    """What to change in a checkpoint beside its stage."""
    removal = {"name": "removal", "architecture": "{}", "student": {}, "policy": {}, "accuracies": [], "points": "[]"}
    yield "history of 2**70", {"history": 2**70}
    yield "a stage done of nothing", {"finished": [{}]}
    yield "a stage done of numbers", {"finished": [dict.fromkeys(removal, 3)]}
    yield "a stage done of text", {"finished": [dict.fromkeys(removal, "[]")]}
    yield "a stage done without a student", {"stage": None, "finished": [removal]}
    yield "a stage that another search has", {"stage": None, "finished": [{**removal, "name": "third"}]}
    yield "a stage at hand that is done", {"finished": [removal]}
    yield "accuracies of text", {"finished": [{**removal, "accuracies": [["1", "2"]]}]}
    yield "points of another form", {"finished": [{**removal, "points": "[{}]"}]}


ARCHITECTURES: dict[str, Callable[[dict[str, Any]], Any]] = {
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
EVALUATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
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
