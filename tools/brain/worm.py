"""The connectome of C. elegans as the package ``cect`` has it, read where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from connectome import Connectome

__all__ = ["read", "worm"]

#: Synapses by the transmitter that they release; gap junctions have none.
_TABLE = "cache/SpreadsheetDataReader.json"
_INHIBITS = "GABA"
_NO_TRANSMITTER = "Generic_GJ"


def worm() -> Connectome:
    """Cells and chemical synapses of the worm, as :func:`read` makes them of the table in ``cect``.

    Raises
    ------
    SystemExit
        If ``cect`` is not installed.
    """
    found = importlib.util.find_spec("cect")
    if found is None or found.origin is None:
        raise SystemExit("the worm is read from the package cect: pip install 'etcompile[worm]'")
    return read(json.loads((Path(found.origin).parent / _TABLE).read_text(encoding="utf-8")))


def read(table: Mapping[str, Any]) -> Connectome:
    """A connectome from the names of cells and, for each transmitter, a matrix of numbers of synapses, sender by receiver.

    A cell that releases GABA inhibits, all others excite. Cells are grouped by what they release most; muscles, which release
    nothing, are a group of their own. They are numbered group by group.
    """
    chemical = {name: np.asarray(m) for name, m in table["connections"].items() if name != _NO_TRANSMITTER}
    names = [*sorted(chemical), "nothing"]
    released = np.stack([chemical[name].sum(1) for name in names[:-1]])
    most = np.where(released.any(0), released.argmax(0), len(names) - 1)
    order = np.argsort(most, kind="stable")
    synapses = np.sum(list(chemical.values()), axis=0)[np.ix_(order, order)]
    receivers, senders = np.nonzero(synapses.T)
    _, region = np.unique(most[order], return_inverse=True)
    inhibits = chemical[_INHIBITS].sum(1)[order] > 0
    return Connectome(
        senders.astype(np.int32),
        receivers.astype(np.int32),
        synapses[senders, receivers].astype(np.float32),
        np.where(inhibits, -1.0, 1.0).astype(np.float32),
        region.astype(np.int32),
    )
