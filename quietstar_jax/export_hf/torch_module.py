"""Quiet-STaR in PyTorch: a causal language model that thinks before every token it predicts.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer("2 + 2 =", return_tensors="pt"))                     # thinks
    model.generate(**tokenizer("2 + 2 =", return_tensors="pt"), thought_length=0)   # does not
    model.generate(**tokenizer("2 + 2 =", return_tensors="pt"), think="entropy:1.5")  # thinks where it is uncertain
    model.generate(**tokenizer("2 + 2 =", return_tensors="pt"), reach=3)            # a thought serves three tokens

This file depends only on torch and transformers, and is shipped with every exported checkpoint. Thoughts are greedy.
After position j, the chain `start, t_1 .. t_T, end` runs at rotary positions j+1, j+2, ...; its tokens attend to the
text up to j and to their own chain. The hidden states h[j] of the text and h' at `end` give the mixing weight w and the
scores of the next token, by default logits(h) + w * logits(h' - h); see `MIXINGS`. The start and end tokens are never
predicted, neither in thoughts nor in text.

With a reach of N, a thought serves the N tokens after it: its chain continues after `end` with the tokens of the text.
The prediction of x_{j+1} begins as p, that without thoughts, and then, for k = N-1 .. 0, becomes (1 - w_k) p + w_k p'_k
if position j-k made a thought. p'_k and w_k are the prediction and the mixing weight of that chain at the token x_j, at
`end` for k = 0. Only the mixing `probabilities` can do this.

Letters: B sequences, Q tokens in this call, L tokens of text so far, P positions that think, T thought tokens,
N reach, D hidden size, V vocabulary size with start and end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    from transformers.utils import can_return_tuple
except ImportError:  # before 4.50
    can_return_tuple = lambda forward: forward  # noqa: E731
try:
    from transformers import masking_utils
except ImportError:  # before 4.53
    masking_utils = None  # type: ignore[assignment]

POSITIONS_AT_ONCE = 64  # chains in memory at the same time
NONE, ENDED = -1, -2
MOST_REACH = 16


@dataclass
class QuietStarOutput(CausalLMOutputWithPast):
    """The output of `forward`, with thoughts [B, P, T] and mixing weights [B, P]; both are None without thoughts.

    Where a policy of thinking makes no thought, the thought is `NONE` and the weight is 0. After the end of a thought
    of fewer than T tokens, it is `ENDED`. With a reach above 1, there is no thought after padding, the logits are
    log-probabilities, and the weight is the share of the predictions after thoughts, 1 - (1 - w_0) .. (1 - w_{N-1}).
    """

    thoughts: torch.Tensor | None = None
    mixing_weight: torch.Tensor | None = None


class ThoughtCache(DynamicCache):
    """A cache that also keeps the thoughts of its tokens, so that calls with a reach above 1 use those of earlier ones.

    A call without thoughts or with a reach of 1 adds nothing to them, and the next call forgets all before it.
    """

    kept: tuple[torch.Tensor, ...] = ()  # thoughts [B, L, T], rotary positions [B, L], input embeddings [B, L, D]

    def add(self, past: int, *new: torch.Tensor) -> None:
        """Adds what is kept, of Q tokens that follow `past` tokens."""
        old = self.kept
        if not old or old[1].shape[1] != past:
            old = tuple(x.new_full((len(x), past, *x.shape[2:]), NONE) for x in new)
        most = max(old[0].shape[-1], new[0].shape[-1])
        both = [nn.functional.pad(x, (0, most - x.shape[-1]), value=ENDED) for x in (old[0], new[0])]
        self.kept = (torch.cat(both, 1), *(torch.cat(pair, 1) for pair in zip(old[1:], new[1:], strict=True)))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self.kept = tuple(x[:, : self.get_seq_length()] for x in self.kept)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.kept = tuple(x[beam_idx.to(x.device)] for x in self.kept)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.kept = tuple(x.repeat_interleave(repeats, 0) for x in self.kept)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.kept = tuple(x[indices] for x in self.kept)


class Thinking:
    """Mixin that adds Quiet-STaR to a `...ForCausalLM` class of transformers. Configuration fields:

    thought_length: T; 0 = a plain language model.
    thought_embedding_scale: the start and end embeddings are stored divided by this number.
    thought_mixing: how predictions without and with thoughts are mixed, an entry of `MIXINGS`.
    thought_token_ids: ids of start and end, which are never predicted.
    text_vocab_size: size of the vocabulary in training; start and end may have ids beyond it.
    unused_token_ids: ids that are not tokens of the tokenizer used in training, never in a thought; optional.
    thought_gate: whether there is a thinking gate, for the policy `gate`; optional.
    thought_end: whether a head decides before each token of a thought whether it ends; T is then the most; optional.
    thought_start_token: id of the token that starts thoughts where a text has them, for the policy `start`; optional.
    thought_end_token: id of the token that ends a thought instead, which no thought contains; T is the most; optional.

    Fields of the generation configuration, the defaults of `generate`:

    thinking: policy that chooses the positions that think, see `THINKING`; optional.
    thinking_reach: N, for how many tokens a thought is used, 1 .. `MOST_REACH`; optional.
    """

    _supports_flash_attn = _supports_flash_attn_2 = False  # chains need custom masks
    _supports_flex_attn = False
    mask_per_layer_type = False  # whether the decoder expects one mask for each kind of layer

    config: Any  # these attributes are defined by transformers
    model: Any
    lm_head: Any
    loss_function: Any
    generation_config: Any
    get_input_embeddings: Any
    post_init: Any
    training: bool

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        mixing = getattr(config, "thought_mixing", None)
        if mixing not in MIXINGS:
            raise ValueError(
                f"thought_mixing of config.json is {mixing!r}, but this module has only {', '.join(MIXINGS)}. "
                "Add a function that computes it to MIXINGS."
            )
        d = config.hidden_size
        self.talk_head = nn.ModuleList(
            [nn.Sequential(nn.Linear(2 * d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 1, bias=False))]
        )
        self.start_embedding = nn.Parameter(torch.zeros(2, d))  # the second rows are not used, only preserved
        self.end_embedding = nn.Parameter(torch.zeros(2, d))
        if getattr(config, "thought_gate", False):
            self.thought_gate = nn.Linear(d, 1)
            self.thought_gate_log_slope = nn.Parameter(torch.zeros(1))
        if getattr(config, "thought_end", False):
            self.thought_end = nn.Linear(d, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_logits_to_keep: int = 0,  # name of logits_to_keep in transformers before 4.49
        thought_length: int | None = None,
        think: str | None = None,
        reach: int | None = None,
        **kwargs: Any,
    ) -> QuietStarOutput:
        """Thinks after each position whose logits are kept (by default, all positions).

        Args:
          attention_mask: [B, L], 1 for real tokens; padding may be on the left or the right.
          position_ids: [B, Q]; None = counted over the real tokens.
          past_key_values: cache of the tokens before these Q; it must keep all of them (`DynamicCache()`).
          thought_length: T; None = the value in the configuration, 0 = no thoughts.
          think: policy that chooses the positions that think, see `THINKING`; None = all.
          reach: N, for how many tokens a thought is used; None = 1. Above 1, `past_key_values` is a `ThoughtCache`, and
            thoughts of earlier calls with it are used too; the N - 1 positions before those whose logits are kept think
            too.

        Returns:
          A `QuietStarOutput` with float32 logits [B, P, V]; those of start and end are the lowest float32 number.
        """
        length = self.config.thought_length if thought_length is None else thought_length
        chooses = _policy(think)
        if chooses is think_never:
            length = 0
        reach = _reach(reach)
        cache: Any = past_key_values
        if cache is None and (length or use_cache):
            # Without a configuration: sliding layers would drop keys that thoughts attend to.
            cache = ThoughtCache() if reach > 1 else DynamicCache()
        if length:
            self._check_cache(cache, reach)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("Give input_ids or inputs_embeds.")
        past = cache.get_seq_length() if cache is not None else 0
        real = self._real(attention_mask, given.shape[0], past + given.shape[1], given.device, length)
        if position_ids is None and real is not None:
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]

        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            inputs_embeds=inputs_embeds,
            use_cache=cache is not None,
            **kwargs,
        )
        kept = torch.arange(given.shape[1], device=given.device)
        logits_to_keep = num_logits_to_keep or logits_to_keep
        kept = kept[-logits_to_keep:] if isinstance(logits_to_keep, int) else kept[logits_to_keep]
        near = kept  # the positions whose thoughts are used
        if length and reach > 1:
            near = (kept[:, None] - torch.arange(reach, device=given.device)).clamp(min=0).unique()
        text = hidden.last_hidden_state[:, near]
        thoughts = weight = None
        if length and real is not None and position_ids is not None:
            position_ids = position_ids.expand(len(text), -1)
            at, positions = past + near, position_ids[:, near]
            none = positions.new_full((*position_ids.shape, length), NONE)
            if reach > 1:
                embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
                cache.add(past, none, position_ids, embeddings)
            none = none[:, near]
            if reach == 1 and chooses is think_always:
                thoughts, after = self._think(at, positions, real, cache, none)
                logits, weight = self._mix(text, after[:, :, 0])
            else:
                found = self._think_where(chooses, text, at, positions, real, cache, none, reach)
                own = slice(None) if near is kept else torch.searchsorted(near, kept)
                logits, thoughts, weight = (x[:, own] for x in found)
        else:
            logits = self._text_logits(text)
        logits = self._with_thought_tokens(logits)
        return QuietStarOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            past_key_values=cache if use_cache or past_key_values is not None else None,
            hidden_states=hidden.hidden_states,
            attentions=hidden.attentions,
            thoughts=thoughts,
            mixing_weight=weight,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as in transformers, with thoughts of `thought_length` tokens before tokens that `think` chooses.

        The defaults are `thought_length` of the configuration, 0 = no thoughts, and `thinking` and `thinking_reach` of
        the generation configuration; without them, a thought precedes every token and is used for it alone. With a
        `reach` of N, the last N tokens of the prompt can have a thought.
        """
        generation = kwargs.get("generation_config") or self.generation_config

        def default(name: str) -> Any:  # of this model if the given configuration has none
            own = getattr(generation, name, None)
            return getattr(self.generation_config, name, None) if own is None else own

        think = kwargs.pop("think", None) or default("thinking")
        if think is not None:
            _policy(think)
            kwargs["think"] = think
        reach = kwargs.pop("reach", None)
        reach = _reach(default("thinking_reach") if reach is None else reach)
        if reach > 1:
            kwargs["reach"] = reach
        own = any(kwargs.get(key) is not None for key in ("past_key_values", "cache_implementation"))
        if kwargs.get("use_cache", generation.use_cache) is False:
            if reach > 1 and kwargs.get("thought_length") != 0 and think != "never":
                raise ValueError(f"With a reach of {reach}, use_cache must not be False: the cache keeps thoughts.")
        elif not own:
            kwargs["past_key_values"] = ThoughtCache() if reach > 1 else DynamicCache()
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Adds arguments of thinking to the inputs: transformers before 4.49 drops arguments it does not know.

        `inputs_embeds` is named because transformers looks for it in this signature.
        """
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]
        return {**{name: kwargs.get(name) for name in ("thought_length", "think", "reach")}, **inputs}

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "loss_function"):
            return self.loss_function(logits, labels, self.config.vocab_size)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # before 4.46

    def _check_cache(self, cache: Any, reach: int) -> None:
        if self.training and self.model.gradient_checkpointing:
            raise ValueError("Gradient checkpointing drops the cache that thoughts need: pass thought_length=0.")
        if not isinstance(cache, DynamicCache) or any(getattr(cache, "is_sliding", ())):
            raise ValueError(
                "To think, past_key_values must keep every token: pass DynamicCache() without a configuration, or "
                "nothing; leave cache_implementation unset. Pass thought_length=0 for a model that does not think."
            )
        if reach > 1 and self.config.thought_mixing != "probabilities":
            raise ValueError(
                f"reach is {reach}, but the mixing of this model is {self.config.thought_mixing!r}; only the mixing "
                "'probabilities' can use a thought for several tokens. Leave reach at 1."
            )
        if reach > 1 and not isinstance(cache, ThoughtCache):
            raise ValueError(
                f"With a reach of {reach}, past_key_values must keep thoughts: pass nothing, or a ThoughtCache of this "
                "module, such as the one that a call with a reach above 1 returns."
            )

    def _real(self, mask: Any, batch: int, total: int, device: torch.device, length: int) -> torch.Tensor | None:
        """Which tokens are real, [B, L] bool; None for a model without thoughts and a mask of another shape."""
        if mask is None:
            return torch.ones(batch, total, dtype=torch.bool, device=device)
        if isinstance(mask, torch.Tensor) and mask.shape == (batch, total):
            return mask.bool()
        if length:
            found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {found}; to think it must be [{batch}, {total}], over all tokens so far. "
                "Pass thought_length=0 for a model that does not think."
            )
        return None

    def _think_where(
        self, chooses: Callable[..., torch.Tensor], text: torch.Tensor, at: torch.Tensor, positions: torch.Tensor,
        real: torch.Tensor, cache: Any, thoughts: torch.Tensor, reach: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Thinks where a policy chooses to, after hidden states `text` [B, P, D]; see `_think`.

        Args:
          thoughts: [B, P, T], all `NONE`.

        Returns:
          (logits [B, P, V], thoughts [B, P, T], mixing weights [B, P]); no chain runs where no sequence thinks.
        """
        logits = self._text_logits(text)
        chosen = chooses(Position(logits.detach(), positions, self._gain(text.detach()), self._start(logits.detach())))
        if reach > 1:
            logits, made, weight = self._think_ahead(chosen & real[:, at], text, logits, at, real, cache, reach)
            return logits, made[..., : thoughts.shape[-1]], weight
        weight = logits.new_zeros(chosen.shape)
        some = chosen.any(0).nonzero()[:, 0]
        if len(some):
            made, after = self._think(at[some], positions[:, some], real, cache, thoughts[:, some])
            mixed, mixed_weight = self._mix(text[:, some], after[:, :, 0])
            own = chosen[:, some]
            logits = logits.index_copy(1, some, torch.where(own[..., None], mixed, logits[:, some]))
            thoughts = thoughts.index_copy(1, some, torch.where(own[..., None], made, NONE))
            weight = weight.index_copy(1, some, torch.where(own, mixed_weight, 0.0))
        return logits, thoughts, weight

    def _think_ahead(
        self, chosen: torch.Tensor, text: torch.Tensor, logits: torch.Tensor, at: torch.Tensor, real: torch.Tensor,
        cache: ThoughtCache, reach: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Thinks where `chosen` [B, P], and mixes the predictions after the thoughts of the last N positions.

        The chains of thoughts that the cache keeps run again; it also keeps the new ones. Returns what `_think_where`
        does.
        """
        thoughts, positions, embeddings = cache.kept
        made = thoughts[..., 0] != NONE  # [B, L]
        made[:, at] = chosen
        mixed, rest = logits.log_softmax(-1), torch.ones_like(logits[..., 0])
        ages = torch.arange(reach, device=at.device)
        chains = (at[:, None] - ages).clamp(min=0).unique()
        chains = chains[made[:, chains].any(0)]
        if len(chains):
            ahead = embeddings[:, (chains[:, None] + ages[1:]).clamp(max=made.shape[1] - 1)]
            found, after = self._think(chains, positions[:, chains], real, cache, thoughts[:, chains], ahead)
            thoughts[:, chains] = torch.where(made[:, chains, None], found, NONE)
            for k in reversed(range(reach)):
                back = (at - k).clamp(min=0)
                used = made[:, back] & (at >= k)
                place = torch.searchsorted(chains, back).clamp(max=len(chains) - 1)
                both, weight = mix_probabilities(self, text, after[:, place, k], mixed)
                mixed = torch.where(used[..., None], both, mixed)
                rest = rest * torch.where(used, 1 - weight[..., 0], 1.0)
        return mixed, thoughts[:, at], 1 - rest

    def _gain(self, text: torch.Tensor) -> torch.Tensor | None:
        """The gain of a thought that the gate predicts after hidden states [B, P, D], nats [B, P]; None without it."""
        if not getattr(self.config, "thought_gate", False):
            return None
        weight, bias, log_slope = self.thought_gate.weight, self.thought_gate.bias, self.thought_gate_log_slope
        score = nn.functional.linear(text.float(), weight.float(), bias.float())[..., 0]
        return score * (-log_slope.float()).exp()

    def _start(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The log-probability [B, P] of the token that starts thoughts in texts; None if there is none."""
        token = getattr(self.config, "thought_start_token", None)
        return None if token is None else logits.log_softmax(-1)[..., token]

    def _think(
        self, at: torch.Tensor, positions: torch.Tensor, real: torch.Tensor, cache: Any, known: torch.Tensor,
        ahead: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Thoughts after the tokens with numbers `at` [P] and rotary positions `positions` [B, P].

        Args:
          known: [B, P, T], thoughts, or the beginnings of thoughts; tokens that are `NONE` are yet to be found.
          ahead: [B, P, N-1, D], embeddings of the tokens of the text that follow each thought; None = N is 1.

        Returns:
          (thoughts [B, P, T], hidden states at `end` and at the tokens ahead [B, P, N, D]); the cache is the same as
          before the call.
        """
        end = self._meta(self.end_embedding, *positions.shape)[:, :, None]
        tail = end if ahead is None else torch.cat([end, ahead], 2)
        split = (x.split(POSITIONS_AT_ONCE, -1 if x is at else 1) for x in (at, positions, known, tail))
        parts = [self._think_at_once(real, cache, *piece) for piece in zip(*split, strict=True)]
        return torch.cat([thoughts for thoughts, _ in parts], 1), torch.cat([after for _, after in parts], 1)

    def _think_at_once(
        self, real: torch.Tensor, cache: Any, at: torch.Tensor, positions: torch.Tensor, known: torch.Tensor,
        tail: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        (batch, count, length), reach = known.shape, tail.shape[2]
        thoughts, after = torch.full_like(known, ENDED), torch.zeros_like(tail)
        inputs = self._meta(self.start_embedding, batch, count)
        place = torch.full_like(positions, -1)  # of the input in `tail`; -1 = before it
        for c in range(length + 1 + reach):
            hidden = self.model(
                inputs_embeds=inputs,
                attention_mask=self._masks(at, c, real, inputs.dtype),
                position_ids=positions + 1 + c,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            here = place[..., None] == torch.arange(reach, device=at.device)
            after = torch.where(here[..., None], hidden[:, :, None], after)
            if (place >= reach - 1).all():
                break
            ended = torch.ones_like(place, dtype=torch.bool)
            if c < length:
                logits = self._text_logits(hidden)
                allowed, given = self._of_thoughts(logits), known[..., c]
                tokens = torch.where(given == NONE, allowed.argmax(-1), given)
                ends = torch.where(given == NONE, self._ends(hidden, logits, allowed), given == ENDED)
                ended = ends | (place >= 0)
                thoughts[..., c] = torch.where(ended, ENDED, tokens)
                inputs = self.get_input_embeddings()(tokens.clamp(min=0))
            place = place + ended
            following = tail.take_along_dim(place.clamp(0, reach - 1)[..., None, None], 2)[:, :, 0]
            inputs = torch.where(ended[..., None], following, inputs)
        cache.crop(-count * (c + 1))
        return thoughts, after

    def _ends(self, hidden: torch.Tensor, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Whether `end` follows tokens with hidden states [B, P, D] and logits [B, P, V], see `_of_thoughts`."""
        token = getattr(self.config, "thought_end_token", None)
        if token is not None:
            return logits[..., token] > allowed.logsumexp(-1)
        if not getattr(self.config, "thought_end", False):
            return torch.zeros(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        weight, bias = self.thought_end.weight.float(), self.thought_end.bias.float()
        return nn.functional.linear(hidden.float(), weight, bias)[..., 0] > 0

    def _of_thoughts(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] in which tokens that no thought contains have the lowest number."""
        more = [*(getattr(self.config, "unused_token_ids", None) or [])]
        end = getattr(self.config, "thought_end_token", None)
        return self._forbid(logits, more if end is None else [*more, end])

    def _meta(self, stored: torch.Tensor, batch: int, count: int) -> torch.Tensor:
        embedding = self.get_input_embeddings()
        row = (stored[0].float() * self.config.thought_embedding_scale).to(embedding.weight.dtype)
        # Where the embedding multiplies its rows (Gemma), so must this row. Other versions of transformers multiply all
        # inputs, whatever their origin.
        return (row * getattr(embedding, "embed_scale", torch.ones(())).to(row)).expand(batch, count, -1)

    def _masks(self, at: torch.Tensor, c: int, real: torch.Tensor, dtype: torch.dtype) -> Any:
        """Additive masks of token c of the P chains over the text and tokens 0 .. c of all chains: [B, 1, P, L+(c+1)P].

        With `mask_per_layer_type`, a dictionary of masks by kind of layer.
        """
        count, total = len(at), real.shape[1]
        keys = torch.arange(total, device=at.device)
        own = torch.eye(count, dtype=torch.bool, device=at.device).repeat(1, c + 1)
        steps = torch.arange(c + 1, device=at.device).repeat_interleave(count)

        def mask(window: int | None) -> torch.Tensor:
            text, chain = keys <= at[:, None], own
            if window is not None:
                text = text & (at[:, None] + 1 + c - keys < window)
                chain = chain & (c - steps < window)
            visible = torch.cat([text & real[:, None], chain.expand(len(real), -1, -1)], -1)
            lowest = torch.finfo(dtype).min
            return torch.zeros(visible.shape, dtype=dtype, device=at.device).masked_fill(~visible, lowest)[:, None]

        window = getattr(self.config, "sliding_window", None)
        if self.mask_per_layer_type and masking_utils is not None:
            return {"full_attention": mask(None), "sliding_attention": mask(window)}
        return mask(window)

    def _mix(self, text: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states without and with thought [B, P, D] -> mixed scores over the text vocabulary, weights [B, P]."""
        mixed, weight = MIXINGS[self.config.thought_mixing](self, text, after)
        return mixed, weight[..., 0]

    def _weight(self, text: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """The output [B, P, 1] of the mixing head."""
        head: Any = self.talk_head[0]
        hidden = head[:-1](torch.cat([text, after], -1))
        return nn.functional.linear(hidden.float(), head[-1].weight.float())

    def _text_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits before their soft cap, a linear function."""
        return self.lm_head(hidden)[..., : self.config.text_vocab_size].float()

    def _cap(self, logits: torch.Tensor) -> torch.Tensor:
        """The soft cap of Gemma 2."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    def _text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._cap(self._text_head(hidden))

    def _forbid(self, logits: torch.Tensor, more: Sequence[int] = ()) -> torch.Tensor:
        """Sets the logits of the start and end tokens, and of the ids in `more`, to the lowest number."""
        ids = [i for i in (*self.config.thought_token_ids, *more) if i < logits.shape[-1]]
        return logits.index_fill(
            -1, torch.tensor(ids, device=logits.device, dtype=torch.long), torch.finfo(logits.dtype).min
        )

    def _with_thought_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores over the text vocabulary -> [..., V], with start and end at the lowest number."""
        added = self.config.vocab_size - logits.shape[-1]
        return self._forbid(nn.functional.pad(logits, (0, added), value=torch.finfo(logits.dtype).min))


def mix_hidden_states(model: Thinking, text: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the mixed hidden state, as in the published code."""
    weight = model._weight(text, after)
    return model._cap(model._text_head(text) + weight * model._text_head(after - text)), weight


def mix_log_probabilities(
    model: Thinking, text: torch.Tensor, after: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed log-probabilities, as in the paper; the weight is passed through a sigmoid."""
    weight = model._weight(text, after).sigmoid()
    base, thought = (model._text_logits(h).log_softmax(-1) for h in (text, after))
    return (1 - weight) * base + weight * thought, weight


def mix_probabilities(
    model: Thinking, text: torch.Tensor, after: torch.Tensor, base: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixed probabilities, as log-probabilities; the weight is the sigmoid of (the head's output minus 1).

    `base` are log-probabilities [B, P, V] that take the place of those without a thought.
    """
    odds = model._weight(text, after) - 1.0
    base = model._text_logits(text).log_softmax(-1) if base is None else base
    thought = model._text_logits(after).log_softmax(-1)
    mixed = torch.logaddexp(nn.functional.logsigmoid(-odds) + base, nn.functional.logsigmoid(odds) + thought)
    return mixed, odds.sigmoid()


def mix_none(model: Thinking, text: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction after the thought alone."""
    logits = model._text_logits(after)
    return logits, torch.ones_like(logits[..., :1])


# Functions of (model, hidden states without and with thought [B, P, D]) -> (scores [B, P, V], weights [B, P, 1]), by
# the name of the mixing in training. The export reads the keys, and refuses a mixing that is not here.
MIXINGS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "hidden_states": mix_hidden_states,
    "log_probabilities": mix_log_probabilities,
    "probabilities": mix_probabilities,
    "none": mix_none,
}


@dataclass(frozen=True)
class Position:
    """What a policy of thinking sees: logits without thoughts [B, P, V], the index of each position in its text [B, P],
    the gain of a thought that the gate predicts, nats [B, P], None if there is no gate, and the log-probability of the
    token that starts thoughts, [B, P], None if there is none.
    """

    logits: torch.Tensor
    index: torch.Tensor
    gain: torch.Tensor | None = None
    start: torch.Tensor | None = None


def think_always(at: Position) -> torch.Tensor:
    """Thinks at every position."""
    return torch.ones_like(at.index, dtype=torch.bool)


def think_never(at: Position) -> torch.Tensor:
    """Thinks nowhere."""
    return torch.zeros_like(at.index, dtype=torch.bool)


def think_every(at: Position, n: float) -> torch.Tensor:
    """Thinks after every n-th token of the text."""
    if n < 1 or n % 1:
        raise ValueError(f"n is {n}; it must be a whole number, 1 or more.")
    return (at.index + 1) % int(n) == 0


def think_random(at: Position, p: float) -> torch.Tensor:
    """Thinks at each position with probability p; the draws are those of torch, which differ from those of JAX."""
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; it must be a probability.")
    return torch.rand(at.index.shape, device=at.index.device) < p


def think_entropy(at: Position, least: float, most: float = float("inf")) -> torch.Tensor:
    """Thinks where the entropy of the prediction without a thought is within a band, in nats."""
    if not 0 <= least <= most:
        raise ValueError(f"The band is {least} .. {most}; it must ascend from 0 or more.")
    shifted = at.logits - at.logits.max(-1, keepdim=True).values
    mass = shifted.exp()
    total = mass.sum(-1)
    entropy = total.log() - (mass * shifted).sum(-1) / total
    return (entropy >= least) & (entropy <= most)


def think_margin(at: Position, bound: float) -> torch.Tensor:
    """Thinks where the two largest probabilities of the prediction without a thought differ by less than a bound."""
    if not 0 <= bound <= 1:
        raise ValueError(f"bound is {bound}; it must be a difference of probabilities, 0 .. 1.")
    first, second = at.logits.softmax(-1).topk(2).values.unbind(-1)
    return first - second < bound


def think_gate(at: Position, price: float) -> torch.Tensor:
    """Thinks where the gate predicts that a thought gains more than its price, in nats."""
    if not abs(price) < float("inf"):
        raise ValueError(f"price is {price}; it must be a number.")
    if at.gain is None:
        raise ValueError("This model has no thinking gate: give another policy, or train with thought.gate.")
    return at.gain > price


def think_start(at: Position, p: float) -> torch.Tensor:
    """Thinks where the text itself would begin a thought with at least probability p."""
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; it must be a probability.")
    if at.start is None:
        raise ValueError("This model has no token that starts thoughts (thought_start_token): give another policy.")
    return at.start.exp() >= p


# Policies of thinking, functions of (`Position`, numbers) -> bool [B, P]. They are written as text: `always`, `never`,
# `every:4`, `random:0.1`, `entropy:1.5`, `entropy:1.5,4`, `margin:0.2`, `gate:0.1`, `start:0.05`. The export reads
# the keys, and refuses a policy that is not here.
THINKING: dict[str, Callable[..., torch.Tensor]] = {
    "always": think_always,
    "never": think_never,
    "every": think_every,
    "random": think_random,
    "entropy": think_entropy,
    "margin": think_margin,
    "gate": think_gate,
    "start": think_start,
}


def _policy(think: str | None) -> Callable[..., torch.Tensor]:
    """Reads a policy of thinking and checks its numbers; None = `think_always`."""
    name, colon, rest = ("always" if think is None else think).partition(":")
    try:
        policy, numbers = THINKING[name], [float(number) for number in rest.split(",")] if colon else []
        nothing = torch.zeros(1, 1)
        policy(Position(torch.zeros(1, 1, 2), nothing.long(), nothing, nothing), *numbers)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"think is {think!r}; it must be one of {', '.join(THINKING)}, with the numbers of that policy, as in "
            "every:4, random:0.1, entropy:1.5, entropy:1.5,4, margin:0.2, gate:0.1 or start:0.05."
        ) from error
    return policy if not numbers else lambda at: policy(at, *numbers)


def _reach(reach: int | None) -> int:
    """Checks a reach; None = 1."""
    reach = 1 if reach is None else reach
    if not isinstance(reach, int) or isinstance(reach, bool) or not 1 <= reach <= MOST_REACH:
        raise ValueError(f"reach is {reach!r}; it must be a whole number of tokens, 1 .. {MOST_REACH}.")
    return reach


# Families: name of their decoder in transformers -> whether it expects one mask for each kind of layer.
DECODERS = {
    "Llama": False,
    "Mistral": False,
    "Phi3": False,
    "Qwen2": True,
    "Qwen3": True,
    "Gemma": False,
    "Gemma2": True,
    "Gemma3": True,
    "Olmo2": False,
    "Olmo3": True,
}
for _name, _per_layer in DECODERS.items():
    _decoder = getattr(transformers, f"{_name}ForCausalLM", None)
    # Before 4.53, Gemma 2 and 3 compute a window mask of their own, which does not fit thoughts.
    if _decoder is not None and (masking_utils is not None or _name not in ("Gemma2", "Gemma3")):
        _fields: dict[str, Any] = {
            "__doc__": f"Quiet-STaR with a {_name} decoder.",
            "__module__": __name__,
            "mask_per_layer_type": _per_layer,
        }
        if _name == "Gemma2":
            _fields["_supports_sdpa"] = False  # SDPA in transformers 4 ignores the soft cap of scores
        globals()[f"QuietStar{_name}ForCausalLM"] = type(f"QuietStar{_name}ForCausalLM", (Thinking, _decoder), _fields)


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"There is no {name} with transformers {transformers.__version__}: install a newer version that has its "
        "decoder (Gemma 2 and 3 need 4.53)."
    )
