"""Fine-tune VLM on one of five tasks (sec. 4): each has its attention mask and its loss.

    torchrun finetune.py retrieval                 toy world, from train.py's run: half a minute
    torchrun finetune.py captioning --data DATA --init RUN                    your own data and run
    torchrun --nproc_per_node=8 finetune.py qa --data MSRVTT --bert BERT      no pre-training at all

    retrieval      -log p(its video | text) among the batch's videos                     sec. 4.1
    qa             -log p(its text | video) among the batch's texts                      sec. 4.4
    segmentation   cross-entropy of each second's label, windows of 32 s                 sec. 4.2
    localization   binary cross-entropy of second . step dot products                    sec. 4.3
    captioning     cross-entropy of each next word under the captioning mask             sec. 4.5

The isolated masks of the first four are run as their two squares, video and text apart (footnote 2:
VLM.encode_video, VLM.encode_text), captioning's triangle in VLM.caption_loss. Segmentation alone
adds weights, a linear classifier.

After each epoch, at most 60 times, the model is tried on training videos held out for that
(`--held-out`); the best epoch is kept and tested at the end as `python eval.py TASK` does. The loop
is loop.py's.

Without --steps and --epochs: 10 epochs and at least 300 steps, of 128 clips (retrieval, qa), 64
(captioning), or 32 and 16 windows (segmentation, localization); on the toy world 10 or 20 epochs of
8 to 60.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import Bad, DataError
from data import encode, generator, open_features, pairs
from eval import ANSWER, Options, evaluate
from features import want_folder
from keep import Log, Progress, fingerprint, read_log
from loop import LoopConfig, fit, launch, opt
from loss import LossSums, wide
from ranks import Ranks, start_ranks
from tasks import DATASETS, SPLITS, WINDOW, Item, Task, joined, open_task, refuse_seen, why_none
from train import (
    agreed,
    begin,
    conclude,
    ended,
    fill_in,
    is_toy,
    make_model,
    named_after,
    run_directory,
)
from vlm import VLM, Batch, VLMConfig, read_tensors, run, save_run

# ---------------------------------------------------------------------------------------------
# Settings


@dataclass
class TuneConfig(LoopConfig):
    """Fine-tune. Settings left at None take the values of TOY or PAPER below, by task."""

    task: str = opt("retrieval", "what to learn", at=1, choices=tuple(DATASETS))
    dataset: str | None = opt(None, "benchmark, by its folder in DATA (default: msrvtt; captioning "
                              "youcook2; the other one if that is not there)",
                              "data", choices=("msrvtt", "youcook2"))  # fmt: skip
    batch: int | None = opt(None, "clips a step, over all ranks; windows in segmentation and "
                            "localization (default: above; paper: 256)")  # fmt: skip
    init: str | None = opt(None, "start from this run's weights (default: the newest finished one "
                           "of train.py on DATA)", metavar="RUN")  # fmt: skip
    warmup: int | None = opt(
        None, "warm-up steps (default: a tenth of all, at most the paper's 122)"
    )
    log_every: int | None = opt(None, "steps between log lines (default: an epoch)")

    held_out: float = opt(0.1, "share of training videos to choose the best epoch by (0: none)")
    limit: int | None = opt(None, "train on so many items alone, drawn by the seed (default: all)")
    join_captions: int = opt(1, "MSR-VTT's form: sentences of a clip, one after the other, that "
                                "make up one training text")  # fmt: skip
    stride: int = opt(16, "segmentation, localization: seconds between windows (paper: 16)")
    train_videos: int = opt(30, "localization: training videos of a task (the authors': 30)")
    split: str = opt("val", "localization: test by videos_val.csv, or as the authors do by all but "
                     "those and --train-videos a task (Table 5)", choices=SPLITS)  # fmt: skip
    tokenizer: str = opt("bert", "captioning: how texts become words (the authors': bert)",
                         "metrics", choices=("bert", "ptb", "space"))  # fmt: skip
    meteor_data: str | None = opt(None, "captioning: METEOR's word lists", metavar="DIR")

    POSITIVE = ("stride", "train_videos", "limit", "join_captions")
    WARMUP = 122  # steps (sec. 5.2)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out is {self.held_out}, wanted 0 or more, below 1")
        if self.stride > WINDOW:
            raise ValueError(f"--stride is {self.stride}, wanted at most {WINDOW}")
        if self.split == "authors" and self.train_videos != 30:  # eval.py must know the others
            raise ValueError(f"--train-videos is {self.train_videos}: --split authors has 30")

    @property
    def name(self) -> str:
        """Name a run after its data and task."""
        return f"{super().name}-{self.task}"


TOY = {
    "retrieval": dict(epochs=20, batch=60),
    "qa": dict(epochs=20, batch=60),
    "segmentation": dict(epochs=10, batch=16),
    "localization": dict(epochs=10, batch=8),
    "captioning": dict(epochs=20, batch=32),
}
# DEVIATION: "the same as pre-training", 15 epochs of 256 (sec. 5.2), is two dozen steps on a small
# set.
PAPER = {
    "retrieval": dict(epochs=10, batch=128),
    "qa": dict(epochs=10, batch=128),
    "segmentation": dict(epochs=10, batch=32),
    "localization": dict(epochs=10, batch=16),
    "captioning": dict(epochs=10, batch=64),
}
TASKS_OF = {  # settings that some tasks alone have
    "join_captions": ("retrieval", "qa", "captioning"),
    "stride": ("segmentation", "localization"),
    "train_videos": ("localization",),
    "split": ("localization",),
    "tokenizer": ("captioning",),
    "meteor_data": ("captioning",),
}
LEAST = 300  # steps: a small corpus gets more epochs
MOST = 60  # validations


# ---------------------------------------------------------------------------------------------
# Batches


def epoch_steps(items: int, batch: int, parts: int) -> int:
    """Count an epoch's steps: batches of at most `batch` items, but with one for each part.

    >>> epoch_steps(9, 8, 1), epoch_steps(9, 8, 8)  # of 5 and 4 items; all 9 at once
    (2, 1)
    """
    return max(1, min(math.ceil(items / batch), items // parts))


def draw_items(
    train: list[list[Item]], step: int, batch: int, parts: int, seed: int, join: int = 1
) -> list:
    """Draw the items of a step for each of `parts` (ranks x micro-batches).

    An epoch takes one item of each group, in an order and by a choice that (seed, epoch) decide, in
    batches as even as can be: every group once, none twice in a batch. With `join` above 1 an
    item's text is so many of its group's: `tasks.joined`.
    """
    # DEVIATION: the authors take an MSR-VTT clip 20 times an epoch; here none is its own negative
    steps = epoch_steps(len(train), batch, parts)
    epoch, i = divmod(step, steps)
    g = generator(seed, epoch)
    order = torch.randperm(len(train), generator=g).numpy()
    u = torch.rand(len(train), generator=g).tolist()
    mine = np.array_split(order, steps)[i]
    return [[joined(train[k], int(u[k] * len(train[k])), join) for k in part]
            for part in np.array_split(mine, parts)]  # fmt: skip


def collate(task: Task, items: list[Item], tokenizer: Tokenizer, c: VLMConfig) -> Batch:
    """Read the items' seconds and texts: a Batch, with labels where the task has them."""
    batch = pairs(task.features, [item.clip for item in items], tokenizer, c)
    if task.name == "segmentation":
        batch.label = torch.full(batch.video_valid.shape, -1)
        for row, item in zip(batch.label, items, strict=True):
            row[: len(item.truth)] = torch.from_numpy(item.truth)
    if task.name == "localization":  # the steps of all tasks in the batch; a video asks for its own
        tasks = {item.clip.key: item.texts for item in items}
        first = dict(
            zip(tasks, np.cumsum([0, *map(len, tasks.values())])[:-1].tolist(), strict=True)
        )
        said = [text for texts in tasks.values() for text in texts]
        batch.text, batch.text_valid = encode(said, tokenizer, c)  # (S, T)
        batch.label = torch.full((*batch.video_valid.shape, len(said)), -1)  # (B, V, S)
        for row, item in zip(batch.label, items, strict=True):
            (n, S), s = item.truth.shape, first[item.clip.key]
            row[:n, s : s + S] = torch.from_numpy(item.truth)
    return batch


