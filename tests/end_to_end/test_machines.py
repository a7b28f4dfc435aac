"""Two machines train what one does: over loopback, between two network namespaces, and from a hostfile."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Workplace, assert_same_weights
from .test_distributed import assert_close_runs, comparable
from .test_launched import exit_codes, under

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
ZERO3 = ["hardware=deepspeed_zero3", "hardware.device=cpu", "max_steps=6"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def torchrun(node: int, *, address: str, port: int) -> list[str]:
    """A rank of its own on this of two machines."""
    return [
        str(BIN / "torchrun"), "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1", f"--master-addr={address}",
        f"--master-port={port}", "-m", "dpo_cli",
    ]  # fmt: skip


def train_on(workplace: Workplace, *launchers: list[str], **environment: str) -> list[str]:
    """One launcher a machine, all at once; what each has printed."""
    words = [*workplace.defaults, *ZERO3, "run_dir=two"]
    nodes = [
        subprocess.Popen(
            [*launcher, *words], cwd=workplace.folder, env={**workplace.environment, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for launcher in launchers
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=600)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    assert [node.returncode for node in nodes] == [0] * len(nodes), outputs
    assert exit_codes(workplace.folder / "two") == [0, 0]
    assert [path.parent.name for path in workplace.folder.glob("*/metrics.jsonl")].count("two") == 1
    return outputs


def assert_as_on_one_machine(workplace: Workplace) -> None:
    """The same two ranks under one torchrun give the same run, to the bit."""
    done = under(workplace, "torchrun", *workplace.defaults, *ZERO3, "run_dir=one", "store_dir=store_one", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert comparable(workplace.metrics("one")) == comparable(workplace.metrics("two"))
    assert_same_weights(workplace.final_weights("one"), workplace.final_weights("two"))


def test_two_launchers_that_meet_over_loopback_train_what_one_process_trains(workplace: Workplace) -> None:
    port = free_port()
    outputs = train_on(workplace, *(torchrun(node, address="127.0.0.1", port=port) for node in (0, 1)))
    assert "2 ranks" in outputs[0]
    assert workplace.train("max_steps=6", "run_dir=one", "store_dir=store_one").returncode == 0
    assert_close_runs(workplace, "one", "two")


@pytest.fixture
def namespaces() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces and the address of each, with nothing but a cable between them."""
    mark = uuid.uuid4().hex[:6]
    nodes = [(f"dpo-{mark}-{node}", f"10.231.77.{node + 1}") for node in (0, 1)]
    cable = [f"dpo{mark}{node}" for node in (0, 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        try:
            for name, _ in nodes:
                ip("netns", "add", name)
            ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
            for (name, address), end in zip(nodes, cable, strict=True):
                ip("link", "set", end, "netns", name, "name", "dpo0")
                ip("-n", name, "address", "add", f"{address}/24", "dev", "dpo0")
                for device in ("lo", "dpo0"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"network namespaces cannot be made here: {told.strip()}")
        yield nodes
    finally:
        # The cable goes with the namespaces, unless it was not yet laid into them.
        for words in (*(["netns", "delete", name] for name, _ in nodes), ["link", "delete", cable[0]]):
            subprocess.run(["ip", *words], check=False, capture_output=True)


def test_two_machines_on_a_network_of_their_own_train_what_one_does(
    workplace: Workplace, namespaces: list[tuple[str, str]]
) -> None:
    (_, address), port = namespaces[0], free_port()
    launchers = [
        ["ip", "netns", "exec", name, *torchrun(node, address=address, port=port)]
        for node, (name, _) in enumerate(namespaces)
    ]
    outputs = train_on(workplace, *launchers, GLOO_SOCKET_IFNAME="dpo0")
    assert "2 ranks" in outputs[0]
    assert_as_on_one_machine(workplace)


def test_machines_of_a_hostfile_train_what_one_does(workplace: Workplace) -> None:
    """Two names of this machine, as DeepSpeed takes a name twice for a mistake."""
    (workplace.folder / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port = free_port()
    launchers = [
        [
            str(BIN / "deepspeed"), "--no_ssh", "--hostfile", "hosts", "--node_rank", str(node), "--master_addr",
            "127.0.0.1", "--master_port", str(port), "--module", "dpo_cli",
        ]
        for node in (0, 1)
    ]  # fmt: skip
    outputs = train_on(workplace, *launchers, DS_ACCELERATOR="cpu", PATH=f"{BIN}:{os.environ['PATH']}")
    assert "2 ranks" in outputs[0]
    assert_as_on_one_machine(workplace)
