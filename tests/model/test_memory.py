"""Micro-batches sized to memory: what is worked out from shapes, against what the process really takes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import forking
import pytest
import torch
from composing import composed, train
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig

from cdpo.config.identity import digest
from cdpo.config.schema import MICRO_BATCH, Trainer
from cdpo.errors import ConfigError, DeviceFull, rank_0_says
from cdpo.model import memory
from cdpo.model.head import CHUNK
from cdpo.model.reference import ReferencePass
from cdpo.system.ranks import Ranks
from cdpo.training import job, loop, prepare
from cdpo.training.checks import checked
from cdpo.training.directory import RunDirectory

GROWN = """
import ctypes, json, sys
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from peft import LoraConfig, get_peft_model
from cdpo.model import attention
from cdpo.batch import Item
from cdpo.model.head import LogitTransform
from cdpo.model.logps import Scorer
from cdpo.model.memory import bytes_per_token
from cdpo.data.packing import pack

kind, extra = sys.argv[1:]
config = {
    "llama": LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=680, num_hidden_layers=4),
    "gpt2": GPT2Config(vocab_size=64, n_embd=256, n_layer=4, n_head=8),
}[kind]


class Heap(ctypes.Structure):  # mallinfo2(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo.restype = Heap


def switched(model, extra):
    if extra == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    if extra == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def taken(extra):
    model = switched(AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME), extra)
    scorer = Scorer(model, LogitTransform())
    scorer(pack(items[:2]))  # what is made once
    batch = pack(items)
    before = mallinfo()
    kept = scorer(batch)[0]
    after = mallinfo()
    return (after.uordblks + after.hblkhd - before.uordblks - before.hblkhd) / batch.tokens


with torch.device("meta"):
    skeleton = AutoModelForCausalLM.from_config(config)
predicted = bytes_per_token(switched(skeleton, extra))
attention.register()
items = [Item([1] * 64, [[2] * 33, [3] * 33], []) for _ in range(64)]
found = taken(extra) + (taken("plain") / 4 if extra == "checkpointing" else 0)  # one layer is computed again
print(json.dumps([predicted, found]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("extra", ["plain", "lora", "checkpointing"])
def test_bytes_per_token_are_what_a_pass_takes(kind, extra):
    done = forking.run("-c", GROWN, kind, extra)
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
    each = memory.bytes_per_token(policy)

    def tokens(free, states=2, shards=1):
        persistent_bytes = 4 * numbers * (3 + states) / shards  # weight, gradient, states, copy of the start; float32
        return memory.tokens_that_fit(policy, states, int(persistent_bytes + 2 * CHUNK + free / memory.SHARE), shards)

    assert tokens(1e12) == MICRO_BATCH
    assert tokens(1000 * each) == 512
    assert tokens(1025 * each) == 1024
    assert tokens(1025 * each, states=0) == 1024
    assert tokens(1025 * each, shards=2) == 1024
    assert tokens(0) == memory.LEAST


def llama(path, **more):
    LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **more)).save_pretrained(path)


class Two:
    """Ranks of which the other has found 512."""

    size, sharded = 2, False

    def all_gather(self, value):
        return [value, 512]

    def from_first(self, work):
        return work()


def gpu(monkeypatch, gib):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))


def sized(folder, trainer=None, ranks=None, device="cuda", skeleton=small):
    model, adamw = SimpleNamespace(skeleton=lambda *_: skeleton(), load=None), SimpleNamespace(states=2)
    spec = SimpleNamespace(trainer=trainer or Trainer(), model=model, optimizer=adamw, constraint={})
    session = SimpleNamespace(
        spec=spec, ranks=ranks or Ranks(), device=torch.device(device), directory=RunDirectory(folder)
    )
    return prepare.sized(session, None, None).tokens_per_micro_batch


