"""Noise on the policy's activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cdpo.constraints.constraint import Constraint

if TYPE_CHECKING:
    from cdpo.model.change import Change


@dataclass
class Dropout(Constraint):
    """In train mode the policy drops activations with probability p; in eval mode it is exactly the undropped function.

    Srivastava et al. 2014. Sets every nn.Dropout and every functional attention dropout that the model has; a model
    without nn.Dropout modules (Llama, the tabular policy) has its embeddings dropped. LoRA's own dropout is left alone.
    """

    p: float

    no_optimum = "dropout is noise in training, not a set of policies"
    not_with_lbfgs = "it makes the objective random, and L-BFGS's line search needs a fixed one; use sgd or adamw"

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"p={self.p}; choose it in (0, 1), or constraint=none")

    def conflict(self, other: Constraint) -> str:
        return "one would overwrite the other; choose one" if isinstance(other, Dropout) else ""

    def begin(self, model: Any, change: Change) -> None:
        """Not in `wrap`: only here it is known whether an adapter stands before the embedding."""
        modules = [module for name, module in model.named_modules() if ".lora_dropout" not in name]
        dropouts = [module for module in modules if isinstance(module, nn.Dropout)]
        for module in dropouts:
            module.p = self.p
        functional = [
            module for module in modules if isinstance(getattr(module, "attention_dropout", None), (int, float))
        ]
        for module in functional:
            module.attention_dropout = self.p
        if not dropouts:
            model.get_input_embeddings().register_forward_hook(self._drop)
        self.places = len(dropouts) + len(functional) + (not dropouts)

    def _drop(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, self.p, module.training)

    def report(self) -> dict[str, float]:
        """`places`: modules that drop."""
        return {"binds": 1.0, "places": float(self.places)}
