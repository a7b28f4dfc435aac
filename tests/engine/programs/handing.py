"""A rank that waits for rank 0 without a process group, then makes one: `handing.py RUN_DIR store|env|fails`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dpo_cli.engine.rendezvous import MainRankFailed, hand_over, store
from dpo_cli.errors import DataError

RUN_DIR, MODE = Path(sys.argv[1]), sys.argv[2]
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def work() -> str:
    time.sleep(1.5)
    if MODE == "fails":
        raise DataError("There are no pairs.")
    return f"made by rank {RANK}"


try:
    first, second = hand_over(work), hand_over(lambda: "and again")
except DataError as error:
    (RUN_DIR / "0").write_text(f"{error} {error.exit_code}")
    raise SystemExit(error.exit_code) from None
except MainRankFailed as error:
    (RUN_DIR / "1").write_text(f"{error} {error.exit_code}")
    raise SystemExit(error.exit_code) from None
if MODE == "store":
    dist.init_process_group("gloo", store=store(), rank=RANK, world_size=SIZE)
else:
    dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
(RUN_DIR / str(RANK)).write_text(f"{first} {second} {total.item():.0f}")
dist.barrier()
sys.stdout.flush()
os._exit(0)
