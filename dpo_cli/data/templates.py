"""A prompt made of a row's columns: "Question: {question}\\n\\nAnswer: "."""

from __future__ import annotations

import string

from dpo_cli.data.fields import RawColumns, check_filled, check_utf8, describe, need
from dpo_cli.data.rows import BadRow
from dpo_cli.errors import DataError


def template_fields(template: str) -> tuple[str, ...]:
    """The columns that a template names. Raises DataError for one that is not plain text with {column} fields."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"data.prompt_template cannot be read: {error}.",
            where=repr(template),
            hint="write {{ and }} for braces that are meant as they stand",
        ) from None
    names = []
    for _, name, specification, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or specification or conversion:
            raise DataError(
                f"data.prompt_template has the field {{{name}}}, which is not a plain column name.",
                where=repr(template),
                hint="use {column}; rename a column whose name is not one word with data.columns",
            )
        names.append(name)
    if not names:
        raise DataError(
            "data.prompt_template names no column, so that every prompt would be the same.",
            where=repr(template),
            hint='for example "Question: {question}\\n\\nAnswer: "; on a command line quote it twice',
        )
    return tuple(names)


def fill_template(template: str, row: RawColumns) -> str:
    values = {}
    for name in template_fields(template):
        value = need(row, name)
        if not isinstance(value, (str, int, float)):
            raise BadRow("wrong_type", f"'{name}' should be text, but is {describe(value)}", name)
        values[name] = str(value)
        check_utf8(values[name], name)
        check_filled(values[name], name)
    return template.format(**values)
