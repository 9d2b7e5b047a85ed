"""A KL budget on pairs without rewards: draws of the policy, what they say of its KL, and runs that are held to it."""

from __future__ import annotations

import signal
import time
from itertools import product

import forking
import pytest
import torch
import torch.nn.functional as F
from composing import composed, train
from ranked import together
from run_files import rows, same, timeless, weights
from small_runs import OWN, interrupted_at, jsonl

from cdpo.batch import Item
from cdpo.data.packing import pack
from cdpo.errors import ConfigError, Preempted
from cdpo.model.attention import ordinary_attention
from cdpo.model.logps import next_token_kl
from cdpo.system import checkpoint
from cdpo.training import draws, loop

KL, ESTIMATE = "constraint.kl_budget", "kl_budget/kl_sampled"
DRAWN = [*OWN, "constraint=kl_budget", f"{KL}.draws=5", f"{KL}.draw_every=3", f"{KL}.draw_tokens=3",
         f"{KL}.budget=0.02", "model.dtype=float64", "dataset=jsonl", "dataset.eval_size=3",
         "optimizer.learning_rate=0.003"]  # fmt: skip


def settings(tmp_path, *more, count=12):
    path = tmp_path / "rows.jsonl"
    return composed(*DRAWN, f"dataset.path={path if path.exists() else jsonl(path, count)}", *more)


def words_of(table):
    """Log-probs of all nine words of two letters; the last row of the table says how a word begins."""
    rows = table.log_softmax(1)
    return (rows[3][:, None] + rows[:3]).flatten()


def test_along_draws_next_tokens_differ_by_the_kl_in_the_mean():
    """All nine words, each with its probability: the sum is the KL of the distributions of words."""
    policy, reference = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = pack([Item([3], [list(word)], []) for word in product(range(3), repeat=2)])
    context = batch.input_ids.flatten()[batch.predict_at]
    along = next_token_kl(policy[context], reference[context], batch)
    ours, theirs = words_of(policy), words_of(reference)
    torch.testing.assert_close((ours.exp() * along).sum(), (ours.exp() * (ours - theirs)).sum(), rtol=1e-12, atol=0)


def test_a_token_that_cannot_be_counts_nothing():
    batch = pack([Item([1], [[0, 0]], [])])
    policy = torch.tensor([[0.0, 0.0, -torch.inf]]).expand(2, 3)
    reference = torch.zeros(2, 3)
    found = next_token_kl(policy, reference, batch)
    torch.testing.assert_close(found, 2 * torch.tensor([3 / 2], dtype=torch.float64).log())


def one_after_another(run):
    """The slow way: draw after draw by the ordinary forward pass, position after position by torch's own KL."""

    def said():
        for item in run.draws.scored.items:
            ids = torch.tensor([item.prompt + item.responses[0][:-1]])
            yield run.policy(input_ids=ids).logits[0, len(item.prompt) - 1 :].log_softmax(-1)

    with torch.no_grad(), run.change.at_start():
        start = list(said())
    return sum(F.kl_div(one, now, reduction="sum", log_target=True) for one, now in zip(start, said()))


@pytest.mark.parametrize("more", [[], ["constraint=[lora_r4,kl_budget]"]], ids=["full", "lora"])
def test_value_and_gradient_are_those_of_plain_passes(more, tmp_path, monkeypatch):
    real, seen = loop.take_step, []

    def compared(run):
        if run.state.step == 4:
            ours = draws.kl_along(run, run.draws.scored.batch(tuple(range(5)))).sum()
            found = [ours, *torch.autograd.grad(ours, run.parameters, allow_unused=True)]
            with ordinary_attention(run.policy):
                theirs = one_after_another(run)
                wanted = [theirs, *torch.autograd.grad(theirs, run.parameters, allow_unused=True)]
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
            seen.append(ours.item())
        real(run)

    monkeypatch.setattr(loop, "take_step", compared)
    train(settings(tmp_path, *more), tmp_path / "run")
    assert seen[0] > 1e-3


