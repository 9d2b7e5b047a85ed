"""From text to Items to Batches. conf/dataset/ names these classes."""

from cdpo.data.bandit import Bandit
from cdpo.data.sources import Hub, Jsonl

__all__ = ["Bandit", "Hub", "Jsonl"]
