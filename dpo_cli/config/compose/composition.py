"""Compose files and overrides into one nested dictionary, remembering where each key was set."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_cli.config.compose.files import FilesOfGroups, check_config_dir, open_repository
from dpo_cli.config.compose.overrides import parse_overrides
from dpo_cli.config.secrets import mask, mask_tokens
from dpo_cli.config.shipped import CONF_FOLDER, GROUPS, RECIPES_FOLDER, display_path
from dpo_cli.config.suggest import closest, suggest_choice
from dpo_cli.errors import ConfigError, DpoError

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Request:
    """What a user asked for: override words, and the files they are laid over.

    groups: those that this command has; what a file chooses in another means nothing, as when model=tiny brings its
        data along. program: whose command line it is.
    """

    overrides: tuple[str, ...] = ()
    config_dir: Path | None = None
    config_name: str = "config"
    groups: tuple[str, ...] = GROUPS
    program: str = "dpo-train"


@dataclass(frozen=True)
class Composition:
    """values: resolved, plain. places: where each dotted key was set. choices: what each group was set to."""

    values: dict[str, Any]
    places: Mapping[str, str]
    choices: Mapping[str, Any]
    problems: tuple[DpoError, ...]

    def place(self, key: str) -> str | None:
        """Where `key` was set: itself, else something inside it, else the nearest section around it."""
        inside = [place for known, place in self.places.items() if known.startswith(f"{key}.")]
        if key not in self.places and inside:
            return inside[-1]
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return None


@dataclass
class _Places:
    of: dict[str, str] = field(default_factory=dict)

    def record(self, key: str, value: Any, place: str) -> None:
        for known in [known for known in self.of if known == key or known.startswith(f"{key}.")]:
            if not isinstance(value, Mapping):
                del self.of[known]
        if isinstance(value, Mapping):
            for name, inner in value.items():
                self.record(f"{key}.{name}" if key else str(name), inner, place)
        if key:
            self.of[key] = place


def register_resolvers(started: time.struct_time) -> None:
    """Make ${now:FORMAT} mean one moment, that of the start, wherever and however often it is asked."""
    OmegaConf.register_new_resolver("now", lambda pattern: time.strftime(pattern, started), replace=True)


def compose(request: Request, *, run_dir: str | None = None, started: time.struct_time | None = None) -> Composition:
    """Compose as far as possible; whatever is wrong is collected in `problems`.

    run_dir: takes the place of whatever files and overrides say. started: the moment that ${now:} stands for.
    """
    register_resolvers(started or time.localtime())
    overrides, problems = parse_overrides(request.overrides, sweep=False, program=request.program)
    if request.config_dir is not None:
        problems += check_config_dir(request.config_dir)
        if not request.config_dir.is_dir():
            return Composition({}, {}, {}, tuple(problems))
    absent = frozenset(GROUPS) - set(request.groups)
    files = FilesOfGroups(open_repository(request.config_dir), absent=absent)
    try:
        if not files.config_exists(request.config_name):
            raise _no_such_config(request)
        choosing, setting = _split(overrides, files, absent, problems)
        config, places, choices = _merge_files(request.config_name, choosing, files)
    except ConfigError as error:
        return Composition({}, {}, {}, (*problems, error))

    for override in setting:
        if problem := _apply(override, config, places):
            problems.append(problem)
    if run_dir is not None:
        config["run_dir"] = run_dir
    if config.pop("hydra", None) is not None:
        problems.append(_hydra_settings(places.of.get("hydra")))
    values: dict[str, Any] = {}
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        assert isinstance(plain, dict)
        values = {str(key): value for key, value in plain.items()}
    except OmegaConfBaseException as error:
        problems.append(_unresolvable(error, places))
    return Composition(values, places.of, choices, tuple(problems))


def _split(
    overrides: Sequence[Override], files: IConfigRepository, absent: frozenset[str], problems: list[DpoError]
) -> tuple[list[Override], list[Override]]:
    """Part overrides that choose a group's file from those that set a key; impossible choices become problems."""
    choosing: list[Override] = []
    setting: list[Override] = []
    for override in overrides:
        group, value = override.key_or_group, override.value()
        if group == "hydra" or override.is_hydra_override():
            problems.append(_hydra_settings(COMMAND_LINE, key=group))
        elif group in absent or not files.group_exists(group) or isinstance(value, dict):
            setting.append(override)
        elif override.is_delete():
            choosing.append(override)
        elif problem := _choice_problem(group, value, files):
            problems.append(problem)
        else:
            choosing.append(override)
    return choosing, setting


