"""What every constraint promises: at step 0 the policy is the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from policies import IDS, NAMES, make, prepare

from cdpo.constraints.bias_only import BiasOnly
from cdpo.constraints.dropout import Dropout
from cdpo.constraints.freeze import Freeze
from cdpo.constraints.l2_ball import L2Ball
from cdpo.constraints.l2_to_start import L2ToStart
from cdpo.constraints.linf_ball import LinfBall
from cdpo.constraints.lora import LoRA
from cdpo.constraints.sparse_topk import SparseTopK
from cdpo.constraints.weight_decay import WeightDecay
from cdpo.errors import ConfigError


@NAMES
@pytest.mark.parametrize(
    "constraint",
    [
        *(LoRA(rank=2), LoRA(rank=2, dora=True), LoRA(rank=2, alpha=1, rslora=True), WeightDecay(strength=0.1)),
        *(L2ToStart(strength=1.0), L2Ball(radius=1.0), LinfBall(radius=0.01), SparseTopK(k=3), Dropout(p=0.5)),
        Freeze(patterns=["0|1"]),
        BiasOnly(),
    ],
    ids=lambda constraint: type(constraint).__name__ + ("_dora" if getattr(constraint, "dora", False) else ""),
)
def test_at_step_0_the_policy_is_the_reference(name, constraint):
    constraint = copy.deepcopy(constraint)
    try:
        model, _ = prepare(make(name), constraint)
    except ConfigError:
        assert isinstance(constraint, (Freeze, BiasOnly))
        assert name in ("llama", "qwen", "tabular")
        return
    torch.testing.assert_close(model.eval()(IDS).logits, make(name)(IDS).logits, rtol=1e-13, atol=1e-14)
