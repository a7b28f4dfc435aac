from __future__ import annotations

import pytest

from dpo_cli.policy import products


@pytest.fixture(autouse=True)
def kernels_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own, on every processor: made in float32 and rounded, numbers depend much less on their neighbours."""
    monkeypatch.setattr(products, "_has_bfloat16", lambda: True)
