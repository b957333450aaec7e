"""The command line, run in this process as a user would run it."""

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch

import n2n_fast
from n2n_fast.cli import main
from n2n_fast.search import environment
from n2n_fast.search.checkpoint import Interrupted
from n2n_fast.training.distill import seeded
from n2n_fast.training.teachers import SmallResNet

QUICK = ("--updates", "1", "--rollouts", "2", "--epochs", "0.2", "--final-epochs", "0.2")
QUICK += ("--anchors", "3", "--anchor-epochs", "0.2", "--stage-epochs", "0.2", "--keep-top", "1")


@pytest.fixture
def invoke(monkeypatch, capsys, tmp_path):
    """Run the command line in an empty directory: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["n2n-fast", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run


@pytest.fixture(scope="module")
def digits_teacher(tmp_path_factory):
    """The file of a teacher trained by the command line, and what that printed."""
    out = tmp_path_factory.mktemp("teacher") / "digits.pt"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["n2n-fast", "teach", "--arch", "digits_resnet", "--epochs", "4", "--out", str(out)])
        patch.setattr(main.click, "echo", lambda text="", err=False: printed.append((str(text), err)))
        with pytest.raises(SystemExit) as stop:
            main.main()
    assert stop.value.code == 0
    return out, printed


def test_teach_run_evaluate(digits_teacher, invoke, tmp_path):
    teacher, printed = digits_teacher
    taught = [text for text, err in printed if not err]
    assert any("test accuracy" in text for text in taught)
    code, out, err = invoke("run", "--teacher", teacher, *QUICK, "--out", "here")
    assert code == 0, err
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    assert f"{result['student']['params']:,}" in out
    assert f"{result['student']['test_accuracy']:.2%}" in out
    assert f"{result['compression']:.1f}x" in out
    assert "rollouts/min" in err
    code, out, err = invoke("evaluate", "here")
    assert code == 0, err
    assert f"test accuracy {result['student']['test_accuracy']:.2%} on 359 images" in out


@pytest.mark.slow
def test_json_quiet_and_a_run_repeated_by_its_config(digits_teacher, invoke, tmp_path):
    command = ("run", "--teacher", digits_teacher[0], *QUICK, "--anchors", "0", "--seed", "3", "--mean", "0.31")
    command += ("--device", "cpu")  # where two runs are equal, byte for byte
    code, out, err = invoke(*command, "--out", "first", "--quiet", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed.pop("out") == "first"
    assert printed == json.loads((tmp_path / "first" / "result.json").read_text())
    code, _, err = invoke("run", "--config", "first/config.json", "--out", "second", "--quiet")
    assert (code, err) == (0, "")
    first, second = (json.loads((tmp_path / run / "config.json").read_text()) for run in ("first", "second"))
    assert [run.pop("command")["out"] for run in (first, second)] == [str(tmp_path / n) for n in ("first", "second")]
    assert first == second
    assert (tmp_path / "first" / "student.pt").read_bytes() == (tmp_path / "second" / "student.pt").read_bytes()
    code, out, err = invoke("evaluate", "second", "--json")
    assert code == 0, err
    expected = {"split": "test", "images": 359, "data": "digits", "accuracy": printed["student"]["test_accuracy"]}
    assert json.loads(out) == expected


def test_unmet_limits_end_with_3(digits_teacher, invoke, tmp_path):
    code, _, err = invoke("run", "--teacher", digits_teacher[0], *QUICK, "--max-params", "5", "--out", "here")
    assert code == 3
    assert "nearest" in err
    assert (tmp_path / "here" / "student.pt2").exists()


def test_runs_are_numbered(invoke, tmp_path):
    (tmp_path / "runs" / "1").mkdir(parents=True)
    assert main._free_directory().name == "2"


@pytest.mark.parametrize("command", ["run", "teach", "inspect", "evaluate", "report", "export"])
def test_help_ends_with_an_example_and_knows_every_option(command, invoke):
    code, out, _ = invoke(command, "--help")
    assert code == 0
    assert out.splitlines()[-1].startswith(f"Example: n2n-fast {command} ")
    code, everything, _ = invoke(command, "--help-all")
    assert code == 0
    for param in main.cli.commands[command].params:
        if isinstance(param, main.click.Option):
            assert (f"  {param.opts[0]}" in out) == (not param.hidden)
            assert f"  {param.opts[0]}" in everything
            assert param.help


def test_help_shows_few_options_and_help_all_every_setting(invoke):
    shown = [line for line in invoke("run", "--help")[1].splitlines() if line.startswith("  -")]
    assert len(shown) <= 20
    everything = " ".join(invoke("run", "--help-all")[1].split())
    for setting in fields(n2n_fast.SearchConfig):
        assert f"--{setting.name.replace('_', '-')} " in everything
        assert setting.metadata["help"] in everything
        assert setting.metadata["allowed"] in everything
    assert "[default: 20; at least 1]" in everything


def test_alone_it_prints_its_help(invoke):
    code, out, err = invoke()
    assert (code, err) == (0, "")
    assert "Compress a trained CNN" in out
    assert "export" in out


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "n2n_fast", "--version"]  # elsewhere: here may lie a checkout that is not built
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert n2n_fast.__version__ in done.stdout


def test_version_tells_what_was_built(invoke):
    code, out, _ = invoke("--version")
    assert code == 0
    for told in (n2n_fast.__version__, torch.__version__, "SIMD", n2n_fast.build_info()["simd_used"], "CUDA"):
        assert told in out


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(invoke, monkeypatch, tmp_path):
    (tmp_path / "a.toml").write_text('image_size = 64\narch = "resnet18"\njson = true\n')
    given = ("inspect", "--config", "a.toml")

    def macs(*args):
        code, out, err = invoke(*given, *args)
        assert code == 0, err
        return json.loads(out)["macs"]

    by_file = macs()
    monkeypatch.setenv("N2N_FAST_IMAGE_SIZE", "96")
    by_environment = macs()
    by_command = macs("--image-size", "32")
    assert by_command < by_file < by_environment
    monkeypatch.delenv("N2N_FAST_IMAGE_SIZE")
    assert macs("--image-size", "64") == by_file
    monkeypatch.setenv("N2N_FAST_CONFIG", "a.toml")
    given = ("inspect",)
    assert macs() == by_file


@pytest.fixture
def searched(invoke, monkeypatch):
    """The settings with which a command line would search."""

    def settings(*args):
        seen = []
        monkeypatch.setattr(main, "_teacher_and_data", lambda *_: (None, None))
        monkeypatch.setattr(main, "plan", lambda model, images, config: seen.append(config) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            invoke("run", "--dry-run", "--data", "npz:set.npz", *args)
        return seen[0]

    return settings


def test_each_setting_is_given_by_set_by_its_option_by_the_environment_and_by_a_file(searched, monkeypatch, tmp_path):
    values = {
        "updates": ("7", 7),
        "kd_weight": ("0.25", 0.25),
        "epochs": ("2", 2.0),
        "validation_images": ("none", None),
        "reuse": ("false", False),
        "init": ("sliced", "sliced"),
        "ratios": ("0.5,1", (0.5, 1.0)),
        "leaf": ("a,b.c", ("a", "b.c")),
        "max_params": ("500_000", 500_000),
        "seed": ("-3", -3),
    }
    expected = n2n_fast.SearchConfig(**{name: value for name, (_, value) in values.items()})
    assert searched(*(part for name, (text, _) in values.items() for part in ("--set", f"{name}={text}"))) == expected
    options = [f"--{name.replace('_', '-')}={text}" for name, (text, _) in values.items()]
    assert searched(*options) == expected
    assert searched("--leaf", "a", *options[:-4], *options[-2:], "--ratios", "0.5,1", "--leaf", "b.c") == expected
    (tmp_path / "a.toml").write_text("\n".join(f'{name} = "{text}"' for name, (text, _) in values.items()))
    assert searched("--config", "a.toml") == expected
    (tmp_path / "config.json").write_text(json.dumps(asdict(expected)))
    assert searched("--config", "config.json") == expected
    assert searched("--config", "config.json", "--set", "hidden=7", "--updates", "9") == replace(
        expected, hidden=7, updates=9
    )
    for name, (text, _) in values.items():
        monkeypatch.setenv(f"N2N_FAST_{name.upper()}", text)
    assert searched() == expected
    assert searched("--protocol", "paper", "--set", "kd-weight=0.25") == n2n_fast.SearchConfig.paper(
        **{name: value for name, (_, value) in values.items()}
    )


def test_an_unknown_variable_of_the_environment_is_named(invoke, monkeypatch):
    monkeypatch.setenv("N2N_FAST_CUDA", "OFF")  # for the build
    monkeypatch.setenv("N2N_FAST_IMAGE_SIZ", "96")
    code, _, err = invoke("inspect", "--arch", "digits_resnet", "--image-size", "8")
    assert (code, err) == (0, "warning: N2N_FAST_IMAGE_SIZ: no option, did you mean N2N_FAST_IMAGE_SIZE?\n")


def test_a_dry_run_looks_at_the_policies_too(digits_teacher, invoke, tmp_path):
    (tmp_path / "none.pt").write_text("# no policies\n")
    command = ("run", "--teacher", digits_teacher[0], *QUICK, "--policy", tmp_path / "none.pt", "--dry-run")
    code, _, err = invoke(*command)
    assert code == 2
    assert err.count("\n") == 1
    assert "none.pt" in err


def test_a_dry_run_writes_nothing(digits_teacher, invoke, tmp_path):
    command = ("run", "--teacher", digits_teacher[0], *QUICK, "--dry-run", "--quiet")
    code, out, err = invoke(*command)
    assert (code, err) == (0, "")
    assert "10^7.5" in out  # 2 ** 25 ways to remove 25 layers
    planned = json.loads(invoke(*command, "--json")[1])
    assert list(planned["choices"]) == ["removal", "shrinkage"]
    assert planned["seconds"] > planned["rollouts"] * planned["rollout_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_inspect(invoke):
    code, out, err = invoke("inspect", "--arch", "resnet18", "--image-size", "32")
    assert code == 0, err
    assert "layer4.0.downsample.0" in out
    assert "changes the resolution" in out
    assert "11,689,512 params" in out
    code, out, _ = invoke("inspect", "--arch", "resnet18", "--image-size", "32", "--json")
    content = json.loads(out)
    assert code == 0
    assert content["params"] == 11_689_512
    assert content["layers"][0]["note"] == "first layer"
    assert content["compression"] == content["params"] / content["smallest_params"] > 90
    layers = {layer["name"]: layer for layer in content["layers"]}
    assert layers["layer1.0.conv2"]["width_note"] == "decided by conv1"
    assert layers["layer1.0.conv2"]["groups"] == layers["conv1"]["groups"]
    assert layers["layer1.0.bn2"]["width_note"] == "follows its input"
    assert layers["layer1.0.conv1"]["chooses_width"]
    assert layers["fc"]["width_note"] == "as many as classes"
    assert len(content["features"]) == len(layers)


def test_inspect_takes_sizes_from_the_data(invoke, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (40, 20, 20), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x=images, y=np.arange(40) % 10)
    np.savez(tmp_path / "seven.npz", x=images, y=np.arange(40) % 7)
    data, given = ("--data", f"npz:{tmp_path / 'set.npz'}"), ("--teacher", save_state(tmp_path / "t.pt"))

    def seen(*options):
        code, out, err = invoke("inspect", *options, "--json")
        assert code == 0, err
        return json.loads(out)

    asked = seen(*given, "--image-size", 20)
    assert seen(*given, *data) == asked
    assert seen("--arch", "digits_resnet", *data) == asked
    assert seen(*given, *data, "--image-size", 40)["macs"] > 3 * asked["macs"]
    code, _, err = invoke("inspect", *given, "--data", f"npz:{tmp_path / 'seven.npz'}")
    assert code == 2
    assert "10 classes" in err


def test_inspect_tells_what_rounding_costs(invoke):
    command = ("inspect", "--arch", "resnet18", "--image-size", "32", "--round-to", "24")
    code, out, err = invoke(*command)
    assert code == 0, err
    assert "widths in multiples of 24 cost, at ratio 0.1: +" in out
    exact, rounded = (json.loads(invoke(*arguments, "--json")[1]) for arguments in (command[:5], command))
    assert exact["rounding_costs"] == {}
    assert rounded["rounding_costs"]["0.1"] == pytest.approx(
        rounded["smallest_params"] / exact["smallest_params"] - 1, abs=0.2
    )
    assert rounded["smallest_params"] > exact["smallest_params"]


def test_inspect_takes_submodules_as_leaves(invoke):
    code, out, err = invoke("inspect", "--arch", "resnet18", "--image-size", "32", "--leaf", "layer4.1")
    assert code == 0, err
    assert "layer4.1.conv1" not in out
    assert "BasicBlock is not understood (layer4.1)" in out
    assert "sliced" not in out
    code, _, err = invoke("inspect", "--arch", "resnet18", "--leaf", "layer9")
    assert (code, err.count("\n")) == (2, 1)
    assert "layer9" in err


def save_state(path, **changed):
    with seeded(0, torch.device("cpu")):
        state = SmallResNet(2, 10, 1).state_dict()
    torch.save({**state, **changed}, path)
    return path


class Payload:
    """A pickle that would leave a file behind if it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def missing(tmp_path):
    return ("run", "--teacher", tmp_path / "no.pt"), "does not exist"


