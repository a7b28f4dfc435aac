"""TRL's side of the benchmarks: its DPOTrainer on a CPU, without logs, bars and saving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trl.trainer.utils
from datasets import Dataset
from step_cases import Pair
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer


class TokenisedTrainer(DPOTrainer):
    """Its rows are token ids already."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def project_responses_only() -> None:
    """Have TRL multiply the positions of responses with the vocabulary, as it does on CUDA, instead of all of them."""
    # Consulted for this one thing there.
    trl.trainer.utils._use_triton = lambda _: True


def arguments(folder: str, **settings: Any) -> DPOConfig:
    """What all of TRL's sides have in common, and what one of them has besides."""
    common: dict[str, Any] = {
        "output_dir": folder, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "optim": "adamw_torch_fused",
        "gradient_checkpointing": False, "use_cpu": True, "bf16": False, "max_length": None,
        "precompute_ref_log_probs": True, "logging_strategy": "no", "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return DPOConfig(**(common | settings))


def dataset_of(pairs: Sequence[Pair], *, scored: bool) -> Dataset:
    """scored: with the reference's log-probs."""
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
        if scored:
            row |= {"ref_chosen_logps": pair.reference_chosen, "ref_rejected_logps": pair.reference_rejected}
        rows.append(row)
    return Dataset.from_list(rows)


def padding_tokenizer() -> PreTrainedTokenizerFast:
    """It has nothing to tokenise."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
