"""A model's folder to the Hugging Face hub: into a repository that holds nothing yet, private unless told otherwise.

The token is huggingface_hub's own affair (`hf auth login`, or HF_TOKEN): it is neither read nor passed on here.
"""

from __future__ import annotations

import re
from pathlib import Path

from dpo_cli.config.secrets import mask_tokens
from dpo_cli.errors import ModelError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What the hub itself lays into a new repository.
_FRESH = {".gitattributes"}


def check_may_publish(name: str) -> None:
    """Before anything is written. Raises ModelError for a name that is none, and where nobody is logged in."""
    from huggingface_hub import constants, get_token

    if not _NAME.fullmatch(name):
        raise ModelError(f"{name!r} is not a name on the hub.", where="--push", hint="--push OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise ModelError("HF_HUB_OFFLINE is set, so nothing is sent.", where="--push", hint="unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise ModelError(
            "Nobody is logged in to the hub here.",
            where="--push",
            hint="hf auth login, or set HF_TOKEN for this command",
        )


def publish(folder: Path, name: str, *, private: bool) -> str:
    """Send `folder` to the model repository `name`, made if need be; returns its address.

    Raises ModelError where the hub refuses or cannot be reached, and where the repository holds something already or
    is public though it was to be private.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    # Causes are dropped (`from None`) on purpose: HTTP errors of the hub carry request headers and signed addresses.
    try:
        address = str(api.create_repo(name, private=private, exist_ok=True))
        there = set(api.list_repo_files(name)) - _FRESH
        # A repository that was there before stays as public as it was.
        exposed = private and not api.model_info(name).private
        if not there and not exposed:
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model and card by dpo-cli")
            return address
    except Exception as error:  # the hub library's HTTP client, and so its errors, differ between versions
        raise ModelError(
            f"The hub has not taken the model: {_reason(error)}.",
            where=f"--push {name}",
            hint=f"may this token write there? The folder is whole; once it may: hf upload {name} {folder}",
        ) from None
    if exposed:
        raise ModelError(
            f"{name} is there already and public, so everyone would see the model.",
            where="--push",
            hint=f"--public, if that is meant; or --push ANOTHER, or make it private. The folder is whole: {folder}",
        )
    raise ModelError(
        f"{name} holds {len(there)} files already, and nothing is written over.",
        where="--push",
        hint=f"--push ANOTHER; or, if it is meant to go there: hf upload {name} {folder}",
    )


def _reason(error: Exception) -> str:
    """In a line, without headers and addresses."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"it refuses ({status}): the token is not valid, or may not write to this name"
    if status is not None:
        return f"it answers {status}"
    lines = str(error).strip().splitlines()
    return mask_tokens(f"{type(error).__name__}{f', {lines[0]}' if lines else ''}")
