"""The search as a whole, on a teacher and a data set of seconds."""

import copy
import json
import math
from dataclasses import fields, replace

import pytest
import torch

from n2n_fast import search as wing
from n2n_fast.files.errors import BadInput, DeviceFault
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search import anchors, environment
from n2n_fast.search.checkpoint import Interrupted
from n2n_fast.search.config import SETTINGS, SearchConfig
from n2n_fast.search.environment import MOST_TILTED
from n2n_fast.search.policies import RemovalPolicy, ShrinkagePolicy, clone_behaviour
from n2n_fast.search.predictor import AccuracyPredictor
from n2n_fast.search.reinforce import SearchProgress, compress
from n2n_fast.search.result import load_student
from n2n_fast.search.reward import Constraints, Cost, reward
from n2n_fast.training.data import accuracy
from n2n_fast.training.distill import Diverged, seeded
from n2n_fast.training.teachers import SmallResNet
from quarters import TINY, equal, history, outcome, quarters, taught

BOTH = ("removal", "shrinkage")
DATA = quarters()


@pytest.fixture(scope="module")
def model():
    return taught(DATA)


@pytest.fixture(scope="module")
def space(model):
    return ArchitectureSpace(model, DATA.train.batch(torch.arange(2))[0])


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A search that nothing disturbs."""
    return compress(model, DATA, TINY, tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def search(model, tmp_path):
    """Search by TINY with other settings; without anchors, so that rewards are of accuracies as they are measured."""

    def run(name="run", of=model, **given):
        how = {key: value for key, value in given.items() if key not in SETTINGS}
        settings = {"anchors": 0, **{key: value for key, value in given.items() if key in SETTINGS}}
        return compress(of, DATA, replace(TINY, **settings), tmp_path / name, **how)

    return run


def rollouts(run):
    return history(run.out, "rollout")


def tried(run):
    return [line for line in history(run.out, "rollout", "anchor") if line["short_accuracy"] is not None]


def rewarded(run, line, accuracy="predicted_accuracy", by="params", least=0):
    """The reward of a line by the formula."""
    of = run.table["teacher"]
    return reward(line[accuracy], max(line[by], least), of["validation_accuracy"], of[by])


# What a search leaves


def test_run_directory(whole, model):
    names = {path.name for path in whole.out.iterdir()}
    assert names >= {
        *("config.json", "history.jsonl", "student.pt2", "student.pt", "architecture.json", "result.json"),
        *("checkpoint.pt", "policies.pt", "front.json"),
    }
    assert "training.pt" not in names
    table = json.loads((whole.out / "result.json").read_text())
    assert table == whole.table
    for name, network in (("teacher", model), ("student", whole.student)):
        assert table[name]["params"] == sum(p.numel() for p in network.parameters())
        assert table[name]["test_accuracy"] == accuracy(network, DATA.test)
        assert table[name]["validation_accuracy"] == accuracy(network, DATA.validation)
        assert table[name]["latency_ms"] > 0
    assert table["compression"] == table["teacher"]["params"] / table["student"]["params"]


def test_stage_two_starts_from_the_trained_student_of_stage_one(whole):
    first, second = json.loads((whole.out / "architecture.json").read_text())
    assert (first["stage"], second["stage"]) == BOTH
    assert second["layers"] == [name for name, keep in zip(first["layers"], first["keep"], strict=True) if keep]
    assert second["params"] < first["params"]


def test_history_holds_every_rollout_with_its_own_reward(whole):
    lines = rollouts(whole)
    assert [(r["stage"], r["update"], r["index"]) for r in lines] == [
        (name, update, index) for name in BOTH for update in range(2) for index in range(3)
    ]
    names = [field.name for field in fields(AccuracyPredictor)]
    learned = {
        (line["stage"], line["update"]): AccuracyPredictor(**{name: line[name] for name in names})
        for line in history(whole.out, "predictor")
    }
    assert all(predictor.count >= 4 and predictor.error is not None for predictor in learned.values())
    for line in lines:
        if line["predicted_accuracy"] is None:
            assert line["reward"] == -1
            assert line["error"]
        else:
            predicted = learned[line["stage"], line["update"]](line["short_accuracy"], math.log(line["macs"]))
            assert (line["predicted_accuracy"], line["accuracy_error"]) == predicted
            assert line["reward"] == rewarded(whole, line)


def test_anchors_are_trained_fully_and_spread_over_the_range(whole):
    lines = history(whole.out, "anchor")
    assert [(a["stage"], a["index"], a["update"]) for a in lines] == [
        (name, i, int(i == 4)) for name in BOTH for i in range(5)
    ]
    for name in BOTH:
        sizes = [a["params"] for a in lines if a["stage"] == name]
        assert len(set(sizes)) == 5
        assert max(sizes[:4]) > 1.3 * min(sizes[:4])
    first = [r for r in rollouts(whole) if (r["stage"], r["update"]) == ("removal", 0)]
    best = max(first, key=lambda r: r["reward"])
    assert best["architecture"] in {a["architecture"] for a in lines[:5]}


def test_the_front_holds_what_no_student_beats(whole):
    front = json.loads((whole.out / "front.json").read_text())
    for by in ("params", "macs"):
        costs, accuracies = zip(*((p[by], p["accuracy"]) for p in front[by]), strict=True)
        assert sorted(costs) == list(costs)
        assert sorted(accuracies) == list(accuracies)
        assert min(costs) == min(r[by] for r in tried(whole))


def test_student_is_reloaded_without_its_class(whole, tmp_path):
    loaded = load_student(whole.out)
    for count in (1, 2, 7):
        images = DATA.test.batch(torch.arange(count))[0]
        torch.testing.assert_close(loaded(images), whole.student(images), rtol=1e-5, atol=1e-6)
    assert equal(torch.load(whole.out / "student.pt", weights_only=True), dict(whole.student.state_dict()))
    with pytest.raises(BadInput, match=r"no student\.pt2"):
        load_student(tmp_path)
    (tmp_path / "student.pt2").write_text("nothing")
    with pytest.raises(BadInput, match="not a student, or a truncated one"):
        load_student(tmp_path)


def test_the_best_of_those_trained_fully_is_the_result(search):
    run = search(stages="shrinkage", keep_top=3, anchors=4)
    finals = history(run.out, "final")
    assert len({f["architecture"] for f in finals}) == 3
    best = max(finals, key=lambda final: rewarded(run, final, "full_accuracy"))
    assert run.table["student"]["params"] == best["params"]
    assert run.table["student"]["validation_accuracy"] == best["full_accuracy"]


def test_test_split_is_read_only_at_the_end(search, monkeypatch):
    events, trained = [], environment.train
    for module in (wing.stage, wing.teacher, environment, wing.result):
        name = "accuracy" if hasattr(module, "accuracy") else "answers"
        measure = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda m, of, *a, f=measure, **k: (events.append(of is DATA.test), f(m, of, *a, **k))[1]
        )
    monkeypatch.setattr(environment, "train", lambda *a, **k: (events.append("train"), trained(*a, **k))[1])
    search(stages="shrinkage", updates=1, anchors=4)
    assert events.count(True) == 2
    assert "train" not in events[events.index(True) :]


# Rewards and limits


@pytest.mark.parametrize("objective", ["macs", "latency"])
def test_the_objective_is_what_the_reward_counts(objective, search):
    run = search(stages="shrinkage", updates=1, objective=objective, latency_batch=2)
    for line in rollouts(run):
        if objective == "macs":
            assert line["latency"] is None
            assert line["reward"] == rewarded(run, line, by="macs")
        else:
            assert line["latency"] > 0


def test_a_drop_below_the_teacher_is_a_limit(search):
    run = search(stages="shrinkage", updates=1, max_drop=0.5, keep_top=3)
    least = run.table["teacher"]["validation_accuracy"] - 0.005
    assert run.feasible == (run.table["student"]["validation_accuracy"] >= least)
    for line in rollouts(run):
        assert line["feasible"] == (line["predicted_accuracy"] >= least)


def test_a_limit_on_accuracy_is_judged_by_what_the_final_training_gives(search):
    run = search(stages="removal", max_drop=5.0, anchors=4)
    finished = [a for a in history(run.out, "anchor") if a["final_accuracy"] is not None]
    assert [a["index"] for a in finished] == [2]
    line = history(run.out, "predictor")[-2]  # the last follows the final training
    learned = AccuracyPredictor(**{field.name: line[field.name] for field in fields(AccuracyPredictor)})
    pairs = [(a["full_accuracy"], a["final_accuracy"]) for a in finished]
    before = replace(learned, remaining=1.0, gain=0.0, teacher=0.0)
    assert before.learned_final(pairs, run.table["teacher"]["validation_accuracy"]) == learned


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "limited"), [("params", "params"), ("macs", "macs"), ("params", "macs")])
def test_students_are_brought_to_the_limits(objective, limited, space, search):
    limit = int(0.3 * Cost(space.teacher.params, space.teacher.macs).of(limited))
    run = search(objective=objective, updates=3, anchors=4, **{f"max_{limited}": limit})
    assert {r["stage"] for r in tried(run)} == set(BOTH)
    assert all(r[limited] <= limit for r in tried(run))
    near = [r[limited] > 0.85 * limit for r in tried(run) if r["stage"] == "removal" or objective == limited]
    assert sum(near) > 0.7 * len(near)
    for line in rollouts(run):
        if line["predicted_accuracy"] is not None:
            assert line["feasible"]
            assert line["reward"] == rewarded(run, line, by=objective, least=limit if objective == limited else 0)
    mildest = history(run.out, "anchor")[0]
    narrowed = space.shrink_within(space.teacher, space.tilted(MOST_TILTED / 2, limited), **{limited: limit})
    assert (mildest["params"], mildest["macs"]) == (narrowed.params, narrowed.macs)


def test_anchors_at_a_limit_save_ever_more_where_most_is_to_be_saved(space, search):
    run = search(updates=1, anchors=4, max_params=space.teacher.params // 5)
    mild, tilted, most, _ = (a["macs"] for a in history(run.out, "anchor") if a["stage"] == "shrinkage")
    assert mild < tilted < most  # early layers have few params and large images


def test_what_the_first_stage_removes_is_shrunk_by_the_second_alone(space, search):
    most = space.teacher.params // 4
    run = search(max_params=most)
    first, second = json.loads((run.out / "architecture.json").read_text())
    assert first["params"] == space.remove(space.teacher, first["keep"]).params > most >= second["params"]
    assert history(run.out, "final")[0]["params"] == first["params"]


def test_where_nothing_is_removed_the_second_stage_shrinks_the_teacher_itself(search, monkeypatch):
    monkeypatch.setattr(RemovalPolicy, "sample", lambda self, x, mask, count, generator: mask.new_ones(
        count, len(mask), dtype=torch.int64))  # fmt: skip
    run = search(updates=1, max_params=20_000)
    first, *students = history(run.out, "final")
    of = run.table["teacher"]
    assert (first["params"], first["full_accuracy"]) == (of["params"], of["validation_accuracy"])
    assert all(student["params"] <= 20_000 for student in students)


def test_what_is_within_the_limits_after_stage_one_is_trained_in_the_last(space, search, monkeypatch):
    monkeypatch.setattr(RemovalPolicy, "sample", lambda self, x, mask, n, generator: (~mask).long().expand(n, -1))
    monkeypatch.setattr(ShrinkagePolicy, "sample", lambda self, x, mask, count, generator: torch.full(
        (count, len(mask), 2), self.ratios - 1))  # fmt: skip
    run = search(updates=1, rollouts=1, keep_top=1, max_params=space.teacher.params - 1)
    removed, student = history(run.out, "final")
    assert student["params"] == removed["params"] < space.teacher.params
    assert student["full_accuracy"] == run.table["student"]["validation_accuracy"]


@pytest.mark.slow
def test_students_that_have_to_be_fast_are_not_made_wider(space, search):
    limits = {"stages": "shrinkage", "max_params": space.teacher.params // 2}
    runs = search("alone", **limits), search("fast", **limits, max_latency=1e-6)
    alone, fast = (min(r["params"] for r in rollouts(run)) for run in runs)
    assert fast < 0.8 * alone


def test_unmet_limits_are_told_and_the_nearest_student_is_saved(space, search):
    run, limits = search(stages="shrinkage", max_params=1), Constraints(max_params=1)
    params = run.table["student"]["params"]
    assert not run.feasible
    assert run.table["gaps"] == {"params": pytest.approx(params - 1)}
    assert params <= space.shrink_within(space.teacher, [1.0] * len(space.layers), params=1).params
    lines = rollouts(run)
    nearest = min(limits.violation(Cost(r["params"], r["macs"]), r["predicted_accuracy"]) for r in lines)
    assert limits.violation(Cost(params, 0), 1.0) <= 1.5 * nearest  # the best of the nearest
    assert [r["reward"] for r in lines] == [Constraints.anneal(rewarded(run, r), r["update"]) for r in lines]


def test_the_reward_falls_steadily_beyond_a_limit(space, search):
    most = space.teacher.params // 10
    run = search(stages="removal", updates=3, max_params=most, penalty=0.05)
    lines = [line for line in rollouts(run) if line["predicted_accuracy"] is not None]
    severities = [min(1.0, max(0.0, 0.05 * (line["params"] / most - 1))) for line in lines]
    assert any(0 < severity < 1 and line["update"] for line, severity in zip(lines, severities, strict=True))
    for line, severity in zip(lines, severities, strict=True):
        plain = rewarded(run, line, least=most)
        assert line["reward"] == pytest.approx(Constraints.anneal(plain, line["update"], severity))
        assert line["feasible"] == (severity == 0)


def test_ones_own_training_and_reward(search):
    trained, wanted = [], 3000

    def training(student, epochs):
        assert student.training
        trained.append(epochs)

    def nearness(accuracy, cost):
        return -abs(cost.params - wanted)

    own = {"training": training, "reward": nearness}
    run = search(stages="shrinkage", updates=1, keep_top=1, anchors=4, **own)
    short = TINY.rollout_steps / (len(DATA.train) // TINY.batch_size)
    assert trained == [short, 0.5] * 4 + [short] * 3 + [1]
    assert all(line["reward"] == -abs(line["params"] - wanted) for line in rollouts(run))
    assert run.table["student"]["params"] == min((r["params"] for r in tried(run)), key=lambda p: abs(p - wanted))


# Policies


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_policies_begin_at_the_best_anchor(name, whole, space, search, monkeypatch):
    shown = []
    monkeypatch.setattr(anchors, "clone_behaviour", lambda *of: (shown.append(of), clone_behaviour(*of)))
    settings = {"stages": name, "updates": 1, "anchors": 4}
    run = search("begun", **settings)
    ((_, _, _, actions),) = shown
    if name == "removal":
        arch = space.remove(space.teacher, [action == 1 for action in actions.tolist()])
    else:
        arch = space.shrink(space.teacher, *([TINY.ratios[i] for i in row] for row in actions.T.tolist()))
    best = max(history(run.out, "anchor"), key=lambda a: rewarded(run, a, "full_accuracy"))
    assert arch.params == best["params"]
    shown.clear()
    search("told", **settings, keep_probability=0.8)
    search("trained before", **settings, policies=whole.out / "policies.pt")
    search("without anchors", **{**settings, "anchors": 0})
    assert not shown


def test_policies_start_where_another_run_ended(whole, search, tmp_path):
    file = whole.out / "policies.pt"
    saved = torch.load(file, weights_only=True)
    assert set(saved) == set(BOTH)
    settings = {"stages": "removal", "updates": 1, "removal_learning_rate": 0.0}
    again = search("on", **settings, policies=file)
    assert equal(torch.load(again.out / "policies.pt", weights_only=True)["removal"], saved["removal"])
    with pytest.raises(BadInput, match="policy of removal does not fit"):
        search("off", **settings, hidden=7, policies=file)
    (tmp_path / "text.pt").write_text("no policy")
    with pytest.raises(BadInput, match=r"no file that torch\.save wrote, or a damaged one"):
        search("text", policies=tmp_path / "text.pt")


@pytest.mark.slow
def test_policies_learn_what_is_rewarded(search):
    """With a reward that only counts params, the policy comes to remove more, and chance does not."""
    settings = {"stages": "removal", "updates": 40, "rollouts": 4, "rollout_steps": 0, "validation_images": 8}
    runs = (search(str(rate), **settings, removal_learning_rate=rate) for rate in (0.02, 0.0))
    learned, chance = (sum(line["reward"] for line in rollouts(run)[-40:]) / 40 for run in runs)
    assert learned > chance + 0.05


# Going on, and the same again


class Stops(SearchProgress):
    """Asks for a stop after so many calls, or leaves at once in the midst of an update."""

    def __init__(self, calls=10**9, rollouts=10**9):
        self.calls, self.rollouts = calls, rollouts

    def stopping(self):
        self.calls -= 1
        return self.calls < 0

    def rollout(self, rollout, best, compression):
        self.rollouts -= 1
        if self.rollouts == 0:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    "at", [{"calls": n} for n in (0, 7, 20, 33, 51, 62)] + [{"rollouts": 2}, {"rollouts": 7}], ids=str
)
def test_an_interrupted_search_goes_on_to_the_same_end(at, whole, search, tmp_path):
    with pytest.raises(Interrupted if "calls" in at else KeyboardInterrupt):
        search(anchors=4, progress=Stops(**at))
    before = history(tmp_path / "run")
    assert before == history(whole.out)[: len(before)]
    if "rollouts" in at:  # the update at hand is done again
        known = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["history"]
        assert known < (tmp_path / "run" / "history.jsonl").stat().st_size
    assert equal(outcome(search(anchors=4, resume=True).out), outcome(whole.out))


@pytest.mark.parametrize(("owner", "name"), [(environment.Evaluator, "evaluate"), (environment, "train")])
def test_running_out_of_memory_ends_a_search_that_can_be_resumed(owner, name, whole, search, tmp_path, monkeypatch):
    before, left = getattr(owner, name), [11]

    def fails(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(DeviceFault, match="--batch-size"):
        search(anchors=4)
    kept = history(tmp_path / "run")
    assert len(kept) >= 5
    again = history(search(anchors=4, resume=True).out)
    assert again[: len(kept)] == kept
    assert again == history(whole.out)


def test_a_finished_search_can_be_resumed_to_the_same_end(whole, model):
    before = outcome(whole.out)
    again = compress(model, DATA, TINY, whole.out, resume=True)
    assert equal(outcome(whole.out), before)
    assert again.table["student"]["test_accuracy"] == whole.table["student"]["test_accuracy"]


def test_a_run_goes_on_with_its_own_settings_alone(whole, model):
    with pytest.raises(BadInput, match=r"another configuration: rollouts \(3 there, 4 here\)"):
        compress(model, DATA, replace(TINY, rollouts=4), whole.out, resume=True)
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(next(other.parameters())[:1])
    with pytest.raises(BadInput, match="another configuration: teacher"):
        compress(other, DATA, TINY, whole.out, resume=True)


def test_same_seed_same_result_and_the_teacher_is_not_touched(whole, model, search):
    before = copy.deepcopy(model.state_dict())
    assert equal(outcome(search("same", anchors=4).out), outcome(whole.out))
    assert equal(dict(model.state_dict()), dict(before))
    other = search("other", seed=1, stages="removal", updates=1)
    assert [r["actions"] for r in rollouts(other)] != [r["actions"] for r in rollouts(whole)[:3]]


# Students that fail, and those met before


@pytest.mark.slow
def test_an_architecture_seen_before_costs_nothing(search, monkeypatch):
    evaluated, evaluate = [], environment.Evaluator.evaluate
    monkeypatch.setattr(environment.Evaluator, "evaluate", lambda s, arch, seed: (
        evaluated.append(arch.key), evaluate(s, arch, seed))[1])  # fmt: skip
    settings = {"stages": "removal", "updates": 8, "rollouts": 4, "keep_probability": 0.95}
    lines = rollouts(search("seen", **settings))
    assert len(evaluated) == len(set(evaluated)) < len(lines)
    first = {}
    for line in lines:
        if line["architecture"] is not None:
            same = first.setdefault(line["architecture"], line)
            assert line["cached"] == (line is not same)
            assert line["reward"] == same["reward"]
    evaluated.clear()
    anew = rollouts(search("anew", **settings, reuse=False))
    assert not any(line["cached"] for line in anew)
    assert len(evaluated) == sum(line["architecture"] is not None for line in anew)


def test_degenerate_students_are_never_built(search, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(ArchitectureSpace, "build", lambda self, arch, init=None: built.append(arch))
    with pytest.raises(BadInput, match="none of 3 students"):
        search(stages="shrinkage", ratios=(1.0,), updates=1)
    assert built == []
    assert {r["reward"] for r in history(tmp_path / "run", "rollout")} == {-1.0}


def test_a_diverging_student_scores_minus_one_and_the_search_goes_on(search, monkeypatch):
    count, trained = iter(range(100)), environment.train

    def fails_once(*args, **kwargs):
        if next(count) == 1:
            raise Diverged("the loss is nan at step 10")
        return trained(*args, **kwargs)

    monkeypatch.setattr(environment, "train", fails_once)
    lines = rollouts(search(stages="removal", updates=1))
    assert [(r["reward"] == -1, r["error"]) for r in lines] == [
        (False, None), (True, "the loss is nan at step 10"), (False, None)
    ]  # fmt: skip


def test_full_trainings_that_diverge_end_the_search(search, monkeypatch):
    def diverges(*args, checkpointer=None, **kwargs):
        if checkpointer is not None:
            raise Diverged("the loss is nan")

    monkeypatch.setattr(environment, "train", diverges)
    with pytest.raises(BadInput, match="lower --final-learning-rate"):
        search(stages="shrinkage", updates=1)


@pytest.mark.parametrize(("init", "importance"), [("sliced", "activations"), ("fitted", "l1"), ("random", None)])
def test_what_students_start_from_can_be_chosen(search, init, importance):
    run = search(stages="shrinkage", updates=1, init=init, importance=importance)
    assert json.loads((run.out / "config.json").read_text())["importance"] == importance
    assert {line["error"] for line in rollouts(run)} <= {None, "no smaller than the teacher"}


# Teachers and settings


USELESS = {"updates": 0, "ratios": (0.5, 0.2), "stages": "all", "epochs": float("nan"), "min_accuracy": 1.5,
           "objective": "price", "max_latency": 0.0, "max_drop": -1.0}  # fmt: skip


@pytest.mark.parametrize(("setting", "value"), USELESS.items())
def test_useless_settings_are_refused(setting, value):
    with pytest.raises(BadInput, match=setting):
        SearchConfig(**{setting: value})


class Flattened(torch.nn.Module):
    """Loses the batch axis of a single image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).squeeze()


