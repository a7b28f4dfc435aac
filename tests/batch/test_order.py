"""Order and micro-batch plan are pure functions that lose nobody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.batch.order import examples_shown, global_batch, steps_per_epoch
from dpo_cli.batch.plan import microbatches, shares


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_visits_every_example_once(examples: int, global_pairs: int, epoch: int, seed: int) -> None:
    steps = steps_per_epoch(examples, global_pairs)
    seen = [
        int(index)
        for step in range(epoch * steps, (epoch + 1) * steps)
        for index in global_batch(step, seed=seed, examples=examples, global_pairs=global_pairs)
    ]
    assert sorted(seen) == list(range(examples))


def test_epochs_and_seeds_differ_and_repeat_themselves() -> None:
    def order(seed: int, step: int) -> list[int]:
        return global_batch(step, seed=seed, examples=100, global_pairs=100).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_the_order_is_pinned_so_that_old_runs_can_be_resumed() -> None:
    assert global_batch(0, seed=7, examples=10, global_pairs=5).tolist() == [6, 3, 9, 1, 2]


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 12))
def test_the_examples_shown_are_those_of_the_steps(examples: int, global_pairs: int, steps: int) -> None:
    sizes = {"seed": 3, "examples": examples, "global_pairs": global_pairs}
    seen = {int(index) for step in range(steps) for index in global_batch(step, **sizes)}
    assert examples_shown(steps, **sizes).tolist() == sorted(seen)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(50, 1000))
def test_every_example_lands_in_one_microbatch_within_budget(sizes: list[int], budget: int) -> None:
    plan = microbatches(sizes, tokens_per_microbatch=budget)
    assert sorted(index for group in plan for index in group) == list(range(len(sizes)))
    for group in plan:
        assert sum(sizes[index] for index in group) <= budget or len(group) == 1


@given(st.lists(st.integers(1, 20), min_size=20, max_size=60))
def test_microbatches_are_balanced(sizes: list[int]) -> None:
    plan = microbatches(sizes, tokens_per_microbatch=60)
    loads = [sum(sizes[index] for index in group) for group in plan]
    assert max(loads) - min(loads) <= max(sizes)


@given(st.lists(st.integers(1, 300), max_size=30), st.integers(50, 1000), st.integers(1, 5))
def test_ranks_share_a_batch_in_equally_many_passes(sizes: list[int], budget: int, ranks: int) -> None:
    of_ranks = [shares(sizes, tokens_per_microbatch=budget, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(mine) for mine in of_ranks}) == 1
    every = [share for mine in of_ranks for share in mine]
    assert sorted(place for share in every if not share.idle for place in share.places) == list(range(len(sizes)))
    assert all([sizes[place] for place in share.places] == [min(sizes)] for share in every if share.idle)
