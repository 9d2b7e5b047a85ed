"""One reference for a whole sweep: what its key knows, who computes it, and what becomes of a bad file."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from architectures import CONFIGS, ITEMS, build, load, plain, save
from composing import composed, train
from safetensors import safe_open
from safetensors.torch import load_file

from cdpo.batch import Item
from cdpo.data.packing import Scored
from cdpo.errors import ConfigError
from cdpo.model import reference
from cdpo.model.reference import ReferencePass, weights_digest
from cdpo.system import cache
from cdpo.system.locks import locked
from cdpo.training import loop

CPU = torch.device("cpu")
ALL = [*ITEMS["uneven"], *ITEMS["even"], *ITEMS["one token"]]
PAIRS = [
    {"prompt": f"\n\nHuman: {i}{'?' * i}\n\nAssistant:", "chosen": f" {i} yes", "rejected": f" {i}"} for i in range(40)
]
SMALL = ("model.hidden_size=32", "logger=none", "trainer.max_steps=2", "dataset.eval_size=0.2", "trainer.threads=1")


@pytest.fixture(scope="module")
def llama(folders):
    return load(folders["llama"], "float32")


def fill(model, tmp_path, name, items=ALL, budget=30):
    """Where the reference was from, and what it is."""
    scored = Scored(list(items), False, CPU)
    source = ReferencePass(budget, tmp_path / name / "own", tmp_path / "cache").fill(model, scored)
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
        assert ReferencePass(budget, own, tmp_path / "cache").fill(model, scored) == "computed"


def test_where_a_model_lies_and_how_often_it_is_loaded_are_not(tmp_path):
    prints = set()
    for name in ("here", "there"):
        save("llama", tmp_path / name)
        prints.add(weights_digest(load(tmp_path / name, "float32")))
    other = build(CONFIGS["llama"], torch.float32, seed=1)
    assert len(prints) == 1
    assert weights_digest(other) not in prints


# ------------------------------------------------------------------------------------------------- through whole runs


def run(tmp_path, name, *overrides):
    """`reference` of summary.json, for a run below tmp_path/out on tmp_path/pairs.jsonl."""
    data = tmp_path / "pairs.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    words = ("dataset=jsonl", f"dataset.path={data}", f"output_root={tmp_path}/out", *SMALL, *overrides)
    return train(composed(*words), tmp_path / "out" / name)["reference"]


SAME = [
    "beta=0.7",
    "loss=ipo",
    "loss=simpo",
    "seed=3",
    "restart=2",
    "constraint=lora_r2",
    "constraint=lora_r4",
    "constraint=dropout",
    "optimizer.learning_rate=1e-2",
    "trainer.batch_size=4",
    "dataset.max_prompt_tokens=500",  # no row is that long, so no token changes
    "dataset.eval_size=0.4",
]
OTHER = [
    "model.init_seed=1",
    "model.hidden_size=64",
    "model.dtype=float64",
    "dataset.max_prompt_tokens=24",
    "dataset.max_response_tokens=5",
    "dataset.max_rows=39",
    "dataset.max_eval_rows=2",
    "trainer.autocast=true",
]


def test_settings_that_share_a_reference(tmp_path):
    assert run(tmp_path, "first") == "computed"
    assert {word: run(tmp_path, word, word) for word in SAME} == dict.fromkeys(SAME, "cache")
    assert len(list((tmp_path / "out" / ".cache").glob("reference/*"))) == 1


def test_settings_that_do_not(tmp_path):
    assert run(tmp_path, "first") == "computed"
    assert {word: run(tmp_path, word, word) for word in OTHER} == dict.fromkeys(OTHER, "computed")
    assert {word: run(tmp_path, f"{word}-again", word, "beta=0.7") for word in OTHER} == dict.fromkeys(OTHER, "cache")


def test_other_text_is_another_reference(tmp_path):
    run(tmp_path, "first")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({**p, "chosen": " no"}) + "\n" for p in PAIRS))
    assert run(tmp_path, "second") == "computed"


def test_losses_that_leave_rows_out_share_with_those_that_do_not(tmp_path):
    """A prompt whose rewards all tie gives no pair, and RLHF trains on it all the same."""
    rows = [{"prompt": f"p{i}", "responses": [" a", " b"], "rewards": [1.0, float(i % 3 > 0)]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [run(tmp_path, loss, f"loss={loss}") for loss in ("dpo", "rlhf")] == ["computed", "cache"]


def test_a_cache_dir_of_ones_own_and_another_output_root(tmp_path):
    words = [f"cache_dir={tmp_path}/mine"]
    assert run(tmp_path, "a", *words) == "computed"
    assert run(tmp_path, "b", *words, f"output_root={tmp_path}/elsewhere") == "cache"
    assert not (tmp_path / "out" / ".cache").exists()


def test_a_run_outside_output_root_leaves_nothing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(composed(*SMALL[:3]), tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in found]


@pytest.mark.parametrize("deleted", [False, True])
def test_a_resumed_run_is_exact_whatever_became_of_the_cache(tmp_path, monkeypatch, deleted):
    """Started from a cache, stopped after two of six steps; then the cache is gone, or holds other numbers."""
    six = ("trainer.max_steps=6", "trainer.batch_size=8", "loss=dpo", "trainer.checkpoint_every=1")
    run(tmp_path, "filler")
    assert run(tmp_path, "whole", *six) == "cache"

    class Stopped(Exception):
        pass

    step = loop.take_step

    def stop(task):
        if task.state.step == 2:
            raise Stopped
        step(task)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stop)
        with pytest.raises(Stopped):
            run(tmp_path, "parts", *six)
    (path,) = (tmp_path / "out" / ".cache").glob("reference/*/values.safetensors")
    if deleted:
        path.unlink()
    else:
        cache.write(path, key_of(path), load_file(path)["values"] + 1e-4)
    assert run(tmp_path, "parts", *six) == "run directory"
    assert rows(tmp_path / "out" / "parts") == rows(tmp_path / "out" / "whole")


def test_a_base_that_changed_before_a_resume_is_still_refused(folders, llama, tmp_path):
    """The run's own file is read whatever the weights are, so that the step-0 check sees the change."""
    items = [Item(item.prompt, item.responses, item.pairs, None, f"row {i}") for i, item in enumerate(ALL)]
    fill(llama, tmp_path, "a", items)
    other = load(folders["llama"], "float32")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    scored = Scored(items, False, CPU)
    assert ReferencePass(30, tmp_path / "a" / "own", tmp_path / "cache").fill(other, scored) == "run directory"
    with pytest.raises(ConfigError, match="was the base model changed"):
        reference.check_start(other, scored)


