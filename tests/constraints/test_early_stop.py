"""Early stopping by steps, by a metric with patience, and by the KL to the reference: by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from candidates import logps

from cdpo.constraints.early_stop import EarlyStop
from cdpo.errors import ConfigError


def test_early_stop_at_a_step():
    stop = EarlyStop(step=3)
    reasons = [stop.stop_reason({"step": step}) for step in (1, 2, 3, 4)]
    assert reasons[:2] == [None, None]
    assert reasons[2] == "step 3 reached the limit of 3 steps"
    assert reasons[3] is not None
    assert stop.report() == {"binds": 1}


@pytest.mark.parametrize(
    ("options", "values", "stops", "best"),
    [
        ({}, [3, 2, 1, 1.5, 1.2, 1], True, 1),
        ({"patience": 1}, [3, 2, 2.5], True, 2),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.8, 2.6], True, 3),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.8, 2.4, 2.2], False, 2.4),
        ({"patience": 2, "mode": "max"}, [0.5, 0.7, 0.6, 0.8, 0.8, 0.7], True, 0.8),
        ({"patience": 2}, [1, math.nan, math.nan], True, 1),
        ({"patience": 2}, [5, 4, 3, 2, 1], False, 1),
    ],
)
def test_early_stop_with_patience(options, values, stops, best):
    stop = EarlyStop(metric="eval/loss", **options)
    reasons = []
    for value in values:
        assert stop.stop_reason({"step": 1, "loss": 0.0}) is None  # a step without an evaluation does not count
        reasons.append(stop.stop_reason({"step": 1, "eval/loss": value, "eval/other": 0.0}))
    assert reasons[:-1] == [None] * (len(values) - 1)
    assert (reasons[-1] or "").startswith("eval/loss has not improved") == stops
    report = stop.report()
    assert (report["binds"], report["best"]) == (stops, best)


def test_early_stop_metric_that_is_not_evaluated():
    with pytest.raises(ConfigError, match=r"eval/loss.*choose one of eval/accuracy"):
        EarlyStop(metric="eval/loss").stop_reason({"step": 1, "eval/accuracy": 1.0})


def test_early_stop_by_kl():
    stop = EarlyStop(kl=0.5)
    lp = logps(torch.tensor([0.0, -2.0]), torch.zeros(2), [0, 0])
    for scale, expected in ((0.5, False), (10.0, True)):
        pulled = logps(lp.policy * scale, lp.reference, [0, 0])
        metrics = {name: float(v.mean()) for name, v in stop.measure(pulled).items()}
        stop.after_step(None, metrics)
        p = np.exp(-2 * scale) / (1 + np.exp(-2 * scale))
        kl = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
        assert stop.report()["boundary_distance"] == pytest.approx(0.5 - kl, rel=1e-5)
        reason = stop.stop_reason({"step": 1})
        assert (reason is not None) == expected
    assert reason == "the KL to the reference, 0.6931 nats per Item, passed its limit of 0.5"


def test_measuring_costs_nothing_without_a_limit():
    assert EarlyStop(step=1).measure(logps(torch.zeros(2), torch.zeros(2), [0, 0])) == {}
