"""Tokenised rows that runs share: the same text, tokenizer and limits are tokenised once. See cdpo.cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdpo import __version__
from cdpo.batch import Item, Pair
from cdpo.data.rows import Ledger, Limits, Row, Tally
from cdpo.data.tokenise import judge, tokenise
from cdpo.system.cache import OnBatch, once

FEW = 100  # rows that are tokenised sooner than a file is found


def tokenised(
    rows: list[Row], tokenizer: Any, limits: Limits, should_stop: Callable[[], None], shared: Path | None
) -> tuple[list[Item], Ledger]:
    """What `tokenise` gives, out of the folder `shared` where an earlier run has left it there; raises what that does.

    A tokenizer that is not of the tokenizers library (it has no complete text form to make a key of), no folder, or
    fewer than 100 rows: tokenised here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if shared is None or backend is None or len(rows) < FEW:
        return tokenise(rows, tokenizer, limits, should_stop)

    def compute(tell: OnBatch) -> Tensor:
        return _encoded(*tokenise(rows, tokenizer, limits, should_stop))

    values, here = once(
        shared, _key(rows, tokenizer, limits), len(rows), compute, lambda found: "", lambda done: should_stop()
    )
    items, ledger = _decoded(values)
    if not here:
        judge(ledger, limits)  # what a person is told of the rows does not depend on who tokenised them
    return items, ledger


def _key(rows: list[Row], tokenizer: Any, limits: Limits) -> dict[str, Any]:
    import transformers

    text = hashlib.sha256()
    for row in rows:
        text.update(json.dumps([*vars(row).values()]).encode())
    kind = [type(tokenizer).__name__, tokenizer.name_or_path, tokenizer.chat_template, tokenizer.special_tokens_map]
    spelt = json.dumps([*kind, tokenizer.backend_tokenizer.to_str()], default=str)
    return {
        "rows": text.hexdigest(),
        "tokenizer": hashlib.sha256(spelt.encode()).hexdigest(),
        "limits": {name: getattr(limits, name) for name in Limits.__dataclass_fields__},
        "versions": [__version__, transformers.__version__],
    }


def _encoded(items: list[Item], ledger: Ledger) -> Tensor:
    """Strict JSON, as bytes. [n]"""
    plain = [[item.prompt, item.responses, item.pairs, item.rewards, item.source] for item in items]
    content = json.dumps({"items": plain, "ledger": asdict(ledger)}, allow_nan=False, separators=(",", ":"))
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


def _decoded(values: Tensor) -> tuple[list[Item], Ledger]:
    tree = json.loads(values.numpy().tobytes())
    items = [
        Item(prompt, responses, [Pair(*pair) for pair in pairs], rewards, source)
        for prompt, responses, pairs, rewards, source in tree["items"]
    ]
    ledger = tree["ledger"]
    for part in ("dropped", "notes"):
        ledger[part] = {kind: Tally(**tally) for kind, tally in ledger[part].items()}
    return items, Ledger(**ledger)
