"""Shared by the tests of training: a tiny GPT-2, which has biases and asks for dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a byte-level tokenizer, in a folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from cdpo.data.rows import Data, Ledger
    from cdpo.model.tiny import Tiny

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(folder)
    Tiny().tokenizer(Data([], [], Ledger())).save_pretrained(folder)
    return folder
