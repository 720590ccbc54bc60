"""``training_loss.png`` from ``trainer_log.jsonl``: the loss, and what else a stage measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.errors import CheckpointError
from tunesmith.train.runfiles import LOSS_PLOT
from tunesmith.train.runlog import LOG_NAME, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average as TensorBoard draws it: ``s0 = x0``, ``s_i = w s_{i-1} + (1 - w) x_i``.

    Example:
        ``smooth([1, 2], 0.9) == [1, 1.1]``; an empty input gives an empty output.
    """
    smoothed: list[float] = []
    for value in values:
        smoothed.append(weight * smoothed[-1] + (1 - weight) * value if smoothed else value)
    return smoothed


class Panel(NamedTuple):
    """Curves that share an axis.

    Attributes:
        label: of the axis.
        training, evaluation: (step, value) of each logged one; empty where there are none.
    """

    label: str
    training: list[tuple[int, float]]
    evaluation: list[tuple[int, float]]


def panels(entries: Sequence[dict[str, Any]]) -> list[Panel]:
    """What a log has to show: the loss, and below it what else is logged of accuracy, rewards, divergence and policies.

    Losses of language modelling are per token; those of reward models and preferences are means over pairs or answers, those of
    policies are no measure of anything but their gradient.
    """
    compared = any(key.startswith(("rewards/", "eval_rewards/")) for entry in entries for key in entry)
    learns_by_itself = any("reward" in entry for entry in entries)
    label = "loss (surrogate)" if learns_by_itself else "loss (mean of rows)" if compared else "loss (nats per token)"
    found = [_panel(entries, "loss", label)]
    for label, keys in _BELOW.items():
        found += [panel for key in keys if any((panel := _panel(entries, key, label))[1:])]
    return found


_BELOW = {
    "accuracy": ("accuracy", "rewards/accuracies"),
    "margin of rewards": ("rewards/margins",),
    "reward": ("reward",),
    "divergence (nats)": ("kl",),
    "entropy (nats)": ("entropy",),
    "response length": ("response_length",),
    "share of clipped tokens": ("clip_share",),
    "value loss": ("value_loss",),
    "explained variance": ("explained_variance",),
}
"""Label -> keys of the log, in the order in which they are drawn."""


def _panel(entries: Sequence[dict[str, Any]], key: str, label: str) -> Panel:
    return Panel(label, _series(entries, key), _series(entries, f"eval_{key}"))


def plot_loss(run: Path) -> Path:
    """Draw the run's curves (see ``panels``): raw, smoothed, evaluation.

    Returns:
        Path of the PNG.

    Raises:
        CheckpointError: the log is missing or holds no loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = read_log(run)
    drawn = panels(entries)
    if not drawn[0].training:
        raise CheckpointError(f"{run / LOG_NAME}: holds no loss to draw")
    below = len(drawn) - 1
    figure, axes = plt.subplots(len(drawn), 1, figsize=(8, 4.5 + 2.5 * below), sharex=True, squeeze=False,
                                height_ratios=(2, *(1 for _ in range(below))), layout="constrained")  # fmt: skip
    for (row,), panel in zip(axes, drawn, strict=True):
        draw_panel(row, panel)
    axes[-1][0].set_xlabel("update")
    figure.suptitle("training loss" if not below else "training curves")
    target = run / LOSS_PLOT
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw the curves of a panel, with legend and label."""
    name = panel.label.partition(" (")[0]
    _draw(axes, panel.training, f"training {name}", "C0", raw=True)
    _draw(axes, panel.evaluation, f"evaluation {name}", "C1")
    axes.set_ylabel(panel.label)
    axes.grid(alpha=0.3)
    axes.legend()


def _series(entries: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["current_steps"], entry[key]) for entry in entries if key in entry]


def _draw(axes: Axes, points: Sequence[tuple[int, float]], label: str, color: str, raw: bool = False) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if raw and len(points) > 1:
        axes.plot(steps, values, color=color, alpha=0.35, label=f"{label}, raw")
        axes.plot(steps, smooth(values), color=color, label=f"{label}, smoothed (0.9)")
    else:
        axes.plot(steps, values, color=color, marker="o", markersize=4, label=label)
