"""Causal language models of Hugging Face, with their tokenizers: loaded, and checked as far as weights alone allow.

A choice of conf/model/ is a class with two methods, `tokenizer(data)` and `load(tokenizer, data)`. The model that it
loads is the reference; constraints change it afterwards.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from cdpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cdpo.data.rows import Data

log = logging.getLogger(__name__)
RESPONSES = "dataset.max_prompt_tokens + dataset.max_response_tokens"


@dataclass(frozen=True)
class HuggingFace:
    """Any causal language model that transformers can load, by hub id or local folder."""

    name_or_path: str
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    revision: str | None = None
    attention: str = "trees"  # trees (packed, falls back with a reason), or sdpa, eager, flash_attention_2 (padded)
    trust_remote_code: bool = False

    def _load(self, auto: Any, **options: Any) -> Any:
        local = self.name_or_path.startswith(("/", "./", "../", "~"))
        name = str(Path(self.name_or_path).expanduser()) if local else self.name_or_path
        if local and not Path(name).is_dir():
            raise ConfigError(f"model.name_or_path={self.name_or_path}: no such folder")
        options |= {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            return auto.from_pretrained(name, **options)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"model.name_or_path={self.name_or_path} could not be loaded: {reason}") from error

    def tokenizer(self, data: Data) -> PreTrainedTokenizerBase:
        """The model's own tokenizer; without a pad token its EOS pads (rows are masked by length, never by id)."""
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer)
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            log.info("%s has no pad token; its EOS %r is used", self.name_or_path, tokenizer.eos_token)
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> PreTrainedModel:
        """The pretrained weights. Raises ConfigError if they cannot be had, are not all there, or are an adapter's."""
        from transformers import AutoModelForCausalLM

        implementation = "sdpa" if self.attention == "trees" else self.attention
        model, info = self._load(
            AutoModelForCausalLM,
            output_loading_info=True,
            dtype=getattr(torch, self.dtype),
            attn_implementation=implementation,
            use_safetensors=True,
        )
        rows = model.get_input_embeddings().num_embeddings
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ConfigError(
                f"model.name_or_path={self.name_or_path} is an adapter, and the reference must be a whole model: save "
                "PeftModel.from_pretrained(base, adapter).merge_and_unload() and name its folder"
            )
        if missing := sorted(info["missing_keys"]):
            raise ConfigError(
                f"model.name_or_path={self.name_or_path} lacks {len(missing)} weights of {type(model).__name__}, which "
                f"would be random, first {', '.join(missing[:3])}; is it a causal language model?"
            )
        if len(tokenizer) > rows:
            raise ConfigError(f"{self.name_or_path}: the tokenizer has {len(tokenizer)} tokens, the model {rows}")
        return without_dropout(model)

    def skeleton(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> PreTrainedModel:
        """The model's shapes without its weights: for a dry run. Raises ConfigError if its config cannot be had."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = self._load(AutoConfig)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, self.dtype), trust_remote_code=self.trust_remote_code
            )


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout that the checkpoint's config asks for to zero: dropout is a constraint, never a side effect."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # applied as a function: attention_dropout, hidden_dropout, layerdrop
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
    return model


def check_lengths(model: PreTrainedModel, longest: int, options: str = RESPONSES) -> None:
    """ConfigError if a prompt with its response, `longest` tokens by `options`, has more than the model's positions."""
    known = getattr(model.config, "max_position_embeddings", None)
    if known is not None and longest > known:
        raise ConfigError(
            f"a prompt with its response has {longest} tokens, the model knows {known} positions: "
            f"lower {options} to {known}"
        )
