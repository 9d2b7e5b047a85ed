"""What tells the runs of a report apart: labels of losses and constraints, levels, settings, the ceiling."""

from __future__ import annotations

import pytest
from table_of_runs import RLHF, labels, run


def test_varying_parameters_of_a_loss_become_its_label():
    rows = [run("gaussian", 0.5, loss__beta=b, loss__noise_scale=c, beta=b) for b in (0.1, 1.0) for c in (1.0, 2.0)]
    assert set(labels(*rows).runs["loss_label"]) == {"gaussian (noise_scale 1)", "gaussian (noise_scale 2)"}
    rows = run("dpo", 0.5, loss__beta=0.1), run("dpo", 0.5, loss__beta=1.0)
    assert list(labels(*rows).runs["loss_label"]) == ["dpo (beta 0.1)", "dpo (beta 1)"]
    rows = [run("wpo", 0.5, loss__loss___target_=f"cdpo.losses.{name}") for name in ("DPO", "IPO")]
    assert list(labels(*rows).runs["loss_label"]) == ["wpo (loss dpo)", "wpo (loss ipo)"]


def test_varying_parameters_of_a_constraint_become_its_label():
    rows = [run("dpo", 0.5, "lora_r8", constraint__lora_r8__rank=rank) for rank in (7, 8)]
    assert list(labels(*rows).runs["constraint_label"]) == ["lora_r8 (rank 7)", "lora_r8 (rank 8)"]
    both = run("dpo", 0.5, "lora_r8+dropout", constraint__lora_r8__rank=8, constraint__dropout__p=0.1)
    assert list(labels(*rows[:1], both).runs["constraint_label"]) == ["lora_r8 (rank 7)", "lora_r8 (rank 8) + dropout"]


def test_levels_of_a_family():
    rows = [run("dpo", 0.5, f"lora_r{r}", **{f"constraint__lora_r{r}__rank": r,
            f"constraint__lora_r{r}___target_": "cdpo.constraints.LoRA"}) for r in (1, 4)]  # fmt: skip
    found = labels(*rows, run("dpo", 0.5, "sparse_topk", constraint__sparse_topk__k=None,
                              constraint__sparse_topk__fraction=0.25)).runs  # fmt: skip
    assert list(zip(found["family"], found["level_name"], found["level"])) == [
        ("lora", "rank", 1.0), ("lora", "rank", 4.0), ("sparse_topk", "fraction", 0.25)]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "kind", "family"),
    [
        (["lora_r1", "lora_r16"], "LoRA", "lora"),
        (["early_stop", "early_stop_kl", "early_stop_metric"], "EarlyStop", "early_stop"),
        (["freeze_embeddings", "train_last_layers"], "Freeze", "freeze"),
        (["l2_ball"], "L2Ball", "l2_ball"),
    ],
)
def test_constraints_of_one_class_are_a_family(names, kind, family):
    target = f"cdpo.constraints.{kind}"
    rows = [run("dpo", 0.5, name, **{f"constraint__{name}___target_": target}) for name in names]
    assert set(labels(*rows).runs["family"]) == {family}


def test_what_follows_the_seed_or_the_constraint_is_no_setting():
    def one(seed, constraint, **more):
        return run("dpo", 0.5, constraint, seed, dataset__world_seed=10 + seed, dataset__copy=seed, **more)

    rows = [one(s, c, trainer__batch_size=b) for s in (0, 1) for c, b in (("none", None), ("l2_ball", 16))]
    rows += [one(2, "none", trainer__log_every=7, trainer__threads=3, logger___target_="x", name="y")]
    assert labels(*rows).settings == []
    assert labels(*rows, one(2, "none", trainer__batch_size=4)).settings == ["config.trainer.batch_size"]


def test_a_setting_that_follows_from_another_is_not_repeated():
    rows = [run("dpo", 0.5, model__layers=n, model___target_=n, model__width=w) for n, w in ((1, 8), (2, 8), (2, 16))]
    for row in rows:
        row["model"] = f"model{row['config.model.layers']}"
    assert labels(*rows).settings == ["model", "config.model.width"]


def test_the_ceiling_is_rlhf_on_true_rewards_with_the_beta_of_j():
    rows = run("rlhf", 1), run("rlhf", 1, loss__rewards="fitted"), run("rlhf", 1, loss__beta=0.5), run("dpo", 1)
    assert list(labels(*rows).runs["is_ceiling"]) == [True, False, False, False]
    learned = run("rlhf_learned", 1, loss___target_=RLHF, loss__rewards="fitted")
    assert list(labels(run("rlhf", 1), learned).runs["is_ceiling"]) == [True, False]


def test_studies_and_runs_without_config_are_not_labelled():
    study = run("gaussian", None, study___target_="cdpo.compressive_sensing.Recovery")
    missing = run("dpo", None, state="missing") | {"config.seed": None}
    assert list(labels(run("dpo", 0.5), study, missing).runs["loss"]) == ["dpo"]
