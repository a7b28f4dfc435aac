"""Where configuration files are looked for: the shipped conf/ and recipes/, and a folder of the user's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.default_element import GroupDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult

from dpo_cli.config.shipped import CONF_FOLDER, RECIPES_FOLDER, shipped_files
from dpo_cli.errors import ConfigError, DpoError

_RECIPE_GROUP = "recipe"


class RecipeSource(FileConfigSource):
    """Shows the files of recipes/ as the config group `recipe`."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        return super().load_config(_inside(config_path) or "")

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", _RECIPE_GROUP)

    def is_config(self, config_path: str) -> bool:
        inside = _inside(config_path)
        return bool(inside) and super().is_config(str(inside))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return super().list("", results_filter) if config_path == _RECIPE_GROUP else []


class FilesOfGroups(CachingConfigRepository):
    """Every file read once. What one chooses in a group that the command does not have is left out of its defaults."""

    def __init__(self, files: ConfigRepository, *, absent: frozenset[str]) -> None:
        super().__init__(files)
        self._absent = absent

    def load_config(self, config_path: str) -> ConfigResult | None:
        loaded = super().load_config(config_path)
        if loaded is None or not loaded.defaults_list or not self._absent:
            return loaded
        return replace(loaded, defaults_list=[default for default in loaded.defaults_list if not self._is_for(default)])

    def _is_for(self, default: object) -> bool:
        return isinstance(default, GroupDefault) and default.override and str(default.group).lstrip("/") in self._absent


def _inside(config_path: str) -> str | None:
    group, _, name = config_path.partition("/")
    return name if group == _RECIPE_GROUP else None


def open_repository(config_dir: Path | None) -> ConfigRepository:
    """All files by their names in defaults lists; the user's folder comes first."""
    # Named here rather than found: Hydra's search for plugins imports every one of them, which takes longer than all
    # the rest of a start.
    for source in (FileConfigSource, RecipeSource):
        SourcesRegistry.instance().register(source)
    search_path = ConfigSearchPathImpl()
    if config_dir is not None:
        search_path.append("command line", f"file://{config_dir.resolve()}")
    search_path.append("conf", f"file://{CONF_FOLDER}")
    search_path.append("recipes", f"recipes://{RECIPES_FOLDER}")
    return ConfigRepository(search_path)


def check_config_dir(config_dir: Path) -> list[DpoError]:
    """Refuse a missing folder, and files that bear a shipped file's name: which of the two runs would be a riddle."""
    if not config_dir.is_dir():
        return [ConfigError(f"There is no folder {config_dir}.", where="--config-dir")]
    shipped = shipped_files()
    problems: list[DpoError] = []
    for file in sorted(config_dir.rglob("*.yaml")):
        name = file.relative_to(config_dir).as_posix()
        if name in shipped:
            problems.append(
                ConfigError(
                    f"{file} has the name of a shipped file, {shipped[name]}.",
                    where=str(file),
                    hint=f"rename it, say to {file.with_name('my_' + file.name).name}",
                )
            )
    return problems