def truncated(tmp_path):
    whole = save_state(tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    return ("run", "--teacher", tmp_path / "cut.pt"), "cut.pt"


def empty(tmp_path):
    (tmp_path / "empty.pt").touch()
    return ("run", "--teacher", tmp_path / "empty.pt"), "empty.pt"


def text(tmp_path):
    (tmp_path / "text.pt").write_text("not a network\n")
    return ("run", "--teacher", tmp_path / "text.pt"), "text.pt"


def directory(tmp_path):
    return ("run", "--teacher", tmp_path), "director"


def hostile(tmp_path):
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Payload(str(tmp_path / "payload"))))
    return ("run", "--teacher", tmp_path / "hostile.pt"), "torch.save"


def hostile_in_torch_file(tmp_path):
    torch.save({"weight": Payload(str(tmp_path / "payload"))}, tmp_path / "hostile.pt")
    return ("run", "--teacher", tmp_path / "hostile.pt"), "allow-pickle"


def unknown_network(tmp_path):
    torch.save({"strange.weight": torch.zeros(3, 3)}, tmp_path / "strange.pt")
    return ("run", "--teacher", tmp_path / "strange.pt"), "strange.weight"


def nan_weights(tmp_path):
    save_state(tmp_path / "nan.pt", **{"fc.bias": torch.full((10,), float("nan"))})
    return ("run", "--teacher", tmp_path / "nan.pt"), "fc.bias"


