"""The measure on candidates: theory.md section 2 by hand, draws of a known reference, and responses of all lengths."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from candidates import SIZES, logps_of
from composing import composed

from cdpo.batch import Item
from cdpo.config.build import build
from cdpo.data.packing import Scored, pack
from cdpo.errors import ConfigError
from cdpo.losses.candidates import RLHF
from cdpo.measure.objective import effective_sample_size, means, objective
from cdpo.model.logps import Scorer


def test_by_a_uniform_base_everything_is_made_of_log_ratios():
    beta, logps = 0.7, logps_of(3)
    uniform = replace(logps, base=torch.zeros_like(logps.reference))
    table, kl, worth = objective(uniform, beta), uniform.candidate_kl(), effective_sample_size(uniform)
    for i, k in enumerate(SIZES):
        at = logps.item == i
        ratio, rewards = (logps.policy - logps.reference)[at], logps.rewards[at]
        pi = ratio.exp() / ratio.exp().sum()
        by_hand = (pi * (k * pi).log()).sum()
        best = beta * ((rewards / beta).exp().sum() / k).log()
        assert float(kl[i]) == float(table["kl"][i]) == pytest.approx(float(by_hand), rel=1e-12)
        assert float(table["J"][i]) == pytest.approx(float((pi * rewards).sum() - beta * by_hand), rel=1e-12)
        assert float(table["J_optimum"][i]) == pytest.approx(float(best), rel=1e-12)
        assert float(table["J_reference"][i]) == pytest.approx(float(rewards.mean()), rel=1e-12)
        assert float(worth[i]) == pytest.approx(float(ratio.exp().sum() ** 2 / (2 * ratio).exp().sum()), rel=1e-12)
    torch.testing.assert_close(RLHF(beta)(uniform), -table["J"], rtol=1e-12, atol=0)


def test_a_base_moves_no_margin():
    logps = logps_of(4)
    for base in (logps.reference, torch.zeros_like(logps.reference)):
        torch.testing.assert_close(replace(logps, base=base).renormalised().margin(), logps.margin())


def test_without_a_base_no_expectation_is_known():
    bare = replace(logps_of(), base=None)
    for ask in (bare.renormalised, bare.candidate_kl, lambda: objective(bare, 1.0)):
        with pytest.raises(ConfigError, match=r"a, b, c: .* stand for no other responses"):
            ask()


def test_draws_of_the_reference_estimate_the_objective_and_one_drawn_twice_counts_twice():
    """A world of 6 responses, enumerated, against 40,000 draws of its reference, nearly all of them drawn often."""
    generator = torch.Generator().manual_seed(0)
    policy, reference, rewards = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    policy, reference = policy.log_softmax(0), reference.log_softmax(0)
    drawn = torch.multinomial(reference.exp(), 40_000, replacement=True, generator=generator)

    def table(at, base):
        like = {"item": torch.zeros(len(at), dtype=torch.long), "rewards": rewards[at], "sources": ("one",)}
        return objective(replace(logps_of(), policy=policy[at], reference=reference[at], base=base, **like), beta=0.5)

    every = torch.arange(6)
    exact, estimate = table(every, reference), table(drawn, torch.zeros(40_000, dtype=torch.float64))
    for name in ("J", "J_reference", "J_optimum", "kl", "expected_reward", "kl_to_optimum"):
        assert float(estimate[name]) == pytest.approx(float(exact[name]), abs=0.03)
    merged = table(every, torch.bincount(drawn, minlength=6).double().log())  # m = multiplicity / K
    for name in merged:
        assert float(merged[name]) == pytest.approx(float(estimate[name]), rel=1e-9)


def of_all_lengths(base):
    """Eight responses of 1 to 40 tokens to each of two prompts."""
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 2, 4, 8, 12, 20, 30, 40)
    drawn = [[torch.randint(0, 60, (n,), generator=generator).tolist() for n in lengths] for _ in range(2)]
    rewards = torch.randn(2, 8, generator=generator).tolist()
    return [Item([1, 2 + x], drawn[x], [], rewards[x], f"p{x}", base=base) for x in range(2)]


def test_where_lengths_differ_one_candidate_holds_the_mass_of_all_but_not_of_draws():
    """What is there to gain: nothing by the model's own mass, which the shortest takes; by 1/K much, as theory.md says.

    J* = beta log sum_k m_k exp(r_k / beta), with a transformer that has never seen a word.
    """
    spec, beta = build(composed("model=tiny", "dataset.prompts=4")), 0.1
    data = spec.dataset.load(0)
    model = spec.model.load(spec.model.tokenizer(data), data)
    found = {}
    for base in ("enumerated", "empirical", "uniform"):
        items = of_all_lengths(base)
        scorer = Scorer(model.eval())
        with torch.no_grad():
            reference = scorer(pack(items, padded=True))[0]
        batch = pack(items, list(reference.split(8)), padded=True)
        found[base] = means(objective(batch.logps(reference), beta))
        if base != "enumerated":
            torch.testing.assert_close(effective_sample_size(batch.logps(reference)), torch.full((2,), 8.0).double())
    own, draws = found["enumerated"], found["empirical"]
    assert found["uniform"] == pytest.approx(draws, nan_ok=True)
    rewards = [item.rewards for item in items]
    by_hand = [beta * math.log(sum(math.exp(r / beta) for r in row) / 8) for row in rewards]
    assert draws["J_optimum"] == pytest.approx(sum(by_hand) / 2, rel=1e-9)
    assert draws["J_reference"] == pytest.approx(sum(map(sum, rewards)) / 16, rel=1e-5)
    shortest = sum(row[0] for row in rewards) / 2
    assert own["J_reference"] == pytest.approx(shortest, abs=0.02)
    assert own["J_optimum"] - own["J_reference"] < 0.05 < 0.5 < draws["J_optimum"] - draws["J_reference"]


def test_items_of_a_batch_have_one_base():
    items = of_all_lengths("uniform")
    with pytest.raises(AssertionError, match="several bases"):
        pack([items[0], replace(items[1], base="enumerated")])
    assert pack([replace(item, base=None) for item in items]).base is None
    reference = [torch.rand(8, dtype=torch.float64) for _ in items]
    assert torch.equal(pack(of_all_lengths("enumerated"), reference).base, torch.cat(reference))
    assert (
        Scored(items, True, torch.device("cpu")).fingerprint()
        != Scored(of_all_lengths("empirical"), True, torch.device("cpu")).fingerprint()
    )