# ---------------------------------------------------------------------------------------------
# Losses


def contrast(query: Tensor, key: Tensor, gather: Callable) -> LossSums:
    """Sum -log [ exp(q_i.k_i) / sum_j exp(q_i.k_j) ] over rows, k_j of all ranks (sec. 4.1, 4.4).

    Args: query, key (B, D): row i of one belongs to row i of the other.
    """
    pool = gather(key)
    with torch.autocast(query.device.type, enabled=False):  # no rounding of large dot products
        scores = wide(query) @ wide(pool).T  # (B, all ranks' B)
        own = (wide(query) * wide(key)).sum(1)
    return sums("text", (scores.logsumexp(1) - own).sum(), len(query), math.log(len(pool)))


def retrieval_loss(model: VLM, batch: Batch, gather: Callable) -> LossSums:
    """Tell each text's video from the batch's others (sec. 4.1)."""
    video = model.embed_video(batch.video, batch.video_valid)
    return contrast(model.embed_text(batch.text, batch.text_valid), video, gather)


def qa_loss(model: VLM, batch: Batch, gather: Callable) -> LossSums:
    """Tell each video's text from the batch's others (sec. 4.4)."""
    video = model.embed_video(batch.video, batch.video_valid)
    return contrast(video, model.embed_text(batch.text, batch.text_valid), gather)


