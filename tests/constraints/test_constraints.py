"""Every constraint is held to its promise, after steps that are far too large, with numbers computed without it."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policies import ALL, IDS, large_steps, make, moved, prepare, weights

from cdpo.batch import Logps
from cdpo.constraints.bias_only import BiasOnly
from cdpo.constraints.dropout import Dropout
from cdpo.constraints.early_stop import EarlyStop
from cdpo.constraints.freeze import Freeze
from cdpo.constraints.kl_budget import KLBudget
from cdpo.constraints.l2_ball import L2Ball
from cdpo.constraints.l2_to_start import L2ToStart
from cdpo.constraints.linf_ball import LinfBall
from cdpo.constraints.lora import LoRA
from cdpo.constraints.sparse_topk import SparseTopK
from cdpo.constraints.weight_decay import WeightDecay
from cdpo.errors import ConfigError

NAMES = pytest.mark.parametrize("name", ALL)


def total(deltas):
    return math.sqrt(sum((delta**2).sum() for delta in deltas.values()))


def flat(deltas):
    return np.concatenate([delta.ravel() for delta in deltas.values()])


# LoRA


@NAMES
@pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha": 3.0}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_lora_changes_have_low_rank(name, rank, options):
    model, change = prepare(make(name), LoRA(rank=rank, **options))
    large_steps(model)
    deltas = moved(model, name)
    assert {key for key, delta in deltas.items() if delta.any()} == set(change.names)
    for key in change.names:
        values = np.linalg.svd(deltas[key], compute_uv=False)
        assert values[rank - 1] > 1e-6 * values[0]
        assert values[rank] < 1e-12 * values[0]


@NAMES
def test_lora_adapts_all_linear_layers_but_the_head(name):
    _, change = prepare(make(name), LoRA(rank=1))
    matrices = {key for key, value in weights(make(name)).items() if value.ndim == 2}
    lookups = {
        "model.embed_tokens.weight",
        "gpt_neox.embed_in.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert set(change.names) == matrices - lookups - {"lm_head.weight", "embed_out.weight"}


@pytest.mark.parametrize(("base", "adapter"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", ["llama", "tabular"])
def test_lora_adapters_are_as_precise_as_the_base_or_float32(name, base, adapter):
    model, _ = prepare(make(name).to(getattr(torch, base)), LoRA(rank=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, adapter)}


@pytest.mark.parametrize(("options", "scaling"), [({}, 2), ({"alpha": 3}, 0.75), ({"alpha": 3, "rslora": True}, 1.5)])
def test_lora_scaling(options, scaling):
    _, change = prepare(make("llama"), LoRA(rank=4, **options))
    assert {layer.scaling["default"] for layer in change.adapted.values()} == {scaling}


def test_lora_targets_may_be_a_regular_expression_or_names():
    for targets in (r".*\.1\..*(q|v)_proj", ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]):
        _, change = prepare(make("llama"), LoRA(rank=1, target_modules=targets))
        assert change.names == [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qv"]


def test_lora_targets_that_match_nothing_are_an_error():
    with pytest.raises(ConfigError, match="no_such_layer"):
        LoRA(rank=1, target_modules=["no_such_layer"]).wrap(make("llama"))


def test_dora_changes_norms_too():
    model, _ = prepare(make("tabular"), LoRA(rank=1, dora=True))
    large_steps(model, lr=1.0)
    assert np.linalg.matrix_rank(moved(model, "tabular")["table.weight"]) > 1


# Sets around the start


@NAMES
@pytest.mark.parametrize("adapter", [[], [LoRA(rank=2)]], ids=["plain", "lora"])
def test_l2_ball_holds_the_whole_model(name, adapter):
    ball = L2Ball(radius=0.7)
    model, _ = prepare(make(name), *adapter, ball)
    for steps in ([0], [1, 2, 3]):
        large_steps(model, *adapter, ball, steps=steps)
        assert total(moved(model, name)) == pytest.approx(0.7, rel=1e-9)
    assert ball.report() == {"binds": 1, "boundary_distance": 0, "steps_projected": 4}
    large_steps(model, *adapter, ball, steps=[4], lr=0)
    assert ball.report()["boundary_distance"] == pytest.approx(0, abs=1e-12)


@NAMES
@pytest.mark.parametrize("adapter", [[], [LoRA(rank=2)]], ids=["plain", "lora"])
def test_l2_ball_per_tensor(name, adapter):
    ball = L2Ball(radius=0.3, per_tensor=True)
    model, change = prepare(make(name), *adapter, ball)
    large_steps(model, *adapter, ball)
    deltas = moved(model, name)
    for key in change.names:
        assert np.linalg.norm(deltas[key]) == pytest.approx(0.3, rel=1e-9)
    if adapter:
        assert all(np.linalg.matrix_rank(deltas[key]) <= 2 for key in change.names)


@pytest.mark.parametrize("adapter", [[], [LoRA(rank=2)]], ids=["plain", "lora"])
@pytest.mark.parametrize("share", [0.001, 0.9])
def test_l2_ball_projects_to_the_nearest_point(share, adapter):
    free, _ = prepare(make("gpt2"), *adapter)
    large_steps(free, steps=[0])
    outside = flat(moved(free, "gpt2"))
    ball = L2Ball(radius=share * np.linalg.norm(outside))
    held, _ = prepare(make("gpt2"), *adapter, ball)
    large_steps(held, ball, steps=[0])
    np.testing.assert_allclose(flat(moved(held, "gpt2")), share * outside, rtol=1e-9, atol=1e-12)


def test_l2_ball_leaves_alone_what_is_inside():
    ball = L2Ball(radius=1e6)
    free, _ = prepare(make("llama"))
    held, _ = prepare(make("llama"), ball)
    large_steps(free)
    large_steps(held, ball)
    assert all((a == b).all() for a, b in zip(weights(free).values(), weights(held).values()))
    report = ball.report()
    assert (report["binds"], report["steps_projected"]) == (0, 0)
    assert report["boundary_distance"] == pytest.approx(1e6 - total(moved(held, "llama")), rel=1e-12)


@NAMES
def test_linf_ball(name):
    ball = LinfBall(radius=0.01)
    model, _ = prepare(make(name), ball)
    large_steps(model, ball)
    assert max(abs(delta).max() for delta in moved(model, name).values()) == pytest.approx(0.01, rel=1e-9)
    assert ball.report() == {"binds": 1, "boundary_distance": 0, "steps_projected": 4}
    large_steps(model, ball, steps=[5], lr=0)
    assert ball.report()["boundary_distance"] == pytest.approx(0, abs=1e-12)


def test_linf_ball_clips_every_weight():
    ball = LinfBall(radius=3.0)
    free, _ = prepare(make("llama"))
    held, _ = prepare(make("llama"), ball)
    large_steps(free, steps=[0])
    large_steps(held, ball, steps=[0])
    expected = flat(moved(free, "llama")).clip(-3, 3)
    assert 0 < (abs(expected) < 3).mean() < 1
    np.testing.assert_allclose(flat(moved(held, "llama")), expected, atol=1e-12)


@NAMES
@pytest.mark.parametrize("k", [1, 50])
def test_sparse_topk_counts(name, k):
    sparse = SparseTopK(k=k)
    model, _ = prepare(make(name), sparse)
    large_steps(model, sparse)
    assert np.count_nonzero(flat(moved(model, name))) == k
    assert sparse.report() == {"binds": 1, "boundary_distance": 0, "steps_projected": 4}


def test_sparse_topk_keeps_the_largest_changes():
    sparse = SparseTopK(k=40)
    free, _ = prepare(make("llama"))
    held, _ = prepare(make("llama"), sparse)
    large_steps(free, steps=[0])
    large_steps(held, sparse, steps=[0])
    expected = flat(moved(free, "llama"))
    expected[abs(expected).argsort()[:-40]] = 0
    np.testing.assert_array_equal(flat(moved(held, "llama")), expected)


@torch.no_grad()
def test_sparse_topk_breaks_ties():
    model = make("tabular")
    model.table.weight.zero_()
    sparse = SparseTopK(k=7)
    prepare(model, sparse)
    model.table.weight += 1
    sparse.after_step(model, {})
    assert int(model.table.weight.sum()) == int(model.table.weight.count_nonzero()) == 7


def test_sparse_topk_fraction_is_of_the_trained_weights():
    freeze, sparse = Freeze(train_last_layers=1), SparseTopK(fraction=0.25)
    model, change = prepare(make("llama"), freeze, sparse)
    large_steps(model, freeze, sparse)
    assert np.count_nonzero(flat(moved(model, "llama"))) == change.trainable() // 4


def test_projections_and_shrinking_hold_together():
    constraints = [SparseTopK(k=60), L2Ball(radius=0.5), LinfBall(radius=0.1), L2ToStart(strength=1.0)]
    constraints += [L2Ball(radius=0.3, per_tensor=True), WeightDecay(strength=0.01)]
    for order in (constraints, constraints[::-1]):
        model, _ = prepare(make("llama"), *order)
        large_steps(model, *order)
        deltas = moved(model, "llama")
        assert 0 < np.count_nonzero(flat(deltas)) <= 60
        assert total(deltas) <= 0.5 * (1 + 1e-12)
        assert abs(flat(deltas)).max() <= 0.1 * (1 + 1e-12)
        assert max(np.linalg.norm(delta) for delta in deltas.values()) <= 0.3 * (1 + 1e-12)


# Pulls


def test_weight_decay_is_that_of_adamw():
    """Three steps, to bit-closeness, with and without biases and norms."""
    for matrices_only in (False, True):
        ours, theirs = make("gpt2"), make("gpt2")
        decay = WeightDecay(strength=0.5, matrices_only=matrices_only)
        prepare(ours, decay)
        matrices, vectors = ([p for p in theirs.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0 if matrices_only else 0.5}]
        adam = torch.optim.AdamW(ours.parameters(), lr=0.1, weight_decay=0.0)
        adamw = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
        for _ in range(3):
            for model in (ours, theirs):
                model.zero_grad()
                model(IDS, labels=IDS).loss.backward()
            with torch.no_grad():
                decay.before_step(ours, 0.1)
            adam.step()
            adamw.step()
        for one, other in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
        decayed = [p for p in theirs.parameters() if p.ndim >= 2 or not matrices_only]
        assert decay.report() == {
            "binds": 1,
            "norm": pytest.approx(float(torch.cat([p.flatten() for p in decayed]).norm())),
        }


def test_weight_decay_keeps_frozen_weights_and_the_rank_of_adapters():
    for other in (Freeze(train_last_layers=1), LoRA(rank=2)):
        decay = WeightDecay(strength=0.05)
        model, change = prepare(make("llama"), other, decay)
        large_steps(model, other, decay)
        deltas = moved(model, "llama")
        assert {key for key, delta in deltas.items() if delta.any()} <= set(change.names)
        if change.adapted:
            assert all(np.linalg.matrix_rank(deltas[key]) == 2 for key in change.names)


def test_weight_decay_beyond_zero_is_refused():
    decay = WeightDecay(strength=1.0)
    model, _ = prepare(make("tabular"), decay)
    with pytest.raises(ConfigError, match="flip"):
        decay.before_step(model, 1.5)


@NAMES
@pytest.mark.parametrize("adapter", [[], [LoRA(rank=2)]], ids=["plain", "lora"])
def test_l2_to_start_minimises_its_penalty(name, adapter):
    """argmin_x ||x - v||^2 / 2 + lr * strength * ||x - theta_0||^2 / 2, for the step's outcome v."""
    pull, lr = L2ToStart(strength=0.6), 10.0
    free, _ = prepare(make(name), *adapter)
    held, _ = prepare(make(name), *adapter, pull)
    large_steps(free, steps=[0], lr=lr)
    large_steps(held, pull, steps=[0], lr=lr)
    v, x = flat(moved(free, name)), flat(moved(held, name))
    gradient = (x - v) + lr * 0.6 * x
    assert np.linalg.norm(gradient) < 1e-9 * np.linalg.norm(v)
    assert pull.report() == {"binds": 1, "norm": pytest.approx(np.linalg.norm(x))}


