"""optimizer=exact finds the optima that `independent_gap.py` finds, which shares no line with cdpo."""

from __future__ import annotations

import pytest
import torch
from composing import composed, train
from exact_worlds import EXACT, limited, problem, solved, world
from independent_gap import LOSSES, World, optimum

from cdpo.exact.problem import Objective
from cdpo.exact.search import search
from cdpo.exact.solver import Solver

SETS = [("none", 0.0), ("ball", 1.5), ("box", 0.4), ("penalty", 0.05), ("kl", 0.1), ("rank", 1), ("rank", 2)]
FAST = [("dpo", "ball", 1.5), ("ipo", "box", 0.4), ("rlhf", "kl", 0.1), ("rlhf", "ball", 1.5), ("dpo", "rank", 1)]


def compare(cell, beta, path, folder):
    """Attained, objective and certificate of a cell against the independent solver."""
    loss, kind, size = cell
    own = [f"loss={loss}", f"beta={beta}", *([f"loss.tau={beta}"] if loss == "ipo" else [])]
    summary = solved(path, folder, *own, *limited(kind, size))
    theirs, metrics, certificate = World.read(path), summary["metrics"], summary["certificate"]
    theta = optimum(theirs, loss, beta, kind, size)
    attained, value = theirs.attained(theta, beta), LOSSES[loss](theirs, beta, theta)[0]
    exact = loss == "rlhf" and kind in ("none", "kl")  # in closed form
    convex = loss != "rlhf" and kind not in ("kl", "rank")
    assert certificate["status"] == ("certified" if exact or convex else "searched"), certificate
    if exact:
        assert metrics["objective/attained"] == pytest.approx(attained, abs=1e-8)
    elif kind == "rank" or (kind == "kl" and loss != "rlhf"):
        better = metrics["objective/attained"] - attained if loss == "rlhf" else value - metrics["eval/loss"]
        assert better > -1e-3 * (1 if loss == "rlhf" else max(1.0, abs(value)))
    else:
        assert metrics["objective/attained"] == pytest.approx(attained, abs=1e-6)


@pytest.mark.parametrize("cell", FAST, ids=lambda cell: "-".join(map(str, cell)))
def test_it_finds_the_optima_of_an_independent_solver(cell, tmp_path):
    compare(cell, 1.0, world("ragged", tmp_path), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "beta"), [("ragged", 0.3), ("wide", 1.0), ("tall", 3.0)])
@pytest.mark.parametrize("loss", LOSSES)
def test_it_finds_them_in_all_worlds_at_all_temperatures(name, beta, loss, tmp_path):
    path = world(name, tmp_path)
    for kind, size in SETS:
        compare((loss, kind, size), beta, path, tmp_path / f"{kind}{size}")


@pytest.mark.parametrize("loss", ["dpo", "gaussian_variational", "wpo_candidates"])
def test_a_small_budget_of_a_sharp_loss_is_kept_to_the_digit(loss, tmp_path):
    """At beta = .1 the loss alone would go ten nats further than its budget of .1, to where a KL is flat."""
    summary = train(composed(*EXACT, f"loss={loss}", "beta=0.1", "constraint=kl_budget"), tmp_path / "run")
    certificate, metrics = summary["certificate"], summary["metrics"]
    assert certificate["status"] == "searched", certificate
    assert certificate["residual"] < 1e-6
    assert metrics["kl/candidates"] == pytest.approx(0.1, abs=1e-9)
    assert 0.01 < metrics["constraint/kl_budget/multiplier"] < 10


@pytest.mark.parametrize(("seed", "rank"), [(0, 1), (1, 2)])
def test_towards_infinity_a_search_goes_on_until_nothing_is_left(seed, rank, tmp_path):
    own = ("loss=rlhf", "beta=1", f"constraint=lora_r{rank}", f"dataset.world_seed={seed}")
    certificate = train(composed(*EXACT, *own), tmp_path / "run")["certificate"]
    assert certificate["status"] == "searched", certificate
    assert certificate["supremum"]
    assert certificate["norm"] > 1e3
    assert certificate["promised"] < 1e-6
    assert certificate["residual"] < 1e-3


@pytest.mark.parametrize(
    ("own", "infinite"),
    [
        (["dataset.preferences=sampled", "dataset.pairs=4", "dataset.prompts=3", "dataset.alphabet=3"], True),
        (["dataset.preferences=sampled", "dataset.pairs=20", "constraint=sparse_topk"], True),
        (["dataset.preferences=sampled", "dataset.pairs=4", "loss=ipo"], False),  # its margins have an aim
        (["beta=0.1"], False),
    ],
)
def test_what_hard_labels_part_lies_at_infinity_whole_or_only_in_part(own, infinite, tmp_path):
    certificate = train(composed(*EXACT, "loss=dpo", *own), tmp_path / "run")["certificate"]
    assert certificate["supremum"] == infinite
    assert certificate["status"] == ("searched" if "constraint=sparse_topk" in own else "certified"), certificate


def test_a_solution_that_is_handed_over_is_not_lost_within_a_budget(tmp_path):
    """It stays as it was if every start ended above it, also where it keeps the budget to rounding only."""
    own = ("loss=rlhf", "beta=0.5", "constraint=[lora_r1,kl_budget]", "constraint.kl_budget.budget=0.05")
    table, loss, setting, effort, _ = problem(tmp_path, f"dataset.path={world('ragged', tmp_path)}", *own)
    found = search(table, loss, setting, effort, {})
    solver = Solver(Objective(table, loss, setting.rank, setting.scaling), setting, effort)
    best = found.x[found.value.argmin()]
    begun = solver.scaled_into(torch.stack([best / 2, best]), solver.budgets())
    torch.testing.assert_close(begun[1], best, rtol=0, atol=0)
    unfinished = torch.full_like(best, torch.nan)
    kept = solver.with_better(torch.stack([0.9 * best, unfinished]), begun)
    torch.testing.assert_close(kept, torch.stack([0.9 * best, best]), rtol=0, atol=0)
    torch.testing.assert_close(solver.with_better(begun, begun / 2), begun, rtol=0, atol=0)