def _choice_problem(group: str, value: Any, files: IConfigRepository) -> ConfigError | None:
    names = [name for name in files.get_group_options(group, ObjectType.CONFIG) if not name.startswith("_")]
    if value is None and group in ("recipe", "logger"):
        return None
    many = isinstance(value, list)
    if many and group != "logger":
        return ConfigError(
            f"{group} takes one choice, not a list.", where=COMMAND_LINE, hint=f"one of {', '.join(names)}"
        )
    for choice in value if many else [value]:
        if not isinstance(choice, str) or not files.config_exists(f"{group}/{choice}"):
            text = "null" if choice is None else str(choice)
            return ConfigError(
                f"There is no {group} {mask(text)}.",
                where=f"{group}, {COMMAND_LINE}",
                hint=suggest_choice(text, names),
            )
    return None


def _merge_files(
    config_name: str, choosing: Sequence[Override], files: IConfigRepository
) -> tuple[DictConfig, _Places, dict[str, Any]]:
    """Merge the files of the defaults list in its order. Raises ConfigError when one is unusable."""
    places = _Places()
    config = OmegaConf.create()
    try:
        listed = create_defaults_list(
            files, config_name, overrides_list=[_plain(o) for o in choosing], prepend_hydra=False, skip_missing=False
        )
        for default in listed.defaults:
            part, place = _load(default, files)
            places.record("", OmegaConf.to_container(part, resolve=False), place)
            config.merge_with(part)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, HydraException, ValueError, TypeError) as error:
        raise _unusable(error, config_name) from None
    choices = {name.split("@")[0]: choice for name, choice in listed.overrides.known_choices.items()}
    return config, places, choices


def _plain(override: Override) -> Override:
    """`+model=x` and `++model=x` mean `model=x`: every group that there is has its place in the defaults list."""
    if override.is_add() or override.is_force_add():
        return Override(
            type=type(override.type).CHANGE,
            key_or_group=override.key_or_group,
            value_type=override.value_type,
            _value=override._value,
            package=override.package,
            input_line=override.input_line,
        )
    return override


def _load(default: ResultDefault, files: IConfigRepository) -> tuple[DictConfig, str]:
    assert default.config_path is not None
    loaded = files.load_config(default.config_path)
    if loaded is None or not isinstance(loaded.config, DictConfig):
        raise ConfigError(f"{default.config_path}.yaml does not hold keys and values.", where=default.config_path)
    part = OmegaConf.create()
    own = loaded.config.copy()
    own.pop("defaults", None)
    if default.package:
        OmegaConf.update(part, default.package, own, merge=False, force_add=True)
    else:
        part = own
    folder = Path(loaded.path.partition("://")[2])
    inside = default.config_path.partition("/")[2] if folder == RECIPES_FOLDER else default.config_path
    return part, display_path(folder / f"{inside}.yaml")


def _apply(override: Override, config: DictConfig, places: _Places) -> ConfigError | None:
    key, value = override.key_or_group, override.value()
    try:
        if override.is_delete():
            section, _, leaf = key.rpartition(".")
            node = OmegaConf.select(config, section) if section else config
            if not isinstance(node, DictConfig) or leaf not in node:
                return ConfigError(f"There is no {key} to delete.", where=COMMAND_LINE)
            del node[leaf]
            return None
        # Unknown keys are let in here, so that the schema finds all of them together, those of files included.
        OmegaConf.update(config, key, value, merge=isinstance(value, dict), force_add=True)
    except OmegaConfBaseException as error:
        return ConfigError(f"{key} cannot be set: {str(error).splitlines()[0]}", where=COMMAND_LINE)
    places.record(key, value, COMMAND_LINE)
    return None


def _no_such_config(request: Request) -> ConfigError:
    folders = [folder for folder in (request.config_dir, CONF_FOLDER) if folder is not None]
    names = [file.stem for folder in folders for file in sorted(folder.glob("*.yaml"))]
    found = closest(request.config_name, names)
    return ConfigError(
        f"There is no {request.config_name}.yaml in {' or '.join(map(str, folders))}.",
        where="--config-name",
        hint=f"did you mean {found}?" if found else f"one of {', '.join(names)}; --config-dir names a folder of yours",
    )


def _hydra_settings(place: str | None, key: str = "hydra") -> ConfigError:
    return ConfigError(
        f"{key}: Hydra's own settings are not used here.",
        where=place,
        hint="run_dir=FOLDER names the run's folder, -m sweeps, --config-dir adds files",
    )


def _unusable(error: Exception, config_name: str) -> ConfigError:
    if isinstance(error, YAMLError):
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f"{display_path(Path(mark.name))}, line {mark.line + 1}" if mark is not None else config_name
        return ConfigError(f"Not valid YAML: {getattr(error, 'problem', None) or error}.", where=place)
    text = mask_tokens(str(error).strip() or str(error.__cause__ or type(error).__name__))
    return ConfigError(text.rstrip("."), where=f"the defaults of {config_name}")


def _unresolvable(error: OmegaConfBaseException, places: _Places) -> ConfigError:
    key = str(getattr(error, "full_key", None) or "")
    reason = str(error).splitlines()[0].rstrip(".")
    return ConfigError(f"{key or 'The configuration'} cannot be worked out: {reason}.", where=places.of.get(key))
