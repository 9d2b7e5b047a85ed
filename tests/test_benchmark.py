"""The benchmark runs from end to end, and does not time two sides that compute something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import cases, floor
from benchmarks.compare import check
from benchmarks.floor import utilisation
from benchmarks.same import Different
from scripted_sides import Given

from cdpo.batch import Item

ROOT = Path(__file__).parents[1]
needs_data = pytest.mark.skipif(not cases.HH.is_file(), reason=f"no {cases.HH.name}")


@pytest.mark.slow
@needs_data
def test_it_compares_cdpo_with_trl(tmp_path):
    command = [
        ROOT / "launch/benchmark.sh",
        "--cases",
        "tiny",
        "--variants",
        "compact",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([*command, "--out", tmp_path], check=True, env=environment, cwd=ROOT, timeout=300)
    found = json.loads((tmp_path / "results.json").read_text())["cases"]["tiny"]
    assert found["same"]["compact"]["gradient"] < 1e-4
    assert abs(found["same"]["compact"]["second_loss"] - 0.6931) > 1e-4  # it has learnt, so the losses say something
    against = found["against"]["compact"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in against["seconds"].values())
    assert min(against["memory"].values()) > 1e6
    least, most = sorted(b / a for a, b in zip(*against["seconds"].values()))
    assert against["faster"] == pytest.approx([(least + most) / 2, least, most])
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_sides_that_agree_are_timed(tmp_path):
    ours, theirs = (Given(name, tmp_path, [0.7, 0.6], [3.0, 4.0]) for name in ("cdpo", "best"))
    assert check(ours, theirs, 1e-4) == {"loss": 0, "gradient": 0, "second_loss": 0.6, "later_losses": 0}


@pytest.mark.parametrize(("losses", "gradient"), [([0.7, 0.6002], [3.0, 4.0]), ([0.7, 0.6], [3.0, 4.001])])
def test_sides_that_differ_are_refused(tmp_path, losses, gradient):
    ours, theirs = Given("cdpo", tmp_path, [0.7, 0.6], [3.0, 4.0]), Given("best", tmp_path, losses, gradient)
    with pytest.raises(Different, match="is allowed"):
        check(ours, theirs, 1e-4)


def test_nan_is_refused(tmp_path):
    ours, theirs = (Given(name, tmp_path, [0.7, float("nan")], [3.0, 4.0]) for name in ("cdpo", "best"))
    with pytest.raises(Different):
        check(ours, theirs, 1e-4)


def test_utilisation_by_hand():
    assert utilisation([2e12, 3e12, 4e12], [1.0, 2.0, 1.0], 1e13) == pytest.approx(0.2)
    assert floor.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert floor.peak("a graphics card") is None


def test_the_large_case_has_a_billion_weights():
    with torch.device("meta"):
        model = cases._model(cases.FOR_GPUS["1b-16"], SimpleNamespace(eos_token_id=0, pad_token_id=0))
    assert 1e9 < sum(p.numel() for p in model.parameters()) < 1.4e9


def test_the_floor_counts_products_by_hand():
    """Prompt of 2, responses of 2 and 3: 5 tokens are encoded, 1 + 1 + 2 positions predict."""
    case = cases.Case("x", vocabulary=10, layers=1, width=6, batch=1)
    item = Item([1, 2], [[3, 4], [5, 6, 7]], [])
    decoder, head = 4 * 6 * 6 + 3 * 6 * 16, 6 * 10
    seen = 3 + 3 + (3 + 4)  # by the prompt, the first branch's token, the second's two
    attention = 3 * seen * 2 * 2 * 6
    assert floor.flops(case, [item]) == 3 * 2 * (5 * decoder + 4 * head) + attention
    frozen = cases.Case("x", vocabulary=10, layers=1, width=6, batch=1, lora=True)
    assert floor.flops(frozen, [item]) == 2 * 2 * (5 * decoder + 4 * head) + attention
