"""Which curves of a log are drawn, on which axes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.report.plot import panels, plot_loss, smooth


def test_smooth_by_hand() -> None:
    assert smooth([]) == []
    assert smooth([3.0]) == [3.0]
    assert smooth([1.0, 2.0, 3.0]) == pytest.approx([1.0, 1.1, 1.29])
    assert smooth([1.0, 2.0], 0.5) == [1.0, 1.5]


def test_a_language_model_has_nats_per_token() -> None:
    entries = [{"current_steps": 1, "loss": 2.0}, {"current_steps": 1, "eval_loss": 2.5, "eval_accuracy": 0.4}]
    loss, accuracy = panels(entries)
    assert loss == ("loss (nats per token)", [(1, 2.0)], [(1, 2.5)])
    assert accuracy == ("accuracy", [], [(1, 0.4)])
    assert len(panels(entries[:1])) == 1


def test_preferences_have_panels_of_their_own(tmp_path: Path) -> None:
    entries = [
        {"current_steps": 1, "loss": 0.7, "rewards/margins": 0.0, "rewards/accuracies": 0.5},
        {"current_steps": 2, "loss": 0.6, "rewards/margins": 0.2, "rewards/accuracies": 0.75, "kl": 0.1},
        {"current_steps": 2, "eval_loss": 0.65, "eval_rewards/margins": 0.1, "eval_rewards/accuracies": 1.0},
    ]
    found = {panel.label: panel for panel in panels(entries)}
    assert list(found) == ["loss (mean of rows)", "accuracy", "margin of rewards", "divergence (nats)"]
    assert found["accuracy"].training == [(1, 0.5), (2, 0.75)] and found["accuracy"].evaluation == [(2, 1.0)]
    assert found["margin of rewards"].evaluation == [(2, 0.1)]
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")
