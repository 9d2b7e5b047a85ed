"""The pull to the start is the exact minimum of its penalty."""

from __future__ import annotations

import numpy as np
import pytest
from policies import NAMES, flat, large_steps, make, moved, prepare

from cdpo.constraints.l2_to_start import L2ToStart
from cdpo.constraints.lora import LoRA


@NAMES
@pytest.mark.parametrize("adapter", [[], [LoRA(rank=2)]], ids=["plain", "lora"])
def test_l2_to_start_minimises_its_penalty(name, adapter):
    """argmin_x ||x - v||^2 / 2 + lr * strength * ||x - theta_0||^2 / 2, for the step's outcome v."""
    pull, lr = L2ToStart(strength=0.6), 10.0
    free, _ = prepare(make(name), *adapter)
    held, _ = prepare(make(name), *adapter, pull)
    large_steps(free, steps=[0], lr=lr)
    large_steps(held, pull, steps=[0], lr=lr)
    v, x = flat(moved(free, name)), flat(moved(held, name))
    gradient = (x - v) + lr * 0.6 * x
    assert np.linalg.norm(gradient) < 1e-9 * np.linalg.norm(v)
    assert pull.report() == {"binds": 1, "norm": pytest.approx(np.linalg.norm(x))}
