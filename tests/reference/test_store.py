"""The store keeps what was scored through kills, damage, full disks and company, and finds it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dpo_cli.errors import StoreError
from dpo_cli.reference.keys import key_array, key_bytes, prompt_key, response_key, response_keys
from dpo_cli.reference.shards import write_shard
from dpo_cli.reference.store import ReferenceStore


def _entries(count: int, *, seed: int = 0) -> tuple[list[bytes], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    keys = key_bytes(np.frombuffer(random.bytes(16 * count), dtype="S16"))
    return keys, [-random.random(random.integers(1, 30)).astype(np.float32) for _ in range(count)]


def _filled(folder: Path, keys: list[bytes], logps: list[np.ndarray]) -> ReferenceStore:
    store = ReferenceStore(folder)
    with store.writer() as writer:
        writer.add(keys, logps)
    return store


def _same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


# ---- keys


def test_no_token_can_move_between_prompt_and_response_without_changing_the_key() -> None:
    ids = np.arange(6, dtype=np.int32)
    assert len({response_key(ids[:cut], ids[cut:]) for cut in range(1, 6)}) == 5


def test_a_key_is_of_the_ids_not_of_their_dtype_or_memory_layout() -> None:
    prompt, response = np.arange(4, dtype=np.int32), np.arange(8, dtype=np.int32)
    assert response_key(prompt.astype(np.int64), np.arange(16, dtype=np.int32)[::2] // 2) == response_key(
        prompt, response
    )


def test_hashing_a_prompt_once_for_many_responses_gives_the_keys_of_hashing_it_each_time() -> None:
    prompt = np.arange(5, dtype=np.int32)
    responses = [np.arange(n, dtype=np.int32) for n in (1, 2, 7)]
    assert response_keys(prompt, responses) == [response_key(prompt, response) for response in responses]
    assert prompt_key(prompt) not in response_keys(prompt, responses)


def test_keys_that_end_in_zero_bytes_stay_apart() -> None:
    keys = [b"a" * 16, b"a" * 15 + b"\0", b"a" * 14 + b"\0\0", b"\0" * 16]
    assert key_bytes(np.sort(key_array(keys))) == sorted(keys)


# ---- reading and writing


def test_what_was_written_is_read_back_bit_for_bit_in_any_order(tmp_path: Path) -> None:
    keys, logps = _entries(500)
    _filled(tmp_path / "s", keys, logps)
    store = ReferenceStore(tmp_path / "s")
    order = np.random.default_rng(1).permutation(500)
    assert _same(store.read(key_array([keys[i] for i in order])), [logps[i] for i in order])


_READ_AND_LIST_MODULES = """
import sys
from pathlib import Path
from dpo_cli.reference.keys import key_array
from dpo_cli.reference.store import ReferenceStore
(found,) = ReferenceStore(Path(sys.argv[1])).read(key_array([bytes.fromhex(sys.argv[2])]))
print(len(found), "pandas" in sys.modules)
"""


def test_entries_are_read_without_importing_pandas(tmp_path: Path) -> None:
    keys, logps = _entries(5)
    _filled(tmp_path / "s", keys, logps)
    command = [sys.executable, "-c", _READ_AND_LIST_MODULES, str(tmp_path / "s"), keys[0].hex()]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert told == [str(len(logps[0])), "False"]


def test_keys_ending_in_zero_bytes_are_found(tmp_path: Path) -> None:
    keys = [b"a" * 15 + b"\0", b"\0" * 16, b"a" * 16]
    logps = [np.full(3, -n, np.float32) for n in range(3)]
    store = _filled(tmp_path / "s", keys, logps)
    assert _same(store.read(key_array(keys)), logps)


def test_float64_log_probs_keep_their_digits(tmp_path: Path) -> None:
    logps = [np.array([-1 / 3, -2 / 3])]
    assert _same(_filled(tmp_path / "s", [b"k" * 16], logps).read(key_array([b"k" * 16])), logps)


def test_missing_names_exactly_what_is_not_there(tmp_path: Path) -> None:
    keys, logps = _entries(100)
    store = _filled(tmp_path / "s", keys[:60], logps[:60])
    assert store.missing(key_array(keys)).tolist() == [False] * 60 + [True] * 40
    with pytest.raises(KeyError, match="40 of 100"):
        store.read(key_array(keys))


def test_an_empty_store_lacks_everything_and_reads_nothing(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "s")
    assert store.missing(key_array([b"k" * 16])).all()
    assert store.read(key_array([])) == []


def test_another_process_finds_them_only_once_they_are_whole(tmp_path: Path) -> None:
    keys, logps = _entries(10)
    reader = ReferenceStore(tmp_path / "s")
    writer = ReferenceStore(tmp_path / "s").writer()
    writer.add(keys, logps)
    reader.refresh()
    assert len(reader) == 0
    writer.flush()
    reader.refresh()
    assert len(reader) == 10


def test_a_writer_flushes_on_time_on_size_and_when_an_exception_passes(tmp_path: Path) -> None:
    keys, logps = _entries(4)
    folder = tmp_path / "s"
    store = ReferenceStore(folder)

    def fail_after_one() -> None:
        with store.writer(flush_seconds=3600, flush_tokens=10**9) as writer:
            writer.add(keys[:1], logps[:1])
            assert not list(folder.glob("*.arrow"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_one()
    assert len(store) == 1
    with store.writer(flush_seconds=0) as writer:
        writer.add(keys[1:2], logps[1:2])
        assert len(list(folder.glob("*.arrow"))) == 2
    with store.writer(flush_tokens=1) as writer:
        writer.add(keys[2:3], logps[2:3])
        assert len(list(folder.glob("*.arrow"))) == 3


def test_a_response_scored_by_two_runs_at_once_has_one_value_for_everybody(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    early, late = ReferenceStore(folder), ReferenceStore(folder)
    write_shard(folder, [b"k" * 16], [np.array([-1.0], np.float32)])
    late.refresh()
    write_shard(folder, [b"k" * 16, b"l" * 16], [np.array([-2.0], np.float32)] * 2)
    for store in (early, late, ReferenceStore(folder)):
        store.refresh()
        assert store.read(key_array([b"k" * 16, b"l" * 16])) == [-1.0, -2.0]


def test_an_older_shard_that_becomes_visible_later_counts_as_it_would_have_from_the_start(tmp_path: Path) -> None:
    """Clocks of machines differ, and network file systems show new files late."""
    folder, key = tmp_path / "s", b"k" * 16
    reader = ReferenceStore(folder)
    hidden = write_shard(tmp_path, [key], [np.array([-1.0], np.float32)])
    write_shard(folder, [key], [np.array([-2.0], np.float32)])
    reader.refresh()
    hidden.rename(folder / hidden.name)
    reader.refresh()
    assert reader.read(key_array([key])) == ReferenceStore(folder).read(key_array([key])) == [-1.0]


def test_the_index_finds_200_000_responses_within_seconds_and_24_bytes_each(tmp_path: Path) -> None:
    count = 200_000
    keys = key_bytes(np.frombuffer(np.random.default_rng(0).bytes(16 * count), dtype="S16"))
    values = -np.ones(2 * count, np.float32)
    write_shard(tmp_path, keys, np.split(values, count))
    began = time.perf_counter()
    store = ReferenceStore(tmp_path)
    assert not store.missing(key_array(keys)).any()
    assert len(store.read(key_array(keys[::10]))) == count // 10
    assert time.perf_counter() - began < 10
    assert store._keys.nbytes + store._shard.nbytes + store._row.nbytes == 24 * count


# ---- what goes wrong


@pytest.mark.parametrize("position", [0, 9, 0.3, 0.6, 0.9, -1])
def test_a_flipped_byte_anywhere_in_a_shard_is_noticed_and_costs_only_that_shard(
    tmp_path: Path, position: float
) -> None:
    keys, logps = _entries(40)
    folder = tmp_path / "s"
    _filled(folder, keys[:20], logps[:20])
    _filled(folder, keys[20:], logps[20:])
    broken = sorted(folder.glob("*.arrow"))[0]
    content = bytearray(broken.read_bytes())
    content[int(position * len(content)) if isinstance(position, float) else position] ^= 16
    broken.write_bytes(content)
    store = ReferenceStore(folder)
    assert store.missing(key_array(keys)).tolist() == [True] * 20 + [False] * 20
    assert len(store.damaged) == 1
    assert broken.name in store.damaged[0]
    assert broken.with_name(broken.name + ".damaged").exists()
    assert not ReferenceStore(folder).damaged  # set aside once, not reported for ever


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_a_truncated_shard_is_set_aside(tmp_path: Path, keep: float) -> None:
    keys, logps = _entries(40)
    store = _filled(tmp_path / "s", keys, logps)
    shard = next(store.folder.glob("*.arrow"))
    os.truncate(shard, int(keep * shard.stat().st_size) if isinstance(keep, float) else keep)
    again = ReferenceStore(store.folder)
    assert len(again) == 0
    assert len(again.damaged) == 1


def test_leftovers_of_killed_writers_go_when_no_writer_can_still_own_them(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    old, fresh = folder / "a.tmp-1-00", folder / "b.tmp-2-00"
    old.touch()
    fresh.touch()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    ReferenceStore(folder)
    assert not old.exists()
    assert fresh.exists()


def test_a_full_disk_is_told_and_costs_nothing_that_was_written_before(small_disk: Path) -> None:
    keys, logps = _entries(40)
    store = _filled(small_disk / "s", keys, logps)
    with pytest.raises(StoreError, match=r"cannot be written.*No space left"), store.writer() as writer:
        writer.add([b"n" * 16], [np.zeros(3_000_000, np.float32)])
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".arrow"]
    assert _same(ReferenceStore(store.folder).read(key_array(keys)), logps)


_WRITE = """
import sys, numpy as np
from pathlib import Path
from dpo_cli.reference.store import ReferenceStore
folder, first, count, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
import time
with ReferenceStore(folder).writer(flush_seconds=0) as writer:
    for number in range(first, first + count):
        writer.add([number.to_bytes(16, "big")], [np.full(1 + number % 5000, -number, np.float32)])
        print(number, flush=True)
        time.sleep(pause)
"""


def _writer(folder: Path, first: int, count: int, *, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITE, str(folder), str(first), str(count), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    writers = [_writer(tmp_path / "s", first, 60) for first in (0, 40)]
    for process in writers:
        process.communicate()
        assert process.returncode == 0
    store = ReferenceStore(tmp_path / "s")
    assert len(store) == 100
    for number, logps in enumerate(store.read(key_array([n.to_bytes(16, "big") for n in range(100)]))):
        assert (logps == -number).all()


def test_kill_minus_nine_at_any_moment_leaves_every_finished_entry(tmp_path: Path) -> None:
    process = _writer(tmp_path / "s", 0, 100_000)
    assert process.stdout is not None
    for _ in range(50):
        finished = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    finished = int(([*process.stdout] or [str(finished)])[-1])
    process.wait()
    store = ReferenceStore(tmp_path / "s")
    assert not store.damaged
    for number, logps in enumerate(store.read(key_array([n.to_bytes(16, "big") for n in range(finished + 1)]))):
        assert len(logps) == 1 + number % 5000
        assert (logps == -number).all()
