"""Run directories as finished runs leave them, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

TARGETS = {"rlhf": "candidates.RLHF", "dpo": "pairwise.DPO", "gaussian_power": "gaussian.Gaussian"}
ATTAINED = {"rlhf": 0.9, "dpo": 0.6, "gaussian_power": 0.5}
FAMILIES = {
    "lora_r1": ("lora.LoRA", {"rank": 1}),
    "lora_r4": ("lora.LoRA", {"rank": 4}),
    "l2_to_start": ("l2_to_start.L2ToStart", {"strength": 1.0}),
}
OTHERS = {
    "l2_ball": ("l2_ball.L2Ball", {"radius": 2.0}),
    "early_stop": ("early_stop.EarlyStop", {"step": 3}),
    "kl_budget": ("kl_budget.KLBudget", {"budget": 0.15}),
}
CERTIFIED = {"status": "certified", "says": "It is the optimum.", "mend": "", "residual": 1e-9, "tolerance": 1e-6}
SEARCHED = {"status": "searched", "says": "It is the best of 64 starts.", "mend": "optimizer.starts=256"}
SEARCHED |= {"residual": 1e-8, "tolerance": 1e-6, "starts": 64, "hits": 0.05, "epsilon": 1e-3, "ranked_by": "objective"}
NOT_REACHED = {"status": "not_reached", "says": "It stopped too early.", "mend": "optimizer=exact"}
NOT_REACHED |= {"residual": 0.74, "tolerance": 1e-6}


def write_run(folder: Path, loss="dpo", constraint="none", seed=0, rewards=True, **config) -> Path:
    """A finished run as a run directory holds it, with five evaluations; `config` overrides keys of config.json."""
    made = composed(loss, constraint, seed) | config
    path = folder / f"bandit-tabular-{loss}-{constraint}-s{seed}-{len(list(folder.glob('*'))):04d}"
    path.mkdir(parents=True)
    choices = {"experiment": None, "model": "tabular", "dataset": "bandit", "loss": loss, "optimizer": "sgd"}
    last = 0.9 * ATTAINED[loss] + 0.01 * seed
    rows = [row for step in range(5) for row in measured(step, last * step / 4, constraint, rewards)]
    metrics = rows[-1] | {"objective": 1.0}
    summary = {"state": "finished", "stopped": None, "step": 4, "steps": 4, "change/norm": 5.0, "metrics": metrics}
    summary["certificate"] = CERTIFIED
    for name, tree in {
        "config": made,
        "choices": choices | {"constraint": list(made["constraint"])},
        "status": {"state": "finished"},
        "summary": summary,
    }.items():
        (path / f"{name}.json").write_text(json.dumps(tree))
    (path / "command.txt").write_text(f"cdpo-train loss={loss} constraint={constraint} seed={seed}\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bins = {"edges": [-1.0, 0.0, 1.0 + seed], "shares": [0.25, 0.75]}
    table = {"step": 4, "log_gamma": bins, "log_lambda": bins, "effective_weight": bins, "concavity": bins}
    (path / "histograms.jsonl").write_text(json.dumps(table) + "\n")
    return path


def composed(loss, constraint, seed):
    target, values = (FAMILIES | OTHERS).get(constraint, ("", {}))
    power = {"penalty": "power", "power": 0.5} if loss == "gaussian_power" else {}
    true = {"rewards": "data"} if loss == "rlhf" else {}
    return {
        "model": {"_target_": "cdpo.model.tabular.Tabular"},
        "dataset": {"_target_": "cdpo.data.bandit.Bandit", "world_seed": seed},
        "loss": {"_target_": f"cdpo.losses.{TARGETS[loss]}", "beta": 1.0} | power | true,
        "constraint": {constraint: {"_target_": f"cdpo.constraints.{target}"} | values} if target else {},
        "optimizer": {"_target_": "cdpo.optim.SGD", "learning_rate": 1.0},
        "trainer": {"max_steps": 4, "eval_every": 1},
        "logger": {"_target_": "cdpo.system.logger.NoLogger"},
        "beta": 1.0,
        "seed": seed,
        "restart": 0,
        "study": None,
    }


def measured(step, attained, constraint, rewards):
    """The rows of one step: of training, and of an evaluation."""
    quality = {
        "eval/loss": 1 - attained,
        "eval/rewards/margins": attained,
        "eval/rewards/accuracies": 0.5 + attained / 2,
    }
    known = {"J": attained, "J_reference": 0.0, "J_optimum": 1.0, "attained": attained, "kl_to_optimum": 1 - attained}
    known |= {"kl": attained / 4, "expected_reward": 1.25 * attained}
    objective = {f"objective/{name}": value for name, value in known.items()} if rewards else {}
    binds = {f"constraint/{constraint}/binds": 1.0, f"constraint/{constraint}/boundary_distance": 0.0}
    evaluation = quality | {"eval/kl/candidates": attained / 4} | objective | (binds if constraint != "none" else {})
    return [{"step": step, "loss": 1 - attained, "grad_norm": 1.0}, {"step": step} | evaluation]


def change(path: Path, name: str, **values):
    """Change keys of a JSON file of a run; None removes the file."""
    file = path / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
