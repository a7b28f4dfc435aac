"""Options, fixtures and settings that all tests share. Nothing heavy is imported: some tests need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch: on tiny tensors a second thread costs more than it brings, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that would reach for the hub fails at once instead of hanging or passing by luck.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whoever runs the tests, on whatever screen or build server, sees the same: what decides how output looks is set here.
os.environ["TERM"] = "xterm-256color"
for _decides in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_decides, None)
# A shell's background jobs ignore Ctrl-C, and so would every process that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-data",
        metavar="DIR",
        default=os.environ.get("DPO_REAL_DATA"),
        help="folder with gsm8k/, preferences/ and qwen2-tokenizer/; tests on real data are skipped without it",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _gpu_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


def _gpu_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder of real data; the test is skipped when none was named."""
    named = request.config.getoption("--real-data")
    if not named:
        pytest.skip("needs real data: pytest --real-data DIR, or DPO_REAL_DATA=DIR")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"--real-data {folder} is not a folder")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _store_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor fill the user's own store."""
    os.environ["DPO_STORE_DIR"] = str(tmp_path_factory.mktemp("store"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
