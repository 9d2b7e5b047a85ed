"""From a composed config to objects: a dataclass is the schema of its node.

Unknown keys (with + too), wrong types and out-of-range values are ConfigErrors that name the key and what is valid.
Imports no torch: `--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cdpo.errors import ConfigError

HERE = Path(__file__).resolve().parents[1]
CONF = next(p for p in (HERE / "conf", HERE.parent / "conf") if (p / "config.yaml").is_file())  # wheel, or checkout
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# what may change between two launches of one run, because the numbers do not depend on it
FREE = (
    "name", "output_root", "cache_dir", "logger", "dry_run",
    "trainer.log_every", "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.distributed",
)  # fmt: skip


BUDGET = "trainer.tokens_per_micro_batch"
ENOUGH = 4096  # tokens of a micro-batch: its matrix products are large enough, and more would only take memory


@dataclass(frozen=True)
class Trainer:
    """The loop: how long, in what portions, how often to look and to save."""

    batch_size: int | None = 16  # Items (prompts) per optimizer step; null: all of them
    tokens_per_micro_batch: int | None = None  # null: 4096, or fewer where a GPU has no room for so many
    epochs: int = 1
    max_steps: int | None = None  # if set, replaces epochs
    max_grad_norm: float | None = 1.0  # gradient clipping; null: none
    eval_every: int = 50  # steps; the start and the end are always evaluated
    log_every: int = 1  # steps; a row holds the values of its own step
    checkpoint_every: int = 100  # steps; the end is always saved
    keep_checkpoints: int = 2
    samples: int = 0  # generations per evaluation, written to samples.jsonl
    sample_tokens: int = 64
    device: Literal["auto", "cpu", "cuda"] = "auto"
    distributed: Literal["none", "ddp", "fsdp"] = "none"  # one process; or several, which hold all weights, or shards
    threads: int | None = None  # of torch on the CPU; null: its default, one per core
    autocast: bool = False  # matrix products in bfloat16, weights as loaded
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        least = {"tokens_per_micro_batch": 1, "epochs": 1, "log_every": 1, "eval_every": 1, "checkpoint_every": 1}
        least |= {
            "keep_checkpoints": 1,
            "samples": 0,
            "sample_tokens": 1,
            "batch_size": 1,
            "max_steps": 1,
            "threads": 1,
        }
        for key, bound in least.items():
            if getattr(self, key) is not None and getattr(self, key) < bound:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {bound}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be positive, or null for no clipping")

    @property
    def budget(self) -> int:
        """Tokens per micro-batch, at most. Another number changes rounding, the draws of dropout, and nothing else."""
        return self.tokens_per_micro_batch or ENOUGH

    def size(self, items: int) -> int:
        """Items per step, of so many."""
        return min(self.batch_size or items, items)

    def steps(self, items: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or self.epochs * math.ceil(items / self.size(items))


@dataclass(frozen=True)
class Config:
    """One run. Groups are objects; `name` is the run directory's name (null: made from the choices and the content)."""

    model: Any
    dataset: Any
    loss: Any
    constraint: dict[str, Any]
    optimizer: Any
    trainer: Trainer
    logger: Any
    beta: float = 0.1  # of J, and of every loss whose file says so
    seed: int = 0
    restart: int = 0
    task: Any = None
    name: str | None = None
    output_root: str = "outputs"
    dry_run: bool = False  # acted on by the command line
    cache_dir: str | None = None
    allow_targets: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be a finite number above 0")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**31)")
        if not 0 <= self.restart < 1000:
            raise ValueError(f"restart={self.restart} must lie in [0, 1000)")

    @property
    def draw(self) -> int:
        """Seed of everything random but the data: a restart draws it anew."""
        return (self.seed + 1_000_003 * self.restart) % 2**31


def check_name(name: Any) -> None:
    """ConfigError unless `name` is None or names a directory that stays under the output root."""
    if name is not None and not NAME.fullmatch(str(name)):
        raise ConfigError(f"name={name!r} must match {NAME.pattern}")


def read(composed: Mapping[str, Any]) -> Config:
    """Build every object of a composed, resolved config; models and data are described, not loaded.

    Raises ConfigError for the first node that cannot be built, with the path of its key.
    """
    allow = ["cdpo.", *composed.get("allow_targets", [])]
    return _construct(Config, composed, "", allow)


