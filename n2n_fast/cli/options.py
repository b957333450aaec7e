"""How commands present and read their options: help by sections, defaults from the environment and from a file."""

import importlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from n2n_fast import __version__
from n2n_fast.files.errors import BadInput, first_line
from n2n_fast.native import build_info
from n2n_fast.search.config import PROTOCOLS, SearchConfig

PREFIX = "N2N_FAST_"  # of environment variables: N2N_FAST_UPDATES is --updates
OF_ONE_CALL = ("resume", "dry_run", "as_json", "quiet")  # what config.json does not note

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Decorated], Decorated]


class Option(click.Option):
    """An option with a section of the help, and its own variable of the environment."""

    def __init__(self, *args: Any, section: str = "Options", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section
        if self.envvar is None:
            self.envvar = PREFIX + self.long_name.upper().replace("-", "_")

    @property
    def long_name(self) -> str:
        """Its name on the command line, without dashes in front."""
        return max(self.opts, key=len).lstrip("-")


class Command(click.Command):
    """A command whose help shows options by section and ends with an example; --config is among its options."""

    def __init__(self, *args: Any, example: str = "", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.example = example
        self.params.append(
            Option(
                ["--config"],
                type=click.Path(path_type=Path),
                metavar="FILE",
                is_eager=True,
                expose_value=False,
                callback=_take_defaults,
                help="Defaults of options: TOML, or the config.json of a run.",
            )
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section in the order of their first options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        general = sections.pop("Options", [])
        for title, records in (*sections.items(), ("Options", general)):
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        if self.example:
            formatter.write_paragraph()
            formatter.write(f"Example: {self.example}\n")


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


def section(title: str, *options: Decorator[Any]) -> Decorator[Any]:
    """Options, made by `option`, under one title of the help."""

    def decorate(command: Decorated) -> Decorated:
        for option in reversed(options):
            option(command)
        params: list[Any] = command.__click_params__  # type: ignore[attr-defined]
        for param in params[-len(options) :]:
            param.section = title
        return command

    return decorate


def option(*names: str, **settings: Any) -> Decorator[Any]:
    """click.option, of this module's kind."""
    return click.option(*names, cls=Option, **settings)


def version() -> str:
    """The version, torch's, and what the native core was built for."""
    built = build_info()
    cuda = f"CUDA {built['cuda_version']} for {built['cuda_archs']}" if built["cuda"] else "no CUDA"
    simd = f"{built['simd_used']} in use of {', '.join(built['simd'])}"
    return f"n2n-fast, version {__version__}\ntorch {torch.__version__}\nnative core: {cuda}; SIMD: {simd}"


# Defaults from a file


def _take_defaults(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """The callback of --config: what the file says comes after the command line and the environment."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **_defaults(path, context.command)}


def _defaults(path: Path, command: click.Command) -> dict[str, Any]:
    """By parameter what a file says of a command's options."""
    text = path.read_bytes()
    options = {param.long_name: param for param in command.params if isinstance(param, Option)}
    if path.suffix == ".json":
        return _of_run(path, text, list(options.values()))
    values = _toml(path, text)
    found = {}
    for key, value in values.items():
        option = options.get(key.replace("_", "-"))
        if option is None or option.name == "config":
            raise BadInput(f"{path}: {key}: no option of n2n-fast {command.name}; see n2n-fast {command.name} --help")
        if isinstance(value, dict):
            raise BadInput(f"{path}: {key}: a table; options stand at the top of the file")
        found[str(option.name)] = _as_given(option, value)
    return found


def _toml(path: Path, text: bytes) -> dict[str, Any]:
    try:
        tomllib: Any = importlib.import_module("tomllib")
    except ImportError:
        raise BadInput(f"{path}: TOML needs Python 3.11; give a run's config.json, or use {PREFIX}<OPTION>") from None
    try:
        found: dict[str, Any] = tomllib.loads(text.decode())
    except ValueError as error:  # of TOML and of UTF-8
        raise BadInput(f"{path}: not TOML ({first_line(error)})") from None
    return found


def _of_run(path: Path, text: bytes, options: list[Option]) -> dict[str, Any]:
    """The options that a run was made with, by its config.json; where it was made from Python, its settings."""
    try:
        held = json.loads(text)
        command = held.get("command") or {}
        settings = {f.name: held[f.name] for f in fields(SearchConfig)}
        usual = SearchConfig(**PROTOCOLS[command.get("protocol", "fast")])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{path}: not the config.json of a run; other files are TOML") from None
    names = {option.name for option in options}
    if "rollouts" in names:
        _check_settings(path, settings, usual, names)
    values = {**command, **settings}
    return {
        str(option.name): _as_given(option, values[option.name])
        for option in options
        if option.name not in (*OF_ONE_CALL, "out") and values.get(option.name) is not None
    }


def _check_settings(
    path: Path, settings: Mapping[str, Any], usual: SearchConfig, names: Collection[str | None]
) -> None:
    """Refuse what no option can set."""
    for name, value in settings.items():
        expected = json.loads(json.dumps(getattr(usual, name)))
        if name not in names and value != expected:
            raise BadInput(f"{path}: {name} is {value!r} there, which no option sets; use compress from Python")


def _as_given(option: Option, value: Any) -> Any:
    """A value as the command line would give it, so that it is checked as strictly."""
    if isinstance(value, bool):
        return value
    parts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    return parts if option.multiple else ",".join(parts)
