"""A model folder with more, random, weights than another: `larger_model.py FOLDER NEW`; its tokenizer comes along."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    old, new = map(Path, sys.argv[1:])
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        old, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
        layer_types=["full_attention"] * 6,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(new)
    AutoTokenizer.from_pretrained(old).save_pretrained(new)
    print(json.dumps({}))


if __name__ == "__main__":
    main()
