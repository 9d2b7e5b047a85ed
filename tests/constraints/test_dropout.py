"""Dropout in train mode only, in every place where a model can drop, at the rate that was asked for."""

from __future__ import annotations

import pytest
import torch
from policies import IDS, NAMES, large_steps, make, prepare

from cdpo.constraints.dropout import Dropout
from cdpo.constraints.lora import LoRA


@NAMES
def test_dropout_acts_in_train_mode_only(name):
    reference = make(name)(IDS).logits
    model, _ = prepare(make(name), Dropout(p=0.5))
    torch.testing.assert_close(model.eval()(IDS).logits, reference, rtol=0, atol=0)
    model.train()
    assert (model(IDS).logits - model(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(IDS).logits, reference, rtol=0, atol=0)


def test_dropout_drops_a_share_p_and_keeps_the_mean():
    model, _ = prepare(make("tabular"), Dropout(p=0.25))
    ids = torch.arange(24).repeat(200, 1)
    logits, reference = model.train()(ids).logits, make("tabular")(ids).logits
    dropped = logits == 0
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(logits[~dropped], reference[~dropped] / 0.75)


def test_dropout_reaches_modules_and_functional_attention():
    for name, places in {"gpt2": 1 + 3 * 2, "neox": 1 + 3 * 2, "llama": 1 + 2, "qwen": 1 + 2, "tabular": 1}.items():
        constraint = Dropout(p=0.3)
        model, _ = prepare(make(name), constraint)
        assert constraint.report() == {"binds": 1, "places": places}
        assert all(module.p == 0.3 for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("name", ["llama", "gpt2", "tabular"])
def test_dropout_and_lora_in_either_order(name):
    outputs = []
    for reverse in (False, True):
        constraints = [LoRA(rank=2, dropout=0.5), Dropout(p=0.3)][:: -1 if reverse else 1]
        model, _ = prepare(make(name), *constraints)
        large_steps(model, lr=0.1)
        torch.manual_seed(5)
        outputs.append(model.train()(IDS).logits)
        adapters = [
            m.p for key, m in model.named_modules() if ".lora_dropout." in key and isinstance(m, torch.nn.Dropout)
        ]
        assert set(adapters) == {0.5}
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
