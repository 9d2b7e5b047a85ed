"""Micro-batches sized to memory: by passes whose bytes a GPU tells, for which one stands here that is none."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from composing import composed, train
from transformers import LlamaConfig, LlamaForCausalLM

from cdpo.batch import Item
from cdpo.config.identity import digest
from cdpo.config.schema import MICRO_BATCH, Trainer
from cdpo.data.packing import Scored
from cdpo.errors import DeviceFull, rank_0_says
from cdpo.model import attention, memory
from cdpo.model.logps import Scorer
from cdpo.model.reference import ReferencePass
from cdpo.system.ranks import Ranks
from cdpo.training import job, loop, prepare
from cdpo.training.checks import checked
from cdpo.training.directory import RunDirectory

MB = 1_000_000


def test_micro_batches_are_doubled_while_they_take_their_share():
    tried = []

    def of(free, each=1.0, constant=0.0, start=1024):
        tried.clear()
        return memory.tokens_that_fit(lambda tokens: tried.append(tokens) or constant + each * tokens, free, start)[0]

    assert memory.SHARE == 0.7
    assert of(1e6) == memory.MOST == 32_768
    assert tried == [1024, 2048, 4096, 8192, 16_384, 32_768]
    assert of(4096 / 0.7) == 4096  # 0.7 of 5,851; 8,192 are not tried, as so many are not free
    assert tried == [1024, 2048, 4096]
    assert of(4095 / 0.7) == 2048
    assert tried == [1024, 2048, 4096]
    assert of(11_000, constant=4000) == 2048  # 6,048 of 7,700; 4,096 would take 8,096, and are not tried
    assert tried == [1024, 2048]
    assert of(13_000, constant=4000) == 4096  # 8,096 of 9,100
    assert of(2047) == 1024
    assert of(-1.0) == 1024  # there is no less
    assert of(1e6, each=math.inf) == 1024
    assert of(1e6, start=memory.MOST) == memory.MOST
    assert tried == [memory.MOST]


class Gpu:
    """What torch would say of a GPU whose passes take `each` bytes per token; and the tokens of these passes.

    Of `free` bytes torch holds 1 MB unused. A pass that takes more fails, as one of more than `at_most` tokens does.
    """

    def __init__(self, monkeypatch):
        self.free, self.each, self.at_most = 100 * MB, 1000, math.inf
        self.passes, self.peak, forward = [], 0, Scorer.forward
        says = {
            "memory_allocated": lambda _: 7 * MB,
            "max_memory_allocated": lambda _: 7 * MB + self.peak,
            "memory_reserved": lambda _: 8 * MB,
            "mem_get_info": lambda _: (self.free - MB, 10**12),
            "reset_peak_memory_stats": lambda _: setattr(self, "peak", 0),
        }
        for name, answer in says.items():
            monkeypatch.setattr(torch.cuda, name, answer)

        def passing(scorer, batch, statistics=False):
            assert scorer.training
            assert statistics
            self.autocast = torch.is_autocast_enabled("cpu")
            self.passes.append(batch.tokens)
            self.peak = self.each * batch.tokens
            if self.peak > self.free or batch.tokens > self.at_most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(scorer, batch, statistics)

        monkeypatch.setattr(Scorer, "forward", passing)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 2}


def scorer():
    """Of a model with dropout, in eval mode, as the reference pass leaves it."""
    attention.register()
    model = LlamaForCausalLM(LlamaConfig(**SMALL, attention_dropout=0.5))
    model.set_attn_implementation(attention.NAME)
    return Scorer(model).eval()


def items(tokens=64, count=64):
    """Items of so many tokens, and a short one."""
    long = Item([1] * (tokens - 2), [[2, 2], [3, 3]], [])
    return Scored([Item([1], [[2], [3, 4]], []), *[long] * count], padded=False, device=torch.device("cpu"))


def numbers(model):
    return sum(p.numel() for p in model.parameters())


def test_real_passes_of_the_longest_items_leave_no_trace(gpu):
    policy, before = scorer(), torch.get_rng_state()
    told = []
    policy.model.lm_head.weight.register_hook(lambda gradient: told.append(float(gradient.abs().sum())))
    gpu.free = 3_000_000 + 4 * 3 * numbers(policy)  # what is to come: two numbers for each, and the start, in 4 bytes
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert memory.Probe(policy, items(), autocast).tokens(states=2) == 2048  # of 3 MB, where 0.7 are 2.1
    assert gpu.autocast
    assert gpu.passes == [256, 256, 512, 1024, 2048]  # the first makes what lasts
    assert len(told) == 5
    assert all(told)
    assert all(p.grad is None for p in policy.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert not policy.training


def test_what_is_to_come_counts(gpu):
    policy, enough = scorer(), 2048 * gpu.each / memory.SHARE + 10
    gpu.free = enough + 4 * 3 * numbers(policy)
    assert memory.Probe(policy, items()).tokens(states=2) == 2048
    gpu.free -= 20
    assert memory.Probe(policy, items()).tokens(states=2) == 1024
    policy.requires_grad_(False).model.model.embed_tokens.requires_grad_()
    gpu.free = enough + 4 * 64 * 16  # where what is trained started
    assert memory.Probe(policy, items()).tokens(states=0) == 2048
    gpu.free -= 20
    assert memory.Probe(policy, items()).tokens(states=0) == 1024


def test_what_whole_items_leave_of_a_micro_batch_counts(gpu):
    gpu.free = gpu.each * 1024 / memory.SHARE + 4 * numbers(policy := scorer())
    assert memory.Probe(policy, items(64)).tokens(states=0) == 1024
    assert memory.Probe(policy, items(60)).tokens(states=0) == 1024
    assert gpu.passes[-1] == 17 * 60  # and what it took is told of 1,024
    gpu.free -= 3 * gpu.each
    assert memory.Probe(policy, items(60)).tokens(states=0) == 512


def test_a_longest_item_is_where_growth_begins(gpu):
    assert memory.Probe(scorer(), items(400, 4)).tokens(states=0) == memory.MOST
    assert gpu.passes[:3] == [400, 400, 400]
    gpu.passes.clear()
    gpu.free = 0
    assert memory.Probe(scorer(), items(512, 4)).tokens(states=0) == 512
    assert gpu.passes == [512, 512]


def test_no_memory_is_no_end(gpu, caplog):
    gpu.at_most = 1000
    assert memory.Probe(scorer(), items()).tokens(states=0) == 512
    assert gpu.passes == [256, 256, 512, 1024]
    assert "no room for 1024 tokens" in caplog.text
    assert "too small" not in caplog.text
    gpu.at_most = 100
    assert memory.Probe(policy := scorer(), items()).tokens(states=0) == memory.LEAST
    assert "too small" in caplog.text
    assert all(p.grad is None for p in policy.parameters())


def test_the_log_says_what_was_measured(gpu, caplog):
    caplog.set_level("INFO")
    gpu.free = 2**30 + 4 * numbers(policy := scorer())
    memory.Probe(policy, items(64, 600)).tokens(states=0)
    assert "32768 tokens take 0.0305 GiB, 1 kB a token, where 1 GiB are free" in caplog.text


@pytest.mark.parametrize("times", [0.5, 2])
def test_ranks_choose_alike(times, gpu):
    gpu.free = 60 * MB + 4 * numbers(policy := scorer())
    assert memory.Probe(policy, items(64, 600)).tokens(states=0) == memory.MOST
    two = SimpleNamespace(sharded=False, all_gather=lambda value: [value, times * value])  # less is free, or more taken
    assert memory.Probe(policy, items(64, 600), ranks=two).tokens(states=0) == 16_384


def test_a_sharded_rank_without_memory_ends(gpu):
    gpu.at_most = 1000
    with pytest.raises(DeviceFull, match="1024 tokens"):
        memory.Probe(scorer(), items(), ranks=Ranks(strategy="fsdp")).tokens(states=0)


def sized(folder, trainer=None, device="cuda"):
    spec = SimpleNamespace(trainer=trainer or Trainer(batch_size=None), states=0, draw=0)
    directory = RunDirectory(folder)
    session = SimpleNamespace(
        spec=spec, ranks=Ranks(), device=torch.device(device), directory=directory, autocast=nullcontext
    )
    return prepare.sized(session, scorer(), items()).tokens_per_micro_batch


def test_a_gpu_decides_where_no_number_is_set_and_once(tmp_path, gpu):
    assert sized(tmp_path, device="cpu") is None
    assert not list(tmp_path.iterdir())
    assert sized(tmp_path, Trainer(tokens_per_micro_batch=777)) == 777
    assert sized(tmp_path) == 777  # a resume, as the file is there
    assert not gpu.passes
    (tmp_path / "micro_batch.json").unlink()
    gpu.at_most = 3000
    assert sized(tmp_path) == 2048
    gpu.passes.clear()
    gpu.at_most = 0
    assert sized(tmp_path) == 2048
    assert sized(tmp_path, Trainer(tokens_per_micro_batch=4096)) == 2048  # the same run by its digest
    assert not gpu.passes
    (tmp_path / "micro_batch.json").unlink()
    assert sized(tmp_path) == memory.LEAST
    (tmp_path / "micro_batch.json").unlink()
    gpu.at_most = math.inf
    assert sized(tmp_path, Trainer(batch_size=4)) == 256  # a step of four Items has no more
    (tmp_path / "micro_batch.json").unlink()
    assert sized(tmp_path, Trainer(batch_size=5)) == 512  # 320 tokens
    assert max(gpu.passes) == 512
    assert (Trainer().micro_batch, Trainer(tokens_per_micro_batch=777).micro_batch) == (MICRO_BATCH, 777)


def test_an_outline_has_no_weights(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "model")
    outline = memory.outline(checked(composed("model=hf", f"model.name_or_path={tmp_path}/model")), None, None)
    assert all(p.is_meta for p in outline.parameters())


def test_a_run_trains_with_the_number_and_asks_the_reference_with_the_configs(tmp_path, monkeypatch):
    sixty_four = replace(Trainer(), tokens_per_micro_batch=64)
    seen, fill = {}, ReferencePass.fill

    def sized(session, scorer, scored):
        seen["switched"] = scorer.model.is_gradient_checkpointing
        return sixty_four

    def fit(run):
        seen["fit"] = run.plan.micro_batch
        raise KeyboardInterrupt

    def filling(self, *rest):
        seen["reference"] = self.micro_batch
        return fill(self, *rest)

    monkeypatch.setattr(prepare, "sized", sized)
    monkeypatch.setattr(job, "fit", fit)
    monkeypatch.setattr(ReferencePass, "fill", filling)
    with pytest.raises(KeyboardInterrupt):
        train(composed("trainer.gradient_checkpointing=true"), tmp_path / "run")
    assert seen == {"switched": True, "fit": 64, "reference": MICRO_BATCH}


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
