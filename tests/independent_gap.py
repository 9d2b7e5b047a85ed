"""Attained and gap on a world file, under sets and penalties, by NumPy, SciPy, cvxpy: independent_gap.py FILE RADIUS.

Shares no line with cdpo: definitions of theory.md, sections 2 and 5. Convex problems go to cvxpy; SLSQP and L-BFGS-B
from many starts do the others. theta is the change of the logits of all responses, prompt after prompt.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cvxpy
import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import expit, log_softmax, logsumexp, softmax

PRECISE = {f"tol_{name}": 1e-9 for name in ("gap_abs", "gap_rel", "feas")}


@dataclass
class World:
    """X prompts with their own numbers of responses, n in all; pairs y1, y2 of the reference, Bradley-Terry labels."""

    rewards: list
    logits: list  # of the reference
    columns: np.ndarray  # [n]; which text a response is, so that a rank sees responses that prompts share

    @staticmethod
    def read(path):
        world = json.loads(Path(path).read_text())
        rewards = [np.array(row, dtype=float) for row in world["rewards"]]
        texts = world["responses"]
        texts = [texts] * len(rewards) if isinstance(texts[0], str) else texts
        symbols = sorted({text for row in texts for text in row})
        columns = np.array([symbols.index(text) for row in texts for text in row])
        logits = world.get("reference_logits") or [np.zeros(len(r)) for r in rewards]
        return World(rewards, [np.array(z, dtype=float) for z in logits], columns)

    def __post_init__(self):
        sizes = [len(r) for r in self.rewards]
        self.n, self.cuts = sum(sizes), np.cumsum(sizes)[:-1]
        self.rows = np.repeat(np.arange(len(sizes)), sizes)
        first = np.concatenate([[0], self.cuts])
        pairs = [(a + i, a + j) for a, k in zip(first, sizes) for i in range(k) for j in range(k) if i != j]
        self.winner, self.loser = np.array(pairs).T
        r, mass = np.concatenate(self.rewards), np.concatenate([softmax(z) for z in self.logits])
        self.weight = mass[self.winner] * mass[self.loser]  # ordered pairs, each as the first of the two
        self.weight /= self.weight.sum()
        self.preference = expit(r[self.winner] - r[self.loser])
        self.incidence = np.zeros((len(pairs), self.n))
        self.incidence[np.arange(len(pairs)), self.winner] = 1
        self.incidence[np.arange(len(pairs)), self.loser] = -1

    def split(self, theta):
        return np.split(theta, self.cuts)

    def policies(self, theta):
        """(log pi, log pi_ref, rewards), prompt by prompt."""
        return [
            (log_softmax(z + d), log_softmax(z), r) for z, d, r in zip(self.logits, self.split(theta), self.rewards)
        ]

    def kl(self, theta):
        """Mean over prompts, and its gradient."""
        rows = [(np.exp(p), p - q) for p, q, _ in self.policies(theta)]
        values = [pi @ ratio for pi, ratio in rows]
        gradient = np.concatenate([pi * (ratio - value) for (pi, ratio), value in zip(rows, values)])
        return np.mean(values), gradient / len(rows)

    def attained(self, theta, beta):
        low = np.mean([softmax(z) @ r for z, r in zip(self.logits, self.rewards)])
        best = [beta * (logsumexp(z + r / beta) - logsumexp(z)) for z, r in zip(self.logits, self.rewards)]
        return (-rlhf(self, beta, theta)[0] - low) / (np.mean(best) - low)


def rlhf(world, beta, theta):
    """-J, and its gradient."""
    rows = [(np.exp(p), r - beta * (p - q)) for p, q, r in world.policies(theta)]
    values = [pi @ f for pi, f in rows]
    gradient = np.concatenate([pi * (value - f) for (pi, f), value in zip(rows, values)])
    return -np.mean(values), gradient / len(rows)


def dpo(world, beta, theta):
    """Mean over ordered pairs, and its gradient; a pair and its mirror image count half each, which is what p says."""
    m = beta * (world.incidence @ theta)
    values = world.preference * np.logaddexp(0, -m) + (1 - world.preference) * np.logaddexp(0, m)
    return world.weight @ values, beta * world.incidence.T @ (world.weight * (expit(m) - world.preference))


def ipo(world, tau, theta):
    """The square of the margin's distance to 1 / 2 tau, and its gradient."""
    m, p, aim = world.incidence @ theta, world.preference, 1 / (2 * tau)
    values = p * (m - aim) ** 2 + (1 - p) * (m + aim) ** 2
    return world.weight @ values, world.incidence.T @ (world.weight * 2 * (m - aim * (2 * p - 1)))


LOSSES = {"rlhf": rlhf, "dpo": dpo, "ipo": ipo}


