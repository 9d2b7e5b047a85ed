"""Every shipped choice composes and builds; what cannot be used is refused with the key and the nearest valid name."""

from __future__ import annotations

import dataclasses

import pytest
from composing import chosen, composed, node_of
from omegaconf import OmegaConf

from cdpo.config import build as config
from cdpo.config.help import first_line, groups
from cdpo.config.identity import LATER, digest, flat, run_name
from cdpo.config.schema import NAME, Trainer
from cdpo.errors import ConfigError
from cdpo.losses.pairwise import IPO

CHOICES = [(path.parent.name, path.stem) for path in sorted(config.CONF.glob("*/*.yaml"))]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_builds(group, choice):
    spec = config.build(chosen(group, choice))
    assert dataclasses.is_dataclass(getattr(spec, group) if group not in ("constraint", "experiment") else spec)


@pytest.mark.parametrize(("group", "choice"), [(group, choice) for group, choice in CHOICES if group != "experiment"])
def test_a_choice_says_every_key_of_its_class_in_order(group, choice):
    """With what its file inherits; `none` has no class."""
    node = node_of(group, choice)
    if (group, choice) == ("constraint", "none"):
        assert node == {}
        return
    built = config.build(chosen(group, choice))
    found = built.constraint[choice] if group == "constraint" else getattr(built, group)
    known = [field.name for field in dataclasses.fields(found) if field.init]
    assert [key for key in node if key != "_target_"] == known


@pytest.mark.parametrize("choice", sorted(path.stem for path in config.CONF.glob("constraint/*.yaml")))
def test_a_constraint_has_a_package_of_its_own(choice):
    """Else the options of two constraints would overwrite each other."""
    own = "_global_" if choice == "none" else f"constraint.{choice}"
    assert (config.CONF / f"constraint/{choice}.yaml").read_text().startswith(f"# @package {own}\n")


