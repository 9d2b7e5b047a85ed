"""The numbers of theory.md, section 5, from one command; runs the experiment itself."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

EXPECTED = [  # overrides, attained by RLHF, by DPO, tolerance: ranks have local optima, also in theory.md
    (["constraint=none"], 1.000, 1.000, 5e-4),
    (["constraint=l2_ball", "constraint.l2_ball.radius=2"], 0.323, 0.307, 1e-3),
    (["constraint=l2_ball", "constraint.l2_ball.radius=8"], 0.897, 0.832, 1e-3),
    (["constraint=lora_r8", "constraint.lora_r8.rank=1"], 0.699, 0.536, 5e-3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "rlhf", "dpo", "tolerance"), EXPECTED)
def test_the_table_of_the_theory(overrides, rlhf, dpo, tolerance, tmp_path):
    command = [sys.executable, "-m", "cdpo.train", "experiment=theory", "loss=rlhf,dpo", f"output_root={tmp_path}"]
    subprocess.run([*command, *overrides], check=True, capture_output=True)
    cells = pd.read_csv(tmp_path / "theory" / "gap.csv").set_index("loss")
    assert cells.loc["rlhf", "attained"] == pytest.approx(rlhf, abs=tolerance)
    assert cells.loc["dpo", "attained"] == pytest.approx(dpo, abs=tolerance)
    assert cells.loc["dpo", "gap"] == pytest.approx(rlhf - dpo, abs=2 * tolerance)
