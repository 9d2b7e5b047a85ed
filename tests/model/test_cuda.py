"""On a GPU: packed trees against one sequence at a time, at lengths around a block of flex_attention and far above.

Left out where there is none, and of the README's test command; launch/gpu.sh runs it.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from architectures import CONFIGS, make_items, random_weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cdpo.data.packing import pack
from cdpo.model.attention import ordinary_attention
from cdpo.model.layout import choose_layout, rounding_tolerance
from cdpo.model.logps import Scorer, one_by_one
from cdpo.model.pretrained import without_dropout

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
SHAPES = {  # the prompt's length and the responses', by the tokens to encode
    1: (1, [1, 1]), 5: (2, [2, 3]), 39: (20, [11, 10]), 127: (60, [40, 29]), 128: (60, [40, 30]), 
    3000: (1500, [1000, 502]),
}  # fmt: skip
WIDER = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096}  # heads of 16 numbers and more
GROUPED = {"llama": {"num_key_value_heads": 2, "head_dim": 16}, "qwen3": {"num_key_value_heads": 1, "head_dim": 32}}


def model_of(name: str, adapted: bool):
    """An architecture of the tests with room for 3,000 tokens, on the GPU; adapters that do not start at zero."""
    config = type(CONFIGS[name])(**CONFIGS[name].to_dict() | WIDER | GROUPED.get(name, {}))
    model = without_dropout(AutoModelForCausalLM.from_config(config))
    if adapted:
        transposed = {"fan_in_fan_out": name == "gpt2"}
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **transposed))
    return random_weights(model).cuda()


def scored(model, score, autocast: bool):
    """Log-probs of all responses, and the gradient of a weighted sum of them. [S], [parameters]"""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext():
        logps = score()
    (logps * torch.linspace(-1, 1, len(logps), device="cuda") / logps.detach().abs()).sum().backward()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return logps.detach(), torch.cat(gradients)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_trees_give_the_numbers_of_single_sequences(name, adapted, autocast):
    """In bfloat16 both are off the float32 numbers: packed ones by no more than twice the others' distance."""
    model = model_of(name, adapted)
    scorer = Scorer(model)
    assert choose_layout(scorer, make_items((4, [3, 2])), "trees") == (False, "")
    for tokens, shape in SHAPES.items():
        items = make_items(shape, seed=tokens)
        assert items[0].tokens == tokens
        batch = pack(items).to(torch.device("cuda"))
        exact, slope = scored(model, lambda items=items: plainly(model, items), autocast=False)
        found, gradient = scored(model, lambda batch=batch: scorer(batch)[0], autocast)
        if not autocast:
            assert (found - exact).abs().max() <= 0.1 * rounding_tolerance(torch.float32, batch.length).max(), tokens
            assert (gradient - slope).norm() <= 1e-4 * slope.norm(), tokens
            continue
        single, rough = scored(model, lambda items=items: plainly(model, items), autocast)
        allowed = 2 * (single - exact).abs().max() + 0.1 * rounding_tolerance(torch.bfloat16, batch.length).max()
        assert (found - exact).abs().max() <= allowed, tokens
        assert (gradient - slope).norm() <= 2 * (rough - slope).norm() + 0.02 * slope.norm(), tokens


def plainly(model, items):
    """`one_by_one` with the attention of transformers."""
    with ordinary_attention(model.get_base_model() if hasattr(model, "peft_config") else model):
        return one_by_one(model, items)