def test_teachers_of_no_use_are_refused(model, search, tmp_path):
    with seeded(0, torch.device("cpu")):
        untrained = SmallResNet(1, DATA.classes, 1)
    constant, damaged, one_image = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        constant.fc.weight.zero_()
        damaged.fc.bias[1] = float("inf")
        one_image.conv1.weight[0, 0, 0, 0] = 3e38
    for useless, expected in (
        (untrained, r"no better than chance.*--mean"),
        (constant, "classes of quarters apart: its balanced accuracy .* no better than chance"),
        (damaged, "NaN or infinite logits on quarters; its weights are damaged"),
        (one_image, "weights are damaged"),
        (Flattened(model), r"gives an output of shape \(4,\); expected logits \(1, classes\)"),
        (SmallResNet(1, 7, 1), "tells 7 classes apart but the data has 4"),
    ):
        with pytest.raises(BadInput, match=expected):
            search(of=useless)
        assert list(tmp_path.iterdir()) == []


class TwoHeads(torch.nn.Module):
    """A teacher in half precision that also gives its features, in a submodule that cannot be traced."""

    class Careful(torch.nn.Module):
        def forward(self, x):
            return x if bool(x.isfinite().all()) else x.nan_to_num()

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.careful = teacher, self.Careful()

    def forward(self, x):
        return {"features": x, "logits": self.careful(self.teacher(x))}


def test_a_teacher_in_half_precision_with_two_outputs_and_a_leaf(model, search, monkeypatch):
    unusual, told = TwoHeads(copy.deepcopy(model)).half(), []
    with pytest.raises(BadInput, match="'careful' as `leaf`"):
        search("untraceable", of=unusual)
    monkeypatch.setattr(SearchProgress, "message", lambda self, text: told.append(text))
    run = search(of=unusual, leaf=("careful",), round_to=4, ratios=(0.5, 1.0))
    assert any("student.pt2 was not written" in message for message in told)
    assert {p.dtype for p in unusual.parameters()} == {torch.float16}
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}
    assert all(m.out_channels % 4 == 0 for m in run.student.modules() if isinstance(m, torch.nn.Conv2d))
    with pytest.raises(BadInput, match=r"no student.pt2"):
        load_student(run.out)
    run.student.load_state_dict(torch.load(run.out / "student.pt", weights_only=True))
    assert run.table["student"]["params"] == sum(p.numel() for p in run.student.parameters())
