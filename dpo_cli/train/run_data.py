"""The data of a run, tokenised for its model; prepared once, and read from the cache ever after."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config.schema import Config, DataConfig
from dpo_cli.data.example import Examples
from dpo_cli.data.generator import Selected, Truths, split_by_prompt
from dpo_cli.data.prepare import PreparedData, prepare_data
from dpo_cli.data.tail_weights import TailWeighted
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.losses.types import ExampleKind
from dpo_cli.policy.folder import resolve_model_folder
from dpo_cli.policy.tokenizer import load_tokenizer, read_stop_token_ids
from dpo_cli.train.objective import Objective
from dpo_cli.train.parts import build_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunData:
    """Examples to train on, to evaluate on, and for the policy to write to, each None where there are none.

    digest: of all tokens, in order; a resumed run compares it. lines: what the screen is told.
    report: the same and more, for the run folder. chat: whether prompts are messages of a chat template.
    """

    train: Examples
    eval: Examples | None
    generator: Truths | None
    digest: str
    lines: tuple[str, ...]
    report: dict[str, Any]
    chat: bool


def run_data(config: Config, objective: Objective) -> RunData:
    """Raises DataError, ModelError and ConfigError for whatever the user can mend."""
    prepared = _prepare(config, config.data, objective.declaration.kind)
    train: Examples = prepared.train
    generator, digest, lines = None, prepared.digest, prepared.report.lines()
    report = prepared.report.as_dict()
    if config.data.generator is not None:
        own = _prepare(config, generator_settings(config.data), "demonstration")
        generator, report["generator"] = Truths(own.train), own.report.as_dict()
        lines += own.report.split_lines("generator", own.report.train)
        digest = hashlib.sha256(f"{digest}:{own.digest}".encode()).hexdigest()
    elif config.data.generator_fraction:
        keys = prepared.train.column("prompt_key")
        discriminated, generated = split_by_prompt(keys, config.data.generator_fraction, seed=config.seed)
        if not len(generated):
            raise DataError(
                "The training data have one prompt, which cannot be shared out between discriminator and generator.",
                where="data.generator_fraction",
                hint="data.generator=FILE of prompts and ground truths",
            )
        train, generator = Selected(prepared.train, discriminated), Truths(Selected(prepared.train, generated))
        lines.append(f"generator: {len(generated):,} of the training rows; the other {len(train):,} discriminate")
        report["generator"] = {"examples": len(generated), "fraction": config.data.generator_fraction}
        digest = hashlib.sha256(f"{digest}:{config.data.generator_fraction}:{config.seed}".encode()).hexdigest()
    if objective.declaration.on_policy and generator is None:
        raise ConfigError(
            "This loss learns from samples, and no prompts are named for them.",
            where="data.generator",
            hint="data.generator_fraction=0.2, or data.generator=FILE of prompts and ground truths",
        )
    held_out: Examples | None = prepared.eval
    if objective.declaration.tail_weight != 1:
        train = TailWeighted(train, objective.declaration.tail_weight)
        held_out = None if held_out is None else TailWeighted(held_out, objective.declaration.tail_weight)
    sources = prepared.report.train.sources
    return RunData(
        train=train,
        eval=held_out,
        generator=generator if objective.declaration.on_policy else None,
        digest=digest,
        lines=tuple(lines),
        report=report,
        chat=any(source.chat_examples for source in sources),
    )


def fill_cache(config: Config) -> None:
    """Prepare the data for processes that will read them together."""
    run_data(config, Objective.of(build_loss(config)))


def generator_settings(data: DataConfig) -> DataConfig:
    """How data.generator is read."""
    changes = {"train": data.generator, "eval": None, "eval_fraction": 0.0, "eval_split": None, "token_weights": None}
    return data.model_copy(update=changes)


def _prepare(config: Config, data: DataConfig, kind: ExampleKind) -> PreparedData:
    model = config.model
    folder = resolve_model_folder(model.path, model.revision, trust_remote_code=model.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
    return prepare_for(config, data, kind, tokenizer, read_stop_token_ids(folder, tokenizer))


def prepare_for(
    config: Config,
    data: DataConfig,
    kind: ExampleKind,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: frozenset[int],
) -> PreparedData:
    """Rows as a run of this configuration takes them, by its model's tokenizer."""
    return prepare_data(
        data,
        tokenizer,
        kind=kind,
        stop_token_ids=stop_token_ids,
        seed=config.seed,
        store_dir=Path(config.store_dir).expanduser(),
    )
