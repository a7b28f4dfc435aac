"""Is a response right? Verifiers compare it with the truth of its question: a number, a text, or by a user's function.

gsm8k            the number after the last "####" equals that of the truth; "#### $1,200.50 a day" is 1200.5. A response
                 without "####" and a number has no answer, and is wrong. What GSM8K evaluations call strict.
gsm8k_flexible   the same, and where there is no "####" with a number, the last number of the text is the answer. More
                 forgiving of models that were not trained on this form; say which one you report.
exact            the whole response equals the truth, both in Unicode's form NFKC, with runs of blanks as one, ends
                 stripped, and case folded.
package.module.function
                 a Python function of yours, called as function(response, truth) with two texts; true is right.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from dpo_cli.errors import ConfigError, DataError

# The names that need no function of the user's.
KINDS = ("gsm8k", "gsm8k_flexible", "exact")
# GSM8K's convention: the final answer follows four hashes; thousands may carry commas.
_MARK = "####"
_ANSWER = re.compile(r"\s*\$?\s*(-?)\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")
_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Verifier:
    """answer: what a response comes down to, None where it gives no answer; responses of one answer vote together.

    expected: the truth in the same form, None where it cannot be one. function: the user's own, which decides alone.
    """

    name: str
    answer: Callable[[str], str | None]
    expected: Callable[[str], str | None]
    function: Callable[[str, str], object] | None = None

    def check_truth(self, truth: str | None, *, where: str) -> None:
        """Raise DataError for a truth that no response could equal."""
        if truth is None:
            raise DataError(
                f"The verifier {self.name} needs a truth to compare with, and the row has none.",
                where=where,
                hint="columns.truth=NAME names its column",
            )
        if self.expected(truth) is None:
            raise DataError(
                f"The truth holds no answer that the verifier {self.name} could compare with: {truth[:80]!r}.",
                where=where,
                hint="give a number, or a worked solution that ends in '#### <number>'",
            )

    def is_right(self, response: str, truth: str, *, where: str) -> bool:
        """Raises DataError naming the row (`where`) when the user's function fails."""
        if self.function is None:
            answer = self.answer(response)
            return answer is not None and answer == self.expected(truth)
        try:
            return bool(self.function(response, truth))
        except Exception as error:
            raise DataError(
                f"The verifier {self.name} fails with {type(error).__name__}: {error}",
                where=f"{where}, response {response[:80]!r}",
                hint="it is called as function(response, truth) with two texts, and should return true or false",
            ) from error


def verifier_of(name: str) -> Verifier:
    """One of KINDS, or a Python function by its dotted name. Raises ConfigError when there is none such."""
    if name == "gsm8k":
        return Verifier(name, _strict_number, _true_number)
    if name == "gsm8k_flexible":
        return Verifier(name, _flexible_number, _true_number)
    if name == "exact":
        return Verifier(name, normalised_text, normalised_text)
    # Which answers of a function of the user's are the same one, only equal texts tell.
    return Verifier(name, normalised_text, normalised_text, _import(name))


def normalised_text(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def extract_answer(text: str) -> Decimal | None:
    """The number that follows the last '####' in `text`, or None. "#### $1,200.50" is 1200.5."""
    _, mark, after = text.rpartition(_MARK)
    found = _ANSWER.match(after) if mark else None
    return _number(found) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number in `text`, which may have a dollar sign and commas: "10% off $1,200." gives 1200."""
    found = _NUMBER.findall(text)
    return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None


def _number(found: re.Match[str]) -> Decimal:
    return Decimal(found[1] + found[2].replace(",", ""))


def _strict_number(text: str) -> str | None:
    return _canonical(extract_answer(text))


def _flexible_number(text: str) -> str | None:
    found = extract_answer(text)
    return _canonical(last_number(text) if found is None else found)


def _true_number(truth: str) -> str | None:
    """A worked solution's number after "####", or a bare number; of "12 or 13" neither is taken."""
    if _MARK in truth:
        return _strict_number(truth)
    found = _ANSWER.fullmatch(truth.strip())
    return _canonical(_number(found)) if found else None


def _canonical(number: Decimal | None) -> str | None:
    """Equal numbers as equal texts: 18.00 is 18."""
    if number is None:
        return None
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    text = text.lstrip("-").lstrip("0") or "0"
    text = f"0{text}" if text.startswith(".") else text
    return f"-{text}" if number < 0 else text


def _import(name: str) -> Callable[[str, str], object]:
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(
            f"The verifier cannot be imported: {type(error).__name__}: {error}.",
            where=f"verifier={name}",
            hint="package.module.function, importable from the folder where the command is started",
        ) from error
    if not callable(found):
        raise ConfigError(f"{name} is not a function.", where=f"verifier={name}")
    verifier: Callable[[str, str], object] = found
    return verifier
