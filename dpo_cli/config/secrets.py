"""Keep access tokens out of messages and run folders."""

from __future__ import annotations

import re
from typing import Any

_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")
# name:password@ in a URL.
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SECRET_KEY = re.compile(r"(?:^|[._])(?:api_?key|password|secret|hf_token|access_token|auth_token)$", re.IGNORECASE)
_MASK = "****"


def mask(text: str) -> str:
    """The text with everything that looks like an access token blotted out; key=value words by their key as well."""
    text = _URL_PASSWORD.sub(_MASK, _TOKEN.sub(_MASK, text))
    key, equals, value = text.partition("=")
    return f"{key}={_MASK}" if equals and value and _SECRET_KEY.search(key.strip()) else text


def looks_secret(key: str, value: Any) -> bool:
    """Whether a setting seems to hold an access token or a password."""
    if not isinstance(value, str) or not value:
        return False
    return bool(_TOKEN.search(value) or _URL_PASSWORD.search(value) or _SECRET_KEY.search(key))
