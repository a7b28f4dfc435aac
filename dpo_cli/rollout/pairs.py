"""Preference pairs of a policy's own responses: right against wrong, or the best against the worst by implicit reward.

A response that was cut before it stopped is in no pair: as training data it would be given an end that the policy did
not write. Nor is an empty one, which nothing can be learnt from. Which pairs are made follows from the samples and
their order alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dpo_cli.data.example import IntArray
from dpo_cli.data.rows import Prompt
from dpo_cli.rollout.answers import Answered, Response
from dpo_cli.rollout.questions import Encoder

# Why a prompt gave no pair, in words.
WITHOUT = {
    "right": "without a right sample",
    "wrong": "without a wrong sample",
    "chosen": "without a chosen response of the file",
    "alike": "whose samples are all alike",
    "usable": "without a sample that stopped and says something",
}


@dataclass(frozen=True)
class Pair:
    """ids: None for a response that was not sampled."""

    prompt: Prompt
    prompt_ids: IntArray
    chosen: str
    rejected: str
    chosen_ids: IntArray | None
    rejected_ids: IntArray | None


@dataclass
class Pairs:
    """pairs, and how many prompts gave none, by reason."""

    pairs: list[Pair] = field(default_factory=list)
    prompts: int = 0
    without: Counter[str] = field(default_factory=Counter)

    def add(self, found: Sequence[Pair], why_not: str) -> None:
        self.pairs += found
        if found:
            self.prompts += 1
        else:
            self.without[why_not] += 1

    def lines(self) -> Iterator[str]:
        yield f"pairs: {len(self.pairs):,}, of {self.prompts:,} prompts"
        for reason, count in self.without.most_common():
            yield f"       {count:,} prompts {WITHOUT[reason]}"


def verified_pairs(
    answered: Sequence[Answered], *, limit: int, chosen: Mapping[int, str | None] | None = None
) -> Pairs:
    """Right samples against wrong ones, at most `limit` pairs of a prompt, no two alike.

    chosen: by the number of the question, a response to take instead of right samples.
    """
    found = Pairs()
    for each in answered:
        usable = _usable(each.responses)
        wrong = [response for response in usable if not response.right]
        given = None if chosen is None else chosen.get(each.question.number)
        better: list[tuple[str, IntArray | None]]
        if chosen is None:
            better = [(response.text, response.ids) for response in usable if response.right]
        else:
            better = [] if given is None else [(given, None)]
            wrong = [response for response in wrong if response.text.strip() != (given or "").strip()]
        why_not = "usable" if not usable else "wrong" if not wrong else "right" if chosen is None else "chosen"
        pairs = [_pair(each, *better[i], wrong[j]) for i, j in _combinations(len(better), len(wrong), limit)]
        found.add(pairs, why_not)
    return found


def best_worst_pairs(answered: Sequence[Answered], rewards: Mapping[int, Sequence[float]], *, limit: int) -> Pairs:
    """The best against the worst, the second best against the second worst, and so on, as long as their rewards differ.

    rewards: by the number of the question, of those of its responses that `rewarded` gives; a question may be absent.
    """
    found = Pairs()
    for each in answered:
        usable = rewarded(each)
        values = rewards.get(each.question.number, ())
        order = sorted(range(len(values)), key=lambda place: (-values[place], place))
        pairs = []
        for place in range(min(limit, len(order) // 2)):
            best, worst = order[place], order[-1 - place]
            if values[best] > values[worst]:
                pairs.append(_pair(each, usable[best].text, usable[best].ids, usable[worst]))
        found.add(pairs, "alike" if usable else "usable")
    return found


def rewarded(answered: Answered) -> list[Response]:
    """The responses that can be in a pair, no text twice."""
    return _usable(answered.responses)


def retokenised(pairs: Sequence[Pair], encoder: Encoder) -> tuple[int, int]:
    """(how many sampled responses in pairs would be trained on as other ids than were sampled, how many there are)."""
    differing = total = 0
    for pair in pairs:
        for text, ids in ((pair.chosen, pair.chosen_ids), (pair.rejected, pair.rejected_ids)):
            if ids is not None:
                total += 1
                differing += not encoder.trains_as_sampled(pair.prompt, pair.prompt_ids, text, ids)
    return differing, total


def as_row(pair: Pair, *, chat: bool) -> dict[str, object]:
    """What dpo-train reads. chat: messages, which it renders by the chat template; else text as it stands."""
    if not chat:
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    prompt = [{"role": "user", "content": pair.prompt}] if isinstance(pair.prompt, str) else pair.prompt
    return {"prompt": prompt, "chosen": _reply(pair.chosen), "rejected": _reply(pair.rejected)}


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _usable(responses: Sequence[Response]) -> list[Response]:
    first: dict[str, Response] = {}
    for response in responses:
        if response.stopped and response.text.strip():
            first.setdefault(response.text, response)
    return list(first.values())


def _pair(answered: Answered, chosen: str, chosen_ids: IntArray | None, rejected: Response) -> Pair:
    return Pair(
        answered.question.prompt, answered.prompt_ids, chosen, rejected.text, chosen_ids, rejected.ids
    )  # fmt: skip


def _combinations(rows: int, columns: int, limit: int) -> Iterator[tuple[int, int]]:
    """The first `limit` places of a rows x columns table, along diagonals: each response once before any is twice."""
    if not rows or not columns:
        return
    longer = max(rows, columns)
    for number in range(min(limit, rows * columns)):
        turn, place = divmod(number, longer)
        i, j = place % rows, place % columns
        # A further turn shifts the shorter side, so that none of its combinations repeats.
        yield (i, (j + turn) % columns) if columns <= rows else ((i + turn) % rows, j)
