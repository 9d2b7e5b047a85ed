"""Ranks: the processes that train one run together, what they tell each other, and how the weights lie on them.

Data parallel without a wrapper: every rank adds up the gradient of its own micro-batches, and one sum over the ranks
ends the step. So a rank may have no micro-batch at all, and no hook depends on what a backward pass used.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cdpo.errors import ConfigError, DataError, DiskError, NumericsError, RankLost
from cdpo.system.rendezvous import announce, place

A = TypeVar("A")
TIMEOUT = timedelta(minutes=30)  # for one exchange; the longest wait is for rank 0 to write a checkpoint or the model
BUCKET = 1 << 26  # numbers per sum over the ranks
_GROUPS = itertools.count()  # one name for every process group of this process
_MESHES: list[Any] = []  # of the sharded models of this run


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` that train one run. Every method but `first` is called on all ranks alike."""

    rank: int = 0
    size: int = 1
    strategy: str = "none"  # none, ddp (every rank holds all weights) or fsdp (each holds a shard)

    @property
    def first(self) -> bool:
        """Whether this rank writes the run directory and talks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether forward and backward passes exchange weights, so that all ranks need equally many."""
        return self.strategy == "fsdp"

    def all_gather(self, value: A) -> list[A]:
        """The value of every rank, in order; CPU tensors and plain values. Raises RankLost."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(found, value)
        return found

    def agreed(self, signal: str | None) -> str | None:
        """The name of a signal that any rank has received, the first rank's first; None if there is none."""
        return next(filter(None, self.all_gather(signal)), None)

    def on_all(self, work: Callable[[], A], through_model: bool = False) -> list[A]:
        """What `work` returns on every rank; the error of one rank is raised on all.

        If work goes `through_model`, sharded ranks exchange weights in it: there an error ends its own rank, and the
        others find it gone (RankLost).
        """
        if self.size == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as fault:
            if through_model and self.sharded:
                raise
            error = _portable(fault, self.rank)
        results: list[tuple[Any, Exception | None]] = self.all_gather((result, error))
        for _, failed in results:
            if failed is not None:
                failed.told = True  # type: ignore[attr-defined]  # rank 0 says it for all
                raise failed
        return [one for one, _ in results]

    def from_first(self, work: Callable[[], A]) -> A:
        """What `work` returns on rank 0, the only rank that does it."""
        return self.on_all(lambda: work() if self.first else None)[0]  # type: ignore[return-value]

    def mapped(self, portions: Sequence[A], work: Callable[[A], Tensor]) -> Iterator[Tensor]:
        """work(portion) of every portion, in order: each rank does every size-th, and all get all results, on the CPU.

        In the last round a rank without a portion repeats one: sharded ranks must go through the model equally often.
        """
        for start in range(0, len(portions), self.size):
            own = portions[min(start + self.rank, len(portions) - 1)]
            results = self.on_all(lambda own=own: self._alike(work(own)), through_model=True)  # type: ignore[misc]
            yield from results[: len(portions) - start]

    def _alike(self, tensor: Tensor) -> Tensor:
        """A tensor as it can travel: on the CPU, unless it need not."""
        return tensor if self.size == 1 else tensor.cpu()

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place, the same bits on all of them. Raises RankLost."""
        if self.size > 1:
            with _lost():
                dist.all_reduce(tensor)
        return tensor

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of parameters that are not sharded; one that no rank has a gradient of keeps None."""
        plain = [p for p in parameters if not isinstance(p, DTensor)]
        if self.size == 1 or not plain:
            return
        there = self.all_sum(torch.tensor([p.grad is not None for p in plain], dtype=torch.int, device=plain[0].device))
        for bucket in _buckets([p for p, count in zip(plain, there.tolist()) if count]):
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = self.all_sum(torch.cat([part.flatten() for part in parts]))
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad = part.view_as(p)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tree(tree: Any, keep: bool) -> Any:
    """A tree of plain values with sharded tensors made whole, one by one, and kept on the CPU; None if not `keep`."""
    if isinstance(tree, DTensor):
        found = full_tensor(tree.detach())
        return found.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: whole_tree(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole_tree(value, keep) for value in tree)
    return tree


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor sharded as `parameter` is; as it is where that is not sharded, or of another shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def shard(model: Any, layers: Iterable[nn.Module], apart: set[nn.Parameter], device: torch.device) -> None:
    """FSDP2 in place: each of `layers`, and the rest, is a unit of which every rank holds 1/size; `apart` stay whole.

    Within the model's `forward`, and its `ask` if it has one, its weights are whole. Gradients are summed over the
    ranks, not averaged. Zhao et al. 2023 (arXiv 2304.11277), as torch's fully_shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _MESHES.append(mesh)
    for module in (*layers, model):
        # the outermost unit too gives its weights back after a forward pass: between passes all weights are shards
        fully_shard(module, mesh=mesh, ignored_params=apart, reshard_after_forward=True)
    register_fsdp_forward_method(model, "ask")
    for parameter in apart:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else gloo is asked for a reduction that it lacks


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype, in portions of about BUCKET numbers."""
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        bucket: list[nn.Parameter] = []
        for parameter in (p for p in parameters if p.dtype == dtype):
            bucket.append(parameter)
            if sum(p.numel() for p in bucket) >= BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _portable(error: Exception, rank: int) -> Exception:
    """An error as other ranks can raise it: what is ours keeps its type, and with it the exit code."""
    text = f"rank {rank}: {error}" if rank else str(error)
    if type(error) in (ConfigError, DataError, NumericsError, DiskError, torch.OutOfMemoryError):
        return type(error)(text)
    return RuntimeError(f"{text}\n{''.join(traceback.format_exception(error))}")


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RankLost(
            f"another rank is gone or does not answer ({reason}); its own message says why. The same command goes on "
            "from the newest checkpoint"
        ) from error


@contextmanager
def process_group(strategy: str, cuda: bool) -> Iterator[Ranks]:
    """The process group of this run, ended with the block; none for one process that holds all weights.

    Raises ConfigError where several ranks were started and `strategy` is none, RankLost if they do not find each other.
    """
    here = place()
    rank, size, local = here
    if strategy == "none" and size > 1:
        raise ConfigError(
            f"{size} ranks were started, and trainer.distributed=none trains in one process: set "
            "trainer.distributed=ddp (or fsdp, to shard the weights), or start one"
        )
    if size == 1 and strategy != "fsdp":
        yield Ranks()
        return
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
    announce(here)
    with _lost():
        store = dist.PrefixStore(f"cdpo-{next(_GROUPS)}", _store(size))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, rank=rank, world_size=size, store=store)
    try:
        yield Ranks(rank, size, strategy)
    finally:
        _end()


def _end() -> None:
    """End the process group and its threads: one that still runs when the interpreter ends aborts the process."""
    dist.destroy_process_group()
    while _MESHES:
        registry = getattr(_MESHES.pop(), "_pg_registry", {})  # torch 2.10 has none
        registry.clear()  # torch's caches of shardings keep the mesh, and it keeps the group
    atexit.unregister(_collect)
    atexit.register(_collect)  # so does a sharded model, which may be in the frames of an error until then


def _collect() -> None:
    gc.collect()


@cache
def _store(size: int) -> dist.Store:
    """Where the ranks meet: at MASTER_ADDR and MASTER_PORT."""
    if size == 1:
        return dist.HashStore()
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=5))))
    return store
