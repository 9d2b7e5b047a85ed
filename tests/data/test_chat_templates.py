"""Conversations through chat templates: one EOS at the end, and templates that cannot be used."""

from __future__ import annotations

import pytest
from real_tokenizers import EOS, TOKENIZERS, byte_level, raw, row

from cdpo.data.rows import Dataset
from cdpo.data.tokenise import tokenise
from cdpo.errors import ConfigError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [{"role": "system", "content": "Be well."}, {"role": "user", "content": "hello"}]


def chat_tokenizer(template):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer


def test_conversations_go_through_the_chat_template():
    tokenizer = chat_tokenizer(CHATML)
    items, ledger = tokenise([row(CHAT)], tokenizer, Dataset())
    assert tokenizer.decode(items[0].prompt) == "<|system|>Be well.<end>\n<|user|>hello<end>\n<|assistant|>"
    assert [tokenizer.decode(ids) for ids in items[0].responses] == [
        " world<end>",
        " there<end>",
    ]  # one EOS, at the end
    assert items[0].responses[0].count(EOS) == 1
    assert ledger.notes["special_tokens"].count == 0  # the template's own do not count
    whole = [*CHAT, {"role": "assistant", "content": " world"}]
    joint = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert joint[: len(items[0].prompt + items[0].responses[0])] == items[0].prompt + items[0].responses[0]


def test_a_template_that_writes_no_eos_gets_one():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    items, _ = tokenise([row(CHAT)], tokenizer, Dataset())
    assert tokenizer.decode(items[0].responses[0]) == " world<end>"


def test_plain_turns_need_no_template_and_get_a_bos(tokenizer):
    items, _ = tokenise([row(CHAT, chosen="world", rejected="there")], tokenizer, Dataset(chat_template="plain"))
    bos = [1] if tokenizer is TOKENIZERS["metaspace"] else []
    assert items[0].prompt == bos + raw(tokenizer, "\n\nSystem: Be well.\n\nHuman: hello\n\nAssistant:")
    assert items[0].responses[0] == [*raw(tokenizer, " world"), EOS]


def test_templates_that_cannot_be_used_are_refused():
    with pytest.raises(ConfigError, match=r"has no chat template.*dataset\.chat_template=plain"):
        tokenise([row(CHAT)], byte_level(), Dataset())
    with pytest.raises(ConfigError, match=r"a:1: the chat template .*otherwise than alone"):
        tokenise([row(CHAT)], chat_tokenizer("{{ messages|length }}"), Dataset())
