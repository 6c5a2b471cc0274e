"""From a recipe file and flags to a checked configuration, and back into a file.

A recipe is flat: its keys are the flags' names with underscores. A flag overrides the file. The options of a
method are read from a file only where the file and the run mean the same method: one method's temperature must
never become another's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_type_hints

import tyro
import yaml

from contrastive_mm.checkpoint import write_atomically
from contrastive_mm.domain import load_domain, recipe_folder
from contrastive_mm.errors import UserError, unknown_name
from contrastive_mm.methods import METHOD_REGISTRY, get_method
from contrastive_mm.training import TrainerConfig

DomainOptions = TypeVar("DomainOptions")
MethodOptions = TypeVar("MethodOptions")

CONFIG_FILE = "config.yaml"
IDENTITY_KEYS = ("domain", "method")
YES, NO = {"true", "yes", "on"}, {"false", "no", "off"}
NOTHING = {"", "null", "none", "~"}


@dataclass(frozen=True)
class RunConfig(Generic[DomainOptions, MethodOptions]):
    """Everything that decides a run's result.

    Attributes:
        domain: name of the domain.
        method: name of the method.
        domain_options: the domain's dataclass.
        method_options: the method's dataclass.
        trainer: how it is trained.
    """

    domain: str
    method: str
    domain_options: DomainOptions
    method_options: MethodOptions
    trainer: TrainerConfig

    def flat(self) -> dict[str, Any]:
        """The recipe that gives this configuration back."""
        values: dict[str, Any] = {"domain": self.domain, "method": self.method}
        for part in (self.domain_options, self.method_options, self.trainer):
            values.update(_flatten(part))
        return values

    def save(self, path: Path) -> None:
        """Write the recipe as YAML."""
        text = yaml.safe_dump(self.flat(), sort_keys=False, allow_unicode=True)
        write_atomically(path, lambda temporary: _write(temporary, text))


def _known_methods(default: str) -> str:
    """What stands behind --method in --help; other packages' methods are imported when it is asked for."""
    return f"({', '.join(METHOD_REGISTRY.usable_names())}; by default the recipe's, or the domain's own)"


@dataclass(frozen=True)
class RunFlags:
    """What to run and where."""

    method: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_known_methods)] = None
    """Contrastive method."""
    config: str | None = None
    """Recipe: a YAML file, or the name of one that comes with the domain. Flags override it."""
    output: Path | None = None
    """Folder of the run; runs/<domain>-<method> by default."""
    resume: bool = False
    """Continue the run in --output from its last checkpoint, with its saved configuration."""
    overwrite: bool = False
    """Delete the run that --output holds and start anew."""


