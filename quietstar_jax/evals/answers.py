"""The tokens of an answer, and which of them the published metric evaluates.

The published evaluation lists token ids of one tokenizer: ten digits and the line end for numbers, ` A` .. ` E` and the
line end for choices. This module finds them in any tokenizer; for Mistral's tokenizer the ids are the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.errors import DataError
from quietstar_jax.evals.questions import Question

QUESTION, ANSWER, END = "Q: ", "\nA:", "\n"
PROBED_NUMBERS = 1000  # from 0: their first tokens are those of all numbers
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of byte fallback: used only where no other token exists


class WrittenAnswer(NamedTuple):
    """A question with its answer as token ids.

    Attributes:
      tokens: the whole text; last: how many tokens at the end are the answer, line end included.
      allowed: ids that an answer of this kind may contain; end: those of them that end it.
      is_choice: whether the answer is the label of a choice, not a number.
    """

    tokens: tuple[int, ...]
    last: int
    allowed: tuple[int, ...]
    end: tuple[int, ...]
    is_choice: bool


class AnswerWriter:
    """Encodes questions and answers with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, bos: Sequence[int]):
        """Args: bos: ids that begin every text."""
        self._tokenizer = tokenizer
        self._bos = tuple(bos)
        self._known_labels: dict[tuple[str, ...], tuple[int, ...]] = {}

    def write(self, question: Question) -> WrittenAnswer:
        """Encodes `Q: question` (with its choices), `A: answer` and a line end.

        Raises:
          DataError: the tokenizer cannot encode the answer, or does not distinguish the choices.
        """
        tokens, count = self._encode(f"{QUESTION}{question.text}{ANSWER}", f" {question.answer}{END}")
        answer = tokens[-count:] if count else []
        if not count or self._tokenizer.unk_id in answer:
            raise DataError(
                f"Question {question.line}: the tokenizer {self._tokenizer.name} cannot represent the answer "
                f"{question.answer!r} after {ANSWER!r}. Use a model whose tokenizer can."
            )
        content = self.label_tokens(question.labels) if question.labels else self.digit_tokens
        if not set(answer) & set(content):
            raise DataError(
                f"Question {question.line}: no token of the answer {question.answer!r} is a digit or a label."
            )
        allowed = (*content, *self.end_tokens)
        return WrittenAnswer((*self._bos, *tokens), count, allowed, self.end_tokens, bool(question.labels))

    @functools.cached_property
    def digit_tokens(self) -> tuple[int, ...]:
        """All tokens of digits, also with a space before them; and the space if only some numbers begin with its token.

        Without it, the position of an answer's first digit would reveal which digits are possible.
        """
        found: dict[str, list[tuple[bool, int]]] = {}
        for name, token in self._tokenizer.fast.get_vocab().items():
            text = self._tokenizer.decode([token])
            if re.fullmatch(r" ?[0-9]+", text):
                found.setdefault(text, []).append((bool(BYTE_TOKEN.fullmatch(name)), token))
        regular = ([token for is_byte, token in same if is_byte == min(same)[0]] for same in found.values())
        digits = sorted(token for same in regular for token in same)
        first = {self._spell(str(number))[0] for number in range(PROBED_NUMBERS)}
        spaces = sorted(first - set(digits)) if first & set(digits) else []
        return (*digits, *spaces)

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens of the line end after an answer; none if the tokenizer drops it."""
        tokens, _ = self._encode(f"{QUESTION}1{ANSWER}", f" 1{END}")
        before, _ = self._encode(f"{QUESTION}1{ANSWER}", " 1")
        return tuple(tokens[len(before) :]) if tokens[: len(before)] == before else ()

    def label_tokens(self, labels: tuple[str, ...]) -> tuple[int, ...]:
        """Returns the last token of the encoding of each label, and the tokens before it if encodings differ in them.

        Raises:
          DataError: the labels do not differ in one token each.
        """
        if labels not in self._known_labels:
            spelled = [self._spell(label) for label in labels]
            own = [spelling[-1:] for spelling in spelled]
            if len(set(own)) != len(own) or () in own or (self._tokenizer.unk_id,) in own:
                raise DataError(
                    f"The tokenizer {self._tokenizer.name} does not separate the labels {', '.join(labels)} by one "
                    "token each. Remove the labels from the choices: they are then A, B, C ..."
                )
            before = {spelling[:-1] for spelling in spelled}
            spaces = sorted({token for tokens in before for token in tokens}) if len(before) > 1 else []
            self._known_labels[labels] = (*(token for (token,) in own), *spaces)
        return self._known_labels[labels]

    def _spell(self, answer: str) -> tuple[int, ...]:
        """The tokens of an answer without its line end."""
        tokens, count = self._encode(f"{QUESTION}a{ANSWER}", f" {answer}{END}")
        return tuple(tokens[len(tokens) - count : len(tokens) - len(self.end_tokens)])

    def _encode(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Ids of the whole text, and how many of them come after the prompt."""
        found = self._tokenizer.fast.backend_tokenizer.encode(prompt + answer, add_special_tokens=False)
        return found.ids, sum(start >= len(prompt) for start, _ in found.offsets)
