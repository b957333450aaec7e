"""The commands, their options, and each line in which bad input is refused."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import n2n_fast
from command_line import invoke, output, refusal, told
from hostile import npz, payload, saved
from n2n_fast.cli import main
from n2n_fast.search import environment
from n2n_fast.search.checkpoint import Interrupted
from n2n_fast.training.distill import seeded
from n2n_fast.training.teachers import SmallResNet

QUICK = ("--updates", "1", "--rollouts", "2", "--epochs", "0.2", "--final-epochs", "0.2")
QUICK += ("--anchors", "3", "--anchor-epochs", "0.2", "--stage-epochs", "0.2", "--keep-top", "1", "--epoch-steps", "0")


pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The file of a teacher that the command line trained, and what it printed."""
    file = tmp_path_factory.mktemp("teacher") / "digits.pt"
    return file, output("teach", "--arch", "digits_resnet", "--epochs", "4", "--out", file)


def test_teach_run_evaluate(taught, place):
    teacher, printed = taught
    assert "test accuracy" in printed
    (place / "runs" / "1").mkdir(parents=True)
    code, out, err = invoke("run", "--teacher", teacher, *QUICK)
    assert code == 0, err
    result = json.loads((place / "runs" / "2" / "result.json").read_text())
    assert f"{result['student']['params']:,}" in out
    assert f"{result['student']['test_accuracy']:.2%}" in out
    assert f"{result['compression']:.1f}x" in out
    assert "rollouts/min" in err
    student = result["student"]
    expected = f"test accuracy {student['test_accuracy']:.2%} ± {student['test_standard_error']:.2%}"
    assert expected in output("evaluate", "runs/2")


