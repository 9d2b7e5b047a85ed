"""Policy and tokenizer: Hugging Face causal language models, and a tiny random one that needs no download.

Each class is a group choice of conf/model/ with two methods, `tokenizer(data)` and `load(tokenizer, data)`; the model
they return is the reference. Constraints change it afterwards, nothing here trains.
"""

from __future__ import annotations

import copy
import errno
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from cdpo.errors import ConfigError
from cdpo.system.files import remove, replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cdpo.data.rows import Data

log = logging.getLogger(__name__)

EOS, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (  # for models that ship none: the HH transcript form
    "{% for m in messages %}{{ '\n\nAssistant: ' if m['role'] == 'assistant' else '\n\nHuman: ' }}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class HuggingFace:
    """Any causal language model that transformers can load, by hub id or local folder."""

    name_or_path: str
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    revision: str | None = None
    attention: str = "trees"  # trees (packed, falls back with a reason), or sdpa, eager, flash_attention_2 (padded)
    trust_remote_code: bool = False

    def _load(self, auto: Any, **options: Any) -> Any:
        from safetensors import SafetensorError

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


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout that the checkpoint's config asks for to zero: dropout is a constraint, never a side effect."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # applied as a function: attention_dropout, hidden_dropout, layerdrop
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
    return model


def check_lengths(model: PreTrainedModel, longest: int) -> None:
    """ConfigError if a prompt with its response, `longest` tokens, has more positions than the model knows."""
    known = getattr(model.config, "max_position_embeddings", None)
    if known is not None and longest > known:
        raise ConfigError(
            f"a prompt with its response has {longest} tokens, the model knows {known} positions: "
            f"lower dataset.max_prompt_tokens + dataset.max_response_tokens to {known}"
        )


def export(policy: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save as safetensors: an adapter for PeftModel.from_pretrained, or a whole model for from_pretrained.

    Beside an adapter whose base was built here (no hub id, no folder) the base is saved too, under `base/`; the adapter
    names its base by absolute path unless it is a hub id. `folder` is complete or not there. Raises DiskError.
    """
    remove(folder)  # of an earlier attempt that was killed before its run was finished
    with replacing(folder) as draft:
        try:
            if hasattr(policy, "peft_config"):
                _name_base(policy, draft, folder)
            policy.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
        except SafetensorError as error:  # its I/O errors are no OSErrors
            raise OSError(errno.EIO, str(error)) from error


def _name_base(policy: Any, draft: Path, folder: Path) -> None:
    """Tell the adapter where its base is, and save the base under its own names if nobody else has it."""
    name = policy.get_base_model().config.name_or_path
    if not name:
        copy.deepcopy(policy).unload().save_pretrained(draft / "base")
        name = str(folder.resolve() / "base")
    elif Path(name).is_dir():
        name = str(Path(name).resolve())
    for config in policy.peft_config.values():
        config.base_model_name_or_path = name
