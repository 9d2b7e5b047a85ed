"""Policies, and from Batches to log-probs. conf/model/ names these classes."""

from cdpo.model.pretrained import HuggingFace, Tiny
from cdpo.model.tabular import Tabular

__all__ = ["HuggingFace", "Tabular", "Tiny"]
