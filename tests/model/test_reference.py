"""Reference log-probs against the plain forward; their cache; and the check that training starts at the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import CONFIGS, ITEMS, NO_DATA, architectures, build, lean, load, make_items, plain

from cdpo.batch import Item
from cdpo.constraints.dropout import Dropout
from cdpo.constraints.lora import LoRA
from cdpo.data.packing import Scored
from cdpo.errors import ConfigError, NumericsError
from cdpo.model.change import Change
from cdpo.model.layout import choose_layout
from cdpo.model.logps import Scorer
from cdpo.model.reference import ReferencePass, check_start
from cdpo.model.tiny import Tiny

CPU = torch.device("cpu")
ALL = [*ITEMS["uneven"], *ITEMS["even"], *ITEMS["one token"]]


def scored(items=ALL, padded=False):
    return Scored(list(items), padded, CPU)


def flat(found):
    return torch.cat(found.reference)


def unusable(*_):
    raise AssertionError("the reference was computed although the cache holds it")


@pytest.fixture(scope="module")
def llama(folders):
    return lean(load(folders["llama"], "float32"))


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_the_reference_is_the_plain_forward_whatever_the_budget(folders, llama, tmp_path, budget):
    found, done = scored(), []
    ReferencePass(budget, tmp_path / "r.safetensors", tell=done.append).fill(llama, found)
    assert [len(r) for r in found.reference] == [len(item.responses) for item in ALL]
    assert done == sorted(done)
    assert done[-1] == len(ALL)
    with torch.no_grad():
        expected = plain(load(folders["llama"], "float32", packed=False), ALL)
    torch.testing.assert_close(flat(found), expected, rtol=2e-5, atol=2e-5)
    for indices, batch in found.batches(budget):  # what training sees beside its own log-probs
        assert batch.reference.tolist() == [x for i in indices for x in found.reference[i].tolist()]
    with torch.no_grad():
        batch = found.batch(tuple(range(len(ALL))))
        everything = batch.logps(llama(batch)[0])
    assert everything.log_ratio().abs().max() < 1e-4


def test_training_mode_does_not_reach_the_reference(llama, tmp_path):
    """A policy left in training mode, with dropout: the reference is that of eval mode."""
    expected, found = scored(), scored()
    ReferencePass(100, tmp_path / "a").fill(llama, expected)
    model = copy.deepcopy(llama)
    Dropout(p=0.5).begin(model.model, Change(model.model))
    ReferencePass(100, tmp_path / "b").fill(model.train(), found)
    assert torch.equal(flat(found), flat(expected))


def test_a_cache_is_read_back_bit_for_bit(llama, tmp_path, monkeypatch):
    first, second = scored(), scored()
    ReferencePass(100, tmp_path / "r.safetensors").fill(llama, first)
    monkeypatch.setattr(Scorer, "forward", unusable)
    ReferencePass(100, tmp_path / "r.safetensors").fill(llama, second)
    assert torch.equal(flat(first), flat(second))
    assert flat(second).dtype == torch.float64


def damage(data, kind):
    middle = len(data) - 20
    return {
        "empty": b"",
        "cut": data[:-7],
        "header": b"\xff" * 20 + data[20:],
        "text": b"not a cache",
        "one bit": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "cut", "header", "text", "one bit"])
def test_a_damaged_cache_is_computed_anew(llama, tmp_path, caplog, monkeypatch, kind):
    path = tmp_path / "r.safetensors"
    first, second, third = scored(), scored(), scored()
    ReferencePass(100, path).fill(llama, first)
    path.write_bytes(damage(path.read_bytes(), kind))
    ReferencePass(100, path).fill(llama, second)
    assert torch.equal(flat(first), flat(second))
    assert "damaged" in caplog.text
    monkeypatch.setattr(Scorer, "forward", unusable)
    ReferencePass(100, path).fill(llama, third)  # and it is sound again
    assert torch.equal(flat(first), flat(third))


def other_items(kind):
    item = ALL[0]
    return {
        "token": [Item([*item.prompt[:-1], 9], item.responses, item.pairs), *ALL[1:]],
        "response": [Item(item.prompt, [item.responses[0], [*item.responses[1], 9]], item.pairs), *ALL[1:]],
        "order": [*ALL[1:], ALL[0]],
        "fewer": ALL[:-1],
    }[kind]


@pytest.mark.parametrize("kind", ["token", "response", "order", "fewer"])
def test_a_cache_of_other_items_is_computed_anew(llama, tmp_path, kind):
    path, fresh, found = tmp_path / "r.safetensors", scored(other_items(kind)), scored(other_items(kind))
    ReferencePass(100, path).fill(llama, scored())
    ReferencePass(100, path).fill(llama, found)
    ReferencePass(100, tmp_path / "fresh").fill(llama, fresh)
    assert torch.equal(flat(found), flat(fresh))


def test_a_cache_of_another_dtype_or_layout_is_computed_anew(folders, llama, tmp_path):
    path = tmp_path / "r.safetensors"
    kept, double, rows = scored(), scored(), scored(padded=True)
    ReferencePass(100, path).fill(llama, kept)
    ReferencePass(100, path).fill(lean(load(folders["llama"], "float64")), double)
    assert not torch.equal(flat(kept), flat(double))
    plain_model = load(folders["llama"], "float64", packed=False)
    calls = []
    ReferencePass(100, path, tell=calls.append).fill(lean(plain_model), rows)
    assert calls  # a cache hit has no batches


def test_an_interrupted_pass_leaves_no_cache(llama, tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ReferencePass(20, tmp_path / "r.safetensors", tell=stop).fill(llama, scored())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_name_their_rows(folders, tmp_path, bad):
    """One token's embedding is broken, so only the Items that hold it are named."""
    model = load(folders["llama"], "float32")
    items = make_items((3, [2, 3]), (4, [3, 2]), (2, [2, 2]))
    used = {token for item in items for part in (item.prompt, *item.responses) for token in part}
    odd = min({*range(2, 258)} - used)
    items[1].prompt[0] = odd
    model.model.embed_tokens.weight.data[odd] = bad
    with pytest.raises(NumericsError, match=r"to data\.jsonl:2$"):
        ReferencePass(10_000, tmp_path / "r.safetensors").fill(lean(model), scored(items))
    assert not list(tmp_path.iterdir())


