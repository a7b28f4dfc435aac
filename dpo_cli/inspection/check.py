"""dpo-data: read the data as training would, look at all of it, tell what is found, and judge."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dpo_cli.batch.order import steps_per_epoch
from dpo_cli.config.commands import DataCheckConfig
from dpo_cli.data.arrow_store import StoredExamples
from dpo_cli.data.prepare import PreparedData
from dpo_cli.data.report import Count
from dpo_cli.errors import DataProblems, ModelError
from dpo_cli.evaluation.results import write_result
from dpo_cli.forecast.plan import Plan, plan_run
from dpo_cli.inspection.cost import RunCost, run_cost
from dpo_cli.inspection.findings import Finding, findings_of
from dpo_cli.inspection.lengths import Summary, summary_of
from dpo_cli.inspection.measure import Ends, Packing, SplitFacts, measure, overlap, packing
from dpo_cli.inspection.show import (
    console_of,
    show_ends,
    show_epoch,
    show_example,
    show_findings,
    show_lengths,
    show_sources,
)
from dpo_cli.losses.types import ExampleKind
from dpo_cli.policy.folder import resolve_tokenizer_folder
from dpo_cli.policy.tokenizer import load_tokenizer, read_stop_token_ids
from dpo_cli.train.objective import Objective
from dpo_cli.train.parts import build_loss, loop_settings
from dpo_cli.train.run_data import generator_settings, prepare_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_data(config: DataCheckConfig, console: Console | None = None) -> None:
    """Tell what training would make of the data, on the screen and, if `out` names one, in a file.

    Raises DataProblems (exit code 1) where something of `fail_on` is found, DataError and ModelError for what no
    training could begin with.
    """
    console = console or console_of()
    declaration = Objective.of(build_loss(config)).declaration
    kind = declaration.kind
    model = config.model
    folder = resolve_tokenizer_folder(model.path, model.revision, trust_remote_code=model.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
    stops = read_stop_token_ids(folder, tokenizer)
    # All bad rows are to be told, not the first alone.
    data = config.data.model_copy(update={"on_bad_row": "drop"})
    prepared = prepare_for(config, data, kind, tokenizer, stops)
    ends = _ends(tokenizer, stops)
    facts = {
        name: measure(
            split,
            kind=kind,
            ends=ends,
            similarity=config.similarity,
            tokens_per_microbatch=config.tokens_per_microbatch,
        )
        for name, split in _splits(prepared).items()
    }
    found = findings_of(
        prepared.report,
        _looked_at(prepared, facts, config.similarity),
        fail_on=config.fail_on,
        stops_at_bad_rows=config.data.on_bad_row == "error",
    )
    lengths = {name: summary_of(split, kind) for name, split in facts.items()}
    packed = packing(
        facts["train"],
        kind=kind,
        seed=config.seed,
        global_pairs=config.global_pairs,
        tokens_per_microbatch=config.tokens_per_microbatch,
    )
    steps = loop_settings(config, len(prepared.train)).total_steps
    plan = _plan(config)
    cost = None
    if isinstance(plan, Plan):
        epochs = steps / steps_per_epoch(len(prepared.train), config.global_pairs)
        cost = run_cost(plan, facts["train"], epochs=epochs, scores_reference=declaration.needs_reference)

    show_sources(console, prepared.report)
    if config.data.generator is not None:
        own = prepare_for(config, generator_settings(data), "demonstration", tokenizer, stops)
        console.print("\n".join(own.report.split_lines("generator", own.report.train)), markup=False)
    show_findings(console, found)
    show_ends(console, prepared.report, ends, tokenizer, facts["train"])
    for name, summary in lengths.items():
        show_lengths(console, name, summary)
    show_epoch(console, packed, len(prepared.train), config, steps=steps, plan=plan, cost=cost)
    for at in range(min(config.shown, len(prepared.train))):
        show_example(console, prepared.train[at], kind, tokenizer)
    if config.out is not None:
        content = _content(prepared, kind, found, lengths, packed, steps=steps, plan=plan, cost=cost)
        write_result(Path(config.out), content)
        console.print(f"written: {config.out}", markup=False)
    _judge(found, data_name=", ".join(source.name for source in prepared.report.train.sources))


def _splits(prepared: PreparedData) -> dict[str, StoredExamples]:
    return {"train": prepared.train} | ({} if prepared.eval is None else {"eval": prepared.eval})


def _ends(tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]) -> Ends:
    """Where one token both begins and ends texts, its number at the beginning says nothing."""
    bos = tokenizer.bos_token_id
    eos = tokenizer.eos_token_id
    return Ends(stops | ({eos} if eos is not None else set()), None if bos in (None, eos) else int(bos))


def _looked_at(
    prepared: PreparedData, facts: dict[str, SplitFacts], similarity: float | None
) -> dict[str, dict[str, Count]]:
    looked_at = {name: dict(split.found) for name, split in facts.items()}
    if prepared.eval is not None:
        looked_at["eval"] |= overlap(prepared.train, prepared.eval, similarity=similarity)
    return looked_at


def _plan(config: DataCheckConfig) -> Plan | str:
    """A forecast, or why there is none: the data can be looked at without."""
    try:
        return plan_run(config)
    except ModelError as error:
        return error.message


def _content(
    prepared: PreparedData,
    kind: ExampleKind,
    found: list[Finding],
    lengths: dict[str, Summary],
    packed: Packing,
    *,
    steps: int,
    plan: Plan | str,
    cost: RunCost | None,
) -> dict[str, Any]:
    """The check as JSON: nothing in it depends on where or when it was made, but for the forecast's machine."""
    forecast: dict[str, Any] = {"steps": steps}
    if isinstance(plan, Plan):
        forecast |= {"peak_bytes": int(plan.memory.total), "fits": plan.fits}
    if cost is not None:
        forecast |= asdict(cost)
    return {
        "kind": kind,
        "digest": prepared.digest,
        "problems": sorted({each.name for each in found if each.is_problem}),
        "findings": [each.as_dict() for each in found],
        "lengths": {name: asdict(summary) for name, summary in lengths.items()},
        "epoch": asdict(packed),
        "forecast": forecast,
        "data": {**prepared.report.as_dict(), "from_cache": None},
    }


def _judge(found: list[Finding], *, data_name: str) -> None:
    problems = list(dict.fromkeys(each.name for each in found if each.is_problem))
    if not problems:
        return
    counts = [f"{each.name} ({each.split}: {each.rows:,})" for each in found if each.is_problem]
    raise DataProblems(
        f"The data have what they were not to have: {', '.join(counts)}.",
        where=data_name,
        hint=f"mend the rows, or leave {' and '.join(problems)} out of fail_on",
    )
