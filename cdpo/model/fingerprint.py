"""What tells one set of weights, or the tokens of one Item, from all others: sha256 sums, for the keys of caches."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cdpo.batch import Item


def item_print(item: Item) -> bytes:
    """Of what a model is shown of an Item: its token ids, after any truncation."""
    return hashlib.sha256(json.dumps([item.prompt, item.responses]).encode()).digest()


def weights_print(model: Any) -> str:
    """Of a model's class, config, parameters and buffers; not of where it was loaded from."""
    passing = ("name_or_path", "transformers_version")
    config = {k: v for k, v in model.config.to_dict().items() if k not in passing and not k.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashlib lets other threads go on
        for part in pool.map(_tensor_print, [*model.named_parameters(), *model.named_buffers()]):
            digest.update(part)
    return digest.hexdigest()


def _tensor_print(named: tuple[str, Any]) -> bytes:
    name, tensor = named
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()