@pytest.mark.slow
def test_json_quiet_and_a_run_repeated_by_its_config(taught, place):
    command = ("run", "--teacher", taught[0], *QUICK, "--anchors", "0", "--seed", "3", "--mean", "0.31")
    command += ("--device", "cpu")  # where two runs are equal, byte for byte
    code, out, err = invoke(*command, "--out", "first", "--quiet", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed.pop("out") == "first"
    assert printed == json.loads((place / "first" / "result.json").read_text())
    code, _, err = invoke("run", "--config", "first/config.json", "--out", "second", "--quiet")
    assert (code, err) == (0, "")
    first, second = (json.loads((place / run / "config.json").read_text()) for run in ("first", "second"))
    assert [run.pop("command")["out"] for run in (first, second)] == [str(place / n) for n in ("first", "second")]
    assert first == second
    assert (place / "first" / "student.pt").read_bytes() == (place / "second" / "student.pt").read_bytes()
    evaluated = json.loads(output("evaluate", "second", "--json"))
    assert (evaluated["split"], evaluated["images"], evaluated["data"]["name"]) == ("test", 359, "digits")
    for figure in ("accuracy", "standard_error", "balanced_accuracy"):
        assert evaluated[figure] == printed["student"][f"test_{figure}"]
    assert evaluated["data"]["digest"] == printed["data"]["digest"]


def test_unmet_limits_end_with_3(taught, place):
    code, _, err = invoke(
        "run", "--teacher", taught[0], *QUICK, "--max-params", "5", "--max-drop", "0", "--out", "here"
    )
    assert code == 3
    assert "the nearest was saved, it misses params by " in err
    assert "%, validation accuracy by " in err
    assert (place / "here" / "student.pt2").exists()


# Help


@pytest.mark.parametrize("command", ["run", "teach", "inspect", "evaluate", "report", "export"])
def test_help_ends_with_an_example_and_knows_every_option(command):
    shown, everything = output(command, "--help"), output(command, "--help-all")
    assert shown.splitlines()[-1].startswith(f"Example: n2n-fast {command} ")
    for param in main.cli.commands[command].params:
        if isinstance(param, main.click.Option):
            assert (f"  {param.opts[0]}" in shown) == (not param.hidden)
            assert f"  {param.opts[0]}" in everything
            assert param.help


def test_help_shows_few_options_and_help_all_every_setting():
    shown = [line for line in output("run", "--help").splitlines() if line.startswith("  -")]
    assert len(shown) <= 20
    everything = " ".join(output("run", "--help-all").split())
    for setting in fields(n2n_fast.SearchConfig):
        assert f"--{setting.name.replace('_', '-')} " in everything
        assert setting.metadata["help"] in everything
        assert setting.metadata["allowed"] in everything
    assert "[default: 20; 1 to 1,000,000]" in everything


def test_alone_it_prints_its_help():
    out = output()
    assert "Compress a trained CNN" in out
    assert "export" in out


def test_it_runs_as_a_module_and_tells_its_version_and_what_was_built(place):
    command = [sys.executable, "-m", "n2n_fast", "--version"]  # elsewhere: here may lie a checkout that is not built
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    for text in (n2n_fast.__version__, torch.__version__, "SIMD", n2n_fast.build_info()["simd_used"], "CUDA"):
        assert text in done.stdout


# Options from the command line, the environment and files


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(monkeypatch, place):
    (place / "a.toml").write_text('image_size = 64\narch = "resnet18"\njson = true\n')

    def macs(*options):
        return json.loads(output("inspect", *options))["macs"]

    by_file = macs("--config", "a.toml")
    monkeypatch.setenv("N2N_FAST_CONFIG", "a.toml")
    assert macs() == by_file
    monkeypatch.setenv("N2N_FAST_IMAGE_SIZE", "96")
    assert macs("--image-size", "32") < macs("--image-size", "64") == by_file < macs()


@pytest.fixture
def searched(monkeypatch):
    """The settings with which a command line would search."""

    def settings(*options):
        seen = []
        monkeypatch.setattr(main, "_teacher_and_data", lambda *_: (None, None, None))
        monkeypatch.setattr(main, "compress", lambda model, images, config, *_, **__: seen.append(config) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            invoke("run", "--data", "npz:set.npz", *options)
        return seen[0]

    return settings


def test_each_setting_is_given_by_set_by_its_option_by_the_environment_and_by_a_file(searched, monkeypatch, place):
    texts = {"updates": "7", "kd_weight": "0.25", "epochs": "2", "validation_images": "none", "reuse": "false"}
    texts |= {"init": "sliced", "max_params": "500_000", "seed": "-3", "ratios": "0.5,1", "leaf": "a,b.c"}
    values = {"updates": 7, "kd_weight": 0.25, "epochs": 2.0, "validation_images": None, "reuse": False}
    values |= {"init": "sliced", "max_params": 500_000, "seed": -3, "ratios": (0.5, 1.0), "leaf": ("a", "b.c")}
    expected = n2n_fast.SearchConfig(**values)
    assert searched(*(part for name, text in texts.items() for part in ("--set", f"{name}={text}"))) == expected
    options = [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]
    assert searched(*options) == expected
    assert searched(*options[:-1], "--leaf", "a", "--leaf", "b.c") == expected
    (place / "a.toml").write_text("\n".join(f'{name} = "{text}"' for name, text in texts.items()))
    assert searched("--config", "a.toml") == expected
    (place / "config.json").write_text(json.dumps(asdict(expected)))
    assert searched("--config", "config.json") == expected
    over = searched("--config", "config.json", "--set", "hidden=7", "--updates", "9")
    assert over == replace(expected, hidden=7, updates=9)
    for name, text in texts.items():
        monkeypatch.setenv(f"N2N_FAST_{name.upper()}", text)
    assert searched() == expected
    assert searched("--protocol", "paper", "--set", "kd-weight=0.25") == n2n_fast.SearchConfig.paper(**values)


def test_an_unknown_variable_of_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("N2N_FAST_CUDA", "OFF")  # for the build
    monkeypatch.setenv("N2N_FAST_IMAGE_SIZ", "96")
    code, _, err = invoke("inspect", "--arch", "digits_resnet", "--image-size", "8")
    assert (code, err) == (0, "warning: N2N_FAST_IMAGE_SIZ: no option, did you mean N2N_FAST_IMAGE_SIZE?\n")


# Dry runs


def test_a_dry_run_looks_at_the_policies_too(taught, place):
    (place / "none.pt").write_text("# no policies\n")
    assert "none.pt" in refusal("run", "--teacher", taught[0], *QUICK, "--policy", "none.pt", "--dry-run")


def test_a_dry_run_refuses_policies_and_settings_as_a_run_does(taught, place):
    command = ("run", "--teacher", taught[0], *QUICK, "--anchors", "0", "--stages", "shrinkage", "--quiet")
    assert invoke(*command, "--out", "first")[0] == 0
    other = (*command, "--policy", "first/policies.pt", "--hidden", "7")
    for options in (other, (*command, "--resume", "first", "--updates", "3")):
        err = refusal(*options, "--dry-run")
        assert err == refusal(*options)
        assert "use the same ratios, hidden and lstm_layers" in err or "updates (1 there, 3 here)" in err
    history = place / "first" / "history.jsonl"
    history.write_bytes(history.read_bytes() + b"{}\n")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    output("run", "--resume", "first", "--dry-run")
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_too_little_room_is_told_before_the_search(taught, place, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=2_000_000))
    for dry in ((), ("--dry-run",)):
        err = refusal("run", "--teacher", taught[0], *QUICK, *dry, "--out", "here")
        assert err == "n2n-fast: here: about 2.8 MB are needed, its disk has 2.0 MB; make room, or give another --out\n"
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_runs_started_at_once_take_different_directories(taught, place):
    words = [sys.executable, "-m", "n2n_fast", "run", "--teacher", str(taught[0]), *QUICK, "--quiet", "--json"]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {json.loads(process.communicate()[0])["out"] for process in both} == {"runs/1", "runs/2"}
    assert [process.returncode for process in both] == [0, 0]


def test_a_dry_run_writes_nothing(taught, place):
    command = ("run", "--teacher", taught[0], *QUICK, "--dry-run", "--quiet")
    code, out, err = invoke(*command)
    assert (code, err) == (0, "")
    assert "10^7.5" in out  # 2 ** 25 ways to remove 25 layers
    planned = json.loads(invoke(*command, "--json")[1])
    assert list(planned["choices"]) == ["removal", "shrinkage"]
    assert planned["seconds"] > planned["rollouts"] * planned["rollout_seconds"] > 0
    assert list(place.iterdir()) == []


# inspect


RESNET18 = ("inspect", "--arch", "resnet18", "--image-size", "32")


def test_inspect():
    out = output(*RESNET18)
    for text in ("layer4.0.downsample.0", "changes the resolution", "11,689,512 params"):
        assert text in out
    content = json.loads(output(*RESNET18, "--json"))
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


def test_inspect_takes_sizes_from_the_data(place):
    (place / "t.pt").write_bytes(small_state())
    (place / "set.npz").write_bytes(npz(x=np.arange(16000).reshape(40, 20, 20).astype(np.uint16), y=np.arange(40) % 10))

    def seen(*options):
        return json.loads(output("inspect", *options, "--json"))

    asked = seen("--teacher", "t.pt", "--image-size", 20)
    assert seen("--teacher", "t.pt", "--data", "npz:set.npz") == asked
    assert seen("--arch", "digits_resnet", "--data", "npz:set.npz") == asked
    assert seen("--teacher", "t.pt", "--data", "npz:set.npz", "--image-size", 40)["macs"] > 3 * asked["macs"]


def test_inspect_tells_what_rounding_costs():
    rounding = ("--round-to", "24")
    assert "widths in multiples of 24 cost, at ratio 0.1: +" in output(*RESNET18, *rounding)
    exact, rounded = (json.loads(output(*RESNET18, *options, "--json")) for options in ((), rounding))
    assert exact["rounding_costs"] == {}
    more = rounded["smallest_params"] / exact["smallest_params"] - 1
    assert rounded["rounding_costs"]["0.1"] == pytest.approx(more, abs=0.2)
    assert more > 0


def test_inspect_takes_submodules_as_leaves():
    out = output(*RESNET18, "--leaf", "layer4.1")
    assert "layer4.1.conv1" not in out
    assert "BasicBlock is not understood (layer4.1)" in out
    assert "sliced" not in out


# Refusals


def small_state(**changed):
    with seeded(0, torch.device("cpu")):
        return saved({**SmallResNet(2, 10, 1).state_dict(), **changed})


def config(**changed):
    return json.dumps({**asdict(n2n_fast.SearchConfig()), **changed}).encode()


IMAGES, LABELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8), np.arange(40) % 10
FILES = {
    "t.pt": small_state,
    "cut.pt": lambda: small_state()[:9000],
    "empty.pt": lambda: b"",
    "text.pt": lambda: b"not a network\n",
    "hostile.pt": lambda: saved({"weight": payload("payload")}),
    "strange.pt": lambda: saved({"strange.weight": torch.zeros(3, 3)}),
    "nan.pt": lambda: small_state(**{"fc.bias": torch.full((10,), float("nan"))}),
    "large.pt": lambda: saved(torchvision.models.squeezenet1_1(num_classes=10).state_dict()),
    "mine.pt": lambda: b"precious",
    "none.npz": lambda: npz(x=IMAGES[:0], y=LABELS[:0]),
    "four.npz": lambda: npz(x=IMAGES, y=np.arange(40) % 4),
    "label.npz": lambda: npz(x=IMAGES, y=np.arange(40) - 1),
    "nan.npz": lambda: npz(x=np.full((40, 8, 8), np.nan, np.float32), y=LABELS),
    "key.toml": lambda: b"updates = 3\nrolouts = 4\n",
    "value.toml": lambda: b"updates = 3.5",
    "zero.toml": lambda: b'teacher = "\\u0000"',
    "table.toml": lambda: b"[data]\nname = 3",
    "text.toml": lambda: b"updates",
    "bytes.toml": lambda: b"\xff\xfe",
    "itself.toml": lambda: b'config = "other.toml"',
    "list.json": lambda: b"[1]",
    "setting.json": lambda: config(hidden=[7]),
    "code.json": lambda: config(command={"arch": "factory:make"}),
}
REFUSED = {
    "ruin": "ruin",
    "evaluate .": "finished run",
    "inspect": "--arch",
    "inspect --arch resnet18 --leaf layer9": "layer9",
    "inspect --teacher t.pt --data npz:four.npz": "10 classes",
    "teach --out mine.pt": "exists already",
    "run --teacher no.pt": "does not exist",
    "run --teacher cut.pt": "cut.pt",
    "run --teacher empty.pt": "empty.pt",
    "run --teacher text.pt": "text.pt",
    "run --teacher .": "director",
    "run --teacher hostile.pt": "allow-pickle",
    "run --teacher strange.pt": "strange.weight",
    "run --teacher nan.pt": "fc.bias",
    "run --teacher t.pt": "--mean",
    "run --teacher large.pt --image-size 8": "--image-size",
    "run --teacher t.pt --out text.pt/run": "--out",
    "run --teacher t.pt --data npz:none.npz": "no images",
    "run --teacher t.pt --data npz:four.npz": "10 classes apart but the data has 4",
    "run --teacher t.pt --data npz:label.npz": "label -1",
    "run --teacher t.pt --data npz:nan.npz": "NaN",
    "run --teacher t.pt --data cifar10:nowhere": "--download",
    "run --teacher t.pt --data imagenet22k": "imagenet22k",
    "run --data cifar10:.": "teach",
    "run --ray-address auto": "--workers N",
    "run --updates many": "updates: many; give 1 to 1,000,000",
    "run --kd-weight -1": "kd_weight",
    "run --mean 0.5,x": "--mean",
    "run --device abacus": "--device",
    "run --set ratios=0.5,big,1": "ratios: 0.5,big,1; give ratios in (0, 1], the last of them 1",
    "run --set baseline_decay=1": "baseline_decay: 1.0; give at least 0 and below 1",
    "run --set updates=none": "updates: none",
    "run --set rolouts=4": "did you mean rollouts?",
    "run --set updates": "name=value",
    "run --config no.toml": "no.toml",
    "run --config key.toml": "rolouts: no option of n2n-fast run, did you mean rollouts?",
    "run --config value.toml": "updates: 3.5",
    "run --config zero.toml": "teacher: holds a zero byte",
    "run --config table.toml": "table",
    "run --config text.toml": "not TOML",
    "run --config bytes.toml": "not TOML",
    "run --config itself.toml": "config",
    "run --config list.json": "not the config.json of a run",
    "run --config setting.json": "hidden: '[7]'",
    "run --config code.json": "run code",
    "run --resume .": "config.json",
}


