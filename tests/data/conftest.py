from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import bpe, stops

from dpo_cli.data.prepare import PreparedData, prepare_data
from dpo_cli.data.settings import DataSettings

Rows = Iterable[dict[str, Any]]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: Rows, name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., PreparedData]:
    """prepare_data with a small tokenizer and a store of its own; keywords are settings."""

    def run(train: Any, *, kind: str = "pair", tokenizer: Any = None, seed: int = 0, **settings: Any) -> PreparedData:
        tokenizer = tokenizer or bpe()
        return prepare_data(
            DataSettings(train, **settings),
            tokenizer,
            kind=kind,  # type: ignore[arg-type]
            stop_token_ids=stops(tokenizer),
            seed=seed,
            store_dir=tmp_path / "store",
        )

    return run


@pytest.fixture
def texts() -> Callable[..., list[tuple[str, ...]]]:
    """Every example as (prompt, response, response, ...), decoded from its ids."""

    def decode(examples: Any, tokenizer: Any = None) -> list[tuple[str, ...]]:
        tokenizer = tokenizer or bpe()
        found = []
        for at in range(len(examples)):
            example = examples[at]
            found.append(tuple(tokenizer.decode(ids.tolist()) for ids in (example.prompt, *example.responses)))
        return found

    return decode