FILES = sorted(path for path in config.CONF.rglob("*.yaml") if "worlds" not in path.parts)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(config.CONF)) for path in FILES])
def test_a_file_says_what_it_is_and_explains_what_it_sets(path):
    """Its first line is one sentence, and every key without an inherited explanation has a comment."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @")]
    assert lines[0].startswith("# ")
    assert len(first_line(path)) > 10
    assert first_line(path)[-1] in ".?:"
    if path.parent.name in ("constraint", "loss", "dataset", "model") and "defaults" not in path.read_text():
        keys = [line for line in lines if ": " in line and not line.startswith("#") and "_target_" not in line]
        unsaid = [line for line in keys if " # " not in line and not line.strip().startswith("max_positions")]
        assert len(unsaid) <= len(keys) / 3, unsaid


def test_help_lists_every_choice_of_every_group():
    listed = groups()
    assert {(group, choice) for group in listed for choice in listed[group]} >= set(CHOICES)


def test_trainer_section_has_the_keys_of_its_class():
    node = OmegaConf.load(config.CONF / "config.yaml").trainer
    trainer = Trainer()
    assert dict(node) == dataclasses.asdict(trainer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"foo": 1}, "unknown key foo"),
        ({"trainer": {"batchsize": 1}}, "unknown key trainer.batchsize, did you mean batch_size"),
        ({"trainer": {"batch_size": "four"}}, "trainer.batch_size='four'"),
        ({"trainer": {"batch_size": True}}, "trainer.batch_size=True"),
        ({"trainer": {"batch_size": 0}}, "batch_size=0 must be at least 1"),
        ({"trainer": {"autocast": "no"}}, "trainer.autocast='no'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"name": "../up"}, "name='../up' must match"),
        ({"name": "a/b"}, "name='a/b' must match"),
        ({"name": ".hidden"}, "must match"),
        ({"loss": {"_target_": "cdpo.losses.pairwise.IPO", "tua": 1.0}}, "unknown key loss.tua, did you mean tau"),
        ({"loss": {"_target_": "cdpo.losses.pairwise.IPO", "tau": "x"}}, "loss.tau='x'"),
        ({"loss": {"_target_": "cdpo.losses.pairwise.IPO", "tau": -1.0}}, "loss: tau"),
        ({"loss": {"_target_": "os.system"}}, "is not under cdpo."),
        ({"loss": {"_target_": "cdpo.losses.pairwise.torch.load"}}, "does not exist"),
        ({"loss": {"_target_": "cdpo.config.build.importlib"}}, "is not a dataclass"),
        ({"loss": {"_target_": "cdpo.losses.combined.WPO", "loss": {"_target_": "os.system"}}}, "loss.loss._target_"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_key(change, message):
    with pytest.raises(ConfigError) as error:
        config.build(composed() | change)
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_an_int_may_stand_for_a_float_and_nothing_else_is_coerced():
    spec = config.build(composed() | {"loss": {"_target_": "cdpo.losses.pairwise.IPO", "tau": 1}})
    assert spec.loss == IPO(tau=1.0)


def test_allowed_prefixes_admit_targets_of_ones_own(tmp_path, monkeypatch):
    lines = ("from dataclasses import dataclass", "@dataclass(frozen=True)", "class Mine:", "    beta: float = 0.1")
    (tmp_path / "my_losses.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    node = composed() | {"loss": {"_target_": "my_losses.Mine", "beta": 0.2}}
    with pytest.raises(ConfigError, match="allow_targets"):
        config.build(node)
    assert config.build(node | {"allow_targets": ["my_losses."]}).loss.beta == 0.2


def test_nested_losses_are_built():
    loss = config.build(composed("loss=wpo", "loss@loss.loss=ipo", "loss.loss.tau=0.3")).loss
    assert loss.loss == IPO(tau=0.3)
    terms = config.build(composed("loss=dpo_sft")).loss.losses
    assert {name: type(term).__name__ for name, term in terms.items()} == {"dpo": "DPO", "sft": "SFT"}


def test_the_name_of_a_run_depends_on_what_determines_its_numbers_only():
    one = composed("loss=dpo", "seed=1")
    assert digest(one) == digest(dict(reversed(one.items())))
    same = ("trainer.compile=false", "trainer.tokens_per_micro_batch=4096")  # as null is on a CPU
    for free in ("logger=none", "output_root=elsewhere", "trainer.log_every=7", "name=other", *same):
        assert digest(composed("loss=dpo", "seed=1", free)) == digest(one)
    trained = ("seed=2", "loss.beta=0.2", "constraint=l2_ball", "trainer.batch_size=8", "dataset.prompts=3",
               "model.hidden_size=64", "optimizer.learning_rate=1e-4", "trainer.tokens_per_micro_batch=64",
               "trainer.compile=true")  # fmt: skip
    others = {digest(composed("loss=dpo", "seed=1", key)) for key in trained if "seed=2" not in key}
    others.add(digest(composed("loss=dpo", "seed=2")))
    assert len(others - {digest(one)}) == len(trained)


def test_keys_that_came_later_leave_the_digest_of_older_runs_as_it_was():
    """At the value that changes nothing a run is that of before the key; at another it is another run."""
    config = composed("loss=dpo", "constraint=kl_budget")
    assert LATER.items() <= flat(config).items(), "such a value is a key's default"
    older = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    older["constraint"] = {"kl_budget": dict(config["constraint"]["kl_budget"])}
    for key in LATER:
        *path, last = key.split(".")
        node = older
        for part in path:
            node = node[part]
        del node[last]
    assert digest(older) == digest(config)
    for key in LATER:
        assert digest(composed("loss=dpo", "constraint=kl_budget", f"{key}=0.5")) != digest(config)


def test_run_names_are_single_safe_path_components():
    name = run_name(composed("constraint=[lora_r8,weight_decay]"), {"dataset": "a/b", "model": "x", "loss": "$(y)"})
    assert NAME.fullmatch(name[:64])
    assert "/" not in name
    assert len(name) < 120


@pytest.mark.parametrize(
    ("choices", "rate"),
    [
        (["model=tiny"], 1e-3),
        (["model=tabular"], 3e-2),
        (["model=gpt2"], 1e-5),
        (["model=tiny", "optimizer=lbfgs"], 1.0),
        (["model=gpt2", "optimizer=rmsprop"], 5e-7),
        (["model=tiny", "optimizer=frank_wolfe"], None),
        (["model=tiny", "optimizer=sgd", "optimizer.learning_rate=7"], 7),
    ],
)
def test_the_learning_rate_suits_model_and_optimizer(choices, rate):
    assert composed(*choices)["optimizer"]["learning_rate"] == rate