def segmentation_loss(model: VLM, batch: Batch, gather: Callable) -> LossSums:
    """Cross-entropy of each second's label over K labels (sec. 4.2)."""
    asked = batch.label >= 0
    logits = wide(model.segment(batch.video, batch.video_valid)[asked])  # (seconds, K)
    value = F.cross_entropy(logits, batch.label[asked], reduction="sum")
    return sums("video", value, int(asked.sum()), math.log(logits.shape[1]))


def localization_loss(model: VLM, batch: Batch, gather: Callable) -> LossSums:
    """Binary cross-entropy of h_v . step dot products (sec. 4.3).

    DEVIATION: the paper names the softmax alone, which is taken in testing; the authors train so.
    """
    h = model.encode_video(batch.video, batch.video_valid)[:, :-1]  # (B, V, D)
    steps = model.embed_text(batch.text, batch.text_valid)  # (S, D)
    asked = batch.label >= 0
    with torch.autocast(h.device.type, enabled=False):
        logits = (wide(h) @ wide(steps).T)[asked]
    shown = batch.label[asked].to(logits)
    value = F.binary_cross_entropy_with_logits(logits, shown, reduction="sum")
    return sums("video", value, int(asked.sum()), math.log(2))


def captioning_loss(model: VLM, batch: Batch, gather: Callable) -> LossSums:
    """Cross-entropy of each next word (sec. 4.5)."""
    return model.caption_loss(batch)


def sums(kind: str, value: Tensor, count: int, chance: float) -> LossSums:
    """Report a sum over `count` video or text things, as loop.py's loop wants it.

    Args: kind: "video" or "text". value: scalar (), nats. chance: nats a thing of knowing nothing.
    """
    zero, n = value.new_zeros(()), torch.tensor(count, device=value.device)
    none = torch.zeros_like(n)
    if kind == "video":
        return LossSums(value, n, zero, none, chance, 0.0, joint=True)
    return LossSums(zero, none, value, n, 0.0, chance, joint=True)


LOSS = {
    "retrieval": retrieval_loss,
    "qa": qa_loss,
    "segmentation": segmentation_loss,
    "localization": localization_loss,
    "captioning": captioning_loss,
}


def count(batch: Batch, task: str) -> tuple[int, int]:
    """Return what a loss will count: (video things, text things)."""
    if batch.label is not None:
        return int((batch.label >= 0).sum()), 0
    return 0, int(batch.text_valid.sum()) if task == "captioning" else len(batch.text)


# ---------------------------------------------------------------------------------------------
# The best epoch, and the whole


def quality(task: str, row: dict[str, float]) -> tuple[str, float]:
    """Say by which number epochs of a task are compared, and its value; higher is better."""
    if task == "retrieval":
        return "mean of R@1, R@5, R@10", sum(row[k] for k in ("R@1", "R@5", "R@10")) / 3
    metric = {"qa": "accuracy", "segmentation": "frame accuracy"}.get(task)
    metric = metric or {"localization": "recall", "captioning": "BLEU-4"}[task]
    return metric, row[metric]


@dataclass
class Best:
    """Validate after each epoch, or every few of more than MOST, and keep the best one's weights in
    the run directory."""

    task: Task
    model: VLM
    tokenizer: Tokenizer
    ranks: Ranks
    out: Path
    options: Options  # the test's; an epoch is tried with them too, but by greedy search
    epoch: int  # steps
    last: int  # step
    best: float = -math.inf
    at: int = 0

    def __post_init__(self):
        for row in read_log(self.out / "log.jsonl"):  # a resumed run finds what it had
            if "validation" in row and row["validation"] >= self.best:
                self.best, self.at = row["validation"], row["step"]

    def __call__(self, step: int, log: Log) -> bool:
        """Validate if an epoch or the run ends here; every rank does, and all find the same."""
        every = self.epoch * math.ceil(self.last / self.epoch / MOST)
        if step % every and step != self.last or not self.task.val:
            return False
        begun = time.monotonic()
        self.model.eval()
        answer, greedy = ANSWER[self.task.name], dataclasses.replace(self.options, beams=1)
        found = answer(self.model, self.tokenizer, self.task.features, self.task.val, greedy)
        metric, value = quality(self.task.name, next(iter(found.rows.values())))
        better = value >= self.best  # of equal ones the later
        if better:
            self.best, self.at = value, step
            self.save()
        said = f"      epoch {step / self.epoch:.3g}: held-out {metric} {value:.3f}"
        said += ", the best so far" if better else f", best {self.best:.3f} at step {self.at}"
        took = f" ({time.monotonic() - begun:.1f} s)"
        log({"step": step, "validation": value, "metric": metric}, said + took)
        return True

    def save(self) -> None:
        """Write the model as it is now."""
        if self.ranks.rank == 0:
            save_run(self.out, self.model, self.tokenizer)


