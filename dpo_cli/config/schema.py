"""The checked configuration: names, types and ranges of every key. Defaults live in conf/ only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrNever = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LoraConfig(Section):
    rank: Count
    alpha: Positive
    target_modules: Annotated[str | list[str], BeforeValidator(lambda value: _text_or_list(value))]
    merge: bool


class ModelConfig(Section):
    path: Name
    revision: Name | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attention: Literal["auto", "flash", "varlen", "flex", "sdpa"]
    gradient_checkpointing: bool
    checkpoint_every: Count
    offload_checkpoints: bool
    pad_rows_to: Count
    trust_remote_code: bool
    adapter: Name | None
    reference: Name | None
    reference_sync_steps: Count | None
    lora: Annotated[LoraConfig | None, BeforeValidator(lambda value: _off_without(value, "rank"))]


class DataSource(Section):
    """One entry of data.train or data.eval. weight: how often an epoch shows each of its rows."""

    path: Name
    weight: Positive = 1.0
    split: Name | None = None
    name: Name | None = None


class TaskConfig(Section):
    """Problems that the policy solves by itself, beside held-out preferences."""

    problems: Name
    verifier: Name
    prompt_template: Name | None
    max_new_tokens: Count
    limit: Count | None
    during: CountOrNever


class EvalSection(Section):
    task: Annotated[TaskConfig | None, BeforeValidator(lambda value: _off_without(value, "problems"))]


class HealthConfig(Section):
    """What is told of a run's metrics. stop_on: names of dpo_cli.health.monitor.FINDINGS."""

    enabled: bool
    stop_on: Annotated[tuple[Name, ...], Field(strict=False)]


# A path, or a list of paths or of {path, weight, ...}.
Sources = Annotated[tuple[DataSource, ...], BeforeValidator(lambda value: _as_sources(value))]


class DataConfig(Section):
    train: Sources
    eval: Sources | None
    eval_fraction: Share
    generator: Sources | None
    generator_fraction: Share
    split: Name
    eval_split: Name | None
    subset: Name | None
    max_tokens: Annotated[int, Field(ge=2)]
    on_long: Literal["drop", "truncate", "error"]
    on_bad_row: Literal["error", "drop"]
    chat: bool | None
    columns: dict[str, str] | None
    prompt_template: Name | None
    token_weights: Positive | None
    ranked_pairs: Literal["best_worst", "all"]
    workers: Count | None


class SamplingConfig(Section):
    """How responses are drawn from a model. temperature 0 takes the most probable token, always."""

    samples_per_prompt: Count
    temperature: NotNegative
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: CountOrNever
    max_new_tokens: Count


class RolloutConfig(SamplingConfig):
    """How a policy in training is its own generator."""

    temperature: Positive
    prompts_per_step: Count
    refresh_every: Count
    keep_cut: bool
    batch_tokens: Count
    shown_per_step: CountOrNever


class LossConfig(BaseModel):
    """A loss by the dotted name of its function; every other key is a parameter of that function."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    target: Name = Field(alias="_target_")
    partial: Literal[True] = Field(alias="_partial_")

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def name(self) -> str:
        return self.target.rpartition(".")[2].removesuffix("_loss")


class OptimizerBase(Section):
    lr: Positive
    weight_decay: NotNegative
    max_grad_norm: Positive | None
    warmup_steps: CountOrNever
    schedule: Literal["linear", "cosine", "constant"]
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)]


class AdamWConfig(OptimizerBase):
    name: Literal["adamw"]
    betas: Annotated[tuple[Share, Share], Field(strict=False)]
    eps: Positive
    state_bits: Literal[8, 32]


class RMSpropConfig(OptimizerBase):
    name: Literal["rmsprop"]
    alpha: Share
    eps: Positive
    momentum: Share


OPTIMIZERS: Mapping[str, type[OptimizerBase]] = {"adamw": AdamWConfig, "rmsprop": RMSpropConfig}


def optimizer_name(value: Any) -> str:
    """The branch an optimiser section is checked against; an unknown name is checked, and refused, as AdamW's."""
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return name if isinstance(name, str) and name in OPTIMIZERS else "adamw"


OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")] | Annotated[RMSpropConfig, Tag("rmsprop")], Discriminator(optimizer_name)
]


class HardwareConfig(Section):
    """zero_stage: what DeepSpeed partitions over ranks; None computes in this process, without DeepSpeed."""

    name: Name
    device: Literal["auto", "cuda", "cpu"]
    device_memory_gb: Positive | None
    device_tflops: Positive | None
    num_workers: Count | None
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None
    offload_optimizer: Literal["none", "cpu", "nvme"]
    offload_parameters: Literal["none", "cpu", "nvme"]
    nvme_path: Name | None
    deepspeed: Mapping[str, Any]

    @property
    def is_distributed(self) -> bool:
        return self.zero_stage is not None


class TensorBoardConfig(Section):
    folder: Name


class CsvConfig(Section):
    file: Name


class WandbConfig(Section):
    project: Name
    entity: Name | None
    name: Name | None
    tags: list[Name]
    mode: Literal["online", "offline", "disabled"]
    alerts: bool


class MlflowConfig(Section):
    """tracking_uri: None stands for MLFLOW_TRACKING_URI, and without that for a database in the run folder."""

    tracking_uri: Name | None
    experiment: Name
    name: Name | None
    tags: list[Name]


class TrackioConfig(Section):
    project: Name
    name: Name | None
    tags: list[Name]


class LoggerConfig(Section):
    """The loggers chosen by `logger=[...]`; one that was not chosen is None."""

    tensorboard: TensorBoardConfig | None = None
    csv: CsvConfig | None = None
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
    trackio: TrackioConfig | None = None


class SweepConfig(Section):
    """How `-m` sweeps; no run knows of it. options: further ones of sbatch."""

    sampler: Literal["grid", "random", "tpe"]
    trials: Count | None
    metric: Name
    direction: Literal["maximize", "minimize"]
    storage: Name | None
    report: bool
    cluster: Literal["slurm", "local"] | None
    parallel: Count | None
    partition: Name | None
    gpus: Count | None
    minutes: Count
    options: Mapping[str, Any]


class Config(Section):
    run_dir: Name
    store_dir: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    deterministic: bool
    epochs: Positive | None
    max_steps: Count | None
    global_pairs: Count
    tokens_per_microbatch: Annotated[int, Field(ge=2)]
    log_every: Count
    log_level: Literal["debug", "info", "warning", "error"]
    eval_every: CountOrNever
    save_every: CountOrNever
    keep_checkpoints: Count
    resume: Name | None
    plan: bool
    model: ModelConfig
    data: DataConfig
    eval: EvalSection
    health: HealthConfig
    loss: LossConfig
    rollout: RolloutConfig
    optimizer: OptimizerConfig
    hardware: HardwareConfig
    logger: LoggerConfig
    sweep: SweepConfig | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the names that YAML has, as they are saved with a run, which knows of no sweep."""
        plain: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude={"sweep"})
        plain["logger"] = {name: value for name, value in plain["logger"].items() if value is not None}
        return plain


def _as_sources(value: Any) -> Any:
    entries = value if isinstance(value, list | tuple) else [value]
    if not entries:
        raise ValueError("names no data")
    for entry in entries:
        if not isinstance(entry, str | Mapping):
            raise ValueError(f"must be a path, or a list of paths or of {{path, weight}}, not {entry!r}")
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


def _text_or_list(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) and item for item in value):
        return value
    raise ValueError(f"must be all-linear or a list of module names, not {value!r}")


def _off_without(value: Any, switch: str) -> Any:
    """A section counts as absent while the key that switches it on is null."""
    return None if isinstance(value, Mapping) and value.get(switch, ...) is None else value
