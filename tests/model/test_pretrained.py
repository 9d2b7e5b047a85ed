"""Models and tokenizers: what is loaded, what is refused, and exports that transformers and peft load again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, ITEMS, NO_DATA, POSITIONS, build, load, plain
from composing import node_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from cdpo.batch import Pair
from cdpo.config import build as config
from cdpo.constraints.lora import LoRA
from cdpo.data.bandit import Bandit
from cdpo.data.packing import pack
from cdpo.data.rows import Data, Ledger, Row
from cdpo.data.tokenise import tokenise
from cdpo.errors import ConfigError
from cdpo.model import attention
from cdpo.model.export import export
from cdpo.model.logps import score
from cdpo.model.pretrained import HuggingFace, check_lengths
from cdpo.model.tabular import Tabular
from cdpo.model.tiny import EOS, PAD, Tiny

SMALL = Tiny(hidden_size=16, heads=2, layers=1)
BYTES = SMALL.tokenizer(NO_DATA)
PROBE = torch.arange(60)[None]
architectures = pytest.mark.parametrize("name", CONFIGS)

# ------------------------------------------------------------------------------------------------------ the tiny model


@pytest.mark.parametrize("length", [1, 2])
def test_tiny_starts_clearly_away_from_uniform(length):
    """Total variation from the uniform distribution over the responses of each prompt, above 0.1."""
    dataset = Bandit(length=length, prompts=4)
    data = dataset.load(0)
    tokenizer = Tiny().tokenizer(data)
    items, _ = tokenise(data.train, tokenizer, dataset)
    with torch.no_grad():
        logps = plain(Tiny().load(tokenizer, data), items).view(4, 8**length)
    p = logps.softmax(1)
    distance = (p - 1 / 8**length).abs().sum(1) / 2
    assert distance.min() > 0.1
    assert p.max() < 0.9  # nor is it certain
    assert (p[0] - p[1]).abs().sum() > 0.05  # prompts differ


def weights(policy):
    return torch.cat([parameter.detach().double().flatten() for parameter in policy.parameters()])


def test_tiny_depends_on_its_own_seed_only():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        found.append(weights(SMALL.load(BYTES, NO_DATA)))
        assert torch.equal(torch.rand(3), expected)  # and leaves the run's random numbers alone
    assert torch.equal(*found)
    other = dataclasses.replace(SMALL, init_seed=1)
    assert not torch.allclose(weights(other.load(BYTES, NO_DATA)), found[0])


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_logit_std_is_the_spread_of_the_logits(std):
    with torch.no_grad():
        logits = Tiny(logit_std=std).load(BYTES, NO_DATA)(torch.arange(200)[None]).logits
    assert logits.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtypes_share_one_start(dtype):
    policy = dataclasses.replace(SMALL, dtype=dtype).load(BYTES, NO_DATA)
    assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}
    rounded = weights(SMALL.load(BYTES, NO_DATA)).to(getattr(torch, dtype)).double()
    assert torch.equal(weights(policy), rounded)


@pytest.mark.parametrize(
    "option",
    [{"hidden_size": 30}, {"hidden_size": 0}, {"heads": 0}, {"layers": 0}, {"vocab_size": 257}, {"logit_std": 0.0}],
)
def test_shapes_that_cannot_be_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Tiny(**option)


def test_the_smallest_shape_works():
    tiny = Tiny(hidden_size=2, heads=1, layers=1, max_positions=4).load(BYTES, NO_DATA)
    assert tiny(torch.tensor([[1, 2, 3, 4]])).logits.isfinite().all()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_bytes_round_trip(text):
    """Any text, and one token per byte."""
    ids = BYTES(text, add_special_tokens=False).input_ids
    assert BYTES.decode(ids) == text
    if "<|" not in text:
        assert len(ids) == len(text.encode())
        assert not {BYTES.eos_token_id, BYTES.pad_token_id} & set(ids)


def test_special_tokens_are_single_and_the_vocabulary_is_full():
    assert len(BYTES) == 258
    assert len(set(BYTES.get_vocab().values())) == 258
    assert BYTES(EOS, add_special_tokens=False).input_ids == [BYTES.eos_token_id]
    assert (BYTES.eos_token, BYTES.pad_token, BYTES.bos_token) == (EOS, PAD, None)


def test_merges_are_learnt_from_the_training_rows():
    """BPE's first merge is the most frequent pair of bytes; texts of the held-out rows are not looked at."""
    rows = [
        Row("a:1", "xyxyxy", ["xy xy xy", "ab"], [Pair(0, 1)]),
        Row("a:2", [{"role": "user", "content": "qr qr"}], ["qrqr", "z"], [Pair(0, 1)]),
    ]
    held_out = [Row("b:1", "mnmnmn" * 9, ["mn" * 9, "z"], [Pair(0, 1)])]
    data = Data(rows, held_out, Ledger())
    assert BYTES.get_vocab() == SMALL.tokenizer(data).get_vocab()  # 258 leaves no room for merges
    tokenizer = dataclasses.replace(SMALL, vocab_size=260).tokenizer(data)
    assert set(tokenizer.get_vocab()) - set(BYTES.get_vocab()) == {"xy", "qr"}
    assert len(tokenizer("xyqrmn", add_special_tokens=False).input_ids) == 1 + 1 + 2
    assert tokenizer.decode(tokenizer("xyqrmn é", add_special_tokens=False).input_ids) == "xyqrmn é"
    policy = SMALL.load(tokenizer, data)
    assert policy.get_input_embeddings().num_embeddings == policy.lm_head.out_features == 260


