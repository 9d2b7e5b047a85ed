"""Only biases move, with freeze or without, and what was frozen is counted."""

from __future__ import annotations

import pytest
from policies import large_steps, make, moved, prepare

from cdpo.constraints.bias_only import BiasOnly
from cdpo.constraints.freeze import Freeze


@pytest.mark.parametrize("name", ["gpt2", "neox"])
@pytest.mark.parametrize("freeze", [False, True])
def test_bias_only(name, freeze):
    constraints = [BiasOnly(), Freeze(train_last_layers=1)][: 1 + freeze]
    for order in (constraints, constraints[::-1]):
        model, _ = prepare(make(name), *order)
        large_steps(model, *order)
        for key, delta in moved(model, name).items():
            assert delta.any() == (key.endswith(".bias") and (not freeze or ".1." in key))


def test_bias_only_reports_what_it_froze():
    constraint = BiasOnly()
    model, change = prepare(make("gpt2"), constraint)
    assert constraint.report()["frozen"] == sum(p.numel() for p in model.parameters()) - change.trainable()
