"""What the config of a run holds: its schema. Groups are built from their own classes (`cdpo.config.build`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from cdpo.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MICRO_BATCH = 4096  # tokens: enough for a CPU, and what the reference is asked with
TABLES = ("cdpo.model.Tabular", "cdpo.model.LogLinear")
STARTS, FEW_STARTS = 128, 8  # of optimizer=exact, on a table and on another model
COUNTS = (  # keys of the trainer that are whole numbers, from 1 on; those of MAY_BE_0 from 0 on
    "batch_size", "tokens_per_micro_batch", "epochs", "max_steps", "eval_every", "log_every", "checkpoint_every",
    "keep_checkpoints", "samples", "sample_tokens", "certificate_items", "threads", "sync_reference",
)  # fmt: skip
MAY_BE_0 = ("samples", "certificate_items")


@dataclass(frozen=True)
class Trainer:
    """The loop: how long, in what portions, how often to look and to save."""

    batch_size: int | None = 16  # Items (prompts) per optimizer step; null: all of them
    tokens_per_micro_batch: int | None = None  # null: 4096; on a GPU what fits, up to 32768
    epochs: int = 1
    max_steps: int | None = None  # if set, replaces epochs
    max_grad_norm: float | None = 1.0  # gradient clipping; null: none
    sync_reference: int | None = None  # steps after which the loss's reference is moved, again and again; null: never
    sync_mixture: float = 1.0  # share of the policy in it, of weights
    eval_every: int = 50  # steps; the start and the end are always evaluated
    log_every: int = 1  # steps; a row holds the values of its own step
    checkpoint_every: int = 100  # steps; the end is always saved
    keep_checkpoints: int = 2
    samples: int = 0  # generations per evaluation, written to samples.jsonl
    sample_tokens: int = 64
    certificate_items: int = 256  # Items whose gradient at the end says how near the optimum is; 0: no certificate
    device: Literal["auto", "cpu", "cuda"] = "auto"
    distributed: Literal["none", "ddp", "fsdp"] = "none"  # one process; or several, which hold all weights, or shards
    threads: int | None = None  # of torch on the CPU; null: its default, one per core
    autocast: bool = False  # matrix products in bfloat16, weights as loaded
    gradient_checkpointing: bool = False
    compile: bool | None = None  # null: on a GPU, from 500 steps on

    def __post_init__(self) -> None:
        for key in COUNTS:
            value, least = getattr(self, key), 0 if key in MAY_BE_0 else 1
            if value is not None and value < least:
                raise ValueError(f"{key}={value} must be at least {least}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be positive, or null for no clipping")
        if not 0 < self.sync_mixture <= 1:
            raise ValueError(f"sync_mixture={self.sync_mixture} must lie in (0, 1]; 1 makes a copy of the policy")
        if self.sync_mixture < 1 and self.sync_reference is None:
            raise ValueError(f"sync_mixture={self.sync_mixture} is not used with sync_reference=null; set it to 1.0")

    @property
    def micro_batch(self) -> int:
        """Tokens of a micro-batch, at most. Another number changes rounding, the draws of dropout, and nothing else."""
        return self.tokens_per_micro_batch or MICRO_BATCH

    def size(self, items: int) -> int:
        """Items per step, of so many."""
        return min(self.batch_size or items, items)

    def steps(self, items: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or self.epochs * math.ceil(items / self.size(items))


@dataclass(frozen=True)
class Config:
    """One run. Groups are objects; `name` is the directory's, of a run or of a sweep (null: made from the config)."""

    model: Any
    dataset: Any
    loss: Any
    constraint: dict[str, Any]
    optimizer: Any
    trainer: Trainer
    logger: Any
    beta: float = 0.1  # of J, and of every loss whose file says ${beta}
    seed: int = 0
    restart: int = 0
    study: Any = None
    name: str | None = None
    output_root: str = "outputs"
    dry_run: bool = False  # acted on by the command line
    cache_dir: str | None = None
    allow_targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be a finite number above 0")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**31)")
        if not 0 <= self.restart < 1000:
            raise ValueError(f"restart={self.restart} must lie in [0, 1000)")

    @property
    def states(self) -> int:
        """Numbers kept beside each weight that is trained: the optimizer's, and that of a mixed reference."""
        return self.optimizer.states + (self.trainer.sync_mixture < 1)  # type: ignore[no-any-return]

    @property
    def draw(self) -> int:
        """Seed of everything random but the data: a restart draws it anew."""
        return (self.seed + 1_000_003 * self.restart) % 2**31


def starts_of(optimizer: Any, model: str) -> int:
    """`optimizer.starts` of optimizer=exact, or what null stands for with a model of that class."""
    return optimizer.starts or (STARTS if model in TABLES else FEW_STARTS)


def check_name(name: Any) -> None:
    """ConfigError unless `name` is None or names a directory that stays under the output root."""
    if name is not None and not NAME.fullmatch(str(name)):
        raise ConfigError(f"name={name!r} must match {NAME.pattern}")
