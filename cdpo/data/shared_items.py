"""Items as runs share them: what they are known by, and the bytes that they are kept as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from io import BytesIO
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cdpo import __version__
from cdpo.batch import Item, Pair
from cdpo.data.rows import Dataset, Ledger, Row, Tally

Ids = list[int]


def slim() -> Callable[[Ids], Ids]:
    """Gives a list of token ids as one in which equal ids are one object: 8 bytes a token, not 36."""
    known: dict[int, int] = {}
    return lambda ids: [known.setdefault(i, i) for i in ids]


def key_of(rows: list[Row], tokenizer: Any, limits: Dataset) -> dict[str, Any]:
    """All that the Items depend on: the rows' text, the tokenizer as it spells itself, limits, versions."""
    import transformers

    text = hashlib.sha256()
    for row in rows:
        text.update(json.dumps([*vars(row).values()]).encode())
    kind = [type(tokenizer).__name__, tokenizer.name_or_path, tokenizer.chat_template, tokenizer.special_tokens_map]
    spelt = json.dumps([*kind, tokenizer.backend_tokenizer.to_str()], default=str)
    return {
        "format": 2,  # of `encoded`
        "rows": text.hexdigest(),
        "tokenizer": hashlib.sha256(spelt.encode()).hexdigest(),
        "limits": {name: getattr(limits, name) for name in Dataset.__dataclass_fields__},
        "versions": [__version__, transformers.__version__],
    }


def encoded(items: list[Item], ledger: Ledger) -> Tensor:
    """Lines of strict JSON, the ledger and then an Item each, as bytes. [n]"""
    plain = ([item.prompt, item.responses, item.pairs, item.rewards, item.source, item.base] for item in items)
    content = bytearray()
    for one in chain([asdict(ledger)], plain):
        content += json.dumps(one, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    return torch.frombuffer(content, dtype=torch.uint8)


def decoded(values: Tensor) -> tuple[list[Item], Ledger]:
    """What `encoded` was given. [n]"""
    lines = map(json.loads, BytesIO(values.numpy().data))
    ledger, slimmed, items = next(lines), slim(), []
    for prompt, responses, pairs, rewards, source, base in lines:
        tokens = slimmed(prompt), [slimmed(response) for response in responses]
        items.append(Item(*tokens, [Pair(*pair) for pair in pairs], rewards, source, base=base))
    for part in ("dropped", "notes"):
        ledger[part] = {kind: Tally(**tally) for kind, tally in ledger[part].items()}
    return items, Ledger(**ledger)