# Parts of the model


@pytest.mark.parametrize("name", ["llama", "qwen", "neox", "gpt2"])
def test_freeze_all_but_the_last_layer(name):
    freeze = Freeze(train_last_layers=1)
    model, _ = prepare(make(name), freeze)
    large_steps(model, freeze)
    deltas = moved(model, name)
    layer = {"neox": "gpt_neox.layers.1.", "gpt2": "transformer.h.1."}.get(name, "model.layers.1.")
    assert all(delta.any() == key.startswith(layer) for key, delta in deltas.items())
    frozen = sum(delta.size for key, delta in deltas.items() if not key.startswith(layer))
    assert freeze.report() == {"binds": 1, "frozen": frozen}


def test_freeze_patterns_are_searched_in_names():
    model, _ = prepare(make("llama"), Freeze(patterns=["embed", r"\.0\..*(q|k)_proj"]))
    large_steps(model)
    still = {key for key, delta in moved(model, "llama").items() if not delta.any()}
    assert still == {"model.embed_tokens.weight", *(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")}


def test_freeze_pattern_without_a_match_lists_near_names():
    with pytest.raises(ConfigError, match=r"'embed_token\.weights'.*model\.embed_tokens\.weight"):
        Freeze(patterns=["embed_token.weights"]).wrap(make("llama"))


@pytest.mark.parametrize(
    ("constraint", "name", "reason"),
    [
        (Freeze(patterns=["weight"]), "llama", "nothing is left to train"),
        (Freeze(patterns=["table"]), "tabular", "nothing is left to train"),
        (Freeze(train_last_layers=3), "llama", "has 2 layers"),
        (Freeze(train_last_layers=1), "tabular", "no decoder layers"),
        (BiasOnly(), "llama", "LlamaForCausalLM has no bias"),
        (BiasOnly(), "tabular", "TabularForCausalLM has no bias"),
    ],
)
def test_freezing_that_a_model_cannot_do(constraint, name, reason):
    with pytest.raises(ConfigError, match=reason):
        constraint.wrap(make(name))


@pytest.mark.parametrize("name", ["gpt2", "neox"])
@pytest.mark.parametrize("freeze", [False, True])
def test_bias_only(name, freeze):
    constraints = [BiasOnly(), Freeze(train_last_layers=1)][: 1 + freeze]
    for order in (constraints, constraints[::-1]):
        model, _ = prepare(make(name), *order)
        large_steps(model, *order)
        for key, delta in moved(model, name).items():
            assert delta.any() == (key.endswith(".bias") and (not freeze or ".1." in key))


def test_bias_only_reports_what_it_froze():
    constraint = BiasOnly()
    model, change = prepare(make("gpt2"), constraint)
    assert constraint.report()["frozen"] == sum(p.numel() for p in model.parameters()) - change.trainable()


# Noise


@NAMES
def test_dropout_acts_in_train_mode_only(name):
    reference = make(name)(IDS).logits
    model, _ = prepare(make(name), Dropout(p=0.5))
    torch.testing.assert_close(model.eval()(IDS).logits, reference, rtol=0, atol=0)
    model.train()
    assert (model(IDS).logits - model(IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(IDS).logits, reference, rtol=0, atol=0)


def test_dropout_drops_a_share_p_and_keeps_the_mean():
    model, _ = prepare(make("tabular"), Dropout(p=0.25))
    ids = torch.arange(24).repeat(200, 1)
    logits, reference = model.train()(ids).logits, make("tabular")(ids).logits
    dropped = logits == 0
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(logits[~dropped], reference[~dropped] / 0.75)


def test_dropout_reaches_modules_and_functional_attention():
    for name, places in {"gpt2": 1 + 3 * 2, "neox": 1 + 3 * 2, "llama": 1 + 2, "qwen": 1 + 2, "tabular": 1}.items():
        constraint = Dropout(p=0.3)
        model, _ = prepare(make(name), constraint)
        assert constraint.report() == {"binds": 1, "places": places}
        assert all(module.p == 0.3 for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("name", ["llama", "gpt2", "tabular"])
def test_dropout_and_lora_in_either_order(name):
    outputs = []
    for reverse in (False, True):
        constraints = [LoRA(rank=2, dropout=0.5), Dropout(p=0.3)][:: -1 if reverse else 1]
        model, _ = prepare(make(name), *constraints)
        large_steps(model, lr=0.1)
        torch.manual_seed(5)
        outputs.append(model.train()(IDS).logits)
        adapters = [
            m.p for key, m in model.named_modules() if ".lora_dropout." in key and isinstance(m, torch.nn.Dropout)
        ]
        assert set(adapters) == {0.5}
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


# KL


def logps(policy, reference, item, **options):
    """Log-probs without pairs."""
    none = torch.zeros(0)
    item = torch.tensor(item)
    return Logps(policy, reference, torch.ones(len(item)), item, none.view(0, 2).long(), none, none, **options)


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


def test_kl_budget_is_met_in_the_end():
    """Rewards far stronger than the budget: without the multiplier the KL would end at log 4."""
    constraint = KLBudget(budget=0.2, rate=0.3)
    policy = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    reference, rewards = torch.zeros(8, dtype=torch.float64), torch.tensor([5.0, 0, 0, 0, -1, 3, -1, -1])
    for _ in range(800):
        lp = logps(policy, reference, [0, 0, 0, 0, 1, 1, 1, 1])
        probabilities = torch.cat([part.softmax(0) for part in policy.split(4)])
        loss = (constraint.penalty(lp).sum() - (probabilities * rewards).sum()) / 2
        (gradient,) = torch.autograd.grad(loss, policy)
        with torch.no_grad():
            policy -= 0.5 * gradient
        constraint.after_step(None, {name: float(v.mean()) for name, v in constraint.measure(lp).items()})
    kl = [float((part.softmax(0) * (part.log_softmax(0) + math.log(4))).sum()) for part in policy.split(4)]
    assert np.mean(kl) == pytest.approx(0.2, rel=1e-3)
    report = constraint.report()
    assert report["binds"] == 1
    assert report["multiplier"] > 1
    assert report["boundary_distance"] == pytest.approx(0.2 - np.mean(kl), abs=1e-4)


def test_kl_multiplier_follows_dual_ascent_and_never_falls_below_zero():
    constraint = KLBudget(budget=0.5, rate=2.0)
    seen = []
    for kl in (1e3, 0.6, 0.0, 0.0, 1e9):
        constraint.after_step(None, {"kl_budget/kl": kl})
        seen.append(constraint.multiplier)
    assert seen == pytest.approx([1999, 1999.2, 1998.2, 1997.2, 2e9 + 1996.2])
    constraint.multiplier = 0.3
    constraint.after_step(None, {"kl_budget/kl": 0.0})
    assert constraint.report() == {"binds": 0, "boundary_distance": 0.5, "multiplier": 0}


# Stopping


def test_early_stop_at_a_step():
    stop = EarlyStop(step=3)
    reasons = [stop.stop_reason({"step": step}) for step in (1, 2, 3, 4)]
    assert reasons[:2] == [None, None]
    assert reasons[2] == "step 3 reached the limit of 3 steps"
    assert reasons[3] is not None
    assert stop.report() == {"binds": 1}


@pytest.mark.parametrize(
    ("options", "values", "stops", "best"),
    [
        ({}, [3, 2, 1, 1.5, 1.2, 1], True, 1),
        ({"patience": 1}, [3, 2, 2.5], True, 2),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.8, 2.6], True, 3),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.8, 2.4, 2.2], False, 2.4),
        ({"patience": 2, "mode": "max"}, [0.5, 0.7, 0.6, 0.8, 0.8, 0.7], True, 0.8),
        ({"patience": 2}, [1, math.nan, math.nan], True, 1),
        ({"patience": 2}, [5, 4, 3, 2, 1], False, 1),
    ],
)
def test_early_stop_with_patience(options, values, stops, best):
    stop = EarlyStop(metric="eval/loss", **options)
    reasons = []
    for value in values:
        assert stop.stop_reason({"step": 1, "loss": 0.0}) is None  # a step without an evaluation does not count
        reasons.append(stop.stop_reason({"step": 1, "eval/loss": value, "eval/other": 0.0}))
    assert reasons[:-1] == [None] * (len(values) - 1)
    assert (reasons[-1] or "").startswith("eval/loss has not improved") == stops
    report = stop.report()
    assert (report["binds"], report["best"]) == (stops, best)


