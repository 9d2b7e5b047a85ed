"""What a training run is made of, what it must remember between two steps, and how it is saved and restored."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cdpo.batch import Item
from cdpo.config.schema import Trainer
from cdpo.constraints.constraint import Constraint
from cdpo.data.packing import Plan, Scored
from cdpo.errors import ConfigError
from cdpo.losses.loss import reward_beta
from cdpo.model.change import Change
from cdpo.model.logps import Scorer
from cdpo.model.moving_reference import MovingReference
from cdpo.model.sampling import Draws
from cdpo.optim import AdamW, Exact, FrankWolfe, OptimizerConfig, RMSprop
from cdpo.system import checkpoint
from cdpo.system.ranks import sharded_like, whole_tree
from cdpo.system.rng import rng_state, set_rng_state
from cdpo.training.session import Session

log = logging.getLogger(__name__)


@dataclass
class State:
    """What the loop itself must remember between two steps; tensors, generators and constraints are saved beside it."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # the last step after which the run was looked at: evaluated if due, asked whether to stop
    tokens: int = 0  # encoded in training so far
    ratio_sum: float = 0.0  # of the mean log-ratio of each step, nats
    synced: int = 0  # the step after which the reference of the loss was moved last; 0: never
    moved_ratio_sum: float = 0.0  # as ratio_sum, to the moved reference, of the steps since then
    stopped: str | None = None  # why training stopped before its last step
    first_gradient: float = 0.0  # norm of the gradient at the first step, as `cdpo.model.gradient` counts it
    proof: str = ""  # why what a search found is the optimum, if it is: "convex" or "closed form"
    search: dict[str, Any] = field(default_factory=dict)  # what it says of that optimum
    certificate: dict[str, Any] = field(default_factory=dict)  # of the end
    step_metrics: dict[str, float] = field(default_factory=dict)  # metrics of the step just done
    latest: dict[str, float] = field(default_factory=dict)  # newest value of every metric

    @property
    def baseline(self) -> float:
        """Mean log-ratio over the pairs of all earlier steps, nats: what Logps.baseline holds."""
        return self.ratio_sum / self.step if self.step else 0.0

    @property
    def moved_baseline(self) -> float:
        """The same over the steps since the reference was moved, by the moved one: what Logps.baseline holds then."""
        steps = self.step - self.synced
        return self.moved_ratio_sum / steps if steps else 0.0


@dataclass(kw_only=True)
class Run:
    """One training run: a policy that starts as the reference, what it learns from, and what holds it back."""

    session: Session
    scorer: Scorer  # of the policy, wrapped by the constraints already
    tokenizer: Any
    train: Scored
    held_out: Scored
    trainer: Trainer  # that of the config, with micro-batches for which the device has room
    data_rates: dict[str, float] = field(default_factory=dict)  # shares of rows cut and dropped, logged with each step

    def __post_init__(self) -> None:
        spec, items = self.session.spec, self.train.items
        self.policy: Any = self.scorer.model
        self.loss, self.optimizer_config = spec.loss, spec.optimizer
        self.constraints: dict[str, Constraint] = spec.constraint
        self.searches = isinstance(self.optimizer_config, Exact)
        self.frank_wolfe = isinstance(self.optimizer_config, FrankWolfe)
        self.ranks, self.device, self.directory = self.session.ranks, self.session.device, self.session.directory
        self.autocast = self.session.autocast
        self.reward_beta, self.objective_beta = reward_beta(self.loss, spec.beta), spec.beta
        self.reads_baseline = getattr(self.loss, "reads_baseline", False)
        check_sizes(self.optimizer_config, self.trainer, self.constraints, len(items), len(self.held_out.items))
        self.item_weights = [
            sum(pair.weight for pair in item.pairs) if self.loss.unit == "pair" else 1.0 for item in items
        ]
        self.plan = plan_of(self.trainer, items, spec.draw)
        if getattr(self.loss, "whole_steps", False):
            check_whole_steps(self.plan)
        warn_of_rescaling(self.optimizer_config, self.constraints)
        self.parameters = trained_parameters(self.policy)
        self.optimizer: Optimizer = self.optimizer_config.build(self.parameters)
        self.change = Change(self.policy)
        self.moving = MovingReference(self.change, self.trainer.sync_mixture)
        self.state = State()
        self.drawing = drawing_of(self.constraints, items)
        self.draws: Draws | None = None
        for constraint in self.constraints.values():
            constraint.begin(self.policy, self.change)

    @property
    def ended(self) -> bool:
        """Whether the last step is done, or a constraint has stopped training."""
        return self.state.step == self.plan.steps or self.state.stopped is not None

    def context(self) -> dict[str, Any]:
        """The training state that a loss may read."""
        step, last = self.state.step, self.plan.steps - 1
        baseline = self.state.baseline if self.reads_baseline else None
        return {"progress": step / last if step < last else 1.0, "baseline": baseline}


def drawing_of(constraints: Mapping[str, Constraint], items: Sequence[Item]) -> Constraint | None:
    """The constraint that acts on draws of the policy, if there is one, as the Items tell nothing of its KL."""
    bare = any(item.base is None for item in items)
    return next((one for one in constraints.values() if one.draws), None) if bare else None


def plan_of(trainer: Trainer, items: Sequence[Item], seed: int) -> Plan:
    """Which of these Items each step sees."""
    return Plan(
        sizes=[item.tokens for item in items],
        batch_size=trainer.size(len(items)),
        steps=trainer.steps(len(items)),
        seed=seed,
        micro_batch=trainer.micro_batch,
    )


