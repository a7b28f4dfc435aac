"""A report of real runs: what it says, that nothing in it runs or is fetched, and that it is whole on any screen."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_cli.cli.report import main
from dpo_cli.report import write
from dpo_cli.report.folders import MANIFEST

from .conftest import Workplace, echo_pairs, write_jsonl
from .test_distributed import ZERO

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
HOSTILE = '</pre><script>alert(1)</script><img src=x onerror=alert(2)> & "$x$" https://evil.example/x.js'
PDPO = ["loss=pdpo", "loss.gamma=0.5", "rollout.prompts_per_step=4", "rollout.max_new_tokens=20"]
_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Fails where an element is closed that is not open, or is never closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_of_a_run_holds_its_numbers_and_runs_and_fetches_nothing(workplace: Workplace) -> None:
    """Texts of the data, names of files and what the policy writes are hostile."""
    held_out = write_jsonl(workplace.folder / "<img src=x onerror=alert(3)>.jsonl", echo_pairs(32, seed=1))
    done = workplace.train(*PDPO, "max_steps=6", "eval_every=2", f"data.eval='{held_out.name}'", "run_dir=run")
    assert done.returncode == 0, done.stderr
    run = workplace.folder / "run"
    for name in ("eval_pairs.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        write_jsonl(run / name, [{key: _hostile(value) for key, value in row.items()} for row in rows])

    page = write([run], run / "report")
    assert page == run / "report" / "report.html"
    source = page.read_text(encoding="utf-8")
    read = Page(source)
    assert HOSTILE in read.text and "<img src=x onerror=alert(3)>.jsonl" in read.text
    assert not read.tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    assert len(set(read.ids)) == len(read.ids)
    for name, value in read.attributes:
        assert not name.startswith("on") and name != "src"
        # A figure refers to its own parts alone.
        assert name not in ("href", "xlink:href") or (value.startswith("#") and value[1:] in read.ids), (name, value)
        assert "url(" not in value or value.split("url(#")[1].split(")")[0] in read.ids
    assert "@import" not in source and "://" not in source.replace("https://evil.example", "")

    last = workplace.metrics("run", "eval")[-1]
    assert f"{last['rewards/accuracies']:.1%}" in read.text
    assert "of 16 pairs" in read.text and "gamma = 0.5" in read.text and "not ended" not in read.text
    pairs = list(csv.DictReader((run / "report" / "pairs.csv").open()))
    margins = np.array([float(row["margin, end"]) for row in pairs])
    assert len(margins) == 32
    assert margins.mean() == pytest.approx(last["rewards/margins"], abs=1e-4)
    assert (margins > 0).mean() == last["rewards/accuracies"]
    drawn = {path.stem for path in (run / "report" / "figures").glob("*.svg")}
    assert {"loss", "margins", "surface", "path", "ratios", "lengths", "generator_kl", "grad_norm"} <= drawn
    assert all(
        (run / "report" / "figures" / f"{name}{kind}").stat().st_size for name in drawn for kind in (".png", ".csv")
    )

    if CHROMIUM is None:
        pytest.skip("whether a browser shows it without scrolling sideways: there is no chromium here")
    _looks_right(page, workplace.folder)


def _hostile(value: Any) -> Any:
    if isinstance(value, str):
        return f"{value}{HOSTILE}"
    return [_hostile(each) for each in value] if isinstance(value, list) and isinstance(value[0], str) else value


def _looks_right(page: Path, scratch: Path) -> None:
    """At a phone's width nothing sticks out, and it prints."""
    # In a frame as wide as a phone, since a browser's own window is no narrower than 500; everything is opened.
    whole = escape(page.read_text(encoding="utf-8").replace("<details", "<details open"))
    told = scratch / "measured.html"
    told.write_text(
        f'<iframe width="390" height="800" style="border:0" srcdoc="{whole}" onload="'
        'document.documentElement.dataset.width = this.contentDocument.documentElement.scrollWidth"></iframe>',
        encoding="utf-8",
    )
    browser = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={scratch / 'browser'}",
    ]  # fmt: skip
    shown = subprocess.run(
        [*browser, "--dump-dom", told.as_uri()], capture_output=True, text=True, check=True,
        timeout=120,
    ).stdout  # fmt: skip
    assert 'data-width="390"' in shown[:300], shown[:300]
    printed = scratch / "page.pdf"
    subprocess.run([*browser, f"--print-to-pdf={printed}", page.as_uri()], capture_output=True, check=True, timeout=120)
    assert printed.read_bytes().startswith(b"%PDF")


def test_a_sweep_is_compared_in_a_page_of_its_own(workplace: Workplace) -> None:
    done = workplace.call("-m", *workplace.defaults, "loss.beta=0.1,1", "max_steps=4", "eval_every=2", "run_dir=sweep")
    assert done.returncode == 0, done.stderr
    page = workplace.folder / "sweep" / "report" / "report.html"
    assert f"report: {page.relative_to(workplace.folder)}" in done.stdout
    assert "unfinished" not in Page(page.read_text(encoding="utf-8")).text
    (workplace.folder / "sweep" / "1" / "final" / "dpo_run.json").unlink()
    page = write([workplace.folder / "sweep"], workplace.folder / "sweep" / "report")
    read = Page(page.read_text(encoding="utf-8"))
    assert "sweep: 2 runs" in read.text and "4, unfinished" in read.text
    with (page.parent / "settings.csv").open() as settings:
        assert [row[0] for row in csv.reader(settings)] == ["setting", "loss.beta"]
    with (page.parent / "outcomes.csv").open() as outcomes:
        rows = list(csv.DictReader(outcomes))
    assert [row["loss.beta"] for row in rows] == ["0.1", "1"]
    for row, job in zip(rows, "01", strict=True):
        last = workplace.metrics(f"sweep/{job}", "eval")[-1]
        assert row["reward accuracy"] == f"{last['rewards/accuracies']:.1%}"


