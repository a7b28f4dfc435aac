"""Keep access tokens out of messages and run folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")
# name:password@ in a URL, or :password@.
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_SECRET_KEY = re.compile(r"(?:^|[._])(?:api_?key|password|secret|(?:hf|hub|access|auth)_token)$", re.IGNORECASE)
_MASK = "****"


def mask_tokens(text: str) -> str:
    """The text with everything that looks like an access token blotted out."""
    return _URL_PASSWORD.sub(_MASK, _TOKEN.sub(_MASK, text))


def mask(word: str) -> str:
    """A value or key=value word without its tokens, and without its value where the key is that of a secret."""
    key, equals, value = word.partition("=")
    return f"{key}={_MASK}" if equals and value and _SECRET_KEY.search(key.strip()) else mask_tokens(word)


def looks_secret(key: str, value: Any) -> bool:
    """Whether a setting seems to hold an access token or a password."""
    if not isinstance(value, str | list) or not value:
        return False
    return mask_tokens(str(value)) != str(value) or bool(_SECRET_KEY.search(key))


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they may leave this machine: `mask` applied to every value."""

    def masked(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: masked(str(name), inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [masked(key, inner) for inner in value]
        return mask(f"{key}={value}").partition("=")[2] if isinstance(value, str) else value

    return {name: masked(name, value) for name, value in settings.items()}
