"""One reference for a whole sweep: what its key knows, and what becomes of a bad file."""

from __future__ import annotations

import json
import random

import pytest
import torch
from architectures import CONFIGS, ITEMS, build, lean, load, plain, save
from run_files import key_of
from safetensors import safe_open
from safetensors.torch import load_file

from cdpo.batch import Item
from cdpo.data.packing import Scored
from cdpo.errors import ConfigError
from cdpo.model import reference
from cdpo.model.reference import ReferencePass, weights_digest
from cdpo.system import cache

CPU = torch.device("cpu")
ALL = [*ITEMS["uneven"], *ITEMS["even"], *ITEMS["one token"]]


@pytest.fixture(scope="module")
def llama(folders):
    return load(folders["llama"], "float32")


def fill(model, tmp_path, name, items=ALL, budget=30):
    """Where the reference was from, and what it is."""
    scored = Scored(list(items), False, CPU)
    source = ReferencePass(budget, tmp_path / name / "own", tmp_path / "cache").fill(lean(model), scored)
    return source, torch.cat(scored.reference)


def expected(folders):
    """By the model's ordinary forward, one sequence at a time."""
    with torch.no_grad():
        return plain(load(folders["llama"], "float32", packed=False), ALL)


def only(tmp_path):
    (path,) = (tmp_path / "cache").glob("*/values.safetensors")
    return path


def test_the_second_run_reads_what_the_first_computed(folders, llama, tmp_path):
    first, second = fill(llama, tmp_path, "a"), fill(llama, tmp_path, "b")
    assert (first[0], second[0]) == ("computed", "cache")
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(second[1], expected(folders), rtol=2e-5, atol=2e-5)
    assert fill(llama, tmp_path, "a")[0] == "run directory"


def test_a_file_holds_its_key_and_doubles(llama, tmp_path):
    fill(llama, tmp_path, "a")
    with safe_open(only(tmp_path), "pt") as file:
        key = json.loads(file.metadata()["key"])
        assert file.get_tensor("values").dtype == torch.float64
    assert key["weights"] == weights_digest(llama)
    assert (key["dtype"], key["attention"], key["device"]) == ("torch.float32", ["trees", "cdpo_trees"], "cpu")


def test_another_order_and_other_labels_find_the_same_numbers_bit_for_bit(llama, tmp_path):
    """What a seed does: another split, so another order of the same Items; and preferences drawn anew."""
    order = random.Random(1).sample(range(len(ALL)), len(ALL))
    shuffled = [Item(ALL[i].prompt, ALL[i].responses, []) for i in order]
    _, first = fill(llama, tmp_path, "a")
    source, second = fill(llama, tmp_path, "b", shuffled)
    sizes = [len(item.responses) for item in ALL]
    assert source == "cache"
    assert torch.equal(second, torch.cat([first.split(sizes)[i] for i in order]))
    fresh = fill(llama, tmp_path / "elsewhere", "c", shuffled)
    assert fresh[0] == "computed"
    assert torch.equal(fresh[1], second)  # whoever is first, the numbers are these


@pytest.mark.parametrize("change", ["weight", "buffer", "dtype", "config", "tokens", "budget", "autocast", "layout"])
def test_what_numbers_depend_on_is_in_the_key(folders, tmp_path, change):
    fill(load(folders["llama"], "float32"), tmp_path, "a")
    model, items, budget = load(folders["llama"], "float64" if change == "dtype" else "float32"), ALL, 30
    if change == "weight":  # the least change of one number of one tensor
        with torch.no_grad():
            last = list(model.parameters())[-1].view(-1)[-1:]
            last.copy_(torch.nextafter(last, torch.tensor(9.0)))
    if change == "buffer":
        next(model.buffers()).mul_(1.01)
    if change == "config":
        model.config.rms_norm_eps *= 2
    if change == "tokens":
        items = [Item(ALL[0].prompt, [ALL[0].responses[0], [*ALL[0].responses[1], 9]], []), *ALL[1:]]
    if change == "budget":
        budget = 31
    if change == "layout":
        model.set_attn_implementation("sdpa")
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        scored = Scored(list(items), change == "layout", CPU)
        own = tmp_path / "b" / "own"
        assert ReferencePass(budget, own, tmp_path / "cache").fill(lean(model), scored) == "computed"