def test_early_stop_metric_that_is_not_evaluated():
    with pytest.raises(ConfigError, match=r"eval/loss.*choose one of eval/accuracy"):
        EarlyStop(metric="eval/loss").stop_reason({"step": 1, "eval/accuracy": 1.0})


def test_early_stop_by_kl():
    stop = EarlyStop(kl=0.5)
    lp = logps(torch.tensor([0.0, -2.0]), torch.zeros(2), [0, 0])
    for scale, expected in ((0.5, False), (10.0, True)):
        pulled = logps(lp.policy * scale, lp.reference, [0, 0])
        metrics = {name: float(v.mean()) for name, v in stop.measure(pulled).items()}
        stop.after_step(None, metrics)
        p = np.exp(-2 * scale) / (1 + np.exp(-2 * scale))
        kl = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
        assert stop.report()["boundary_distance"] == pytest.approx(0.5 - kl, rel=1e-5)
        reason = stop.stop_reason({"step": 1})
        assert (reason is not None) == expected
    assert reason == "the KL to the reference, 0.6931 nats per Item, passed its limit of 0.5"


def test_measuring_costs_nothing_without_a_limit():
    assert EarlyStop(step=1).measure(logps(torch.zeros(2), torch.zeros(2), [0, 0])) == {}


# All


@NAMES
@pytest.mark.parametrize(
    "constraint",
    [
        *(LoRA(rank=2), LoRA(rank=2, dora=True), LoRA(rank=2, alpha=1, rslora=True), WeightDecay(strength=0.1)),
        *(L2ToStart(strength=1.0), L2Ball(radius=1.0), LinfBall(radius=0.01), SparseTopK(k=3), Dropout(p=0.5)),
        Freeze(patterns=["0|1"]),
        BiasOnly(),
    ],
    ids=lambda constraint: type(constraint).__name__ + ("_dora" if getattr(constraint, "dora", False) else ""),
)
def test_at_step_0_the_policy_is_the_reference(name, constraint):
    constraint = copy.deepcopy(constraint)
    try:
        model, _ = prepare(make(name), constraint)
    except ConfigError:
        assert isinstance(constraint, (Freeze, BiasOnly))
        assert name in ("llama", "qwen", "tabular")
        return
    torch.testing.assert_close(model.eval()(IDS).logits, make(name)(IDS).logits, rtol=1e-13, atol=1e-14)
