"""Tokenised data: the same for any number of workers, made once, never half there."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from chat_tokenizers import bpe, stops
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data import arrow_store, build, cache, chunk
from dpo_cli.data.arrow_store import partners_with_other_prompts
from dpo_cli.data.prepare import prepare_data
from dpo_cli.data.report import DataReport
from dpo_cli.data.settings import DataSettings

ROWS = [{"prompt": f"How many, {at % 700}?\n", "chosen": f"{at} eggs", "rejected": f"no {at}"} for at in range(1000)]


@pytest.fixture
def tokenisations(monkeypatch: Any) -> list[int]:
    """How many texts each call to the tokenizer was given."""
    calls: list[int] = []
    original = chunk.encode

    def counted(tokenizer: Any, texts: Any) -> Any:
        calls.append(len(texts))
        return original(tokenizer, texts)

    monkeypatch.setattr(chunk, "encode", counted)
    return calls


def test_the_second_time_nothing_is_tokenised(prepare: Any, write_jsonl: Any, tokenisations: list[int]) -> None:
    path = write_jsonl(ROWS)
    first = prepare(path)
    assert sum(tokenisations) == 3 * len(ROWS) and not first.report.from_cache
    tokenisations.clear()
    again = prepare(path, workers=1)
    assert tokenisations == [] and again.report.from_cache
    assert again.digest == first.digest
    assert again.report.lines() == first.report.lines()
    assert again.train[7].origin == "pairs.jsonl row 8"


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 99},
        {"token_weights": 2.0},
        {"eval_fraction": 0.1},
        {"chat": True},
        {"kind": "demonstration"},
        {"tokenizer": bpe(eos="<|im_end|>")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_a_token_is_made_anew(change: Any, prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl(ROWS[:9])
    first = prepare(path)
    changed = prepare(path, **change)
    assert not changed.report.from_cache
    assert changed.digest != first.digest


def test_changed_content_under_the_same_name_and_size_is_seen(prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl([{"prompt": "A?\n", "chosen": "yes", "rejected": "no"}])
    first = prepare(path)
    write_jsonl([{"prompt": "A?\n", "chosen": "yea", "rejected": "no"}])
    assert prepare(path).digest != first.digest


def test_the_folder_a_file_lies_in_changes_nothing(tmp_path: Path, prepare: Any, write_jsonl: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = prepare(write_jsonl(ROWS[:9]))
    moved = prepare(write_jsonl(ROWS[:9], "elsewhere/pairs.jsonl"))
    assert moved.report.from_cache and moved.digest == first.digest


def test_a_chat_template_is_part_of_the_key(prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl(ROWS[:9])
    prepare(path, chat=True)
    tokenizer = bpe(chat_template=str(bpe().chat_template).replace("<|im_start|>assistant", "<|im_start|>assistant "))
    other = tokenizer.chat_template
    assert other != bpe().chat_template
    assert cache.tokenizer_hash(tokenizer) != cache.tokenizer_hash(bpe())


def test_two_workers_equal_one(prepare: Any, write_jsonl: Any, tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "chosen": ""}, {**ROWS[1], "rejected": ROWS[1]["chosen"]}]
    path = write_jsonl(rows)
    prepared = [
        prepare_data(
            DataSettings(path, workers=workers, eval_fraction=0.2, on_bad_row="drop"),
            bpe(),
            kind="pair",
            stop_token_ids=stops(bpe()),
            seed=3,
            store_dir=tmp_path / f"workers-{workers}",
        )
        for workers in (1, 2)
    ]
    one, two = prepared
    assert one.digest == two.digest
    assert one.report.as_dict() == two.report.as_dict()
    for at in (0, 300, len(one.train) - 1):
        assert one.train[at].origin == two.train[at].origin
        np.testing.assert_array_equal(one.train[at].responses[1], two.train[at].responses[1])


def test_the_size_of_a_chunk_changes_nothing(prepare: Any, write_jsonl: Any, monkeypatch: Any) -> None:
    path = write_jsonl(ROWS)
    first = prepare(path)
    monkeypatch.setattr(build, "_ROWS_A_CHUNK", 37)
    monkeypatch.setattr(cache, "FORMAT_VERSION", -1)
    assert prepare(path).digest == first.digest


@pytest.mark.parametrize("bound", [{"_ROWS_TOGETHER": 300}, {"_BYTES_TOGETHER": 60_000}])
def test_how_many_rows_are_written_together_changes_nothing(
    bound: dict[str, int], prepare: Any, write_jsonl: Any, texts: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def batches() -> list[int]:
        (file,) = (tmp_path / "store" / "data").glob("*/train.arrow")
        reader = pa.ipc.open_file(file)
        return [reader.get_batch(at).num_rows for at in range(reader.num_record_batches)]

    path = write_jsonl(ROWS)
    together = prepare(path)
    assert batches() == [1000]
    for name, value in bound.items():
        monkeypatch.setattr(arrow_store, name, value)
    shutil.rmtree(tmp_path / "store")
    apart = prepare(path)
    assert batches() == [512, 488]
    assert apart.digest == together.digest and texts(apart.train) == texts(together.train)


def test_thousands_of_single_rows_are_written_in_time_that_grows_with_them_alone(tmp_path: Path) -> None:
    ids = np.arange(3, dtype=np.int32)
    batch = arrow_store.record_batch([arrow_store.StoredRow(ids, (ids, ids), None, None, None, 1, 2, 3)], 0)
    writer = arrow_store.ExampleWriter(tmp_path / "rows.arrow")
    started = time.process_time()
    for _ in range(4000):
        writer.write(batch)
    writer.close()
    # Half a second; going over all that wait for every one of them took minutes.
    assert time.process_time() - started < 15
    assert len(arrow_store.StoredExamples(tmp_path / "rows.arrow", ["rows"], max_tokens=10)) == 4000


DAMAGE = {
    "truncated": lambda folder: os.truncate(folder / "train.arrow", 1000),
    "a flipped byte": lambda folder: _flip(folder / "train.arrow"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 50),
    "a lost file": lambda folder: (folder / "train.arrow").unlink(),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_made_again(name: str, prepare: Any, write_jsonl: Any, tmp_path: Path) -> None:
    path = write_jsonl(ROWS[:50])
    first = prepare(path)
    (folder,) = [each for each in (tmp_path / "store" / "data").iterdir() if each.name != "hashes"]
    DAMAGE[name](folder)
    again = prepare(path)
    assert not again.report.from_cache and again.digest == first.digest
    assert prepare(path).report.from_cache
    assert not list((tmp_path / "store" / "data").glob(".building-*"))


def test_a_failed_build_leaves_nothing_behind(prepare: Any, write_jsonl: Any, tmp_path: Path) -> None:
    path = write_jsonl([*ROWS[:50], {**ROWS[0], "chosen": ""}])
    for _ in range(2):
        with pytest.raises(Exception, match="'chosen' is empty"):
            prepare(path)
    assert [each.name for each in (tmp_path / "store" / "data").iterdir() if each.name != "hashes"] == []


def test_runs_that_build_the_same_entry_at_once_agree(prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl(ROWS)
    with ThreadPoolExecutor(4) as pool:
        digests = {prepared.digest for prepared in pool.map(lambda _: prepare(path), range(4))}
    assert len(digests) == 1
    assert prepare(path).report.from_cache


_KILLED = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from chat_tokenizers import bpe, stops
from dpo_cli.data import cache
from dpo_cli.data.prepare import prepare_data
from dpo_cli.data.settings import DataSettings
import time
def slow(folder, original=cache._publish):
    print("written", flush=True)
    time.sleep(60)
cache._sync = slow
store = Path(sys.argv[2])
prepare_data(DataSettings(sys.argv[1]), bpe(), kind="pair", stop_token_ids=stops(bpe()), seed=0, store_dir=store)
"""