def test_where_a_model_lies_and_how_often_it_is_loaded_are_not(tmp_path):
    prints = set()
    for name in ("here", "there"):
        save("llama", tmp_path / name)
        prints.add(weights_digest(load(tmp_path / name, "float32")))
    other = build(CONFIGS["llama"], torch.float32, seed=1)
    assert len(prints) == 1
    assert weights_digest(other) not in prints


def test_a_base_that_changed_before_a_resume_is_still_refused(folders, llama, tmp_path):
    """The run's own file is read whatever the weights are, so that the step-0 check sees the change."""
    items = [Item(item.prompt, item.responses, item.pairs, None, f"row {i}") for i, item in enumerate(ALL)]
    fill(llama, tmp_path, "a", items)
    other = load(folders["llama"], "float32")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    scored = Scored(items, False, CPU)
    assert ReferencePass(30, tmp_path / "a" / "own", tmp_path / "cache").fill(lean(other), scored) == "run directory"
    with pytest.raises(ConfigError, match="was the base model changed"):
        reference.check_start(lean(other), scored)


# ------------------------------------------------------------------------------------------------------- bad files


def spoil(path, kind):
    content, middle = path.read_bytes(), path.stat().st_size - 20
    key, values = key_of(path), load_file(path)["values"]
    if kind == "stale":
        cache.write(path, key, values + 0.05)
    elif kind == "of another key":
        cache.write(path, key | {"weights": "0" * 64}, values)
    elif kind == "NaN":
        cache.write(path, key, values * float("nan"))
    else:
        bit = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": content[:-9], "text": b"not a cache", "one bit": bit}[kind])


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "one bit", "stale", "of another key", "NaN"])
def test_a_bad_file_is_never_used(llama, tmp_path, caplog, kind):
    _, first = fill(llama, tmp_path, "a")
    spoil(only(tmp_path), kind)
    source, found = fill(llama, tmp_path, "b")
    assert source == "computed"
    assert torch.equal(found, first)
    assert [r.levelname for r in caplog.records if "computed anew" in r.message] == ["WARNING"]
    assert fill(llama, tmp_path, "c")[0] == "cache"  # and it is sound again


def test_an_error_in_some_responses_is_found_in_time(llama, tmp_path, monkeypatch):
    """Half the Items are wrong: 8 drawn of them miss all with probability 1/256 at most; drawn anew by each reader."""
    _, first = fill(llama, tmp_path, "a")
    monkeypatch.setattr(reference, "Random", lambda: random.Random(5))
    path = only(tmp_path)
    values = load_file(path)["values"]
    values[: len(values) // 2] += 0.05
    cache.write(path, key_of(path), values)
    source, found = fill(llama, tmp_path, "b")
    assert source == "computed"
    assert torch.equal(found, first)


def test_rounding_is_no_fault(llama, tmp_path):
    fill(llama, tmp_path, "a")
    path = only(tmp_path)
    cache.write(path, key_of(path), load_file(path)["values"] + 1e-5)
    assert fill(llama, tmp_path, "b")[0] == "cache"


def test_a_cache_that_cannot_be_written_costs_no_run(folders, llama, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    source, found = fill(llama, tmp_path, "a")
    assert source == "computed"
    torch.testing.assert_close(found, expected(folders), rtol=2e-5, atol=2e-5)
    assert "not shared" in caplog.text


def test_a_generator_is_not_advanced(llama, tmp_path):
    """The choice of what is scored again must not change what training draws."""
    fill(llama, tmp_path, "a")
    random.seed(3), torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state()
    assert fill(llama, tmp_path, "b")[0] == "cache"
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
