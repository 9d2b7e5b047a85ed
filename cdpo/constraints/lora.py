"""Low-rank adaptation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cdpo.constraints.constraint import Constraint
from cdpo.errors import ConfigError

if TYPE_CHECKING:
    from cdpo.model.change import Change


@dataclass
class LoRA(Constraint):
    """The change of every adapted matrix has rank at most `rank`; everything else keeps its value.

    Hu et al. 2021 (arXiv 2106.09685), by peft: W + alpha/rank * B A, with B = 0 at the start. Adapters have the base's
    dtype, but float32 on a bfloat16 or float16 base. A model without linear layers has its input embedding adapted.
    """

    rank: int
    alpha: float | None = None  # null: 2 * rank, so that ranks compare at one scaling of 2
    dropout: float = 0.0  # on the adapter's input, in train mode; embeddings have none
    target_modules: str | list[str] = "all-linear"  # all but the head; or a regular expression, or names of modules
    dora: bool = False  # Liu et al. 2024 (arXiv 2402.09353): trains the norms too, so the change may exceed the rank
    rslora: bool = False  # Kalajdzievski 2023 (arXiv 2312.03732): scaling alpha/sqrt(rank); needs alpha

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}; choose at least 1, or constraint=none")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}; choose a positive alpha, or null for 2 * rank")
        if self.alpha is None and self.rslora:
            raise ValueError("rslora compares ranks at one alpha, and alpha=null grows with the rank; set alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; choose it in [0, 1)")
        if not self.target_modules:
            raise ValueError("target_modules is empty; name modules, or choose all-linear")
        if self.dora:
            self.not_with_fsdp = "the norms of DoRA need the sharded weights whole; set dora=false"
            self.no_optimum = "the changes that a DoRA can make have no known tangents; set dora=false"
        if self.dropout:
            self.not_with_lbfgs = "its dropout makes the objective random; set dropout=0"
            self.no_optimum = "its dropout is noise in training; set dropout=0"

    @property
    def scaling(self) -> float:
        """What the product of the factors is multiplied with."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def conflict(self, other: Constraint) -> str:
        return "two adapters on one model; choose one" if isinstance(other, LoRA) else ""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The policy with adapters, all else frozen. ConfigError if no module matches `target_modules`."""
        assert isinstance(model, PreTrainedModel)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]  # any number
            lora_dropout=self.dropout,
            target_modules=self._targets(model),
            use_dora=self.dora,
            use_rslora=self.rslora,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores W transposed
            task_type=TaskType.CAUSAL_LM,
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"target_modules={self.target_modules!r}: {error}") from error

    def begin(self, model: nn.Module, change: Change) -> None:
        self.change = change

    def report(self) -> dict[str, float]:
        """`binds` is 1 where some adapted weight uses its rank in full, by the entropy of its singular values."""
        rank = self.change.effective_rank()
        return {"binds": float(rank > self.rank - 0.5), "rank": self.rank, "effective_rank": rank}

    def _targets(self, model: PreTrainedModel) -> str | list[str]:
        """What peft is asked to adapt: its "all-linear" never finds an embedding."""
        head = model.get_output_embeddings()
        linear = any(isinstance(module, (nn.Linear, Conv1D)) and module is not head for module in model.modules())
        if self.target_modules != "all-linear" or linear:
            return self.target_modules
        table = model.get_input_embeddings()
        return [name for name, module in model.named_modules() if module is table]
