import numpy as np
import pytest

from quietstar_jax.errors import ConfigError
from quietstar_jax.evals.tails import Continuation, ContinuationScorer, grid_count, grid_length
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.thought_config import CONTROLS
from tests.evals.models import write_plain, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tails")
    write_plain(folder / "plain")
    write_run(folder / "run", folder / "plain")
    for control in CONTROLS[1:]:
        write_run(folder / control, folder / "plain", control=control)
    return folder


def texts(count=7, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(2, 258, draw.integers(5, 40)).tolist() for _ in range(count)]


def test_candidates_are_log_probabilities_of_their_tokens(folder):
    model = load_model(folder / "run")
    scorer = ContinuationScorer(model, model.settings(2), batch_size=2)
    tokens = texts(1)[0]
    everything = tuple(range(258))
    (score,) = scorer([Continuation(tokens, 3, everything)])
    truth = np.array(tokens[-3:])
    for view in (score.base, score.talk):
        np.testing.assert_allclose(np.exp(view.candidates).sum(axis=-1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(-view.candidates[np.arange(3), truth], view.nll, atol=1e-5)
        np.testing.assert_array_equal(view.candidates.argmax(axis=-1), view.best)
    few, many = scorer([Continuation(tokens, 3, (5, 9)), Continuation(tokens, 3, everything[:7])])
    np.testing.assert_allclose(few.base.candidates, score.base.candidates[:, [5, 9]], atol=1e-5)
    np.testing.assert_allclose(many.base.candidates, score.base.candidates[:, :7], atol=1e-5)


@pytest.mark.parametrize("name", ["run", *CONTROLS[1:]])
def test_scores_do_not_depend_on_the_batch(folder, name):
    model = load_model(folder / name)
    draw = np.random.default_rng(2)
    tails = [Continuation(draw.integers(2, 258, n).tolist(), 3 + n % 2) for n in (24, 17, 20, 23, 18)]
    together = ContinuationScorer(model, model.settings(2), batch_size=4)(tails)
    finished = []
    alone = ContinuationScorer(model, model.settings(2), batch_size=1)(tails, finished.append)
    assert sum(finished) == len(tails)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.talk.nll, other.talk.nll, atol=1e-4)
        np.testing.assert_array_equal(one.thoughts, other.thoughts)


@pytest.mark.parametrize("name", ["run", *CONTROLS[1:]])
def test_no_score_depends_on_a_later_token(folder, name):
    """Nor on how many there are: the same tokens are scored at the end of their text and with others behind them."""
    model = load_model(folder / name)
    scorer = ContinuationScorer(model, model.settings(3), batch_size=3)
    tokens = np.random.default_rng(5).integers(2, 258, 21).tolist()
    changed = [*tokens[:17], *((token + 7) % 250 + 2 for token in tokens[17:])]
    whole, other, cut = scorer([Continuation(tokens, 16), Continuation(changed, 16), Continuation(tokens[:17], 12)])
    for score in (whole, other):
        np.testing.assert_allclose(score.talk.nll[:12], cut.talk.nll, atol=1e-4)
    assert np.abs(whole.talk.nll[12:] - other.talk.nll[12:]).max() > 1e-2


def test_a_question_set_compiles_few_programs(folder):
    model = load_model(folder / "plain")
    scorer = ContinuationScorer(model, model.settings(0), batch_size=8)
    draw = np.random.default_rng(1)
    lengths = draw.integers(40, 120, 100)
    scores = scorer([Continuation(draw.integers(2, 258, n).tolist(), int(draw.integers(3, 9))) for n in lengths])
    assert not scores[0].thinks
    np.testing.assert_array_equal(scores[0].talk.nll, scores[0].base.nll)
    assert len(set(lengths)) > 30
    assert scorer.programs <= 8  # lengths 48, 64, 96, 128; counts 4, 8


def test_the_grid():
    assert [grid_length(n) for n in (1, 16, 17, 25, 33, 49, 65, 200, 1000)] == [16, 16, 24, 32, 48, 64, 96, 256, 1024]
    assert [grid_count(n) for n in (1, 2, 3, 5, 8, 9, 33, 70, 128, 129)] == [1, 2, 4, 8, 8, 16, 64, 72, 128, 144]
    for n in range(1, 3000):
        assert n <= grid_length(n) <= max(16, 1.5 * n)
        assert n <= grid_count(n) <= (1.125 * n if n > 64 else 2 * n - 1)
    assert len({grid_count(n) for n in range(1, 1025)}) == 39  # programs of texts of up to 1,024 scored tokens


def test_no_batch_is_refused(folder):
    model = load_model(folder / "plain")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        ContinuationScorer(model, model.settings(0), batch_size=0)
