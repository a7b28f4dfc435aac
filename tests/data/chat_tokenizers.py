"""Real tokenizers, trained on the spot in milliseconds: byte-level BPE with merges across the prompt's last space."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_TOOLS = "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}" + CHATML
# What reasoning models' templates do to a reply: its thoughts are cut out of the rendering.
STRIPS_THOUGHTS = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
# And to the prompt: the thoughts are opened for the model, but are not there once the reply is.
OPENS_THOUGHTS = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# Qwen3's way: an empty thought before the last reply, which the generation prompt does not have.
EMPTY_THOUGHT = CHATML.replace(
    "message['content'] +",
    "('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '') + message['content'] +",
)
NO_END_OF_TURN = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
CORPUS = [
    "Question: How many eggs does Tom have?\n\nAnswer: Tom has twelve eggs. She sells the rest of the eggs.",
    "\n\nHuman: Hello there, how are you?\n\nAssistant: I am well, thank you. What can I do for you?",
    "The quick brown fox jumps over the lazy dog. 1 + 2 = 3, 4 * 5 = 20, the answer is the sum of the two.",
] * 4
END_OF_TEXT, TURN_START, TURN_END, BEGIN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"


@cache
def bpe(
    *, chat_template: str | None = CHATML, adds_bos: bool = False, eos: str = END_OF_TEXT
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text goes through and comes back; a chat's turns end with <|im_end|>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN_START, TURN_END, BEGIN]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        begin = core.token_to_id(BEGIN)
        core.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=BEGIN if adds_bos else None)
    tokenizer.chat_template = chat_template
    return tokenizer


def stops(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    return frozenset(tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END]))
