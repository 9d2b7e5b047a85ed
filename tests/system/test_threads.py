"""How long threads spin is chosen before torch is imported, and a user's choice stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cdpo.system.threads import SPINS, wait_in_turns


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_a_users_choice_stays(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    wait_in_turns()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


SCRIPT = """
import os, sys
import cdpo.train
early = "torch" not in sys.modules
cdpo.train._job = lambda: print(early, os.environ["GOMP_SPINCOUNT"])
cdpo.train.main()
"""


def test_the_command_line_chooses_before_torch_is_there():
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=own, capture_output=True, text=True, check=True)
    assert done.stdout == f"True {SPINS}\n"
