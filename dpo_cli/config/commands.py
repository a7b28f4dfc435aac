"""The checked configurations of the commands beside dpo-train: names, types, ranges. Defaults: conf/."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dpo_cli.config.contradictions import FILE_ENDINGS
from dpo_cli.config.schema import (
    Config,
    Count,
    CountOrNever,
    DataConfig,
    HardwareConfig,
    ModelConfig,
    Name,
    NotNegative,
    Positive,
    SamplingConfig,
    Section,
    Sources,
)
from dpo_cli.paths import resolve_path

# By this file of its folder a run of dpo-train is known.
RUN_REQUEST = "overrides.yaml"
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class CommandConfig(Section):
    """What both have: a policy, rows to read, and a place for what is found."""

    out: Name | None
    store_dir: Name
    seed: Seed
    split: Name
    subset: Name | None
    columns: dict[str, str] | None
    prompt_template: Name | None
    chat: bool | None
    on_bad_row: Literal["error", "drop"]
    limit: Count | None
    sampling: SamplingConfig
    batch_tokens: Annotated[int, Field(ge=2)]
    beta: Positive | None
    model: ModelConfig
    hardware: HardwareConfig

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the names that YAML has."""
        plain: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return plain


class SampleConfig(CommandConfig):
    prompts: Sources
    out: Name
    verifier: Name | None
    pairs: Literal["verified", "best_worst"] | None
    pairs_per_prompt: Count
    chosen: Name | None
    samples_out: Name | None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


Counts = Annotated[list[Count], BeforeValidator(_as_list)]


class EvalConfig(CommandConfig):
    mode: Literal["task", "preferences", "rewards", "compare"]
    prompts: Sources | None
    verifier: Name
    pass_at: Counts
    maj_at: Counts
    compare: Annotated[list[Name], BeforeValidator(_as_list)]
    data: Sources | None
    max_tokens: Annotated[int, Field(ge=2)]
    on_long: Literal["drop", "truncate"]


class DataCheckConfig(Config):
    """What a training is told, and how its data are looked at."""

    out: Name | None
    fail_on: Annotated[list[Name], BeforeValidator(_as_list)]
    similarity: Annotated[float, Field(gt=0, le=1)] | None
    shown: CountOrNever


class ConvertConfig(Section):
    out: Name
    data: DataConfig

    def as_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = self.model_dump(mode="json")
        return plain


class ChatConfig(Section):
    prompt: Name | None
    beside: Name | None
    system: Name | None
    chat: bool | None
    prompt_template: Name | None
    temperature: NotNegative
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: CountOrNever
    max_new_tokens: Count
    seed: Seed
    device: Literal["auto", "cuda", "cpu"]
    model: ModelConfig

    def as_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = self.model_dump(mode="json")
        return plain


def run_settings_file(path: str) -> Path | None:
    """The settings that dpo-train has left in a run's folder, where `path` is one."""
    folder = Path(resolve_path(path)).expanduser()
    is_run = (folder / RUN_REQUEST).is_file() and (folder / "config.yaml").is_file()
    return folder / "config.yaml" if is_run else None


def names_a_file(value: str) -> bool:
    """Whether `chosen` means a file rather than a column."""
    return Path(resolve_path(value)).expanduser().exists() or value.endswith(FILE_ENDINGS) or "/" in value