def test_the_chat_template_is_the_transcript_form():
    messages = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    text = BYTES.apply_chat_template(messages, tokenize=False)
    assert text == "\n\nHuman: Q?\n\nAssistant: A."
    asked = BYTES.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked)


# ------------------------------------------------------------------------------------------------------- Hugging Face


@architectures
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_folder_loads_without_dropout(folders, name, dtype):
    """The folder's weights in the wanted dtype; training mode computes what eval mode computes."""
    choice = HuggingFace(str(folders[name]), dtype)
    tokenizer = choice.tokenizer(NO_DATA)
    assert tokenizer.get_vocab() == BYTES.get_vocab()
    policy = choice.load(tokenizer, NO_DATA)
    saved = dict(build(CONFIGS[name]).named_parameters())
    for key, value in policy.named_parameters():
        assert torch.equal(value, saved.pop(key).to(getattr(torch, dtype)))
    assert not saved
    asked = [value for key, value in policy.config.to_dict().items() if "drop" in key and isinstance(value, float)]
    assert max(asked) > 0
    assert torch.equal(policy.eval()(PROBE).logits, policy.train()(PROBE).logits)


def test_a_home_folder_is_expanded(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders["llama"].parent))
    choice = HuggingFace("~/llama")
    assert choice.load(choice.tokenizer(NO_DATA), NO_DATA).config.model_type == "llama"


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "../no-such-folder", "~/no-such-folder"])
def test_a_missing_folder_is_named(name):
    for method in ("tokenizer", "load"):
        arguments = (NO_DATA,) if method == "tokenizer" else (BYTES, NO_DATA)
        with pytest.raises(ConfigError, match="no such folder"):
            getattr(HuggingFace(name), method)(*arguments)


