"""What TRL, LLaMA-Factory and axolotl call things, and what each takes for granted where a file says nothing.

Names are brought to those of transformers' TrainingArguments and TRL's DPOConfig, which the first two share. Defaults
are those of TRL 1.16, and of LLaMA-Factory's hparams/ and axolotl's utils/schemas/ at the end of 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dialect:
    """name: as people know it. marks: keys that only its files have. renamed: its keys by our common names.

    defaults: of the common names, where a file does not set them.
    """

    name: str
    marks: frozenset[str]
    renamed: Mapping[str, str]
    defaults: Mapping[str, Any]


_TRAINING_ARGUMENTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "save_steps": 500,
    "eval_strategy": "no",
    "seed": 42,
    "beta": 0.1,
}

TRL = Dialect(
    "TRL",
    frozenset({"dataset_name", "loss_type", "use_peft", "dataset_train_split", "precompute_ref_log_probs"}),
    {"torch_dtype": "dtype"},
    _TRAINING_ARGUMENTS
    | {
        "learning_rate": 1e-6,
        "warmup_steps": 0,
        "max_length": 1024,
        "gradient_checkpointing": True,
        "logging_steps": 10,
        "loss_type": "sigmoid",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    },
)
LLAMA_FACTORY = Dialect(
    "LLaMA-Factory",
    frozenset({"stage", "finetuning_type", "cutoff_len", "pref_loss", "pref_beta", "template"}),
    {
        "cutoff_len": "max_length",
        "pref_loss": "loss_type",
        "pref_beta": "beta",
        "pref_ftx": "nll_alpha",
        "dpo_label_smoothing": "label_smoothing",
        "kto_chosen_weight": "desirable_weight",
        "kto_rejected_weight": "undesirable_weight",
        "lora_rank": "lora_r",
        "lora_target": "lora_target_modules",
        "preprocessing_num_workers": "dataset_num_proc",
        "adapter_name_or_path": "sft_adapter",
        "val_size": "held_out_share",
    },
    _TRAINING_ARGUMENTS
    | {
        "learning_rate": 5e-5,
        "warmup_steps": 0,
        "max_length": 2048,
        "gradient_checkpointing": True,
        "loss_type": "sigmoid",
        "finetuning_type": "lora",
        "lora_r": 8,
        "lora_target_modules": "all",
        "simpo_gamma": 0.5,
    },
)
AXOLOTL = Dialect(
    "axolotl",
    frozenset({"base_model", "rl", "micro_batch_size", "sequence_len", "datasets"}),
    {
        "base_model": "model_name_or_path",
        "revision_of_model": "model_revision",
        "micro_batch_size": "per_device_train_batch_size",
        "num_epochs": "num_train_epochs",
        "lr_scheduler": "lr_scheduler_type",
        "optimizer": "optim",
        "sequence_len": "max_length",
        "rl": "loss_type",
        "rl_beta": "beta",
        "dpo_beta": "beta",
        "dpo_label_smoothing": "label_smoothing",
        "dpo_use_weighting": "use_weighting",
        "rpo_alpha": "nll_alpha",
        "cpo_alpha": "nll_alpha",
        "kto_desirable_weight": "desirable_weight",
        "kto_undesirable_weight": "undesirable_weight",
        "dataset_processes": "dataset_num_proc",
        "lora_model_dir": "sft_adapter",
        "val_set_size": "held_out_share",
    },
    _TRAINING_ARGUMENTS
    | {
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "max_length": 512,
        "gradient_checkpointing": False,
        # Evaluations follow from evals_per_epoch and eval_steps there.
        "eval_strategy": "steps",
    },
)
DIALECTS = (TRL, LLAMA_FACTORY, AXOLOTL)

# Means nothing here, or is done in any case: left out without a word.
NEEDLESS = frozenset(
    """
    auto_find_batch_size bf16 bf16_full_eval bfloat16 config_name dataloader_drop_last dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_prepared_path
    ddp_find_unused_parameters ddp_timeout debug device_map disable_dropout do_eval do_train eval_batch_size
    eval_sample_packing flash_attention flash_attn fsdp_config gradient_checkpointing_kwargs group_by_length
    include_tokens_per_second is_llama_derived_model local_rank log_level logging_dir logging_strategy low_cpu_mem_usage
    max_concurrent_saves model_type overwrite_cache overwrite_output_dir pad_to_sequence_len padding_free
    per_device_eval_batch_size plot_loss precompute_ref_batch_size precompute_ref_log_probs remove_unused_columns
    report_to run_name sample_packing save_only_model save_safetensors save_strategy sdp_attention special_tokens
    stage strict tf32 tokenizer_name_or_path tokenizer_type train_on_inputs use_cache use_fast_tokenizer
    use_liger_kernel use_reentrant wandb_entity wandb_log_model wandb_name wandb_project wandb_watch xformers_attention
    attn_implementation dtype output_dir_suffix finetuning_type use_peft adapter eval_strategy
    """.split()  # noqa: SIM905
)
# Not to be had here, with what there is instead.
LEFT_OUT = {
    "load_in_4bit": "weights are not quantised here; bfloat16 with adapters, or ZeRO-3, saves memory (docs/memory.md)",
    "load_in_8bit": "weights are not quantised here; bfloat16 with adapters, or ZeRO-3, saves memory (docs/memory.md)",
    "quantization_bit": "weights are not quantised here; bfloat16 with adapters saves memory (docs/memory.md)",
    "fp16": "bfloat16 is trained in; model.dtype=float16 is there for GPUs that know no other",
    "lora_dropout": "adapters are trained without dropout: scores would be compared with noise",
    "use_rslora": "there is the scale alpha / rank alone: model.lora.alpha = alpha * sqrt(rank) is the same number",
    "use_dora": "there is plain LoRA alone",
    "max_prompt_length": "there is one limit for prompt and response, data.max_tokens",
    "truncation_mode": "longer rows are dropped and counted; data.on_long=truncate cuts them",
    "max_samples": "data.train={path: FILE, weight: SHARE} takes a share of a file's rows",
    "template": "the tokenizer's own chat template is used",
    "chat_template": "the tokenizer's own chat template is used",
    "warmup_ratio": "warm-up is counted in steps: optimizer.warmup_steps",
    "sync_ref_model": "a hard update is model.reference_sync_steps=N; there is no soft one (docs/losses.md)",
    "pref_bco_weight": "loss=mix has both losses",
    "hub_model_id": "dpo-export RUN --push OWNER/NAME",
    "push_to_hub": "dpo-export RUN --push OWNER/NAME",
    "hub_token": "hf auth login; a token has no place in a file",
    "evals_per_epoch": "evaluations are counted in steps: eval_every",
    "saves_per_epoch": "checkpoints are counted in steps: save_every",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "resume_from_checkpoint": "dpo-train resume=RUN",
    "load_best_model_at_end": "the last step is exported; dpo-export RUN --step N exports another",
    "early_stopping_patience": "health.stop_on=[...] ends a run on a finding (docs/health.md)",
}
# By TRL's name: ours, and parameters that make the numbers the same.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {}),
    "dpo": ("dpo", {}),
    "sigmoid_norm": ("sigmoid_norm", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
    "robust": ("robust_dpo", {}),
    "exo_pair": ("exo_pair", {}),
    "nca_pair": ("nca_pair", {}),
    "sppo_hard": ("sppo_hard", {}),
    "discopop": ("discopop", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "aot": ("aot", {}),
    "aot_unpaired": ("aot_unpaired", {}),
    "bco_pair": ("bco_pair", {"reward_shift": "none"}),
    "sft": ("sft_ref", {}),
    "simpo": ("simpo", {}),
    "orpo": ("orpo", {}),
    "kto": ("kto", {}),
}
# Of the loss, by the common name; taken where our loss of that name has the parameter.
LOSS_PARAMETERS = {
    "beta": "beta",
    "orpo_alpha": "beta",
    "label_smoothing": "label_smoothing",
    "nll_alpha": "nll_alpha",
    "simpo_gamma": "gamma",
    "use_weighting": "use_weighting",
    "ld_alpha": "ld_alpha",
    "f_divergence_type": "f_divergence",
    "f_alpha_divergence_coef": "f_alpha",
    "discopop_tau": "tau",
    "reference_free": "reference_free",
    "desirable_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight",
}