def untrained(tmp_path):
    return ("run", "--teacher", save_state(tmp_path / "new.pt")), "--mean"


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "set.npz", **arrays)
    return ("run", "--teacher", save_state(tmp_path / "t.pt"), "--data", f"npz:{tmp_path / 'set.npz'}")


def empty_set(tmp_path):
    return npz(tmp_path, x=np.zeros((0, 8, 8), np.uint8), y=np.zeros(0, np.int64)), "no images"


def other_classes(tmp_path):
    images = np.zeros((40, 8, 8), np.uint8)
    return npz(tmp_path, x=images, y=np.arange(40) % 4), "10 classes apart but the data has 4"


def bad_label(tmp_path):
    images = np.zeros((40, 8, 8), np.uint8)
    return npz(tmp_path, x=images, y=np.arange(40) - 1), "label -1"


def nan_images(tmp_path):
    images = np.full((40, 8, 8), np.nan, np.float32)
    return npz(tmp_path, x=images, y=np.arange(40) % 10), "NaN"


def no_set(tmp_path):
    return (
        "run",
        "--teacher",
        save_state(tmp_path / "t.pt"),
        "--data",
        f"cifar10:{tmp_path / 'nowhere'}",
    ), "--download"


def unknown_set(tmp_path):
    return ("run", "--teacher", save_state(tmp_path / "t.pt"), "--data", "imagenet22k"), "imagenet22k"


