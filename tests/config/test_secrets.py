"""Access tokens are neither shown nor saved."""

from __future__ import annotations

import pytest

from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.secrets import looks_secret, mask, without_secrets
from dpo_cli.errors import ConfigError

TOKEN = "hf_" + "aB3" * 10


@pytest.mark.parametrize(
    "word",
    [
        f"x={TOKEN}",
        f"url=https://user:{TOKEN}@host/x",
        "storage=redis://:abcdef@host/0",
        "logger.wandb.api_key=abcdef",
        "hub_token=abcdef",
        "a=sk-" + "x" * 30,
    ],
)
def test_tokens_are_blotted_out(word: str) -> None:
    masked = mask(word)
    assert "****" in masked
    assert not any(secret in masked for secret in (TOKEN, "abcdef", "x" * 30))


@pytest.mark.parametrize(("key", "value"), [("data.train", "org/name"), ("model.revision", "0" * 40), ("seed", 3)])
def test_ordinary_settings_are_not_taken_for_secrets(key: str, value: object) -> None:
    assert not looks_secret(key, value)


def test_a_token_in_a_setting_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose(Request(("model=qwen2-0.5b", f"model.revision={TOKEN}"))))
    assert "access token" in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_token_inside_a_list_is_found() -> None:
    assert looks_secret("data.train", ["org/a", {"path": f"https://{TOKEN}@host/a.jsonl"}])


def test_what_leaves_the_machine_is_masked_at_any_depth() -> None:
    settings = {"a": {"api_key": "abc", "uri": "https://me:pw@host/x"}, "b": ["hf_" + "x" * 30, 1], "c": None}
    assert without_secrets(settings) == {
        "a": {"api_key": "****", "uri": "https://****@host/x"},
        "b": ["****", 1],
        "c": None,
    }
