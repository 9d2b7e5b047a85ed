"""NaN and infinity: found before the optimizer steps with them or they are saved, and said with rows and advice."""

from __future__ import annotations

import math

import torch

from cdpo.errors import NumericsError
from cdpo.losses.loss import check_finite
from cdpo.system.files import write_json
from cdpo.training.run import Run


def nonfinite_error(run: Run, objective: float, norm: float) -> NumericsError:
    """Why the step cannot be taken: the responses whose log-probs are not finite, else all rows of the step.

    The rows are written to nonfinite.json.
    """
    if not run.ranks.sharded:
        run.ranks.on_all(lambda: _check_log_probs(run))
    items = [run.train.items[i] for i in run.plan.step_items(run.state.step)]
    sources, path = [item.source for item in items], run.directory.nonfinite
    if run.ranks.first:
        write_json(path, {"step": run.state.step, "objective": str(objective), "grad_norm": str(norm), "rows": sources})
    return NumericsError(
        f"step {run.state.step}: objective {objective}, gradient norm {norm}, on rows {', '.join(sources[:5])}"
        f"{' ...' if len(sources) > 5 else ''} (all in {path.name}). The optimizer did not step; an "
        "earlier checkpoint is kept. Lower optimizer.learning_rate, or look at these rows"
    )


@torch.no_grad()
def _check_log_probs(run: Run) -> None:
    """NumericsError with the responses whose log-probs are not finite, if that is what is wrong."""
    for indices in run.plan.shares(run.state.step, run.ranks.size)[run.ranks.rank]:
        batch = run.train.batch(tuple(indices))
        with run.autocast():
            check_finite(batch.logps(run.scorer(batch)[0]))


def check_weights(run: Run) -> None:
    """Raise NumericsError rather than save weights that are NaN, or too large for their change to have a norm."""
    if not math.isfinite(run.change.norm()):
        raise NumericsError(
            f"after step {run.state.step} the weights are not finite and not saved; an earlier checkpoint is kept. "
            "Lower optimizer.learning_rate"
        )
