"""The search as a whole, on a teacher and a data set of seconds."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import n2n_fast
from n2n_fast import search
from n2n_fast.distill import fit, seeded
from n2n_fast.errors import BadInput
from n2n_fast.reward import Constraints, reward
from n2n_fast.search import SearchConfig, compress, load_student
from n2n_fast.space import ArchitectureSpace
from n2n_fast.teacher import SmallResNet

TINY = SearchConfig(updates=2, rollouts=3, epochs=0.5, final_epochs=1, batch_size=32, calibration_images=64)


@pytest.fixture(scope="module")
def data():
    """Four classes, told apart by which quarter of the image is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    images = 0.5 * torch.randn(400, 1, 8, 8, generator=generator)
    for n, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[n, :, row : row + 4, column : column + 4] += 1.0
    return n2n_fast.from_tensors("quarters", (images, labels), seed=0)


@pytest.fixture(scope="module")
def teacher(data):
    with seeded(0, torch.device("cpu")):
        model = SmallResNet(1, data.classes, 1)
    return fit(model, n2n_fast.data.Batches(data.train, model, 6, 32, None, seed=0), learning_rate=0.1)


@pytest.fixture(scope="module")
def result(teacher, data, tmp_path_factory):
    return compress(teacher, data, TINY, tmp_path_factory.mktemp("runs") / "a")


def lines(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def test_run_directory(result, teacher, data):
    names = {path.name for path in result.out.iterdir()}
    assert names >= {
        *("config.json", "history.jsonl", "student.pt2", "student.pt", "architecture.json", "result.json"),
    }
    table = json.loads((result.out / "result.json").read_text())
    assert table == result.table
    for part, model in (("teacher", teacher), ("student", result.student)):
        assert table[part]["params"] == sum(p.numel() for p in model.parameters())
        assert table[part]["test_accuracy"] == n2n_fast.data.accuracy(model, data.test)
        assert table[part]["validation_accuracy"] == n2n_fast.data.accuracy(model, data.validation)
        assert table[part]["latency_ms"] > 0
    assert table["compression"] == table["teacher"]["params"] / table["student"]["params"]
    assert [part["stage"] for part in json.loads((result.out / "architecture.json").read_text())] == [
        "removal",
        "shrinkage",
    ]


def test_history_holds_every_rollout_with_its_own_reward(result):
    history = lines(result.out)
    assert [(r["stage"], r["update"], r["index"]) for r in history] == [
        (stage, update, index) for stage in ("removal", "shrinkage") for update in range(2) for index in range(3)
    ]
    teacher = result.table["teacher"]
    for rollout in history:
        if rollout["accuracy"] is not None:
            expected = reward(rollout["accuracy"], rollout["params"], teacher["validation_accuracy"], teacher["params"])
            assert rollout["reward"] == expected
        else:
            assert rollout["reward"] == -1
            assert rollout["error"]


def test_student_is_reloaded_without_its_class(result, data):
    loaded = load_student(result.out)
    for count in (1, 2, 7):
        images = data.test.batch(torch.arange(count))[0]
        torch.testing.assert_close(loaded(images), result.student(images), rtol=1e-5, atol=1e-6)
    state = torch.load(result.out / "student.pt", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in result.student.state_dict().items())


def test_same_seed_same_result(result, teacher, data, tmp_path):
    again = compress(teacher, data, TINY, tmp_path / "b")
    for a, b in zip(lines(result.out), lines(again.out), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    for name, value in again.student.state_dict().items():
        assert torch.equal(value, result.student.state_dict()[name])


def test_another_seed_another_history(result, teacher, data, tmp_path):
    other = compress(teacher, data, replace(TINY, seed=1, stages="removal", updates=1), tmp_path / "c")
    assert [r["actions"] for r in lines(other.out)] != [r["actions"] for r in lines(result.out)[:3]]


def test_test_split_is_read_only_at_the_end(teacher, data, tmp_path, monkeypatch):
    events = []
    measured, trained = search.accuracy, search.fit
    monkeypatch.setattr(
        search,
        "accuracy",
        lambda m, split: (events.append("test" if split is data.test else ""), measured(m, split))[1],
    )
    monkeypatch.setattr(search, "fit", lambda *a, **k: (events.append("fit"), trained(*a, **k))[1])
    compress(teacher, data, replace(TINY, stages="shrinkage", updates=1), tmp_path / "d")
    assert events.count("test") == 2
    assert "fit" not in events[events.index("test") :]


def test_degenerate_students_are_never_built(teacher, data, tmp_path, monkeypatch):
    built = []
    build = ArchitectureSpace.build
    monkeypatch.setattr(
        ArchitectureSpace, "build", lambda self, arch, init=None: (built.append(arch), build(self, arch, init))[1]
    )
    config = replace(TINY, stages="shrinkage", ratios=(1.0,), updates=1)
    with pytest.raises(BadInput, match="none of 3 students"):
        compress(teacher, data, config, tmp_path / "e")
    assert built == []
    assert {r["reward"] for r in lines(tmp_path / "e")} == {-1.0}


@pytest.mark.parametrize(("init", "saliency"), [("inherit", "activations"), ("calibrated", "l1"), ("random", None)])
def test_what_students_start_from_can_be_chosen(teacher, data, tmp_path, init, saliency):
    config = replace(TINY, stages="shrinkage", updates=1, init=init, saliency=saliency)
    found = compress(teacher, data, config, tmp_path / "g")
    assert json.loads((found.out / "config.json").read_text())["saliency"] == saliency
    assert {line["error"] for line in lines(found.out)} <= {None, "no smaller than the teacher"}


def test_stage_two_starts_from_the_trained_student_of_stage_one(result):
    first, second = json.loads((result.out / "architecture.json").read_text())
    kept = [name for name, keep in zip(first["layers"], first["keep"], strict=True) if keep]
    assert second["layers"] == kept
    assert second["params"] < first["params"]


def test_unmet_limits_are_told_and_the_nearest_student_is_saved(teacher, data, tmp_path):
    config = replace(TINY, stages="shrinkage", updates=2, max_params=1)
    found = compress(teacher, data, config, tmp_path / "f")
    assert not found.feasible
    history = lines(found.out)
    limits = Constraints(max_params=1)
    nearest = min(limits.violation(r["params"], r["accuracy"]) for r in history)
    assert limits.violation(found.table["student"]["params"], 1.0) == nearest
    plain = [reward(r["accuracy"], r["params"], found.table["teacher"]["validation_accuracy"],
                    found.table["teacher"]["params"]) for r in history]  # fmt: skip
    assert [r["reward"] for r in history[:3]] == plain[:3]
    assert [r["reward"] for r in history[3:]] == [Constraints.anneal(value, 1) for value in plain[3:]]


def test_a_diverging_student_scores_minus_one_and_the_search_goes_on(teacher, data, tmp_path, monkeypatch):
    count = iter(range(100))
    trained = search.fit

    def fails_once(*args, **kwargs):
        if next(count) == 1:
            raise search.Diverged("the loss is nan at step 10")
        return trained(*args, **kwargs)

    monkeypatch.setattr(search, "fit", fails_once)
    found = compress(teacher, data, replace(TINY, stages="removal", updates=1), tmp_path / "g")
    history = lines(found.out)
    assert [r["reward"] == -1 for r in history] == [False, True, False]
    assert history[1]["error"] == "the loss is nan at step 10"


def test_a_used_directory_is_left_alone(result, teacher, data):
    before = (result.out / "history.jsonl").read_bytes()
    with pytest.raises(BadInput, match="holds a run already"):
        compress(teacher, data, TINY, result.out)
    assert (result.out / "history.jsonl").read_bytes() == before


def test_a_teacher_at_chance_is_refused_with_a_hint(data, tmp_path):
    with seeded(0, torch.device("cpu")):
        untrained = SmallResNet(1, data.classes, 1)
    with pytest.raises(BadInput, match=r"no better than chance.*--mean"):
        compress(untrained, data, TINY, tmp_path / "h")


def test_the_teacher_is_not_touched(teacher, data, tmp_path):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    compress(teacher, data, replace(TINY, stages="removal", updates=1, rollouts=1), tmp_path / "i")
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("updates", 0), ("ratios", (0.5, 0.2)), ("stages", "all"), ("epochs", float("nan")), ("min_accuracy", 1.5)],
)
def test_useless_settings_are_refused(setting, value):
    with pytest.raises(BadInput, match=setting):
        SearchConfig(**{setting: value})