def recorded(monkeypatch):
    """The exact KL of the next token, a mean over all prompts, whenever the policy has drawn, and after 98 steps."""
    real, exact = loop.take_step, {}

    def next_token(run):
        with torch.no_grad(), ordinary_attention(run.policy):
            prompts = [torch.tensor([item.prompt]) for item in run.train.items]
            return torch.stack([run.policy(input_ids=ids).logits[0, -1].log_softmax(0) for ids in prompts])

    def stepping(run):
        if run.state.step in (run.draws.step, 98):
            run.policy.eval()
            now = next_token(run)
            with run.change.at_start():
                start = next_token(run)
            exact[run.state.step + 1] = float((now.exp() * (now - start)).sum(1).mean())
        real(run)

    monkeypatch.setattr(loop, "take_step", stepping)
    return exact


@pytest.mark.slow
def test_the_kl_is_estimated_and_ends_near_its_budget(tmp_path, monkeypatch):
    """One token, so that the KL is a sum over the vocabulary. Without a budget it would be far above.

    The estimate of the step after drawing is compared, a mean over 20 of the prompts.
    """
    exact = recorded(monkeypatch)
    one = ["beta=0.01", f"{KL}.draws=20", f"{KL}.draw_every=2", f"{KL}.draw_tokens=1", "trainer.max_steps=100",
           "trainer.eval_every=100"]  # fmt: skip
    free = train(settings(tmp_path, *one, f"{KL}.budget=100", f"{KL}.draw_every=100"), tmp_path / "free")
    assert free["constraint"]["kl_budget"]["multiplier"] == 0
    assert exact.pop(99) > 4
    held = train(settings(tmp_path, *one, f"{KL}.budget=0.2", f"{KL}.rate=0.01"), tmp_path / "held")
    assert held["constraint"]["kl_budget"]["binds"]
    late = [value for step, value in exact.items() if step > 50]
    assert sum(late) / len(late) == pytest.approx(0.2, rel=0.3)
    found = {row["step"]: row for row in rows(tmp_path / "held") if "loss" in row}
    assert found[1][ESTIMATE] == pytest.approx(0, abs=1e-9)
    off = [(found[s][ESTIMATE] - exact[s]) / found[s][f"{ESTIMATE}_stderr"] for s in exact if 1 < s < 99]
    assert abs(sum(off)) < 3 * len(off) ** 0.5
    assert held["certificate"]["status"] == "none"
    assert "draws of the policy" in held["certificate"]["says"]


@pytest.mark.slow
def test_many_tokens_are_held_to_a_budget_too(tmp_path):
    """Up to 12 tokens; without a budget above 10 nats. What a policy writes may become short: that must not end it."""
    many = ["beta=0.01", f"{KL}.draws=8", f"{KL}.draw_tokens=12", f"{KL}.budget=0.3", "trainer.max_steps=120",
            "trainer.eval_every=120", "optimizer.learning_rate=0.001"]  # fmt: skip
    free = train(settings(tmp_path, *many, f"{KL}.budget=1000"), tmp_path / "free")
    assert free["metrics"][ESTIMATE] > 10
    train(settings(tmp_path, *many), tmp_path / "held")
    late = [row[ESTIMATE] for row in rows(tmp_path / "held") if ESTIMATE in row and row["step"] > 60]
    assert sum(late) / len(late) == pytest.approx(0.3, rel=0.3)


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    for tokens in (10, 60, 4096):
        train(settings(tmp_path, f"trainer.tokens_per_micro_batch={tokens}"), tmp_path / str(tokens))
    whole = weights(tmp_path / "4096")
    for tokens in ("10", "60"):
        found = weights(tmp_path / tokens)
        assert max(float((found[name] - whole[name]).abs().max()) for name in whole) < 1e-9
    last = rows(tmp_path / "10")[-1]
    assert last["constraint/kl_budget/multiplier"] > 0


