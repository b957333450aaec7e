"""The search as a whole, on a teacher and a data set of seconds."""

import copy
import json
from dataclasses import fields, replace

import pytest
import torch

import n2n_fast
from n2n_fast.files.errors import BadInput, DeviceFault
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search import anchors, environment, reinforce
from n2n_fast.search import result as result_module
from n2n_fast.search import stage as stage_module
from n2n_fast.search import teacher as teacher_module
from n2n_fast.search.checkpoint import Interrupted
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.environment import MOST_TILTED
from n2n_fast.search.policies import RemovalPolicy, ShrinkagePolicy, clone_behaviour
from n2n_fast.search.predictor import AccuracyPredictor
from n2n_fast.search.reinforce import compress
from n2n_fast.search.result import load_student
from n2n_fast.search.reward import Constraints, Cost, reward
from n2n_fast.training.distill import Diverged, seeded
from n2n_fast.training.teachers import SmallResNet
from quarters import TINY, quarters, taught

PLAIN = replace(TINY, anchors=0)  # rewards are of accuracies as they are found


@pytest.fixture(scope="module")
def data():
    return quarters()


@pytest.fixture(scope="module")
def teacher(data):
    return taught(data)


@pytest.fixture(scope="module")
def result(teacher, data, tmp_path_factory):
    return compress(teacher, data, TINY, tmp_path_factory.mktemp("runs") / "a")


def lines(run, kind="rollout"):
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [line for line in history if line["kind"] == kind]


def predictor_of(line):
    return AccuracyPredictor(**{field.name: line[field.name] for field in fields(AccuracyPredictor)})


