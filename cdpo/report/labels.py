"""What tells the runs of a report apart: labels of losses and constraints, the settings that vary besides, the problem.

Pure functions of the table of `cdpo.report.runs`. Means are taken only over runs that agree in all of it but the seed.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdpo.config.identity import NOT_IN_DIGEST
from cdpo.report.runs import CONFIG, GROUPS

if TYPE_CHECKING:
    import pandas as pd

PENALTIES = ("weight_decay", "l2_to_start")  # constraints that are no sets: the same strength means another norm
NUMERICAL = (  # keys of trainer that change numbers by rounding at most
    *("samples", "sample_tokens", "certificate_items", "device", "threads"),
    *("tokens_per_micro_batch", "gradient_checkpointing", "compile"),
)
WITHOUT = ("loss.", "restart", "allow_targets", "study", *NOT_IN_DIGEST)
LEVELS = ("rank", "radius", "strength", "budget", "k", "fraction", "p", "step", "kl", "train_last_layers", "patience")
LOSS, CONSTRAINT = "loss_label", "constraint_label"


@dataclass(frozen=True)
class Labelled:
    """Runs that trained, with columns that say which may be compared; and the `settings`, which vary besides.

    loss_label, constraint_label: their names in tables, with those options that vary. family, level_name, level: the
    kind of constraint, and its number on the axis of a figure, such as lora, rank, 8. problem: all that a gap to RLHF
    must have in common; pool: the same but for the strength of a penalty. seeds: what draws the data and the start.
    setting: the `settings` of the run, which no mean may mix. is_ceiling: whether the run maximises J itself.
    """

    runs: pd.DataFrame
    settings: list[str]


def label(runs: pd.DataFrame) -> Labelled:
    """Give every run that trained (no study, a config) its labels, its problem and its seeds."""
    frame = _relevant(runs)
    words = frame[[c for c in frame if c.startswith(CONFIG) or c in (*GROUPS, "constraint")]].map(text)
    frame[LOSS], frame[CONSTRAINT] = _loss_labels(words), _constraint_labels(words)
    families = _families(frame.to_dict("records"))
    levels = [_level(row, families) for row in frame.to_dict("records")]
    for i, column in enumerate(("family", "level_name", "level")):
        frame[column] = [level[i] for level in levels]
    frame["is_ceiling"] = [_is_ceiling(row) for row in words.to_dict("records")]
    frame["is_ceiling"] = frame["is_ceiling"].astype(bool)  # without rows too
    frame["seeds"], frame["problem"] = _joined(words, _seeds(words)), _joined(words, _problem(words))
    strengths = tuple(f".{name}.strength" for name in PENALTIES)
    frame["pool"] = _joined(words, [column for column in _problem(words) if not column.endswith(strengths)])
    settings = _settings(words.assign(**{CONSTRAINT: frame[CONSTRAINT]}))
    frame["setting"] = [_said(row, settings) for row in words.to_dict("records")]
    return Labelled(frame, settings)


def names(constraint: Any) -> list[str]:
    """The constraints of a run, from its column `constraint`."""
    return [] if is_null(constraint) or constraint == "none" else str(constraint).split("+")


def shown(setting: str) -> str:
    """A setting's name for people."""
    return setting.removeprefix(CONFIG)


