"""The certificate of a sparse change: it looks at other supports, and one that is not full holds nothing back."""

from __future__ import annotations

import pytest
import torch
from exact_worlds import solved, world

from cdpo.training import certificate, loop

SPARSE = ["constraint=sparse_topk", "constraint.sparse_topk.k=4", "constraint.sparse_topk.fraction=null", "beta=1"]


def certified(tmp_path, monkeypatch, moved, loss="dpo"):
    """The certificates of the best sparse change, and of the policy that `moved` then makes of it."""
    certify, beside = loop.certify, {}

    def twice(run, metrics):
        best = certify(run, metrics)
        moved(run)
        beside.update(certify(run, metrics))
        return best

    monkeypatch.setattr(loop, "certify", twice)
    own = [f"loss={loss}", "optimizer.starts=4", *SPARSE]
    return solved(world("ragged", tmp_path), tmp_path / "run", *own)["certificate"], beside


def descend(run, mask):
    """To the optimum on a support, by plain gradient steps."""
    ((_, parameter, start),) = run.change.plain()
    items = range(len(run.train.items))
    with torch.no_grad():
        parameter.copy_(start + (parameter - start) * mask)
    for _ in range(4000):
        certificate.differentiated(run, certificate.objective(run, items))
        with torch.no_grad():
            parameter -= 2.0 * parameter.grad * mask


def to_a_worse_support(run):
    """The number that moved furthest is put back, and the one beside the support with the least gradient moves."""
    ((_, parameter, start),) = run.change.plain()
    change = (parameter - start).detach()
    certificate.differentiated(run, certificate.objective(run, range(len(run.train.items))))
    mask = (change != 0).double()
    used = parameter.grad.abs() > 1e-6
    least = torch.where(used & (change == 0), parameter.grad.abs(), torch.inf).argmin()
    mask.view(-1)[change.abs().argmax()], mask.view(-1)[least] = 0.0, 1.0
    descend(run, mask)


@pytest.mark.parametrize("loss", ["dpo", "rlhf"])
def test_a_stationary_point_on_a_worse_support_is_not_called_an_optimum(loss, tmp_path, monkeypatch):
    best, worse = certified(tmp_path, monkeypatch, to_a_worse_support, loss)
    assert best["status"] == "searched"
    assert best["swap"] <= 1e-4
    assert worse["residual"] <= 1e-3, "it is stationary on its support"
    assert worse["swap"] > 1e-2
    assert worse["status"] == "not_reached"
    assert worse["says"].startswith("another support gains ")


def test_the_gain_is_that_of_a_policy_with_the_exchange(tmp_path, monkeypatch):
    """By hand: the least number back, the one with the largest gradient moved along a grid of steps."""
    seen = {}

    def moved(run):
        to_a_worse_support(run)
        ((_, parameter, start),) = run.change.plain()
        items = range(len(run.train.items))
        here = certificate.differentiated(run, certificate.objective(run, items))
        change, slopes = (parameter - start).detach().flatten(), parameter.grad.clone().flatten()
        least = torch.where(change != 0, change.abs(), torch.inf).argmin()
        enters = torch.where(change == 0, slopes.abs(), 0.0).argmax()
        values = []
        with torch.no_grad():
            kept = parameter.clone()
            for step in torch.linspace(0, 4, 400):
                parameter.copy_(kept).view(-1)[least] = start.view(-1)[least]
                parameter.view(-1)[enters] -= step * slopes[enters].sign()
                values.append(sum(map(float, certificate.objective(run, items))))
            parameter.copy_(start)
            fall = sum(map(float, certificate.objective(run, items))) - here
            parameter.copy_(kept)
        seen["most"] = (here - min(values)) / fall

    _, worse = certified(tmp_path, monkeypatch, moved)
    assert 0.8 * seen["most"] < worse["swap"] <= seen["most"] * (1 + 1e-3)


def test_what_has_not_moved_is_not_stationary(tmp_path, monkeypatch):
    """Fewer weights differ than may: every one is free to."""

    def back(run):
        with torch.no_grad():
            for _, parameter, start in run.change.plain():
                parameter.copy_(start)

    _, start = certified(tmp_path, monkeypatch, back)
    assert start["residual"] == pytest.approx(1)
    assert start["status"] == "not_reached"
    assert "swap" not in start