def start_model(cfg: TuneConfig, task: Task, say: Callable) -> tuple[VLM, Tokenizer]:
    """Make the model to fine-tune: weights, classifier, and which parameters the task trains."""
    model, tokenizer = make_model(cfg, task.features.width, say)
    c = model.config
    if c.num_labels == len(task.labels) and not c.labels:  # a release names no labels: in our order
        c.labels = list(task.labels)
    if c.labels != task.labels or c.num_labels != len(task.labels):
        torch.manual_seed(cfg.seed)
        model.set_labels(task.labels)
    # what a loss never reads, DDP must not wait for: the MLM head is the captioner's alone
    model.cls.requires_grad_(cfg.task == "captioning")
    refuse_seen(task, c, cfg.out if cfg.resume else cfg.init)
    c.stage, c.task = "fine-tuned", cfg.task
    c.data = f"{Path(cfg.data).resolve().name}/{task.dataset}"
    c.split = task.split or c.split  # another task's training does not undo this one's
    return model, tokenizer


def main(cfg: TuneConfig, given: set[str] = frozenset()) -> dict:
    """Fine-tune, test the best epoch; return the summary, the last line of log.jsonl.

    Raises: ValueError for a setting of another task, or fewer items than ranks x micro-batches.
    """
    for name in given & TASKS_OF.keys():
        if cfg.task not in TASKS_OF[name]:
            tasks = " and ".join(TASKS_OF[name])
            raise ValueError(f"--{name.replace('_', '-')} is for {tasks}, not for {cfg.task}: "
                             "leave it out")  # fmt: skip
    with start_ranks() as ranks:
        cfg = agreed(cfg, given, ranks, TOY[cfg.task] | {"dropout": 0.0}, PAPER[cfg.task])
        return fine_tune(cfg, given, ranks)


def open_items(cfg: TuneConfig, ranks: Ranks) -> Task:
    """Open the task's data, cut to --limit; ValueError for too few items."""
    features = open_features(cfg.data, cfg.features)
    task = open_task(
        cfg.task, cfg.data, features, cfg.dataset, cfg.skip_bad, cfg.held_out, stride=cfg.stride,
        train_videos=cfg.train_videos, split=cfg.split, seed=cfg.seed, join=cfg.join_captions,
    )  # fmt: skip
    if cfg.skip_bad:  # a step of many items would be skipped for each that cannot be read
        bad = Bad()
        sound = features.sound((g[0].clip.video for g in task.train), bad)
        if bad.messages:
            n, many = len(task.train), len(bad.messages)
            task.train = [g for g in task.train if g[0].clip.video in sound]
            task.said.append(f"{n - len(task.train)} of {n} items to train on are left out, for "
                             f"{many} videos cannot be read: {bad.messages[0]}")  # fmt: skip
    ranks.say("\n".join(task.said))
    if cfg.limit and cfg.limit < len(task.train):
        chosen = np.random.default_rng(cfg.seed).permutation(len(task.train))[: cfg.limit]
        ranks.say(f"{cfg.limit} of {len(task.train)} items to train on, as --limit asks")
        task.train = [task.train[i] for i in sorted(chosen)]
    if not task.train:
        folder = Path(cfg.data) / task.dataset
        raise DataError(f"{folder}: nothing to train {task.name} on: {why_none(task, True)}")
    if cfg.join_captions > 1 and all(len(group) == 1 for group in task.train):
        raise ValueError(f"--join-captions {cfg.join_captions}: a training clip of {task.dataset} "
                         "has one sentence here: leave the flag out")  # fmt: skip
    if len(task.train) < ranks.world * cfg.accumulate:
        raise ValueError(
            f"{len(task.train)} items to train on, wanted at least one for each of {ranks.world} "
            f"ranks x {cfg.accumulate} micro-batches"
        )
    return task


