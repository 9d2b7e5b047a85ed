"""dataset.base: what is written into the rows, what is refused, and what a whole run makes of it."""

from __future__ import annotations

import json
import math

import pytest
from composing import composed, train

from cdpo.data import Jsonl
from cdpo.errors import ConfigError, DataError

SCORED = {"prompt": "Name it %d.", "responses": ["one", "two words", "three is it", "no"], "rewards": [1, 3, 2, 0.5]}


def scored_file(path, **changes):
    rows = [{**SCORED, "prompt": SCORED["prompt"] % i, **changes} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_rows_say_what_their_responses_stand_for(tmp_path):
    path = scored_file(tmp_path / "a.jsonl")
    for given, expected in ((None, "uniform"), ("empirical", "empirical"), ("enumerated", "enumerated")):
        data = Jsonl(path=path, base=given).load(0)
        assert {row.base for row in data.train + data.held_out} == {expected}


def test_pairs_have_no_base_and_take_none(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "b", "rejected": "c"}) + "\n" for i in range(20)))
    assert {row.base for row in Jsonl(path=str(path)).load(0).train} == {None}
    with pytest.raises(ConfigError, match=r"dataset\.base=uniform has no effect on pairs without rewards"):
        Jsonl(path=str(path), base="uniform").load(0)
    run = composed("loss=wpo_candidates", "loss.drawn=uniform", "dataset=jsonl", f"dataset.path={path}", "logger=none")
    with pytest.raises(ConfigError, match=r"loss\.weight=candidates on pairs without rewards"):
        train(run, tmp_path / "run")


def test_a_response_may_be_drawn_twice_but_not_enumerated_twice(tmp_path):
    path = scored_file(tmp_path / "a.jsonl", responses=["one", "two", "one", "no"], rewards=[1, 3, 1, 0.5])
    assert len(Jsonl(path=path, base="empirical").load(0).train[0].responses) == 4
    with pytest.raises(DataError, match=r"a\.jsonl:1: dataset.base=enumerated, but a response stands there twice"):
        Jsonl(path=path, base="enumerated").load(0)


@pytest.mark.parametrize("base", ["empirical", "uniform", "enumerated"])
def test_a_run_on_responses_of_several_tokens(tmp_path, base):
    run = composed("loss=rlhf", "dataset=jsonl", f"dataset.path={scored_file(tmp_path / 'a.jsonl')}", "logger=none",
                   f"dataset.base={base}", "trainer.epochs=20", "model.hidden_size=32", "model.layers=1",
                   "beta=1")  # fmt: skip
    metrics = train(run, tmp_path / "run")["metrics"]
    best = metrics["objective/J_optimum"] - metrics["objective/J_reference"]
    assert ("objective/effective_sample_size" in metrics) == (base == "empirical")
    if base == "enumerated":  # the shortest response has nearly all the mass of a model that has learned nothing
        assert best < 0.1
    else:
        assert best == pytest.approx(math.log(sum(map(math.exp, SCORED["rewards"])) / 4) - 6.5 / 4, rel=1e-9)
        assert metrics["objective/attained"] > 0.5
        assert metrics["eval/kl/candidates"] > 0
    if base == "empirical":
        assert 1 < metrics["objective/effective_sample_size"] < 4
