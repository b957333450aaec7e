"""What is different on a GPU. Where they can, tests run on the CPU too, so that what they do is known to be right."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.library import opcheck

import n2n_fast
from n2n_fast import native
from n2n_fast.cli.export import SUFFIXES, export
from n2n_fast.networks.products import as_products
from n2n_fast.search.checkpoint import Interrupted
from n2n_fast.search.reinforce import SearchProgress, compress
from n2n_fast.search.result import load_student
from n2n_fast.training.batches import Batches, TeacherLogits
from n2n_fast.training.distill import seeded, train
from n2n_fast.training.teachers import SmallResNet
from quarters import TINY, quarters, taught
from test_native import DTYPES, LOGIT_SHAPES, SMALL_PLAN, assert_results, logits, plan

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
on_both = pytest.mark.parametrize("device", ["cpu", GPU])
on_gpu = pytest.mark.parametrize("device", [GPU])
SHORT = replace(TINY, updates=1, rollouts=2, anchors=0)


def assert_near(got, wanted, tolerance=1e-3):
    """Equal but for a share of the largest number."""
    assert float((got.cpu() - wanted.cpu()).abs().max()) <= tolerance * float(wanted.abs().max())


@contextlib.contextmanager
def tf32(allowed):
    """TensorFloat-32, of ten bits, for all of torch, or for nothing."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    try:  # this sets backends.cuda.matmul.allow_tf32 too, which alone does not put back what torch keeps besides
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        cudnn.allow_tf32 = allowed
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


def deterministic():
    """Convolutions that add up in one order, always the same."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


# A search


class Stops(SearchProgress):
    """Asks for a stop after some rollouts or steps."""

    def __init__(self, calls):
        self.left = calls

    def stopping(self):
        self.left -= 1
        return self.left < 0


def cut_off_again_and_again(teacher, data, out):
    """The result of a search that goes on after every stop, and the names of the files that it left meanwhile."""
    result, seen = None, set()
    while result is None:
        with contextlib.suppress(Interrupted):
            result = compress(teacher, data, SHORT, out, Stops(6), resume=out.exists())
        seen |= {path.name for path in out.iterdir()}
    return result, seen


@pytest.fixture(scope="module", params=["cpu", GPU])
def run(request, tmp_path_factory):
    """A run's device, data and result; it was cut off again and again."""
    data = quarters()
    teacher = taught(data)
    data = data.to(request.param)
    out = tmp_path_factory.mktemp("runs") / request.param
    result, seen = cut_off_again_and_again(teacher.to(request.param), data, out)
    assert {"checkpoint.pt", "training.pt"} <= seen
    return request.param, data, result


def test_a_search_that_is_cut_off_comes_to_its_end(run):
    device, _, result = run
    assert {p.device.type for p in result.student.parameters()} == {device}
    assert result.table["compression"] > 1
    assert result.table["student"]["test_accuracy"] > 0.5
    assert result.table["student"]["latency_ms"] > 0


WITHOUT_GPU = """
import sys, pathlib, torch, n2n_fast
run, images, out = map(pathlib.Path, sys.argv[1:])
assert not torch.cuda.is_available()
for name in ("student.pt", "policies.pt", "checkpoint.pt"):
    torch.load(run / name, weights_only=True)
images = torch.load(images, weights_only=True)
students = n2n_fast.load_student(run), torch.export.load(run / "student.pt2").module()
torch.save([student(images).detach() for student in students], out)
"""


def test_a_run_is_read_where_there_is_no_gpu(run, tmp_path):
    device, data, result = run
    images = data.test.batch(torch.arange(9, device=device))[0]
    torch.save(images.cpu(), tmp_path / "images.pt")
    command = [sys.executable, "-c", WITHOUT_GPU, str(result.out.resolve()), "images.pt", "logits.pt"]
    paths = [path for path in sys.path if path]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    with tf32(False), torch.no_grad():
        wanted = result.student(images)
        on_device = load_student(result.out).to(device)(images)
    for got in (*torch.load(tmp_path / "logits.pt", weights_only=True), on_device):
        assert_near(got, wanted)