def test_a_gpu_decides_where_no_number_is_set(tmp_path, monkeypatch):
    gpu(monkeypatch, 80)
    assert sized(tmp_path, device="cpu") is None
    assert sized(tmp_path, Trainer(tokens_per_micro_batch=777)) == 777
    assert not list(tmp_path.iterdir())
    assert sized(tmp_path) == MICRO_BATCH
    gpu(monkeypatch, 0.125)  # less than the logits' slices take
    assert sized(tmp_path) == MICRO_BATCH  # a resume, as the file is there
    (tmp_path / "micro_batch.json").unlink()
    assert sized(tmp_path) == memory.LEAST
    (tmp_path / "micro_batch.json").unlink()
    gpu(monkeypatch, 80)
    assert sized(tmp_path, ranks=Two()) == 512
    assert (Trainer().micro_batch, Trainer(tokens_per_micro_batch=777).micro_batch) == (MICRO_BATCH, 777)


def test_a_model_that_cannot_be_asked_is_trained_all_the_same(tmp_path, monkeypatch, caplog):
    gpu(monkeypatch, 80)
    with torch.device("meta"):
        opt = AutoModelForCausalLM.from_config(
            OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
        )
    assert sized(tmp_path, skeleton=lambda: opt) == MICRO_BATCH
    assert "does not say what a token takes" in caplog.text

    def refused():
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        sized(tmp_path / "other", skeleton=refused)


def test_copies_for_autocast_count():
    policy = small()
    numbers = sum(p.numel() for p in policy.parameters())
    room = int(4 * numbers * 5 + 2 * CHUNK + 1000 * memory.bytes_per_token(policy) / memory.SHARE)
    assert memory.tokens_that_fit(policy, 2, room) == 512
    assert memory.tokens_that_fit(policy, 2, room + 2 * numbers, autocast=True) == 512
    assert memory.tokens_that_fit(policy, 2, room + 2 * numbers) == 512


def test_an_outline_is_checkpointed_as_the_run_is(tmp_path):
    llama(tmp_path / "model", hidden_size=32, intermediate_size=88, num_hidden_layers=4)
    tree = composed("model=hf", f"model.name_or_path={tmp_path}/model", "trainer.gradient_checkpointing=true")
    outline = memory.outline(checked(tree), None, None)
    assert outline.is_gradient_checkpointing
    assert all(p.is_meta for p in outline.parameters())


def test_a_run_trains_with_the_number_and_asks_the_reference_with_the_configs(tmp_path, monkeypatch):
    sixty_four = replace(Trainer(), tokens_per_micro_batch=64)
    monkeypatch.setattr(prepare, "sized", lambda *_: sixty_four)
    seen, fill = {}, ReferencePass.fill

    def fit(run):
        seen["fit"] = run.plan.micro_batch
        raise KeyboardInterrupt

    def filling(self, *rest):
        seen["reference"] = self.micro_batch
        return fill(self, *rest)

    monkeypatch.setattr(job, "fit", fit)
    monkeypatch.setattr(ReferencePass, "fill", filling)
    with pytest.raises(KeyboardInterrupt):
        train(composed(), tmp_path / "run")
    assert seen == {"fit": 64, "reference": MICRO_BATCH}


def test_null_is_the_run_that_4096_was():
    assert digest(composed()) == digest(composed("trainer.tokens_per_micro_batch=4096"))
    assert digest(composed()) != digest(composed("trainer.tokens_per_micro_batch=2048"))


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 20.00 GiB.\nmore", ""])
def test_a_full_device_is_told_with_what_to_change(text, tmp_path, monkeypatch):
    def full(run, *rest):
        raise torch.OutOfMemoryError(text)

    monkeypatch.setattr(loop, "accumulate", full)
    with pytest.raises(DeviceFull, match=r"4096 tokens.*tokens_per_micro_batch") as told:
        train(composed(), tmp_path / "run")
    assert str(told.value).endswith(text.partition("\n")[0])
    assert not rank_0_says(told.value)  # a rank may be the only one whose device is full
    assert "tokens_per_micro_batch" in json.loads((tmp_path / "run/status.json").read_text())["cause"]
