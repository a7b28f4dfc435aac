"""A signal ends a run wherever it is, and nobody on the way takes it for a failure of their own."""

from __future__ import annotations

import os
import signal

import pytest

from dpo_cli.errors import Interrupted
from dpo_cli.train.stop import StopRequest


def test_a_signal_passes_through_code_that_catches_every_exception() -> None:
    stop = StopRequest()
    with pytest.raises(Interrupted, match="SIGTERM"), stop.listening():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("taken for a failure of the library that was at work")


def test_a_deferred_signal_waits_until_the_work_is_saved(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    saved = False
    with pytest.raises(Interrupted, match="Step 3 is saved"), stop.listening(), stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        saved = True
        stop.check("Step 3 is saved.")
    assert saved
    assert "finishing this step" in capfd.readouterr().err


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
