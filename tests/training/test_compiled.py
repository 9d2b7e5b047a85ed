"""trainer.compile=null: where compiling pays for itself, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cdpo.config.schema import Trainer
from cdpo.training.prepare import COMPILED_FROM, compiled

LAYERS = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]))


def chosen(trainer: Trainer, device="cuda", padded=False, model: nn.Module = LAYERS) -> bool:
    session = SimpleNamespace(spec=SimpleNamespace(trainer=trainer), device=torch.device(device))
    return compiled(session, SimpleNamespace(model=model), SimpleNamespace(padded=padded, items=[None] * 16))


def test_long_runs_of_packed_trees_on_a_gpu_are_compiled():
    assert chosen(Trainer(max_steps=COMPILED_FROM))
    assert chosen(Trainer(epochs=COMPILED_FROM))
    assert not chosen(Trainer(max_steps=COMPILED_FROM - 1))


@pytest.mark.parametrize("other", [{"device": "cpu"}, {"padded": True}, {"model": nn.Linear(1, 1)}])
def test_others_are_not(other):
    assert not chosen(Trainer(max_steps=10 * COMPILED_FROM), **other)


def test_what_is_asked_for_is_done():
    assert chosen(Trainer(compile=True), device="cpu")
    assert not chosen(Trainer(compile=False, max_steps=10 * COMPILED_FROM))
    assert not chosen(Trainer(distributed="fsdp", max_steps=10 * COMPILED_FROM))