@pytest.mark.parametrize("more", [[], ["constraint=[lora_r4,dropout,kl_budget]"]], ids=["full", "lora_dropout"])
@pytest.mark.parametrize("step", [3, 5])  # when it draws, and between two draws
def test_k_steps_and_resume_equal_n_steps(more, step, tmp_path, monkeypatch):
    train(settings(tmp_path, *more), tmp_path / "whole")
    interrupted_at(step, monkeypatch)
    with pytest.raises(Preempted, match=f"after step {step}"):
        train(settings(tmp_path, *more), tmp_path / "parts")
    monkeypatch.undo()
    train(settings(tmp_path, *more), tmp_path / "parts")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_a_signal_while_it_draws_puts_that_off_and_loses_nothing(tmp_path, monkeypatch):
    train(settings(tmp_path), tmp_path / "whole")
    real = draws.continued

    def interrupted(run, *rest):
        if run.state.step == 3:
            run.session.signals.request("SIGTERM")
        return real(run, *rest)

    monkeypatch.setattr(draws, "continued", interrupted)
    with pytest.raises(Preempted, match="after step 3"):
        train(settings(tmp_path), tmp_path / "parts")
    monkeypatch.undo()
    found = checkpoint.newest(tmp_path / "parts" / "checkpoints")
    assert found[1]["draws"]["step"] == 0
    train(settings(tmp_path), tmp_path / "parts")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


@pytest.mark.slow
def test_kill_9_then_the_same_command(tmp_path):
    """Checkpoints at multiples of 5, draws at multiples of 7."""
    path = jsonl(tmp_path / "rows.jsonl", 12)
    command = ["-m", "cdpo.train", *DRAWN, f"dataset.path={path}", f"{KL}.draw_every=7", "trainer.max_steps=40",
               "trainer.checkpoint_every=5", f"output_root={tmp_path}"]  # fmt: skip
    forking.run(*command, "name=whole", check=True)
    folder = tmp_path / "parts"
    process, deadline = forking.Program(*command, "name=parts"), time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_bytes().splitlines()) < 20:
        assert process.poll() is None, process.err
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (checkpoint.newest(folder / "checkpoints") or [0])[0] in range(5, 40)
    forking.run(*command, "name=parts", check=True)
    assert same(weights(tmp_path / "whole"), weights(folder))
    assert timeless(tmp_path / "whole") == timeless(folder)


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    """Five draws: three for one rank, two for the other."""
    train(settings(tmp_path), tmp_path / "one")
    config = settings(tmp_path, "trainer.distributed=ddp")
    together([{"config": config, "folder": str(tmp_path / "two")}], tmp_path)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-9
    for ours, theirs in zip(timeless(tmp_path / "one"), timeless(tmp_path / "two")):
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["trainer.distributed=fsdp"], "kl_budget on pairs .*use trainer.distributed=ddp"),
        (["model.max_positions=30"], "draw_tokens of the constraint to 30"),
        ([f"{KL}.draws=1"], "draws=1; choose at least 2"),
        ([f"{KL}.draw_every=0"], "draw_every=0; choose at least 1"),
        (["optimizer=lbfgs", "trainer.batch_size=null"], "kl_budget with optimizer=lbfgs"),
    ],
)
def test_refused_on_pairs(tmp_path, more, message):
    more = [*more, f"{KL}.draw_tokens=25"]
    with pytest.raises(ConfigError, match=message):
        train(settings(tmp_path, *more), tmp_path / "run")


@pytest.mark.parametrize("key", ["draws", "draw_every", "draw_tokens"])
def test_where_rewards_are_known_nothing_is_drawn(key, tmp_path):
    with pytest.raises(ConfigError, match=rf"constraint.kl_budget.{key}=9 is for pairs without rewards"):
        train(composed(*OWN, "constraint=kl_budget", f"{KL}.{key}=9"), tmp_path / "run")
