"""Chunks through worker processes, in order, with a bounded number in flight."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from dpo_cli.data.chunk import Chunk, ChunkResult, Tokeniser
from dpo_cli.errors import DataError

# Starting a worker imports transformers, about two seconds; less text than this is tokenised sooner in-process.
_BYTES_WORTH_WORKERS = 12 << 20
_MOST_WORKERS = 8

_tokeniser: Tokeniser | None = None


def worker_count(asked: int | None, *, bytes_on_disk: int, tokenizer: object) -> int:
    """How many processes tokenise; 1 is this one. asked: data.workers, None to judge by the data's size."""
    if type(tokenizer).__module__.startswith("transformers_modules"):
        return 1  # remote code lives in modules that a fresh process cannot import
    if asked is not None:
        return max(1, asked)
    if bytes_on_disk < _BYTES_WORTH_WORKERS:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def process_chunks(chunks: Iterable[Chunk], tokeniser: Tokeniser, *, workers: int) -> Iterator[ChunkResult]:
    """Results in the order of the chunks, whatever the number of workers.

    Raises DataError when a worker dies, which is nearly always the machine running out of memory.
    """
    if workers == 1:
        yield from map(tokeniser.process, chunks)
        return
    # Forking a process that runs threads (torch, tokenizers) may deadlock the child; a fresh interpreter cannot.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(tokeniser,))
    waiting: deque[Future[ChunkResult]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "A process that tokenises the data died; the machine may have run out of memory.",
            where="data.workers",
            hint="data.workers=1",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(tokeniser: Tokeniser) -> None:
    global _tokeniser
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The workers are the parallelism; threads inside each would only fight over the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokeniser = tokeniser


def _end_with_parent() -> None:
    """A worker waits for work for ever, also when the run that would send it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: Chunk) -> ChunkResult:
    assert _tokeniser is not None, "the pool's initializer runs first"
    return _tokeniser.process(chunk)
