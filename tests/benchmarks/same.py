"""Whether two sides compute the same; else their times say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

BFLOAT16 = 3e-2  # of losses and gradients, where a side computes in bfloat16: TRL's default, and all on a GPU
FLOAT32 = 1e-4
LATER = 10  # times as far may losses be apart after the second step: what rounds otherwise then learns otherwise


class Different(Exception):
    """The two sides do not compute the same, so their times say nothing."""


def tolerance(variant: str, device: str) -> float:
    """How far losses and gradients may be apart."""
    return BFLOAT16 if variant == "default" or device == "cuda" else FLOAT32


def agree(ours: Path, theirs: Path, losses: Sequence[tuple[float, float]], allowed: float) -> dict[str, float]:
    """How far the losses of the steps, and the gradients of the first, are apart. Raises Different."""
    one, other = (load_file(folder / "gradients.safetensors") for folder in (ours, theirs))
    if one.keys() != other.keys():
        raise Different(f"gradients of other parameters: {sorted(one.keys() ^ other.keys())[:4]}")
    norm = sum(float(g.norm()) ** 2 for g in other.values()) ** 0.5
    off = sum(float((one[name] - other[name]).norm()) ** 2 for name in one) ** 0.5 / norm
    apart = [abs(a - b) for a, b in losses]
    within = [d <= (allowed if step < 2 else LATER * allowed) for step, d in enumerate(apart)]
    if not (off <= allowed and all(within)):
        said = f"losses {list(losses)}, gradients {off:.1e} apart; at most {allowed:g} is allowed"
        raise Different(f"{theirs.name}: {said}")
    return {"loss": max(apart[:2]), "gradient": off, "second_loss": losses[1][0], "later_losses": max(apart)}