def no_teacher(tmp_path):
    return ("run", "--data", f"cifar10:{tmp_path}"), "teach"


def small_images(tmp_path):
    torch.save(__import__("torchvision").models.vgg11(num_classes=10).state_dict(), tmp_path / "vgg.pt")
    return ("run", "--teacher", tmp_path / "vgg.pt", "--image-size", "8"), "--image-size"


def unwritable(tmp_path):
    (tmp_path / "file").touch()
    return ("run", "--teacher", save_state(tmp_path / "t.pt"), "--out", tmp_path / "file" / "run"), "--out"


def option_value(tmp_path):
    return ("run", "--updates", "many"), "updates: many; give at least 1"


def set_value(tmp_path):
    return ("run", "--set", "ratios=0.5,big,1"), "ratios: 0.5,big,1; give ratios in (0, 1], the last of them 1"


def set_bound(tmp_path):
    return ("run", "--set", "baseline_decay=1"), "baseline_decay: 1.0; give at least 0 and below 1"


def set_none(tmp_path):
    return ("run", "--set", "updates=none"), "updates: none"


def set_name(tmp_path):
    return ("run", "--set", "rolouts=4"), "did you mean rollouts?"


def set_nothing(tmp_path):
    return ("run", "--set", "updates"), "name=value"


def option_range(tmp_path):
    return ("run", "--kd-weight", "-1"), "kd_weight"


