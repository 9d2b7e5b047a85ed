"""What a run leaves in its directory and in the cache, read back."""

from __future__ import annotations

import json

from safetensors import safe_open


def key_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["key"])
