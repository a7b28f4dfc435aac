"""One rank that does what the command line says of it: `rank.py RUN_DIR 0:wait 1:bug`; what is not named returns."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from dpo_cli.engine.rank import run_as_rank
from dpo_cli.engine.watch import Watch
from dpo_cli.errors import Interrupted, NonFiniteError
from dpo_cli.train.stop import StopRequest

RUN_DIR = Path(sys.argv[1])
RANK = int(os.environ["RANK"])
STOP = StopRequest()


def stop() -> None:
    """What the training loop does: the flag is seen between steps, and saving takes its time."""
    with STOP.deferred():
        (RUN_DIR / f"waiting-{RANK}").touch()
        while not STOP.requested:
            time.sleep(0.02)
        time.sleep(0.3)
        (RUN_DIR / f"saved-{RANK}").touch()
    raise Interrupted(f"Stopped by {STOP.requested}. Step 3 is saved.", hint="dpo-train resume=here")


def wait_for_peer(seconds: float) -> None:
    """Until both ranks have begun, and so long after it."""
    peer = RUN_DIR / "ranks" / f"rank-{1 - RANK:05}.json"
    while not peer.exists():
        time.sleep(0.01)
    time.sleep(seconds)


def deaf() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    (RUN_DIR / f"waiting-{RANK}").touch()
    time.sleep(60)


def die() -> None:
    """Once the other rank is at work: before, nobody is there to tell of it."""
    wait_for_peer(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def bug() -> None:
    raise ValueError("seven is not a tensor")


def broken_connection() -> None:
    """What a collective does when a peer has gone: it raises, at once, something that explains nothing."""
    wait_for_peer(0.7)
    raise RuntimeError("Connection closed by peer")


def not_finite() -> None:
    raise NonFiniteError("The loss of step 7 is not finite.", hint="optimizer.lr=1e-7")


def body() -> None:
    print(f"rank {RANK} speaks", flush=True)
    chosen = dict(word.split(":") for word in sys.argv[2:])
    name = chosen.get(str(RANK), chosen.get("all"))
    with STOP.listening():
        if name is not None:
            {"wait": stop, "deaf": deaf, "die": die, "bug": bug, "broken_connection": broken_connection,
             "not_finite": not_finite}[name]()  # fmt: skip


watch = Watch()
watch.start()
run_as_rank(body, run_dir=RUN_DIR, watch=watch, show=lambda failure: print(failure.as_error(), file=sys.stderr))
