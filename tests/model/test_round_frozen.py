"""Frozen matrices in bfloat16 under autocast: the same numbers, and left whole where they are wanted whole."""

from __future__ import annotations

import pytest
import torch
from architectures import ITEMS, architectures, lean, load
from torch import nn
from transformers.pytorch_utils import Conv1D

from cdpo.config.schema import Trainer
from cdpo.constraints.lora import LoRA
from cdpo.data.packing import pack
from cdpo.model.layers import switch

AUTOCAST = Trainer(autocast=True)


def adapted(folder, dtype="float32", **options):
    """A policy whose adapters have left zero."""
    torch.manual_seed(0)
    policy = LoRA(rank=2, **options).wrap(load(folder, dtype))
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return policy


def numbers(policy):
    """Log-probs and gradients of one batch, as a training step computes them."""
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logps = lean(policy)(pack(ITEMS["uneven"]))[0]
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in policy.parameters() if p.requires_grad)]


def frozen(policy):
    matrices = [m for m in policy.modules() if isinstance(m, (nn.Linear, Conv1D)) and not m.weight.requires_grad]
    assert matrices
    return [m.weight for m in matrices]


@architectures
def test_no_number_changes(folders, name):
    policy = adapted(folders[name])
    before = numbers(policy)
    switch(policy, AUTOCAST)
    embedding = policy.get_input_embeddings().weight
    assert embedding.dtype == torch.float32
    assert {weight.dtype for weight in frozen(policy) if weight is not embedding} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    for was, now in zip(before, numbers(policy), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0)


@pytest.mark.parametrize("kept", ["no autocast", "dora", "no adapters", "a base that nobody else has", "fsdp"])
def test_weights_stay_whole_where_they_are_wanted_whole(folders, kept):
    policy = (
        load(folders["llama"], "float32") if kept == "no adapters" else adapted(folders["llama"], dora=kept == "dora")
    )
    if kept == "no adapters":
        policy.model.layers[0].requires_grad_(False)
    if kept == "a base that nobody else has":
        policy.get_base_model().config.name_or_path = ""
    others = {"no autocast": Trainer(), "fsdp": Trainer(autocast=True, distributed="fsdp")}
    switch(policy, others.get(kept, AUTOCAST))
    assert {weight.dtype for weight in frozen(policy)} == {torch.float32}


def test_factors_with_dropout_see_what_they_saw(folders):
    """A share of 1/(1 - p) is another one in bfloat16."""
    policy = adapted(folders["llama"], dropout=0.5)
    torch.manual_seed(1)
    before = numbers(policy.train())
    switch(policy, AUTOCAST)
    torch.manual_seed(1)
    for was, now in zip(before, numbers(policy), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0)


def test_autocast_leaves_float64_alone_and_so_do_we(folders):
    policy = adapted(folders["llama"], "float64")
    switch(policy, AUTOCAST)
    assert {weight.dtype for weight in frozen(policy)} == {torch.float64}