def test_what_is_damaged_is_named_and_the_rest_reported_and_nothing_foreign_overwritten(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.train("run_dir=run", "loss=simpo", "max_steps=2", "eval_every=1").returncode == 0
    monkeypatch.chdir(workplace.folder)
    run = workplace.folder / "run"
    (run / "config.yaml").write_text("model: [")
    (run / "data.json").write_text("{")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 3, "spl')
    shutil.rmtree(run / "final")

    # An earlier report is replaced.
    (run / "report").mkdir()
    (run / "report" / "old.csv").touch()
    (run / "report" / MANIFEST).write_text('{"files": ["old.csv"]}')
    assert main(["run"]) == 0
    assert not (run / "report" / "old.csv").exists()
    read = Page((run / "report" / "report.html").read_text(encoding="utf-8"))
    for sentence in (
        "config.yaml cannot be read.", "data.json cannot be read.", "metrics.jsonl: 1 line cannot be read",
        "There is no final model",
    ):  # fmt: skip
        assert sentence in read.text

    # A file that is not of it is neither lost nor written over.
    (run / "report" / "notes.txt").write_text("mine")
    before = (run / "report" / MANIFEST).stat().st_mtime_ns
    capsys.readouterr()
    for words, said in (
        (["run"], "notes.txt"),
        (["run", "out=pairs.jsonl"], "is a file, not a folder"),
        (["run", "out=run"], "is not empty, and not a report"),
        (["store"], "is not a run folder"),
        (["nowhere"], "does not exist"),
        (["run", "nowhere=1"], "There is no setting nowhere"),
        (["run", "run/../run", "--fast"], "There is no option --fast"),
        ([], "No run is named"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert (run / "report" / "notes.txt").read_text() == "mine"
    assert (run / "report" / MANIFEST).stat().st_mtime_ns == before


def test_a_run_that_has_only_begun_has_a_page(workplace: Workplace) -> None:
    """Held-out pairs were evaluated once, when the policy was its reference and every margin zero."""
    assert workplace.train("run_dir=run", "max_steps=1", "eval_every=0").returncode == 0
    run = workplace.folder / "run"
    shutil.rmtree(run / "final")
    for name in ("metrics.jsonl", "eval_logps.jsonl"):
        first = (run / name).read_text().splitlines(keepends=True)[0]
        assert json.loads(first)["split"] == "eval"
        (run / name).write_text(first)
    # As an earlier version or a full disk may leave them.
    told = json.loads((run / "data.json").read_text())
    del told["samples"]
    (run / "data.json").write_text(json.dumps(told))
    (run / "health.jsonl").write_text('{"step": 0, "name": "loss_at_ln2", "severity": "note", "what": "still"}\n')
    read = Page(write([run], run / "report").read_text(encoding="utf-8"))
    assert "No training step has been logged." in read.text
    assert "no margins yet" in read.text and "held-out reward accuracy" not in read.text


def test_help_and_bad_arguments_import_nothing_heavy() -> None:
    program = (
        "import sys; from dpo_cli.cli.report import main; assert main(['--help']) == 0; assert main(['nowhere']) == 2; "
        "assert main(['.', 'out=/dev/null']) == 2; "
        "print(sorted({'torch', 'matplotlib', 'numpy', 'jinja2', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dpo-report: one page") and done.stdout.endswith("[]\n")


def test_a_resumed_run_records_its_held_out_pairs_as_one_that_never_stopped(workplace: Workplace) -> None:
    longer = ["eval_every=3", "max_steps=12", "save_every=4"]
    assert workplace.train(*longer, "run_dir=straight").returncode == 0
    assert workplace.train(*longer, "run_dir=cut").returncode == 0
    cut, straight = workplace.folder / "cut", workplace.folder / "straight"
    # As a kill after step 9 leaves it: the checkpoint of step 8, and lines after it.
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoints" / "step-00000012")
    lines = (cut / "eval_logps.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [0, 3, 6, 9, 12]
    (cut / "eval_logps.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    assert workplace.call("resume=cut").returncode == 0
    for name in ("eval_pairs.jsonl", "eval_logps.jsonl"):
        assert (cut / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "aot"])
def test_two_ranks_record_the_held_out_pairs_of_one(workplace: Workplace, loss: str) -> None:
    words = [f"loss={loss}", "max_steps=2", "eval_every=1"]
    assert workplace.train(*words, "run_dir=one").returncode == 0
    done = workplace.shell(*workplace.defaults, *words, *ZERO, "run_dir=two")
    assert done.returncode == 0, done.stderr
    assert (workplace.folder / "one" / "eval_pairs.jsonl").read_text().splitlines()[0].startswith('{"pair": 0,')
    one, two = (
        [json.loads(line) for line in (workplace.folder / run / "eval_logps.jsonl").open()] for run in ("one", "two")
    )
    for mine, theirs in zip(one, two, strict=True):
        assert theirs["step"] == mine["step"]
        for side in ("chosen", "rejected"):
            np.testing.assert_allclose(theirs[side], mine[side], atol=2e-2)
