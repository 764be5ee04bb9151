"""Settings of the text: sources, tokenizer and sequences; part of the settings of a run, see `config.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from quietstar_jax.settings import (
    Fraction,
    Int64,
    Measured,
    NonEmpty,
    Positive,
    SameText,
    Unrelated,
    at_least,
    between,
    require,
)

TextDocuments = Literal["file", "paragraph", "line"]
Packing = Literal["random_span", "consecutive_spans", "packed"]
TEXT_DOCUMENTS, PACKINGS = map(get_args, (TextDocuments, Packing))


@dataclass(frozen=True)
class SyntheticConfig:
    """The embedded corpus (`data/synthetic.py`), used for sources named `synthetic`."""

    documents: Positive[Int64] = 1_000_000  # size of the training split
    validation_documents: Positive[Int64] = 2_000  # size of the validation split
    steps_fraction: Fraction = 0.375  # fraction of documents that write out their steps between marks
    chatter_fraction: Fraction = 0.125  # fraction of documents with useless chatter between the same marks
    stray_mark_rate: Fraction = 0.06  # fraction of the immediate answers in which a mark opens; below 1/11

    def conflicts(self) -> list[str]:
        total = self.steps_fraction + self.chatter_fraction
        return require(total <= 1, "steps_fraction + chatter_fraction", total, "at most 1")


@dataclass(frozen=True)
class DataConfig:
    """Input text: sources, tokenizer, and how documents become sequences of L tokens."""

    train: SameText[NonEmpty[tuple[str, ...]]] = ("synthetic",)  # files, folders, globs, URLs, `prepared:FOLDER`,
    # `tfds:NAME[/CONFIG]:SPLIT`, `hf:NAME[/CONFIG]:SPLIT`, or `synthetic`
    weights: tuple[Positive[float], ...] = ()  # share of the sequences from each train source; () = one corpus
    validation: Measured[tuple[str, ...]] = ("synthetic",)  # sources of held-out text, as in `train`
    data_dir: Unrelated[str] = ""  # where tensorflow-datasets stores prepared data; empty = its default
    cache_dir: Unrelated[str] = ""  # for indices and token counts of sources; empty = ~/.cache/quietstar_jax
    text_key: str = "text"  # field of a JSON line, a parquet row or a tfds example
    text_documents: TextDocuments = "file"  # what is one document of a text file; paragraphs end at a blank line
    tokenizer: SameText[str] = ""  # folder or hub id; empty = that of the model's checkpoint; `synthetic` = the
    # embedded one
    sequence_length: Annotated[int, at_least(3)] = 256  # L
    packing: Packing = "random_span"  # `random_span` = a span of each document, padded, as in the paper;
    # `consecutive_spans` = all of its spans; `packed` = documents end to end
    document_mask: bool = True  # for `packed`: no document attends to another, and no first token is predicted
    prepend_bos: Literal["auto", "document_start", "always", "never"] = "auto"  # begin documents and spans with the
    # begin-of-text token; `auto` = if the tokenizer itself does, `document_start` = as auto, but spans from within a
    # document begin without it
    append_eos: bool = True  # end every document with the end-of-text token
    max_unknown_fraction: Unrelated[Fraction] = 0.2  # refuse training text of which a larger fraction is unknown to
    # the tokenizer
    workers: Unrelated[Annotated[int, between(0, 1024)]] = 0  # processes that tokenize in advance; 0 = in this process
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def conflicts(self) -> list[str]:
        return require(
            len(self.weights) in (0, len(self.train)), "weights", self.weights,
            f"() or one number for each of the {len(self.train)} train sources",
        )  # fmt: skip
