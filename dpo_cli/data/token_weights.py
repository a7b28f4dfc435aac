"""Per-token weights: more (or less) on the tokens in which the two responses differ.

Source: RLHF-V, arXiv:2312.00849 (dense DPO), as RLAIF-V's code computes it: a sequence match over token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np

from dpo_cli.data.example import FloatArray


def difference_weights(
    chosen: Sequence[int], rejected: Sequence[int], *, changed: float
) -> tuple[FloatArray, FloatArray]:
    """Weights beside each response's ids: `changed` in segments the other does not share, 1 elsewhere."""
    weights = tuple(np.full(len(ids), changed, dtype=np.float32) for ids in (chosen, rejected))
    # autojunk would call frequent tokens junk in responses of 200 tokens or more, and so change what "differs" means.
    for in_chosen, in_rejected, size in SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        weights[0][in_chosen : in_chosen + size] = 1.0
        weights[1][in_rejected : in_rejected + size] = 1.0
    return weights[0], weights[1]
