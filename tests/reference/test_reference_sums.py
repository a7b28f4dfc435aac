"""The reference is scored once; kills, sweeps and added rows neither repeat work nor change a bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_cases import Rows, TinyReference, pairs

from dpo_cli.data.example import Example
from dpo_cli.errors import CheckpointError, Interrupted, StoreError
from dpo_cli.policy.packed_model import score_examples
from dpo_cli.reference.keys import example_keys, key_array
from dpo_cli.reference.score import Score, reference_sums
from dpo_cli.reference.spot_check import spot_check, tolerance_per_token
from dpo_cli.reference.store import ReferenceStore
from dpo_cli.reference.sums import ReferenceSums, data_digest

BUDGET = 90


def _never() -> Score:
    raise AssertionError("the model was asked for although nothing was missing")


def _sums(rows: Rows, folder: Path, reference: TinyReference | None, **options: object) -> ReferenceSums:
    make = _never if reference is None else (lambda: reference)
    return reference_sums(rows, make_score=make, store=ReferenceStore(folder), tokens_per_batch=BUDGET, **options)  # type: ignore[arg-type]


def _unique_responses(rows: Rows) -> int:
    return len({key for row in rows.rows for key in example_keys(row)})


class Killed(BaseException):
    """Stands for the process's end; nothing below may catch it and go on."""


class DyingReference(TinyReference):
    def __init__(self, *, after: int) -> None:
        super().__init__()
        self.after = after

    def __call__(self, examples):  # type: ignore[no-untyped-def]
        if len(self.calls) == self.after:
            raise Killed
        return super().__call__(examples)


def test_sums_are_those_of_each_response_alone(tmp_path: Path) -> None:
    rows = pairs(20)
    reference = TinyReference(dtype=torch.float64)
    sums = _sums(rows, tmp_path, reference)
    for index, row in enumerate(rows.rows):
        for number, response in enumerate(row.responses):
            alone = score_examples(reference.packed, [Example(row.prompt, (response,))])[0][0]
            assert sums.of(index)[number] == pytest.approx(alone.sum(), abs=1e-10)


def test_token_weights_are_applied_to_the_sums_and_never_enter_the_store(tmp_path: Path) -> None:
    rows = pairs(12)
    plain = _sums(rows, tmp_path, TinyReference(dtype=torch.float64))
    random = np.random.default_rng(0)
    weighted = Rows(
        [
            dataclasses.replace(row, weights=tuple(random.random(len(r)).astype(np.float32) for r in row.responses))
            for row in rows.rows
        ]
    )
    sums = _sums(weighted, tmp_path, None)
    store = ReferenceStore(tmp_path)
    for index, row in enumerate(weighted.rows):
        entries = store.read(key_array(example_keys(row)))
        assert row.weights is not None
        expected = [
            np.dot(logps, weights.astype(np.float64)) for logps, weights in zip(entries, row.weights, strict=True)
        ]
        np.testing.assert_allclose(sums.of(index), expected, rtol=1e-13)
    assert sums.data != plain.data


def test_a_response_is_scored_once_however_many_rows_share_it(tmp_path: Path) -> None:
    rows = pairs(30)
    reference = TinyReference()
    _sums(rows, tmp_path, reference)
    assert reference.responses_scored == _unique_responses(rows) < 60


def test_a_sweep_makes_one_scoring_pass_and_the_others_never_build_the_model(tmp_path: Path) -> None:
    rows = pairs(30)
    first = _sums(rows, tmp_path, TinyReference())
    lines: list[str] = []
    second = _sums(rows, tmp_path, None, report=lines.append)
    assert second.digest == first.digest
    assert lines == [f"reference: 60 responses, 60 kept from an earlier run, 0 to score (model {tmp_path.name[:6]})"]


def test_added_rows_score_only_the_new_ones(tmp_path: Path) -> None:
    rows, more = pairs(30), pairs(10, seed=1)
    before = _sums(rows, tmp_path, TinyReference())
    reference = TinyReference()
    lines: list[str] = []
    grown = Rows([*more.rows[:5], *rows.rows, *more.rows[5:]])
    after = _sums(grown, tmp_path, reference, report=lines.append)
    assert reference.responses_scored == _unique_responses(more)
    assert f"{_unique_responses(more)} to score" in lines[0]
    assert "not among the" in lines[0]
    assert all(np.array_equal(after.of(5 + index), before.of(index)) for index in range(30))


def test_no_scoring_batch_is_over_budget(tmp_path: Path) -> None:
    reference = TinyReference()
    _sums(pairs(60), tmp_path, reference)
    assert all(sum(e.packed_tokens for e in call) <= BUDGET for call in reference.calls)
    assert len(reference.calls) > 3


