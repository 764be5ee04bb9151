import math

import numpy as np
import pytest

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.evals.language_modeling import Windows, measure_text, summarize_windows
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.thoughts.token_scores import Prediction, TokenScores
from tests.evals.models import write_plain, write_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language_modeling")
    return load_model(write_run(folder / "run", write_plain(folder / "plain")))


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 31, 100])
@pytest.mark.parametrize(("window", "context"), [(8, 4), (8, 7), (9, 1), (200, 100)])
def test_every_token_is_scored_once_after_enough_context(length, window, context):
    tokens = list(range(length))
    scored = []
    for tail in Windows(window, context).tails(tokens):
        assert len(tail.tokens) <= window
        for place in range(len(tail.tokens) - tail.last, len(tail.tokens)):
            token = tail.tokens[place]
            assert place >= min(context, token)  # so many tokens are before it, or all there are
            scored.append(token)
        assert list(tail.tokens) == list(range(tail.tokens[0], tail.tokens[-1] + 1))
    assert scored == list(range(1, length))


def test_impossible_windows_are_refused():
    for context in (0, 8, 9):
        with pytest.raises(ConfigError, match="context is"):
            Windows(8, context)


def column(base, talk):
    base, talk = np.array(base, np.float32), np.array(talk, np.float32)
    zeros = np.zeros(base.size, np.float32)
    right, thoughts = np.zeros(base.size, bool), np.zeros((base.size, 2), int)
    without, after = (Prediction(nll, zeros.astype(int), right) for nll in (base, talk))
    return TokenScores(~right, without, base, after, base - talk, zeros, zeros, thoughts)


def test_figures_by_hand():
    # Two windows of 3 and 1 tokens of a text of 10 bytes: 12 nats without and 8 with thoughts.
    found = summarize_windows([column([1, 2, 3], [1, 1, 2]), column([6], [4])], size=10, seed=0)
    assert found["tokens"] == 4
    assert found["without_thoughts"]["nats_per_token"] == pytest.approx(3.0)
    assert found["with_thoughts"]["nats_per_token"] == pytest.approx(2.0)
    assert found["without_thoughts"]["bits_per_byte"] == pytest.approx(12 / math.log(2) / 10)
    assert found["comparison"]["nats_per_token"]["difference"] == pytest.approx(2.0 - 3.0)
    assert [row["loss_with_thoughts"] for row in found["deciles"]] == [1, 1, 2, 4]


def test_a_short_window_counts_in_the_comparison_as_its_tokens_do():
    # Thoughts help by 0.1 nats in each of 30 tokens and harm by 1 in a single one: 31 tokens, 2 nats less in all.
    columns = [column([2] * 30, [1.9] * 30), column([1], [2])]
    found = summarize_windows(columns, size=100, seed=0)
    change = found["with_thoughts"]["nats_per_token"] - found["without_thoughts"]["nats_per_token"]
    assert change == pytest.approx(-2 / 31)
    assert found["comparison"]["nats_per_token"]["difference"] == pytest.approx(change)


def measured(model, texts, windows, **changes):
    scorer = ContinuationScorer(model, model.settings(2), batch_size=4)
    finished = []
    options = dict(top=3, seed=0, done=finished.append) | changes
    found = measure_text(texts, len(texts), model.tokenizer, model.bos, scorer, windows, **options)
    return found, sum(finished)


def test_a_text_that_fits_one_window(model):
    texts = ["the cat sat on the mat.", "", "12 + 3 = 15, naïve"]
    found, finished = measured(model, texts, Windows(64, 32))
    size = sum(len(text.encode()) for text in texts)
    assert finished == pytest.approx(size)
    assert (found["texts"], found["bytes"], found["tokens"]) == (3, size, size)  # bytes are tokens here
    (scores,) = ContinuationScorer(model, model.settings(2), batch_size=1)(
        [Continuation([0, *model.tokenizer.encode(texts[0])], 23)]
    )
    alone, _ = measured(model, texts[:1], Windows(64, 32))
    assert alone["without_thoughts"]["nats_per_token"] == pytest.approx(scores.base.nll.mean(), rel=1e-4)
    assert alone["with_thoughts"]["nats_per_token"] == pytest.approx(scores.talk.nll.mean(), rel=1e-4)
    gain = scores.base.nll - scores.talk.nll
    helped = alone["helped"][0]
    assert helped["nats_without_thoughts"] - helped["nats_with_thoughts"] == pytest.approx(gain.max(), abs=1e-3)
    assert helped["token"] == texts[0][gain.argmax()]
    assert helped["context"].removeprefix("<s>") == texts[0][: gain.argmax()]
    harmed = alone["harmed"][0]
    assert harmed["nats_without_thoughts"] - harmed["nats_with_thoughts"] == pytest.approx(gain.min(), abs=1e-3)
    assert len(alone["helped"]) == 3


def test_nothing_to_score_is_refused(model):
    with pytest.raises(DataError, match="no token to score"):
        measured(model, ["", ""], Windows(8, 4))
