"""The figure of a benchmark: how many times faster, and with what share of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator

COLORS = {"default": "#b0b7c3", "best": "#5b8db8", "compact": "#1f4e79"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars by case and variant of TRL; whiskers are the least and the greatest ratio."""
    cases = results["cases"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.6 + 0.6 * len(cases)), sharey=True, layout="constrained")
    for k, variant in enumerate(COLORS):
        found = {name: one["against"][variant] for name, one in cases.items() if variant in one["against"]}
        at = [list(cases).index(name) + 0.27 * (k - 1) for name in found]
        middle, least, most = zip(*(one["faster"] for one in found.values())) if found else ((), (), ())
        spread = [[m - low for m, low in zip(middle, least)], [high - m for m, high in zip(middle, most)]]
        axes[0].barh(at, middle, 0.25, xerr=spread, color=COLORS[variant], label=f"TRL {variant}", capsize=2)
        axes[1].barh(at, [one["memory_share"] for one in found.values()], 0.25, color=COLORS[variant])
    axes[0].set(xscale="log", xlabel="times the pairs per second of TRL")
    axes[0].set_xlim(left=1)
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
    axes[0].minorticks_off()
    axes[0].set_yticks(range(len(cases)), list(cases))
    axes[1].set(xlabel="peak memory as a share of TRL's")
    axes[0].invert_yaxis()
    figure.legend(frameon=False, loc="outside lower center", ncols=len(COLORS))
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    machine = results["machine"]
    where = f"torch {machine['torch']}, {machine['threads']} threads, {machine['device']}"
    figure.suptitle(f"cdpo and TRL {machine['trl']}, {where}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