def untimed(run):
    """The history without what a clock said."""
    clocks = {"seconds", "training_seconds"}
    history = (json.loads(line) for line in (run / "history.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clocks} for line in history]


def test_run_directory(result, teacher, data):
    names = {path.name for path in result.out.iterdir()}
    assert names >= {
        *("config.json", "history.jsonl", "student.pt2", "student.pt", "architecture.json", "result.json"),
        *("checkpoint.pt", "policies.pt", "front.json"),
    }
    assert "training.pt" not in names
    table = json.loads((result.out / "result.json").read_text())
    assert table == result.table
    for part, model in (("teacher", teacher), ("student", result.student)):
        assert table[part]["params"] == sum(p.numel() for p in model.parameters())
        assert table[part]["test_accuracy"] == n2n_fast.training.data.accuracy(model, data.test)
        assert table[part]["validation_accuracy"] == n2n_fast.training.data.accuracy(model, data.validation)
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
    learned = {(line["stage"], line["update"]): predictor_of(line) for line in lines(result.out, "predictor")}
    assert all(predictor.count >= 4 for predictor in learned.values())
    assert {predictor.error is not None for predictor in learned.values()} == {True}
    for rollout in history:
        if rollout["predicted_accuracy"] is not None:
            predicted = learned[rollout["stage"], rollout["update"]](rollout["short_accuracy"])
            assert (rollout["predicted_accuracy"], rollout["accuracy_error"]) == predicted
            expected = reward(
                rollout["predicted_accuracy"], rollout["params"], teacher["validation_accuracy"], teacher["params"]
            )
            assert rollout["reward"] == expected
        else:
            assert rollout["reward"] == -1
            assert rollout["error"]


def test_anchors_are_trained_fully_and_spread_over_the_range(result):
    anchors = lines(result.out, "anchor")
    assert [(a["stage"], a["index"]) for a in anchors] == [(s, i) for s in ("removal", "shrinkage") for i in range(5)]
    assert [a["update"] for a in anchors] == [0, 0, 0, 0, 1] * 2
    for stage in ("removal", "shrinkage"):
        sizes = [a["params"] for a in anchors if a["stage"] == stage]
        assert len(set(sizes)) == 5
        assert max(sizes[:4]) > 1.3 * min(sizes[:4])
    best = max(
        (r for r in lines(result.out) if r["stage"] == "removal" and r["update"] == 0), key=lambda r: r["reward"]
    )
    assert anchors[4]["architecture"] == best["architecture"] or best["architecture"] in {
        a["architecture"] for a in anchors[:4]
    }


def test_the_front_holds_what_no_student_beats(result):
    held = json.loads((result.out / "front.json").read_text())
    everyone = lines(result.out) + lines(result.out, "anchor")
    for by in ("params", "macs"):
        costs, accuracies = zip(*((p[by], p["accuracy"]) for p in held[by]), strict=True)
        assert sorted(costs) == list(costs)
        assert sorted(accuracies) == list(accuracies)
        assert min(costs) == min(r[by] for r in everyone if r["short_accuracy"] is not None)


def test_the_best_of_those_trained_fully_is_the_result(teacher, data, tmp_path):
    found = compress(teacher, data, replace(TINY, stages="shrinkage", keep_top=3), tmp_path / "top")
    finals = lines(found.out, "final")
    assert len({f["architecture"] for f in finals}) == 3
    of = found.table["teacher"]
    rewards = [reward(f["full_accuracy"], f["params"], of["validation_accuracy"], of["params"]) for f in finals]
    best = finals[rewards.index(max(rewards))]
    assert found.table["student"]["params"] == best["params"]
    assert found.table["student"]["validation_accuracy"] == best["full_accuracy"]


@pytest.mark.slow
def test_an_architecture_seen_before_costs_nothing(teacher, data, tmp_path, monkeypatch):
    evaluated = []
    evaluate = environment.Evaluator.evaluate
    monkeypatch.setattr(
        environment.Evaluator,
        "evaluate",
        lambda s, arch, seed: (evaluated.append(arch.key), evaluate(s, arch, seed))[1],
    )
    config = replace(PLAIN, stages="removal", updates=8, rollouts=4, keep_probability=0.95)
    history = lines(compress(teacher, data, config, tmp_path / "seen").out)
    assert len(evaluated) == len(set(evaluated)) < len(history)
    by_key = {}
    for rollout in history:
        if rollout["architecture"] is not None:
            same = by_key.setdefault(rollout["architecture"], rollout)
            assert rollout["cached"] == (rollout is not same)
            assert rollout["reward"] == same["reward"]
    evaluated.clear()
    anew = lines(compress(teacher, data, replace(config, reuse=False), tmp_path / "anew").out)
    assert not any(rollout["cached"] for rollout in anew)
    assert len(evaluated) == sum(rollout["architecture"] is not None for rollout in anew)


@pytest.mark.parametrize("objective", ["macs", "latency"])
def test_the_objective_is_what_the_reward_counts(objective, teacher, data, tmp_path):
    config = replace(PLAIN, stages="shrinkage", updates=1, objective=objective, latency_batch=2)
    found = compress(teacher, data, config, tmp_path / objective)
    of = found.table["teacher"]
    for rollout in lines(found.out):
        assert (rollout["latency"] is None) == (objective == "macs")
        if objective == "macs":
            expected = reward(rollout["predicted_accuracy"], rollout["macs"], of["validation_accuracy"], of["macs"])
            assert rollout["reward"] == expected
        else:
            assert rollout["latency"] > 0


def test_a_drop_below_the_teacher_is_a_limit(teacher, data, tmp_path):
    config = replace(PLAIN, stages="shrinkage", updates=1, max_drop=0.5, keep_top=3)
    found = compress(teacher, data, config, tmp_path / "drop")
    least = found.table["teacher"]["validation_accuracy"] - 0.005
    assert found.feasible == (found.table["student"]["validation_accuracy"] >= least)
    for rollout in lines(found.out):
        assert rollout["feasible"] == (rollout["predicted_accuracy"] >= least)


def test_a_limit_on_accuracy_is_judged_by_what_the_final_training_gives(teacher, data, tmp_path):
    found = compress(teacher, data, replace(TINY, max_drop=5.0), tmp_path / "drop")
    anchors = lines(found.out, "anchor")
    finished = [a for a in anchors if a["final_accuracy"] is not None]
    assert [(a["stage"], a["index"]) for a in finished] == [("removal", TINY.anchors // 2)]
    teacher_accuracy = found.table["teacher"]["validation_accuracy"]
    for stage in ("removal", "shrinkage"):
        held = [line for line in lines(found.out, "predictor") if line["stage"] == stage][-1]
        learned = predictor_of(held)
        rollouts = [r for r in lines(found.out) if r["stage"] == stage and r["update"] == TINY.updates - 1]
        if stage == "removal":
            pairs = [(a["full_accuracy"], a["final_accuracy"]) for a in finished]
            before = replace(learned, remaining=1.0, gain=0.0, teacher=0.0)
            assert before.learned_final(pairs, teacher_accuracy) == learned
            for r in rollouts:
                if r["short_accuracy"] is not None:
                    assert (r["predicted_accuracy"], r["accuracy_error"]) == learned(r["short_accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "limited"), [("params", "params"), ("macs", "macs"), ("params", "macs")])
def test_students_are_brought_to_the_limits(objective, limited, teacher, data, tmp_path):
    space = ArchitectureSpace(teacher, data.train.batch(torch.arange(2))[0])
    limit = int(0.3 * Cost(space.teacher.params, space.teacher.macs).of(limited))
    config = replace(TINY, objective=objective, updates=3, **{f"max_{limited}": limit})
    found = compress(teacher, data, config, tmp_path / "at the limits")
    of = found.table["teacher"]
    tried = [r for r in lines(found.out) + lines(found.out, "anchor") if r["short_accuracy"] is not None]
    assert {r["stage"] for r in tried} == {"removal", "shrinkage"}
    assert all(r[limited] <= limit for r in tried)
    near = [r[limited] > 0.85 * limit for r in tried if r["stage"] == "removal" or objective == limited]
    assert sum(near) > 0.7 * len(near)
    for r in lines(found.out):
        if r["predicted_accuracy"] is not None:
            assert r["feasible"]
            counted = max(r[objective], limit) if objective == limited else r[objective]
            assert r["reward"] == reward(r["predicted_accuracy"], counted, of["validation_accuracy"], of[objective])
    mildest = next(a for a in lines(found.out, "anchor") if (a["stage"], a["index"]) == ("removal", 0))
    narrowed = space.shrink_within(space.teacher, space.tilted(MOST_TILTED / 2, limited), **{limited: limit})
    assert (mildest["params"], mildest["macs"]) == (narrowed.params, narrowed.macs)


def test_anchors_at_a_limit_save_ever_more_where_most_is_to_be_saved(teacher, data, tmp_path):
    space = ArchitectureSpace(teacher, data.train.batch(torch.arange(2))[0])
    config = replace(TINY, updates=1, anchors=4, max_params=space.teacher.params // 5)
    found = compress(teacher, data, config, tmp_path / "tilted")
    mild, tilted, most, _ = (a["macs"] for a in lines(found.out, "anchor") if a["stage"] == "shrinkage")
    assert mild < tilted < most  # early layers have few params and large images


def test_what_the_first_stage_removes_is_shrunk_by_the_second_alone(teacher, data, tmp_path):
    space = ArchitectureSpace(teacher, data.train.batch(torch.arange(2))[0])
    config = replace(PLAIN, max_params=space.teacher.params // 4)
    found = compress(teacher, data, config, tmp_path / "removed")
    first, second = json.loads((found.out / "architecture.json").read_text())
    assert first["params"] == space.remove(space.teacher, first["keep"]).params > config.max_params
    assert second["params"] <= config.max_params
    trained = lines(found.out, "final")[0]
    assert trained["params"] == first["params"]


def test_a_limit_that_no_narrowing_reaches_is_told(teacher, data, tmp_path):
    found = compress(teacher, data, replace(PLAIN, updates=1, max_params=1), tmp_path / "unreached")
    assert not found.feasible
    narrowest = ArchitectureSpace(teacher, data.train.batch(torch.arange(2))[0])
    everything = narrowest.shrink_within(narrowest.teacher, [1.0] * len(narrowest.layers), params=1)
    assert found.table["student"]["params"] <= everything.params


def test_where_nothing_is_removed_the_second_stage_shrinks_the_teacher_itself(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(RemovalPolicy, "sample", lambda self, x, mask, count, generator: mask.new_ones(
        count, len(mask), dtype=torch.int64))  # fmt: skip
    found = compress(teacher, data, replace(PLAIN, updates=1, max_params=20_000), tmp_path / "whole")
    whole, *students = lines(found.out, "final")
    of = found.table["teacher"]
    assert (whole["params"], whole["full_accuracy"]) == (of["params"], of["validation_accuracy"])
    assert all(student["params"] <= 20_000 for student in students)


def test_what_is_within_the_limits_after_stage_one_is_trained_in_the_last(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        RemovalPolicy, "sample", lambda self, x, mask, count, generator: (~mask).long().expand(count, -1)
    )
    most = ArchitectureSpace(teacher, data.train.batch(torch.arange(2))[0]).teacher.params - 1
    config = replace(PLAIN, updates=1, rollouts=1, keep_top=1, max_params=most)
    monkeypatch.setattr(ShrinkagePolicy, "sample", lambda self, x, mask, count, generator: torch.full(
        (count, len(mask), 2), self.ratios - 1))  # fmt: skip
    told = []
    monkeypatch.setattr(reinforce.SearchProgress, "phase", lambda self, name, steps: told.append(name))
    found = compress(teacher, data, config, tmp_path / "within")
    removed, student = lines(found.out, "final")
    assert student["params"] == removed["params"] < most
    assert student["full_accuracy"] == found.table["student"]["validation_accuracy"]
    assert "training the best of shrinkage" in " ".join(told)


@pytest.mark.slow
def test_students_that_have_to_be_fast_are_not_made_wider(teacher, data, tmp_path):
    whole = ArchitectureSpace(teacher, data.train.batch(torch.arange(2))[0]).teacher.params
    config = replace(PLAIN, stages="shrinkage", updates=2, max_params=whole // 2)
    alone = compress(teacher, data, config, tmp_path / "alone")
    fast = compress(teacher, data, replace(config, max_latency=1e-6), tmp_path / "fast")
    smallest = [min(r["params"] for r in lines(run.out)) for run in (alone, fast)]
    assert smallest[1] < 0.8 * smallest[0]


@pytest.mark.slow
def test_policies_begin_at_the_best_anchor(result, teacher, data, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(anchors, "clone_behaviour", lambda *of: (shown.append(of), clone_behaviour(*of)))
    for stage in ("removal", "shrinkage"):
        config = replace(TINY, stages=stage, updates=1)
        found = compress(teacher, data, config, tmp_path / stage)
        ((_, _, _, actions),) = shown
        shown.clear()
        of = found.table["teacher"]
        best = max(
            lines(found.out, "anchor"),
            key=lambda a: reward(a["full_accuracy"], a["params"], of["validation_accuracy"], of["params"]),
        )
        space = ArchitectureSpace(teacher, data.train.batch(torch.arange(2))[0])
        if stage == "removal":
            arch = space.remove(space.teacher, [action == 1 for action in actions.tolist()])
        else:
            ratios = [[config.ratios[i] for i in row] for row in actions.T.tolist()]
            arch = space.shrink(space.teacher, *ratios)
        assert arch.params == best["params"]
        compress(teacher, data, replace(config, keep_probability=0.8), tmp_path / f"{stage} told")
        compress(teacher, data, config, tmp_path / f"{stage} begun", policies=result.out / "policies.pt")
        compress(teacher, data, replace(config, anchors=0), tmp_path / f"{stage} without")
        assert not shown


def test_policies_start_where_another_run_ended(result, teacher, data, tmp_path):
    held = torch.load(result.out / "policies.pt", weights_only=True)
    assert set(held) == {"removal", "shrinkage"}
    config = replace(PLAIN, stages="removal", updates=1, removal_learning_rate=0.0)
    again = compress(teacher, data, config, tmp_path / "on", policies=result.out / "policies.pt")
    after = torch.load(again.out / "policies.pt", weights_only=True)["removal"]
    assert all(torch.equal(value, held["removal"][name]) for name, value in after.items())
    with pytest.raises(BadInput, match="policy of removal does not fit"):
        compress(teacher, data, replace(config, hidden=7), tmp_path / "off", policies=result.out / "policies.pt")
    (tmp_path / "text.pt").write_text("no policy")
    with pytest.raises(BadInput, match=r"no file that torch\.save wrote, or a damaged one"):
        compress(teacher, data, config, tmp_path / "text", policies=tmp_path / "text.pt")


@pytest.mark.slow
def test_policies_learn_what_is_rewarded(teacher, data, tmp_path):
    """With a reward that only counts params, the policy comes to remove more, and chance does not."""
    config = replace(PLAIN, stages="removal", updates=40, rollouts=4, rollout_steps=0, validation_images=8)
    late = {}
    for rate in (0.02, 0.0):
        found = compress(teacher, data, replace(config, removal_learning_rate=rate), tmp_path / str(rate))
        late[rate] = sum(rollout["reward"] for rollout in lines(found.out)[-40:]) / 40
    assert late[0.02] > late[0.0] + 0.05


class Stops(reinforce.SearchProgress):
    """Asks for a stop after so many calls."""

    def __init__(self, calls):
        self.left = calls

    def stopping(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.slow
@pytest.mark.parametrize("calls", [0, 7, 20, 33, 51, 64])
def test_an_interrupted_search_goes_on_to_the_same_end(calls, result, teacher, data, tmp_path):
    with pytest.raises(Interrupted):
        compress(teacher, data, TINY, tmp_path / "run", Stops(calls))
    resumed = compress(teacher, data, TINY, tmp_path / "run", resume=True)
    assert untimed(resumed.out) == untimed(result.out)
    for name, value in resumed.student.state_dict().items():
        assert torch.equal(value, result.student.state_dict()[name])
    for stage, policy in torch.load(resumed.out / "policies.pt", weights_only=True).items():
        expected = torch.load(result.out / "policies.pt", weights_only=True)[stage]
        assert all(torch.equal(value, expected[name]) for name, value in policy.items())


class Leaves(reinforce.SearchProgress):
    """Leaves at once, in the midst of an update."""

    def __init__(self, rollouts):
        self.left = rollouts

    def rollout(self, rollout, best, compression):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("rollouts", [2, 7])
def test_the_update_at_hand_is_done_again(rollouts, result, teacher, data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compress(teacher, data, TINY, tmp_path / "run", Leaves(rollouts))
    before = untimed(tmp_path / "run")
    assert before == untimed(result.out)[: len(before)]
    known = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["history"]
    assert known < (tmp_path / "run" / "history.jsonl").stat().st_size
    resumed = compress(teacher, data, TINY, tmp_path / "run", resume=True)
    assert untimed(resumed.out) == untimed(result.out)
    for name, value in resumed.student.state_dict().items():
        assert torch.equal(value, result.student.state_dict()[name])


@pytest.mark.parametrize(("owner", "name"), [(environment.Evaluator, "evaluate"), (environment, "train")])
def test_running_out_of_memory_ends_a_search_that_can_be_resumed(
    owner, name, result, teacher, data, tmp_path, monkeypatch
):
    before, left = getattr(owner, name), [11]

    def fails(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(DeviceFault, match="--batch-size"):
        compress(teacher, data, TINY, tmp_path / "run")
    kept = untimed(tmp_path / "run")
    assert len(kept) >= 5
    resumed = compress(teacher, data, TINY, tmp_path / "run", resume=True)
    assert untimed(resumed.out)[: len(kept)] == kept
    assert untimed(resumed.out) == untimed(result.out)


def test_a_finished_search_can_be_resumed_to_the_same_end(result, teacher, data):
    before = untimed(result.out)
    again = compress(teacher, data, TINY, result.out, resume=True)
    assert untimed(result.out) == before
    assert again.table["student"]["test_accuracy"] == result.table["student"]["test_accuracy"]


def test_a_run_goes_on_with_its_own_settings_alone(result, teacher, data):
    with pytest.raises(BadInput, match=r"another configuration: rollouts \(3 there, 4 here\)"):
        compress(teacher, data, replace(TINY, rollouts=4), result.out, resume=True)
    other = copy.deepcopy(teacher)
    torch.nn.init.zeros_(next(other.parameters())[:1])
    with pytest.raises(BadInput, match="another configuration: teacher"):
        compress(other, data, TINY, result.out, resume=True)


def test_student_is_reloaded_without_its_class(result, data):
    loaded = load_student(result.out)
    for count in (1, 2, 7):
        images = data.test.batch(torch.arange(count))[0]
        torch.testing.assert_close(loaded(images), result.student(images), rtol=1e-5, atol=1e-6)
    state = torch.load(result.out / "student.pt", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in result.student.state_dict().items())


def test_same_seed_same_result(result, teacher, data, tmp_path):
    again = compress(teacher, data, TINY, tmp_path / "b")
    assert untimed(result.out) == untimed(again.out)
    for name, value in again.student.state_dict().items():
        assert torch.equal(value, result.student.state_dict()[name])


def test_another_seed_another_history(result, teacher, data, tmp_path):
    other = compress(teacher, data, replace(PLAIN, seed=1, stages="removal", updates=1), tmp_path / "c")
    assert [r["actions"] for r in lines(other.out)] != [r["actions"] for r in lines(result.out)[:3]]


def test_test_split_is_read_only_at_the_end(teacher, data, tmp_path, monkeypatch):
    events = []
    measured, trained = n2n_fast.training.data.accuracy, environment.train
    for module in (stage_module, teacher_module, environment, result_module):
        monkeypatch.setattr(
            module,
            "accuracy",
            lambda m, split, **how: (events.append("test" if split is data.test else ""), measured(m, split, **how))[1],
        )
    monkeypatch.setattr(environment, "train", lambda *a, **k: (events.append("train"), trained(*a, **k))[1])
    compress(teacher, data, replace(TINY, stages="shrinkage", updates=1), tmp_path / "d")
    assert events.count("test") == 2
    assert "train" not in events[events.index("test") :]


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


@pytest.mark.parametrize(("init", "saliency"), [("sliced", "activations"), ("fitted", "l1"), ("random", None)])
def test_what_students_start_from_can_be_chosen(teacher, data, tmp_path, init, saliency):
    config = replace(PLAIN, stages="shrinkage", updates=1, init=init, saliency=saliency)
    found = compress(teacher, data, config, tmp_path / "g")
    assert json.loads((found.out / "config.json").read_text())["saliency"] == saliency
    assert {line["error"] for line in lines(found.out)} <= {None, "no smaller than the teacher"}


def test_stage_two_starts_from_the_trained_student_of_stage_one(result):
    first, second = json.loads((result.out / "architecture.json").read_text())
    kept = [name for name, keep in zip(first["layers"], first["keep"], strict=True) if keep]
    assert second["layers"] == kept
    assert second["params"] < first["params"]


def test_unmet_limits_are_told_and_the_nearest_student_is_saved(teacher, data, tmp_path):
    config = replace(PLAIN, stages="shrinkage", updates=2, max_params=1)
    found = compress(teacher, data, config, tmp_path / "f")
    assert not found.feasible
    history = lines(found.out)
    limits = Constraints(max_params=1)
    nearest = min(limits.violation(Cost(r["params"], r["macs"]), r["predicted_accuracy"]) for r in history)
    assert found.table["gaps"] == {"params": pytest.approx(found.table["student"]["params"] - 1)}
    assert limits.violation(Cost(found.table["student"]["params"], 0), 1.0) <= 1.5 * nearest  # the best of the nearest
    plain = [reward(r["predicted_accuracy"], r["params"], found.table["teacher"]["validation_accuracy"],
                    found.table["teacher"]["params"]) for r in history]  # fmt: skip
    assert [r["reward"] for r in history[:3]] == plain[:3]
    assert [r["reward"] for r in history[3:]] == [Constraints.anneal(value, 1) for value in plain[3:]]


def test_the_reward_falls_steadily_beyond_a_limit(teacher, data, tmp_path):
    whole = sum(p.numel() for p in teacher.parameters())
    config = replace(PLAIN, stages="removal", updates=3, max_params=whole // 10, penalty=0.05)
    found = compress(teacher, data, config, tmp_path / "f")
    of, rollouts = found.table["teacher"], [line for line in lines(found.out) if line["predicted_accuracy"] is not None]
    severities = [min(1.0, max(0.0, 0.05 * (line["params"] / config.max_params - 1))) for line in rollouts]
    assert any(0 < severity < 1 and line["update"] for line, severity in zip(rollouts, severities, strict=True))
    for line, severity in zip(rollouts, severities, strict=True):
        counted = max(line["params"], config.max_params)
        plain = reward(line["predicted_accuracy"], counted, of["validation_accuracy"], of["params"])
        assert line["reward"] == pytest.approx(Constraints.anneal(plain, line["update"], severity))
        assert line["feasible"] == (severity == 0)


def test_a_diverging_student_scores_minus_one_and_the_search_goes_on(teacher, data, tmp_path, monkeypatch):
    count = iter(range(100))
    trained = environment.train

    def fails_once(*args, **kwargs):
        if next(count) == 1:
            raise Diverged("the loss is nan at step 10")
        return trained(*args, **kwargs)

    monkeypatch.setattr(environment, "train", fails_once)
    found = compress(teacher, data, replace(PLAIN, stages="removal", updates=1), tmp_path / "g")
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
    compress(teacher, data, replace(PLAIN, stages="removal", updates=1, rollouts=1), tmp_path / "i")
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("updates", 0),
        ("ratios", (0.5, 0.2)),
        ("stages", "all"),
        ("epochs", float("nan")),
        ("min_accuracy", 1.5),
        ("objective", "price"),
        ("max_latency", 0.0),
        ("keep_top", 0),
        ("max_drop", -1.0),
    ],
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


class Told(reinforce.SearchProgress):
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
    config = replace(PLAIN, leaf=("careful",), round_to=4, ratios=(0.5, 1.0))
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


def test_ones_own_training_and_reward(teacher, data, tmp_path):
    trained = []

    def training(student, epochs):
        assert student.training
        trained.append(epochs)

    config = replace(TINY, stages="shrinkage", updates=1, keep_top=1)
    wanted = 3000
    found = compress(
        teacher,
        data,
        config,
        tmp_path / "own",
        training=training,
        reward=lambda accuracy, cost: -abs(cost.params - wanted),
    )
    steps_per_epoch = len(data.train) // config.batch_size
    assert trained == [e for _ in range(4) for e in (4 / steps_per_epoch, 0.5)] + [4 / steps_per_epoch] * 3 + [1]
    for rollout in lines(found.out):
        assert rollout["reward"] == -abs(rollout["params"] - wanted)
    everyone = lines(found.out) + lines(found.out, "anchor")
    assert found.table["student"]["params"] == min((r["params"] for r in everyone), key=lambda p: abs(p - wanted))


def test_the_search_goes_on_past_students_that_are_not_finite(teacher, data, tmp_path, monkeypatch):
    build, built = ArchitectureSpace.build, []

    def spoiled(self, arch, init=None):
        student = build(self, arch, init)
        built.append(arch)
        if len(built) % 2 == 0:
            with torch.no_grad():
                next(student.parameters()).fill_(float("nan"))
        return student

    monkeypatch.setattr(ArchitectureSpace, "build", spoiled)
    config = replace(PLAIN, stages="shrinkage", rollout_steps=0, keep_top=2)
    again = compress(teacher, data, config, tmp_path / "spoiled")
    failed = [line for line in lines(again.out) if line["error"] is not None and line["architecture"]]
    assert failed
    assert all(line["reward"] == -1.0 and line["predicted_accuracy"] is None for line in failed)
    assert len(failed) < len(lines(again.out))


def test_a_teacher_of_constant_or_damaged_logits_is_refused(teacher, data, tmp_path):
    constant, damaged = copy.deepcopy(teacher), copy.deepcopy(teacher)
    with torch.no_grad():
        constant.fc.weight.zero_()
        damaged.fc.bias[1] = float("inf")
    with pytest.raises(BadInput, match=r"accuracy on quarters is \d+\.\d%, no better than chance"):
        compress(constant, data, TINY, tmp_path / "constant")
    with pytest.raises(BadInput, match="NaN or infinite logits on quarters; its weights are damaged"):
        compress(damaged, data, TINY, tmp_path / "damaged")
