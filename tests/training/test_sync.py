"""The reference of the loss that moves to the policy, against loops that keep a second model; what it leaves alone."""

from __future__ import annotations

import copy
import csv

import pytest
import torch
import torch.nn.functional as F
from composing import composed, train
from run_files import rows, same, timeless, weights
from safetensors.torch import load_file
from small_runs import SMALL, interrupted_at, jsonl

from cdpo.config.identity import digest
from cdpo.errors import ConfigError, Preempted
from cdpo.training import job, loop, sync

SOFT = ["trainer.sync_mixture=0.6"]
TABLE = ["model=tabular", "logger=none", "dataset.prompts=5", "dataset.alphabet=4", "trainer.batch_size=2",
         "trainer.max_steps=8", "trainer.eval_every=4",
         "trainer.log_every=1"]  # fmt: skip


def log_probs(model, item) -> torch.Tensor:
    """Of an Item's responses, each by itself, token by token. [K], nats"""
    found = []
    for response in item.responses:
        logits = model(input_ids=torch.tensor([item.prompt + response]), use_cache=False).logits[0]
        log_softmax = logits[len(item.prompt) - 1 : -1].log_softmax(-1)
        found.append(sum(log_softmax[t, token] for t, token in enumerate(response)))
    return torch.stack(found)


def loss_of(name: str, policy, reference, item, z: float) -> tuple[torch.Tensor, float]:
    """Of an Item's only pair, with beta = 0.1; and the mean log-ratio of its two responses."""
    with torch.no_grad():
        fixed = log_probs(reference, item)
    (pair,) = item.pairs
    ratio = log_probs(policy, item) - fixed
    chosen, rejected = ratio[pair.winner], ratio[pair.loser]
    mean = float((chosen + rejected).detach() / 2)
    if name == "kto":
        z = max(0.0, z)
        return torch.sigmoid(0.1 * (z - chosen)) + torch.sigmoid(0.1 * (rejected - z)), mean
    return -F.logsigmoid(0.1 * (chosen - rejected)), mean