def text(value: Any) -> str:
    """A value for people and for comparison: "" for none, numbers without trailing zeros."""
    if is_null(value):
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{float(value):.12g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_null(value: Any) -> bool:
    """None, NaN or pandas' NA."""
    import pandas as pd

    return bool(pd.isna(value))


def _relevant(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that trained, with what is no part of their problem blanked out.

    The optimizer only searches, so it is none; unless the path decides (early_stop), or it shares in what is optimised:
    decoupled decay under AdamW is another penalty than under SGD, and with momentum a weaker one.
    """
    studies = [c for c in runs if c.startswith(f"{CONFIG}study") and c != f"{CONFIG}study"]
    trained = runs[f"{CONFIG}seed"].notna() if f"{CONFIG}seed" in runs else runs["state"] != "missing"
    frame = runs[trained & runs[studies].isna().all(axis=1)].copy()
    path = frame["constraint"].map(lambda c: any(name.startswith("early_stop") for name in names(c))).astype(bool)
    decays = frame["constraint"].map(lambda c: bool(set(names(c)) & set(PENALTIES))).astype(bool)
    for column in [c for c in frame if c == "optimizer" or c.startswith(f"{CONFIG}optimizer.")]:
        frame[column] = frame[column].where(path | (decays & column.endswith(("optimizer", "_target_", "momentum"))))
    if f"{CONFIG}trainer.eval_every" in frame:
        frame[f"{CONFIG}trainer.eval_every"] = frame[f"{CONFIG}trainer.eval_every"].where(path)
    return frame


def _said(row: dict[str, str], settings: list[str]) -> str:
    """`beta 0.1, dataset.pairs none`: the settings of a run; without those of the optimizer where it has no part."""
    parts = {name: row[name] or ("" if "optimizer" in name else "none") for name in settings}
    return ", ".join(f"{shown(name)} {value}" for name, value in parts.items() if value)


def _loss_labels(words: pd.DataFrame) -> list[str]:
    """The loss's name and those of its parameters that vary in the report, without a beta that is J's."""
    prefix, varying = f"{CONFIG}loss.", {}
    for name, same in words.groupby("loss"):
        varying[name] = [c for c in _varying(same, prefix) if not _equal(same, c, f"{CONFIG}beta")]
    return [_named(row["loss"], prefix, varying[row["loss"]], row) for row in words.to_dict("records")]


def _constraint_labels(words: pd.DataFrame) -> list[str]:
    """The names of a run's constraints, each with those of its parameters that vary in the report."""
    labels = []
    listed = [names(constraint) for constraint in words["constraint"]]
    prefixes = {name: f"{CONFIG}constraint.{name}." for one in listed for name in one}
    varying = {n: _varying(words[[n in one for one in listed]], prefix) for n, prefix in prefixes.items()}
    for one, row in zip(listed, words.to_dict("records")):
        labels.append(" + ".join(_named(name, prefixes[name], varying[name], row) for name in one) or "none")
    return labels


def _named(name: str, prefix: str, columns: list[str], row: dict[str, str]) -> str:
    """`name (rank 4, loss ipo)`: the values of those columns that have one; of a class its name."""
    listed = [
        f"{column.removeprefix(prefix).removesuffix('._target_')} {row[column].rpartition('.')[2].lower()}"
        if column.endswith("._target_")
        else f"{column.removeprefix(prefix)} {row[column]}"
        for column in columns
        if row[column]
    ]
    return f"{name} ({', '.join(listed)})" if listed else name


def _varying(words: pd.DataFrame, prefix: str) -> list[str]:
    columns = [c for c in words if c.startswith(prefix) and c != f"{prefix}_target_"]
    return [column for column in columns if words[column].nunique() > 1]


def _equal(words: pd.DataFrame, one: str, other: str) -> bool:
    return other in words and bool((words[one] == words[other]).all())


def _level(row: dict[str, Any], families: dict[str, str]) -> tuple[str, str | None, float]:
    """The family of a single constraint, and the number that says how tight it is; NaN if there is none."""
    listed = names(row["constraint"])
    family = "+".join(families[name] for name in listed) or "none"
    for key in LEVELS if len(listed) == 1 else ():
        value = row.get(f"{CONFIG}constraint.{listed[0]}.{key}")
        if isinstance(value, (int, float)) and not is_null(value):
            return family, key, float(value)
    return family, None, float("nan")


def _families(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Constraints of one class are a family, called what their names have in common: lora_r1 and lora_r2 are lora."""
    classes: dict[str, str] = {}  # of each constraint; its own name where no run says
    for row in rows:
        for name in names(row["constraint"]):
            classes[name] = text(row.get(f"{CONFIG}constraint.{name}._target_")) or classes.get(name, name)
    shared: dict[str, list[str]] = {}
    for name, kind in classes.items():
        shared.setdefault(kind, []).append(re.sub(r"_r\d+$", "", name))
    called = {kind: _common(stems) or kind.rpartition(".")[2].lower() for kind, stems in shared.items()}
    return {name: called[kind] for name, kind in classes.items()}


def _common(names: list[str]) -> str:
    """The words that all the names begin with: early_stop_kl and early_stop_metric share early_stop."""
    words = zip(*(name.split("_") for name in names))
    return "_".join(same[0] for same in itertools.takewhile(lambda column: len(set(column)) == 1, words))


def _is_ceiling(row: dict[str, str]) -> bool:
    """Whether the run maximises J itself: RLHF on the true rewards, with J's beta."""
    target, rewards = row.get(f"{CONFIG}loss._target_", ""), row.get(f"{CONFIG}loss.rewards", "")
    same_beta = row.get(f"{CONFIG}loss.beta", "") in ("", row.get(f"{CONFIG}beta", ""))
    return (target.endswith(".RLHF") if target else row["loss"] == "rlhf") and rewards in ("", "data") and same_beta


def _seeds(words: pd.DataFrame) -> list[str]:
    """Columns that only choose a draw, like seed and dataset.world_seed: runs that differ in them are repetitions."""
    return [column for column in words if column.startswith(CONFIG) and re.search(r"[._]seed$", column)]


def _problem(words: pd.DataFrame) -> list[str]:
    """Columns that decide what the optimum is, and how far a search could go; the loss is not among them."""
    without = tuple(f"{CONFIG}{name}" for name in (*WITHOUT, *(f"trainer.{key}" for key in NUMERICAL)))
    return ["constraint", *(c for c in words if c.startswith(CONFIG) and not c.startswith(without))]


def _joined(words: pd.DataFrame, columns: list[str]) -> list[str]:
    """One line `name=value` per column that has a value, run by run."""
    rows = words[columns].to_dict("records")
    return ["\n".join(f"{shown(name)}={value}" for name, value in row.items() if value) for row in rows]


def _settings(words: pd.DataFrame) -> list[str]:
    """Columns that vary among runs of one constraint, besides loss, seed and search, and follow from none before."""
    own = [c for c in _problem(words) if not c.startswith((f"{CONFIG}constraint.", "constraint"))]
    seeds = {c for c in own if c in _seeds(words) or _equal(words, c, f"{CONFIG}seed")}
    first = [c for c in (f"{CONFIG}beta", "model", "dataset", "optimizer") if c in words]
    kept: list[str] = []
    for column in dict.fromkeys([*first, *own]):
        if column not in seeds and words.groupby([CONSTRAINT, *kept])[column].nunique().max() > 1:
            kept.append(column)
    return kept


def titled(what: object, setting: object) -> str:
    """`l2_ball · radius 0.1`: a loss or constraint with what varies of its settings."""
    return f"{what} · {setting}" if setting else str(what)
