"""Runs of no steps: a Hugging Face checkpoint in, random thoughts added, saved as training saves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import default_config, from_config_dict, phase
from quietstar_jax.models.parameters import merge
from quietstar_jax.thoughts.sample import sample_thoughts
from quietstar_jax.thoughts.score import chain_hidden_states, mix
from quietstar_jax.thoughts.text import here_and_ahead, read_text
from quietstar_jax.training.evaluation import evaluation_settings
from quietstar_jax.training.setup import Run, first_state, prepare

START, END = "<|startthought|>", "<|endthought|>"


def write_tokenizer(folder: Path, size: int, *more: str) -> None:
    """A tokenizer of `size` words, then the tokens `more`."""
    words = ["<s>", "</s>", "---", *(f"w{i}" for i in range(3, size)), *more]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def start_run(
    workdir: Path,
    checkpoint: Path,
    *,
    keep_thoughts: bool = False,
    place: Callable[[jax.Array], jax.Array] = lambda value: value,
    **thought: Any,
) -> tuple[Run, TrainState]:
    """Saves step 0 of a run from a checkpoint with a tokenizer.

    Args:
      keep_thoughts: the mixing head and thought embeddings are those of the checkpoint; else random.
      place: puts each parameter on its devices.
      thought: settings of `config.thought`.
    """
    config = default_config()
    config.workdir, config.model.checkpoint = str(workdir), str(checkpoint)
    config.data.sequence_length = 24
    config.thought.update(thought)
    config.phases = [phase(steps=0, thought_length=6, tokens_ahead=2)]
    run = prepare(from_config_dict(config))
    state = first_state(run)
    if not keep_thoughts:
        state = state._replace(params=with_random_thoughts(state.params, run.config.thought.embedding_scale))
    state = state._replace(params=jax.tree.map(place, state.params))
    with Checkpoints(workdir / "checkpoints", run.config.checkpoint) as checkpoints:
        checkpoints.save(state, {}, run.record)
    run.tokenizer.save(workdir / "tokenizer")
    return run, state


def with_random_thoughts(params: dict[str, jax.Array], scale: float) -> dict[str, jax.Array]:
    """Mixing head and thought embeddings with which a thought changes every prediction; heads that often act.

    Some thoughts end at once, and some never.
    """
    draw = np.random.default_rng(5)

    def value(name: str, old: jax.Array) -> jax.Array:
        if name == "end_head.bias":
            return jnp.full(old.shape, -0.7)
        if name.startswith(("mixing_head.", "gate.", "end_head.")):
            return jnp.asarray(draw.normal(size=old.shape) * old.shape[0] ** -0.5, jnp.float32)
        if name in ("start_embedding", "end_embedding"):
            return jnp.asarray(draw.normal(size=old.shape) / scale, jnp.float32)
        return old

    return {name: value(name, old) for name, old in params.items()}


def our_predictions(run: Run, state: TrainState, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
    """(greedy thoughts [B, L, T], mixed logits [B, L, V], logits without thoughts [B, L, V]) of tokens [B, L]."""
    settings = evaluation_settings(run.config, run.vocabulary)

    @jax.jit
    def predict(params: dict[str, jax.Array], tokens: jax.Array) -> tuple[jax.Array, ...]:
        model = merge(run.graphdef, params)
        text = read_text(model.decoder, tokens, jnp.ones(tokens.shape, bool), dtype=settings.dtype)
        positions = jnp.arange(tokens.shape[1])
        thoughts = sample_thoughts(model, text, positions, None, settings, tokens.shape[1]).tokens
        talk_hidden = chain_hidden_states(model, text, positions, thoughts, settings)[1]
        base_hidden = here_and_ahead(text.hidden, positions, settings.tokens_ahead)
        mixed = mix(model, base_hidden, talk_hidden, settings.config.mixing)[0]
        return thoughts[:, 0], mixed[:, 0, :, 0], model.decoder.logits(text.hidden)

    return tuple(np.asarray(x) for x in predict(state.params, jnp.asarray(tokens, jnp.int32)))
