"""What of the head for GPUs is not told by its numbers, which `test_head` compares."""

from __future__ import annotations

import torch

from cdpo.model import fused_head


def test_workers_start_before_the_kernels_are_compiled(monkeypatch):
    order = []
    monkeypatch.setattr(fused_head, "has_triton", lambda: True)
    monkeypatch.setattr(fused_head, "start_compile_workers", lambda: order.append("workers"))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: order.append(function.__name__))
    fused_head._kernels.__wrapped__(on_gpu=True)
    assert order == ["workers", "_absorb", "_slope"]
