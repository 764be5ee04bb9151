"""The arguments of `--model quietstar`: those of the harness's own `hf` model, and a few of this project."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quietstar_jax.config import ComputeDtype
from quietstar_jax.errors import ConfigError

BATCH_SIZE = 16
MAX_TOKENS = 256

# Arguments of the harness that have no effect here: JAX's own settings choose devices, no code from a folder is run,
# there is one kind of tokenizer, and long texts are always truncated at the beginning.
HARMLESS = frozenset(
    {"device", "trust_remote_code", "truncation", "logits_cache", "parallelize", "device_map", "max_memory_per_gpu",
     "max_cpu_memory", "offload_folder", "tp_plan", "attn_implementation", "low_cpu_mem_usage", "cache_dir", "token",
     "use_cache"}
)  # fmt: skip
# Arguments that would change results, with the values that request the only supported behaviour.
ONLY: dict[str, tuple[Any, ...]] = {
    "backend": ("default", "causal"),
    "subfolder": ("", None),
    "use_fast_tokenizer": (True, None),
    "softmax_dtype": ("float32", None),
    "mixed_precision_dtype": (None,),
    **dict.fromkeys(("peft", "delta", "autogptq", "gptqmodel", "gguf_file"), (False, None, "")),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "quantization_config"), (False, None)),
}
SYNONYMS = {"pretrained": "checkpoint", "torch_dtype": "dtype"}


@dataclass(frozen=True)
class Arguments:
    """Checked arguments.

    Args:
      checkpoint, step, revision, dtype: see `load_model`; `auto` is float32.
      thoughts: `on`, `off`, or `auto` (on where the model can think); think: at which positions, see
        `methods/thinking.py`, None = as the model says; thought_length: T, None = as trained; reach: for how many
        tokens a thought is used, None = as the model says.
      batch_size: texts per batch, over all local devices; `auto` means 16, or max_batch_size if that is less.
      max_length: tokens of a text without its last; None = the model's maximum.
      max_gen_toks: tokens to generate where a task sets no number.
      tokenizer: must give the same ids as the checkpoint's own.
      add_bos_token: whether texts begin with the begin-of-text token; None = as the model's training texts do.
      prefix_token_id: precedes texts that have no context; None = begin of text, or end of text without one.
      seed: of sampling, for tasks that sample.
      think_end_token: text or id; the answer is the text after its last occurrence.
      enable_thinking, chat_template_args: for the chat template.
    """

    checkpoint: str
    thoughts: str = "auto"
    think: str | None = None
    thought_length: int | None = None
    reach: int | None = None
    step: int | None = None
    revision: str = ""
    dtype: ComputeDtype = "float32"
    batch_size: int = BATCH_SIZE
    max_batch_size: int | None = None
    max_length: int | None = None
    max_gen_toks: int = MAX_TOKENS
    tokenizer: str | None = None
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    seed: int = 0
    think_end_token: str | int | None = None
    enable_thinking: bool | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Checks arguments as the harness reads them from `--model_args`, with `batch_size`, `max_batch_size`, `device`.

    Raises:
      ConfigError: one is unknown, missing or impossible, or requests results that this model does not produce.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        known = SYNONYMS.get(name, name)
        if name in ONLY:
            if value not in ONLY[name]:
                raise ConfigError(
                    f"{name}={value!r} is not supported: the results would differ from the requested ones."
                )
        elif known in Arguments.__dataclass_fields__:
            if value is None:
                continue
            if found.get(known, value) != value:
                raise ConfigError(f"{name}={value!r} contradicts {known}={found[known]!r}. Give one of them.")
            found[known] = value
        elif name not in HARMLESS:
            raise ConfigError(f"{name}={value!r} is unknown. {_advice(name)}")
    if not str(found.get("checkpoint") or ""):
        raise ConfigError("The model is missing. Give --model_args checkpoint=FOLDER (a run, an export, or a hub id).")
    checked = {name: _CHECKS[name](name, value) for name, value in found.items()}
    if str(found.get("batch_size")).startswith("auto"):
        checked["batch_size"] = min(BATCH_SIZE, checked.get("max_batch_size", BATCH_SIZE))
    return Arguments(**checked)


def _advice(name: str) -> str:
    names = [*(set(Arguments.__dataclass_fields__) - {"checkpoint"}), "pretrained"]
    near = difflib.get_close_matches(name, names, 1)
    return f"Did you mean {near[0]}?" if near else f"Arguments are {', '.join(sorted(names))}."


def _text(name: str, value: Any) -> str:
    return str(value)


def _count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more.")
    return int(value)


def _from_zero(name: str, value: Any) -> int:
    return _count(name, value, 0)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be True or False.")
    return value


def _batch_size(name: str, value: Any) -> int:
    return BATCH_SIZE if str(value).startswith("auto") else _count(name, value)


def _thoughts(name: str, value: Any) -> str:
    """`thoughts=true` on the harness's command line arrives as a bool."""
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    if text not in ("auto", "on", "off"):
        raise ConfigError(f"thoughts is {value!r}; it must be on, off or auto.")
    return str(text)


def _dtype(name: str, value: Any) -> str:
    return "float32" if value == "auto" else str(value).removeprefix("torch.")


def _revision(name: str, value: Any) -> str:
    return "" if value == "main" else str(value)


def _token(name: str, value: Any) -> str | int:
    return int(value) if str(value).isdecimal() else str(value)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}; it must be a mapping of names to values.")
    return dict(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "checkpoint": _text,
    "thoughts": _thoughts,
    "think": _text,
    "thought_length": _count,
    "reach": _count,
    "step": _from_zero,
    "revision": _revision,
    "dtype": _dtype,
    "batch_size": _batch_size,
    "max_batch_size": _count,
    "max_length": _count,
    "max_gen_toks": _count,
    "tokenizer": _text,
    "add_bos_token": _flag,
    "prefix_token_id": _from_zero,
    "seed": _from_zero,
    "think_end_token": _token,
    "enable_thinking": _flag,
    "chat_template_args": _mapping,
}