def started(model, tmp_path, items=ALL):
    found = scored(items)
    ReferencePass(30, tmp_path / "r.safetensors").fill(model if isinstance(model, Scorer) else lean(model), found)
    return found


CONSTRAINTS = {
    "none": [],
    "lora": [LoRA(rank=2)],
    "lora with dropout": [LoRA(rank=2, dropout=0.5)],
    "dora": [LoRA(rank=2, dora=True)],
    "dropout": [Dropout(p=0.5)],
    "dropout on lora": [LoRA(rank=1), Dropout(p=0.3)],
}


@architectures
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_policies_start_at_their_reference(folders, tmp_path, name, dtype, kind):
    policy = load(folders[name], dtype)
    found = started(policy, tmp_path)
    for constraint in copy.deepcopy(CONSTRAINTS[kind]):
        policy = constraint.wrap(policy)
        constraint.begin(policy, Change(policy))
    assert check_start(lean(policy).train(), found) < {"float64": 1e-6, "float32": 1e-3, "bfloat16": 3}[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_another_base_model_is_found_out(folders, tmp_path, dtype):
    """In bfloat16 too, where roundings are large."""
    found = started(load(folders["llama"], dtype), tmp_path)
    other = build(CONFIGS["llama"], getattr(torch, dtype), seed=1)
    other.set_attn_implementation("cdpo_trees")
    with pytest.raises(ConfigError, match=r"at step 0 .* data\.jsonl:\d+ scores -.* instead of -.* was the base model"):
        check_start(lean(other), found)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_changes_are_found_out(folders, tmp_path, dtype):
    """Every weight moved by 0.1 % is no rounding."""
    policy = load(folders["qwen3"], dtype)
    found = started(policy, tmp_path)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter *= 1.001
    with pytest.raises(ConfigError, match="at step 0"):
        check_start(lean(policy), found)


def test_an_adapter_that_does_not_start_at_zero_is_found_out(folders, tmp_path):
    policy = load(folders["llama"], "float32")
    found = started(policy, tmp_path)
    policy = LoRA(rank=2).wrap(policy)
    check_start(lean(policy), found)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with pytest.raises(ConfigError, match="at step 0"):
        check_start(lean(policy), found)


def test_a_policy_of_nan_does_not_start(folders, tmp_path):
    policy = load(folders["llama"], "float32")
    found = started(policy, tmp_path)
    policy.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="scores nan"):
        check_start(lean(policy), found)


@pytest.mark.parametrize(
    ("dtype", "autocast", "rounding"),
    [("float64", False, 1e-7), ("float32", False, 3e-5), ("bfloat16", False, 0.1), ("float32", True, 0.1)],
)
def test_roundings_pass_and_more_does_not(folders, tmp_path, monkeypatch, dtype, autocast, rounding):
    """Nats per token by which two kernels may differ, added here; thirty times as much is another policy.

    Float64 keeps 1e-7 because norms compute in float32 whatever the dtype is.
    """
    policy = load(folders["llama"], dtype)
    off, forward = 0.0, Scorer.forward

    def moved(scorer, batch):
        return forward(scorer, batch)[0] + off * batch.length.sqrt() * (-1.0) ** batch.length, None

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = started(policy, tmp_path)
        monkeypatch.setattr(Scorer, "forward", moved)
        off = rounding
        assert rounding < check_start(lean(policy), found) < 10 * rounding
        off = 30 * rounding
        with pytest.raises(ConfigError, match="at step 0"):
            check_start(lean(policy), found)


@pytest.mark.parametrize("seed", range(2))
def test_autocast_rounds_more(tmp_path, seed):
    """Weights in float32, products in bfloat16, other micro-batches than the reference's: no false alarm."""
    policy = Tiny(hidden_size=32, init_seed=seed, heads=2).load(Tiny().tokenizer(NO_DATA), NO_DATA)
    items = make_items(*((40 + i, [30, 17 + i]) for i in range(6)), seed=seed)
    assert choose_layout(lean(policy), items, "trees") == (False, "")
    with torch.autocast("cpu", torch.bfloat16):
        found = started(policy, tmp_path, items)
        assert check_start(lean(policy), found) < 1
        other = Tiny(hidden_size=32, init_seed=seed + 99, heads=2).load(Tiny().tokenizer(NO_DATA), NO_DATA)
        other.set_attn_implementation("cdpo_trees")
        with pytest.raises(ConfigError, match="at step 0"):
            check_start(lean(other), found)


def test_batches_are_made_once(llama, tmp_path):
    found = started(llama, tmp_path)
    assert found.batch((0, 2)) is found.batch((0, 2))
    assert found.batch((0, 2)).reference.tolist() == [*found.reference[0].tolist(), *found.reference[2].tolist()]