# ------------------------------------------------------------------------------------------------------- bad files


def key_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["key"])


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


# ------------------------------------------------------------------------------------------------- several processes

WORKER = """
import logging, sys, time, torch
from pathlib import Path
from cdpo.system import cache
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def compute(tell):
    with open(folder / "computed", "a") as file:
        file.write(name + "\\n")
    (folder / f"began-{name}").touch()
    for i in range(10):
        tell(i)
        time.sleep(seconds / 10)
    return torch.arange(5, dtype=torch.float64)
seen = []
entry = cache.Entry(folder / "cache", {"what": "numbers"})
with entry.claimed(seen.append) as found:
    here = found is None
    found = entry.keep(compute(entry.telling(seen.append, 10))) if here else found
assert found.tolist() == [0, 1, 2, 3, 4]
print(name, "computed" if here else "read", len(seen))
"""


def worker(tmp_path, name, seconds):
    command = [sys.executable, "-c", WORKER, str(tmp_path), name, str(seconds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def begun(tmp_path, name):
    deadline = time.monotonic() + 60
    while not (tmp_path / f"began-{name}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_of_processes_at_once_one_computes(tmp_path):
    workers = [worker(tmp_path, f"w{i}", 3) for i in range(2)]
    told = [process.communicate(timeout=120) for process in workers]
    assert [process.returncode for process in workers] == [0, 0], told
    assert Counter(out.split()[1] for out, _ in told) == {"computed": 1, "read": 1}
    assert len((tmp_path / "computed").read_text().split()) == 1


def test_who_waits_sees_progress_and_says_for_whom(tmp_path):
    holder = worker(tmp_path, "holder", 6)
    begun(tmp_path, "holder")
    out, err = worker(tmp_path, "waiter", 0).communicate(timeout=120)
    assert holder.wait(60) == 0
    assert f"computed by pid {holder.pid} on host" in err
    assert int(out.split()[2]) > 1


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    holder = worker(tmp_path, "holder", 600)
    begun(tmp_path, "holder")
    waiter = worker(tmp_path, "waiter", 0)
    time.sleep(1)
    holder.send_signal(signal.SIGKILL)
    out, err = waiter.communicate(timeout=120)
    assert out.split()[:2] == ["waiter", "computed"], err
    assert worker(tmp_path, "late", 0).communicate(timeout=120)[0].split()[:2] == ["late", "read"]


def test_a_stopped_holder_is_not_waited_for_for_ever(tmp_path, monkeypatch, caplog):
    """It has the lock, and its sign of life is old."""
    monkeypatch.setattr(cache, "PATIENCE", 1.0)
    holder = worker(tmp_path, "holder", 600)
    begun(tmp_path, "holder")
    holder.send_signal(signal.SIGSTOP)
    (life,) = (tmp_path / "cache").glob("*/lock.json")
    os.utime(life, (time.time() - 1000, time.time() - 1000))
    try:
        entry, numbers = cache.Entry(tmp_path / "cache", {"what": "numbers"}), torch.arange(5, dtype=torch.float64)
        with entry.claimed(lambda done: None) as found:
            assert found is None
            assert torch.equal(entry.keep(numbers), numbers)
    finally:
        holder.kill()
        holder.communicate()
    assert torch.equal(entry.read(), numbers)
    assert "no sign of life" in caplog.text


def test_a_signal_ends_the_wait(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    entry = cache.Entry(tmp_path, {"what": "numbers"})

    def interrupted(done):
        raise KeyboardInterrupt

    with locked(entry.place), pytest.raises(KeyboardInterrupt), entry.claimed(interrupted):
        pytest.fail("claimed")
    assert not entry.file.exists()
