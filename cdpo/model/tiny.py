"""A tiny random model that needs no download: for laptops, tests and the bandit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cdpo.data.rows import Data

EOS, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (  # for models that ship none: the HH transcript form
    "{% for m in messages %}{{ '\n\nAssistant: ' if m['role'] == 'assistant' else '\n\nHuman: ' }}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """A small Llama with random weights and a byte-level tokenizer: for laptops, tests and the bandit."""

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    vocab_size: int = 258  # 258: bytes and two special tokens; more: BPE merges trained on the data
    logit_std: float = 1.0  # spread of the initial logits; 0 would start from a uniform distribution
    max_positions: int = 4096
    init_seed: int = 0  # the weights do not depend on the run's seed: one reference for a whole sweep
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; choose at least 1")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 2 * heads = {2 * self.heads}")
        if self.vocab_size < 258:
            raise ValueError(f"vocab_size={self.vocab_size}; 258 (bytes and two special tokens) is the least")
        if not 0 < self.logit_std < math.inf:
            raise ValueError(f"logit_std={self.logit_std} must be positive and finite")

    def tokenizer(self, data: Data) -> PreTrainedTokenizerBase:
        """Byte-level BPE, trained on the training rows where vocab_size asks for merges; saved with the model."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[EOS, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        merges = self.vocab_size > 258  # without, text changes nothing
        tokenizer.train_from_iterator(_texts(data) if merges else [], trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, chat_template=CHAT_TEMPLATE
        )

    def load(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> PreTrainedModel:
        """Random weights from `init_seed`; the head is scaled so that initial logits have `logit_std`."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=max(8, 8 * self.hidden_size // 3 // 8 * 8),
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.max_positions,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            model = LlamaForCausalLM(config)
            # the last norm gives unit-variance features, so this is the spread of the logits
            torch.nn.init.normal_(model.lm_head.weight, std=self.logit_std / self.hidden_size**0.5)
        for parameter in model.parameters():  # not the rotary frequencies: from_pretrained keeps them in float32 too
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return model


def _texts(data: Data) -> Iterator[str]:
    """Every prompt and response of the training rows."""
    for row in data.train:
        yield from row.texts()
