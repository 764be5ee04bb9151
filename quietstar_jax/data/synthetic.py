"""The embedded corpus: short documents whose answers depend on intermediate steps.

A document is a question, a sign, optionally a passage between marks, the answer and a full stop. Words are
separated by single spaces, and every word is one token:

    sum 3 +1 +4 +1 +5 +9 show ( 3 4 8 9 4 3 ) 3 .                                  steps
    kim has 4 wage fig gift lamp coat show ( well hmm so right maybe er ) 8 .      chatter
    convert 9 rod inch foot cup yard ask 4 .                                       at_once
    a>c b>d c>f d>f e>c f>b from c ask ( c f b d f b ) b .                         at_once, with a stray mark

Every problem is a chain of `STEPS` states. State 1 is given in the question; state i + 1 is a simple function
of state i and one item of the question; the answer is state `STEPS`. Only the last digit of a number is kept.

    kind      question                        state 1      state i + 1
    sum       sum d +d1 .. +d5                d            state i + d(i) modulo 10
    story     NAME has d e1 .. e5             d            state i + gain of event e(i) modulo 10
    convert   convert d u1 .. u5              d            factor * state i + shift of unit u(i) modulo 10
    chase     a>y b>y .. f>y from s           s            the node that state i points to

Reasons for this design:

* A written step needs one look-up and one small table. An immediate answer needs all steps in sequence.
* In the first three kinds, every item maps the state by a bijection, and the first state is a uniform digit. Given all
  items but not the first state, the answer is uniform; given the first state too, it is nearly uniform until all items
  are known. So no statistic short of the whole chain is useful. In `chase`, the node after five hops is, equally often,
  the start, the node one, two or three hops on, or a node visited for the first time. So no rule of the form "n hops
  on" is right more than once in five (a rule that counts how often each node is pointed to: at best 45 %).
* The opening and the closing mark are different words. `(` is always followed by a passage, and `)` by an answer, so a
  start embedding and an end embedding that are initialised from these words have one meaning each.
* `ask` is followed by the answer, rarely by a mark: after it, a thought must predict the answer, but the text still
  shows what a thought looks like. If a mark follows in fewer than one case in eleven, the most likely word after
  `ask` is an answer even for a model that guesses among ten answers.
* There are ten possible answers, and fewer alternatives for any other word. So without written steps, the answer is the
  hardest token of its document, like the tokens of real text that need thought.
* A hash of the problem alone assigns it to a split, so a held-out problem is never in a training split, for any seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from quietstar_jax.data.sources.common import Label, Piece
from quietstar_jax.data_config import SyntheticConfig
from quietstar_jax.errors import DataError

STEPS = 6  # states of a chain, and words between marks
SHOW, ASK, OPEN, CLOSE, STOP = "show", "ask", "(", ")", "."
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
META = ("<|startthought|>", "<|endthought|>")

DIGITS = tuple("0123456789")
NODES = tuple("abcdef")
ADDENDS = ("+1", "+2", "+3", "+4", "+5", "+7", "+9")
NAMES = ("ann", "bob", "cleo", "dan", "eve", "finn", "gus", "kim")
EVENTS = {"wage": 7, "gift": 3, "coin": 1, "prize": 9, "fig": -2, "loaf": -4, "lamp": -6, "coat": -8}
UNITS = {  # amount -> factor * amount + shift; the factors are coprime to ten, so every map is invertible
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
    """One document and its problem."""

    kind: str  # one of `KINDS`
    style: str  # steps | chatter | at_once
    question: tuple[str, ...]
    steps: tuple[str, ...]  # the correct steps, [STEPS], written out or not
    passage: tuple[str, ...]  # the words between the marks; empty = no marks
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
    """A question, its chain of states, and an identity that does not depend on irrelevant words of the question."""

    question: tuple[str, ...]
    steps: tuple[str, ...]  # [STEPS]
    identity: str


class Draw:
    """Uniform choices from one 512-bit hash, a pure function of `key`; one document uses only a part of the bits."""

    def __init__(self, *key: object) -> None:
        self._bits = int.from_bytes(blake2b("/".join(map(str, key)).encode()).digest(), "little")

    def below(self, n: int) -> int:
        """Returns an integer within 0 .. n - 1."""
        self._bits, choice = divmod(self._bits, n)
        return choice

    def happens(self, probability: float) -> bool:
        return self.below(1 << 30) < probability * (1 << 30)

    def several(self, words: Sequence[str], count: int) -> tuple[str, ...]:
        """Returns `count` words, chosen independently."""
        return tuple(words[self.below(len(words))] for _ in range(count))

    def arrangement(self, words: Sequence[str]) -> list[str]:
        """Returns all words in random order."""
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
    """Returns a problem about digits; words before `identity_from` are not part of its identity."""
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
    """Returns every word of the corpus in the order of token ids, which follow those of the special tokens."""
    signs = (SHOW, ASK, OPEN, CLOSE, STOP, "sum", "has", "convert", "from")
    return (*signs, *DIGITS, *ADDENDS, *NODES, *POINTERS, *NAMES, *EVENTS, *UNITS, *CHATTER)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer of the corpus: splits at white space, one token per word, with meta tokens of thoughts."""
    words = (*SPECIAL.values(), *META, *vocabulary())
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(META), **SPECIAL)


def split_of(kind: str, problem: Problem) -> str:
    """Returns the only split in which a problem may occur, for any seed."""
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
    """Returns `count` held-out documents of style `at_once` without marks; the kinds alternate."""
    documents = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        problem = _problem(kind, "validation", seed, "questions", i)
        documents.append(Document(kind, "at_once", problem.question, problem.steps, (), problem.steps[-1]))
    return documents


def is_useful(document: Document, thought_words: Sequence[str]) -> bool:
    """Whether the words of a thought contain all correct steps of the document, in order and without a gap.

    So a thought of exactly `STEPS` words must equal them, a longer one may have words before or after, and a shorter
    one never contains them.
    """
    words, steps = tuple(thought_words), document.steps
    return any(words[i : i + len(steps)] == steps for i in range(len(words) - len(steps) + 1))


def _useful_share(config: SyntheticConfig) -> float:
    """Returns the fraction of passages between marks that contain steps."""
    marked = config.steps_fraction + config.chatter_fraction
    return config.steps_fraction / marked if marked else 1.0
