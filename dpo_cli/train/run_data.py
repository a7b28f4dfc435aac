"""The data of a run, tokenised for its model; prepared once, and read from the cache ever after."""

from __future__ import annotations

from pathlib import Path

from dpo_cli.config.schema import Config
from dpo_cli.data.prepare import PreparedData, prepare_data
from dpo_cli.policy.folder import resolve_model_folder
from dpo_cli.policy.tokenizer import load_tokenizer, read_stop_token_ids
from dpo_cli.train.objective import Objective
from dpo_cli.train.parts import build_loss


def prepared_data(config: Config, objective: Objective) -> PreparedData:
    """Raises DataError, ModelError and ConfigError for whatever the user can mend."""
    model = config.model
    folder = resolve_model_folder(model.path, model.revision, trust_remote_code=model.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
    return prepare_data(
        config.data,
        tokenizer,
        kind=objective.declaration.kind,
        stop_token_ids=read_stop_token_ids(folder, tokenizer),
        seed=config.seed,
        store_dir=Path(config.store_dir).expanduser(),
    )


def fill_cache(config: Config) -> None:
    """Prepare the data for processes that will read them together."""
    prepared_data(config, Objective.of(build_loss(config)))
