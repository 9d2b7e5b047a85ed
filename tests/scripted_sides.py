"""Sides of the benchmark whose losses and gradients are given, in place of training processes."""

from __future__ import annotations

import torch
from safetensors.torch import save_file


class Given:
    """A side whose losses and gradients are given."""

    def __init__(self, name, folder, losses, gradient):
        self.name, self.folder, self._losses = name, folder / name, iter(losses)
        self.folder.mkdir()
        save_file({"weight": torch.tensor(gradient)}, self.folder / "gradients.safetensors")

    def step(self, command):
        self.reply = {"loss": next(self._losses)}


class Scripted(Given):
    """A side that says what it is told to, or ends, step by step; the first three of them compile."""

    def __init__(self, name, folder, losses, gradient):
        super().__init__(name, folder, losses, gradient)
        self.steps, self.reply = 0, {"compiled": 0}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.closed = True

    def step(self, command):
        loss = next(self._losses)
        if isinstance(loss, Exception):
            raise loss
        self.steps += 1
        self.reply = {"loss": loss, "memory": 5, "compiled": min(self.steps, 3)}
        return 0.1
