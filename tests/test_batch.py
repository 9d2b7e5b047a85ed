"""Log-probs on candidate sets: renormalisation, and the KL between them against torch's categorical distributions."""

from __future__ import annotations

import math

import pytest
import torch
from candidates import logps
from hypothesis import given
from hypothesis import strategies as st

ITEM = [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_candidate_kl_is_that_of_categorical_distributions():
    torch.manual_seed(0)
    policy, reference = (100 * torch.randn(2, 9, dtype=torch.float64)).unbind()
    policy.requires_grad_()
    kl = logps(policy, reference, ITEM).candidate_kl()
    parts = zip(policy.split([3, 2, 4]), reference.split([3, 2, 4]))
    categorical = torch.distributions.Categorical
    expected = [torch.distributions.kl_divergence(categorical(logits=p), categorical(logits=q)) for p, q in parts]
    torch.testing.assert_close(kl, torch.stack(expected))
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    gradients = [torch.autograd.grad((v * weight).sum(), policy)[0] for v in (kl, torch.stack(expected))]
    torch.testing.assert_close(*gradients)


def test_candidate_kl_needs_no_order_of_the_rows():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 9)
    order = torch.randperm(9)
    shuffled = logps(policy[order], reference[order], [ITEM[i] for i in order], sources=("a", "b", "c"))
    torch.testing.assert_close(shuffled.candidate_kl(), logps(policy, reference, ITEM).candidate_kl())


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=9, max_size=9), st.booleans())
def test_candidate_kl_is_finite_and_not_negative(values, double):
    policy = torch.tensor(values, dtype=torch.float64 if double else torch.float32, requires_grad=True)
    kl = logps(policy, policy.detach().flip(0), ITEM).candidate_kl()
    (gradient,) = torch.autograd.grad(kl.sum(), policy)
    assert kl.isfinite().all()
    assert gradient.isfinite().all()
    assert (kl >= -1e-6).all()


def test_log_softmax_is_at_least_float32():
    zeros = torch.zeros(4)
    result = logps(zeros, zeros, [0, 0, 1, 1]).log_softmax_by_item(zeros.to(torch.bfloat16))
    torch.testing.assert_close(result, torch.full((4,), -math.log(2)))


@pytest.mark.parametrize("enumerated", [True, False])
def test_another_reference_leaves_the_policy_on_the_responses_as_it_is(enumerated):
    """And stands beside it as the policy would: on enumerated responses by its own probabilities, renormalised."""
    torch.manual_seed(0)
    policy, reference, other = torch.randn(3, 9, dtype=torch.float64)
    base = reference if enumerated else torch.zeros(9, dtype=torch.float64)
    first = logps(policy, reference, ITEM, base=base)
    moved = first.with_reference(other, baseline=0.3)
    torch.testing.assert_close(moved.renormalised().policy, first.renormalised().policy)
    as_policy = logps(other, reference, ITEM, base=base).renormalised().policy
    torch.testing.assert_close(moved.renormalised().reference, as_policy)
    assert (moved.baseline, moved.reference is other) == (0.3, True)
    torch.testing.assert_close(first.with_reference(policy, 0.0).candidate_kl(), torch.zeros(3, dtype=torch.float64))
