"""How commands declare, read and show their options; those of settings are generated from SearchConfig."""

import copy
import difflib
import importlib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from n2n_fast import __version__
from n2n_fast.files.errors import BadInput, first_line
from n2n_fast.files.safe_load import parse_json
from n2n_fast.native import build_info
from n2n_fast.search.config import SETTINGS, Setting, allowed, parse

PREFIX = "N2N_FAST_"  # of environment variables: N2N_FAST_UPDATES is --updates
OF_THE_BUILD = ("N2N_FAST_CUDA", "N2N_FAST_SANITIZE", "N2N_FAST_FUZZ")
OF_ONE_CALL = ("resume", "set", "dry_run", "json", "quiet")  # what config.json does not note
LARGEST = 100_000  # epochs, or learning rate
NOT_IN_FILES = ("config", "resume", "set", "help_all")

Decorator = Callable[[Any], Any]


class Option(click.Option):
    """An option that has its own variable of the environment."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.name not in ("set", "help_all"):
            self.envvar = self.envvar or PREFIX + self.long_name.upper().replace("-", "_")

    @property
    def long_name(self) -> str:
        """Its name on the command line, without dashes in front."""
        return self.opts[0].lstrip("-")

    @property
    def several(self) -> bool:
        """Whether its value is a list."""
        return self.multiple or self.callback is numbers


class FilePath(click.Path):
    """The path of a file or directory; an empty text is none."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; an empty one would be the working directory."""
        if value == "":
            self.fail("an empty path; give a name, or leave the option out", param, ctx)
        if "\0" in str(value):
            self.fail("holds a zero byte", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number that is neither NaN nor infinite."""

    def __init__(self, least: float, most: float) -> None:
        super().__init__(least, most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; NaN is in every range of click's."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("not a number", param, ctx)
        return number


class Command(click.Command):
    """A command whose help ends with an example; --config and --help-all are among its options."""

    def __init__(self, *args: Any, example: str = "", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.example = example
        self.params += [
            Option(["--config"], type=FilePath(), metavar="FILE", is_eager=True, expose_value=False,
                   callback=_take_file, help="Options from a file: TOML, or the config.json of a run."),
            Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, hidden=True, callback=_help_all,
                   help="Show every option and setting."),
        ]  # fmt: skip

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options; refuse code that only a run's config.json asks for."""
        rest = super().parse_args(ctx, args)
        for name in ("allow_pickle", "arch"):
            value = ctx.params.get(name)
            of_run = ctx.meta.get("run") is not None and ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP
            if of_run and (value is True or ":" in str(value)):
                raise BadInput(
                    f"{ctx.meta['run']}: was made with --allow-pickle or --arch package.module:factory, which run "
                    "code; give them again if you trust what they name"
                )
        return rest

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        if self.example:
            formatter.write(f"\nExample: {self.example}\n")


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def option(name: str, text: str, shown: bool = True, **settings: Any) -> Decorator:
    """An option with its metavar, "--workers N", or a flag; text: its help, `shown` by --help or --help-all alone."""
    flag, _, metavar = name.partition(" ")
    settings = {"metavar": metavar, **settings} if metavar else {"is_flag": True, **settings}
    return click.option(flag, cls=Option, help=text, hidden=not shown, **settings)


def options(*decorators: Decorator) -> Decorator:
    """Several options as one decorator, in this order."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def numbers(_: click.Context, option: click.Parameter, value: str | None) -> list[float] | None:
    """Comma-separated numbers, as --mean and --std take them."""
    try:
        listed = None if value is None else [float(part) for part in value.split(",")]
        if listed is not None and not all(map(math.isfinite, listed)):
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number or a comma-separated list of them", param=option) from None
    return listed


def positive(_: click.Context, option: click.Parameter, value: float) -> float:
    """A number above 0 by which something can be done that ends."""
    if not 0 < value <= LARGEST:  # nan is not
        raise click.BadParameter(f"{value} is not above 0 and at most {LARGEST:,}", param=option)
    return value


def device(_: click.Context, option: click.Parameter, value: str | None) -> torch.device:
    """A device that computes; "meta" and others hold no data."""
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if value is None else value)
        torch.zeros(1, device=chosen).item()
    except Exception as error:  # noqa: BLE001 - each backend that is missing raises something else
        raise click.BadParameter(f"{value!r} cannot be used ({first_line(error)})", param=option) from None
    return torch.device("cpu") if chosen.type == "cpu" else chosen  # torch knows one CPU, cpu:1 among its names


def version() -> str:
    """The version, torch's, and what the native core was built for."""
    built = build_info()
    cuda = f"CUDA {built['cuda_version']} for {built['cuda_archs']}" if built["cuda"] else "no CUDA"
    simd = f"{built['simd_used']} in use of {', '.join(built['simd'])}"
    return f"n2n-fast, version {__version__}\ntorch {torch.__version__}\nnative core: {cuda}; SIMD: {simd}"


# Settings


def setting_options(*names: str, shown: bool = True) -> Decorator:
    """The options of these settings, generated from their fields."""
    return options(*(_setting_option(SETTINGS[name], shown) for name in names))


def _setting_option(setting: Setting, shown: bool) -> Decorator:
    default = "" if setting.default in (None, ()) else f"default: {_shown(setting.default)}; "
    text = f"{setting.metadata['help']}  [{default}{allowed(setting)}]"
    several = isinstance(setting.default, tuple)
    return option(f"--{setting.name.replace('_', '-')} VALUE", text, shown, multiple=several, callback=_parsed)


def _shown(value: Any) -> str:
    """A setting's value as one would give it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parsed(context: click.Context, option: click.Parameter, value: Any) -> Any:
    name = str(option.name)
    if context.get_parameter_source(name) is ParameterSource.DEFAULT:
        return None
    return parse(SETTINGS[name], ",".join(value) if isinstance(value, tuple) else value)


def assignments(_: click.Context, __: click.Parameter, pairs: tuple[str, ...]) -> dict[str, Any]:
    """The callback of --set: by name the settings of name=value pairs."""
    settings = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        name = name.replace("-", "_")
        if not equals:
            raise BadInput(f"--set {pair}: give --set name=value")
        if name not in SETTINGS:
            raise BadInput(f"--set {name}: no setting{_nearest(name, SETTINGS)}; n2n-fast run --help-all lists them")
        settings[name] = parse(SETTINGS[name], text)
    return settings


def given_settings(context: click.Context) -> dict[str, Any]:
    """The settings that the command line, the environment or a file gives."""
    by_option = {
        name: value
        for name, value in context.params.items()
        if name in SETTINGS and context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    return {**by_option, **context.params.get("set", {})}


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f", did you mean {near[0]}?" if near else ""


def _help_all(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Show the help with every option, each setting with its default and what it may be."""
    if not wanted:
        return
    hidden = [copy.copy(param) for param in context.command.params if isinstance(param, Option) and param.hidden]
    formatter = context.make_formatter()
    for title, params in (
        ("More options", [param for param in hidden if param.name not in SETTINGS]),
        (
            "Settings, by --set name=value too; for the digits some defaults differ",
            [param for param in hidden if param.name in SETTINGS],
        ),
    ):
        for param in params:
            param.hidden = False
        if params:
            with formatter.section(title):
                formatter.write_dl(list(filter(None, (param.get_help_record(context) for param in params))))
    click.echo(f"{context.get_help()}\n\n{formatter.getvalue().rstrip()}")
    context.exit()


# The environment and files


def unknown_variables(group: click.Group) -> list[str]:
    """A warning for each variable of the environment that looks like an option and is none."""
    params = [param for command in group.commands.values() for param in command.params]
    known = {str(param.envvar) for param in params if param.envvar} | set(OF_THE_BUILD)
    unknown = [name for name in sorted(os.environ) if name.startswith(PREFIX) and name not in known]
    return [f"warning: {name}: no option{_nearest(name, known)}" for name in unknown]


def take_run(context: click.Context, _: click.Parameter, directory: Path | None) -> Path | None:
    """The callback of --resume: the run's own options come after the command line and the environment."""
    if directory is not None:
        _take(context, _of_run(directory / "config.json", context, resume=True))
    return directory


def _take_file(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """The callback of --config."""
    if path is not None:
        _take(context, _of_run(path, context) if path.suffix == ".json" else _of_toml(path, context.command))


def _take(context: click.Context, values: dict[str, Any]) -> None:
    context.default_map = {**(context.default_map or {}), **values}


def _of_toml(path: Path, command: click.Command) -> dict[str, Any]:
    """By parameter what a file of TOML says of a command's options."""
    known = {param.long_name: param for param in command.params if isinstance(param, Option)}
    values = {}
    for key, value in _toml(path).items():
        param = known.get(key.replace("_", "-"))
        if param is None or param.name in NOT_IN_FILES:
            raise BadInput(
                f"{path}: {key}: no option of n2n-fast {command.name}{_nearest(key, known)}; "
                f"see n2n-fast {command.name} --help-all"
            )
        if isinstance(value, dict):
            raise BadInput(f"{path}: {key}: a table; options stand at the top of the file")
        try:
            values[str(param.name)] = _as_given(param, _checked(param, value))
        except TypeError:
            wanted = _wanted(param)
            raise BadInput(f"{path}: {key}: {str(value).lower()[:40]}; give {wanted}") from None
    return values


def _toml(path: Path) -> Any:
    try:
        return importlib.import_module("tomllib").loads(path.read_text(encoding="utf-8"))
    except ImportError:
        raise BadInput(f"{path}: TOML needs Python 3.11; give a run's config.json, or use {PREFIX}<OPTION>") from None
    except ValueError as error:  # of TOML and of UTF-8
        raise BadInput(f"{path}: not TOML ({first_line(error)})") from None


def _of_run(path: Path, context: click.Context, resume: bool = False) -> dict[str, Any]:
    """The options and settings that a run was made with, by its config.json."""
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
        command = settings.get("command")
        values = {**(command or {}), **{name: settings[name] for name in SETTINGS}}
        known = {str(param.name): param for param in context.command.params if isinstance(param, Option)}
        noted = {
            name: _as_given(param, _checked(param, values[name]))
            for name, param in known.items()
            if name not in OF_ONE_CALL and (param.callback is _parsed or values.get(name) is not None)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = first_line(error)
        raise BadInput(f"{path}: not the config.json of a run ({reason}); other files are TOML") from None
    if resume and not isinstance(command, dict):
        raise BadInput(f"{path.parent}: was not begun by n2n-fast run; go on from Python, compress(resume=True)")
    context.meta["run"] = path
    noted.pop("out", None)  # another run's directory
    return noted


def _checked(option: Option, value: Any) -> Any:
    """A value of a file; TypeError for any that the option cannot have."""
    parts = value if isinstance(value, list) and option.several else [value]
    of_type = str if isinstance(option.type, click.Path) else str | int | float
    bools = _takes_bools(option)
    if not all(isinstance(part, of_type | None) and (bools or not isinstance(part, bool)) for part in parts):
        raise TypeError(f"{option.name}: {str(value)[:40]!r}")
    return value


def _takes_bools(option: Option) -> bool:
    return option.is_flag or (option.name in SETTINGS and SETTINGS[option.name].type is bool)


def _wanted(option: Option) -> str:
    """What to write in a file for an option."""
    if _takes_bools(option):
        return "true or false"
    if option.name in SETTINGS:
        return allowed(SETTINGS[option.name])
    text = "a path in quotes" if isinstance(option.type, click.Path) else "a name or a number"
    return f"{text}, or a list of them" if option.several else text


def _as_given(option: Option, value: Any) -> Any:
    """A value as the command line would give it, so that it is checked as strictly."""
    if isinstance(value, bool) and option.is_flag:
        return value
    parts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    if any("\0" in part for part in parts):
        raise BadInput(f"{option.long_name}: holds a zero byte")
    return parts if option.multiple else ",".join(parts)
