"""Checkpoints: a tree of plain values and tensors on disk, complete and hashed or not there at all. No pickle.

    checkpoint-00000120/
        tensors.safetensors   every tensor of the tree
        state.json            the rest of it, tensors replaced by references
        manifest.json         size and sha256 of both; written last

One process writes into a folder at a time (see `cdpo.system.locks`); any number may read.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdpo.errors import ConfigError
from cdpo.system.files import (
    read_json,
    redact,
    remove,
    remove_drafts,
    replacing,
    require_space,
    sha256,
    to_json,
    write_atomic,
)

log = logging.getLogger(__name__)

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"checkpoint-(\d{8,})(\.old)?")


class Found(NamedTuple):
    """A checkpoint's place in the order: a later step is newer; not `current` is what a save was about to replace."""

    step: int
    current: bool
    path: Path


class Damaged(Exception):
    """Why a checkpoint cannot be used; stays within this module."""


# ---------------------------------------------------------------------------------------------------- save and find


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step`, then delete all but the `keep` newest up to `step`.

    `state` nests dicts (str or int keys), lists, tuples, None, bool, int, float, str and tensors; secrets in its texts
    are redacted. Raises TypeError for a value of another kind, and DiskError: then older checkpoints are intact.
    """
    folder, tensors = Path(folder), dict[str, Tensor]()
    tree = _encoded(state, tensors, "")
    _part(tensors)
    target = folder / f"checkpoint-{step:08d}"
    need = sum(tensor.nbytes for tensor in tensors.values())
    remove_drafts(folder)
    require_space(folder, need)
    with replacing(target, need) as draft:
        _write(draft, step, tree, tensors)
        if target.exists():  # rename cannot replace a folder; `.old` is still found if a kill comes in between
            _discard(target.with_suffix(".old"))
            os.replace(target, target.with_suffix(".old"))
    _prune(folder, step, keep)
    return target


def newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest valid checkpoint, or None if there is none at all.

    Damaged ones are skipped with a warning. Raises ConfigError if there are only damaged ones. Deletes nothing.
    """
    found = _found(Path(folder))
    for step, _, path in found:
        try:
            return step, _read(path, step)
        except Damaged as reason:
            log.warning("%s is damaged and skipped: %s", path, reason)
    if found:
        raise ConfigError(
            f"{folder}: all {len(found)} checkpoints are damaged (see the warnings); "
            "restore one of them, or remove the folder to start from step 0"
        )
    return None


def latest_step(folder: Path) -> int:
    """The step of the newest checkpoint, whole or not; -1 if there is none."""
    return max((found.step for found in _found(Path(folder))), default=-1)


def _found(folder: Path) -> list[Found]:
    """All checkpoints in a folder, newest first, whole or not."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((Found(int(name[1]), not name[2], path) for name, path in named if name), reverse=True)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Delete what is older than the `keep` newest; what is later than `step` is damaged and replaced in its turn."""
    kept: set[int] = set()
    for found in _found(folder):
        if found.step > step:
            continue
        if len(kept) >= max(keep, 1) or found.step in kept:
            _discard(found.path)
        elif not _faults(found.path, found.step):
            kept.add(found.step)


def _discard(path: Path) -> None:
    """Rename, then delete: a kill in between leaves no half checkpoint that looks whole."""
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        if path.exists():
            remove(hidden)
            os.replace(path, hidden)
            remove(hidden)
    except OSError as fault:
        log.warning("%s is no longer needed but cannot be deleted: %s", path, fault.strerror)


# ---------------------------------------------------------------------------------------------------- the three files


def _write(draft: Path, step: int, tree: Any, tensors: dict[str, Tensor]) -> None:
    with replacing(draft / TENSORS) as part:
        _save_tensors(tensors, part)
    write_atomic(draft / STATE, json.dumps(tree, allow_nan=False).encode())
    files = {name: _fingerprint(draft / name) for name in (TENSORS, STATE)}
    manifest = {"format": FORMAT, "step": step, "files": files}
    write_atomic(draft / MANIFEST, to_json(manifest, indent=1).encode())  # ends in "}": no cut goes unseen


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as fault:  # its I/O errors are no OSErrors
        code = re.search(r"(?:code: |os error )(\d+)", str(fault))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number)) from fault


def _read(path: Path, step: int) -> dict[str, Any]:
    for reason in _faults(path, step, thorough=True):
        raise Damaged(reason)
    try:
        # cloned: what load_file gives may be a map of a file that is about to be deleted
        tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
        return _decoded(read_json(path / STATE), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as fault:
        raise Damaged(f"{type(fault).__name__}: {fault}") from fault


def _faults(path: Path, step: int, thorough: bool = False) -> list[str]:
    """What is wrong with a checkpoint: nothing, or one reason. Sizes only, unless `thorough`."""
    try:
        manifest = read_json(path / MANIFEST)
        if (manifest["format"], manifest["step"], set(manifest["files"])) != (FORMAT, step, {TENSORS, STATE}):
            return [f"{MANIFEST}: not format {FORMAT} of step {step} with {TENSORS} and {STATE}"]
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["size"]:
                return [f"{name}: {(path / name).stat().st_size} bytes, {MANIFEST} says {expected['size']}"]
            if thorough and _fingerprint(path / name) != expected:
                return [f"{name}: its sha256 is not that of {MANIFEST}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        return [f"{MANIFEST}: {type(fault).__name__}: {fault}"]
    return []


def _fingerprint(path: Path) -> dict[str, Any]:
    """Fingerprint of a file, as in the manifest."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


# ---------------------------------------------------------------------------------------------------- tree and JSON


def _encoded(node: Any, tensors: dict[str, Tensor], at: str) -> Any:
    """JSON of a tree: an object names a kind that JSON lacks; tensors go into `tensors`, named by their place."""
    if isinstance(node, Tensor):
        tensors[at] = _stored(node.detach())
        return {"complex" if node.is_complex() else "tensor": at}
    if isinstance(node, Mapping):
        return {"dict": [[_key(key, at), _encoded(node[key], tensors, f"{at}[{key!r}]")] for key in node]}
    if isinstance(node, (list, tuple)):
        values = [_encoded(value, tensors, f"{at}[{index}]") for index, value in enumerate(node)]
        return values if isinstance(node, list) else {"tuple": values}
    if isinstance(node, float):
        return float(node) if math.isfinite(node) else {"float": str(float(node))}
    if isinstance(node, str):
        return redact(node)
    if node is None or isinstance(node, (bool, int)):
        return node
    raise TypeError(f"state{at}: a checkpoint cannot hold a {type(node).__name__}")


def _decoded(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decoded(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "dict":
        return {key: _decoded(child, tensors) for key, child in value}
    if kind == "tuple":
        return tuple(_decoded(child, tensors) for child in value)
    if kind == "float":
        return float(value)
    return torch.view_as_complex(tensors[value]) if kind == "complex" else tensors[value]


def _key(key: Any, at: str) -> str | int:
    if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
        return key
    raise TypeError(f"state{at}: a key must be str or int, not {key!r}")


def _stored(tensor: Tensor) -> Tensor:
    """A tensor as safetensors wants it: contiguous, on the CPU, real."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.resolve_neg().cpu().contiguous()


def _part(tensors: dict[str, Tensor]) -> None:
    """Copy those tensors that share memory, which safetensors refuses."""
    taken: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in taken:
            tensors[name] = tensor.clone()
        taken.add(storage.data_ptr())
