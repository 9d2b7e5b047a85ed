"""Shared by the tests of models: models of each architecture and dtype, loaded once."""

from __future__ import annotations

import pytest
from architectures import load


@pytest.fixture(scope="session")
def models(folders):
    """(packed, plain) models of an architecture and dtype with the same weights; loaded once."""
    kept = {}

    def get(name, dtype="float64"):
        if (name, dtype) not in kept:
            kept[name, dtype] = load(folders[name], dtype), load(folders[name], dtype, packed=False)
        return kept[name, dtype]

    return get
