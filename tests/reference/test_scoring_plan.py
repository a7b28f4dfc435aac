"""A killed scoring pass that goes on composes the batches of an uninterrupted one."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.reference.keys import key_array
from dpo_cli.reference.plan import scoring_batches, scoring_units


def _key(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


sizes_and_budget = st.tuples(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 90))


@given(sizes_and_budget)
def test_every_unit_is_in_exactly_one_batch_and_no_batch_of_several_is_over_budget(case: tuple[list[int], int]) -> None:
    sizes, budget = case
    batches = scoring_batches(sizes, [_key(n) for n in range(len(sizes))], tokens_per_batch=budget)
    assert sorted(unit for batch in batches for unit in batch) == list(range(len(sizes)))
    assert all(len(batch) == 1 or sum(sizes[unit] for unit in batch) <= budget for batch in batches)


@settings(max_examples=400)
@given(sizes_and_budget, st.data())
def test_taking_whole_batches_away_leaves_the_others_as_they_were(
    case: tuple[list[int], int], data: st.DataObject
) -> None:
    sizes, budget = case
    keys = [_key(n) for n in range(len(sizes))]
    whole = scoring_batches(sizes, keys, tokens_per_batch=budget)
    done = data.draw(st.sets(st.integers(0, max(0, len(whole) - 1))))
    left = [unit for number, batch in enumerate(whole) if number not in done for unit in batch]
    # The order in which what is left is found again must not matter either.
    left = data.draw(st.permutations(left))
    again = scoring_batches([sizes[u] for u in left], [keys[u] for u in left], tokens_per_batch=budget)
    assert [[left[u] for u in batch] for batch in again] == [
        batch for number, batch in enumerate(whole) if number not in done
    ]


@st.composite
def missing_responses(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """Prompts with several responses each, in shuffled order."""
    rows = []
    for prompt in range(draw(st.integers(0, 8))):
        prompt_size = draw(st.integers(1, 20))
        rows += [(prompt, prompt_size, size) for size in draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))]
    rows = draw(st.permutations([(*row, number) for number, row in enumerate(rows)]))
    return (
        key_array([_key(1000 + prompt) for prompt, *_ in rows]),
        np.array([prompt_size for _, prompt_size, _, _ in rows], dtype=np.int32),
        key_array([_key(number) for *_, number in rows]),
        np.array([size for *_, size, _ in rows], dtype=np.int32),
    )


@settings(max_examples=300)
@given(missing_responses(), st.integers(1, 120), st.data())
def test_a_killed_pass_plans_the_rest_as_the_first_plan_did(
    rows: tuple[np.ndarray, ...], budget: int, data: st.DataObject
) -> None:
    def plan(which: np.ndarray) -> list[list[tuple[bytes, ...]]]:
        prompts, prompt_sizes, keys, sizes = (array[which] for array in rows)
        units = scoring_units(prompts, prompt_sizes, keys, sizes, tokens_per_batch=budget)
        batches = scoring_batches([u.size for u in units], [u.key for u in units], tokens_per_batch=budget)
        return [[tuple(keys[m] for m in units[u].members) for u in batch] for batch in batches]

    whole = plan(np.arange(len(rows[0])))
    assert sorted(key for batch in whole for unit in batch for key in unit) == sorted(rows[2])
    done = data.draw(st.sets(st.integers(0, max(0, len(whole) - 1))))
    kept = {key for number in done if number < len(whole) for unit in whole[number] for key in unit}
    left = np.array([n for n, key in enumerate(rows[2]) if key not in kept], dtype=np.int64)
    left = np.array(data.draw(st.permutations(left.tolist())), dtype=np.int64)
    assert plan(left) == [batch for number, batch in enumerate(whole) if number not in done]


def test_a_prompt_is_laid_out_once_however_many_responses_it_has() -> None:
    prompts = key_array([_key(1)] * 3 + [_key(2)])
    units = scoring_units(
        prompts,
        np.array([10, 10, 10, 4], np.int32),
        key_array([_key(n) for n in range(10, 14)]),
        np.array([5, 6, 7, 8], np.int32),
        tokens_per_batch=100,
    )
    assert sorted(unit.size for unit in units) == [12, 28]


def test_200_000_responses_are_planned_in_seconds() -> None:
    import time

    random = np.random.default_rng(0)
    count = 200_000
    prompts = np.repeat(np.frombuffer(random.bytes(16 * count // 2), dtype="S16"), 2)
    keys = np.frombuffer(random.bytes(16 * count), dtype="S16")
    sizes = random.integers(1, 900, count, dtype=np.int32)
    began = time.perf_counter()
    units = scoring_units(prompts, np.full(count, 100, np.int32), keys, sizes, tokens_per_batch=16384)
    scoring_batches([u.size for u in units], [u.key for u in units], tokens_per_batch=16384)
    assert time.perf_counter() - began < 15
