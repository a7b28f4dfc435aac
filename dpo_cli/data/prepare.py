"""The data room's one door: from what `data` names to memory-mapped examples, cached by content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_cli.data.arrow_store import ExampleWriter, StoredExamples, partners_with_other_prompts
from dpo_cli.data.build import SplitWriter, build_split, make_tokeniser, open_source
from dpo_cli.data.cache import being_built, content_key, read_manifest, write_manifest
from dpo_cli.data.formats import check_column_names
from dpo_cli.data.kinds import check_token_weights
from dpo_cli.data.reasons import REASONS
from dpo_cli.data.report import DataReport, Sample, SplitReport
from dpo_cli.data.settings import DataConfig, RowSettings, held_out_fraction, row_settings
from dpo_cli.data.sources import Source, eval_sources_of, sources_of
from dpo_cli.data.templates import template_fields
from dpo_cli.errors import DataError
from dpo_cli.losses.types import ExampleKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedData:
    """Examples to train on and, where there are any, to evaluate on.

    digest: of the tokens themselves (with weights, verdicts and reference values), in order; a resumed run compares
    it. The same rows under another file name have the same digest.
    """

    train: StoredExamples
    eval: StoredExamples | None
    report: DataReport
    digest: str


def prepare_data(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: ExampleKind,
    stop_token_ids: frozenset[int],
    seed: int,
    store_dir: Path | str,
) -> PreparedData:
    """Read, check, render and tokenise the data, or find all that done.

    kind: what an example is for the loss. stop_token_ids: the tokens on which a reply of this model ends.
    seed: decides the held-out split and fractional weights. store_dir: tokenised data is kept under its `data` folder.
    Raises DataError for anything about the data, the template or the tokenizer that the user can mend.
    """
    store = Path(store_dir).expanduser()
    settings = row_settings(data, kind=kind, stop_token_ids=stop_token_ids, seed=seed)
    check_column_names(settings.columns)
    check_token_weights(settings.token_weights, kind)
    if settings.prompt_template is not None:
        template_fields(settings.prompt_template)
    sources = {"train": sources_of(data.train, split=data.split, subset=data.subset, where="data.train")}
    evaluated = _eval_sources(data)
    if evaluated:
        sources["eval"] = evaluated
    held_out = 0.0 if evaluated else held_out_fraction(data)
    key = content_key(sources, tokenizer, settings, held_out_fraction=held_out, store_dir=store)
    folder = store / "data" / key
    manifest = read_manifest(folder)
    if manifest is not None and data.on_bad_row == "error" and _dropped_bad_rows(manifest):
        manifest = None  # building it again names the first of these rows
    from_cache = manifest is not None
    if manifest is None:
        try:
            with being_built(folder) as temporary:
                _build(temporary, data, tokenizer, settings, sources, held_out)
        except OSError as error:
            raise DataError(
                f"The tokenised data cannot be written: {error.strerror or error}.",
                where=str(folder.parent),
                hint="free some disk space, or name another store_dir",
            ) from error
        manifest = read_manifest(folder)
        if manifest is None:
            raise DataError("The tokenised data cannot be read back.", where=str(folder), hint="check the disk")
    return _open(folder, manifest, from_cache=from_cache)


def _dropped_bad_rows(manifest: dict[str, Any]) -> bool:
    report = DataReport.from_dict(manifest["report"])
    return bool(report.train.bad_rows or (report.eval is not None and report.eval.bad_rows))


def _eval_sources(data: DataConfig) -> list[Source]:
    if data.eval is not None:
        return sources_of(data.eval, split=data.eval_split or data.split, subset=data.subset, where="data.eval")
    if data.eval_split is not None:
        return eval_sources_of(data.train, split=data.eval_split, subset=data.subset)
    return []


def _build(
    folder: Path,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    sources: dict[str, list[Source]],
    held_out: float,
) -> None:
    """Write train.arrow, perhaps eval.arrow, partners for KTO, and the manifest with the report."""
    opened = {name: [open_source(source, settings) for source in listed] for name, listed in sources.items()}
    tokeniser = make_tokeniser(tokenizer, settings, [each for listed in opened.values() for each in listed])
    train = SplitWriter(ExampleWriter(folder / "train.arrow"))
    evaluated = SplitWriter(ExampleWriter(folder / "eval.arrow")) if "eval" in sources or held_out > 0 else None
    try:
        for name, listed in opened.items():
            own = train if name == "train" or evaluated is None else evaluated
            build_split(
                listed,
                tokeniser,
                first_source=0 if name == "train" else len(sources["train"]),
                into=own,
                held_out=evaluated if name == "train" and held_out > 0 else None,
                held_out_fraction=held_out if name == "train" else 0.0,
                on_bad_row=data.on_bad_row,
                workers=data.workers,
            )
    finally:
        digests = [writer.writer.close() for writer in (train, evaluated) if writer is not None]
    names = [source.name for listed in sources.values() for source in listed]
    report = DataReport(
        kind=settings.kind,
        max_tokens=settings.max_tokens,
        eos=str(tokenizer.convert_ids_to_tokens(tokeniser.eos)),
        train=train.report,
        eval=None if evaluated is None else evaluated.report,
        before_reply="" if tokeniser.template is None else tokeniser.template.before_reply,
    )
    _finish_report(report, folder, names, settings, tokenizer, eval_is_named="eval" in sources)
    digest = hashlib.sha256(":".join([settings.kind, str(settings.max_tokens), *digests]).encode()).hexdigest()
    write_manifest(
        folder,
        {"digest": digest, "source_names": names, "max_tokens": settings.max_tokens, "report": report.as_dict()},
    )


def _finish_report(
    report: DataReport,
    folder: Path,
    names: Sequence[str],
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eval_is_named: bool,
) -> None:
    """Fill in what only the whole split shows, and refuse an empty one. Writes KTO's partners beside the examples."""
    prompts: dict[str, Any] = {}
    for name, split in (("train", report.train), ("eval", report.eval)):
        if split is None:
            continue
        if not split.examples:
            if name == "eval" and not eval_is_named:
                continue  # a small fraction of few prompts may well be none; the report says 0
            raise _nothing_left(name, split, settings)
        examples = StoredExamples(folder / f"{name}.arrow", names, max_tokens=settings.max_tokens)
        keys = examples.column("prompt_key")
        if settings.kind == "unpaired":
            partners = _partners(name, keys)
            np.save(folder / f"{name}.partners.npy", partners)
            room = np.maximum(1, settings.max_tokens - examples.lengths("prompt"))
            report.borrowed_cut += int((examples.lengths("responses")[partners] > room).sum())
        prompts[name] = _distinct(keys)
        split.prompts = len(prompts[name])
        split.duplicates = _duplicates(examples)
        split.mean_prompt_tokens = float(examples.lengths("prompt").mean())
        split.longest_example_tokens = int(examples.sizes.max())
        first, last = examples.response_tokens()
        both = settings.kind in ("pair", "ranked")
        split.mean_response_tokens = [float(each.mean()) for each in ((first, last) if both else (first,))]
        if name == "train":
            report.samples = [_sample(examples, at, tokenizer) for at in range(min(2, len(examples)))]
    if "eval" in prompts:
        report.overlap = int(np.isin(prompts["eval"], prompts["train"]).sum())


