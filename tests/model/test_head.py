"""The head that never holds all logits, against the plain one that does: values, gradients, statistics, room."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from architectures import ITEMS, SHAPE, build, gradients, load, plain, score
from torch import nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

from cdpo.constraints.lora import LoRA
from cdpo.data.packing import pack
from cdpo.model import fused_head, head
from cdpo.model.head import LeanHead, LogitTransform
from cdpo.model.layout import choose_layout, logit_transform_of
from cdpo.model.logps import Scorer, linear_head, one_by_one

M, WIDTH, V = 7, 5, 23
ROW = torch.tensor([0, 1, 2, 0, 3, 4, 0, 5, 6, 6])  # three responses start at position 0
TARGET = torch.tensor([3, 22, 0, 9, 1, 1, 3, 17, 0, 0])
SHAPES = {"plain": LogitTransform(), "scale": LogitTransform(scale=0.25), "cap": LogitTransform(cap=2.0)}
SLICES = {"one slice": 1 << 26, "three": 8 * M * 8, "one token each": 1}
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_slice = pytest.mark.parametrize("chunk", SLICES)


@pytest.fixture(params=["sliced", "fused"], autouse=True)
def way(request, monkeypatch):
    """As on a CPU; and as on a GPU, its kernels not compiled."""
    if request.param == "fused":
        monkeypatch.setattr(head, "FUSED", ("cpu",))
        monkeypatch.setattr(fused_head, "ALIGNED", 1)
    return request.param


def slices_of(monkeypatch, chunk):
    for module in (head, fused_head):
        monkeypatch.setattr(module, "CHUNK", chunk)


def parts(dtype=torch.float64, bias=False, frozen=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(WIDTH, V, bias=bias, dtype=dtype)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
        parameter.requires_grad_(not frozen)
    hidden = torch.randn(M, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, linear, torch.randn(len(ROW), generator=generator, dtype=torch.float64)


def by_autograd(hidden, linear, shape):
    """The definition, with all logits."""
    logits = linear(hidden) * shape.scale
    logits = logits if shape.cap is None else shape.cap * torch.tanh(logits / shape.cap)
    logp = logits.log_softmax(-1)
    return logp[ROW, TARGET], -(logp.exp() * logp).sum(-1), logits.mean(-1)


def backward(token, weight, hidden, linear):
    wanted = [hidden, *(p for p in linear.parameters() if p.requires_grad)]
    return torch.autograd.grad((token.double() * weight).sum(), wanted)


@every_shape
@every_slice
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
def test_it_is_the_plain_head(shape, chunk, dtype, bias, frozen, statistics, monkeypatch):
    slices_of(monkeypatch, SLICES[chunk])
    hidden, linear, weight = parts(dtype, bias, frozen)
    expected = by_autograd(hidden, linear, SHAPES[shape])
    found = LeanHead(linear, SHAPES[shape]).logps(hidden, ROW, TARGET, statistics)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    pairs = list(zip(found, expected))[: 3 if statistics else 1]
    pairs += zip(backward(found[0], weight, hidden, linear), backward(expected[0], weight, hidden, linear))
    for own, its in pairs:
        torch.testing.assert_close(own, its, rtol=tolerance, atol=tolerance)
    assert statistics or found.entropy is None


@every_shape
@every_slice
@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(shape, chunk, frozen, monkeypatch):
    """Finite differences; they go backward many times through one forward pass."""
    slices_of(monkeypatch, SLICES[chunk])
    hidden, linear, _ = parts(bias=True, frozen=frozen)

    def token(hidden, weight, bias):
        own = nn.Linear(WIDTH, V, dtype=torch.float64)
        del own.weight, own.bias
        own.weight, own.bias = weight, bias
        return LeanHead(own, SHAPES[shape]).logps(hidden, ROW, TARGET).logp

    leaves = (hidden, linear.weight.detach(), linear.bias.detach())
    for leaf in leaves[1:]:
        leaf.requires_grad_(not frozen)
    assert torch.autograd.gradcheck(token, leaves, nondet_tol=1e-12)  # a second pass computes again what the first kept


@pytest.mark.parametrize("frozen", [True, False])
def test_without_a_backward_pass_there_is_one_product(frozen):
    from torch.utils.flop_counter import FlopCounterMode

    hidden, linear, _ = parts(frozen=frozen)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        LeanHead(linear).logps(hidden, torch.arange(M), TARGET[:M])
    assert counter.get_total_flops() == 2 * M * WIDTH * V


def test_huge_and_impossible_logits_stay_finite():
    hidden, linear, _ = parts(bias=True)
    with torch.no_grad():
        linear.bias[5:8] = -math.inf
        linear.bias[2] = 1e4
    found = LeanHead(linear).logps(hidden, ROW, TARGET, statistics=True)
    expected = linear(hidden).log_softmax(-1)
    torch.testing.assert_close(found.logp, expected[ROW, TARGET])
    entropy = torch.special.entr(expected.exp()).sum(-1)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-10, rtol=0)
    assert torch.autograd.grad(found.logp.sum(), hidden)[0].isfinite().all()


@pytest.mark.parametrize("trained", [True, False])
def test_no_more_than_a_slice_of_logits_is_alive(trained, way, monkeypatch):
    """After every operation of forward and backward, the bytes of all that they made and still hold.

    Not compiled, what is done to logits takes several copies of a slice.
    """
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    held: dict[int, tuple[StorageWeakRef, int]] = {}
    peaks = [0]

    class Held(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            for name in [name for name, (storage, _) in held.items() if storage.expired()]:
                del held[name]
            peaks.append(max(peaks[-1], sum(size for _, size in held.values())))
            return out

    positions, vocabulary, width = 64, 512, 4
    slice_, gradient = 8 * positions * vocabulary // 8, 8 * vocabulary * width
    slices_of(monkeypatch, slice_)
    hidden = torch.randn(positions, width, dtype=torch.float64, requires_grad=True)
    linear = nn.Linear(width, vocabulary, bias=False, dtype=torch.float64).requires_grad_(trained)
    row = torch.arange(positions)
    with Held():
        LeanHead(linear).logps(hidden, row, row, statistics=True).logp.sum().backward()
    copies = {"sliced": 3, "fused": 6}[way]
    assert slice_ < peaks[-1] < copies * slice_ + 3 * gradient < 8 * positions * vocabulary


def test_bfloat16_weights_lose_no_more_than_their_logits_do():
    hidden, linear, weight = parts(torch.bfloat16)
    exact = linear(hidden).float().double().log_softmax(-1)[ROW, TARGET]
    found = LeanHead(linear).logps(hidden, ROW, TARGET)
    assert found.logp.dtype == torch.float32
    torch.testing.assert_close(found.logp.double(), exact, atol=1e-5, rtol=1e-5)
    for own, its in zip(backward(found.logp, weight, hidden, linear), backward(exact, weight, hidden, linear)):
        torch.testing.assert_close(own, its, atol=0.05, rtol=0.05)


def test_autocast_is_honoured():
    hidden, linear, weight = parts(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        exact = linear(hidden).double().log_softmax(-1)[ROW, TARGET]
        found = LeanHead(linear).logps(hidden, ROW, TARGET)
    torch.testing.assert_close(found.logp.double(), exact, atol=1e-5, rtol=1e-5)
    gradient = backward(found.logp, weight, hidden, linear)
    assert [g.dtype for g in gradient] == [torch.float32, torch.float32]
    for own, its in zip(gradient, backward(exact, weight, hidden, linear)):
        torch.testing.assert_close(own, its, atol=0.05, rtol=0.05)


MODELS = {
    "cohere, scaled": (CohereConfig(**SHAPE, num_key_value_heads=1, logit_scale=0.25), LogitTransform(scale=0.25)),
    "granite, divided": (
        GraniteConfig(**SHAPE, num_key_value_heads=1, logits_scaling=8.0),
        LogitTransform(scale=0.125),
    ),
    "gemma 2, capped": (
        Gemma2Config(**SHAPE, num_key_value_heads=1, head_dim=8, sliding_window=64, final_logit_softcapping=3.0),
        LogitTransform(cap=3.0),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_does_to_its_logits_is_found_out(name):
    config, shape = MODELS[name]
    model, items = build(config), ITEMS["uneven"]
    scorer = Scorer(model)
    choose_layout(scorer, items, "rows")
    assert scorer.logit_transform == shape
    found = score(model, pack(items, padded=True), shape)
    expected = plain(model, items)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    its = gradients(model, expected)
    for key, own in gradients(model, score(model, pack(items, padded=True), shape)).items():
        torch.testing.assert_close(own, its[key], rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """A model that does to its logits what nobody foresaw."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(4, 9, dtype=torch.float64)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, logits_to_keep, **_):
        hidden = torch.sin(input_ids[0, logits_to_keep, None] * torch.arange(1.0, 5, dtype=torch.float64))
        return SimpleNamespace(logits=self.lm_head(hidden)[None] ** 3)


