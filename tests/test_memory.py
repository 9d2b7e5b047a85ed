"""Micro-batches sized to memory: what is worked out from shapes, against what the process really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from composing import composed
from transformers import AutoModelForCausalLM, LlamaConfig

from cdpo import engine, job, memory
from cdpo.checks import read
from cdpo.config import ENOUGH, Trainer
from cdpo.distributed import ALONE
from cdpo.errors import ConfigError
from cdpo.head import CHUNK

GROWN = """
import ctypes, json, sys
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from peft import LoraConfig, get_peft_model
from cdpo import attention
from cdpo.batch import Item
from cdpo.logps import score
from cdpo.memory import per_token
from cdpo.packing import pack

kind, extra = sys.argv[1:]
config = {
    "llama": LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=680, num_hidden_layers=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=256, n_layer=4, n_head=8),
}[kind]

def switched(model):
    if extra == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    if extra == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()

with torch.device("meta"):
    skeleton = AutoModelForCausalLM.from_config(config)
predicted = per_token(switched(skeleton))
attention.register()
model = switched(AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME))
items = [Item([1] * 64, [[2] * 33, [3] * 33], []) for _ in range(64)]


class Heap(ctypes.Structure):  # mallinfo2(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo.restype = Heap
now = lambda: mallinfo().uordblks + mallinfo().hblkhd
score(model, pack(items[:2]))  # what is made once
batch = pack(items)
before = now()
kept = score(model, batch)
print(json.dumps([predicted, (now() - before) / batch.tokens]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("extra", ["plain", "lora", "checkpointing"])
def test_bytes_per_token_are_what_a_forward_pass_takes(kind, extra):
    done = subprocess.run([sys.executable, "-c", GROWN, kind, extra], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted, taken = json.loads(done.stdout.splitlines()[-1])
    assert predicted == pytest.approx(taken, rel=0.25)


def small(**more):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4, **more
        ))  # fmt: skip


def test_tokens_that_fit():
    policy = small()
    numbers = sum(p.numel() for p in policy.parameters())
    each = memory.per_token(policy)

    def tokens(free, states=2, shards=1):
        lasting = 4 * numbers * (3 + states) / shards  # weight, gradient, states, copy of the start; float32
        return memory.tokens_that_fit(policy, states, int(lasting + 2 * CHUNK + free / memory.SHARE), shards)

    assert tokens(1e12) == ENOUGH
    assert tokens(1000 * each) == 512
    assert tokens(1025 * each) == 1024
    assert tokens(1025 * each, states=0) == 1024
    assert tokens(1025 * each, shards=2) == 1024
    assert tokens(0) == memory.LEAST


@pytest.mark.parametrize(("gib", "tokens"), [(80, ENOUGH), (0.25, memory.LEAST)])
def test_a_gpu_decides_and_a_number_stands(gib, tokens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))
    tree = composed("model=tiny", "model.hidden_size=256", "model.layers=8")
    spec = read(tree)
    data = spec.dataset.load(0)
    rest = (tree, spec.model.tokenizer(data), data)
    sized = job._sized(spec.trainer, *rest, torch.device("cuda"), ALONE)
    assert sized.budget == sized.tokens_per_micro_batch == tokens
    assert job._sized(spec.trainer, *rest, torch.device("cpu"), ALONE) == spec.trainer
    given = Trainer(tokens_per_micro_batch=777)
    assert job._sized(given, *rest, torch.device("cuda"), ALONE).budget == 777
    assert Trainer().budget == ENOUGH


def test_a_full_device_is_told_with_what_to_change(tmp_path, monkeypatch):
    def full(run, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(engine, "_add_up", full)
    with pytest.raises(ConfigError, match=r"(?s)4096 tokens.*tokens_per_micro_batch.*Tried to allocate 20.00 GiB\.$"):
        job.run(composed(), tmp_path / "run")
    assert "tokens_per_micro_batch" in json.loads((tmp_path / "run/status.json").read_text())["cause"]
