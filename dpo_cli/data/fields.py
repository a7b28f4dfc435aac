"""Reading one column of a raw row: the value in the type it should have, or a BadRow that says what was there."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from dpo_cli.data.rows import BadRow, Message, Messages

RawColumns = Mapping[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool", "function": "tool"}
_KNOWN_ROLES = frozenset({"user", "assistant", "system", "tool", "developer"})


def decode_json_row(line: bytes) -> RawColumns:
    """One line of JSONL as columns. Bytes that are no UTF-8 stay as lone surrogates, so that their field is named."""
    try:
        value = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except json.JSONDecodeError as error:
        raise BadRow("bad_json", f"not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise BadRow("bad_json", "not valid JSON: nested too deeply") from None
    return as_columns(value)


def as_columns(value: Any) -> RawColumns:
    if not isinstance(value, dict):
        raise BadRow("wrong_type", f"a row should be an object with named fields, but is {describe(value)}")
    return value


def has(row: RawColumns, field: str) -> bool:
    return row.get(field) is not None


def need(row: RawColumns, field: str) -> Any:
    value = row.get(field)
    if value is None:
        problem = f"'{field}' is missing" if field not in row else f"'{field}' is null"
        raise BadRow("missing_field", problem, field)
    return value


def text(row: RawColumns, field: str) -> str:
    return as_text(need(row, field), field)


def as_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"'{field}' should be text, but is {describe(value)}", field)
    check_utf8(value, field)
    return value


def filled_text(row: RawColumns, field: str) -> str:
    return check_filled(text(row, field), field)


def check_filled(value: str, field: str) -> str:
    if not value.strip():
        raise BadRow("empty", f"'{field}' is empty", field)
    return value


def check_utf8(value: str, field: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("invalid_utf8", f"'{field}' is not valid UTF-8 at character {error.start + 1}", field) from None


def items(row: RawColumns, field: str) -> list[Any]:
    value = need(row, field)
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"'{field}' should be a list, but is {describe(value)}", field)
    return value


def number(row: RawColumns, field: str) -> float:
    return as_number(need(row, field), field)


def as_number(value: Any, field: str) -> float:
    if isinstance(value, str):  # CSV has only text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow("wrong_type", f"'{field}' should be a number, but is {describe(value)}", field)
    if not math.isfinite(value):
        raise BadRow("wrong_type", f"'{field}' should be a finite number, but is {value}", field)
    return float(value)


_VERDICTS = {"true": True, "false": False, "1": True, "0": False}


def verdict(row: RawColumns, field: str) -> bool:
    value = need(row, field)
    if isinstance(value, bool):
        return value
    known = _VERDICTS.get(str(value).strip().lower()) if isinstance(value, (int, str)) else None
    if known is None:
        raise BadRow("wrong_type", f"'{field}' should be true or false, but is {describe(value)}", field)
    return known


def messages(row: RawColumns, field: str) -> Messages:
    """A non-empty list of messages, of {role, content} or ShareGPT's {from, value}."""
    found = [as_message(item, f"{field}[{index}]") for index, item in enumerate(items(row, field))]
    if not found:
        raise BadRow("empty", f"'{field}' is empty", field)
    return found


def as_message(value: Any, field: str) -> Message:
    """A message with role and content; keys that are null (Arrow fills every struct) are left out."""
    if not isinstance(value, dict):
        raise BadRow("wrong_type", f"'{field}' should be a message, but is {describe(value)}", field)
    message = {str(key): item for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
        if "value" in message:
            message["content"] = message.pop("value")
    role = as_text(need(message, "role") if "role" in message else _missing(field, "role"), f"{field}.role")
    role = _ROLES.get(role, role)
    if role not in _KNOWN_ROLES:
        raise BadRow("wrong_type", f"'{field}.role' is '{role}', not one of {', '.join(sorted(_KNOWN_ROLES))}", field)
    message["role"] = role
    if "content" in message:
        message["content"] = _content(message["content"], f"{field}.content")
    elif "tool_calls" not in message:
        _missing(field, "content")
    else:
        message["content"] = ""
    return message


def _missing(field: str, key: str) -> Any:
    raise BadRow("missing_field", f"'{field}.{key}' is missing", f"{field}.{key}")


def _content(value: Any, field: str) -> str:
    if not isinstance(value, list):
        return as_text(value, field)
    parts = [part.get("text") if isinstance(part, dict) else None for part in value]
    if any(part is None for part in parts):
        raise BadRow("wrong_type", f"'{field}' has parts that are not text; only text can be trained on", field)
    return "".join(as_text(part, field) for part in parts)


def tools(row: RawColumns) -> list[Any] | None:
    """The `tools` column: a list, or the same as JSON text; None where it is absent or empty."""
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise BadRow("bad_json", f"'tools' is not valid JSON: {error.msg}", "tools") from None
    if value is not None and not isinstance(value, list):
        raise BadRow("wrong_type", f"'tools' should be a list, but is {describe(value)}", "tools")
    return value or None


def describe(value: Any) -> str:
    """A value's kind in words, with the value where it is short: "a number (5)"."""
    if value is None:
        return "null"
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    name = names.get(type(value), type(value).__name__)
    shown = repr(value)
    return f"{name} ({shown})" if isinstance(value, (str, int, float)) and len(shown) <= 24 else name