def test_an_unknown_treatment_of_logits_is_left_to_the_model(folders):
    model, batch = Odd(), pack(ITEMS["uneven"])
    batch.target.clamp_(max=8)
    assert logit_transform_of(model, batch) is None
    found, statistics = Scorer(model)(batch, statistics=True)
    logp = model(batch.input_ids, batch.predict_at).logits[0].log_softmax(-1)[batch.position, batch.target]
    expected = [part.sum() for part in logp.split(batch.length.tolist())]
    torch.testing.assert_close(found, torch.stack(expected))
    assert statistics.entropy.isfinite().all()


class Sliced(LlamaForCausalLM):
    """A head that is wider than the vocabulary, as some pad it; PROBES pass through it unchanged."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = out.logits[..., : self.config.vocab_size - 9]
        return out


class Biased(LlamaForCausalLM):
    """Logits that take what only the whole vocabulary has."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = out.logits + torch.linspace(-1, 1, self.config.vocab_size)
        return out


@pytest.mark.parametrize("kind", [Sliced, Biased])
@pytest.mark.parametrize("wanted", ["trees", "sdpa"])
def test_what_probes_do_not_show_numbers_do(kind, wanted):
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SHAPE)).eval()
    items = [replace(item, responses=[[t % 20 for t in r] for r in item.responses]) for item in ITEMS["uneven"]]
    expected = one_by_one(model, items)
    scorer = Scorer(model)
    padded, _ = choose_layout(scorer, items, wanted)
    assert scorer.logit_transform is None
    torch.testing.assert_close(scorer(pack(items, padded=padded))[0], expected, rtol=0, atol=1e-4)


def test_adapted_hooked_and_compiled_heads_are_left_alone(folders):
    model = load(folders["llama"])
    assert linear_head(model) is model.lm_head
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert linear_head(model) is None
    handle.remove()
    handle = model.register_forward_pre_hook(lambda *_: None)  # which would miss the calls that leave the model out
    assert linear_head(model) is None
    handle.remove()
    adapted = LoRA(rank=1).wrap(model)
    assert linear_head(adapted) is model.lm_head
    adapted.register_forward_hook(lambda *_: None)
    assert linear_head(adapted) is None
    model.compile(backend="eager")
    assert linear_head(model) is None


def test_the_head_comes_back(folders):
    model = load(folders["llama"], packed=False)
    before = model.lm_head.forward
    assert logit_transform_of(model, pack(ITEMS["even"], padded=True)) == LogitTransform()
    assert model.lm_head.forward == before
    model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    assert logit_transform_of(model, pack(ITEMS["even"], padded=True)) is None
    assert model.lm_head.forward == before
