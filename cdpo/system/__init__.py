"""Files, locks, ranks, signals: what any long job needs. Nothing here knows of learning."""

from cdpo.system.logger import NoLogger, Wandb

__all__ = ["NoLogger", "Wandb"]
