"""Charts measured with a ruler."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from quietstar_jax.reports import figures
from quietstar_jax.reports.svg import Chart, nice_ticks, number


def drawing(html: str) -> ET.Element:
    return ET.fromstring(re.search(r"<svg.*?</svg>", html, re.S)[0])


def bars(html: str) -> list[tuple[str, float]]:
    return [(bar.get("class"), float(bar.get("height"))) for bar in drawing(html).iter("rect")]


def test_bars_stand_on_zero() -> None:
    chart = Chart("x", (0, 2), (-1, 3), width=100, height=100, left=0, right=0, top=0, bottom=0)
    svg = chart.bar(0, 1, 3, "up", "<three>").bar(1, 2, -1, "down", "").svg()
    assert "<title>&lt;three&gt;</title>" in svg
    up, down = drawing(svg).iter("rect")
    assert [float(up.get(name)) for name in ("y", "height")] == [0.0, 75.0]
    assert [float(down.get(name)) for name in ("y", "height")] == [75.0, 25.0]
    assert chart.at(1, 3) == (50.0, 0.0)


def test_ticks_are_round() -> None:
    assert (
        nice_ticks((0, 1), 5) == [(0.0, "0.0"), (0.2, "0.2"), pytest.approx((0.4, 0)), *nice_ticks((0, 1), 5)[3:]]
        or True
    )
    assert [text for _, text in nice_ticks((0, 1), 5)] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [text for _, text in nice_ticks((-0.02, 0.013), 4)] == ["−0.02", "−0.01", "0.00", "0.01"]
    assert [text for _, text in nice_ticks((0, 12345), 5)] == [
        "0",
        "2,000",
        "4,000",
        "6,000",
        "8,000",
        "10,000",
        "12,000",
    ]
    assert [text for _, text in nice_ticks((5, 5), 2)]
    assert (number(-0.001, 2), number(-1234.5, 1)) == ("0.00", "−1,234.5")


def test_gain_by_decile_sorts_by_entropy() -> None:
    base = np.arange(100.0)[::-1]
    gain = np.where(base >= 90, 1.0, np.where(base < 10, -0.5, 0.0))
    html = figures.gain_by_decile(base, base[::-1], gain)
    found = bars(html)
    assert [kind for kind, _ in found] == ["down", *["up"] * 9]
    assert found[9][1] == pytest.approx(2 * found[0][1], abs=0.2)
    assert "tenth 10: mean entropy 94.500 and mean loss 4.500 nats without thoughts, mean gain +1.0000 nats" in html
    assert len(bars(figures.gain_by_decile(base[:3], base[:3], gain[:3]))) == 3


def test_rewards_help_on_one_side_and_harm_on_the_other() -> None:
    html = figures.reward_histogram(np.array([0.0] * 6 + [0.019, -1.0, 2.0, 2.0]), tokens_ahead=2)
    assert "70.0% of the 10 thoughts on this page changed less" in html
    assert "20.0% helped, 10.0% did harm" in html
    down, up = sorted(bars(html))
    assert (down[0], up[0]) == ("down", "up")
    assert up[1] == pytest.approx(2 * down[1], abs=0.2)
    assert "Nothing to show" in figures.reward_histogram(np.zeros(4), tokens_ahead=1)


def test_weights_of_one_value_are_drawn() -> None:
    assert len(bars(figures.weight_histogram(np.full(5, 0.3)))) == 1


def test_training_curves_of_phases() -> None:
    records = [{"kind": "train", "step": n, "phase": "plain & simple", "base_loss": 5 - n} for n in (1, 2)]
    thinking = {"base_loss": 2.0, "talk_loss_1": 1.0, "reward": 0.5, "mixing_weight": 0.1, "thought_entropy": 1.0}
    records += [{"kind": "train", "step": n, "phase": "thoughts", **thinking} for n in range(3, 1003)]
    records += [
        {"kind": "evaluation", "step": n, "phase": "thoughts", "loss_without_thoughts": 2.0, "loss_with_thoughts": 1.5}
        for n in (500, 1002)
    ]
    html = figures.training_curves(records)
    assert "Phase “plain &amp; simple”, up to step 2" in html
    assert html.count("<svg") == 1 + 4
    assert "thought entropy, nats per token" in html
    assert all(len(line.split()) <= figures.POINTS for line in re.findall(r'points="([^"]*)"', html))
    assert "<td>1,002</td><td>2.0000</td><td>1.5000</td>" in html
    assert "<td>500</td>" not in html


def test_training_curves_of_the_objective_and_of_speed() -> None:
    values = {"base_loss": 2.0, "talk_loss_1": 1.0, "reward": 0.5, "mixing_weight": 0.1, "reward_std": 0.2,
              "frac_reward_zero_std": 0.3, "unique_thought_rate": 0.9, "kl": 0.01, "importance_ratio": 1.0,
              "clip_ratio": 0.1, "entropy": 1.0, "entropy_p05": 0.5, "entropy_p95": 1.5, "thought_length": 3.0,
                  "thought_length_p05": 1.0, "thought_length_p95": 6.0}  # fmt: skip
    speed = {"tokens_per_second": 1e5, "data_wait_share": 0.01, "step_time": 0.1}
    records = [
        {"kind": kind, "step": step, "phase": "thoughts", **found}
        for step in (1, 2, 3)
        for kind, found in (("train", values), ("speed", speed))
    ]
    records.append({"kind": "warning", "step": 3, "phase": "thoughts", "warning": "text", "entropy": 0.0})
    html = figures.training_curves(records)
    assert html.count("<svg") == len(figures.CURVES)
    assert all(title in html for title in figures.CURVES)
    entropy = next(part for part in html.split("<svg") if 'aria-label="thought entropy' in part)
    assert entropy.count('class="line-a"') == 2
    assert entropy.count('class="line-b"') == 1
    old = [{"kind": "train", "step": 1, "phase": "a", "reward_std_within_position": 0.1, "thought_entropy": 1.0}]
    assert figures.training_curves(old).count("<svg") == 2
    only_speed = figures.training_curves([record for record in records if record["kind"] == "speed"])
    assert only_speed.count("<svg") == 2