@pytest.fixture
def folder(folders, tmp_path):
    """A llama's folder to spoil."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "llama"))


def refused(folder, match, tokenizer=BYTES):
    with pytest.raises(ConfigError, match=match) as caught:
        HuggingFace(str(folder)).load(tokenizer, NO_DATA)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    refused(tmp_path, "could not be loaded")
    with pytest.raises(ConfigError, match="could not be loaded"):
        HuggingFace(str(tmp_path)).tokenizer(NO_DATA)


def test_a_damaged_config_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "vocab')
    refused(folder, "could not be loaded")


def test_an_unknown_architecture_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    refused(folder, "could not be loaded")


def test_damaged_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "could not be loaded")


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "could not be loaded")


def test_weights_of_another_shape_are_refused(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 32, "head_dim": 8}))
    refused(folder, "could not be loaded")


def test_missing_weights_are_refused_not_drawn_at_random(folder):
    path = folder / "model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if "layers.1.mlp" not in key}
    save_file(kept, path, {"format": "pt"})
    refused(folder, r"lacks 3 weights of LlamaForCausalLM.*model\.layers\.1\.mlp\.down_proj\.weight")


def test_a_model_for_another_task_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    BertForSequenceClassification(BertConfig(vocab_size=258, **sizes)).save_pretrained(tmp_path)
    refused(tmp_path, "is it a causal language model")


def test_an_adapter_is_refused(folders, tmp_path):
    policy = LoRA(rank=1).wrap(load(folders["llama"]))
    export(policy, BYTES, tmp_path / "adapter")
    refused(tmp_path / "adapter", "is an adapter")


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    tokenizer = SMALL.tokenizer(NO_DATA)
    tokenizer.add_tokens(["<one more>"])
    refused(folder, "the tokenizer has 259 tokens, the model 258", tokenizer)


def test_padding_falls_back_to_the_end(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    assert HuggingFace(str(folder)).tokenizer(NO_DATA).pad_token == EOS


@architectures
def test_too_many_positions_are_refused(folders, name):
    policy = load(folders[name])
    check_lengths(policy, POSITIONS)
    with pytest.raises(ConfigError, match=f"has {POSITIONS + 1} tokens, the model knows {POSITIONS} positions"):
        check_lengths(policy, POSITIONS + 1)


def test_a_table_has_no_positions():
    data = Bandit(prompts=2, alphabet=2).load(0)
    check_lengths(Tabular().load(None, data), 10**9)


# ------------------------------------------------------------------------------------------------------------- export


def trained(policy):
    """Every trainable weight moved."""
    torch.manual_seed(5)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return policy.eval()


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def clean(folder):
    """No pickle, and no config that names an attention which only cdpo registers."""
    assert not [name for name in files(folder) if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    for path in folder.rglob("*.json"):
        assert attention.NAME not in path.read_text()


def same(found, policy, dtype="float64"):
    ordinary = {"attention_mask": torch.ones_like(PROBE)}
    with torch.no_grad(), attention.ordinary_attention(policy):
        expected = policy(PROBE, **ordinary).logits
        assert found.dtype == getattr(torch, dtype)
        assert torch.equal(found.eval()(PROBE, **ordinary).logits, expected)


@architectures
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_whole_model_reloads_through_transformers(folders, tmp_path, name, dtype):
    policy = trained(load(folders[name], dtype))
    export(policy, BYTES, tmp_path)
    clean(tmp_path)
    assert "model.safetensors" in files(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(again, policy, dtype)
    assert again.config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == BYTES.get_vocab()
    tied = CONFIGS[name].tie_word_embeddings
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    assert tied == (name in ("gpt2", "qwen3"))
    again = load(tmp_path, dtype)  # and starts another run
    torch.testing.assert_close(score(again, pack(ITEMS["even"])), score(policy, pack(ITEMS["even"])), rtol=0, atol=0)


@architectures
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_reloads_through_peft(folders, tmp_path, name, dora):
    policy = trained(LoRA(rank=2, dora=dora).wrap(load(folders[name])))
    export(policy, BYTES, tmp_path)
    clean(tmp_path)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files(tmp_path)
    assert not {"model.safetensors", "base/model.safetensors"} & files(tmp_path)  # the base has a folder of its own
    base = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64)
    before = base(PROBE).logits
    again = PeftModel.from_pretrained(base, tmp_path)
    same(again, policy)
    assert not torch.allclose(again(PROBE).logits, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_tiny_reloads_whole(tmp_path, dtype):
    policy = trained(dataclasses.replace(SMALL, dtype=dtype).load(BYTES, NO_DATA))
    export(policy, BYTES, tmp_path)
    clean(tmp_path)
    same(AutoModelForCausalLM.from_pretrained(tmp_path), policy, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_adapter_on_tiny_brings_its_base(tmp_path, dtype):
    start = dataclasses.replace(SMALL, dtype=dtype).load(BYTES, NO_DATA)
    expected = weights(start)
    attention.register()
    start.set_attn_implementation(attention.NAME)
    policy = trained(LoRA(rank=2).wrap(start))
    export(policy, BYTES, tmp_path)
    clean(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(weights(base), expected)
    same(AutoPeftModelForCausalLM.from_pretrained(tmp_path), policy, dtype)
    same(PeftModel.from_pretrained(base, tmp_path), policy, dtype)
    assert hasattr(policy, "peft_config")  # exporting does not take the adapter off the policy


# ------------------------------------------------------------------------------------------------------------ presets

HUB = {
    "gpt2": "openai-community/gpt2",
    "pythia_160m": "EleutherAI/pythia-160m",
    "pythia_1b4": "EleutherAI/pythia-1.4b",
    "pythia_2b8": "EleutherAI/pythia-2.8b",
    "llama3_1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3_0b6": "Qwen/Qwen3-0.6B",
    "qwen3_4b": "Qwen/Qwen3-4B",
}


def preset(name):
    return node_of("model", name)


@pytest.mark.parametrize("name", sorted(path.stem for path in (config.CONF / "model").glob("*.yaml")))
def test_presets_have_the_keys_of_their_class_in_order(name):
    node = preset(name)
    cls = {f"cdpo.model.{c.__name__}": c for c in (HuggingFace, Tiny, Tabular)}[node.pop("_target_")]
    assert list(node) == [field.name for field in dataclasses.fields(cls)]
    hub_id = node.pop("name_or_path", None)
    assert hub_id == ("some/model" if name == "hf" else HUB.get(name))
    node.pop("dtype")  # a choice of the preset
    for key, value in node.items():
        assert value == next(field.default for field in dataclasses.fields(cls) if field.name == key)


def test_no_preset_is_missing():
    assert {path.stem for path in (config.CONF / "model").glob("*.yaml")} == {*HUB, "hf", "tiny", "tabular"}
