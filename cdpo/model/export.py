"""The trained model as others load it: a folder for from_pretrained, or an adapter for PeftModel."""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cdpo.system.files import remove, replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export(policy: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save as safetensors: an adapter for PeftModel.from_pretrained, or a whole model for from_pretrained.

    Beside an adapter whose base was built here (no hub id, no folder) the base is saved too, under `base/`; the adapter
    names its base by absolute path unless it is a hub id. `folder` is complete or not there. Raises DiskError.
    """
    remove(folder)  # of an earlier attempt that was killed before its run was finished
    with replacing(folder) as draft:
        try:
            if hasattr(policy, "peft_config"):
                _name_base(policy, draft, folder)
            has_base = (draft / "base").is_dir()  # with its embeddings; peft would look for them where it is not yet
            policy.save_pretrained(draft, **{"save_embedding_layers": False} if has_base else {})
            tokenizer.save_pretrained(draft)
        except SafetensorError as error:  # its I/O errors are no OSErrors
            raise OSError(errno.EIO, str(error)) from error


def _name_base(policy: Any, draft: Path, folder: Path) -> None:
    """Tell the adapter where its base is, and save the base under its own names if nobody else has it."""
    name = policy.get_base_model().config.name_or_path
    if not name:
        copy.deepcopy(policy).unload().save_pretrained(draft / "base")
        name = str(folder.resolve() / "base")
    elif Path(name).is_dir():
        name = str(Path(name).resolve())
    for config in policy.peft_config.values():
        config.base_model_name_or_path = name
