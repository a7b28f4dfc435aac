"""Real architectures, a few thousand parameters each, built on the spot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dpo_cli.config.schema import ModelConfig
from dpo_cli.data.example import Example
from dpo_cli.policy import attention  # noqa: F401  registers the packed attention
from dpo_cli.policy.dropout import switch_off_noise

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# name: (model type, config). Rows in the tests are longer than every window here.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", SIZES),
    "qwen2-tied": ("qwen2", SIZES | {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", SIZES | {"head_dim": 16}),
    "llama": ("llama", SIZES | {"attention_bias": True}),
    "llama3-rope": (
        "llama",
        SIZES
        | {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral-sliding": ("mistral", SIZES | {"sliding_window": 4}),
    "phi3": ("phi3", SIZES),
    "phi3-sliding": ("phi3", SIZES | {"sliding_window": 6}),
    "gemma": ("gemma", SIZES | {"head_dim": 8}),
    "gemma3": (
        "gemma3_text",
        SIZES
        | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma3-softcap": ("gemma3_text", SIZES | {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "olmo2": ("olmo2", SIZES),
    "qwen3-moe": ("qwen3_moe", SIZES | EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "mixtral-sliding": ("mixtral", SIZES | {"num_local_experts": 4, "sliding_window": 5}),
    "granite": (
        "granite",
        SIZES
        | {"logits_scaling": 4.0, "embedding_multiplier": 3.0}
        | {"attention_multiplier": 0.2, "residual_multiplier": 0.5},
    ),
    "cohere": ("cohere", SIZES | {"logit_scale": 0.25}),
    "cohere2": ("cohere2", SIZES | {"logit_scale": 0.25, "sliding_window": 5, "head_dim": 8}),
    "starcoder2-sliding": ("starcoder2", SIZES | {"sliding_window": 5}),
    "phi": ("phi", SIZES),  # its head has a bias
    "gpt2": ("gpt2", GPT2),  # learned positions
    "gpt-neox": ("gpt_neox", SIZES),
    "smollm3": ("smollm3", SIZES),
    "glm4": ("glm4", SIZES | {"head_dim": 8}),
    "exaone4": ("exaone4", SIZES | {"sliding_window": 5}),
    "ministral": ("ministral", SIZES | {"sliding_window": 5, "head_dim": 8}),
    "olmo3-sliding": ("olmo3", SIZES | {"sliding_window": 5}),
    "deepseek-v3": (
        "deepseek_v3",
        SIZES | {
            "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "moe_intermediate_size": 24, "first_k_dense_replace": 1,
        },
    ),
}  # fmt: skip

# Their layers do not hand keyword arguments on to the attention, so the plan of a packed row cannot reach it.
REFUSED_ARCHITECTURES = {"stablelm": ("stablelm", SIZES), "nemotron": ("nemotron", SIZES)}
# LayerNorm computes in the dtype of its input; the others round to float32 on the way, in gradients too.
EXACT_GRADIENTS = ("starcoder2-sliding", "phi", "gpt2", "gpt-neox")


def build(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """The architecture with weights large enough that a wrong mask shows: logits spread over several nats."""
    model_type, fields = (ARCHITECTURES | REFUSED_ARCHITECTURES)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(model_type, **fields)
        switch_off_noise(config)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="packed", experts_implementation="eager", dtype=dtype
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.25 if parameter.ndim >= 2 else 0.1
            parameter += spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model.train()


def tiny_tokenizer(*, chat: bool = False, size: int = VOCABULARY) -> PreTrainedTokenizerBase:
    """A token for each of `size` characters; <|endoftext|> ends a text and, in the chat template, <|turn|> a turn."""
    special = ["<pad>", "<s>", "<|endoftext|>", "<|turn|>"]
    characters = [chr(ord("0") + index) for index in range(size - len(special))]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message.role }}:{{ message.content }}<|turn|>\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
    return tokenizer


def save(
    folder: Path, name: str = "qwen2", *, seed: int = 0, chat: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """A whole model folder as a user would have it."""
    build(name, dtype=dtype, seed=seed).save_pretrained(folder)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def settings(path: Path | str, **changes: Any) -> ModelConfig:
    """The `model` group of a config, with what is not named as shipped."""
    group: dict[str, Any] = {
        "path": str(path), "revision": None, "dtype": "float32", "attention": "auto",
        "gradient_checkpointing": False, "checkpoint_every": 1, "offload_checkpoints": False, "pad_rows_to": 1,
        "trust_remote_code": False, "adapter": None, "reference": None, "reference_sync_steps": None, "lora": None,
    }  # fmt: skip
    return ModelConfig.model_validate({**group, **changes})


def examples(*, responses: int, seed: int = 0, count: int = 4) -> list[Example]:
    """Prompts of 1 to 12 tokens, responses of 1 to 11: single-token prompts and responses are among them."""
    rng = np.random.default_rng(seed)
    prompt_lengths = [1, *rng.integers(2, 13, count - 1)]
    return [
        Example(
            prompt=rng.integers(3, VOCABULARY, length).astype(np.int32),
            responses=tuple(
                rng.integers(3, VOCABULARY, 1 if (number, k) == (1, 0) else rng.integers(1, 12)).astype(np.int32)
                for k in range(responses)
            ),
        )
        for number, length in enumerate(prompt_lengths)
    ]


def kept_by_autograd(run: Callable[[], object]) -> list[Tensor]:
    """What a forward pass keeps for its backward pass, weights among it; one tensor of every storage."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return list(found.values())


def plain_logps(model: PreTrainedModel, rows: list[Example], *, route: str = "sdpa") -> list[Tensor]:
    """Per-token log-probs from transformers' own forward on a padded batch, as its documentation would have it."""
    sequences = [np.concatenate((row.prompt, response)) for row in rows for response in row.responses]
    prompts = [len(row.prompt) for row in rows for _ in row.responses]
    width = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for index, sequence in enumerate(sequences):
        input_ids[index, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        mask[index, : len(sequence)] = 1
    model.set_attn_implementation(route)
    try:
        logits = model(
            input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).logits
    finally:
        model.set_attn_implementation("packed")
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return [
        logps[index, prompt - 1 : len(sequence) - 1]
        .gather(-1, input_ids[index, prompt : len(sequence), None].to(logps.device))
        .squeeze(-1)
        for index, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True))
    ]
