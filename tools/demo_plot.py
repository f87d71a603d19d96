"""Learning curves of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt
from demo_data import CLASSES
from demo_train import Curve
from matplotlib.ticker import LogLocator, NullFormatter

# Two colours of the Okabe-Ito palette, which colour-blind people can tell apart, and two line styles.
STYLES = {
    "online": {"color": "#0072B2", "linestyle": "-"},
    "backpropagation through time": {"color": "#D55E00", "linestyle": "--"},
}


def learning_curves(results: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """One column per model: test accuracy above, training loss below, one line per way of learning."""
    figure, axes = plt.subplots(
        2, len(results), figsize=(5.2 * len(results), 6.4), sharex="col", sharey="row", squeeze=False
    )
    for (model, curves), upper, lower in zip(results.items(), axes[0], axes[1], strict=True):
        for name, curve in curves.items():
            epochs = range(1, len(curve.accuracies) + 1)
            percent = [100 * accuracy for accuracy in curve.accuracies]
            upper.plot(epochs, percent, label=f"{name}: {percent[-1]:.1f} %", **STYLES[name])
            lower.plot(epochs, curve.losses, label=name, **STYLES[name])
        upper.axhline(100 / CLASSES, color="0.5", linestyle=":", label=f"chance: {100 / CLASSES:.0f} %")
        upper.set(title=model, ylim=(0, 101))
        upper.legend(loc="lower right")
        lower.set(xlabel="epoch", yscale="log")
    lower = axes[1, 0].yaxis  # shared by the row
    lower.set_major_locator(LogLocator(subs=(1, 2, 5)))
    lower.set_major_formatter("{x:g}")
    lower.set_minor_formatter(NullFormatter())
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("training loss")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
