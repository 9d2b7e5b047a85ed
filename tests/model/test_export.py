"""Exports that transformers and peft load again, with the numbers that the policy had."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from architectures import BYTES, CONFIGS, ITEMS, NO_DATA, PROBE, SMALL, architectures, load, score, weights
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdpo.constraints.lora import LoRA
from cdpo.data.packing import pack
from cdpo.model import attention
from cdpo.model.export import export


def trained(policy):
    """Every trainable weight moved."""
    torch.manual_seed(5)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return policy.eval()


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def clean(folder):
    """No pickle, and no config that names an attention which only cdpo registers."""
    assert not [name for name in files(folder) if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    for path in folder.rglob("*.json"):
        assert attention.NAME not in path.read_text()


def same(found, policy, dtype="float64"):
    ordinary = {"attention_mask": torch.ones_like(PROBE)}
    with torch.no_grad(), attention.ordinary_attention(policy):
        expected = policy(PROBE, **ordinary).logits
        assert found.dtype == getattr(torch, dtype)
        assert torch.equal(found.eval()(PROBE, **ordinary).logits, expected)


@architectures
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_whole_model_reloads_through_transformers(folders, tmp_path, name, dtype):
    policy = trained(load(folders[name], dtype))
    export(policy, BYTES, tmp_path)
    clean(tmp_path)
    assert "model.safetensors" in files(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(again, policy, dtype)
    assert again.config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == BYTES.get_vocab()
    tied = CONFIGS[name].tie_word_embeddings
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    assert tied == (name in ("gpt2", "qwen3"))
    again = load(tmp_path, dtype)  # and starts another run
    torch.testing.assert_close(score(again, pack(ITEMS["even"])), score(policy, pack(ITEMS["even"])), rtol=0, atol=0)


@architectures
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_reloads_through_peft(folders, tmp_path, name, dora):
    policy = trained(LoRA(rank=2, dora=dora).wrap(load(folders[name])))
    export(policy, BYTES, tmp_path)
    clean(tmp_path)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files(tmp_path)
    assert not {"model.safetensors", "base/model.safetensors"} & files(tmp_path)  # the base has a folder of its own
    base = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64)
    before = base(PROBE).logits
    again = PeftModel.from_pretrained(base, tmp_path)
    same(again, policy)
    assert not torch.allclose(again(PROBE).logits, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_tiny_reloads_whole(tmp_path, dtype):
    policy = trained(dataclasses.replace(SMALL, dtype=dtype).load(BYTES, NO_DATA))
    export(policy, BYTES, tmp_path)
    clean(tmp_path)
    same(AutoModelForCausalLM.from_pretrained(tmp_path), policy, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_adapter_on_tiny_brings_its_base(tmp_path, dtype):
    start = dataclasses.replace(SMALL, dtype=dtype).load(BYTES, NO_DATA)
    expected = weights(start)
    attention.register()
    start.set_attn_implementation(attention.NAME)
    policy = trained(LoRA(rank=2).wrap(start))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as peft's, if it looks for the base where it is not yet
        export(policy, BYTES, tmp_path)
    clean(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(weights(base), expected)
    same(AutoPeftModelForCausalLM.from_pretrained(tmp_path), policy, dtype)
    same(PeftModel.from_pretrained(base, tmp_path), policy, dtype)
    assert hasattr(policy, "peft_config")  # exporting does not take the adapter off the policy
