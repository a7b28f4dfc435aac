"""The sides of the scoring benchmark, each in a process of its own: `scoring_sides.py SIDE FILE` prints JSON.

ours: the pass that `dpo-train` makes, from the look-up to the sums, the store's files included.
trl: `DPOTrainer._precompute_ref_logps` as it is, its cache file included.
fair: the same, projecting response positions only, as it does on a GPU.
Tokenising, loading and hashing the model are left out on every side.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_report import forget_peak, peak_resident_bytes, resident_bytes
from case_model import model_of
from step_cases import Pair, StepCase, load

Sums = list[list[float]]
# Each of its two calls scores the timed pairs, the second time from what the first has kept.
Pass = Callable[[], Sums]


def ours(case: StepCase, pairs: list[Pair], folder: str) -> Pass:
    import numpy as np
    from our_side import examples_of, packed_model_of

    from dpo_cli.policy.packed_model import PackedModel, score_examples
    from dpo_cli.reference.identity import ModelIdentity
    from dpo_cli.reference.score import reference_sums
    from dpo_cli.reference.store import open_store
    from dpo_cli.train.device import keep_freed_memory

    keep_freed_memory()
    packed = PackedModel(packed_model_of(case))
    examples = examples_of(pairs)
    # As many batches as the others have, within rounding: none larger than their largest.
    batches = np.array(examples.sizes).reshape(-1, case.global_pairs)
    budget = int(batches.sum(1).max())

    def sums(first: int, last: int) -> Sums:
        found = reference_sums(
            examples,
            indices=np.arange(first, last),
            make_score=lambda: lambda chosen: score_examples(packed, chosen),
            store=open_store(Path(folder), ModelIdentity("bench", {})),
            tokens_per_batch=budget,
        )
        return found.values.reshape(-1, 2).tolist()

    sums(0, case.global_pairs)
    return lambda: sums(case.global_pairs, len(pairs))


def trl(case: StepCase, pairs: list[Pair], folder: str, *, fair: bool) -> Pass:
    from datasets import load_from_disk
    from trl_side import TokenisedTrainer, arguments, dataset_of, padding_tokenizer, project_responses_only

    if fair:
        project_responses_only()
    # What it has computed for rows in memory, it does not find again; rows of a file it does.
    dataset_of(pairs[case.global_pairs :], scored=False).save_to_disk(f"{folder}/rows")
    timed = load_from_disk(f"{folder}/rows")
    settings = arguments(folder, per_device_train_batch_size=case.global_pairs, bf16=case.dtype == "bfloat16")
    # Making it scores the pairs it is given: the first batch, which warms up.
    trainer = TokenisedTrainer(
        model_of(case, "sdpa"), args=settings, train_dataset=dataset_of(pairs[: case.global_pairs], scored=False),
        processing_class=padding_tokenizer(),
    )  # fmt: skip

    def sums() -> Sums:
        found = trainer._precompute_ref_logps(timed, "train", case.global_pairs)
        columns = (found["ref_chosen_logps"], found["ref_rejected_logps"])
        return [list(values) for values in zip(*columns, strict=True)]

    return sums


def main() -> None:
    warnings.simplefilter("ignore")
    side, (case, pairs) = sys.argv[1], load(Path(sys.argv[2]))
    model_of(replace(case, hidden=64, layers=1, vocabulary=64), "sdpa")
    # What is imported, the model's code too, is not counted.
    for module in ("dpo_cli.reference.score", "dpo_cli.reference.store") if side == "ours" else ("trl_side",):
        importlib.import_module(module)
    base = resident_bytes()
    with tempfile.TemporaryDirectory() as folder:
        make = ours(case, pairs, folder) if side == "ours" else trl(case, pairs, folder, fair=side == "fair")
        told: dict[str, Any] = {}
        forget_peak()
        began = time.perf_counter(), time.process_time()
        told["sums"] = make()
        told["seconds"], told["cpu_seconds"] = time.perf_counter() - began[0], time.process_time() - began[1]
        told["peak_bytes"] = peak_resident_bytes() - base
        again = time.perf_counter()
        if make() != told["sums"]:
            raise SystemExit("the second pass has other sums than the first")
        told["second_pass"] = time.perf_counter() - again
    print(json.dumps(told))


if __name__ == "__main__":
    main()
