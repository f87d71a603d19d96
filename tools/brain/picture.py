"""The rates of all regions, before and after learning, beside what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

__all__ = ["draw"]


def draw(found: dict[str, Any], milliseconds: float, path: Path) -> None:
    """Rates over time as two images with one column of targets, and errors over updates."""
    wanted = np.asarray(found["targets"])
    order = np.argsort(wanted)
    before, after = (np.asarray(found[name])[:, order].T for name in ("before", "after"))
    top = 1.5 * wanted.max()
    figure, axes = plt.subplots(
        1, 4, figsize=(13, 4.2), width_ratios=(6, 6, 0.5, 4), layout="constrained", squeeze=True
    )
    how = dict(aspect="auto", origin="lower", vmin=0, vmax=top, cmap="magma", interpolation="nearest")
    shown = None
    for axis, rates, title in zip(axes, (before, after), ("before", "after"), strict=False):
        seconds = rates.shape[1] * milliseconds
        shown = axis.imshow(rates, extent=(0, seconds, 0, len(wanted)), **how)
        axis.set(title=f"rates {title} learning", xlabel="milliseconds")
    axes[0].set_ylabel("region, in the order of targets")
    axes[2].imshow(wanted[order][:, None], **how)
    axes[2].set(title="target", xticks=[], yticks=[])
    assert shown is not None
    figure.colorbar(shown, ax=axes[2], label="hertz")
    axes[3].plot(np.arange(1, len(found["losses"]) + 1), found["losses"])
    axes[3].set(title=found["rule"], xlabel="update", ylabel="mean squared error", ylim=(0, None))
    figure.savefig(path, dpi=110)
    plt.close(figure)
