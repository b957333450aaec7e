"""A student in other formats: what is written computes what the student computes."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from torch import nn

from command_line import output, refusal
from hostile import changed
from n2n_fast.cli import evaluate, export
from n2n_fast.cli.export import fold_batch_norms
from n2n_fast.files import safe_pt2
from n2n_fast.files.errors import BadInput
from n2n_fast.search.result import load_student, program_bytes
from quarters import quarters


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Latencies by few calls."""
    monkeypatch.setattr(export, "TURNS", 1)
    monkeypatch.setattr(export, "TURN_SECONDS", 0.0)


def images(count, channels=1):
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def session():
    """Opens a file of ONNX."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    return lambda path: runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


@torch.no_grad()
def logits(run, x):
    return load_student(run)(x)


@torch.no_grad()
def test_pt2(run):
    written = export.export(run, "pt2")
    assert written.path == run / "export.pt2"
    assert written.bytes == written.path.stat().st_size
    assert written.student_bytes == (run / "student.pt2").stat().st_size
    assert set(written.latencies) == {1, 64}
    assert all(ms > 0 for pair in written.latencies.values() for ms in pair)
    torch.testing.assert_close(torch.export.load(written.path).module()(images(5)), logits(run, images(5)))


def test_a_static_batch_is_of_that_size_alone(run):
    written = export.export(run, "pt2", static_batch=4)
    assert set(written.latencies) == {4}
    module = torch.export.load(written.path).module()
    torch.testing.assert_close(module(images(4)), logits(run, images(4)), check_stride=False)
    with pytest.raises((RuntimeError, AssertionError)):
        module(images(3))


def test_state_dict(run):
    held = torch.load(export.export(run, "state-dict").path, weights_only=True)
    expected = torch.load(run / "student.pt", weights_only=True)
    for name, tensor in held.items():
        assert torch.equal(tensor, expected[name]), name
    assert held


@pytest.mark.parametrize("fold", [False, True])
def test_onnx(run, session, fold):
    onnx = pytest.importorskip("onnx")
    written = export.export(run, "onnx", opset=18, fold_bn=fold)
    model = onnx.load(written.path)
    assert written.opset == 18 == next(part.version for part in model.opset_import if part.domain == "")
    got = torch.from_numpy(session(written.path).run(None, {"images": images(7).numpy()})[0])
    torch.testing.assert_close(got, logits(run, images(7)), atol=1e-4, rtol=1e-4)
    norms = sum(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert norms <= written.norms - written.folded
    assert [path.name for path in run.glob("export*")] == ["export.onnx"]  # the weights are in it


def test_onnx_of_a_static_batch(run, session):
    path = export.export(run, "onnx", static_batch=4).path
    assert session(path).get_inputs()[0].shape == [4, 1, 8, 8]


@pytest.mark.usefixtures("session")
def test_an_opset_that_cannot_be_had_is_refused(run):
    with pytest.raises(BadInput, match="opset"):
        export.export(run, "onnx", opset=5)
    assert not list(run.glob("*export*"))


@pytest.fixture
def taught(tmp_path):
    """Options that name data like those of the run, of classes numbered otherwise."""
    split = quarters().test
    pixels = (255 * (split.images + 2) / 4).clamp(0, 255).byte()
    for image, label in zip(pixels, split.labels.tolist(), strict=True):
        folder = tmp_path / "set" / "dcba"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{len(list(folder.iterdir()))}.png")
    return "--data", f"imagefolder:{tmp_path / 'set'}"


def described(run, **changed):
    """The run's student with a file that says this of its images."""
    takes = {**json.loads((run / "student.json").read_text()), **changed}
    (run / "student.pt2").write_bytes(program_bytes(torch.export.load(run / "student.pt2"), takes))
    return takes


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_a_file_alone_says_what_it_takes_and_what_its_classes_are(run, session, taught, to):
    takes = described(run, classes=list("dcba"), mean=[0.5], std=[0.25])
    path = export.export(run, to).path.rename(run.parent / f"alone.{to}")
    if to == "pt2":
        torch.export.load(path, extra_files=(extra := {"student.json": ""}))
        assert json.loads(extra["student.json"]) == takes == load_student(path).meta["input"]
    else:
        props = session(path).get_modelmeta().custom_metadata_map
        assert {name: json.loads(props[name]) for name in takes} == takes
    shutil.rmtree(run)
    found = json.loads(output("evaluate", path, *taught, "--json"))
    assert found["accuracy"] > 0.9  # by the names of the classes, not by their order
    assert {name: found["data"][name] for name in ("image_size", "channels", "classes")} == {
        name: takes[name] for name in ("image_size", "channels", "classes")
    }
    assert "give its data too, --data SPEC" in refusal("evaluate", path)


DAMAGED = {
    "image_size": (None, [8], [8, 0], [8, 8, 8], "8", [True, 8], [8.5, 8]),
    "channels": (0, "1", None, 1.5),
    "mean": ([], ["a"], 3, [[0.1]], [float("nan")]),
    "std": ([0.0], [-1.0], [10**400], None),
    "range": ([1], None, "01"),
    "dtype": (3, None),
    "classes": ([], [1], "abcd", None, {"a": 1}),
}


