"""Documents that share a row: nothing of one reaches another, and each is scored as if it were alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.data.packing import document_starts
from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thoughts import controls
from quietstar_jax.thoughts.attention import prefix_xla
from quietstar_jax.thoughts.loss import language_model_loss, quiet_star_loss
from quietstar_jax.thoughts.objective import count_targets
from quietstar_jax.thoughts.positions import choose, count_chosen
from quietstar_jax.thoughts.sample import sample_thoughts
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.text import read_text
from tests.thoughts.cases import Case, random_model, relative_error, worst_errors

ROWS = ((4, 1, 5, 3), (6, 7))  # tokens of the documents in each row, before the padding
CASE = Case("documents", length=16, mask=("1" * 13 + "000",) * 2, positions_per_chunk=5)
WINDOWED = dataclasses.replace(
    CASE, architecture={"num_heads": 4, "num_kv_heads": 2, "sliding_window": 4, "full_attention_layers": (1,)}
)


def starts_of(rows: Any = ROWS, length: int = 16) -> jax.Array:
    """[B, L]; padding is a document of its own."""
    numbers = [np.repeat(np.arange(len(row) + 1), [*row, length - sum(row)]) for row in rows]
    return jnp.asarray(np.stack([document_starts(row) for row in numbers]))


def apart(x: jax.Array, axis: int) -> jax.Array:
    """Each document of x [2, ...] alone at the start of a row of its own, with zeros behind: [documents, ...]."""
    found = []
    for row, lengths in zip(np.asarray(x), ROWS, strict=True):
        for start, size in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
            own = np.moveaxis(np.zeros_like(row), axis - 1, 0)
            own[:size] = np.moveaxis(row, axis - 1, 0)[start : start + size]
            found.append(np.moveaxis(own, 0, axis - 1))
    return jnp.asarray(np.stack(found))


def objective(case: Case, graphdef: Any, tokens: Any, mask: Any, thoughts: Any, counts: Any, starts: Any = None) -> Any:
    @jax.jit
    def both(params: Any) -> Any:
        def loss(params: Any) -> Any:
            model = merge(graphdef, params)
            plain = language_model_loss(model, tokens, mask, counts, case.thought, starts)[0]
            total, metrics = quiet_star_loss(
                model, tokens, mask, lambda *_: thoughts, counts, case.thought, case.positions_per_chunk, starts=starts
            )
            return total + plain, metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    return both


@pytest.mark.some(1)
@pytest.mark.parametrize(
    ("case", "mixing"), [(WINDOWED, "hidden_states"), *((CASE, mixing) for mixing in ("log_probabilities", "none"))],
    ids=["windows", "log_probabilities", "thought_alone"],
)  # fmt: skip
def test_a_packed_row_is_the_sum_of_its_documents(case: Case, mixing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, metrics and all gradients, with given thoughts."""
    monkeypatch.setattr(prefix_xla, "KEY_BLOCK", 3)
    case = dataclasses.replace(case, config={"mixing": mixing})
    params, graphdef = split(random_model(case.decoder, case.thought.config.embedding_scale))
    (tokens, mask), thoughts, starts = case.text(), case.thoughts(), starts_of()
    counts = count_targets(mask, case.thought.tokens_ahead, starts=starts)
    sizes = [size for row in ROWS for size in row]
    assert counts.targets.tolist() == [sum(max(size - ahead, 0) for size in sizes) for ahead in (1, 2)]
    (value, metrics), gradient = objective(case, graphdef, tokens, mask, thoughts, counts, starts)(params)
    alone = apart(tokens, 1), apart(mask, 1), jax.tree.map(lambda x: apart(x, 2), thoughts)
    (total, all_metrics), all_gradients = objective(case, graphdef, *alone, counts)(params)
    assert relative_error(value, total) < 1e-5
    # Distinct thoughts are counted within a sequence, here of several documents.
    assert metrics.pop("unique_thought_rate") <= all_metrics.pop("unique_thought_rate")
    assert not worst_errors(metrics, all_metrics, 3e-5)
    assert not worst_errors(gradient, all_gradients, 1e-4)
    if case is not WINDOWED:
        blind = objective(case, graphdef, tokens, mask, thoughts, counts)(params)[0][0]
        assert abs(float(blind - value)) > 1e-2  # without the mask it is another objective


