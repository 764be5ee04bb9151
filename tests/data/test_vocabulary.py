"""Which tokens match a pattern."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.data.vocabulary import matching_ids
from tests.data.layouts import layouts


@pytest.mark.parametrize("name", layouts())
def test_the_text_of_a_token_has_its_leading_space(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(layouts()[name].write(tmp_path / "tokenizer")))
    rows = tokenizer.vocab_size
    spelled = [tokenizer.fast.backend_tokenizer.id_to_token(i) or "" for i in range(rows)]
    expected = tuple(i for i, text in enumerate(spelled) if re.search("^[Ġ▁][a-z]", text))
    assert len(expected) >= 3
    assert matching_ids(tokenizer, "^ [a-z]", rows) == expected
    cut = expected[-1]
    assert matching_ids(tokenizer, "^ [a-z]", cut) == expected[:-1]  # the model has no row for the last one
    assert matching_ids(tokenizer, "no token is this long", rows) == ()


def test_tokens_that_are_words() -> None:
    tokenizer = load_tokenizer("synthetic")
    found = matching_ids(tokenizer, "^s", tokenizer.vocab_size)
    assert {"show", "sum"} <= {tokenizer.decode([i]) for i in found}
