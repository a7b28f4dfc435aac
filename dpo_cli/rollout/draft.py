"""Guesses at a response's next tokens, many tested in one forward pass: they decide how long it takes, and no more.

What is drawn at a position is a function of its logits and its random number, so a pass over guessed tokens tells what
would have been drawn after each. Guesses are kept up to the first that would not have been drawn, and what is drawn
there instead is kept too.
Source: Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", arXiv:2211.17192; with
randomness fixed beforehand its rule of acceptance is equality.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.policy.compatibility import rope_parameters, sliding_window

# Tokens of one row in one pass.
WIDEST = 64
# Logits of a pass, over all its tokens: beyond some hundred megabytes they are no longer forgotten beside the cache.
_LOGITS_AT_ONCE = 2**25
# What a pass costs besides its tokens, in tokens: on a GPU reading the weights and launching; on a CPU reading the
# weights, and between operations what that many weights' multiplications would take.
_PASS_ON_GPU = 256.0
_PASS_ON_CPU = 8.0
_WEIGHTS_BETWEEN = 2.0**23
# What is believed of guesses before any was tested: so many right, one wrong.
_RIGHT_BEFORE_ONE_WRONG = 9.0


def may_draft(model: PreTrainedModel) -> bool:
    """Whether a pass over guesses gives the model's own logits.

    Refused guesses leave gaps among the keys, which a sliding window would count; and longrope's angles depend on the
    longest position in the pass, guessed ones included.
    """
    config = model.config.get_text_config()
    longrope = any(rope.get("rope_type") == "longrope" for rope in rope_parameters(config))
    return sliding_window(config) is None and not longrope


class Width:
    """How many guesses a pass should test, from how many were right of late; a function of that alone, not of time."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        weights = sum(parameter.numel() for parameter in model.parameters())
        self._pass = _PASS_ON_GPU if model.device.type == "cuda" else _PASS_ON_CPU + _WEIGHTS_BETWEEN / weights
        self._logits = model.config.get_text_config().vocab_size
        self._right, self._wrong = _RIGHT_BEFORE_ONE_WRONG * rows, float(rows)

    def tested(self, right: int, wrong: int) -> None:
        """wrong: guesses that were refused first in their row; nothing is known of those after them."""
        self._right, self._wrong = self._right / 2 + right, self._wrong / 2 + wrong

    def best(self, rows: int, most: int, *, beside: int = 0) -> int:
        """Guesses a row, 0 to most, that give most tokens for the cost. beside: further tokens in the same pass."""
        most = min(most, WIDEST - 1, _LOGITS_AT_ONCE // (rows * self._logits) - 1)
        right = min((self._right + 1) / (self._right + self._wrong + 2), 0.99)
        tested = np.arange(1, max(most, 0) + 2)
        tokens = (1 - right**tested) / (1 - right)
        return int((tokens / (self._pass + beside + rows * tested)).argmax())


class Draft:
    """A text that each row is expected to repeat in parts.

    Guessed is what follows in it after the row's last three tokens, or its last two, where that is nearest to the place
    that was expected; or else what stands at that place, as if the last token had replaced one.

    width: how much of it to guess at a time.
    """

    # Stands before a text and before a response, so that their first tokens have neighbours.
    NONE = -1

    def __init__(self, texts: Sequence[NDArray[np.int32]], width: Width, device: torch.device) -> None:
        self.width = width
        self.longest = max(1, *(len(text) for text in texts))
        padded = np.full((len(texts), 2 + self.longest + WIDEST), self.NONE, dtype=np.int64)
        for row, text in enumerate(texts):
            padded[row, 2 : 2 + len(text)] = text
        self._texts = torch.from_numpy(padded).to(device)
        self._place = torch.full((len(texts),), 2, device=device)
        self._steps = torch.arange(WIDEST, device=device)
        # What stands after each three tokens, as a place.
        self._after = torch.arange(3, self.longest + 3, device=device)

    def select(self, rows: Tensor) -> None:
        self._texts, self._place = self._texts[rows], self._place[rows]

    def guess(self, count: int) -> Tensor:
        """(rows, count) ids; where the text has no more of them, any. count: at most WIDEST."""
        return self._texts.gather(1, self._place[:, None] + self._steps[:count]).clamp_(min=0)

    def follow(self, last: Tensor, count: Tensor) -> None:
        """last: (rows, 3) the latest tokens of each response. count: (rows,) how many of its tokens are new."""
        end = self.longest + 2
        expected = (self._place + count).clamp_(max=end)
        same = self._texts[:, :end].unfold(1, 3, 1) == last[:, None]
        distance = (self._after - expected[:, None]).abs_()
        # Three tokens before two, and two before none.
        distance += end * ~same[..., 0]
        nearest, found = distance.masked_fill_(~(same[..., 1] & same[..., 2]), 3 * end).min(1)
        self._place = torch.where(nearest < 3 * end, self._after[found], expected)
