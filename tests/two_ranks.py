"""Run under torchrun by the tests: one step's gradients over ranks, left by rank 0."""

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from data import open_features
from finetune import LOSS, TuneConfig, collate, count, draw_items, start_model
from loop import Objective, start_ranks
from tasks import DATASETS, open_task
from train import TrainConfig, build, settle


def pre_training(data: str, loss: str, ranks, batch: int):
    """Return the model, its loss, this rank's part of one step, and what that predicts."""
    cfg = settle(TrainConfig(data=data, width=32, layers=2, batch=batch, loss=loss), set())
    model, _, found = build(cfg, ranks.say)
    model.cls["predictions"].bias.requires_grad_(loss == "mfm-mlm")
    part = found.train.step(1, batch, ranks.rank, ranks.world)
    counts = part.video_hidden.sum(), part.text_hidden.sum()
    return model, lambda m, b: m.pretrain_loss(b, loss, ranks.gather), part, counts


def fine_tuning(data: str, name: str, ranks, batch: int):
    """The same for one of the five tasks; `data` is a run on its data: DATA:RUN."""
    data, init = data.split(":")
    task = open_task(name, data, open_features(data))
    cfg = settle(TuneConfig(data=data, init=init, task=name), set(), {"dropout": 0.0}, {})
    model, tokenizer = start_model(cfg, task, ranks.say)
    items = draw_items(task.train, 0, batch, ranks.world, 0)[ranks.rank]
    part = collate(task, items, tokenizer, model.config)
    return model, lambda m, b: LOSS[name](m, b, ranks.gather), part, count(part, name)


def gradients(data: str, what: str, ranks, batch: int = 12) -> tuple[dict, float]:
    """Return the gradient of every parameter, and the loss, of one step of `batch` clips."""
    make = fine_tuning if what in DATASETS else pre_training
    model, loss, part, counts = make(data, what, ranks, batch)
    objective = Objective(model.double(), loss)
    if ranks.world > 1:
        objective = DistributedDataParallel(objective)
    part.video = part.video.double()
    counts = ranks.sum(torch.stack([torch.as_tensor(n) for n in counts]))
    value = objective(part).value(*counts) * ranks.world
    value.backward()
    total = ranks.sum(value.detach().clone()) / ranks.world
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, float(total)


if __name__ == "__main__":
    with start_ranks() as ranks:
        grads, total = gradients(sys.argv[1], sys.argv[2], ranks)
        if ranks.rank == 0:
            torch.save({"grads": grads, "loss": total}, sys.argv[3])
