"""The embedded corpus: short documents whose later text depends on intermediate steps.

A document is a question, a sign, perhaps a passage between marks, the answer and a full stop; words are
separated by single spaces and every word is one token:

    sum 3 +1 +4 +1 +5 +9 show ( 3 4 8 9 4 3 ) 3 .                                  steps
    kim has 4 wage fig gift lamp coat show ( well hmm so right maybe er ) 8 .      chatter
    convert 9 rod inch foot cup yard ask 4 .                                       at_once
    a>c b>d c>f d>f e>c f>b from c ask ( c f b d f b ) b .                         at_once, with a stray mark

Every problem is a chain of `STEPS` states. State 1 stands in the question; state i + 1 is a simple function
of state i and one piece of the question; the answer is state `STEPS`. Numbers keep their last digit only.

    kind      question                        state 1      state i + 1
    sum       sum d +d1 .. +d5                d            state i + d(i) modulo 10
    story     NAME has d e1 .. e5             d            state i + gain of event e(i) modulo 10
    convert   convert d u1 .. u5              d            factor * state i + shift of unit u(i) modulo 10
    chase     a>y b>y .. f>y from s           s            what state i points to

Why it is built so:

* A written step needs one look-up and one small table. The answer at once needs all of them in a row.
* In the first three kinds the map of every piece is a bijection and the first state a uniform digit, so the answer
  is uniform given all pieces without it, and given it nearly so until all pieces are known: no statistic short of
  the whole chain tells anything worth having. In `chase`
  five hops end, equally often, at the start, one, two or three hops on, or at a node met for the first time, so no
  rule "so many hops on" is right more than once in five (counting how often each node is pointed to: at best 45 %).
* The opening and the closing mark are two words. What follows `(` is a passage, what follows `)` is an answer,
  whatever came before; a start embedding and an end embedding that begin as theirs have one meaning each.
* `ask` is followed by the answer, rarely by a mark: there a thought must predict the answer, yet the text still
  shows what a thought looks like. Where a mark opens in fewer than one case in eleven, the likeliest word after
  `ask` is an answer even for a model that guesses among ten.
* Ten answers are more than any other word has alternatives: where the steps are not written, the answer is the hardest
  token of its document, as the token that wants thought is in text.
* Problems are dealt to the splits by a hash of the problem alone: no seed puts a held-out one into a training split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from quietstar_jax.config import SyntheticConfig
from quietstar_jax.data.sources.common import Label, Piece
from quietstar_jax.errors import DataError

STEPS = 6  # states of a chain, so words between marks
SHOW, ASK, OPEN, CLOSE, STOP = "show", "ask", "(", ")", "."
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
META = ("<|startthought|>", "<|endthought|>")

DIGITS = tuple("0123456789")
NODES = tuple("abcdef")
ADDENDS = ("+1", "+2", "+3", "+4", "+5", "+7", "+9")
NAMES = ("ann", "bob", "cleo", "dan", "eve", "finn", "gus", "kim")
EVENTS = {"wage": 7, "gift": 3, "coin": 1, "prize": 9, "fig": -2, "loaf": -4, "lamp": -6, "coat": -8}
UNITS = {  # amount -> factor * amount + shift; the factors are coprime to ten, so every map can be undone
    "inch": (3, 1), "foot": (7, 2), "yard": (9, 5), "rod": (3, 8),
    "gram": (7, 3), "pound": (9, 4), "cup": (1, 7), "pint": (1, 6),
}  # fmt: skip
CHATTER = ("well", "hmm", "er", "so", "right", "maybe", "look", "wait")

POINTERS = tuple(f"{a}>{b}" for a in NODES for b in NODES if a != b)
SHAPES = ((0, 5), (0, 4), (1, 3), (2, 2), (2, 4))  # of a `chase`: hops from start to cycle, length of the cycle
_EVENTS, _UNITS = tuple(EVENTS), tuple(UNITS)
_VALIDATION_SHARE = 8  # one problem in eight is held out


@dataclass(frozen=True)
class Document:
    """One document and the problem behind it."""

    kind: str  # one of `KINDS`
    style: str  # steps | chatter | at_once
    question: tuple[str, ...]
    steps: tuple[str, ...]  # the right ones, [STEPS], written out or not
    passage: tuple[str, ...]  # what stands between the marks; empty = no marks
    answer: str

    @property
    def prompt(self) -> str:
        """The question and its sign; the next word is the answer, or an opening mark."""
        return " ".join((*self.question, ASK if self.style == "at_once" else SHOW))

    @property
    def text(self) -> str:
        between = (OPEN, *self.passage, CLOSE) if self.passage else ()
        return " ".join((self.prompt, *between, self.answer, STOP))


@dataclass(frozen=True)
class Problem:
    """A question, the chain it asks for, and an identity that does not depend on how it is written."""

    question: tuple[str, ...]
    steps: tuple[str, ...]  # [STEPS]
    identity: str


class Draw:
    """Uniform choices out of one 512-bit hash: a pure function of `key`, far from exhausted by one document."""

    def __init__(self, *key: object) -> None:
        self._bits = int.from_bytes(blake2b("/".join(map(str, key)).encode()).digest(), "little")

    def below(self, n: int) -> int:
        """An integer of 0 .. n - 1."""
        self._bits, choice = divmod(self._bits, n)
        return choice

    def happens(self, probability: float) -> bool:
        return self.below(1 << 30) < probability * (1 << 30)

    def several(self, words: Sequence[str], count: int) -> tuple[str, ...]:
        """`count` independent words."""
        return tuple(words[self.below(len(words))] for _ in range(count))

    def arrangement(self, words: Sequence[str]) -> list[str]:
        """All words in random order."""
        left = list(words)
        for i in range(len(left) - 1):
            j = i + self.below(len(left) - i)
            left[i], left[j] = left[j], left[i]
        return left


def _sum(draw: Draw) -> Problem:
    states, addends = [draw.below(10)], draw.several(ADDENDS, STEPS - 1)
    for addend in addends:
        states.append((states[-1] + int(addend)) % 10)
    return _arithmetic(("sum", str(states[0]), *addends), states)


def _story(draw: Draw) -> Problem:
    name, events = NAMES[draw.below(len(NAMES))], draw.several(_EVENTS, STEPS - 1)
    states = [draw.below(10)]
    for event in events:
        states.append((states[-1] + EVENTS[event]) % 10)
    return _arithmetic((name, "has", str(states[0]), *events), states, identity_from=1)


def _convert(draw: Draw) -> Problem:
    states, units = [draw.below(10)], draw.several(_UNITS, STEPS - 1)
    for unit in units:
        factor, shift = UNITS[unit]
        states.append((factor * states[-1] + shift) % 10)
    return _arithmetic(("convert", str(states[0]), *units), states)


def _arithmetic(question: tuple[str, ...], states: Sequence[int], identity_from: int = 0) -> Problem:
    """A problem about digits; words before `identity_from` do not matter to it."""
    return Problem(question, tuple(map(str, states)), " ".join(question[identity_from:]))


def _chase(draw: Draw) -> Problem:
    tail, cycle = SHAPES[draw.below(len(SHAPES))]
    nodes = draw.arrangement(NODES)
    path, others = nodes[: tail + cycle], nodes[tail + cycle :]
    target = dict(zip(path, [*path[1:], path[tail]], strict=True))
    for node in others:
        i = NODES.index(node)
        target[node] = NODES[(i + 1 + draw.below(len(NODES) - 1)) % len(NODES)]
    steps = [path[0]]
    while len(steps) < STEPS:
        steps.append(target[steps[-1]])
    pointers = [f"{node}>{target[node]}" for node in NODES]
    return Problem((*pointers, "from", path[0]), tuple(steps), " ".join((*pointers, path[0])))


_GENERATORS: dict[str, Callable[[Draw], Problem]] = {
    "sum": _sum, "story": _story, "convert": _convert, "chase": _chase,
}  # fmt: skip
KINDS = tuple(_GENERATORS)
SPLITS = ("train", "validation")


def vocabulary() -> tuple[str, ...]:
    """Every word of the corpus, in the order of the token ids, after the special ones."""
    signs = (SHOW, ASK, OPEN, CLOSE, STOP, "sum", "has", "convert", "from")
    return (*signs, *DIGITS, *ADDENDS, *NODES, *POINTERS, *NAMES, *EVENTS, *UNITS, *CHATTER)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The corpus's tokenizer: splits at white space, one token a word, meta tokens of thoughts included."""
    words = (*SPECIAL.values(), *META, *vocabulary())
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(META), **SPECIAL)


