"""A tiny model of each architecture of conf/model, a tokenizer and Items for it, the forward that all must equal."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from cdpo.batch import Item, Pair
from cdpo.data.rows import Data, Ledger
from cdpo.model import attention
from cdpo.model.head import UNCHANGED
from cdpo.model.logps import Scorer
from cdpo.model.pretrained import HuggingFace
from cdpo.model.tiny import Tiny

VOCABULARY = 258  # bytes, an end and a pad
POSITIONS = 64
SPECIAL = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    **SPECIAL,
}
DIMS = {key: SHAPE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, **SPECIAL}
CONFIGS = {  # with the dropout that GPT-2's own config has, and more
    "gpt2": GPT2Config(**GPT2, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
    "neox": GPTNeoXConfig(**SHAPE, attention_dropout=0.2, hidden_dropout=0.2),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=1, attention_dropout=0.2),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=8, attention_dropout=0.2, tie_word_embeddings=True),
}
NO_DATA = Data([], [], Ledger())
SMALL = Tiny(hidden_size=16, heads=2, layers=1)
BYTES = SMALL.tokenizer(NO_DATA)
PROBE = torch.arange(60)[None]
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}
IN_FLOAT32 = ("llama", "qwen3")  # their norms compute in float32 whatever the dtype is, and so do the gradients
architectures = pytest.mark.parametrize("name", CONFIGS)


def random_weights(model, seed=0):
    """Large enough that one wrong token in the context moves every log-prob. The model itself, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return model.eval()


def build(config, dtype=torch.float32, seed=0):
    """A causal language model of this config."""
    return random_weights(AutoModelForCausalLM.from_config(config).to(dtype), seed)


def save(name, folder):
    """The architecture as a folder that from_pretrained loads."""
    build(CONFIGS[name]).save_pretrained(folder)
    Tiny().tokenizer(NO_DATA).save_pretrained(folder)


def load(folder, dtype="float64", packed=True):
    """The model as a run loads it, attending over packed trees."""
    choice = HuggingFace(str(folder), dtype)
    model = choice.load(choice.tokenizer(NO_DATA), NO_DATA)
    if packed:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    return model


def make_items(*shapes, seed=0):
    """Items of random tokens; a shape is the prompt's length and the responses' lengths."""
    draw = random.Random(seed)

    def tokens(n):
        return [draw.randrange(2, VOCABULARY) for _ in range(n)]

    return [
        Item(tokens(n), [tokens(m) for m in responses], [Pair(0, 1)], source=f"data.jsonl:{i + 1}")
        for i, (n, responses) in enumerate(shapes)
    ]


ITEMS = {
    "uneven": make_items((5, [3, 7]), (1, [1, 4, 2]), (9, [2, 2, 6, 1, 3]), (3, [1, 1])),
    "even": make_items((4, [3, 5]), (4, [3, 5]), (4, [3, 5])),
    "one token": make_items((3, [1, 1, 1, 1]), (6, [1, 1])),
    "alone": make_items((7, [4, 1, 5])),
}


def plain_logits(model, item, response):
    """transformers' own forward over one sequence: the logits that predict the response's tokens. [L, vocabulary]"""
    ids = torch.tensor([item.prompt + response])
    return model(ids).logits[0, len(item.prompt) - 1 : -1]


def plain(model, items):
    """Summed log-probs by torch's cross-entropy, one sequence at a time. [S]"""
    cross_entropy = torch.nn.functional.cross_entropy
    return torch.stack(
        [
            -cross_entropy(plain_logits(model, item, response).double(), torch.tensor(response), reduction="sum")
            for item in items
            for response in item.responses
        ]
    )


def lean(model):
    """A scorer as `choose_layout` leaves it for these architectures, which do nothing to the logits of their head."""
    return Scorer(model, UNCHANGED)


def score(model, batch, shape=UNCHANGED):
    """Log-probs, with the head's work done in slices where the head is a plain matrix. [S]"""
    return Scorer(model, shape)(batch)[0]


def gradients(model, logps):
    """Of a sum of the log-probs with fixed uneven weights, by parameter name."""
    model.zero_grad()
    (logps.double() * torch.linspace(-1, 1.7, len(logps), dtype=torch.float64)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(policy):
    return torch.cat([parameter.detach().double().flatten() for parameter in policy.parameters()])


def close(found, expected, name, dtype="float64"):
    """Equal but for rounding."""
    tolerance = max(TOLERANCE[dtype], 2e-6 if name in IN_FLOAT32 else 0)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
