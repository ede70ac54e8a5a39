"""Run under torchrun by the tests: one step's gradients, or what a bad rank does to the other."""

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import train
from benchmarks import DataError
from data import open_features
from finetune import LOSS, TuneConfig, collate, count, draw_items, start_model
from keep import leave
from loop import Objective, Steps
from ranks import start_ranks
from tasks import DATASETS, open_task
from train import TrainConfig, agreed, build, pre_train, settle
from vlm import Batch


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


def said(do) -> str:
    """Return the text of the error that `do` meets."""
    try:
        do()
    except (ValueError, OSError) as error:
        return str(error)
    return "nothing"


def bad_on_rank_1(data: str, ranks) -> dict:
    """Let rank 1 alone meet each kind of trouble; return what both say and have."""

    def fail(rank: int, error: Exception) -> Callable:
        def do():
            if ranks.rank == rank:
                raise error

        return do

    found = {"every": said(lambda: ranks.every(fail(1, DataError("b.json: bad"))))}
    found["first"] = said(lambda: ranks.first(fail(0, OSError("disk full"))))
    found["agree"] = said(lambda: ranks.agree({"--seed": 1, "--lr": 1.0 + ranks.rank}))
    read = Steps.__getitem__

    def spoil(self, n: int) -> Batch | DataError:
        batch = read(self, n)
        if ranks.rank == 1 and n == 2:
            return DataError("x.npy: bad")
        if ranks.rank == 1 and n == 4:
            batch.video = batch.video * math.inf
        return batch

    Steps.__getitem__ = spoil
    with tempfile.TemporaryDirectory() as where:
        out = ranks.share(where)
        cfg = TrainConfig(data=data, width=32, layers=1, batch=8, steps=6, out=f"{out}/a")
        found["unread"] = said(lambda: pre_train(agreed(cfg, set(), ranks), ranks))
        cfg = dataclasses.replace(cfg, skip_bad=True, out=f"{out}/b")
        make, models = train.make_model, []

        def spy(*args):
            models.append(make(*args))
            return models[-1]

        train.make_model = spy
        found["skipped"] = pre_train(agreed(cfg, set(), ranks), ranks)["skipped"]
        found["weights"] = float(sum(p.double().sum() for p in models[0][0].parameters()))
        ranks.wait()
    return found


if __name__ == "__main__":
    with start_ranks() as ranks:
        if sys.argv[2] == "safety":
            found = ranks.all(bad_on_rank_1(sys.argv[1], ranks))
            if ranks.rank == 0:
                both = {name: [each[name] for each in found] for name in found[0]}
                Path(sys.argv[3]).write_text(json.dumps(both))
        else:
            grads, total = gradients(sys.argv[1], sys.argv[2], ranks)
            if ranks.rank == 0:
                torch.save({"grads": grads, "loss": total}, sys.argv[3])
    leave(0)
