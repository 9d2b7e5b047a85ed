"""The tabular policy of the theory, as a causal language model: next-token logits depend on the last token only.

With one-token responses pi(y|x) = softmax(table[x]) exactly. The table is an ordinary weight matrix, so adapters,
freezing and projections act on it as on any other model's weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from cdpo.errors import ConfigError

if TYPE_CHECKING:
    from cdpo.data.rows import Data


class TabularConfig(PretrainedConfig):
    """`contexts` rows (one per token that can come last) by `symbols` columns (tokens that can come next)."""

    model_type = "cdpo_tabular"

    def __init__(self, contexts: int = 1, symbols: int = 1, **kwargs: Any) -> None:
        self.contexts, self.symbols, self.vocab_size = contexts, symbols, contexts
        super().__init__(**kwargs)


class TabularForCausalLM(PreTrainedModel, GenerationMixin):
    """logits(next | ..., last) = table[last]. Token ids: symbols first, then prompts."""

    config_class = TabularConfig
    _supports_attention_backend = _supports_sdpa = True  # it has no attention, so it supports any

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.contexts, config.symbols)
        self.post_init()
        self.generation_config.use_cache = False  # the last token is all it looks at

    def get_input_embeddings(self) -> nn.Module:
        """The table: it is looked up by the last token."""
        return self.table

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight)

    def forward(self, input_ids: Tensor, logits_to_keep: int | Tensor = 0, **_: Any) -> CausalLMOutput:
        """Logits [rows, tokens, symbols], at the positions `logits_to_keep` where that is a tensor."""
        if isinstance(logits_to_keep, Tensor):
            input_ids = input_ids[:, logits_to_keep]
        return CausalLMOutput(logits=self.table(input_ids))


@dataclass(frozen=True)
class Tabular:
    """A table of logits that starts as the world's reference policy. For dataset=bandit only."""

    dtype: Literal["float64", "float32"] = "float64"

    def tokenizer(self, data: Data) -> PreTrainedTokenizerFast:
        """One token per symbol and one per prompt; the longest known text wins. ConfigError without a world."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        if data.table is None:
            raise ConfigError("model=tabular needs dataset=bandit: other data has no finite set of responses")
        if both := set(data.symbols) & set(data.prompts):
            raise ConfigError(f"model=tabular: {min(both)!r} is a prompt and a response; rename one")
        texts = [*data.symbols, *data.prompts]
        tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}))
        known = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(known), behavior="isolated")
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    def load(self, tokenizer: PreTrainedTokenizerFast, data: Data) -> TabularForCausalLM:
        """The policy at its start, which is the reference."""
        table = torch.tensor(data.table, dtype=torch.float64)
        model = TabularForCausalLM(TabularConfig(*table.shape)).to(getattr(torch, self.dtype))
        with torch.no_grad():
            model.table.weight.copy_(table)
        return model
