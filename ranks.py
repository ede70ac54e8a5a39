"""The processes that train one model together (sec. 5.2: eight GPUs), of which each is a rank.

    torchrun --nproc_per_node=8 train.py        starts eight; without torchrun there is one

Whatever one rank draws, reads or meets, and the others have to know, goes through `Ranks`.
"""

import gc
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import DataError
from keep import Stop, Stopped, cores


@dataclass
class Ranks:
    """Who this process is among those that torchrun started; one alone without torchrun."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    lock: typing.IO | None = None  # of the run directory

    def __post_init__(self):
        self.stop = Stop(speak=self.rank == 0)

    def __enter__(self) -> "Ranks":
        self.stop.watch()
        return self

    def __exit__(self, kind, *_) -> None:
        if self.lock:
            self.lock.close()
        if kind is None and dist.is_initialized():
            gc.collect()  # what still holds the group would end it too late, and abort the process
            dist.destroy_process_group()
        self.stop.unwatch()

    def sum(self, x: Tensor) -> Tensor:
        """Add x, of any shape, up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Join x (P, D) of all ranks, in rank order, gradients included: (sum of P, D)."""
        return _GatherRows.apply(x) if self.world > 1 else x

    def share(self, value):
        """Give every rank what rank 0 holds."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def first(self, do: Callable):
        """Let rank 0 do something, and give every rank what came of it: a value, or its error."""
        value = error = None
        if self.rank == 0:
            try:
                value = do()
            except (ValueError, OSError) as found:
                error = found
        value, error = self.share((value, error))
        if error is not None:
            raise error if not self.rank else of_rank(0, error)
        return value

    def every(self, do: Callable):
        """Let every rank do something: its own value, or the first error that any met."""
        value = error = None
        try:
            value = do()
        except (ValueError, OSError) as found:
            error = found
        for rank, met in enumerate(self.all(error)):
            if met is not None:
                raise met if rank == self.rank else of_rank(rank, met)
        return value

    def all(self, value) -> list:
        """Give every rank what each of them holds, in rank order."""
        found = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def agree(self, held: dict) -> None:
        """Raise the same ValueError on every rank where one holds another value than rank 0."""
        own, *others = self.all(held)
        for rank, other in enumerate(others, 1):
            for name in own | other:
                if own.get(name) != other.get(name):
                    raise ValueError(
                        f"rank {rank} has {name} {other.get(name)}, rank 0 {own.get(name)}: start "
                        "all ranks by the same command, with the same data and the same versions"
                    )

    def go_on(self) -> None:
        """Raise Stopped on every rank if a signal asked any to stop."""
        if self.sum(torch.tensor(int(self.stop.asked), device=self.device)):
            raise Stopped

    def wait(self) -> None:
        """Let every rank come here before any goes on."""
        if self.world > 1:
            dist.barrier()

    def say(self, line: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(line, flush=True)


def of_rank(rank: int, error: Exception) -> Exception:
    """Make an error that says on which rank it was met."""
    kinds = (DataError, OSError)  # others may want more than a text
    return next((k for k in kinds if isinstance(error, k)), ValueError)(f"on rank {rank}: {error}")


def start_ranks() -> Ranks:
    """Join the process group if torchrun started us: nccl on GPUs, gloo on CPUs.

    Raises: ValueError for more processes than GPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if cuda and here > torch.cuda.device_count():
        raise ValueError(f"--nproc_per_node is {here}, and there are {torch.cuda.device_count()} "
                         "GPUs: wanted a process for each at most")  # fmt: skip
    # Every step has its own number of tokens, and oneDNN would keep code for 1,024 of them: 0.5 GB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif here > 1:
        # torchrun gives each of several processes one thread, however many cores there are.
        torch.set_num_threads(max(1, cores() // here))
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Ranks(rank, world, device)


class _GatherRows(torch.autograd.Function):
    """Join the rows of all ranks; backward adds up what every rank's loss says about ours."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        world, rank = dist.get_world_size(), dist.get_rank()
        sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world)]
        dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
        sizes = torch.cat(sizes).tolist()
        ctx.mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        room = x.new_zeros(max(1, *sizes), x.shape[1])  # every rank must send as many rows
        room[: len(x)] = x
        rooms = [torch.empty_like(room) for _ in range(world)]
        dist.all_gather(rooms, room)
        return torch.cat([r[:n] for r, n in zip(rooms, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        if len(grad):
            dist.all_reduce(grad)
        return grad[ctx.mine]