def convex(world, loss, beta, kind, size):
    """DPO or IPO without a constraint, in a ball, in a box, or with size / 2 * ||theta||^2, by cvxpy."""
    theta = cvxpy.Variable(world.n)
    m, w, p = world.incidence @ theta, world.weight, world.preference
    if loss == "dpo":
        fit = w @ (cvxpy.multiply(p, cvxpy.logistic(-beta * m)) + cvxpy.multiply(1 - p, cvxpy.logistic(beta * m)))
    else:
        fit = w @ cvxpy.square(m - (2 * p - 1) / (2 * beta))  # but for a constant
    penalty = size / 2 * cvxpy.sum_squares(theta) if kind == "penalty" else 0
    sets = {"ball": lambda: [cvxpy.norm2(theta) <= size], "box": lambda: [cvxpy.norm_inf(theta) <= size]}
    cvxpy.Problem(cvxpy.Minimize(fit + penalty), sets.get(kind, list)()).solve(cvxpy.CLARABEL, **PRECISE)
    return theta.value


def within_kl(world, beta, budget):
    """RLHF's optimum with a budget: pi_ref exp(r / (beta + mu)), mu such that the mean KL is the budget."""

    def tilted(mu):
        return np.concatenate(world.rewards) / (beta + mu)

    def excess(mu):
        return world.kl(tilted(mu))[0] - budget

    return tilted(0.0 if excess(0.0) <= 0 else brentq(excess, 0.0, 1e6, xtol=1e-14, rtol=1e-14))


def searched(world, loss, beta, kind, size, starts):
    """Anything in a ball, a box or a KL budget: the best from these starts."""
    function = partial(LOSSES[loss], world, beta)
    limits = {
        "ball": [{"type": "ineq", "fun": lambda t: size**2 - t @ t, "jac": lambda t: -2 * t}],
        "kl": [{"type": "ineq", "fun": lambda t: size - world.kl(t)[0], "jac": lambda t: -world.kl(t)[1]}],
    }
    bounds = [(-size, size)] * world.n if kind == "box" else None
    how = {"ftol": 1e-16, "maxiter": 2000}

    def solved(start):
        return minimize(function, start, jac=True, method="SLSQP", bounds=bounds, constraints=limits.get(kind, ()),
                        options=how)  # fmt: skip

    return min(map(solved, starts), key=lambda found: found.fun).x


def of_rank(world, function, rank, starts=15):
    """theta = (A B) where a prompt offers a response: L-BFGS-B on A and B."""
    shape = (len(world.rewards), world.columns.max() + 1)

    def both(x):
        a, b = x[: shape[0] * rank].reshape(-1, rank), x[shape[0] * rank :].reshape(rank, -1)
        value, gradient = function((a @ b)[world.rows, world.columns])
        full = np.zeros(shape)
        full[world.rows, world.columns] = gradient
        return value, np.concatenate([(full @ b.T).ravel(), (a.T @ full).ravel()])

    how = {"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-10}
    drawn = np.random.default_rng(0).normal(0, 0.7, (starts, rank * sum(shape)))
    found = [minimize(both, x, jac=True, method="L-BFGS-B", options=how) for x in drawn]
    best = min(found, key=lambda one: one.fun)
    a, b = best.x[: shape[0] * rank].reshape(-1, rank), best.x[shape[0] * rank :].reshape(rank, -1)
    return (a @ b)[world.rows, world.columns]


def optimum(world, loss, beta, kind="none", size=0.0):
    """theta that is best for a loss under "none", "ball", "box", "kl", "rank" or "penalty" of that size. [n]"""
    if loss == "rlhf" and kind in ("none", "kl"):
        return within_kl(world, beta, size if kind == "kl" else np.inf)
    if kind == "rank":
        return of_rank(world, partial(LOSSES[loss], world, beta), size)
    if loss != "rlhf" and kind != "kl":
        theta = convex(world, loss, beta, kind, size)  # to which SLSQP adds the digits that interior points lack
        return searched(world, loss, beta, kind, size, [theta]) if kind in ("ball", "box") else theta
    if kind == "penalty":
        return minimize(lambda t: penalised(world, beta, size, t), np.zeros(world.n), jac=True, tol=1e-12).x
    starts = [np.full(world.n, 1e-3), *np.random.default_rng(0).normal(0, 0.3, (2, world.n))]
    return searched(world, loss, beta, kind, size, starts)


def penalised(world, beta, size, theta):
    value, gradient = rlhf(world, beta, theta)
    return value + size / 2 * theta @ theta, gradient + size * theta


def gap(path, size, beta=1.0, loss="dpo", kind="ball"):
    """Attained by RLHF and by a loss under a constraint of that size, and their difference."""
    world = World.read(path)
    best, other = (world.attained(optimum(world, one, beta, kind, size), beta) for one in ("rlhf", loss))
    return {"rlhf": best, loss: other, "gap": best - other}


if __name__ == "__main__":
    print(gap(sys.argv[1], float(sys.argv[2])))
