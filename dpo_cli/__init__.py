"""Align a language model with preference data: `dpo-train loss=dpo model=qwen2-7b`."""

__version__ = "0.1.0"