def test_no_run_to_load(tmp_path):
    with pytest.raises(BadInput, match=r"no student\.pt2"):
        load_student(tmp_path)
    (tmp_path / "student.pt2").write_text("nothing")
    with pytest.raises(BadInput, match="not a student, or a truncated one"):
        load_student(tmp_path)


class Told(search.SearchProgress):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


class TwoHeads(torch.nn.Module):
    """A teacher in half precision that also gives its features, in a submodule that cannot be traced."""

    class Careful(torch.nn.Module):
        def forward(self, x):
            return x if bool(x.isfinite().all()) else x.nan_to_num()

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.careful = teacher, self.Careful()

    def forward(self, x):
        logits = self.teacher(x)
        return {"features": x, "logits": self.careful(logits)}


def test_a_teacher_in_half_precision_with_two_outputs_and_a_leaf(teacher, data, tmp_path):
    unusual = TwoHeads(copy.deepcopy(teacher)).half()
    with pytest.raises(BadInput, match="'careful' as `leaf`"):
        compress(unusual, data, TINY, tmp_path / "untraceable")
    config = replace(TINY, leaf=("careful",), round_to=4, ratios=(0.5, 1.0))
    told = Told()
    result = compress(unusual, data, config, tmp_path / "run", told)
    assert any("student.pt2 was not written" in message for message in told.messages)
    assert {p.dtype for p in unusual.parameters()} == {torch.float16}
    assert {p.dtype for p in result.student.parameters()} == {torch.float32}
    widths = [m.out_channels for m in result.student.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(width % 4 == 0 for width in widths)
    with pytest.raises(BadInput, match=r"no student.pt2"):
        load_student(result.out)
    result.student.load_state_dict(torch.load(result.out / "student.pt", weights_only=True))
    assert result.table["student"]["params"] == sum(p.numel() for p in result.student.parameters())