def test_a_damaged_description_is_one_line_and_nothing_is_run(run, session, taught, monkeypatch):
    onnx = pytest.importorskip("onnx")
    path = export.export(run, "onnx").path
    model = onnx.load(path)
    monkeypatch.setattr(safe_pt2, "_loaded", None)
    monkeypatch.setattr(export, "run_by_onnx", None)
    monkeypatch.setattr(evaluate, "run_by_onnx", None)
    whole = {prop.key: prop.value for prop in model.metadata_props}
    for name, value in ((name, value) for name, values in DAMAGED.items() for value in values):
        onnx.helper.set_model_props(model, {**whole, name: json.dumps(value)})
        onnx.save(model, path)
        described(run, **{name: value})
        for file in (path, run / "student.pt2"):
            expected = f"{file}: what it says of its images is damaged ({name}: "
            assert expected in refusal("evaluate", file, *taught)
    for text in (b"", b"{", b"[1]", b"[" * 100_000, b"\xff"):
        (run / "student.pt2").write_bytes(
            changed((run / "student.pt2").read_bytes(), "student.json", lambda _, text=text: text)
        )
        assert "what it says of its images is damaged" in refusal("evaluate", run)


def test_a_file_that_says_nothing_is_refused(normed, session, taught, run):
    onnx = pytest.importorskip("onnx")
    assert load_student(normed).meta["input"] is None
    assert "does not say what images it takes; give its run" in refusal("evaluate", normed / "student.pt2", *taught)
    path = export.export(run, "onnx").path
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert "does not say what images it takes" in refusal("evaluate", path, *taught)
    path.write_bytes(b"no model")
    assert "not a readable student" in refusal("evaluate", path, *taught)


class Normed(nn.Module):
    """Six norms: four can be folded, two cannot."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(2, 4, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.norm2 = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.norm3 = nn.BatchNorm2d(4)
        self.read_again = nn.Conv2d(4, 4, 1)
        self.norm4 = nn.BatchNorm2d(4)
        self.unscaled = nn.Conv2d(4, 4, 1)
        self.norm5 = nn.BatchNorm2d(4, affine=False)
        self.fc = nn.Linear(4 * 36, 5)
        self.norm6 = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.norm2(self.grouped(self.norm1(self.plain(x)).relu()))
        x = self.norm3(self.twice(x)) + self.twice(x.relu())
        x = self.read_again(x)
        x = self.norm5(self.unscaled(self.norm4(x) + x))
        return self.norm6(self.fc(x.flatten(1)))


@pytest.fixture
def normed(tmp_path):
    """A run directory whose student is Normed, its statistics far from those of a new network."""
    torch.manual_seed(0)
    model = Normed().eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (images(2, 2),), dynamic_shapes=shapes), tmp_path / "student.pt2")
    return tmp_path


@torch.no_grad()
def test_norms_are_folded_where_that_changes_nothing(normed):
    student = load_student(normed)
    assert fold_batch_norms(student) == 4
    left = [node for node in student.graph.nodes if node.target == torch.ops.aten.batch_norm.default]
    assert len(left) == 2
    assert not any("norm1" in name or "norm6" in name for name in student.state_dict())
    x = images(9, 2)
    torch.testing.assert_close(student(x), logits(normed, x), atol=1e-4, rtol=1e-4)
    written = export.export(normed, "pt2", fold_bn=True)
    assert (written.norms, written.folded) == (6, 4)
    torch.testing.assert_close(torch.export.load(written.path).module()(x), logits(normed, x), atol=1e-4, rtol=1e-4)


def test_a_file_that_computes_something_else_is_not_kept(run, monkeypatch):
    def wrong(student):
        with torch.no_grad():
            next(student.parameters()).mul_(1.01)
        return 1

    monkeypatch.setattr(export, "fold_batch_norms", wrong)
    with pytest.raises(BadInput, match="off the student's"):
        export.export(run, "pt2", fold_bn=True)
    assert not list(run.glob("*export*"))


def test_the_command_tells_what_it_wrote(run):
    out = output("export", run, "--to", "pt2", "--out", run / "mine.pt2")
    for told in (f"{(run / 'mine.pt2').stat().st_size / 1e6:.3f} MB", "latency, 64 images", "largest difference"):
        assert told in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--to pt2 --opset 18", "--opset"),
        ("--to state-dict --fold-bn", "--to pt2 or onnx"),
        ("--to state-dict --static-batch 2", "--to pt2 or onnx"),
        ("--to pt2 --out student.pt", "exists already"),
        ("--to pt2 --out nowhere/x.pt2", "cannot be written"),
        ("--to pt2 --static-batch 0", "--static-batch"),
        ("--to coreml", "coreml"),
        ("", "--to"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(run, monkeypatch, options, expected):
    monkeypatch.chdir(run)
    assert expected in refusal("export", run, *options.split())


def test_what_is_no_run_is_refused(tmp_path):
    assert "finished run" in refusal("export", tmp_path, "--to", "pt2")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_onnx(run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"--to onnx needs {package}: pip install 'n2n_fast[onnx]'" in refusal("export", run, "--to", "onnx")
