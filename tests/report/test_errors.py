"""The three errors apart, worse than the reference, and a tick for every row: numbers by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from table_of_runs import cells, labels, run

from cdpo.report import errors, gap
from cdpo.report.figures import Study
from cdpo.report.findings import findings
from cdpo.report.plotting import forms, heat, panels, style


def study(*rows):
    labelled = labels(*rows)
    found = gap.with_gaps(gap.best(labelled))
    every = labelled.runs.assign(optimizer=[row["optimizer"] for row in rows])
    return Study(Path(), found, gap.cells(found, labelled.settings), ["dataset.pairs"], every)


def world(seed, scale=1.0):
    """RLHF .9; DPO .8 on all preferences, .5 and .7 at its optimum on 10 and 100 pairs, .6 as trained on 100."""
    options = {"constraint": "l2_ball", "seed": seed, "dataset__world_seed": seed}
    for loss, value, optimizer, n in (
        ("rlhf", 0.9, "exact", None),
        ("dpo", 0.8, "exact", None),
        ("dpo", 0.5, "exact", 10),
        ("dpo", 0.7, "exact", 100),
        ("dpo", 0.6, "adamw", 100),
    ):
        yield run(loss, value * scale, dataset__pairs=n, **options) | {"optimizer": optimizer}


def test_errors_by_hand_on_every_world():
    found = errors.apart(study(*world(0), *world(1, scale=0.5)))
    assert set(found) == {"dpo, l2_ball"}
    few, many = found["dpo, l2_ball"][10.0], found["dpo, l2_ball"][100.0]
    assert few["constraint"] == many["constraint"] == pytest.approx([0.1, 0.55])
    assert few["gap"] == many["gap"] == pytest.approx([0.1, 0.05])
    assert few["estimation"] == pytest.approx([0.3, 0.15])
    assert many["estimation"] == pytest.approx([0.1, 0.05])
    assert "optimisation" not in few
    assert many["optimisation"] == pytest.approx([0.1, 0.05])
    assert sum(many[name][1] for name in errors.ERRORS) == pytest.approx(1 - 0.3)


def test_other_settings_are_other_panels():
    betas = ({"config.beta": beta, "config.loss.beta": beta} for beta in (1.0, 2.0))
    rows = [row | beta for beta, scale in zip(betas, (1.0, 0.5)) for row in world(0, scale)]
    every = study(*rows)
    found = errors.apart(replace(every, settings=["beta", "model", "dataset.pairs"]))
    assert set(found) == {"dpo, l2_ball · beta 1, model tabular", "dpo, l2_ball · beta 2, model tabular"}
    assert found["dpo, l2_ball · beta 2, model tabular"][100.0]["constraint"] == pytest.approx([0.55])


def test_what_would_be_another_number_is_left_out():
    """Two ways of training, a penalty, RLHF that another search has beaten, runs of before certificates."""
    two_ways = [*world(0), *(row | {"optimizer": "sgd"} for row in world(0) if row["optimizer"] == "adamw")]
    assert "optimisation" not in errors.apart(study(*two_ways))["dpo, l2_ball"][100.0]
    assert not errors.apart(study(*(row | {"constraint": "weight_decay"} for row in world(0))))
    beaten = [row | {"metric/objective/attained": 0.5} if row["loss"] == "rlhf" else row for row in world(0)]
    assert set(errors.apart(study(*beaten))["dpo, l2_ball"][100.0]) == {"estimation", "optimisation"}
    old = study(*world(0))
    assert not errors.apart(replace(old, every=old.every.drop(columns="certificate.status")))


def test_an_optimum_that_was_not_reached_is_left_out():
    rows = [row | {"certificate.status": "not_reached"} if row["loss"] == "rlhf" else row for row in world(0)]
    found = errors.apart(study(*rows))["dpo, l2_ball"][100.0]
    assert set(found) == {"estimation", "optimisation"}


def test_the_figure_is_drawn_where_there_is_something_over_n():
    drawing = errors.errors(study(*world(0), *world(1)))
    assert drawing.name == "errors"
    assert "over 2 worlds" in drawing.caption
    assert errors.errors(study(run("rlhf", 0.9), run("dpo", 0.8))) is None


def test_where_a_policy_is_worse_than_its_reference():
    rows = [run("rlhf", a, "lora_r1", seed=s) for s, a in enumerate((0.4, 0.5, 0.6))]
    rows += [run("dpo", a, "lora_r1", seed=s) for s, a in enumerate((-0.2, -0.21, -0.22))]
    rows += [run("ipo", a, "lora_r1", seed=s) for s, a in enumerate((0.3, -0.5, 0.1))]
    said = [line for line in findings(pd.DataFrame(cells(*rows).values())) if "worse than the reference" in line]
    assert said == [
        "Some runs are worse than the reference, which is attained < 0, in 2 cells: "
        "3 of 3 seeds, mean -0.210 ± 0.025 (3), of dpo under lora_r1, where RLHF attains 0.500; "
        "1 of 3 seeds, mean -0.033 ± 1.034 (3), of ipo under lora_r1, where RLHF attains 0.500."
    ]
    assert not any(
        "worse" in line for line in findings(pd.DataFrame(cells(run("rlhf", 1.0), run("dpo", 0.0)).values()))
    )


def test_a_low_heat_map_has_a_tick_for_every_row():
    values = pd.DataFrame([[0.1]] * 9, index=[f"row {i}" for i in range(9)], columns=["dpo"])
    with style():
        figure = panels([""], size=(3.0, 0.6))
        heat(figure.axes[""], values, values.map(str), low=0.0, high=1.0)
        assert [label.get_text() for label in figure.axes[""].get_yticklabels()] == list(values.index)
        assert forms(figure.figure)["png"]
