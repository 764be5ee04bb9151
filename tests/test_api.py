"""The Python API: a model as an object, training from a configuration object, functions of the user."""

from __future__ import annotations

import itertools
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

import quietstar_jax as qs
from quietstar_jax import api
from quietstar_jax.configs import quickstart
from quietstar_jax.errors import ConfigError
from quietstar_jax.methods.advantages import leave_one_out
from quietstar_jax.reports.observe import observe
from tests.reports.cases import random_model
from tests.training.tiny import tiny_config_dict

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = "sum 3 +1 +4 ask 8 ."


@pytest.fixture(scope="module")
def model() -> qs.Model:
    return qs.Model(random_model(), batch_size=2)


@pytest.fixture
def double() -> Iterator[str]:
    """An advantage that this test registers: twice `leave_one_out`."""

    @qs.ADVANTAGES.register(one_thought_is_zero=True)
    def double(rewards: jax.Array, batch_std: jax.Array | None) -> jax.Array:
        return 2 * leave_one_out(rewards, batch_std)

    yield "double"
    qs.ADVANTAGES.pop("double", None)


def test_the_page_is_that_of_the_docstrings() -> None:
    document = runpy.run_path(str(DOCS / "api.py"))["document"]
    assert (DOCS / "api.md").read_text("utf-8") == document(), "run `make docs`"


def test_importing_the_package_imports_nothing_that_is_slow() -> None:
    code = "import sys, quietstar_jax as qs; dir(qs); qs.UserError; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_thoughts_at_positions(model: qs.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.encode(TEXT)
    every = model.think(TEXT, samples=2)
    assert [at.position for at in every] == list(range(len(ids) - 1))
    words = [model.model.tokenizer.decode([i]) for i in ids]
    assert [(at.token, at.next_token) for at in every] == list(itertools.pairwise(words))
    events: list[str] = []
    listener = lambda event, duration, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    some = model.think(TEXT, positions=[2, -3], samples=2)
    assert not [event for event in events if event.startswith("/jax/core/compile")]
    model.think(TEXT, samples=1)
    assert [event for event in events if event.startswith("/jax/core/compile")], "another shape is another program"
    jax.monitoring.unregister_event_duration_listener(listener)
    for at, same in zip(some, (every[2], every[len(ids) - 3]), strict=True):
        assert (at.texts, at.nll) == (same.texts, same.nll)
        assert (at.ids.shape, at.rewards.shape, at.mixing_weights.shape) == ((3, 3), (3,), (3,))
        assert at.texts[0] == model.model.tokenizer.decode(at.ids[0])
    asked: list[np.ndarray] = []
    monkeypatch.setattr(api, "observe", lambda *args, among, **rest: asked.append(among) or observe(*args, **rest))
    model.think(TEXT, positions=[2, -3], samples=2)
    assert asked[0].nonzero()[1].tolist() == [2, len(ids) - 3], "no other thought is computed"


def test_a_score_is_that_of_the_thoughts_shown(model: qs.Model) -> None:
    score, shown = model.score(TEXT), model.think(TEXT)
    assert score.tokens[-len(shown) :] == tuple(at.next_token for at in shown)
    same = model.score(model.encode(TEXT))  # the same context: ids are used unchanged
    np.testing.assert_allclose(same.nll, [at.nll for at in shown], rtol=1e-4, atol=1e-5)
    after = [at.nll_with_thoughts[0] for at in shown]
    np.testing.assert_allclose(same.nll_with_thoughts, after, rtol=1e-4, atol=1e-5)
    without = model.score(TEXT, thoughts=False)
    assert without.nll_with_thoughts is None
    np.testing.assert_allclose(without.nll, score.nll, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [[99], [-1], [-99]])
def test_a_position_without_a_next_token_is_refused(model: qs.Model, positions: list[int]) -> None:
    with pytest.raises(qs.UserError, match="positions has"):
        model.think(TEXT, positions)


@pytest.mark.slow
def test_a_run_with_an_advantage_of_the_user_is_opened_without_it(double: str, tmp_path: Path) -> None:
    config = tiny_config_dict(tmp_path / "run")
    config.thought.advantage = double
    summary = qs.train_model(config)
    assert summary["step"] == 7
    del qs.ADVANTAGES[double]
    opened = qs.Model.open(tmp_path / "run")
    assert opened.model.thought.advantage == double
    assert opened.generate(["sum 1"], max_tokens=2)[0].tokens[0].thought_ids
    with pytest.raises(ConfigError, match="advantage is 'double'; it must be one of mean"):
        qs.train_model(config)


def test_a_function_is_replaced_only_by_its_own_module(double: str) -> None:
    before = qs.ADVANTAGES[double].fn

    def again(name: str, module: str) -> None:
        def fn(rewards: jax.Array, batch_std: jax.Array | None) -> jax.Array:
            return rewards

        fn.__name__, fn.__module__ = name, module
        qs.ADVANTAGES.register()(fn)

    again(double, __name__)
    assert qs.ADVANTAGES[double].fn is not before
    for name, module in ((double, "elsewhere"), ("mean", __name__)):
        with pytest.raises(ValueError, match="registered twice"):
            again(name, module)


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """In the other order, and with a smaller model: the second trains one for the first."""

    def small() -> ml_collections.ConfigDict:
        return tiny_config_dict(tmp_path / "unused")

    monkeypatch.setattr(quickstart, "get_config", small)
    monkeypatch.chdir(tmp_path)
    use, train = re.findall(r"^```python\n(.*?)^```", (DOCS / "api.md").read_text("utf-8"), re.M | re.S)
    names = {"__name__": "example"}
    exec(train, names)
    assert capsys.readouterr().out
    qs.ADVANTAGES.pop("best_only")
    exec(use.replace("runs/quickstart", "runs/best_only"), names)
    assert "->" in capsys.readouterr().out
