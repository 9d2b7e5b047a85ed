"""Labels of scored rows: by hand, as draws, scaled; and a bandit world that is written out as a scored file."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from composing import composed, train

from cdpo.batch import Pair
from cdpo.data import Bandit, Jsonl
from cdpo.data.packing import pack
from cdpo.data.tokenise import tokenise
from cdpo.errors import ConfigError, DataError
from cdpo.losses import DPO, RLHF
from cdpo.losses.loss import per_unit
from cdpo.measure.objective import means, objective
from cdpo.model.logps import Scorer
from cdpo.model.tabular import Tabular

ROW = {"prompt": "Q", "responses": ["a", "b", "c", "b"], "rewards": [1.0, 3.0, 1.0, 3.0]}


def loaded(tmp_path, rows, seed=0, **options):
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return Jsonl(path=str(path), **options).load(seed)


def columns(pairs):
    return [number for pair in pairs for number in pair]


def many(n=400):
    return [{**ROW, "prompt": f"Q{i}"} for i in range(n)]


def test_labels_are_bradley_terry_and_every_pair_counts(tmp_path):
    """A tie is a label of 1/2; the same text twice is no pair."""
    data, p = loaded(tmp_path, [ROW], eval_size=0), 1 / (1 + math.exp(-2))
    assert data.labels == "bradley_terry"
    expected = [Pair(1, 0, p), Pair(1, 2, p), Pair(3, 0, p), Pair(3, 2, p), Pair(0, 2, 0.5)]
    assert columns(data.train[0].pairs) == pytest.approx(columns(expected))
    hard = loaded(tmp_path, [ROW], eval_size=0, labels="hard")
    assert hard.labels == "hard"
    assert hard.train[0].pairs == [Pair(1, 0), Pair(1, 2), Pair(3, 0), Pair(3, 2)]


def test_a_row_whose_rewards_all_tie_has_pairs_unless_labels_are_hard(tmp_path, caplog):
    tied = [{"prompt": "Q", "responses": ["a", "b"], "rewards": [1.0, 1.0]}]
    assert loaded(tmp_path, tied, eval_size=0).train[0].pairs == [Pair(0, 1, 0.5)]
    assert not caplog.records
    hard = loaded(tmp_path, tied, eval_size=0, labels="hard")
    assert hard.train[0].pairs == []
    assert hard.ledger.notes["without_pairs"].rows == ["scored.jsonl:1"]
    assert "DPO has no finite optimum" in caplog.text


@pytest.mark.parametrize("draws", [1, 5])
def test_sampled_labels_are_shares_of_draws_and_held_out_ones_are_not_drawn(tmp_path, draws):
    data = loaded(tmp_path, many(), labels="sampled", draws=draws)
    shares = [pair.preference for row in data.train for pair in row.pairs[:4]]
    assert {share * draws for share in shares} <= set(range(draws + 1))
    p, n = 1 / (1 + math.exp(-2)), len(shares)
    assert statistics.mean(shares) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n / draws))
    assert data.labels == "sampled"
    assert [pair.preference for pair in data.held_out[0].pairs] == pytest.approx([p, p, p, p, 0.5])
    again, other = (loaded(tmp_path, many(), seed, labels="sampled", draws=draws, eval_size=0) for seed in (0, 1))
    known = {row.source: row.pairs for row in again.train}
    assert all(known[row.source] == row.pairs for row in data.train)  # by seed and row, not by what else is read
    assert [row.pairs for row in other.train] != [row.pairs for row in again.train]


def test_rewards_are_scaled_once_for_labels_and_objective(tmp_path):
    row = loaded(tmp_path, [ROW], eval_size=0, reward_scale=0.5).train[0]
    assert row.rewards == [0.5, 1.5, 0.5, 1.5]
    assert row.pairs[0].preference == pytest.approx(1 / (1 + math.exp(-1)))
    rows = [ROW, {"prompt": "P", "responses": ["a", "b"], "rewards": [100.0, 106.0]}]
    data = loaded(tmp_path, rows, eval_size=0, reward_scale="standard")
    within = math.sqrt((statistics.pvariance(ROW["rewards"]) + statistics.pvariance([100, 106])) / 2)
    assert data.reward_scale == pytest.approx(1 / within)
    assert data.train[1].rewards == pytest.approx([100 / within, 106 / within])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "sampled"}, "needs a number of draws"),
        ({"draws": 3}, "dataset.draws=3 has no effect without dataset.labels=sampled"),
        ({"labels": "sampled", "draws": 0}, "dataset.draws=0"),
        ({"reward_scale": 0.0}, "dataset.reward_scale=0.0: choose"),
        ({"reward_scale": math.inf}, "dataset.reward_scale=inf: choose"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, [ROW], **options)


@pytest.mark.parametrize("options", [{"labels": "bradley_terry"}, {"labels": "hard"}, {"reward_scale": 2.0}])
def test_pairs_without_rewards_take_no_labels(tmp_path, options):
    pairs = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(10)]
    assert loaded(tmp_path, pairs).labels == "hard"
    with pytest.raises(ConfigError, match="has no effect on pairs without rewards"):
        loaded(tmp_path, pairs, **options)


def test_rewards_are_known_of_all_rows_or_of_none(tmp_path):
    held_out = tmp_path / "pairs.jsonl"
    held_out.write_text(json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError, match="must both have rewards, or neither"):
        loaded(tmp_path, [ROW], eval_path=str(held_out))


def test_equal_rewards_have_no_deviation(tmp_path):
    with pytest.raises(DataError, match="all rewards of each prompt are equal"):
        loaded(tmp_path, [{**ROW, "rewards": [1.0] * 4}], eval_size=0, reward_scale="standard")


# ------------------------------------------------------------------------------- a bandit world, written as scored rows

WORLD = Bandit(prompts=5, alphabet=6, sampling="uniform", reference_scale=1.5)


def both(tmp_path, **options):
    """The batch of the world, that of the file with its rows, and a way to score either by a moved policy."""
    world = WORLD.load(0)
    tokenizer = Tabular().tokenizer(world)
    written = [{"prompt": row.prompt, "responses": row.responses, "rewards": row.rewards} for row in world.train]
    rows = loaded(tmp_path, written, eval_size=0, base="enumerated", **options).train
    rows = [replace(row, complete=False) for row in rows]  # letters of the world, which has no EOS
    model = Tabular().load(tokenizer, world)
    sets = [tokenise(some, tokenizer, WORLD)[0] for some in (world.train, rows)]
    with torch.no_grad():
        reference = [Scorer(model)(pack(items, padded=True))[0].split(6) for items in sets]
    return model, [pack(items, list(one), padded=True) for items, one in zip(sets, reference)]


def mean_loss(model, batch):
    logps = batch.logps(Scorer(model)(batch)[0])
    return (per_unit(DPO(beta=0.7), logps) * logps.weight).sum() / logps.weight.sum(), logps


def test_a_world_in_a_scored_file_has_the_numbers_of_the_world(tmp_path):
    """J, its optimum, attained, KL, RLHF, and DPO with its gradient."""
    model, batches = both(tmp_path)
    with torch.no_grad():
        model.table.weight += torch.randn(model.table.weight.shape, generator=torch.Generator().manual_seed(0)).double()
    (loss, logps), (same, others) = (mean_loss(model, batch) for batch in batches)
    assert same.item() == pytest.approx(loss.item(), rel=1e-10)
    gradients = [torch.autograd.grad(one, model.table.weight, retain_graph=True)[0] for one in (loss, same)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert means(objective(others, 0.7)) == pytest.approx(means(objective(logps, 0.7)), rel=1e-10)
    torch.testing.assert_close(others.candidate_kl(), logps.candidate_kl(), rtol=1e-10, atol=0)
    torch.testing.assert_close(RLHF(0.7)(others), RLHF(0.7)(logps), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("labels", "optimal"), [("bradley_terry", True), ("hard", False)])
def test_with_bradley_terry_labels_the_optimum_of_rlhf_is_that_of_dpo(tmp_path, labels, optimal):
    """In closed form, pi_ref exp(r / beta): there DPO is stationary. Hard labels push on."""
    model, (_, batch) = both(tmp_path, labels=labels, reward_scale=0.5)
    last = batch.input_ids[batch.branch == 0].view(len(batch.length), -1)[:, -1]
    with torch.no_grad():
        model.table.weight[last, batch.target] += batch.rewards / 0.7
    loss, logps = mean_loss(model, batch)
    assert means(objective(logps, 0.7))["attained"] == pytest.approx(1, abs=1e-12)
    norm = float(torch.autograd.grad(loss, model.table.weight)[0].norm())
    assert norm < 1e-15 if optimal else norm > 1e-2


@pytest.mark.parametrize("labels", ["bradley_terry", "hard"])
def test_a_run_says_what_its_labels_were(tmp_path, labels):
    path = tmp_path / "scored.jsonl"
    path.write_text("\n".join(map(json.dumps, many(20))))
    run = composed("dataset=jsonl", f"dataset.path={path}", f"dataset.labels={labels}", "dataset.reward_scale=standard",
                   "logger=none", "trainer.max_steps=1", "model.hidden_size=16", "model.heads=2")  # fmt: skip
    summary = train(run, tmp_path / "run")
    assert (summary["labels"], summary["base"], summary["reward_scale"]) == (labels, "uniform", 1.0)
    world = train(composed("logger=none", "trainer.max_steps=1"), tmp_path / "world")
    assert (world["labels"], world["base"]) == ("bradley_terry", "enumerated")
