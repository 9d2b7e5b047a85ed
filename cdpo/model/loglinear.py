"""A log-linear policy, log pi(y|x) = log pi_ref(y|x) + phi(x, y) theta + const, whose prompts share parameters.

phi(x, y) = (sqrt(s) e_y, sqrt(1 - s) e_(x,y)): a part of theta moves a response's logit at all prompts at once, the
rest at one. So phi(x, y) phi(x', y) is the sharing s: 0 is a table, of 1 all prompts have the same change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from cdpo.errors import ConfigError
from cdpo.model.tabular import Tabular, TabularConfig, TabularForCausalLM

if TYPE_CHECKING:
    from cdpo.data.rows import Data


class LogLinearConfig(TabularConfig):
    """Of `contexts` and `symbols` as a table's; theta has `rows` rows of one number per symbol."""

    model_type = "cdpo_loglinear"

    def __init__(self, rows: int = 1, **kwargs: Any) -> None:
        self.rows = rows
        super().__init__(**kwargs)


class LogLinearForCausalLM(TabularForCausalLM):
    """logits(next | ..., last) = fixed[last] + features[last] theta; theta is trained, and is 0 at the reference."""

    config_class = LogLinearConfig  # type: ignore[assignment]  # a subclass

    def __init__(self, config: LogLinearConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.rows, config.symbols)  # theta: what adapters and projections act on
        self.register_buffer("fixed", torch.zeros(config.contexts, config.symbols))
        self.register_buffer("features", torch.zeros(config.contexts, config.rows))
        self.post_init()

    def forward(self, input_ids: Tensor, logits_to_keep: int | Tensor = 0, **_: Any) -> CausalLMOutput:
        """Logits [rows, tokens, symbols], at the positions `logits_to_keep` where that is a tensor."""
        if isinstance(logits_to_keep, Tensor):
            input_ids = input_ids[:, logits_to_keep]
        theta = self.table(torch.arange(self.config.rows, device=input_ids.device))  # with adapters, where it has some
        return CausalLMOutput(logits=(self.fixed + self.features @ theta)[input_ids])


@dataclass(frozen=True)
class LogLinear(Tabular):
    """A log-linear policy that starts as the world's reference policy. For dataset=bandit, responses of one symbol."""

    sharing: float = 1.0  # in [0, 1]: phi(x, y) phi(x', y), what two prompts have in common

    def __post_init__(self) -> None:
        if not 0 <= self.sharing <= 1:
            raise ConfigError(f"model.sharing={self.sharing}: choose it in [0, 1]; 0 is a table, 1 shares everything")

    def load(self, tokenizer: PreTrainedTokenizerFast, data: Data) -> TabularForCausalLM:
        """The policy at its start, which is the reference. ConfigError for responses of more than one symbol."""
        if any(response not in data.symbols for row in data.train for response in row.responses):
            raise ConfigError("model=loglinear has one feature per response: set dataset.length=1, or model=tabular")
        table, prompts, symbols = torch.tensor(data.table, dtype=torch.float64), len(data.prompts), len(data.symbols)
        config = LogLinearConfig(1 + prompts, contexts=len(table), symbols=symbols)
        model = LogLinearForCausalLM(config).to(getattr(torch, self.dtype))
        with torch.no_grad():
            model.fixed.copy_(table)
            model.features[symbols:, 0] = self.sharing**0.5
            model.features[symbols:, 1:] = (1 - self.sharing) ** 0.5 * torch.eye(prompts, dtype=table.dtype)
        return model
