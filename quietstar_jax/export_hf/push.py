"""Sends an export to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from quietstar_jax import __version__
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.settings import shown

# Files of an export. Those of an earlier export that the new one lacks, such as shards, are removed in the same commit.
FILES = (
    "README.md", "thought.svg", "thought.png", "config.json", "generation_config.json", "adapter_config.json",
    "modeling_quietstar.py", "model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json",
    "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "added_tokens.json",
    "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


def repository_id(text: str) -> str:
    """Argument type: the id of a repository of the hub, OWNER/NAME."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
        valid = text.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"is {shown(text)}; it must be a repository of the hub, OWNER/NAME")
    return text


def hub_token() -> str:
    """Returns the token of the user.

    Raises:
      ConfigError: there is none.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise ConfigError(
            "`push` needs a token with write permission for the hub: run `hf auth login`, or set the variable HF_TOKEN."
        )
    return token


def push(folder: Path, repository: str, token: str, *, public: bool = False) -> str:
    """Sends a complete export to a model repository, which is created private if it does not exist.

    Files that the hub has already are not sent again, so a repeated call resumes. The repository may contain other
    files, which stay. It becomes public, if requested, after the last file.

    Args:
      repository: OWNER/NAME.
      public: whether the repository becomes public. False: it must not be public already.

    Returns:
      the address of the repository.

    Raises:
      CheckpointError: the hub or the network refused; the message says how to repeat.
      ConfigError: the repository is public, but `public` is False.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="quietstar_jax", library_version=__version__)
    message = f"{folder} is complete, but was not sent to {repository}: "
    repeat = "the same command again, which then only sends the folder"
    try:
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        is_public = api.model_info(repository).private is False
        if public or not is_public:
            api.upload_folder(
                repo_id=repository, folder_path=folder, allow_patterns=list(FILES), delete_patterns=list(FILES),
                commit_message=f"Export of quietstar_jax {__version__}",
            )  # fmt: skip
            if public and not is_public:
                api.update_repo_settings(repository, private=False)
            return address
    except Exception as error:  # the client raises those of several libraries
        raise CheckpointError(
            f"{message}{error}\nCheck the network, and that the token may write to {repository} (`hf auth whoami`). "
            f"Then run {repeat}."
        ) from error
    raise ConfigError(f"{message}this repository is public. Add --public, or give another name; run {repeat}.")