def _build(node: Any, where: str, allow: Sequence[str], wanted: Any = Any) -> Any:
    """A node with `_target_` becomes that object, one for a dataclass that dataclass, anything else itself."""
    if isinstance(node, Mapping) and "_target_" in node:
        return _construct(_target(node["_target_"], where, allow), node, where, allow)
    if isinstance(node, Mapping) and dataclasses.is_dataclass(wanted):
        return _construct(wanted, node, where, allow)
    if isinstance(node, Mapping):
        return {key: _build(value, f"{where}.{key}", allow) for key, value in node.items()}
    return node


def _target(name: Any, where: str, allow: Sequence[str]) -> Any:
    """The class that `_target_` names, if its prefix is allowed."""
    if not isinstance(name, str) or not name.startswith(tuple(allow)):
        raise ConfigError(f"{where}._target_={name!r} is not under {', '.join(allow)}; see allow_targets")
    module, _, cls = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}._target_={name!r} does not exist") from error
    if not inspect.isclass(found) or not dataclasses.is_dataclass(found):
        raise ConfigError(f"{where}._target_={name!r} is not a dataclass")
    return found


def _construct(cls: Any, node: Mapping[str, Any], where: str, allow: Sequence[str]) -> Any:
    """`cls(**node)` after its keys and types were checked; a ValueError of the class gets the key's path."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    given = {str(key): value for key, value in node.items() if key != "_target_"}
    prefix = f"{where}." if where else ""
    for key in given.keys() - fields.keys():
        raise ConfigError(f"unknown key {prefix}{key}{nearest(key, fields)}; {cls.__name__} knows {', '.join(fields)}")
    built = {key: _build(value, prefix + key, allow, hints[key]) for key, value in given.items()}
    try:
        return cls(**_typed(cls, hints, built, prefix))
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where or 'config'}: {error}") from error


def _typed(cls: Any, hints: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values, checked against the annotations without coercion (an int may stand for a float)."""
    import pydantic

    checked = {}
    for key, value in values.items():
        options = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
        if isinstance(value, list) and typing.get_origin(hints[key]) is tuple:
            value = tuple(value)
        hint = Any if _is_interface(hints[key]) or dataclasses.is_dataclass(value) else hints[key]
        try:
            checked[key] = pydantic.TypeAdapter(hint, config=options).validate_python(value)
        except pydantic.ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise ConfigError(f"{prefix}{key}={value!r}: {problem[0].lower()}{problem[1:]}") from None
        except pydantic.PydanticUserError:  # a dataclass has no `config` to be given: it was built above
            raise ConfigError(f"{prefix}{key}={value!r}: input should be a section with keys") from None
    return checked


def _is_interface(hint: Any) -> bool:
    """Protocols and containers of them: their values were built from `_target_` nodes already."""
    parts = [hint, *typing.get_args(hint)]
    return any(getattr(part, "_is_protocol", False) for part in parts)


def nearest(key: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" if a known name is close, else nothing."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    items = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items()]
    return {k: v for item in items for k, v in item.items()}


def trajectory(composed: Mapping[str, Any]) -> dict[str, Any]:
    """What determines the numbers of a run: every key but the free ones, dotted."""
    keys = flat({k: v for k, v in composed.items() if k != "hydra"})
    keys["constraint"] = list(composed["constraint"])  # several act one after another: their order counts
    if keys.get(BUDGET, ENOUGH) is None:
        keys[BUDGET] = ENOUGH  # which it is, where a GPU does not force another
    return {k: v for k, v in keys.items() if not any(k == free or k.startswith(f"{free}.") for free in FREE)}


def digest(composed: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits of the trajectory's content, whatever the order of keys."""
    content = json.dumps(trajectory(composed), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def run_name(composed: Mapping[str, Any], choices: Mapping[str, Any]) -> str:
    """Directory of a run: readable choices, seed, digest. Two configs never share one, one config always finds its own.

    A `name` given by the user replaces the readable part in a sweep, and the whole in a single run.
    """
    constraints = "+".join(composed["constraint"]) or "none"
    draw = f"s{composed['seed']}" + (f"r{composed['restart']}" if composed["restart"] else "")
    parts = [choices.get("dataset"), choices.get("model"), choices.get("loss"), constraints, draw]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(map(str, parts)))
    return f"{slug[:100]}-{digest(composed)}"
