"""The table of launch/gpu.sh, in Markdown."""

from __future__ import annotations

from typing import Any

HEAD = (
    "case", "side", "pairs/s", "s per step (least to most)", "warm-up", "GB", "floors", "MFU", "cdpo is faster",
    "cdpo's memory",
)  # fmt: skip
NAMES = {"apart": "cdpo, no sharing", "best": "TRL", "checkpointed": "TRL, checkpoints"}


def line(row: dict[str, Any]) -> str:
    """One side."""
    start = [row["case"], NAMES.get(row["side"], row["side"])]
    return _joined([*start, *(_cells(row) if "seconds" in row else [_reason(row)])])


def _reason(row: dict[str, Any]) -> str:
    if "different" in row:
        return f"REFUSED: {row['different']}"
    return f"skipped: {row['skipped']}" if "skipped" in row else row["failed"]


def _cells(row: dict[str, Any]) -> list[str]:
    pace, least, most = row["seconds"]
    faster = "{:.1f}x ({:.1f} to {:.1f})".format(*row["faster"]) if "faster" in row else ""
    return [
        f"{row['pairs_per_second']:.1f}",
        f"{pace:.3f} ({least:.3f} to {most:.3f})",
        f"{row['warm_up']} steps" + ("" if row["steady"] else ", not steady"),
        f"{row['memory'] / 1e9:.1f}",
        f"{row['floors']:.2f}",
        f"{row['mfu']:.3f}" if "mfu" in row else "",
        faster,
        f"{row['memory_share']:.2f}x" if faster else "",
    ]


def table(found: dict[str, Any]) -> str:
    """All that was found: the rows of the benchmark, below what the other parts say."""
    says = [f"{name}: {part['says']} ({part['wall']:.0f} s)" for name, part in found.items() if "wall" in part]
    rows = found.get("benchmark", {}).get("rows", [])
    head = [_joined(HEAD), "|" + "---|" * len(HEAD)] if rows else []
    note = ["One side ran after the other; each was warmed up until steps were steady and nothing compiled."] * bool(
        rows
    )
    return "\n".join([found["card"], *says, *note, "", *head, *map(line, rows)])


def _joined(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
