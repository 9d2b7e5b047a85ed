"""Small random policies for tests, and steps that are far too large."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cdpo.model.change import Change
from cdpo.model.tabular import TabularConfig, TabularForCausalLM

VOCABULARY = 24
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    **NO_SPECIAL,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1))


def qwen():
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True))


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE))


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **NO_SPECIAL))


def tabular():
    model = TabularForCausalLM(TabularConfig(contexts=VOCABULARY, symbols=8))
    nn.init.normal_(model.table.weight)
    return model


ALL = {"llama": llama, "qwen": qwen, "neox": neox, "gpt2": gpt2, "tabular": tabular}
NAMES = pytest.mark.parametrize("name", ALL)
IDS = torch.arange(20).view(2, 10) % VOCABULARY


@functools.cache
def _policy(name):
    torch.manual_seed(0)
    return ALL[name]().double().eval()


def make(name):
    """A float64 policy in eval mode, with the same weights each time."""
    return copy.deepcopy(_policy(name))


def prepare(model, *constraints):
    """The wrapped policy and its change, as training makes them."""
    torch.manual_seed(1)
    for constraint in constraints:
        model = constraint.wrap(model)
    change = Change(model)
    for constraint in constraints:
        constraint.begin(model, change)
    return model, change


@torch.no_grad()
def large_steps(model, *constraints, steps=range(4), lr=10.0, metrics=None):
    """SGD with random gradients, which depend on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for constraint in constraints:
            constraint.before_step(model, lr)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= lr * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for constraint in constraints:
            constraint.after_step(model, {"learning_rate": lr, "step": step, **(metrics or {})})


def weights(model):
    """Effective weights as numpy arrays, adapters merged in by peft, tied ones once."""
    model = copy.deepcopy(model)
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def moved(model, name):
    """Effective weights minus those of the untouched policy of that name."""
    start = weights(make(name))
    return {key: value - start[key] for key, value in weights(model).items()}


def flat(deltas):
    return np.concatenate([delta.ravel() for delta in deltas.values()])