@pytest.mark.parametrize("greedy", [True, False])
def test_thoughts_are_those_of_the_document_alone(greedy: bool) -> None:
    s = WINDOWED.thought
    model = random_model(WINDOWED.decoder, s.config.embedding_scale)
    (tokens, mask), starts = WINDOWED.text(), starts_of()
    uniforms = jax.random.uniform(jax.random.key(0), (2, s.num_thoughts, 16, s.thought_length))

    @jax.jit
    def thoughts(tokens: Any, mask: Any, uniforms: Any, starts: Any = None) -> Any:
        text = read_text(model.decoder, tokens, mask, starts, dtype=s.dtype)
        return sample_thoughts(model, text, jnp.arange(16), None if greedy else uniforms, s, 5).tokens

    found = apart(thoughts(tokens, mask, uniforms, starts), 2)
    alone = thoughts(apart(tokens, 1), apart(mask, 1), apart(uniforms, 2))
    for one, other, size in zip(found, alone, (size for row in ROWS for size in row), strict=True):
        np.testing.assert_array_equal(one[:, :size], other[:, :size])


@pytest.mark.some(3)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_no_gradient_passes_from_one_document_to_another(which: int, masked: bool) -> None:
    """Each of three documents has words of its own: what is scored in one gives those of others no gradient at all."""
    case = dataclasses.replace(CASE, batch=1, length=12, mask=("1" * 12,), architecture={"vocab_size": 16})
    s, number = case.thought, np.repeat(np.arange(3), 4)
    model = random_model(case.decoder, s.config.embedding_scale)
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, 3, 12) + 3 * number, jnp.int32)[None]
    thoughts = jnp.asarray(
        draw.integers(9, 11, (1, s.num_thoughts, 12, s.thought_length)), jnp.int32
    )  # words of no document
    own, starts = jnp.asarray(number == which), jnp.asarray(document_starts(number))[None] if masked else None

    @jax.jit
    @jax.grad
    def gradient(embedding: jax.Array) -> jax.Array:
        params, graphdef = split(model)
        changed = merge(graphdef, params | {"decoder.embedding": embedding})
        text = read_text(changed.decoder, tokens, jnp.ones((1, 12), bool), starts, dtype=s.dtype)
        scores = score_thoughts(changed, text, jnp.arange(12), thoughts, s)
        scored = text.nll[0] + scores.nll.sum(axis=(0, 1, 3)) + scores.log_probs.sum(axis=(0, 1, 3))
        return jnp.where(own, scored, 0).sum()

    found = np.abs(gradient(model.decoder.embedding[...])).max(axis=-1)[:9].reshape(3, 3).max(axis=-1)
    assert found[which] > 1e-3
    others = np.delete(found, which)
    assert (others == 0).all() if masked else others.max() > 1e-3


def test_nothing_is_predicted_across_a_boundary() -> None:
    s, starts = CASE.thought, starts_of()
    model = random_model(CASE.decoder, s.config.embedding_scale)
    tokens, mask = CASE.text()
    text = read_text(model.decoder, tokens, mask, starts, dtype=s.dtype, with_entropy=True)
    scores = score_thoughts(model, text, jnp.arange(16), CASE.thoughts().tokens, s)
    for b, lengths in enumerate(ROWS):
        ends = np.cumsum(lengths)
        for j in range(16):
            left = int(ends[np.searchsorted(ends, j, side="right")]) - 1 - j if j < ends[-1] else 0  # tokens to come
            assert (float(text.nll[b, j]) != 0) == (left > 0), (b, j)
            for k in range(2):
                assert (scores.nll[b, :, j, k] != 0).all() == (left > k), (b, j, k)
                assert (scores.nll[b, :, j, k] != 0).any() == (left > k), (b, j, k)


@pytest.mark.parametrize("how", ["entropy", "random", "stride"])
def test_chosen_positions_have_all_their_targets_in_their_document(how: str) -> None:
    case = dataclasses.replace(CASE, config={"positions": how, "position_fraction": 0.5})
    s, starts = case.thought, starts_of()
    model = random_model(case.decoder, s.config.embedding_scale)
    tokens, mask = case.text()
    draws = jax.random.uniform(jax.random.key(0), (2, 16))
    text = read_text(model.decoder, tokens, mask, starts, dtype=s.dtype, with_entropy=True)
    chosen = np.asarray(choose(text, draws, s))
    allowed = [{0, 1, 5, 6, 7, 10}, {0, 1, 2, 3, 6, 7, 8, 9, 10}]  # two more tokens follow in the document
    for row, those, count in zip(chosen, allowed, count_chosen(tokens, mask, draws, s, starts).tolist(), strict=True):
        taken = {int(j) for j in row if j < 16}
        assert taken <= those
        assert len(taken) == count > 0


def test_shuffled_thoughts_stay_in_their_document() -> None:
    starts = starts_of()
    real = jnp.arange(16)[None] < jnp.array([[13], [13]])
    places = np.asarray(controls.earlier_places(jax.random.uniform(jax.random.key(0), (2, 400, 16)), real, starts))
    for b in range(2):
        for j in range(13):
            first = int(starts[b, j])
            assert set(places[b, :, j].tolist()) == (set(range(first, j)) or {j}), (b, j)
