"""Certificates: nothing is left of the gradient at an optimum, much of it anywhere else, and bounds bound."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from composing import composed, train
from exact_worlds import EXACT, solved, world
from run_files import rows
from small_runs import SMALL, interrupted_at

from cdpo.errors import Preempted
from cdpo.report.marks import mended
from cdpo.training import loop

BALL, BOX, BUDGET = "constraint.l2_ball.radius=", "constraint.linf_ball.radius=", "constraint.kl_budget.budget="
PULL, DECAY = "constraint.l2_to_start.strength=0.05", "constraint.weight_decay.strength=0.02"
CELLS = {  # constraints, and their sizes: all of them bind
    "none": [],
    "l2_ball": [f"{BALL}1.5"],
    "linf_ball": [f"{BOX}0.4"],
    "kl_budget": [f"{BUDGET}0.1"],
    "lora_r1": [],
    "lora_r2": [],
    "lora_r4": [],
    "sparse_topk": ["constraint.sparse_topk.k=4", "constraint.sparse_topk.fraction=null"],
    "l2_to_start": [PULL],
    "weight_decay": [DECAY],
    "lora_r2,weight_decay": [DECAY],
    "lora_r2,l2_to_start": [PULL],
    "l2_ball,linf_ball": [f"{BALL}1.5", f"{BOX}0.5"],
    "l2_ball,l2_to_start": [f"{BALL}1", PULL],
    "kl_budget,l2_ball": [f"{BUDGET}0.043", f"{BALL}0.98"],
    "kl_budget,linf_ball": [f"{BUDGET}0.06", f"{BOX}0.5"],
    "kl_budget,l2_to_start": [f"{BUDGET}0.06", PULL],
}
SLOW = {"lora_r2,l2_ball": [f"{BALL}1.5"], "lora_r2,kl_budget": [f"{BUDGET}0.06"]}


def residuals(cell, loss, tmp_path, monkeypatch):
    """The certificates at the optimum of a cell, and of a policy that has moved a little from there."""
    certify, beside = loop.certify, {}

    def twice(run, metrics):
        best, generator = certify(run, metrics), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in run.parameters:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.05 * noise * (parameter != 0)
        beside.update(certify(run, metrics))
        return best

    monkeypatch.setattr(loop, "certify", twice)
    own = [f"constraint=[{cell}]", f"loss={loss}", "beta=1", "optimizer.starts=4", *{**CELLS, **SLOW}[cell]]
    return solved(world("ragged", tmp_path), tmp_path / "run", *own)["certificate"], beside


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_left_of_the_gradient_at_an_optimum_and_much_beside_it(cell, tmp_path, monkeypatch):
    best, beside = residuals(cell, "dpo", tmp_path, monkeypatch)
    assert best["residual"] < 1e-7
    assert best.get("infeasibility", 0.0) < 1e-7
    assert best["status"] in ("certified", "searched")
    assert beside["residual"] > 1e-3
    assert beside["status"] == "not_reached"


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*CELLS, *SLOW])
def test_nor_of_that_of_rlhf(cell, tmp_path, monkeypatch):
    best, beside = residuals(cell, "rlhf", tmp_path, monkeypatch)
    assert best["residual"] < 1e-7
    assert beside["residual"] > 1e-3


def test_adamw_with_projection_does_not_end_on_an_optimum(tmp_path):
    """theory.md, section 6: in the ball of radius 4 around the default world's reference .616 is possible."""
    own = ["model=tabular", "logger=none", "beta=1", "loss=rlhf",
           "constraint=l2_ball", "constraint.l2_ball.radius=4"]  # fmt: skip
    steps = ["trainer.max_steps=100", "trainer.log_every=100", "trainer.eval_every=100", "optimizer.learning_rate=0.2"]
    adamw = train(composed(*own, *steps, "trainer.batch_size=4"), tmp_path / "adamw")
    exact = train(composed(*own, "optimizer=exact", "optimizer.starts=2"), tmp_path / "exact")
    assert adamw["metrics"]["objective/attained"] < 0.5
    assert exact["metrics"]["objective/attained"] == pytest.approx(0.616, abs=5e-4)
    assert adamw["certificate"]["status"] == "not_reached"
    assert adamw["certificate"]["residual"] > 0.1 > 1e-6 > exact["certificate"]["residual"]
    command = shlex.join(["cdpo-train", *own, *steps, "trainer.batch_size=4"])
    words = shlex.split(mended(command, adamw["certificate"]["mend"]))[1:]
    found = train(composed(*words, "optimizer.starts=2"), tmp_path / "mended")
    assert found["metrics"]["objective/attained"] == exact["metrics"]["objective/attained"]


@pytest.mark.parametrize("own", [["loss=bco"], ["loss=dpo", "constraint=[sparse_topk,kl_budget]"]], ids=str)
def test_what_exact_cannot_solve_is_to_be_trained_longer(own, tmp_path):
    settings = composed("model=tabular", "logger=none", *own, "trainer.max_steps=2", "trainer.log_every=2")
    found = train(settings, tmp_path)["certificate"]
    assert found["status"] == "not_reached"
    assert found["mend"] == "trainer.batch_size=null optimizer.schedule=cosine trainer.max_steps=8"


