"""Means over seeds or worlds with their 95% t intervals, and the one way in which a report writes them.

The interval is the spread over worlds and seeds. The solver's error is another thing, and stands elsewhere (`marks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from cdpo.report.labels import is_null, text

LEVEL = 0.95
NO_NUMBER = "–"  # where a table has none
HOW = "mean ± half its 95% t interval (number of seeds)"


def interval(values: Sequence[float]) -> dict[str, float]:
    """ "": the mean; "_half": half the width of its 95% t interval, NaN for fewer than 2; "_n": how many there are.

    t (n - 1 degrees of freedom) covers at any n where values are normal; a percentile bootstrap and ± 2 standard
    errors cover .75 and .82 of the time at n = 3 (simulated, ours).
    """
    from scipy.stats import t

    n = len(values)
    mean = fmean(values) if n else math.nan
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return {"": mean, "_half": half, "_n": n}


def number(value: Any, half: Any = None, n: Any = None) -> str:
    """`0.123 ± 0.004 (3)`, `0.123 (1)`, `0.123`; zero without a sign."""
    return _joined(_fixed(value), None if is_null(half) else _fixed(half), n)


def short(value: Any, half: Any = None, n: Any = None) -> str:
    """The same with four significant digits, two of the interval: for what has another unit."""
    mean = NO_NUMBER if is_null(value) else f"{float(value):.4g}"
    return _joined(mean, None if is_null(half) else f"{float(half):.2g}", n)


def counted(counts: Iterable[Any], word: str = "seed") -> str:
    """`1 seed`, `3 seeds`, `2 to 3 seeds`, `0 losses`."""
    found = sorted({int(count) for count in counts if not math.isnan(count)}) or [0]
    ending = "es" if word.endswith("s") else "s"
    return f"{' to '.join(map(str, found[:: max(1, len(found) - 1)]))} {word}{ending * (found != [1])}"


def _joined(mean: str, half: str | None, n: Any) -> str:
    if mean == NO_NUMBER:
        return mean
    return mean + (f" ± {half}" if half else "") + ("" if is_null(n) else f" ({text(n)})")


def _fixed(value: Any) -> str:
    if is_null(value):
        return NO_NUMBER
    rounded = f"{float(value):.3f}"
    return rounded.lstrip("-") if float(rounded) == 0 else rounded