def mean_value(tmp_path):
    return ("run", "--mean", "0.5,x"), "--mean"


def device(tmp_path):
    return ("run", "--device", "abacus"), "--device"


def configured(tmp_path, text, name="c.toml"):
    (tmp_path / name).write_text(text)
    return "run", "--config", tmp_path / name


def config_missing(tmp_path):
    return ("run", "--config", tmp_path / "no.toml"), "no.toml"


def config_key(tmp_path):
    return configured(
        tmp_path, "updates = 3\nrolouts = 4\n"
    ), "rolouts: no option of n2n-fast run, did you mean rollouts?"


def config_value(tmp_path):
    return configured(tmp_path, "updates = 3.5"), "updates: 3.5"


def config_zero(tmp_path):
    return configured(tmp_path, 'teacher = "\\u0000"'), "teacher: holds a zero byte"


def config_table(tmp_path):
    return configured(tmp_path, "[data]\nname = 3"), "table"


def config_text(tmp_path):
    return configured(tmp_path, "updates"), "not TOML"


def config_bytes(tmp_path):
    path = tmp_path / "b.toml"
    path.write_bytes(b"\xff\xfe")
    return ("run", "--config", path), "not TOML"


def config_of_itself(tmp_path):
    return configured(tmp_path, 'config = "other.toml"'), "config"


def config_of_no_run(tmp_path):
    return configured(tmp_path, "[1]", "config.json"), "not the config.json of a run"


def config_setting(tmp_path):
    held = {**asdict(n2n_fast.SearchConfig()), "hidden": [7]}
    return configured(tmp_path, json.dumps(held), "config.json"), "hidden: '[7]'"


def config_code(tmp_path):
    held = {**asdict(n2n_fast.SearchConfig()), "command": {"arch": "factory:make"}}
    return configured(tmp_path, json.dumps(held), "config.json"), "run code"


def command(tmp_path):
    return ("ruin",), "ruin"


def no_run(tmp_path):
    return ("evaluate", tmp_path), "finished run"


def nothing_to_inspect(tmp_path):
    return ("inspect",), "--arch"


def existing_teacher(tmp_path):
    (tmp_path / "mine.pt").write_text("precious")
    return ("teach", "--out", tmp_path / "mine.pt"), "exists already"


@pytest.mark.parametrize(
    "case",
    [
        *(missing, truncated, empty, text, directory, hostile, hostile_in_torch_file, unknown_network, nan_weights),
        *(untrained, empty_set, other_classes, bad_label, nan_images, no_set, unknown_set, no_teacher, small_images),
        *(unwritable, option_value, option_range, mean_value, device, command, no_run, nothing_to_inspect),
        *(existing_teacher, config_missing, config_key, config_value, config_table, config_text, config_bytes),
        *(config_zero, config_of_itself, config_of_no_run, config_setting, config_code),
        *(set_value, set_bound, set_none, set_name, set_nothing),
    ],
    ids=lambda case: case.__name__,
)
def test_bad_input_is_one_line_and_exit_code_2(case, invoke, tmp_path):
    args, expected = case(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = invoke(*args)
    assert code == 2, err
    assert expected in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_running_out_of_memory_is_one_line_and_tells_how_to_go_on(digits_teacher, invoke, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(environment.Evaluator, "evaluate", fails)
    code, _, err = invoke("run", "--teacher", digits_teacher[0], *QUICK, "--quiet", "--out", "here")
    assert (code, err.count("\n")) == (2, 1)
    assert "CUDA out of memory. Tried to allocate 2.00 GiB.); lower --batch-size" in err
    assert err.endswith("what is done is kept, go on with: n2n-fast run --resume here\n")
    monkeypatch.setattr(main.teachers, "train", fails)
    code, _, err = invoke("teach", "--arch", "digits_resnet", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("n2n-fast: out of memory (CUDA out of memory")


def test_an_interrupt_ends_with_130(invoke, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "load", interrupted)
    code, _, err = invoke("run")
    assert code == 130
    assert err.strip() == "interrupted"


def test_an_interrupted_run_tells_how_to_go_on(digits_teacher, invoke, monkeypatch):
    def interrupted(*args, **kwargs):
        raise Interrupted("here")

    monkeypatch.setattr(main, "compress", interrupted)
    code, _, err = invoke("run", "--teacher", digits_teacher[0], "--out", "here")
    assert code == 130
    assert err == "interrupted; go on with: n2n-fast run --resume here\n"