def split_of(kind: str, problem: Problem) -> str:
    """The one split in which a problem may occur, under every seed."""
    digest = blake2b(f"{kind} {problem.identity}".encode(), digest_size=4).digest()
    return "train" if int.from_bytes(digest, "little") % _VALIDATION_SHARE else "validation"


def _problem(kind: str, split: str, *key: object) -> Problem:
    attempt = 0
    while split_of(kind, problem := _GENERATORS[kind](Draw(*key, attempt))) != split:
        attempt += 1
    return problem


class SyntheticSource:
    """Random access to the documents of one split; document i is a pure function of (config, seed, split, i)."""

    def __init__(self, config: SyntheticConfig, *, split: str, seed: int) -> None:
        """Raises DataError for an unknown split."""
        if split not in SPLITS:
            raise DataError(f"The embedded corpus has no split {split!r}; it has {' and '.join(SPLITS)}.")
        self._config, self._split, self._seed = config, split, seed

    def __len__(self) -> int:
        return self._config.documents if self._split == "train" else self._config.validation_documents

    def __getitem__(self, index: int) -> str:
        return self.document(index).text

    def pieces(self) -> list[Piece]:
        sample = "".join(self[i] for i in range(min(len(self), 16)))
        return [Label("the embedded corpus", f"{self._config} {self._split} {self._seed} {sample}")]

    def document(self, index: int) -> Document:
        """Raises IndexError outside 0 .. len - 1 (so that iteration ends)."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        config, key = self._config, (self._seed, self._split, index)
        draw = Draw(*key, "form")
        kind = KINDS[draw.below(len(KINDS))]
        problem = _problem(kind, self._split, *key)
        marked = config.steps_fraction + config.chatter_fraction
        shown = draw.happens(marked)
        passage: tuple[str, ...] = ()
        useful = True
        if shown or draw.happens(config.stray_mark_rate):
            useful = draw.happens(_useful_share(config))
            passage = problem.steps if useful else draw.several(CHATTER, STEPS)
        style = ("steps" if useful else "chatter") if shown else "at_once"
        return Document(kind, style, problem.question, problem.steps, passage, problem.steps[-1])


def answer_questions(*, seed: int, count: int) -> list[Document]:
    """`count` held-out documents that answer at once, no mark after the sign; the kinds take turns."""
    documents = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        problem = _problem(kind, "validation", seed, "questions", i)
        documents.append(Document(kind, "at_once", problem.question, problem.steps, (), problem.steps[-1]))
    return documents


def is_useful(document: Document, thought_words: Sequence[str]) -> bool:
    """Whether the words of a thought hold all right steps of the document, in order and without a gap.

    A thought of exactly `STEPS` words must therefore equal them; a longer one may have words before or after; a
    shorter one never holds them.
    """
    words, wanted = tuple(thought_words), document.steps
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _useful_share(config: SyntheticConfig) -> float:
    """Of the passages between marks, those that hold steps."""
    marked = config.steps_fraction + config.chatter_fraction
    return config.steps_fraction / marked if marked else 1.0
