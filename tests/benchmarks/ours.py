"""cdpo's side: `cdpo-train` itself, which waits until it may begin. `apart` is the same without prefix sharing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor

import benchmarks.gate  # noqa: F401  imported before memory is measured
import cdpo.training.job  # noqa: F401
from benchmarks.channel import channel
from cdpo.batch import Item
from cdpo.data import packing
from cdpo.train import main

together = packing._packed_trees


def apart(items: Sequence[Item]) -> dict[str, Tensor]:
    """Packed as ever, but each response is a tree of its own, behind its own copy of the prompt."""
    return together([Item(item.prompt, [response], []) for item in items for response in item.responses])


def share_nothing() -> None:
    """From here on this process packs so."""
    packing._packed_trees = apart


if __name__ == "__main__":
    if sys.argv.pop(1) == "apart":
        share_nothing()
    channel().wait()
    main()
