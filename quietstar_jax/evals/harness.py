"""The language model evaluation harness (lm_eval) with models of this project: `--model quietstar`.

Everything that affects a score is as in the harness's own `hf` model: tokenization, the boundary between context and
continuation, truncation of long texts at the beginning, and the end of a generated text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.evals.harness_arguments import read_arguments
from quietstar_jax.evals.measure import thinking_policy
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.inference.generator import Generator
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.methods.thinking import NEVER

BATCHES_AT_ONCE = 32  # per update of the progress bar; a response cache loses at most these
SAMPLING = {"temperature", "top_p", "do_sample"}
NEUTRAL = {"num_beams": 1, "top_k": 0, "repetition_penalty": 1.0}  # the only values that other settings may have

Encoded = tuple[Any, list[int], list[int]]  # (the texts, ids of the context, ids of the continuation)


@register_model("quietstar")
class QuietStarLM(TemplateLM):
    """A run, an exported or published Quiet-STaR, or a plain Hugging Face model."""

    def __init__(self, pretrained: str | None = None, **arguments: Any) -> None:
        """Opens the model.

        Args:
          pretrained: the model, see `load_model`; may also be given as `checkpoint`.
          arguments: see `Arguments`; also those of the harness's `hf` model that have no effect here.

        Raises:
          UserError: an argument is unknown or impossible, the model cannot be opened, or thoughts are requested from a
            model that cannot think.
        """
        super().__init__()
        given = self._given = read_arguments({"pretrained": pretrained, **arguments})
        self.model = load_model(given.checkpoint, step=given.step, revision=given.revision, dtype=given.dtype)
        if given.tokenizer is not None:
            self._require_same(given.tokenizer)
        self.policy = thinking_policy(given.thoughts, given.think, self.model)
        self.thinks = self.policy != NEVER
        self.thought_length = (given.thought_length or self.model.thought_length) if self.thinks else 0
        self.reach = (given.reach or self.model.own_reach()) if self.thinks else 1
        settings = self.model.settings(self.thought_length, reach=self.reach)
        self._scorer = ContinuationScorer(
            self.model, settings, given.batch_size, think=self.policy, seed=given.seed
        )  # fmt: skip
        self._generator = Generator(self.model, batch_size=self._scorer.batch_size)
        longest = self._scorer.longest - 1
        self.max_length = given.max_length or longest
        if self.max_length > longest:
            raise ConfigError(f"max_length is {self.max_length}; this model allows at most {longest} tokens.")
        self.tokenizer = self.model.tokenizer.fast
        self._begin = self._begins(given.add_bos_token)

    @property
    def batch_size(self) -> int:
        """Number of texts per batch, over all local devices."""
        return self._scorer.batch_size

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that precedes texts without context."""
        if self._given.prefix_token_id is not None:
            return self._given.prefix_token_id
        return (self.model.bos or self.model.tokenizer.usual_begin or (self.eot_token_id,))[-1]

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, which the harness uses to name its request cache."""
        return self.model.tokenizer.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness writes next to its results."""
        return {
            **self.model.record,
            "thoughts": self.thinks,
            "think": str(self.policy),
            "evaluated_thought_length": self.thought_length,
            "reach": self.reach,
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Formats a conversation with the tokenizer's chat template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template_arguments,
            )
        )

    @property
    def _template_arguments(self) -> dict[str, Any]:
        thinking = self._given.enable_thinking
        return {**self._given.chat_template_args, **({} if thinking is None else {"enable_thinking": thinking})}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns token ids. Begin tokens are the model's unless an argument says otherwise, and are never repeated."""
        begin = self._begin if add_special_tokens is None else self._begins(add_special_tokens)
        return self.model.tokenizer.encode_text(string, begin)

    def _begins(self, add_bos_token: bool | None) -> tuple[int, ...]:
        """Ids that begin a text.

        Raises:
          ConfigError: a begin token is requested, but the tokenizer has none.
        """
        if add_bos_token is None:
            return self.model.bos
        begin = self.model.tokenizer.usual_begin if add_bos_token else ()
        if add_bos_token and not begin:
            raise ConfigError(
                f"add_bos_token is True, but the tokenizer of {self._given.checkpoint} has no begin-of-text token."
            )
        return begin

    def _require_same(self, name: str) -> None:
        """Rejects a tokenizer that differs from the model's own."""
        if load_tokenizer(name).vocabulary_fingerprint != self.model.tokenizer.vocabulary_fingerprint:
            raise ConfigError(
                f"tokenizer={name!r} produces other ids than the tokenizer of {self._given.checkpoint}. Omit this "
                "argument."
            )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows as long as possible, each token scored once."""
        windows: list[Encoded] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for context, scored in map(make_disjoint_window, rolling):
                windows.append((None, context, scored))
                owners.append(owner)
        totals = np.zeros(len(requests))
        scored_windows = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (log_prob, _) in zip(owners, scored_windows, strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns (log-probability, whether greedy decoding produces it) of each continuation.

        Continuations of one context that differ only in their last token share one pass.
        """
        found: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for shared in _slices(self._group(requests), BATCHES_AT_ONCE * self.batch_size):
                scores = self._scorer([tail for tail, _ in shared])
                for (tail, numbers), score in zip(shared, scores, strict=True):
                    talk = score.talk  # equal to `score.base` if the model does not think
                    before = -float(talk.nll[:-1].sum(dtype=np.float64))
                    written = bool(talk.correct[:-1].all())
                    for number in numbers:
                        last = requests[number][2][-1]
                        log_prob = before + float(talk.candidates[-1, tail.candidates.index(last)])
                        found[number] = log_prob, written and int(talk.best[-1]) == last
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
                    bar.update(len(numbers))
        return found

    def _group(self, requests: Sequence[Encoded]) -> list[tuple[Continuation, list[int]]]:
        """Returns the tails to score, the longest first, each with the numbers of its requests."""
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not continuation or len(continuation) > self.max_length:
                raise DataError(
                    f"A request of the harness has {len(context)} tokens of context and {len(continuation)} to score; "
                    f"at least one of each is needed, and at most {self.max_length} can be scored."
                )
            tokens = (*context, *continuation)[-(self.max_length + 1) :]  # too long: the beginning is cut off
            groups.setdefault((tokens[:-1], len(continuation)), []).append(number)

        def tail(before: tuple[int, ...], last: int, numbers: list[int]) -> Continuation:
            candidates = tuple(dict.fromkeys(requests[number][2][-1] for number in numbers))
            return Continuation((*before, candidates[0]), last, candidates, numbers[0])

        tails = [(tail(before, last, numbers), numbers) for (before, last), numbers in groups.items()]
        return sorted(tails, key=lambda pair: -len(pair[0].tokens))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates the text after each context, up to one of the task's stop strings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        found = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for numbers in groups.values():
                settings = dict(requests[numbers[0]].args[1])
                contexts = {number: self.tok_encode(requests[number].args[0]) for number in numbers}
                numbers.sort(key=lambda number: -len(contexts[number]))
                for part in _slices(numbers, self.batch_size):
                    texts = self._generate([contexts[number] for number in part], settings, part)
                    for number, text in zip(part, texts, strict=True):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(part))
        return found

    def _generate(self, contexts: Sequence[list[int]], settings: dict[str, Any], numbers: Sequence[int]) -> list[str]:
        """Generates texts after contexts of token ids; the requests' numbers make seeds independent of batches."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(settings, self._given.max_gen_toks))
        stop = handle_stop_sequences(given.pop("until"), eos=self.tokenizer.decode(self.eot_token_id))
        max_tokens = given.pop("max_gen_toks")
        unknown = [name for name in given if name not in SAMPLING and given[name] not in (None, NEUTRAL.get(name))]
        if unknown:
            raise ConfigError(
                f"The generation settings {', '.join(unknown)} are not supported; {', '.join(sorted(SAMPLING))}, until "
                "and max_gen_toks are."
            )
        room = self.max_length - max_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks is {max_tokens}, but this model allows {self.max_length} tokens with the context. Give "
                "a smaller --gen_kwargs max_gen_toks=N."
            )
        generations = self._generator.generate(
            [context[-room:] for context in contexts],
            max_tokens=max_tokens,
            think=str(self.policy),
            thought_length=self.thought_length or None,
            reach=self.reach,
            temperature=float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0,
            top_p=float(given.get("top_p") or 1.0),
            seed=[self._given.seed + number for number in numbers],
            stop=[text for text in stop if text],
        )
        return [self._answer(one.token_ids, stop) for one in generations]

    def _answer(self, ids: Sequence[int], stop: list[str]) -> str:
        """The text of generated ids up to a stop string; with `think_end_token`, only the text after it."""
        end = self._given.think_end_token
        if isinstance(end, int) and end in ids:
            ids = ids[len(ids) - list(reversed(ids)).index(end) :]
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        if isinstance(end, int):
            text = text.lstrip()
        return postprocess_generated_text(text, stop=stop, think_end_token=end if isinstance(end, str) else None)


def _slices(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
