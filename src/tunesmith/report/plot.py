"""``training_loss.png`` from ``trainer_log.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import CheckpointError
from tunesmith.train.runfolder import LOSS_PLOT
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


def plot_loss(run: Path) -> Path:
    """Draw the run's curves: loss (raw, smoothed, evaluation) and, where logged, evaluation accuracy.

    Returns:
        Path of the PNG.

    Raises:
        CheckpointError: the log is missing or holds no loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = read_log(run)
    losses = _series(entries, "loss")
    if not losses:
        raise CheckpointError(f"{run / LOG_NAME}: holds no loss to draw")
    accuracies = _series(entries, "eval_accuracy")
    figure, axes = plt.subplots(1 + bool(accuracies), 1, figsize=(8, 4.5 + 2.5 * bool(accuracies)), sharex=True, squeeze=False,
                                height_ratios=(2, 1) if accuracies else None)  # fmt: skip
    main = axes[0][0]
    _draw(main, losses, "training loss", "C0", raw=True)
    _draw(main, _series(entries, "eval_loss"), "evaluation loss", "C1")
    main.set_ylabel("loss (nats per token)")
    if accuracies:
        _draw(axes[1][0], accuracies, "evaluation accuracy", "C2")
        axes[1][0].set_ylabel("accuracy")
    for row in axes:
        row[0].grid(alpha=0.3)
        row[0].legend()
    axes[-1][0].set_xlabel("update")
    figure.suptitle("training loss")
    figure.tight_layout()
    target = run / LOSS_PLOT
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


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
