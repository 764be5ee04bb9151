"""Calibration of the thinking gate, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quietstar_jax.evals.calibration import calibrate, reliability


def test_a_reliability_diagram_by_hand():
    rows = reliability(np.array([0.0, 0.04, 0.55, 0.51, 0.59, 1.0]), np.array([0, 1, 1, 1, 0, 1], bool))
    assert [row["count"] for row in rows] == [2, 3, 1]  # 1 belongs to the last bin
    assert [row["predicted"] for row in rows] == pytest.approx([0.02, 0.55, 1.0])
    assert [row["observed"] for row in rows] == pytest.approx([0.5, 2 / 3, 1.0])


def test_precision_and_recall_by_hand():
    # Gains 1, 0.3, 0, -1, 0.2; the gate thinks at positions 0, 1 and 2 at a price of 0.1, entropy first at 3, 0, 4.
    gain = np.array([1, 0.3, 0, -1, 0.2])
    rankings = {"gate": np.array([0.9, 0.5, 0.2, -0.1, 0.0]), "entropy": np.array([2.0, 0.1, 0.2, 3.0, 1.0])}
    found = calibrate(gain, rankings, (0.1, 5.0), slope=2.0)
    row = found["prices"][0]
    assert (row["price"], row["pays"], row["thinking_rate"]) == (0.1, 3 / 5, 3 / 5)
    assert row["gate"] == {"precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3)}
    assert row["entropy"] == {"precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3)}
    assert row["random"] == {"precision": 3 / 5, "recall": 3 / 5}
    never = found["prices"][1]
    assert (never["pays"], never["thinking_rate"]) == (0, 0)
    assert never["gate"] == {"precision": None, "recall": None}
    # At 0.1 the gate gives sigmoid(2 (m - 0.1)): 0.832, 0.690, 0.550, 0.401, 0.450; at 5, nearly 0.
    assert [r["count"] for r in found["reliability"]] == [5, 2, 1, 1, 1]
    assert found["reliability"][1]["predicted"] == pytest.approx(sum(1 / (1 + math.exp(x)) for x in (0.4, 0.2)) / 2)
    assert found["reliability"][1]["observed"] == 0.5
    # The bins, by tenth: 0.0: all at 5, none pays; 0.4: one of two; 0.5: no; 0.6: yes; 0.8: yes.
    at_5 = sum(1 / (1 + math.exp(x)) for x in (8.2, 9.0, 9.6, 10.2, 10.0))  # 2 (5 - m)
    at_01 = abs(0.401312 + 0.450166 - 1) + 0.549834 + (1 - 0.689974) + (1 - 0.832018)
    assert found["calibration_error"] == pytest.approx((at_5 + at_01) / 10, abs=1e-6)
