"""TRL's side: its DPOTrainer on the same model, pairs and order; as it comes, at its best here, or compact.

Its fused head is on in all of them: DPOTrainer of TRL 1.16 has no other. `use_liger_kernel`, deprecated there, changes
norms and activations only.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.channel import Channel, channel, plain

VARIANTS = {
    "default": {},  # checkpoints activations, computes in bfloat16, scores the reference in every step
    "best": {"precompute_ref_log_probs": True, "gradient_checkpointing": False},  # in bfloat16 on a GPU
    "checkpointed": {"precompute_ref_log_probs": True},  # the same in less memory
}
VARIANTS["compact"] = VARIANTS["best"]  # and the head at response tokens only, which TRL itself does on GPUs alone
AT_ONCE = 16  # pairs, at most: then a GPU is busy, and more would only take memory


class Recorded(DPOTrainer):
    """Remembers the loss of the step."""

    loss = 0.0

    def training_step(self, *args, **kwargs):
        found = super().training_step(*args, **kwargs)
        self.loss += float(found)
        return found


class AtTheGate(TrainerCallback):
    """Waits where cdpo's side waits."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.trainer = channel, None

    def on_train_begin(self, *args, **kwargs) -> None:
        self.channel.wait()

    def on_pre_optimizer_step(self, *args, model, **kwargs) -> None:
        self.channel.gradients(model)

    def on_step_end(self, *args, **kwargs) -> None:
        loss, self.trainer.loss = self.trainer.loss, 0.0
        self.channel.wait(loss=loss)


def main(variant: str) -> None:
    """Train until the parent is gone."""
    options = channel().options
    channel().wait()
    torch.set_num_threads(options["threads"])
    if variant == "compact":
        trl.trainer.utils._use_triton = lambda device: True  # read by the trainer only to choose the positions
    work = channel().folder.parent
    gate = AtTheGate(channel())
    rows = [json.loads(line) for line in (work / "trl.jsonl").read_text().splitlines()]
    trainer = Recorded(
        str(work / "model"),
        args=_config(channel().folder, variant, options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        peft_config=_adapters() if options["lora"] else None,
        callbacks=[gate],
    )
    gate.trainer = trainer
    if options["lora"]:
        _same_adapters(trainer.model, work)
    trainer.train()


def _config(folder: Path, variant: str, options: dict) -> DPOConfig:
    at_once = min(options["batch"], AT_ONCE) if options["device"] == "cpu" else AT_ONCE
    at_once = math.gcd(at_once, options["pairs"])
    bfloat16 = {} if variant == "default" else {"bf16": options["device"] == "cuda"}
    return DPOConfig(
        output_dir=str(folder),
        use_cpu=options["device"] == "cpu",
        max_steps=options["steps"],
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=options["pairs"] // at_once,
        learning_rate=options["learning_rate"],
        max_grad_norm=0,  # no clipping, as on cdpo's side
        lr_scheduler_type="constant",
        max_length=None,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **VARIANTS[variant],
        **bfloat16,
    )


def _adapters() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _same_adapters(model: torch.nn.Module, work: Path) -> None:
    start = load_file(work / "adapters.safetensors")
    trained = {plain(name): p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys(), "the two sides adapt other matrices"
    for name, parameter in trained.items():
        parameter.data.copy_(start[name])


if __name__ == "__main__":
    main(sys.argv[1])
