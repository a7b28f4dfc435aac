"""Rank 0 works, for hours if need be, while the others wait for what it hands over; before any process group exists.

A collective would strike its timeout meanwhile. The store that the launcher offers is asked in short intervals instead,
so that signals and the watch get their turn. The same store serves `init_process_group` later.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed.rendezvous import rendezvous

from dpo_cli.engine.environment import rank, world_size
from dpo_cli.errors import DpoError, RankFailed

T = TypeVar("T")
# Machines of one job may start minutes apart.
_CONNECT_TIMEOUT = timedelta(minutes=30)
_POLL_SECONDS = 0.2
_HEARD_SECONDS = 10.0
_count = itertools.count()


class MainRankFailed(RankFailed):
    """Rank 0 has failed, or needs no others, and said so; a rank that waited ends quietly, with the same exit code."""


def hand_over(work: Callable[[], str]) -> str:
    """What rank 0's `work` returns, on every rank; all of them must call this, in the same order.

    Raises what `work` raises on rank 0, and MainRankFailed on the others.
    """
    if world_size() == 1:
        return work()
    if rank() != 0:
        return receive()
    store()  # first, so that the others find it while rank 0 works
    try:
        value = work()
    except BaseException as error:
        tell_exit_code(error.exit_code if isinstance(error, DpoError) else 1)
        raise
    _tell({"value": value})
    return value


def receive() -> str:
    """A rank's part of `hand_over` when it is not rank 0."""
    key = _key()
    shared = store()
    try:
        while not shared.check([key]):
            time.sleep(_POLL_SECONDS)
        told = json.loads(shared.get(key))
    except RuntimeError as error:
        raise MainRankFailed(f"Rank 0 is gone: {str(error).splitlines()[0]}") from None
    if "exit_code" in told:
        shared.add(f"{key}/heard", 1)
        raise MainRankFailed("Rank 0 has ended.", exit_code=int(told["exit_code"]))
    return str(told["value"])


def tell_exit_code(exit_code: int) -> None:
    """Rank 0's part of `hand_over` when there is nothing to hand over.

    Returns when the others have heard of it: the launcher ends them as soon as rank 0 has left.
    """
    if world_size() == 1:
        return
    key = _tell({"exit_code": exit_code})
    deadline = time.monotonic() + _HEARD_SECONDS
    while store().add(f"{key}/heard", 0) < world_size() - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


@functools.cache
def store() -> Any:
    """The launcher's torch.distributed store, one connection a process. Raises DpoError when ranks find no other.

    Rank 0 serves it on MASTER_PORT unless the launcher does; a later `init_process_group`, with or without `store=`,
    finds it there instead of asking for the port again.
    """
    try:
        shared, _, _ = _while_listening(lambda: next(iter(rendezvous("env://", timeout=_CONNECT_TIMEOUT))))
    except (ValueError, RuntimeError) as error:
        raise DpoError(
            f"The {world_size()} ranks do not find each other: {str(error).splitlines()[0]}",
            where="MASTER_ADDR and MASTER_PORT",
            hint="the same launcher options on every machine, and an address that all of them can reach",
        ) from None
    return shared


def _tell(content: dict[str, object]) -> str:
    key = _key()
    store().set(key, json.dumps(content))
    return key


def _key() -> str:
    return f"dpo_cli/handed_over/{next(_count)}"


def _while_listening(work: Callable[[], T]) -> T:
    """Do blocking work aside, so that a signal is heard in this thread; abandoned when its handler raises."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
    if errors:
        raise errors[0]
    return results[0]