def slow(policy, run, loss: str, every: int, mixture: float) -> None:
    """Train a copy of the run's policy, by torch alone, beside a reference that TRL's SyncRefModelCallback moves."""
    policy.eval().set_attn_implementation("sdpa")
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], run.optimizer_config.learning_rate)
    ratios: list[float] = []
    for step in range(run.plan.steps):
        if step and step % every == 0:  # after that many steps: global_step % ref_model_sync_steps == 0
            for target, copied in zip(reference.parameters(), policy.parameters()):
                target.data.mul_(1.0 - mixture).add_(copied.data, alpha=mixture)
            ratios = []
        z = sum(ratios) / max(1, len(ratios))
        items = [run.train.items[i] for i in run.plan.step_items(step)]
        losses, means = zip(*(loss_of(loss, policy, reference, item, z) for item in items))
        ratios.append(sum(means) / len(means))
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("loss", "mixture", "constraint"),
    [("dpo", 1.0, "none"), ("dpo", 0.6, "none"), ("kto", 1.0, "none"), ("kto", 0.6, "none"), ("dpo", 1.0, "lora_r2")],
)
def test_weights_are_those_of_a_loop_with_a_second_model(loss, mixture, constraint, gpt2, tmp_path, monkeypatch):
    """Seven steps of SGD through two syncs, in two passes over the data: equal to 1e-10 in float64."""
    path = jsonl(tmp_path / "rows.jsonl", 8)
    config = composed("model=hf", f"model.name_or_path={gpt2}", "model.dtype=float64", "dataset=jsonl",
                      f"dataset.path={path}", "dataset.eval_size=2", "logger=none", "optimizer=sgd",
                      "optimizer.learning_rate=0.5", "trainer.max_grad_norm=null", "trainer.batch_size=2",
                      "trainer.max_steps=7", f"loss={loss}", f"constraint={constraint}", "trainer.sync_reference=3",
                      f"trainer.sync_mixture={mixture}", "beta=0.1")  # fmt: skip
    found = []

    def fitting(run):
        other = copy.deepcopy(run.policy)
        slow(other, run, loss, every=3, mixture=mixture)
        start = copy.deepcopy(run.policy)
        loop.fit(run)
        found.extend([start, other, run.policy])

    monkeypatch.setattr(job, "fit", fitting)
    train(config, tmp_path / "run")
    start, theirs, ours = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in found)
    assert float((ours - start).abs().max()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("more", [[], SOFT])
def test_steps_before_the_first_sync_are_those_of_a_run_without(more, tmp_path):
    train(composed(*TABLE), tmp_path / "without")
    train(composed(*TABLE, "trainer.sync_reference=5", *more), tmp_path / "with")
    one, two = timeless(tmp_path / "without"), timeless(tmp_path / "with")
    assert [row for row in one if row["step"] <= 5] == [row for row in two if row["step"] <= 5]
    assert [row for row in one if row["step"] == 6] != [row for row in two if row["step"] == 6]


def test_only_the_loss_and_rewards_of_training_read_the_moved_reference(tmp_path):
    """The step after a copy begins at a margin of 0; every KL, the budget's too, and all of eval/* know of no copy."""
    settings = [*TABLE, "constraint=kl_budget", "trainer.batch_size=null", "trainer.sync_reference=4", "loss=dpo"]
    summary = train(composed(*settings), tmp_path / "run")
    steps = {row["step"]: row for row in rows(tmp_path / "run") if "grad_norm" in row}
    before, after = steps[4], steps[5]
    assert before["rewards/margins"] > 0.01
    assert after["rewards/margins"] == pytest.approx(0, abs=1e-12)
    assert after["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert after["kl/candidates"] == after["kl_budget/kl"] > before["kl/candidates"] > 1e-4
    assert summary["metrics"]["eval/rewards/margins"] > before["rewards/margins"]
    assert summary["metrics"]["objective/kl"] == pytest.approx(summary["metrics"]["eval/kl/candidates"])
    train(composed(*settings[:-2], "loss=dpo"), tmp_path / "without")
    texts = [(tmp_path / name / "candidates.csv").read_text().splitlines() for name in ("run", "without")]
    one, two = ([row["log_reference"] for row in csv.DictReader(text)] for text in texts)
    assert one == two


def test_there_is_no_certificate_and_the_log_says_what_moves(tmp_path, caplog):
    caplog.set_level("INFO")
    found = train(composed(*TABLE, "trainer.sync_reference=3"), tmp_path / "run")["certificate"]
    assert (found["status"], found["mend"]) == ("none", "")
    assert "path" in found["says"]  # the word of reports
    assert "no objective is fixed" in found["says"]
    assert caplog.text.count("the reference moves to the policy") == 1


def test_moved_references_stay_out_of_the_cache_and_items_that_no_step_sees_unscored(tmp_path, monkeypatch):
    """Of 40 prompts a step sees 2, so 6 are scored at each sync; the cache is that of a run without."""
    seen, real = [], sync.log_probs

    def counting(scorer, scored, *rest):
        seen.append(len(scored.items))
        return real(scorer, scored, *rest)

    monkeypatch.setattr(sync, "log_probs", counting)
    base = [*TABLE, "dataset.prompts=40", "trainer.certificate_items=40", "trainer.checkpoint_every=1"]
    for name, more in {"with": ["trainer.sync_reference=3"], "without": []}.items():
        out = tmp_path / name
        train(composed(*base, *more, f"output_root={out}"), out / "run")
    assert seen == [6, 4]
    (one, two) = (next((tmp_path / name).glob(".cache/reference/*/*.safetensors")) for name in ("with", "without"))
    assert torch.equal(load_file(one)["values"], load_file(two)["values"])
    again = train(composed(*base, "beta=0.7", f"output_root={tmp_path / 'with'}"), tmp_path / "with" / "again")
    assert again["reference"] == "cache"


RESUMED = {
    "hard": [],
    "soft": SOFT,
    "lora": ["constraint=[lora_r2,dropout]"],
    "baseline": ["loss=kto", *SOFT],
    "several": ["trainer.sync_reference=1", *SOFT],
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_exactly_at_a_sync_between_two_and_within_one(name, tmp_path, monkeypatch):
    settings = composed(*SMALL, "trainer.sync_reference=3", *RESUMED[name])
    train(settings, tmp_path / "whole")

    def within(run, journal, every):
        run.session.signals.request("SIGTERM")
        move(run, journal, every)

    def killed(run):
        if run.state.step == 5:
            raise KeyboardInterrupt  # the newest checkpoint is that of step 3, from before the sync
        step(run)

    move, step = sync.sync, loop.take_step
    for how in (3, 4, 6, "within", "killed"):
        with monkeypatch.context() as patch:
            if how == "within":
                patch.setattr(sync, "sync", within)
            elif how == "killed":
                patch.setattr(loop, "take_step", killed)
            else:
                interrupted_at(how, patch)
            with pytest.raises(KeyboardInterrupt if how == "killed" else Preempted):
                train(settings, tmp_path / str(how))
        train(settings, tmp_path / str(how))
        assert same(weights(tmp_path / "whole"), weights(tmp_path / str(how)))
        assert timeless(tmp_path / "whole") == timeless(tmp_path / str(how))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["loss=simpo"], "loss SimPO reads no reference"),
        (["loss=cpo"], "loss Sum reads no reference"),
        (["loss=gaussian_constant_noise"], "loss Gaussian reads no reference"),
        (["loss=rlhf"], "loss RLHF is that of J"),
        (["loss=wpo_candidates", "loss.drawn=reference"], "what its pairs were drawn from"),
        (["optimizer=exact", "trainer.max_steps=1"], "optimizer Exact needs one fixed objective"),
        (["optimizer=lbfgs", "trainer.batch_size=null"], "optimizer LBFGS needs one fixed objective"),
        (["optimizer=frank_wolfe", "constraint=l2_ball", "trainer.batch_size=null"], "optimizer FrankWolfe needs"),
        (["constraint=lora_r2", *SOFT], "a mixture of two adapters lora_r2 has twice their rank"),
        (["trainer.sync_reference=8"], "in a run of 8 steps moves no reference"),
        (["trainer.sync_reference=0"], "sync_reference=0 must be at least 1"),
        (["trainer.sync_mixture=0"], r"sync_mixture=0.0 must lie in \(0, 1\]"),
        (["trainer.sync_reference=null", *SOFT], "is not used with sync_reference=null"),
    ],
)
def test_what_cannot_move_is_refused_by_name(options, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        train(composed(*TABLE, "trainer.sync_reference=2", *options), tmp_path / "run")


def test_runs_of_before_keep_their_names():
    now = composed("loss=dpo")
    before = {**now, "trainer": {k: v for k, v in now["trainer"].items() if not k.startswith("sync_")}}
    assert digest(now) == digest(before)
    moved = {digest(composed("loss=dpo", "trainer.sync_reference=4", *more)) for more in ([], SOFT)}
    assert len(moved | {digest(now)}) == 3
