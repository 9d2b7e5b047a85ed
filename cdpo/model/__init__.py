"""Policies, and from Batches to log-probs. conf/model/ names these classes."""

from cdpo.model.loglinear import LogLinear
from cdpo.model.pretrained import HuggingFace
from cdpo.model.tabular import Tabular
from cdpo.model.tiny import Tiny

__all__ = ["HuggingFace", "LogLinear", "Tabular", "Tiny"]
