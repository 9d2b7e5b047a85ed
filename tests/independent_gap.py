"""Attained and gap of DPO in an L2 ball, on a world file, by NumPy and SciPy alone: independent_gap.py FILE RADIUS.

Shares no line with cdpo: the definitions of theory.md, section 2, and SciPy's SLSQP for the constrained optima.
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax


def gap(path: str, radius: float, beta: float = 1.0) -> dict[str, float]:
    world = json.loads(Path(path).read_text())
    rewards = [np.array(row) for row in world["rewards"]]
    logits = [np.array(row) for row in world.get("reference_logits") or [[0.0] * len(r) for r in rewards]]
    cuts = np.cumsum([len(r) for r in rewards])[:-1]

    def objective(theta):  # J, mean over prompts
        rows = [log_softmax(z + d) for z, d in zip(logits, np.split(theta, cuts))]
        terms = zip(rows, rewards, logits)
        return np.mean([np.exp(p) @ r - beta * np.exp(p) @ (p - log_softmax(z)) for p, r, z in terms])

    def dpo(theta):  # y1, y2 ~ reference, all ordered pairs, Bradley-Terry labels
        total = 0.0
        for d, r, z in zip(np.split(theta, cuts), rewards, logits):
            mass, p = np.outer(softmax(z), softmax(z)), 1 / (1 + np.exp(-(r[:, None] - r)))
            total += np.sum((mass * (1 - np.eye(len(r)))) * p * np.logaddexp(0, -beta * (d[:, None] - d)))
        return total / len(rewards)

    def best(loss):
        ball = {"type": "ineq", "fun": lambda t: radius**2 - t @ t, "jac": lambda t: -2 * t}
        start = np.full(sum(map(len, rewards)), 1e-3)
        return minimize(loss, start, method="SLSQP", constraints=ball, options={"ftol": 1e-15, "maxiter": 1000}).x

    low = np.mean([softmax(z) @ r for z, r in zip(logits, rewards)])
    high = np.mean([beta * (logsumexp(z + r / beta) - logsumexp(z)) for z, r in zip(logits, rewards)])
    rlhf, fit = ((objective(best(loss)) - low) / (high - low) for loss in (lambda t: -objective(t), dpo))
    return {"rlhf": rlhf, "dpo": fit, "gap": rlhf - fit}


if __name__ == "__main__":
    print(gap(sys.argv[1], float(sys.argv[2])))
