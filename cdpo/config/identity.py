"""What makes two runs the same: the part of a config that decides on the numbers, its digest, the directory's name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from cdpo.config.schema import FEW_STARTS, MICRO_BATCH, STARTS, TABLES

# what may change between two launches of one run, because the numbers do not depend on it
NOT_IN_DIGEST = (
    "name", "output_root", "cache_dir", "logger", "dry_run",
    "trainer.log_every", "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.distributed",
)  # fmt: skip
NULL = {"trainer.tokens_per_micro_batch": MICRO_BATCH, "trainer.compile": False}  # what null stands for, but on a GPU
# keys that came later, with the value that changes nothing, at which they are left out: older runs keep their digest
LATER = {
    "trainer.sync_reference": None, "trainer.sync_mixture": 1.0,
    "constraint.kl_budget.draws": 16, "constraint.kl_budget.draw_every": 4, "constraint.kl_budget.draw_tokens": 64,
}  # fmt: skip


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    items = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items()]
    return {k: v for item in items for k, v in item.items()}


def trajectory(composed: Mapping[str, Any]) -> dict[str, Any]:
    """What determines the numbers of a run: every key but the free ones, dotted."""
    keys = flat({k: v for k, v in composed.items() if k != "hydra"})
    keys["constraint"] = list(composed["constraint"])  # several act one after another: their order counts
    null = NULL | {"optimizer.starts": STARTS if keys.get("model._target_") in TABLES else FEW_STARTS}
    keys |= {key: value for key, value in null.items() if key in keys and keys[key] is None}
    keys = {key: value for key, value in keys.items() if key not in LATER or value != LATER[key]}
    return {k: v for k, v in keys.items() if not any(k == free or k.startswith(f"{free}.") for free in NOT_IN_DIGEST)}


def digest(composed: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits of the trajectory's content, whatever the order of keys."""
    content = json.dumps(trajectory(composed), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def run_name(composed: Mapping[str, Any], choices: Mapping[str, Any]) -> str:
    """Directory of a run: readable choices, seed, digest. Two configs never share one, one config always finds its own.

    A `name` given by the user is the directory of a single run, or that of a sweep, in which runs keep these names.
    """
    constraints = "+".join(composed["constraint"]) or "none"
    draw = f"s{composed['seed']}" + (f"r{composed['restart']}" if composed["restart"] else "")
    parts = [choices.get("dataset"), choices.get("model"), choices.get("loss"), constraints, draw]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(map(str, parts)))
    return f"{slug[:100]}-{digest(composed)}"