def trained_parameters(policy: Any) -> list[torch.nn.Parameter]:
    """What is left to train. ConfigError if nothing is; a warning where weights are too coarse to be trained."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("no parameter is left to train: loosen the constraint")
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
        log.warning(
            "weights in 16 bits are trained: steps below 1/256 of a weight round away. "
            "Set model.dtype=float32 trainer.autocast=true, or train a LoRA, whose factors are float32"
        )
    return parameters


def warn_of_rescaling(optimizer: OptimizerConfig, constraints: dict[str, Constraint]) -> None:
    """A warning where the optimizer cannot end at the constrained optimum, however long it runs."""
    names = [name for name, constraint in constraints.items() if constraint.euclidean]
    if isinstance(optimizer, (AdamW, RMSprop)) and names:
        log.warning(
            "%s rescales the gradient weight by weight, so with %s it ends elsewhere than at the constrained optimum: "
            "use optimizer=exact on tables, else optimizer=sgd, or in a ball optimizer=frank_wolfe",
            type(optimizer).__name__,
            " and ".join(names),
        )


def check_sizes(
    optimizer: OptimizerConfig, trainer: Trainer, constraints: dict[str, Constraint], items: int, held_out: int
) -> None:
    """ConfigError for what does not go with so many Items."""
    if optimizer.full_batch and trainer.size(items) < items:
        name = type(optimizer).__name__.lower()
        raise ConfigError(f"optimizer={name} needs the full batch: set trainer.batch_size=null")
    if trainer.sync_reference and trainer.sync_reference >= (steps := trainer.steps(items)):
        raise ConfigError(
            f"trainer.sync_reference={trainer.sync_reference} in a run of {steps} steps moves no reference that a step "
            "reads: choose fewer, or null"
        )
    for name, constraint in constraints.items():
        watched = getattr(constraint, "metric", None)
        if watched and not held_out:
            raise ConfigError(f"constraint {name} watches {watched}, but no rows are held out")


def check_whole_steps(plan: Plan) -> None:
    """ConfigError if some step may be more than one micro-batch, for a loss that must see a step in one piece."""
    tokens = sum(sorted(plan.sizes)[-plan.batch_size :])
    if plan.batch_size > 1 and tokens > plan.micro_batch:
        raise ConfigError(
            f"the loss sorts all pairs of a step, which micro-batches of {plan.micro_batch} tokens would split: set "
            f"trainer.tokens_per_micro_batch={tokens}, or a smaller trainer.batch_size"
        )


def snapshot(run: Run) -> dict[str, Any]:
    """Everything that changes the trajectory; all ranks must ask for it together, the first gets it complete."""
    rng, *others = run.ranks.all_gather(rng_state())
    state = {
        "state": vars(run.state),
        "data": [run.train.fingerprint(), run.held_out.fingerprint()],
        "parameters": {name: p for name, p in run.policy.named_parameters() if p.requires_grad},
        "optimizer": run.optimizer.state_dict(),
        "constraints": {name: constraint.state_dict() for name, constraint in run.constraints.items()},
        "moving": run.moving.state_dict(),
        "draws": run.draws and run.draws.state_dict(),
        "rng": rng,
        "rng_of_other_ranks": others,
    }
    return whole_tree(state, keep=run.ranks.first)  # type: ignore[no-any-return]


def restore(run: Run) -> int:
    """Put the run back to its newest checkpoint. Returns that step, or -1 where there is none.

    Raises ConfigError if the checkpoint is of other data or of other parameters, or not the same on all ranks.
    """
    checkpoints = run.directory.checkpoints
    found = checkpoint.newest(checkpoints)
    if len(set(steps := run.ranks.all_gather(found and found[0]))) > 1:
        raise ConfigError(f"{checkpoints}: the ranks see checkpoints of steps {steps}; output_root must be shared")
    if found is None:
        return -1
    step, saved = found
    parameters = {name: p for name, p in run.policy.named_parameters() if p.requires_grad}
    if saved["data"] != [run.train.fingerprint(), run.held_out.fingerprint()]:
        raise ConfigError(f"{checkpoints}: the data or its tokens have changed since step {step}")
    if saved["parameters"].keys() != parameters.keys():
        raise ConfigError(f"{checkpoints}: the trained parameters have changed since step {step}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(sharded_like(saved["parameters"][name], parameter))
    run.optimizer.load_state_dict(_laid_out(saved["optimizer"], run.parameters))
    for name, constraint in run.constraints.items():
        constraint.load_state_dict(saved["constraints"][name])
    run.moving.load_state_dict(saved.get("moving", {}), run.train.items)
    if saved.get("draws"):
        run.draws = Draws.restored(saved["draws"], run.train)
    vars(run.state).update(saved["state"])
    rngs = [saved["rng"], *saved.get("rng_of_other_ranks", [])]
    if len(rngs) == run.ranks.size:
        set_rng_state(rngs[run.ranks.rank])
    log.info("resumed from step %d", step)
    return step


def _laid_out(optimizer: dict[str, Any], parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    """An optimizer's state, whose tensors are whole, as its parameters lie on the ranks."""
    state = {
        i: {
            key: sharded_like(value, parameters[i]) if isinstance(value, Tensor) else value
            for key, value in entry.items()
        }
        for i, entry in optimizer["state"].items()
    }
    return {**optimizer, "state": state}
