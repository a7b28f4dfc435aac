"""The model's tokenizer: that it is there, that the model's embeddings fit it, and on which tokens a reply ends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dpo_cli.errors import ModelError

# One of these must be in the folder: without any, transformers builds an empty tokenizer of the right class, silently.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_PROBE = "DPO-PROBE-7319"


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model's weights. Raises ModelError when it is absent, damaged or empty."""
    if not trust_remote_code and not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ModelError(
            "The model folder has no tokenizer.",
            where=str(folder),
            hint=f"copy its files there ({VOCABULARY_FILES[0]}, tokenizer_config.json)",
        )
    # For some model types (Qwen2 among them) AutoTokenizer overrides a tokenizer that declares itself generic by the
    # family's own class, which keeps the vocabulary and silently splits text otherwise.
    loader: Any = PreTrainedTokenizerFast if _declares_itself_generic(folder) else AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ModelError(f"The tokenizer cannot be read: {_first_line(error)}", where=str(folder)) from error
    if not highest_token_id(tokenizer):
        raise ModelError("The tokenizer's vocabulary is empty.", where=str(folder))
    return tokenizer


def _declares_itself_generic(folder: Path) -> bool:
    """Whether tokenizer.json alone is meant to say how text is split."""
    settings = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() or not settings.is_file():
        return False
    try:
        declared = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # damaged, as the loader will say
    return isinstance(declared, dict) and declared.get("tokenizer_class") in _GENERIC_CLASSES


def highest_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id the tokenizer can give; ids may have holes, so this can exceed its length minus one."""
    return max(tokenizer.get_vocab().values(), default=0)


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, where: str) -> None:
    """Raise ModelError when a token of the tokenizer has no row in the model's embeddings or output head.

    More rows than tokens are ordinary (padded for speed) and pass.
    """
    needed = highest_token_id(tokenizer) + 1
    # Not the weights' shapes: of partitioned weights a rank may hold none.
    ends: tuple[tuple[str, Any, str], ...] = (
        ("embeddings", model.get_input_embeddings(), "num_embeddings"),
        ("head", model.get_output_embeddings(), "out_features"),
    )
    for part, module, size in ends:
        if module is None:
            raise ModelError(f"The model {type(model).__name__} has no {part}, so it cannot score tokens.", where=where)
        rows = int(getattr(module, size, len(module.weight)))
        if rows < needed:
            raise ModelError(
                f"The tokenizer has tokens up to id {needed - 1:,}, and the model's {part} only {rows:,} rows.",
                where=where,
                hint="the tokenizer is another model's, or tokens were added without model.resize_token_embeddings",
            )


def check_same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, *, where: str) -> None:
    """Raise ModelError when two tokenizers give any token a different id: their log-probs cannot be compared."""
    one, other = first.get_vocab(), second.get_vocab()
    if one == other:
        return
    differing = sorted((token for token in one.keys() | other.keys() if one.get(token) != other.get(token)), key=str)
    raise ModelError(
        f"Policy and reference have different vocabularies: {len(differing):,} tokens differ, first {differing[0]!r}.",
        where=where,
        hint="name a reference that has the policy's tokenizer",
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> frozenset[int]:
    """Every token on which a reply of this model ends.

    The tokenizer's end-of-text token, those of the generation config, and the one its chat template puts after an
    assistant's words, which in chat-tuned models is often neither of them.
    Raises ModelError when there is none, since then no response would ever learn to end.
    """
    found = _as_ids(tokenizer.eos_token_id) | _as_ids(getattr(generation_config, "eos_token_id", None))
    end_of_turn = _end_of_turn(tokenizer)
    if end_of_turn is not None:
        found |= {end_of_turn}
    if not found:
        raise ModelError(
            "Neither the tokenizer nor the generation config names a token that ends a reply.",
            hint="set eos_token in tokenizer_config.json",
        )
    return frozenset(found)


def read_stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """`stop_token_ids` from a model's folder, before its weights are loaded."""
    file = folder / "generation_config.json"
    try:
        generation_config = GenerationConfig.from_pretrained(folder) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise ModelError(f"The generation config cannot be read: {_first_line(error)}", where=str(file)) from error
    return stop_token_ids(tokenizer, generation_config)


def _as_ids(value: int | Iterable[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token after an assistant's words in the chat template, or None."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError):
        return None  # a template that cannot render this chat is the data room's to report, with the user's own rows
    _, found, tail = rendered.rpartition(_PROBE)
    if not found:
        return None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    return next((token for token in tokenizer.encode(tail, add_special_tokens=False) if token in special), None)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
