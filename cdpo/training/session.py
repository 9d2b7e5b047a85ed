"""One attempt at a run: what is to be done, by which ranks, on which device, and what may interrupt it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cdpo.config.schema import Config, Trainer
from cdpo.config.task import Task
from cdpo.errors import ConfigError, Preempted
from cdpo.system.ranks import Ranks
from cdpo.system.signals import Signals
from cdpo.training.directory import RunDirectory


@dataclass(frozen=True)
class Session:
    """What every part of a run needs to know of its surroundings.

    Long work is given `pause`, to be called where it may end early: it returns at once, or raises Preempted.
    """

    spec: Config
    task: Task
    ranks: Ranks
    device: torch.device
    signals: Signals

    @property
    def directory(self) -> RunDirectory:
        """Where the run writes."""
        return RunDirectory(self.task.directory)

    def stop_requested(self) -> str | None:
        """The name of the signal that any rank has received, such as SIGTERM; None if there is none."""
        return self.ranks.agreed(self.signals.poll())

    def pause(self, *_: Any) -> None:
        """Raise Preempted if a signal has asked any rank to stop. Called on all ranks alike."""
        if name := self.stop_requested():
            raise Preempted(f"{name} before the first step; the same command starts again", name)

    def pause_alone(self, *_: Any) -> None:
        """The same, for work that calls it too often for ranks to ask one another; several ranks do not pause there."""
        if self.ranks.size == 1:
            self.pause()

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it matrix products are computed in bfloat16, if the trainer says so."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.spec.trainer.autocast else nullcontext()

    def cache(self, kind: str) -> Path | None:
        """Where runs share what they computed; None if no cache_dir is named and the run is not under output_root."""
        if self.spec.cache_dir is not None:
            return Path(self.spec.cache_dir).expanduser() / kind
        root = Path(self.spec.output_root)
        return root / ".cache" / kind if self.directory.path.resolve().is_relative_to(root.resolve()) else None


def on_gpu(trainer: Trainer) -> bool:
    """Whether the run has a GPU; never MPS, which has no float64. Raises ConfigError if one is asked for in vain."""
    if trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda, but torch sees no GPU here; use auto or cpu")
    return trainer.device != "cpu" and torch.cuda.is_available()


def device_of(trainer: Trainer) -> torch.device:
    """The GPU of this process (`ranks.process_group` has chosen it among several), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu(trainer) else torch.device("cpu")
