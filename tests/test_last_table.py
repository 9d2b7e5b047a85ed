"""The table at the end of a run says how far its optimum is to be trusted, and what would find a better one."""

from __future__ import annotations

from pathlib import Path

import pytest
from composing import composed, train

from cdpo.train import _show

TABLE = ("model=tabular", "logger=none", "beta=1", "dataset.prompts=3", "dataset.alphabet=3")
EXACTLY = "optimizer=exact trainer.max_steps=1 trainer.batch_size=null"


def shown(folder: Path, capsys: pytest.CaptureFixture, *overrides: str) -> dict[str, str]:
    """The rows of the table, by their names."""
    summary = train(composed(*TABLE, *overrides), folder)
    capsys.readouterr()
    _show(summary, folder)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in (line.strip("│").split("│") for line in lines)}


def test_a_search_says_how_often_it_found_the_best_and_how_to_search_harder(tmp_path, capsys):
    rows = shown(tmp_path, capsys, "loss=dpo", "constraint=lora_r1", "optimizer=exact", "optimizer.starts=3")
    assert rows["certificate"].startswith("searched: ")
    assert rows["certificate/starts"] == "4"  # the unconstrained optimum is one
    assert 0 < float(rows["certificate/hits"]) <= 1
    assert rows["certificate/mend"] == "optimizer.starts=12"


def test_of_what_is_certain_it_says_no_more(tmp_path, capsys):
    rows = shown(tmp_path, capsys, "loss=dpo", "constraint=l2_ball", "optimizer=exact")
    assert rows["certificate"].startswith("certified: optimal (convex; ")
    assert not [name for name in rows if name.startswith("certificate/")]


def test_frank_wolfe_has_its_gap_and_what_mends_it(tmp_path, capsys):
    own = ("loss=dpo", "constraint=l2_ball", "constraint.l2_ball.radius=2", "optimizer=frank_wolfe")
    rows = shown(tmp_path, capsys, *own, "trainer.max_steps=3", "trainer.log_every=1")
    assert float(rows["frank_wolfe/gap"]) > 0 < float(rows["certificate/bound"])
    assert rows["certificate/mend"] == EXACTLY
