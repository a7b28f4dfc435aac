"""`python -m dpo_cli.engine.torchrun N FOLDER COMMAND...`: torch.distributed.run without its tracebacks, for `launch`.

The ranks write to the same screen as torchrun does, so its noise has to be stopped at the source.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from dpo_cli.engine.environment import MARK
from dpo_cli.engine.outcome import RankFiles
from dpo_cli.engine.watch import Watch


def main(words: list[str]) -> int:
    """Start N workers, wait for them; 0 when all ended well."""
    workers, run_dir, *command = words
    Watch().start()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.CRITICAL)
    options = [
        "--nnodes=1",
        f"--nproc-per-node={workers}",
        "--max-restarts=0",
        # The system picks the port, and the name of this machine, which may not resolve, is not asked for.
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--rdzv-conf=is_host=true",
        "--local-addr=127.0.0.1",
        f"--rdzv-id={os.environ[MARK]}",
        "--no-python",
    ]
    try:
        run(parse_args([*options, *command]))
    except ChildFailedError as failed:
        RankFiles(Path(run_dir)).write_exits({rank: failure.exitcode for rank, failure in failed.failures.items()})
        return 1
    except (SignalException, KeyboardInterrupt):
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
