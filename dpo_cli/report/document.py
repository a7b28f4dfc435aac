"""From run folders to a report: one page, and beside it every figure as SVG, PNG and CSV."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import dpo_cli
from dpo_cli.atomic import temporary_beside
from dpo_cli.report import compare, tables, words
from dpo_cli.report.drawing import Picture, as_csv, palette
from dpo_cli.report.figures import curves_of, pairs_of, sparkline
from dpo_cli.report.folders import MANIFEST, check_replaceable, run_folders
from dpo_cli.report.loss_view import LossView
from dpo_cli.report.pairs import Ranking
from dpo_cli.report.record import RunRecord, read_run
from dpo_cli.report.surface import surfaces_of

PAGE = "report.html"
_PAIRS_SHOWN = 6
_SPECIAL_TOKEN = re.compile(r"<[|｜][^<>]{1,40}[|｜]>")
# Shorter ones are role names.
_SHORTEST_TURN = 12
_SHORT_LIST = 3


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """See `dpo_cli.report.write`."""
    folders = run_folders(runs)
    check_replaceable(out)
    records = [read_run(folder) for folder in folders]
    page, pictures, sheets = _page_of_one(records[0]) if len(records) == 1 else _page_of_several(records)
    files: dict[str, bytes] = {PAGE: page.encode()}
    for picture in pictures:
        files[f"figures/{picture.name}.svg"] = picture.svg.encode()
        files[f"figures/{picture.name}.png"] = picture.png
        files[f"figures/{picture.name}.csv"] = picture.csv.encode()
    files |= {f"{name}.csv": as_csv(table).encode() for name, table in sheets.items() if len(table) > 1}
    _replace(out.resolve(), files)
    return out / PAGE


def _replace(out: Path, files: dict[str, bytes]) -> None:
    """Put a whole folder in the place of one that is there: at no moment is `out` half of each."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = temporary_beside(out), temporary_beside(out)
    try:
        for name, content in (files | {MANIFEST: _manifest(files)}).items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        if out.exists():
            out.rename(aside)
        temporary.rename(out)
    finally:
        if aside.exists() and not out.exists():
            aside.rename(out)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _manifest(files: Iterable[str]) -> bytes:
    return (
        json.dumps({"made_by": f"dpo-report {dpo_cli.__version__}", "files": sorted(files)}, indent=2) + "\n"
    ).encode()


def _ranking_of(run: RunRecord) -> tuple[Ranking | None, LossView | None]:
    if run.pairs is None:
        return None, None
    loss = LossView.of(run.settings)
    starts_as_reference = run.setting("model.reference") in (None, "start")
    return Ranking.of(run.pairs, loss, starts_as_reference=starts_as_reference), loss


def _page_of_one(run: RunRecord) -> tuple[str, list[Picture], dict[str, list[list[Any]]]]:
    ranking, loss = _ranking_of(run)
    curves = curves_of(run)
    pairs = [] if ranking is None else pairs_of(ranking)
    surfaces = [] if ranking is None else surfaces_of(ranking, loss)
    results = tables.results(run)
    page = _render(
        "run.html",
        title=run.name,
        run=run,
        summary=words.summary(run),
        tiles=tables.tiles(run, ranking),
        setup=tables.setup_table(run),
        command=words.command(run),
        differences=tables.differences(run),
        results=results,
        curves=curves,
        surfaces=surfaces,
        pairs=pairs,
        groups=[] if ranking is None else _groups(ranking),
        recorded=None if run.pairs is None else len(run.pairs.identities),
        samples=words.shown_samples(run),
        answers=words.shown_answers(run),
        data=tables.data_table(run),
        examples=words.first_examples(run),
        timings=tables.timing_table(run),
        config=yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True, width=100) if run.settings else "",
    )
    sheets = {"results": results, "pairs": [] if ranking is None else _pairs_table(ranking)}
    return page, [*curves, *surfaces, *pairs], sheets


def _page_of_several(runs: Sequence[RunRecord]) -> tuple[str, list[Picture], dict[str, list[list[Any]]]]:
    compared = [compare.Compared(run, _ranking_of(run)[0]) for run in runs]
    few = [picture for picture in (compare.accuracies(compared), compare.trade_off(compared)) if picture is not None]
    pictures = [*few, *compare.overlaid(runs)]
    count, worst = compare.wrong_in_all(compared, _PAIRS_SHOWN)
    outcomes, settings = compare.outcome_table(compared), compare.differing_settings(runs)
    paired = compare.paired_table(compared)
    first = compared[0].ranking
    page = _render(
        "several.html",
        title=_title(runs),
        runs=[
            {"name": name, "run": run, "summary": words.summary(run), "command": words.command(run)}
            for name, run in zip(compare.names(runs), runs, strict=True)
        ],
        outcomes=outcomes,
        settings=settings,
        paired=paired,
        pictures=pictures,
        wrong_in_all=count,
        worst=[] if first is None else [_shown(first, pair) for pair in worst],
    )
    return page, pictures, {"outcomes": outcomes, "settings": settings, "paired": paired}