def test_a_run_killed_while_writing_leaves_no_entry(prepare: Any, write_jsonl: Any, tmp_path: Path) -> None:
    path = write_jsonl(ROWS[:50])
    store = tmp_path / "store"
    command = [sys.executable, "-c", _KILLED, path, str(store), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    left = [each.name for each in (store / "data").iterdir() if each.name != "hashes"]
    assert len(left) == 1 and left[0].startswith(".building-")
    assert not prepare(path).report.from_cache
    assert prepare(path).report.from_cache
    # What the killed run left is cleared once it is a day old.
    old = time.time() - 25 * 3600
    os.utime(store / "data" / left[0], (old, old))
    prepare(path, max_tokens=77)
    assert not (store / "data" / left[0]).exists()


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    first = cache.file_hash(path, tmp_path)
    opened: list[Path] = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened.append(self), original(self, *a, **k))[1])
    assert cache.file_hash(path, tmp_path) == first
    assert path not in opened
    path.write_text("two")
    os.utime(path, (1_000_000_001, 1_000_000_001))
    assert cache.file_hash(path, tmp_path) != first


def test_the_report_survives_json(prepare: Any, write_jsonl: Any) -> None:
    report = prepare(write_jsonl([*ROWS[:20], ROWS[3]]), eval_fraction=0.3).report
    assert DataReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Twenty times the rows cost a few megabytes, not twenty times the text."""
    peaks = []
    for count in (2_000, 40_000):
        path = tmp_path / f"{count}.json"
        row = {"prompt": "How many?\n", "chosen": "eggs " * 60, "rejected": "fox " * 60}
        path.write_text("[" + ",".join([json.dumps({**row, "prompt": f"{at}?\n"}) for at in range(count)]) + "]")
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            peaks.append(pool.apply(_peak_memory_while_reading, (str(path),)))
    assert peaks[1] - peaks[0] < 8e6  # the larger file has 28 MB


def _peak_memory_while_reading(path: str) -> int:
    import tracemalloc

    from dpo_cli.data.settings import row_settings
    from dpo_cli.data.sources import sources_of

    settings = row_settings(DataSettings(path), kind="pair", stop_token_ids=frozenset(), seed=0)
    (source,) = sources_of(path, split="train", subset=None, where="data.train")
    opened = [build.open_source(source, settings)]
    reports = [build.SourceReport(source.name, opened[0].format.name, 1.0)]
    tracemalloc.start()
    for _ in build._chunks(opened, reports, settings, 0, 0.0):
        pass
    return tracemalloc.get_traced_memory()[1]


def test_indexing_is_fast_and_copies_nothing(prepare: Any, write_jsonl: Any) -> None:
    train = prepare(write_jsonl(ROWS)).train
    start = time.process_time()
    for at in range(len(train)):
        train[at]
    assert len(train) / (time.process_time() - start) > 10_000
    example = train[0]
    assert example.prompt.base is not None and not example.prompt.flags.owndata
    assert [train[at].packed_tokens for at in range(50)] == train.sizes[:50].tolist()
    with pytest.raises(IndexError):
        train[len(train)]


_READ_AND_LIST_MODULES = """
import sys
from pathlib import Path
from dpo_cli.data.arrow_store import StoredExamples
examples = StoredExamples(Path(sys.argv[1]), ["rows.jsonl"], max_tokens=64)
print(len(examples), examples[0].packed_tokens, "pandas" in sys.modules)
"""


def test_what_is_stored_is_read_without_importing_pandas(prepare: Any, write_jsonl: Any, tmp_path: Path) -> None:
    train = prepare(write_jsonl(ROWS[:20])).train
    (stored,) = (tmp_path / "store").glob("data/*/train.arrow")
    command = [sys.executable, "-c", _READ_AND_LIST_MODULES, str(stored)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert told == ["20", str(train[0].packed_tokens), "False"]


@pytest.mark.parametrize(
    ("keys", "partners"),
    [
        ([1, 2], [1, 0]),
        ([1, 2, 3], [1, 2, 0]),
        ([1, 1, 2], [2, 2, 0]),
        ([1, 2, 1], [1, 2, 1]),
        ([2, 1, 1], [1, 0, 0]),
        ([7, 7, 8, 8, 9, 9], [2, 3, 4, 5, 0, 1]),
        ([1, 1, 2, 3, 3, 1], [2, 2, 3, 5, 0, 2]),
    ],
)
def test_a_partner_is_a_response_of_the_next_prompt_chosen_for_chosen_and_rejected_for_rejected(
    keys: list[int], partners: list[int]
) -> None:
    found = partners_with_other_prompts(np.array(keys, dtype=np.int64))
    assert found is not None and found.tolist() == partners


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_a_partner_never_has_the_same_prompt(keys: list[int]) -> None:
    found = partners_with_other_prompts(np.array(keys, dtype=np.int64))
    if len(set(keys)) == 1:
        assert found is None
    else:
        assert found is not None and all(keys[partner] != key for partner, key in zip(found, keys, strict=True))


_ORPHANS = """
import multiprocessing, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
def announce():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
if __name__ == "__main__":
    from chat_tokenizers import bpe, stops
    from dpo_cli.data.prepare import prepare_data
    from dpo_cli.data.settings import DataSettings
    threading.Thread(target=announce, daemon=True).start()
    data = DataSettings(sys.argv[1], workers=2)
    prepare_data(data, bpe(), kind="pair", stop_token_ids=stops(bpe()), seed=0, store_dir=Path(sys.argv[2]))
    time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed(write_jsonl: Any, tmp_path: Path) -> None:
    path = write_jsonl({**row, "prompt": f"{at} {row['prompt']}"} for at in range(60) for row in ROWS)
    script = tmp_path / "run.py"
    script.write_text(_ORPHANS)
    command = [sys.executable, str(script), path, str(tmp_path / "store"), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        time.sleep(5)  # they are tokenising now
        process.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its run"
        time.sleep(0.2)


def _runs(pid: int) -> bool:
    try:
        # A killed run's children are handed to the init process, which may leave them as zombies.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
