"""Shared by all tests: one thread, and a folder with a tiny model of each architecture."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config):
    """Tests mean the CPU, and what they start finds no GPU either, but for `pytest -m cuda`."""
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folder of each architecture in architectures.CONFIGS, as save_pretrained leaves it: weights and tokenizer."""
    from architectures import CONFIGS, save

    root = tmp_path_factory.mktemp("models")
    for name in CONFIGS:
        save(name, root / name)
    return {name: root / name for name in CONFIGS}
