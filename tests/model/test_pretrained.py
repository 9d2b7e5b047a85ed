"""Models and tokenizers from a folder: what is loaded, what is refused, and what the presets name."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import (
    BYTES,
    CONFIGS,
    DIMS,
    ITEMS,
    NO_DATA,
    POSITIONS,
    PROBE,
    SMALL,
    architectures,
    build,
    load,
    plain,
    random_weights,
)
from composing import node_of
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, OPTConfig

from cdpo.config import build as config
from cdpo.constraints.lora import LoRA
from cdpo.data.bandit import Bandit
from cdpo.errors import ConfigError
from cdpo.model.export import export
from cdpo.model.loglinear import LogLinear
from cdpo.model.pretrained import HuggingFace, check_lengths
from cdpo.model.tabular import Tabular
from cdpo.model.tiny import EOS, Tiny

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


def test_functional_dropout_is_zeroed():
    """OPT drops by plain floats on its modules; a loaded model must not drop in training mode."""
    from cdpo.model.pretrained import without_dropout

    sizes = {"ffn_dim": 20, "word_embed_proj_dim": 16, "max_position_embeddings": POSITIONS, **DIMS}
    config = OPTConfig(**sizes, dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    model = random_weights(build(config))
    with torch.no_grad():
        expected = plain(model, ITEMS["even"])
        copy.deepcopy(model).train()
        assert not torch.equal(plain(model.train(), ITEMS["even"]), expected)
        torch.testing.assert_close(plain(without_dropout(model).train(), ITEMS["even"]), expected)


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
    cls = {f"cdpo.model.{c.__name__}": c for c in (HuggingFace, LogLinear, Tiny, Tabular)}[node.pop("_target_")]
    assert list(node) == [field.name for field in dataclasses.fields(cls)]
    hub_id = node.pop("name_or_path", None)
    assert hub_id == ("some/model" if name == "hf" else HUB.get(name))
    node.pop("dtype")  # a choice of the preset
    for key, value in node.items():
        assert value == next(field.default for field in dataclasses.fields(cls) if field.name == key)


def test_no_preset_is_missing():
    own = {"hf", "tiny", "tabular", "loglinear"}
    assert {path.stem for path in (config.CONF / "model").glob("*.yaml")} == {*HUB, *own}