def fine_tune(cfg: TuneConfig, given: set[str], ranks: Ranks) -> dict:
    """Do what `main` says, as one of the ranks; DataError where there is no DATA."""
    begin(cfg, ranks)
    want_folder(cfg.data)
    if not (cfg.resume or cfg.init or cfg.bert):
        cfg.init = str(ranks.first(lambda: pre_trained(cfg)))
        ranks.say(f"from the weights of {cfg.init}")
    options = Options(tokenizer=cfg.tokenizer, meteor_data=cfg.meteor_data, stride=cfg.stride)
    task = ranks.every(lambda: open_items(cfg, ranks))
    model, tokenizer = ranks.every(lambda: start_model(cfg, task, ranks.say))
    parts = ranks.world * cfg.accumulate
    epoch = epoch_steps(len(task.train), cfg.batch, parts)
    cfg.log_every = cfg.log_every or epoch
    if cfg.steps is None and "epochs" not in given and not is_toy(cfg.data):
        cfg.epochs = max(cfg.epochs, math.ceil(LEAST / epoch))
    fill_in(cfg, model, epoch)
    out = run_directory(cfg, ranks)
    cfg.out = str(out)
    model.to(ranks.device)
    best = Best(task, model, tokenizer, ranks, out, options, epoch=epoch, last=cfg.steps)
    ranks.say(f"run directory {out}, {cfg.steps} steps of {cfg.batch} items, {epoch} an epoch")

    def draw(step: int, micro: int) -> Batch:
        items = draw_items(task.train, step, cfg.batch, parts, cfg.seed, cfg.join_captions)
        return collate(task, items[ranks.rank * cfg.accumulate + micro], tokenizer, model.config)

    def save() -> None:  # beside trainer.pt; the best epoch's weights stay
        if not best.at:
            best.save()

    facts = {"items to train on": fingerprint([repr(i.clip) for g in task.train for i in g])}
    facts |= {"items held out": len(task.val), "vocabulary": tokenizer.get_vocab_size()}
    loss = partial(LOSS[cfg.task], gather=ranks.gather)
    asked = partial(count, task=cfg.task)
    reached = fit(cfg, ranks, model, out=out, loss=loss, count=asked, draw=draw, save=save,
                  facts=facts, check=best)  # fmt: skip
    end = partial(finish, cfg, ranks, best, reached)
    return ended(cfg, ranks, reached, end, f"finetune.py {cfg.task}")


def finish(cfg: TuneConfig, ranks: Ranks, best: Best, reached: Progress) -> dict:
    """Test the best epoch and log the summary; Stopped if a signal comes."""
    task, model, tokenizer, out = best.task, best.model, best.tokenizer, best.out
    ranks.wait()  # rank 0 writes the best weights, all read them
    if best.at:
        model.load_state_dict(read_tensors(out / "model.safetensors"))
        ranks.say(f"\nthe best epoch ended with step {best.at}")
    else:
        best.save()
    ranks.go_on()
    with ranks.stop.soon():
        report = evaluate(model, tokenizer, task, best.options)
    ranks.say(f"\n{report}")
    summary = {"final": True, "steps": cfg.steps, **report.to_json()}
    summary |= {"best_step": best.at, "held_out": best.best if best.at else None}
    conclude(cfg, ranks, out, summary, reached)
    return summary


def pre_trained(cfg: TuneConfig) -> Path:
    """Find the run to start from where none is named: the newest finished one of train.py on DATA.

    One that train.py named after DATA (runs/toy) goes before others (runs/trial).
    Raises: ValueError when there is none, with what to do.
    """
    data, found = Path(cfg.data).resolve(), []
    for log in Path("runs").glob("*/log.jsonl"):
        try:
            last = (read_log(log) or [{}])[-1]
        except DataError:  # of no run that could be started from
            continue
        settings = last.get("settings", {})
        if last.get("final") and "task" not in settings and "data" in settings:
            if Path(settings["data"]).resolve() == data:
                found.append((named_after(LoopConfig(data=cfg.data), log.parent), log))
    if not found:
        how = "torchrun train.py" if cfg.data == "toy" else f"torchrun train.py --data {cfg.data}"
        advice = f"{how} makes one, or pass --init RUN or --bert DIR"
        raise ValueError(f"no run under runs/ pre-trained on {cfg.data}: {advice}")
    return max(found, key=lambda x: (x[0], x[1].stat().st_mtime))[1].parent


def cli() -> int:
    """Run the command line."""
    return launch(main, TuneConfig, __doc__)


if __name__ == "__main__":
    run(cli)