@pytest.mark.parametrize(("command", "expected"), REFUSED.items())
def test_bad_input_is_one_line_and_exit_code_2(command, expected, place):
    before = {name: make() for name, make in FILES.items() if name in command}
    for name, content in before.items():
        (place / name).write_bytes(content)
    err = refusal(*shlex.split(command))
    assert expected in err
    files = (path for path in place.rglob("*") if path.is_file())
    assert {str(path.relative_to(place)): path.read_bytes() for path in files} == before


# Failures and interrupts


def test_running_out_of_memory_is_one_line_and_tells_how_to_go_on(taught, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(environment.Evaluator, "evaluate", fails)
    err = refusal("run", "--teacher", taught[0], *QUICK, "--quiet", "--out", "here")
    assert "CUDA out of memory. Tried to allocate 2.00 GiB.); lower --batch-size" in err
    assert err.endswith("what is done is kept, go on with: n2n-fast run --resume here\n")
    monkeypatch.setattr(main.teachers, "train", fails)
    err = refusal("teach", "--arch", "digits_resnet", "--quiet")
    assert err.startswith("n2n-fast: out of memory (CUDA out of memory")


def test_an_interrupt_ends_with_130(taught, monkeypatch):
    def interrupted(error):
        def fail(*args, **kwargs):
            raise error

        return fail

    monkeypatch.setattr(main, "compress", interrupted(Interrupted("here")))
    code, _, err = invoke("run", "--teacher", taught[0], "--out", "here")
    assert (code, told(err)) == (130, ["interrupted; go on with: n2n-fast run --resume here"])
    monkeypatch.setattr(main, "read_data", interrupted(KeyboardInterrupt))
    code, _, err = invoke("run")
    assert (code, err.strip()) == (130, "interrupted")
