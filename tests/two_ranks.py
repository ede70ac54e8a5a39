"""Run under torchrun by test_train.py: one step's gradients over ranks, left by rank 0."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from train import Objective, TrainConfig, build, settle, start_ranks


def gradients(data: str, loss: str, ranks, batch: int = 12) -> tuple[dict, float]:
    """Return the gradient of every parameter, and the loss, of one step of `batch` clips."""
    cfg = settle(TrainConfig(data=data, width=32, layers=2, batch=batch, loss=loss), set())
    model, _, found = build(cfg, ranks.say)
    model.double()
    model.cls["predictions"].bias.requires_grad_(loss == "mfm-mlm")
    objective = Objective(model, lambda m, b: m.pretrain_loss(b, loss, ranks.gather))
    if ranks.world > 1:
        objective = DistributedDataParallel(objective)
    part = found.train.step(1, batch, ranks.rank, ranks.world)
    part.video = part.video.double()
    counts = ranks.sum(torch.stack([part.video_hidden.sum(), part.text_hidden.sum()]))
    value = objective(part).value(*counts) * ranks.world
    value.backward()
    total = ranks.sum(value.detach().clone()) / ranks.world
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, float(total)


if __name__ == "__main__":
    ranks = start_ranks()
    grads, total = gradients(sys.argv[1], sys.argv[2], ranks)
    if ranks.rank == 0:
        torch.save({"grads": grads, "loss": total}, sys.argv[3])
    dist.destroy_process_group()