def _title(runs: Sequence[RunRecord]) -> str:
    """The folder they have in common, if they have one of their own."""
    parents = {run.folder.parent for run in runs}
    return f"{parents.pop().name}: {len(runs)} runs" if len(parents) == 1 else f"{len(runs)} runs"


def _groups(ranking: Ranking) -> list[dict[str, Any]]:
    listed = (
        ("Most confidently wrong", "The rejected response won by the largest margin. Wrong labels gather here.",
         ranking.confidently_wrong(_PAIRS_SHOWN)),
        ("Lost again", "Ranked right at an earlier evaluation and wrong at the end.", ranking.lost(_PAIRS_SHOWN)),
        ("Learnt last", "Ranked right for good only in the latter half of the evaluations.",
         ranking.learnt_last(_PAIRS_SHOWN)),
        ("Most confidently right", "What the policy finds easiest to tell apart.",
         ranking.confidently_right(_SHORT_LIST)),
    )  # fmt: skip
    return [
        {"title": title, "text": text, "pairs": [_shown(ranking, pair) for pair in pairs]}
        for title, text, pairs in listed
        if pairs
    ]


def _shown(ranking: Ranking, pair: int) -> dict[str, Any]:
    pairs, margins = ranking.pairs, ranking.margins[:, pair]
    identity = pairs.identities[pair]
    return {
        "origin": identity.get("origin", ""),
        "margin": f"{margins[-1]:+.2f}".replace("-", "−"),
        "spark": sparkline(margins.tolist()),
        "won": bool(margins[-1] > 0),
        "prompt": identity.get("prompt", ""),
        "preview": preview(identity.get("prompt", "")),
        "sides": [
            {
                "name": side,
                "text": identity.get(side, ""),
                "tokens": f"{pairs.lengths[place, pair]:.0f}",
                "logps": f"{logps[0, pair]:.1f} → {logps[-1, pair]:.1f}".replace("-", "−"),
            }
            for place, (side, logps) in enumerate((("chosen", pairs.chosen), ("rejected", pairs.rejected)))
        ],
    }


def preview(prompt: object) -> str:
    """The end of a prompt that tells it from others: the last turn of a conversation, without the template's tokens."""
    turns = [" ".join(turn.split()) for turn in _SPECIAL_TOKEN.split(str(prompt))]
    said = [turn for turn in turns if len(turn) > _SHORTEST_TURN] or [" ".join(turns)]
    return said[-1]


def _pairs_table(ranking: Ranking) -> list[list[Any]]:
    pairs, since = ranking.pairs, ranking.learnt_at()
    table: list[list[Any]] = [
        ["pair", "origin", "tokens of chosen", "tokens of rejected", "reference chosen", "reference rejected",
         "policy chosen, start", "policy rejected, start", "policy chosen, end", "policy rejected, end",
         "margin, start", "margin, end", "right since step"]
    ]  # fmt: skip
    for place, identity in enumerate(pairs.identities):
        reference = ["", ""] if pairs.reference is None else pairs.reference[:, place].tolist()
        table.append(
            [identity.get("pair", place), identity.get("origin", ""), *pairs.lengths[:, place].astype(int).tolist(),
             *reference, pairs.chosen[0, place], pairs.rejected[0, place], pairs.chosen[-1, place],
             pairs.rejected[-1, place], ranking.margins[0, place], ranking.margins[-1, place],
             int(pairs.steps[since[place]]) if since[place] >= 0 else ""]
        )  # fmt: skip
    return table


def _render(template: str, **values: Any) -> str:
    """Everything that is put into a page is escaped, but for the figures that were drawn here."""
    environment = Environment(
        loader=PackageLoader("dpo_cli.report", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["preview"] = preview
    environment.filters["inline"] = lambda picture: Markup(picture.inline)
    light, dark = palette()
    return environment.get_template(template).render(
        light=Markup(light), dark=Markup(dark), version=dpo_cli.__version__, **values
    )
