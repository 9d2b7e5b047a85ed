"""A made-up sweep whose gaps are certified, searched, not reached, beaten, a path, on hard labels, over a budget."""

from __future__ import annotations

from pathlib import Path

from written_runs import CERTIFIED, NOT_REACHED, SEARCHED, change, write_run

LOSSES = ("rlhf", "dpo", "gaussian_power")
PATH = {"status": "none", "says": "Early stopping is no set of policies: this is a path."}


def mixed(folder: Path, seeds: int = 3) -> Path:
    """Write it: losses by constraints by seeds."""
    for seed in range(seeds):
        found = {(c, loss): write_run(folder, loss, c, seed) for c in CERTIFICATES for loss in LOSSES}
        for (constraint, loss), path in found.items():
            change(path, "summary", certificate=CERTIFICATES[constraint].get(loss, CERTIFIED))
        change(found["none", "dpo"], "summary", labels="hard")
    return folder


def within(low: float, high: float, **more) -> dict:
    return SEARCHED | {"attained_low": low, "attained_high": high} | more


CERTIFICATES = {
    "none": {},
    "lora_r1": {"rlhf": SEARCHED, "gaussian_power": within(0.4, 0.6, supremum=True, norm=1e7)},
    "lora_r4": {loss: within(0.4, 0.6, ranked_by="J") for loss in ("dpo", "gaussian_power")},
    "l2_ball": {"dpo": NOT_REACHED},
    "early_stop": dict.fromkeys(LOSSES, PATH),
    "kl_budget": {"rlhf": NOT_REACHED | {"says": "Its KL is over the budget.", "infeasibility": 0.05}},
}
