"""The name of a response's entry in the reference store: a hash of the token ids it was scored on, nothing else.

Not the text (two tokenizers differ), not the data set's name, not the loss: whatever asks for the log-probs of the same
ids under the same model gets the same entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.example import Example, IntArray

KEY_BYTES = 16
# Sixteen-byte strings sort and search with numpy's own loops. numpy drops trailing zero bytes when it hands one out as
# `bytes`, which confuses no comparison of equally long keys; `key_bytes` gives all sixteen back.
KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")
KeyArray = NDArray[np.bytes_]


def response_key(prompt: IntArray, response: IntArray) -> bytes:
    """Sixteen bytes naming a response to a prompt.

    The prompt's length goes first, so that no token can move between prompt and response without changing the key.
    """
    return response_keys(prompt, [response])[0]


def response_keys(prompt: IntArray, responses: Sequence[IntArray]) -> list[bytes]:
    """The keys of several responses to one prompt, which is hashed once."""
    start = _hash_of(prompt)
    keys = []
    for response in responses:
        whole = start.copy()
        whole.update(_id_bytes(response))
        keys.append(whole.digest())
    return keys


def prompt_key(prompt: IntArray) -> bytes:
    """Sixteen bytes by which prompts are told apart."""
    return _hash_of(prompt).digest()


def example_keys(example: Example) -> list[bytes]:
    return response_keys(example.prompt, example.responses)


def key_array(keys: Sequence[bytes]) -> KeyArray:
    """(n,) keys as one sortable array."""
    return np.frombuffer(b"".join(keys), dtype=KEY_DTYPE)


def key_bytes(keys: KeyArray) -> list[bytes]:
    """The sixteen bytes of each key."""
    whole = np.ascontiguousarray(keys).tobytes()
    return [whole[start : start + KEY_BYTES] for start in range(0, len(whole), KEY_BYTES)]


def _hash_of(prompt: IntArray) -> hashlib.blake2b:
    start = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=KEY_BYTES)
    start.update(_id_bytes(prompt))
    return start


def _id_bytes(ids: IntArray) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()