@dataclass(frozen=True)
class _Flags(Generic[DomainOptions, MethodOptions]):
    run: RunFlags
    domain: DomainOptions
    method_options: MethodOptions
    trainer: TrainerConfig


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _flatten(options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        values.update(_flatten(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return values


def _keys(options_class: type[Any]) -> set[str]:
    return set(_flatten(options_class()))


def recipes(domain: str) -> dict[str, Path]:
    """The recipes that come with a domain, by name."""
    return {path.stem: path for path in sorted(recipe_folder(domain).glob("*.yaml"))}


def read_recipe(name: str, domain: str) -> tuple[dict[str, Any], str]:
    """Read a recipe by path, or by the name of one that comes with the domain.

    Returns:
        Its content, and its path for messages.

    Raises:
        UserError: there is none, or it is no flat YAML mapping.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        known = recipes(domain)
        if name not in known:
            raise unknown_name("recipe (and no such file)", name, known)
        path = known[name]
    try:
        # Every scalar as it is written: YAML would make a boolean of `precision: no`, and text of `3e-4`.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    content = content or {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} must map option names to values, as in 'batch_size: 256'.")
    for key, value in content.items():
        if isinstance(value, dict | list):
            raise UserError(f"{path}: {key} has a nested value; recipes are flat, one option a line.")
    return content, str(path)


def _check_keys(recipe: Mapping[str, Any], source: str, domain: str, method: str) -> set[str]:
    """Refuse unknown keys; return the keys that are options of the recipe's own method alone.

    A recipe that names no method may have the options of the run's.
    """
    if recipe.get("domain", domain) != domain:
        raise UserError(f"{source} is a recipe for {recipe['domain']}, not for {domain}.")
    shared = _keys(load_domain(domain).config_class) | _keys(TrainerConfig) | set(IDENTITY_KEYS)
    of_method = _keys(get_method(recipe.get("method", method)).config_class)
    for key in recipe:
        if key not in shared | of_method:
            raise unknown_name("key", key, shared | of_method, source)
    return of_method - shared


def _check_names(domain: str, method: str) -> None:
    """All options of a run share one command line: refuse two of one name, as another package may bring them."""
    owners = {"domain": "every recipe"}
    parts = (
        ("the run", RunFlags),
        ("training", TrainerConfig),
        (f"the domain {domain!r}", load_domain(domain).config_class),
        (f"the method {method!r}", get_method(method).config_class),
    )
    for owner, options_class in parts:
        for key in sorted(_keys(options_class)):
            if key in owners:
                raise UserError(f"Option {key!r} of {owner} has the name of one of {owners[key]}: rename it.")
            owners[key] = owner


def _as_arguments(recipe: Mapping[str, str], types: Mapping[str, Any], source: str) -> list[str]:
    """A recipe's entries as flags, each read as its option's type wants it."""
    arguments = []
    for key, value in recipe.items():
        flag = key.replace("_", "-")
        if types[key] is bool:
            if value.lower() not in YES | NO:
                raise UserError(f"{source}: {key} = {value!r}; it must be true or false.")
            arguments.append(f"--{flag}" if value.lower() in YES else f"--no-{flag}")
        elif value.lower() in NOTHING and type(None) in get_args(types[key]):
            arguments.append(f"--{flag}=None")
        elif value == "":
            raise UserError(f"{source}: {key} has no value. Give one, or leave the line out.")
        else:
            arguments.append(f"--{flag}={value}")
    return arguments


def _types(options_class: type[Any]) -> dict[str, Any]:
    """The type of each option, by key."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(options_class).items():
        if name in {field.name for field in dataclasses.fields(options_class)}:
            nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
            found.update(_types(kind) if nested else {name: kind})
    return found


def _peek(arguments: list[str], flag: str) -> str | None:
    """The value of one flag, read before the others can be: the method decides which others there are."""
    value = None
    for number, argument in enumerate(arguments):
        if argument == flag and number + 1 < len(arguments):
            value = arguments[number + 1]
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
    return value


def parse_run(domain: str, arguments: list[str]) -> tuple[RunConfig[Any, Any], RunFlags]:
    """Read a run's flags and recipe.

    Args:
        domain: name of the domain.
        arguments: what stands behind it on the command line.

    Raises:
        UserError: an unknown domain, method, recipe or key, a value that doesn't fit, or a domain and a method
            with options of one name.
        SystemExit: tyro's answer to an unknown flag, and to --help.
    """
    domain_class = load_domain(domain)
    recipe, source = _find_recipe(domain, arguments)
    method = _peek(arguments, "--method") or recipe.get("method") or domain_class.default_method
    method_keys = _check_keys(recipe, source, domain, method)
    _check_names(domain, method)
    if recipe.get("method") not in (None, method):
        recipe = {key: value for key, value in recipe.items() if key not in method_keys}
    given = {key: value for key, value in recipe.items() if key not in IDENTITY_KEYS}
    flags_class: Any = _Flags[domain_class.config_class, get_method(method).config_class]  # type: ignore[name-defined,misc]
    parts = (domain_class.config_class, get_method(method).config_class, TrainerConfig)
    known = _as_arguments(given, {key: kind for part in parts for key, kind in _types(part).items()}, source)
    if known:
        _check_values(flags_class, known, source)
    flags = tyro.cli(
        flags_class,
        prog=f"contrastive-mm {domain}",
        description=f"{domain_class.__doc__}\n\nRecipes: {', '.join(recipes(domain)) or 'none'}.",
        args=[*known, *arguments],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config: RunConfig[Any, Any] = RunConfig(domain, method, flags.domain, flags.method_options, flags.trainer)
    return config, flags.run


def _find_recipe(domain: str, arguments: list[str]) -> tuple[dict[str, Any], str]:
    name = _peek(arguments, "--config")
    if "--resume" in arguments:
        if name is not None:
            raise UserError("--resume continues with the run's own configuration; leave --config out.")
        output = _peek(arguments, "--output")
        if output is None:
            raise UserError("--resume needs --output, the folder of the run to continue.")
        if not (Path(output) / CONFIG_FILE).is_file():
            raise UserError(f"There is no run to resume in {output}: it has no {CONFIG_FILE}.")
        name = str(Path(output) / CONFIG_FILE)
    return ({}, "") if name is None else read_recipe(name, domain)


def _check_values(flags_class: Any, arguments: list[str], source: str) -> None:
    """Read the recipe by itself first, so that a bad value in it is blamed on the file and not on a flag."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            tyro.cli(flags_class, args=arguments, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as error:
        # Out of a box with help in it, the line that says what is wrong.
        lines = [line.strip("│╭╮╰╯─ \n") for line in said.getvalue().splitlines()]
        spoken = [line for line in lines if line.strip("-") and "--help" not in line]
        useful = next((line for line in spoken if line.startswith("Error")), " ".join(spoken))
        raise UserError(f"{source} has a value that doesn't fit: {useful}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def load_run_config(path: Path) -> RunConfig[Any, Any]:
    """Read the configuration that a run saved.

    Raises:
        UserError: the file is missing, or can't be read.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} holds no run: {path.name} is missing.")
    content, _ = read_recipe(str(path), "")
    if "domain" not in content:
        raise UserError(f"{path} is not a run's configuration: it names no domain.")
    config, _ = parse_run(content["domain"], [f"--config={path}"])
    return config