@pytest.mark.parametrize("to", SUFFIXES)
def test_a_runs_student_is_exported(run, to, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"student{SUFFIXES[to]}"
    assert export(run[2].out, to, out).difference < 1e-4  # which it reads back, on the CPU
    assert out.is_file()


@on_both
def test_a_run_goes_on_on_another_device(device, tmp_path):
    data, config = quarters(), replace(SHORT, stages="shrinkage")
    teacher = taught(data)
    for first, second in {(device, "cpu"), ("cpu", device)}:
        out = tmp_path / f"{first} {second}"
        with pytest.raises(Interrupted):  # in the final training
            compress(teacher, data.to(first), config, out, Stops(4))
        assert (out / "training.pt").is_file()
        result = compress(teacher, data.to(second), config, out, resume=True)
        assert {p.device.type for p in result.student.parameters()} == {second}


# Students


@on_both
def test_fitted_weights_are_those_of_the_cpu_though_tf32_is_allowed(device):
    data = quarters()
    teacher, images = taught(data), data.train.batch(torch.arange(128))[0]
    outputs = []
    for place in ("cpu", device):
        net, shown = teacher.to(place), images.to(place)
        with tf32(True):
            space = n2n_fast.ArchitectureSpace(net, shown[:2], shown)
            keep = [layer.name != "layer1.0.conv1" for layer in space.layers]
            arch = space.shrink(space.remove(space.teacher, keep), [0.5] * len(space.layers))
            student = space.build(arch)
        assert {p.device.type for p in student.parameters()} == {torch.device(place).type}
        with tf32(False), torch.no_grad():
            outputs.append(student(shown))
    assert_near(outputs[1], outputs[0])


@on_both
def test_recorded_steps_train_as_plain_ones_do(device):
    data = quarters()
    teacher, data, trained = taught(data).to(device), data.to(device), []
    logits_of_teacher = TeacherLogits(teacher, data.train)
    for capture in (False, True):
        with seeded(0, torch.device("cpu")):
            model = SmallResNet(1, data.classes, 1)
        batches = Batches(data.train, logits_of_teacher, 2, 32, None, seed=0)
        with tf32(False), deterministic():
            train(model.to(device), batches, learning_rate=0.02, kd_weight=0.1, autocast=False, capture=capture)
            trained.append(model(data.validation.batch(torch.arange(16, device=device))[0]).detach())
    assert_near(trained[1], trained[0], 3e-2)  # other sums vary in order, and each step multiplies that


class Waits(nn.Module):
    """A network that the host must wait for."""

    def __init__(self):
        super().__init__()
        self.net = SmallResNet(1, 4, 1)

    def forward(self, images):
        logits = self.net(images)
        return logits * (1.0 if logits.abs().max().item() < 1e9 else 0.5)


@on_both
def test_steps_that_wait_for_the_device_are_not_recorded(device):
    data, losses = quarters().to(device), []
    for capture in (False, True):
        with seeded(0, torch.device("cpu")):
            model = Waits()
        batches = Batches(data.train, None, 1, 32, None, seed=0)
        with tf32(False), deterministic():
            train(model.to(device), batches, learning_rate=0.02, autocast=False, capture=capture)
            losses.append(model(data.validation.batch(torch.arange(16, device=device))[0]).detach())
    assert_near(losses[1], losses[0], 3e-2)


@on_both
def test_convolutions_are_the_same_as_products(device):
    net = SmallResNet(1, 4, 1).to(device).eval()
    images = torch.randn(9, 1, 16, 16, device=device)
    with tf32(False), torch.no_grad():
        wanted = net(images)
        with as_products(net, torch.device(device)):
            assert_near(net(images), wanted, 1e-5)


# Operators


def side_stream(device):
    """A stream that is not the default one, and first has other work to do."""
    if device == "cpu":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
    return torch.cuda.stream(stream)


def recorded(call, device):
    """`call`, without arguments, by a CUDA graph where there is a GPU."""
    if device == "cpu":
        return call
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        outputs = call()

    def replay():
        graph.replay()
        return outputs

    return replay


def assert_loss(got, student, teacher, labels):
    """Of loss, gradient and count by a device; the other tensors on the CPU."""
    for found, wanted in zip(got, native.kd_loss_and_grad_reference(student, teacher, labels, 0.3), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-6)


@on_both
def test_operators_work_on_the_current_stream(device):
    student, teacher, labels = logits(64, 100)
    there = [tensor.to(device) for tensor in (student, teacher, labels)]
    weights, rows, columns, kernels = SMALL_PLAN
    weights_there = [weight.to(device) for weight in weights]
    with side_stream(device):  # on another stream the kernels would read what is not there yet
        loss = native.kd_loss_and_grad(there[0] * 2, there[1], there[2], 0.3)
        doubled = [weight * 2 for weight in weights_there]
        cut = native.materialize(doubled, rows, columns, kernels)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()
    assert_loss(loss, student * 2, teacher, labels)
    assert_results(
        [part.cpu() for part in cut], native.materialize([weight * 2 for weight in weights], *SMALL_PLAN[1:])
    )


@on_both
def test_the_loss_is_replayed_on_new_inputs(device):
    static = [tensor.to(device) for tensor in logits(64, 100)]
    replay = recorded(lambda: native.kd_loss_and_grad(*static, 0.3), device)
    for seed in (1, 2):
        fresh = logits(64, 100, seed=seed)
        for tensor, new in zip(static, fresh, strict=True):
            tensor.copy_(new)
        assert_loss(replay(), *fresh)


@on_both
def test_opcheck(device):
    student, teacher, labels = (tensor.to(device) for tensor in logits(5, 7))
    opcheck(torch.ops.n2n_fast.kd_loss, (student.requires_grad_(), teacher, labels, 0.7, True))
    weights, rows, columns, _ = SMALL_PLAN
    moved = [[None if part is None else part.to(device) for part in parts] for parts in (weights, rows, columns)]
    arguments = (*moved, [3, 1, 0, 0, 0, 0])
    opcheck(torch.ops.n2n_fast.materialize, (*arguments, torch.randn(200, device=device)))


@on_both
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_loss_under_inductor(device):
    student, teacher, labels = logits(64, 100)
    there = [tensor.to(device) for tensor in (student, teacher, labels)]
    there[0].requires_grad_()
    compiled = torch.compile(lambda s, t, y: native.kd_loss(s * 2, t, y, 0.3), fullgraph=True)
    loss = compiled(*there)
    loss.backward()
    wanted, grad, _ = native.kd_loss_and_grad_reference(student * 2, teacher, labels, 0.3)
    torch.testing.assert_close(loss.detach().cpu(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(there[0].grad.cpu(), 2 * grad, rtol=1e-5, atol=1e-6)


@on_gpu
@pytest.mark.parametrize(("dtype", "rtol", "atol"), DTYPES)
@pytest.mark.parametrize("shape", LOGIT_SHAPES, ids=str)
def test_the_loss_is_that_of_the_cpu(shape, dtype, rtol, atol, device):
    student, teacher, labels = logits(*shape, dtype)
    there = [tensor.to(device) for tensor in (student, teacher, labels)]
    loss, grad, correct = native.kd_loss_and_grad(*there, 0.3)
    wanted = native.kd_loss_and_grad(student, teacher, labels, 0.3)
    torch.testing.assert_close(loss.cpu(), wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.cpu(), wanted[1], rtol=rtol, atol=atol)
    assert correct.item() == wanted[2].item()
    assert torch.equal(native.kd_loss_and_grad(*there, 0.3)[0], loss)


@on_gpu
def test_a_label_out_of_range_gives_nan(device):
    student, teacher, _ = logits(3, 4)
    assert native.kd_loss(student.to(device), teacher.to(device), torch.tensor([0, 4, 1], device=device), 0.5).isnan()


@on_gpu
@settings(max_examples=100, deadline=None)
@given(plan())
def test_weights_are_cut_as_on_the_cpu(device, arguments):
    weights, keep_out, keep_in, kernels = arguments
    results = native.materialize([weight.to(device) for weight in weights], keep_out, keep_in, kernels)
    assert_results([part.cpu() for part in results], native.materialize(*arguments))
    with pytest.raises(ValueError, match="out of range"):
        native.materialize([torch.randn(3, device=device)], [torch.tensor([3])], [None])
