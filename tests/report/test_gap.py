"""The constraint gap against arithmetic done by hand, on small tables of runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator
from table_of_runs import cells, labels, run

from cdpo.report import gap


def penalty(loss, strength, norm, attained, name="l2_to_start", **more):
    more = {f"constraint__{name}__strength": strength, "m_change__norm": norm} | more
    return run(loss, attained, name, **more)


# gap


def test_gap_is_the_mean_difference_of_pairs():
    found = cells(run("rlhf", 0.9), run("rlhf", 0.8, seed=1), run("dpo", 0.7), run("dpo", 0.5, seed=1))
    dpo = found["dpo", "none"]
    assert dpo["gap"] == pytest.approx(0.25)  # of 0.2 and 0.3
    assert dpo["gap_half"] == pytest.approx(12.706 * 0.05, rel=1e-4)  # sd 0.1 / sqrt 2, over sqrt 2; t of 1
    assert (dpo["attained"], dpo["attained_half"]) == (pytest.approx(0.6), pytest.approx(12.706 * 0.1, rel=1e-4))
    assert (dpo["ceiling"], dpo["seeds"], dpo["gap_n"], dpo["note"]) == (pytest.approx(0.85), 2, 2, "")
    assert math.isnan(found["rlhf", "none"]["gap"])


def test_one_seed_has_no_spread():
    dpo = cells(run("rlhf", 0.9), run("dpo", 0.7))["dpo", "none"]
    assert dpo["gap"] == pytest.approx(0.2)
    assert math.isnan(dpo["gap_half"])


def test_constraints_are_compared_with_their_own_ceiling():
    found = cells(run("rlhf", 1.0), run("dpo", 1.0), run("rlhf", 0.6, "lora_r1"), run("dpo", 0.4, "lora_r1"))
    assert found["dpo", "none"]["gap"] == 0
    assert found["dpo", "lora_r1"]["gap"] == pytest.approx(0.2)


def test_a_seed_without_partner_is_left_out_and_said():
    found = cells(run("rlhf", 0.9), run("dpo", 0.7), run("dpo", 0.1, seed=1))["dpo", "none"]
    assert (found["gap"], found["gap_n"], found["seeds"]) == (pytest.approx(0.2), 1, 2)
    assert found["note"] == "RLHF has no finished run under this constraint and seed (seed 1)"


def test_the_key_that_keeps_rlhf_from_being_a_partner_is_named():
    rows = run("rlhf", 0.9, dataset__prompts=16), run("dpo", 0.7, dataset__prompts=32)
    table = gap.with_gaps(gap.best(labels(*rows)))
    assert list(table["reason"]) == ["", "no run of RLHF has the same dataset.prompts"]


def test_runs_without_rewards_have_no_gap():
    found = cells(run("dpo", None), run("rlhf", 0.5))["dpo", "none"]
    assert math.isnan(found["gap"])
    assert "no rewards" in found["note"]


@pytest.mark.parametrize("state", ["failed", "running", "preempted", "missing", "unknown"])
def test_only_runs_that_went_through_count(state):
    assert ("dpo", "none") not in cells(run("rlhf", 0.9), run("dpo", 0.7, state=state))
    assert ("dpo", "none") in cells(run("rlhf", 0.9), run("dpo", 0.7, state="stopped_early"))


def test_no_runs_at_all_give_no_cells():
    assert cells(run("dpo", 0.7, state="failed")) == {}


# searches


def test_the_search_with_the_lowest_objective_counts():
    rows = [run("dpo", a, m_objective=o, restart=i) for i, (o, a) in enumerate([(3.0, 0.9), (1.0, 0.5), (2.0, 0.6)])]
    dpo = cells(run("rlhf", 1.0), *rows)["dpo", "none"]
    assert (dpo["attained"], dpo["gap"], dpo["searches"]) == (0.5, 0.5, 3)
    assert math.isnan(dpo["attained_low"])  # no run says what epsilon is


def test_optimizers_are_searches_and_a_search_without_objective_is_last():
    rows = run("dpo", 0.2, m_objective=None), run("dpo", 0.6, optimizer___target_="SGD", m_objective=5.0)
    dpo = cells(run("rlhf", 1.0), *rows)["dpo", "none"]
    assert (dpo["attained"], dpo["searches"]) == (0.6, 2)


def test_under_early_stop_the_optimizer_is_part_of_the_problem():
    rows = [run(loss, a, "early_stop", optimizer__learning_rate=r) for loss, r, a in
            [("rlhf", 0.1, 0.5), ("rlhf", 1.0, 0.9), ("dpo", 0.1, 0.4), ("dpo", 1.0, 0.6)]]  # fmt: skip
    labelled = labels(*rows)
    assert labelled.settings == ["config.optimizer.learning_rate"]
    table = gap.cells(gap.with_gaps(gap.best(labelled)), labelled.settings)
    dpo = table[table["loss"] == "dpo"].set_index("optimizer.learning_rate")["gap"]
    assert dpo.to_dict() == {0.1: pytest.approx(0.1), 1.0: pytest.approx(0.3)}


def test_rewards_that_tie_are_not_missing():
    assert "rewards of a prompt tie" in cells(run("dpo", None, m_objective__J=0.5))["dpo", "none"]["note"]


def test_the_penalty_beside_the_loss_counts_in_the_choice_of_a_search():
    decay = {"constraint__weight_decay__strength": 0.5, "m_change__norm": 1.0, "optimizer__momentum": 0.0}
    far = run("dpo", 0.9, "weight_decay", m_objective=1.0, m_constraint__weight_decay__norm=4.0, **decay)  # 1 + 4
    near = run("dpo", 0.3, "weight_decay", m_objective=2.0, m_constraint__weight_decay__norm=2.0, **decay)  # 2 + 1
    assert cells(far, near)["dpo", "weight_decay"]["attained"] == 0.3
    for row in (far, near):
        row["config.optimizer.momentum"] = 0.9  # 1.4 and 2.1
    assert cells(far, near)["dpo", "weight_decay"]["attained"] == 0.9


def test_runs_with_another_momentum_have_another_penalty():
    rows = [run("dpo", 0.5, "weight_decay", constraint__weight_decay__strength=0.5, optimizer__momentum=m, restart=r)
            for m in (0.0, 0.9) for r in (0, 1)]  # fmt: skip
    assert len(gap.best(labels(*rows))) == 2


def test_a_multiplier_times_what_is_over_the_budget_counts_in_the_choice_of_a_search():
    budget = {"constraint__kl_budget__budget": 0.2}
    near = run("dpo", 0.9, "kl_budget", m_objective=1.4, m_constraint__kl_budget__multiplier=2.0, **budget)  # 1.0
    far = run("dpo", 0.3, "kl_budget", m_objective=1.3, m_constraint__kl_budget__multiplier=0.5, **budget)  # 1.2
    assert cells(near, far)["dpo", "kl_budget"]["attained"] == 0.9
    for row, loss in ((near, 0.5), (far, 0.4)):  # the held-out loss holds no multiplier
        row |= {"config.trainer.batch_size": 4, "metric/eval/loss": loss}
    assert cells(near, far)["dpo", "kl_budget"]["attained"] == 0.3


def test_the_objective_of_a_last_mini_batch_chooses_no_search():
    rows = [run("dpo", a, m_objective=o, m_eval__loss=e, trainer__batch_size=4, restart=i) for i, (a, o, e) in
            enumerate([(0.9, 2.0, 1.0), (0.3, 1.0, 2.0)])]  # fmt: skip
    assert cells(*rows)["dpo", "none"]["attained"] == 0.9


def test_keys_that_change_no_number_part_no_runs():
    rlhf = run("rlhf", 0.9, cache_dir="a", trainer__distributed="ddp", dry_run=False, trainer__log_every=5)
    found = cells(rlhf, run("dpo", 0.7, cache_dir="b", trainer__distributed="none", trainer__log_every=7))
    assert found["dpo", "none"]["gap"] == pytest.approx(0.2)


# penalties


def test_penalties_are_compared_at_equal_norm():
    rows = [penalty("rlhf", s, 1 / s, 0.1 / s) for s in (0.1, 0.2, 0.5, 1.0)]  # attained = norm / 10, through (0, 0)
    found = cells(*rows, penalty("dpo", 0.2, 4.0, 0.3))
    dpo = found["dpo", "l2_to_start (strength 0.2)"]
    assert (dpo["ceiling"], dpo["gap"]) == (pytest.approx(0.4), pytest.approx(0.1))  # not 0.5 - 0.3, at equal strength
    assert dpo["at_norm"]
    assert dpo["penalised_norm"] == 4.0


def test_the_curve_is_that_of_a_smooth_function():
    def curve(norm):
        return 1 - math.exp(-norm)

    points = [(n, curve(n)) for n in np.linspace(0, 3, 25)]
    for norm in (0.31, 1.234, 2.9):
        assert gap.at_norm(points, norm)[0] == pytest.approx(curve(norm), abs=1e-3)
    assert gap.at_norm(points, 1.0)[0] == float(PchipInterpolator(*zip(*points))(1.0))


def test_the_reference_is_a_point_of_the_curve_of_l2_to_start_only():
    found = cells(penalty("rlhf", 0.1, 10.0, 0.8), penalty("dpo", 0.1, 5.0, 0.3))
    assert found["dpo", "l2_to_start"]["gap"] == pytest.approx(0.1)
    found = cells(penalty("rlhf", 0.1, 10.0, 0.8, "weight_decay"), penalty("dpo", 0.1, 5.0, 0.3, "weight_decay"))
    assert math.isnan(found["dpo", "weight_decay"]["gap"])
    assert found["dpo", "weight_decay"]["note"] == "RLHF has 1 strength, a curve needs 2: add strengths (seed 0)"


def test_a_norm_that_is_not_bracketed_is_not_extrapolated():
    rows = penalty("rlhf", 0.1, 11.7, 0.9, "weight_decay"), penalty("rlhf", 1, 8.0, 0.5, "weight_decay")
    dpo = cells(*rows, penalty("dpo", 1, 5.4, 0.1, "weight_decay"))["dpo", "weight_decay (strength 1)"]
    assert math.isnan(dpo["gap"])
    assert dpo["note"] == "norm 5.4 outside RLHF's 8 to 11.7: add strengths (seed 0)"
    assert gap.at_norm([(8.0, 0.5), (11.7, 0.9)], 11.7 * (1 + 1e-12)) == (0.9, "")
    assert gap.at_norm([(8.0, 0.5), (11.7, 0.9995)], 15.0) == (0.9995, "")  # a larger norm is no use to RLHF


def test_weight_decay_compares_the_norm_that_it_decays():
    rows = [penalty(loss, s, 1.0, a, "weight_decay", m_constraint__weight_decay__norm=n) for loss, s, a, n in
            [("rlhf", 0.1, 0.8, 8.0), ("rlhf", 1.0, 0.4, 4.0), ("dpo", 0.1, 0.5, 6.0)]]  # fmt: skip
    assert cells(*rows)["dpo", "weight_decay (strength 0.1)"]["gap"] == pytest.approx(0.1)


def test_curves_of_seeds_and_of_problems_are_kept_apart():
    rows = [penalty("rlhf", 0.1, 10.0, 1.0, seed=s, dataset__prompts=p) for s in (0, 1) for p in (8, 16)]
    rows += [penalty("rlhf", 0.1, 10.0, 0.5, seed=2, dataset__prompts=8)]
    dpo = [penalty("dpo", 0.1, 5.0, 0.1, seed=s, dataset__prompts=8) for s in (0, 1, 2)]
    table = gap.with_gaps(gap.best(labels(*rows, *dpo)))
    assert list(table[table["loss"] == "dpo"]["gap"].round(9)) == [0.4, 0.4, 0.15]


def test_two_penalties_have_no_single_curve():
    more = {"constraint__l2_to_start__strength": 1.0, "constraint__weight_decay__strength": 1.0, "m_change__norm": 1.0}
    names = "l2_to_start+weight_decay"
    found = cells(run("rlhf", 0.9, names, **more), run("dpo", 0.5, names, **more))
    assert "two penalties" in found["dpo", "l2_to_start + weight_decay"]["note"]


# settings and order


def test_means_are_not_taken_over_settings():
    rows = [run(loss, a, beta=b, loss__beta=b, seed=s) for loss, a in (("rlhf", 0.9), ("dpo", 0.5)) for b in (0.1, 1.0)
            for s in (0, 1)]  # fmt: skip
    labelled = labels(*rows)
    table = gap.cells(gap.with_gaps(gap.best(labelled)), labelled.settings)
    assert labelled.settings == ["config.beta"]
    assert list(table["setting"]) == ["beta 0.1", "beta 0.1", "beta 1", "beta 1"]
    assert list(table["seeds"]) == [2, 2, 2, 2]


def test_losses_and_constraints_stand_in_a_fixed_order():
    rows = [run(loss, a, c, **{f"constraint__{c}__strength": s} if s else {}) for c, s in
            (("weight_decay", 10.0), ("weight_decay", 9.0), ("none", None)) for loss, a in
            (("ipo", 0.1), ("dpo", 0.7), ("rlhf", 0.9))]  # fmt: skip
    labelled = labels(*rows)
    table = gap.cells(gap.with_gaps(gap.best(labelled)), labelled.settings)
    assert list(dict.fromkeys(table["loss"])) == ["rlhf", "dpo", "ipo"]
    assert list(dict.fromkeys(table["constraint"])) == [
        "none", "weight_decay (strength 9)", "weight_decay (strength 10)"]  # fmt: skip
