"""A checkpoint is whole or not there: whatever is damaged, `newest` never gives a wrong state."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from pathlib import Path

import numpy
import pytest
import torch
from checkpoints import same, state_of
from torch import nn

from cdpo.errors import ConfigError
from cdpo.system import checkpoint
from cdpo.system.checkpoint import newest, save
from cdpo.system.rng import rng_state, set_rng_state

FILES = ("tensors.safetensors", "state.json", "manifest.json")
DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "short by one": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "garbage": lambda path: path.write_bytes(b'{"format": 1, "step": 2, "files": []}'),
    "nonsense": lambda path: path.write_bytes(b"[" * 100_000),
}


def flip(path: Path, at: int, mask: int = 0xFF) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= mask
    path.write_bytes(raw)


# ---------------------------------------------------------------------------------------------------- round trips


def test_every_kind_of_value_comes_back_exactly(tmp_path):
    base = torch.randn(4, 6, dtype=torch.float64)
    tree = {
        "shared": base,
        "again": base,
        "transposed": base.t(),
        "part": base[1:, ::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "conjugate": torch.randn(3, dtype=torch.complex128).conj(),
        "parameter": nn.Parameter(torch.randn(2)).detach(),
        "special": torch.tensor([math.nan, math.inf, -0.0]),
        1: {"1": [1, 2**70, -0.0, 1e-320, math.inf, -math.inf, math.nan, True, None, ""], 2: ()},
        "1": {"tensor": "no reference", "dict": [], "a.b": {"c": 1}, "a": {"b.c": 2}},
        "text": "é\n\"]['",
    }
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.complex64):
        tree[str(dtype)] = torch.tensor([0, 1, 1]).to(dtype)
    save(tmp_path, 5, tree, keep=1)
    step, loaded = newest(tmp_path)
    assert step == 5
    assert same(tree, loaded)
    loaded["shared"].add_(1)  # its own memory, not a map of the file
    assert same(newest(tmp_path)[1], tree)


@pytest.mark.parametrize(
    ("value", "place"), [({1, 2}, "set"), (b"raw", "bytes"), ({True: 1}, "key"), (object(), "object")]
)
def test_a_value_that_cannot_be_held_is_named_and_nothing_is_written(tmp_path, value, place):
    with pytest.raises(TypeError, match=rf"state\['deep'\]\[1\].*{place}"):
        save(tmp_path / "checkpoints", 1, {"deep": [0, value]}, keep=1)
    assert not (tmp_path / "checkpoints").exists()


def training(name: str):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2 if name != "lbfgs" else 0.0), nn.Linear(8, 1)
    ).double()
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
        "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
    }
    return model, make[name](model.parameters())


def advance(model, optimizer, steps: int) -> None:
    inputs = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(12, 5)

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "lbfgs"])
def test_interrupted_training_goes_on_bit_for_bit(tmp_path, name):
    model, optimizer = training(name)
    advance(model, optimizer, 4)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state()}
    save(tmp_path, 4, state, keep=1)
    advance(model, optimizer, 5)

    resumed, again = training(name)
    _, loaded = newest(tmp_path)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    set_rng_state(loaded["rng"])
    advance(resumed, again, 5)
    assert same(dict(model.state_dict()), dict(resumed.state_dict()))
    assert same(optimizer.state_dict(), again.state_dict())


def test_random_numbers_continue(tmp_path):
    def draw():
        return random.gauss(0, 1), numpy.random.randn(3).tolist(), torch.randn(3).tolist(), random.random()

    draw()  # leaves half of a pair of normals waiting, in python and in numpy
    save(tmp_path, 1, {"rng": rng_state()}, keep=1)
    expected = [draw() for _ in range(3)]
    set_rng_state(newest(tmp_path)[1]["rng"])
    assert [draw() for _ in range(3)] == expected


# ---------------------------------------------------------------------------------------------------- which one


def test_keeps_the_newest_and_skips_strangers(tmp_path):
    assert newest(tmp_path / "nowhere") is None
    assert newest(tmp_path) is None
    (tmp_path / "checkpoint-best").mkdir()
    for step in (1, 2, 3, 4):
        assert save(tmp_path, step, state_of(step), keep=2).name == f"checkpoint-{step:08d}"
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-best",
        "checkpoint-00000003",
        "checkpoint-00000004",
    }
    assert newest(tmp_path)[0] == 4


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, state_of(step), keep=2)
    (tmp_path / "checkpoint-00000002" / "state.json").write_bytes(b"")
    save(tmp_path, 3, state_of(3), keep=2)
    assert (tmp_path / "checkpoint-00000001").exists()


def test_a_damaged_later_one_never_displaces_what_is_saved(tmp_path):
    save(tmp_path, 9, state_of(9), keep=1)
    flip(tmp_path / "checkpoint-00000009" / FILES[0], -1)
    save(tmp_path, 5, state_of(5), keep=1)
    assert newest(tmp_path)[0] == 5


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_falls_back_and_says_why(tmp_path, caplog, name, damage):
    for step in (1, 2):
        save(tmp_path, step, state_of(step), keep=2)
    DAMAGE[damage](tmp_path / "checkpoint-00000002" / name)
    step, state = newest(tmp_path)
    assert step == 1
    assert same(state, state_of(1))
    assert "checkpoint-00000002" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_every_bit_of_every_file_counts(tmp_path, name):
    save(tmp_path, 2, state_of(2), keep=1)
    path = tmp_path / "checkpoint-00000002" / name
    for at in range(path.stat().st_size):
        flip(path, at, 1 << at % 8)
        with pytest.raises(ConfigError):
            newest(tmp_path)
        flip(path, at, 1 << at % 8)
    assert newest(tmp_path)[0] == 2


def test_all_damaged_is_an_error_and_nothing_is_touched(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step, state_of(step), keep=2) / FILES[step - 1], 20)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(ConfigError, match="all 2 checkpoints are damaged"):
        newest(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_never_run(tmp_path, name):
    """Not even one whose hash is right."""
    folder = save(tmp_path / "run", 1, state_of(1), keep=1)
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = checkpoint._fingerprint(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError):
        newest(tmp_path / "run")
    assert not (tmp_path / "canary").exists()
