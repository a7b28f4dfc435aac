"""The one scoring function: a packed row in, per-token log-probs out, for reference and policy alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.batch.layout import PackedRow, PromptWithResponses, pack, padded
from dpo_cli.losses.types import Statistic
from dpo_cli.policy.attention import packing
from dpo_cli.policy.attention_routes import PLAIN, AttentionRoute
from dpo_cli.policy.gated import teach_gated_networks
from dpo_cli.policy.head import LogitTransform, TokenScores, install_scoring_head
from dpo_cli.policy.norms import teach_norms
from dpo_cli.policy.products import keep_few_kernels, teach_linear_layers
from dpo_cli.policy.scored_rows import spare_unscored_rows


class PackedModel(nn.Module):
    """A causal language model seen through packed rows.

    model: a `...ForCausalLM` loaded with attn_implementation="packed". Its output head learns to score, and still
        answers plain calls, so the same object generates text.
    attention: how rows are attended to.
    pad_rows_to: rows are padded to a multiple of so many tokens.
    chunk_tokens: response tokens the head takes at a time (None: chosen by the vocabulary's size).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: AttentionRoute = PLAIN,
        pad_rows_to: int = 1,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        spare_unscored_rows(model.get_decoder())
        teach_gated_networks(model)
        self.attention = attention
        self.pad_rows_to = pad_rows_to
        head = model.get_output_embeddings()
        install_scoring_head(head, LogitTransform.of(model.config), chunk_tokens=chunk_tokens)
        if self.device.type == "cpu":
            keep_few_kernels(model.dtype)
            teach_linear_layers(model, but=head)
            teach_norms(model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, row: PackedRow, statistics: frozenset[Statistic] = frozenset()) -> TokenScores:
        """Score every response token of the row, in the order of `row.targets`: each (R,).

        statistics: what to tell of each token's distribution beside the target's log-prob; each costs a little time.
        """
        row = padded(row, self.pad_rows_to).to(self.device)
        plan = self.attention.plan_row(row, self.device)
        with packing():
            hidden: Tensor = self.model.get_decoder()(
                input_ids=row.input_ids[None],
                # Without one, transformers would look whether positions restart, and the host would wait for that.
                attention_mask=torch.ones_like(row.input_ids[None], dtype=torch.bool),
                position_ids=row.position_ids[None],
                use_cache=False,
                segments=plan,
            ).last_hidden_state
        predictors = hidden[0].index_select(0, row.predictors)
        scores: TokenScores = self.model.get_output_embeddings()(predictors, targets=row.targets, statistics=statistics)
        return scores


@torch.no_grad()
def score_examples(packed: nn.Module, examples: Sequence[PromptWithResponses]) -> list[list[NDArray[np.float32]]]:
    """Per example and response, the log-prob of each of its tokens: (tokens,) in nats, from one forward pass."""
    row = pack(examples)
    logps = packed(row).logps.cpu().numpy()
    lengths = [len(response) for example in examples for response in example.responses]
    parts = iter(np.split(logps, np.cumsum(lengths)[:-1]))
    return [[next(parts) for _ in example.responses] for example in examples]
