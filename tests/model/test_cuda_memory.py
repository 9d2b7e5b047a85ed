"""Micro-batches sized to memory, on a GPU of which this process may use a part."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from composing import composed, train

from cdpo.errors import DeviceFull
from cdpo.model import memory

LIMIT = 1 << 30  # bytes
# 4 million weights; 200 pairs of 3 * 64 tokens, all in one step: more than has room at once
RUN = ["logger=none", "model.hidden_size=256", "model.layers=5", "dataset=jsonl", "dataset.eval_size=4",
       "trainer.batch_size=null", "trainer.max_steps=2", "trainer.device=cuda"]  # fmt: skip


@contextmanager
def limited(monkeypatch):
    """Within the block torch gets LIMIT bytes of the GPU, and hears that no more are there."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(LIMIT / total)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (LIMIT - torch.cuda.memory_reserved(device), total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_fits_into_the_memory_that_it_was_promised(tmp_path, monkeypatch):
    rows = [{"prompt": f"{i:064}", "chosen": f"{i:063}y", "rejected": f"{i:063}n"} for i in range(204)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = [*RUN, f"dataset.path={tmp_path}/rows.jsonl"]
    with limited(monkeypatch):
        assert train(composed(*run), tmp_path / "sized")["step"] == 2
        with pytest.raises(DeviceFull):
            train(composed(*run, f"trainer.tokens_per_micro_batch={memory.MOST}"), tmp_path / "most")
    tokens = json.loads((tmp_path / "sized/micro_batch.json").read_text())["tokens"]
    assert memory.LEAST < tokens < memory.MOST