def test_an_optimum_at_infinity_is_said_to_be_there(tmp_path):
    """Hard labels that agree: DPO has no finite optimum."""
    sampled = ("dataset.preferences=sampled", "dataset.pairs=20")
    found = train(composed(*EXACT, *sampled, "loss=dpo", "constraint=none"), tmp_path)["certificate"]
    assert (found["status"], found["supremum"]) == ("certified", True)
    assert found["says"].startswith("the infimum lies at infinity and is not attained (convex; residual ")
    assert found["mend"] == ""


def test_trained_to_the_end_rlhf_is_certified_by_its_closed_form(tmp_path):
    path = world("ragged", tmp_path)
    settings = composed("model=tabular", "logger=none", f"dataset.path={path}", "beta=1", "loss=rlhf",
                        "constraint=none", "optimizer=lbfgs", "trainer.max_steps=20")  # fmt: skip
    found = train(settings, tmp_path / "run")["certificate"]
    assert found["status"] == "certified"
    assert "closed form" in found["says"]


NO_SET = {"early_stop": ["constraint.early_stop.step=3"], "early_stop_kl": [], "early_stop_metric": [], "dropout": []}


@pytest.mark.parametrize("constraint", NO_SET)
def test_what_is_no_set_of_policies_has_no_certificate(constraint, tmp_path):
    summary = train(composed(*SMALL, f"constraint={constraint}", *NO_SET[constraint]), tmp_path)
    found = summary["certificate"]
    assert found.keys() == {"status", "says", "mend"}
    assert found["status"] == "none"
    assert found["says"].startswith(f"{constraint}: ")
    assert not any(name.startswith("certificate/") for name in summary["metrics"])


def test_without_items_there_is_none(tmp_path):
    found = train(composed(*SMALL, "trainer.certificate_items=0"), tmp_path)["certificate"]
    assert found == {"status": "none", "says": "trainer.certificate_items=0", "mend": ""}


def test_of_larger_data_it_is_a_sample(tmp_path):
    found = {n: train(composed(*SMALL, f"trainer.certificate_items={n}"), tmp_path / str(n)) for n in (3, 5, 256)}
    assert {n: summary["certificate"]["items"] for n, summary in found.items()} == {3: 3, 5: 5, 256: 5}
    assert found[5]["certificate"] == found[256]["certificate"]
    assert found[3]["certificate"]["residual"] != found[5]["certificate"]["residual"]


def test_its_numbers_are_in_the_last_row_of_the_metrics(tmp_path):
    summary = solved(world("ragged", tmp_path), tmp_path / "run", "loss=dpo", "beta=1", "constraint=l2_ball")
    certificate = summary["certificate"]
    numbers = {f"certificate/{name}": float(value) for name, value in certificate.items() if not isinstance(value, str)}
    assert {"certificate/residual", "certificate/bound", "certificate/hits", "certificate/norm"} <= numbers.keys()
    last = rows(tmp_path / "run")[-1]
    assert numbers.items() <= last.items()
    assert numbers.items() <= summary["metrics"].items()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["certificate"] == certificate
    assert certificate["norm"] == pytest.approx(summary["change/norm"], rel=1e-12)


@pytest.mark.parametrize("own", [[*SMALL, "constraint=[lora_r2,l2_ball]"], [*SMALL, "constraint=kl_budget"]], ids=str)
def test_it_is_the_same_after_a_resume(own, tmp_path, monkeypatch):
    whole = train(composed(*own), tmp_path / "whole")["certificate"]
    with monkeypatch.context() as patch:
        interrupted_at(5, patch)
        with pytest.raises(Preempted):
            train(composed(*own), tmp_path / "parts")
    assert train(composed(*own), tmp_path / "parts")["certificate"] == whole


def test_a_search_that_was_stopped_before_its_certificate_goes_on(tmp_path, monkeypatch):
    settings = composed(*EXACT, f"dataset.path={world('ragged', tmp_path)}", "beta=1", "loss=dpo", "constraint=lora_r1",
                        "optimizer.starts=2")  # fmt: skip
    whole = train(settings, tmp_path / "whole")["certificate"]

    def killed(run, metrics):
        raise Preempted("SIGTERM", "SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "certify", killed)
        search = loop.search_step

        def stopping(run):
            search(run)
            run.session.signals.request("SIGTERM")

        patch.setattr(loop, "search_step", stopping)
        with pytest.raises(Preempted):
            train(settings, tmp_path / "parts")
    assert train(settings, tmp_path / "parts")["certificate"] == whole


def test_more_starts_are_not_advised_where_few_are_used(tmp_path):
    path = world("ragged", tmp_path)
    one, more = (solved(path, tmp_path / str(n), "loss=wpo_candidates", "constraint=lora_r1", f"optimizer.starts={n}")
                 for n in (8, 64))  # fmt: skip
    assert one["certificate"]["starts"] == more["certificate"]["starts"]
    assert one["certificate"]["mend"] == "" == more["certificate"]["mend"]
