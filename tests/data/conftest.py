"""Shared by the tests of data: each of the two kinds of tokenizer."""

from __future__ import annotations

import pytest
from real_tokenizers import TOKENIZERS


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]
