"""Reference log-probs that came with the data, so that nothing needs scoring: ours, or RLAIF-V's.

RLAIF-V's sums and averages must agree with each other and with our tokens: a row scored with another tokenizer or
template would otherwise train against a wrong reference, silently.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from dpo_cli.data.example import FloatArray
from dpo_cli.data.fields import RawColumns, as_number, describe, has, number
from dpo_cli.data.rows import BadRow, ReferenceLogps

OUR_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_SIDES = ("win", "rej")
RLAIFV_COLUMNS = tuple(f"ref_{side}_{what}" for side in _SIDES for what in ("logp", "avg_logp", "per_token_logp"))
PACKED_COLUMN = "logps"
REFERENCE_COLUMNS = (*OUR_COLUMNS, *RLAIFV_COLUMNS, PACKED_COLUMN)


def reference_logps(row: RawColumns) -> tuple[ReferenceLogps, ReferenceLogps] | None:
    """(chosen, rejected) of a preference row, or None when it brings none. Raises BadRow for half of them."""
    if any(has(row, name) for name in OUR_COLUMNS):
        return _ours(row, OUR_COLUMNS[0]), _ours(row, OUR_COLUMNS[1])
    if has(row, PACKED_COLUMN):
        row = _unpack(row[PACKED_COLUMN])
    if any(has(row, name) for name in RLAIFV_COLUMNS):
        return _rlaifv(row, "win"), _rlaifv(row, "rej")
    return None


def _ours(row: RawColumns, field: str) -> ReferenceLogps:
    value = row.get(field)
    if isinstance(value, list):
        per_token = _each(value, field)
        return ReferenceLogps(total=math.fsum(per_token), per_token=per_token)
    return ReferenceLogps(total=_logp(number(row, field), field))


def _unpack(value: Any) -> RawColumns:
    """The six-item list (sum, average, per token of the better; the same of the worse), or JSON text of it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow("bad_json", f"'{PACKED_COLUMN}' is not valid JSON: {error.msg}", PACKED_COLUMN) from None
    if isinstance(value, dict) and PACKED_COLUMN in value:
        value = value[PACKED_COLUMN]
    if not isinstance(value, list) or len(value) != len(RLAIFV_COLUMNS):
        found = f"{len(value)} items" if isinstance(value, list) else describe(value)
        raise BadRow("reference", f"'{PACKED_COLUMN}' should be a list of six items, but is {found}", PACKED_COLUMN)
    return dict(zip(RLAIFV_COLUMNS, value, strict=True))


def _rlaifv(row: RawColumns, side: str) -> ReferenceLogps:
    total_field, average_field, each_field = (f"ref_{side}_{what}" for what in ("logp", "avg_logp", "per_token_logp"))
    per_token = None
    if has(row, each_field):
        if not isinstance(row[each_field], list):
            raise BadRow(
                "wrong_type", f"'{each_field}' should be a list, but is {describe(row[each_field])}", each_field
            )
        # Kept as they are: the list covers the prompt too, whose positions hold whatever was computed there.
        per_token = tuple(as_number(value, each_field) for value in row[each_field])
    return ReferenceLogps(
        total=_logp(number(row, total_field), total_field),
        average=number(row, average_field) if has(row, average_field) else None,
        per_token=per_token,
    )


def _each(values: list[Any], field: str) -> tuple[float, ...]:
    return tuple(_logp(as_number(value, f"{field}[{at}]"), f"{field}[{at}]") for at, value in enumerate(values))


def _logp(value: float, field: str) -> float:
    if value > 1e-3:
        raise BadRow("reference", f"'{field}' is {value:g}; a log-prob is never above 0", field)
    return value


def fit_reference(
    logps: ReferenceLogps, *, prompt_tokens: int, response_tokens: int, weighted: bool, field: str
) -> FloatArray:
    """The array that an example carries: (tokens,) where per-token values are there, else the sum (1,).

    weighted: token weights are in use, which a bare sum cannot serve.
    Raises BadRow when the values do not belong to these tokens.
    """
    theirs = logps.total / logps.average if logps.average else response_tokens
    if abs(theirs - response_tokens) > 0.5:
        raise BadRow(
            "reference",
            f"the reference log-probs of '{field}' are over {theirs:.1f} tokens; here it has {response_tokens}",
            field,
        )
    if logps.per_token is None:
        if weighted:
            raise BadRow(
                "reference",
                f"data.token_weights needs per-token reference log-probs, and '{field}' brings only their sum",
                field,
            )
        return np.array([logps.total], dtype=np.float32)
    per_token = logps.per_token
    if len(per_token) == prompt_tokens + response_tokens - 1:
        # RLAIF-V keeps every position of the sequence but the first, the prompt's included.
        per_token = per_token[prompt_tokens - 1 :]
    if len(per_token) != response_tokens:
        raise BadRow(
            "reference",
            f"'{field}' brings reference log-probs of {len(per_token)} tokens; here it has {response_tokens}",
            field,
        )
    if not _close(math.fsum(per_token), logps.total):
        raise BadRow(
            "reference",
            f"the per-token reference log-probs of '{field}' sum to {math.fsum(per_token):.4f}, not {logps.total:.4f}",
            field,
        )
    return np.array(per_token, dtype=np.float32)


def _close(value: float, expected: float) -> bool:
    """Equal within what half-precision scoring and printing leave."""
    return math.isclose(value, expected, rel_tol=2e-3, abs_tol=1e-2)