def _partners(name: str, prompt_keys: Any) -> Any:
    partners = partners_with_other_prompts(prompt_keys)
    if partners is None:
        raise DataError(
            "KTO estimates a divergence with responses of other prompts, and all rows have the same prompt.",
            where=f"data.{name}",
            hint="data with at least two prompts, or another loss",
        )
    return partners


def _duplicates(examples: StoredExamples) -> int:
    """Rows that say exactly what an earlier row says; a row taken twice for its weight is none."""
    keys = examples.column("row_key")
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    earlier, later = order[again], order[again + 1]
    source, number = examples.column("source"), examples.column("number")
    copies = (source[earlier] == source[later]) & (number[earlier] == number[later])
    return len(again) - int(copies.sum())


def _distinct(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """In ascending order. np.unique would hold a table of 44 bytes a key."""
    ordered = np.sort(keys)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]


def _sample(examples: StoredExamples, at: int, tokenizer: PreTrainedTokenizerBase) -> Sample:
    example = examples[at]
    responses = [str(tokenizer.decode(ids.tolist())) for ids in example.responses]
    return Sample(example.origin, str(tokenizer.decode(example.prompt.tolist())), responses)


def _nothing_left(name: str, split: SplitReport, settings: RowSettings) -> DataError:
    rows = sum(source.rows for source in split.sources)
    why = "; ".join(
        f"{count.rows:,} {REASONS[reason].format(max_tokens=settings.max_tokens)}"
        for reason, count in split.dropped.items()
    )
    hint = (
        "raise data.max_tokens or data.on_long=truncate"
        if {"too_long", "prompt_too_long"} & set(split.dropped)
        else None
    )
    return DataError(
        f"Nothing is left of the {rows:,} rows of data.{name}: {why or 'every prompt was held out for evaluation'}.",
        where=", ".join(source.name for source in split.sources),
        hint=hint,
    )


def _open(folder: Path, manifest: dict[str, Any], *, from_cache: bool) -> PreparedData:
    report = replace(DataReport.from_dict(manifest["report"]), from_cache=from_cache)
    opened: dict[str, StoredExamples] = {}
    for name in ("train", "eval"):
        path = folder / f"{name}.arrow"
        if not path.exists():
            continue
        partners = folder / f"{name}.partners.npy"
        try:
            opened[name] = StoredExamples(
                path,
                manifest["source_names"],
                max_tokens=manifest["max_tokens"],
                partners=np.load(partners) if partners.exists() else None,
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"The tokenised data cannot be opened: {error}", where=str(folder)) from None
    evaluated = opened.get("eval")
    return PreparedData(
        train=opened["train"],
        eval=evaluated if evaluated is not None and len(evaluated) else None,
        report=report,
        digest=manifest["digest"],
    )
