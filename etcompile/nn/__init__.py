"""Small parts to build online-learning programs from: filters, accumulators, fixed feedback, a leaky readout, streams."""

from __future__ import annotations

from etcompile.nn.feedback import FixedRandomFeedback
from etcompile.nn.filters import GradExpon, KappaFilter, PresynapticTrace
from etcompile.nn.obgd import obgd
from etcompile.nn.readout import LeakyRateReadout
from etcompile.nn.running import Moments

__all__ = [
    "FixedRandomFeedback",
    "GradExpon",
    "KappaFilter",
    "LeakyRateReadout",
    "Moments",
    "PresynapticTrace",
    "obgd",
]