def test_the_numbers_depend_on_what_is_scored_together() -> None:
    """Without this the next test would prove nothing."""
    reference, rows = TinyReference(), pairs(20).rows
    together = reference(rows)
    alone = [reference([row])[0] for row in rows]
    assert any(
        not np.array_equal(a, b)
        for one, two in zip(together, alone, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def test_a_scoring_pass_killed_again_and_again_ends_with_the_very_same_bits(tmp_path: Path) -> None:
    rows = pairs(60)
    whole = _sums(rows, tmp_path / "whole", TinyReference())
    random = np.random.default_rng(0)
    kills = 0
    while True:
        reference = DyingReference(after=int(random.integers(0, 4)))
        try:
            # A new order of rows each time: the data may be shuffled, the plan must not notice.
            shuffled = Rows([rows.rows[i] for i in random.permutation(60)])
            _sums(shuffled, tmp_path / "killed", reference, flush_seconds=0)
            break
        except Killed:
            kills += 1
    assert kills > 3
    assert _sums(rows, tmp_path / "killed", None).digest == whole.digest


def test_a_requested_stop_keeps_what_was_scored(tmp_path: Path) -> None:
    rows = pairs(60)
    reference = TinyReference()
    with pytest.raises(Interrupted, match="2 of"):
        _sums(rows, tmp_path, reference, should_stop=lambda: len(reference.calls) == 2)
    rest = TinyReference()
    _sums(rows, tmp_path, rest)
    assert reference.responses_scored + rest.responses_scored == _unique_responses(rows)


def test_a_damaged_shard_is_named_and_its_responses_scored_again_to_the_same_bits(tmp_path: Path) -> None:
    rows = pairs(60)
    before = _sums(rows, tmp_path, TinyReference(), flush_seconds=0)
    shard = sorted(tmp_path.glob("*.arrow"))[2]
    shard.write_bytes(shard.read_bytes()[:-7])
    reference = TinyReference()
    lines: list[str] = []
    after = _sums(rows, tmp_path, reference, report=lines.append)
    assert after.digest == before.digest
    assert len(reference.calls) == 1
    assert shard.name in lines[0]


def test_only_the_examples_a_run_will_see_are_scored(tmp_path: Path) -> None:
    rows = pairs(40)
    reference = TinyReference()
    sums = _sums(rows, tmp_path, reference, indices=np.array([7, 3, 31, 7]))
    assert reference.responses_scored == _unique_responses(Rows([rows[3], rows[7], rows[31]]))
    assert sums.indices.tolist() == [3, 7, 31]
    assert len(sums.of(31)) == 2
    with pytest.raises(KeyError):
        sums.of(4)


def test_progress_counts_up_to_all_tokens(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    _sums(pairs(30), tmp_path, TinyReference(), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]


def test_no_examples_need_no_model(tmp_path: Path) -> None:
    assert len(_sums(Rows([]), tmp_path, None).values) == 0


def test_log_probs_that_are_not_finite_are_refused_by_row_and_not_kept(tmp_path: Path) -> None:
    reference = TinyReference()
    with torch.no_grad():
        next(reference.packed.parameters()).fill_(float("nan"))
    with pytest.raises(StoreError, match=r"not finite[\s\S]*pairs.jsonl row"):
        _sums(pairs(3), tmp_path, reference)
    assert len(ReferenceStore(tmp_path)) == 0


# ---- values that came with the data


def _brought(row: Example, *values: np.ndarray) -> Rows:
    return Rows([dataclasses.replace(row, reference=tuple(np.asarray(v, np.float32) for v in values))])


def test_log_probs_that_came_with_the_data_are_used_and_need_no_model(tmp_path: Path) -> None:
    row = Example(np.arange(3, dtype=np.int32), (np.arange(4, dtype=np.int32), np.arange(2, dtype=np.int32)))
    per_token = _sums(_brought(row, [-1, -2, -3, -4], [-5, -6]), tmp_path, None)
    summed = _sums(_brought(row, [-10], [-11]), tmp_path, None)
    assert per_token.of(0).tolist() == summed.of(0).tolist() == [-10, -11]


def test_log_probs_that_came_per_token_take_token_weights(tmp_path: Path) -> None:
    row = Example(np.arange(3, dtype=np.int32), (np.arange(2, dtype=np.int32),), (np.array([2, 0.5], np.float32),))
    assert _sums(_brought(row, [-1, -2]), tmp_path, None).of(0).tolist() == [-3]
    with pytest.raises(StoreError, match="token weights"):
        _sums(_brought(row, [-3]), tmp_path, None)


@pytest.mark.parametrize(("values", "words"), [([-1, -2, -3], "3 values for 2 tokens"), ([np.nan], "not finite")])
def test_log_probs_that_do_not_fit_their_row_are_refused_by_row(
    tmp_path: Path, values: list[float], words: str
) -> None:
    row = Example(np.arange(3, dtype=np.int32), (np.arange(2, dtype=np.int32),), origin="d.jsonl row 8")
    with pytest.raises(StoreError, match=rf"{words}[\s\S]*d.jsonl row 8"):
        _sums(_brought(row, values), tmp_path, None)


def test_rows_with_and_without_their_own_log_probs_mix(tmp_path: Path) -> None:
    rows = pairs(4)
    rows.rows[1] = _brought(rows[1], [-1], [-2])[0]
    lines: list[str] = []
    sums = _sums(rows, tmp_path, TinyReference(), report=lines.append)
    assert sums.of(1).tolist() == [-1, -2]
    assert "8 responses, 2 came with the data, 0 kept" in lines[0]


# ---- the run's own copy


def test_a_run_reads_back_exactly_the_values_it_began_with(tmp_path: Path) -> None:
    rows = pairs(20)
    sums = _sums(rows, tmp_path / "s", TinyReference())
    sums.save(tmp_path / "reference.safetensors")
    loaded = ReferenceSums.load(tmp_path / "reference.safetensors")
    assert loaded.digest == sums.digest
    assert np.array_equal(loaded.of(7), sums.of(7))
    assert loaded.data == data_digest(rows, range(20))
    assert data_digest(pairs(20, seed=1), range(20)) != loaded.data


def test_a_run_notices_that_its_values_were_damaged(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    _sums(pairs(5), tmp_path / "s", TinyReference()).save(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        ReferenceSums.load(path)
    path.write_bytes(content[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        ReferenceSums.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ReferenceSums.load(tmp_path / "nowhere.safetensors")


# ---- scoring a few rows again


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_rounding_passes_the_spot_check_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    rows, reference = pairs(60), TinyReference(dtype=getattr(torch, dtype))
    sums = _sums(rows, tmp_path, reference)
    check = spot_check(
        rows, sums, reference, k=60, seed=0, tolerance=tolerance_per_token(dtype), store=ReferenceStore(tmp_path)
    )
    assert check.responses == 120
    assert check.largest < tolerance_per_token(dtype)
    assert "120 random responses scored again agree" in check.line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_store", [True, False])
def test_the_scores_of_another_model_are_refused_by_row(tmp_path: Path, dtype: str, with_store: bool) -> None:
    rows = pairs(30)
    sums = _sums(rows, tmp_path, TinyReference(dtype=getattr(torch, dtype)))
    other = TinyReference(seed=1, dtype=getattr(torch, dtype))
    with pytest.raises(StoreError, match=r"do not agree[\s\S]*pairs.jsonl row \d+, response [12]: -?\d"):
        spot_check(
            rows,
            sums,
            other,
            k=4,
            seed=0,
            tolerance=tolerance_per_token(dtype),
            store=ReferenceStore(tmp_path) if with_store else None,
        )


def test_two_tokens_swapped_in_the_store_leave_the_sum_and_are_still_noticed(tmp_path: Path) -> None:
    row = pairs(1, seed=3)
    reference = TinyReference(dtype=torch.float32)
    right = [logps[::-1].copy() for logps in reference(row.rows)[0]]
    store = ReferenceStore(tmp_path)
    with store.writer() as writer:
        writer.add(example_keys(row[0]), right)
    sums = _sums(row, tmp_path, None)
    tolerance = tolerance_per_token("float32")
    spot_check(row, sums, reference, k=1, seed=0, tolerance=tolerance)
    with pytest.raises(StoreError, match=f"delete {tmp_path}"):
        spot_check(row, sums, reference, k=1, seed=0, tolerance=tolerance, store=store)


def test_columns_from_another_model_are_refused_and_their_own_noise_is_not(tmp_path: Path) -> None:
    rows, reference = pairs(6), TinyReference(dtype=torch.float32)
    scored = reference(rows.rows)
    noisy = Rows([_brought(row, *(v + 0.01 for v in values))[0] for row, values in zip(rows.rows, scored, strict=True)])
    wrong = Rows([_brought(row, *(v + 1.0 for v in values))[0] for row, values in zip(rows.rows, scored, strict=True)])
    tolerance = tolerance_per_token("float32")
    spot_check(noisy, _sums(noisy, tmp_path, None), reference, k=6, seed=0, tolerance=tolerance)
    with pytest.raises(StoreError, match=r"columns in the data may come from another model"):
        spot_check(wrong, _sums(wrong, tmp_path, None), reference, k=6, seed=0, tolerance=tolerance)
