"""The loop of train.py and finetune.py (sec. 5.2): settings, precision, steps, log.

    torchrun train.py --steps 20 --log-every 1          twenty times round, a line each

The loss divides by the hidden tokens of the whole step, and V' (Eq. 9) joins all ranks: 1, 2 or 8
ranks train the same model. What is drawn at random depends on (seed, step) or (seed, epoch, video,
clip) alone, so nothing random has to be saved.

What one rank meets (a signal, a bad file, a full disk) all ranks learn of, and act on in the same
step (ranks.py). What a run leaves behind is written by keep.py.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from benchmarks import DataError
from bert import WIDE
from keep import (
    Checkpoint,
    Log,
    Progress,
    deaf_children,
    hold_pages,
    ignore_signals,
    last_checkpoint,
)
from loss import LossSums
from ranks import Ranks
from vlm import VLM, Batch
from weights import first_line

# ---------------------------------------------------------------------------------------------
# Settings


def opt(default, text: str, group: str = "", metavar: str | None = None, choices=None, at=None):
    """Declare a setting: its help text, and the group that begins with it; at=1: a bare word."""
    metadata = {"help": text, "group": group, "metavar": metavar, "choices": choices, "at": at}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class LoopConfig:
    """What pre-training and fine-tuning are both told; what is left at None is filled in later."""

    data: str = opt(
        "toy", "folder laid out as data.py says; `toy` is written if missing", "data", "DIR"
    )
    features: str | None = opt(
        None,
        "a folder of .npy or shards, or a .pickle (default: DATA/features*)",
        metavar="DIR|FILE",
    )
    skip_bad: bool = opt(False, "leave bad rows, ids and clips out, counted or named, instead of "
                                "stopping")  # fmt: skip
    workers: int = opt(0, "loader processes a rank; they change speed, never the numbers")

    bert: str | None = opt(None, "Hugging Face BERT: weights, config, vocabulary", "model", "DIR")
    scratch: bool = opt(False, "take --bert's sizes and vocabulary but random weights")
    init: str | None = opt(None, "start from this run's weights", metavar="RUN")
    dropout: float | None = opt(
        None, "dropout, 0..1 (paper: BERT's 0.1; default: toy 0, else the model's own)"
    )

    steps: int | None = opt(None, "steps (default: what --epochs give, see above)", "optimisation")
    epochs: float | None = opt(None, "passes over the training data (default: above; paper: 15)")
    batch: int | None = opt(None, "clips a step, over all ranks (default: above; paper: 256)")
    accumulate: int = opt(1, "micro-batches a step; each has its own negatives (V', clips)")
    lr: float | None = opt(
        None, "peak rate (default: the paper's 5e-5, narrower models more, 1e-3 at width 128)"
    )
    mlp_lr: float | None = opt(
        None, "peak rate of the video MLP, which starts new beside --bert (default: that of --lr)"
    )
    warmup: int | None = opt(
        None, "warm-up steps (default: a tenth of all, at most the paper's 1000)"
    )
    decay_steps: int | None = opt(None, "step at which the linear decay ends (default: the last)")
    clip: float = opt(2.0, "gradients of a larger norm are scaled down to this (paper: 2.0)")
    precision: str = opt("auto", "auto: bf16 or fp16 on a GPU, fp32 on a CPU (paper: fp16)",
                         choices=("auto", "fp32", "bf16", "fp16"))  # fmt: skip
    compile: bool = opt(False, "compile layers and Eq. 9: a minute first, then faster on a GPU")
    seed: int = opt(0, "another seed: other weights, clips, masks and dropout")

    out: str | None = opt(None, "run directory (default: a new one in runs/)", "the run", "RUN")
    resume: bool = opt(False, "go on with the run at --out; flags given again replace its own")
    save_every: int | None = opt(
        None, "steps between checkpoints (default: 500, and at least five minutes)"
    )
    log_every: int | None = opt(None, "steps between log lines (default: a fiftieth of the run)")
    json: str | None = opt(None, "write the final summary to this file too", metavar="FILE")

    def __post_init__(self):
        positive = ("steps", "epochs", "batch", "accumulate", "save_every", "log_every",
                    "decay_steps", "lr", "mlp_lr", "clip")  # fmt: skip
        for name in (*positive, *self.POSITIVE):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, wanted more than 0")
        if self.bert and self.init:
            raise ValueError("--bert and --init both give weights: choose one")
        if self.scratch and not self.bert:
            raise ValueError("--scratch wants the sizes and vocabulary of --bert DIR")
        check_compile(self.compile)

    POSITIVE = ()

    @property
    def name(self) -> str:
        """Name a run after its data."""
        return Path(self.data).resolve().name


def check_compile(asked: bool) -> None:
    """Refuse to compile where PyTorch does it again for every batch: ValueError."""
    if asked and torch.__version__ < (2, 5):
        raise ValueError(
            f"--compile wants PyTorch 2.5 or newer, this is {torch.__version__}, which compiles "
            "each layer anew for each length: go without (with --resume: --no-compile)"
        )


def parse(Config: type, argv: list[str] | None = None, description: str = "") -> tuple:
    """Turn a config dataclass into a command line.

    Returns: (config, names of the settings that were given on the command line).
    """
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group, groups = parser, {}
    for field in dataclasses.fields(Config):
        about = field.metadata
        if name := about["group"]:
            group = groups[name] = groups.get(name) or parser.add_argument_group(name)
        if about["at"]:
            parser.add_argument(field.name, help=about["help"], choices=about["choices"])
            continue
        kind = (typing.get_args(field.type) or (field.type,))[0]
        text, shown = about["help"], field.default
        if shown is not None and shown is not False:  # beside the paper's value, if that is there
            beside = re.search(r"\((paper|the authors')[^()]*\)$", text)
            text = f"{text[:-1]}; default: {shown})" if beside else f"{text} (default: {shown})"
        how = dict(help=text, default=argparse.SUPPRESS)
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif about["choices"]:
            how["choices"] = about["choices"]
        else:
            how |= dict(type=kind, metavar=about["metavar"] or {int: "N", float: "X"}[kind])
        group.add_argument("--" + field.name.replace("_", "-"), **how)
    given = vars(parser.parse_args(argv))
    return Config(**given), set(given)


# ---------------------------------------------------------------------------------------------
# One program on all ranks


class Objective(nn.Module):
    """What DDP wraps: the model and the loss that is trained."""

    def __init__(self, model: VLM, loss: Callable[[VLM, Batch], LossSums]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> LossSums:
        """Return the loss of this rank's batch."""
        return self.loss(self.model, batch)


def distribute(model: VLM, loss: Callable, ranks: Ranks, compiled: bool) -> nn.Module:
    """Join model and loss, compiled if asked, in DDP where there are several ranks."""
    if compiled:
        model.compile_parts()
    objective = Objective(model, loss)
    if ranks.world == 1:
        return objective
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(objective, ids, gradient_as_bucket_view=True)


def launch(main: Callable, Config: type, description: str, argv: list[str] | None = None) -> int:
    """Run train.py's or finetune.py's main on a command line: the exit code of this rank."""
    try:
        main(*parse(Config, argv, description))
        ignore_signals()  # all is saved: a second one on the way out must not look like a failure
        return 0
    except KeyboardInterrupt:
        print("error: ended at once; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: {first_line(error)} Lower --batch, or raise --accumulate, which takes it in "
              "parts; --resume goes on from the last checkpoint", file=sys.stderr)  # fmt: skip
        return 2
    except RuntimeError as error:
        rank, said = os.environ.get("RANK", "0"), first_line(error)
        if not dist.is_initialized() or not re.search("gloo|nccl|clos|reset", said, re.IGNORECASE):
            raise
        time.sleep(2)  # so that torchrun finds first, and names, the rank that was lost
        print(
            f"error: rank {rank} lost another rank ({said}); what that one or torchrun says is the "
            "cause. --resume goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 1


# ---------------------------------------------------------------------------------------------
# The loop, and what it needs


def learning_rate(step: int, cfg: LoopConfig, peak: float | None = None) -> float:
    """Return a step's rate: linear warm-up, then polynomial decay of degree 1 to 0 (sec. 5.2).

    Args: peak: the rate to warm up to (default: cfg.lr).

    >>> cfg = LoopConfig(steps=100, lr=1.0, warmup=10)
    >>> [learning_rate(step, cfg) for step in (0, 9, 55, 100)]
    [0.1, 1.0, 0.5, 0.0]
    """
    peak = cfg.lr if peak is None else peak
    if step < cfg.warmup:
        return peak * (step + 1) / cfg.warmup
    end = cfg.decay_steps or cfg.steps  # DEVIATION: the authors' decay ends at step 1,000,000
    return peak * max(0.0, (end - step) / max(1, end - cfg.warmup))


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Choose the autocast type: (dtype, why)."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32, "fp32, on a CPU"
        # DEVIATION: the paper's fp16 needs its loss scaled, bf16 does not; below 8.0 it is imitated
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "bf16, which this GPU has"
        return torch.float16, "fp16, for this GPU has no bf16"
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    why = f"{name}, as asked"
    on_cpu = device.type == "cpu" and name != "fp32"
    if on_cpu and (times := half_costs(named[name])) > 2:
        why += f" (this processor multiplies fp32 {times:.0f} times faster: leave out --precision)"
    return named[name], why


def half_costs(dtype: torch.dtype) -> float:
    """Measure a matrix product's seconds in dtype over its seconds in fp32, on the CPU."""

    def seconds(x: Tensor) -> float:
        times = []
        for _ in range(4):
            begun = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - begun)
        return min(times)  # the first one may set things up, others may be interrupted

    x = torch.ones(256, 256)
    return seconds(x.to(dtype)) / seconds(x)


def attention_kernel(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Choose PyTorch's attention for half precision; around backward too, which computes it again.
    In fp32 nothing changes."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    if device.type == "cpu":
        # there PyTorch's fused attention takes 2-4 times the plain one's time in backward
        return sdpa_kernel(SDPBackend.MATH)
    # cuDNN's makes a plan for every new length, and most batches have one
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Steps(Dataset):
    """The batches of steps start..stop on this rank, in order; a bad file is handed on as it is."""

    def __init__(self, draw: Callable[[int, int], Batch], start: int, stop: int, accumulate: int):
        self.draw, self.start, self.stop, self.accumulate = draw, start, stop, accumulate

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __getitem__(self, i: int) -> Batch | DataError:
        try:
            step, micro = divmod(i, self.accumulate)
            return self.draw(self.start + step, micro)
        except DataError as error:  # raised in a worker it would lose its type
            return error


def load(steps: Steps, workers: int, device: torch.device) -> Iterator[Batch | DataError]:
    """Read ahead in `workers` processes, or here with 0; a GPU gets pinned batches."""
    how = dict(num_workers=workers, pin_memory=device.type == "cuda")
    if workers:  # `draw` is handed on by fork, which newer Pythons have to be asked for
        how |= dict(multiprocessing_context="fork")
    with deaf_children():
        return iter(DataLoader(steps, None, **how))


def memory_mib(device: torch.device) -> float:
    """Return the peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if (status := Path("/proc/self/status")).exists():  # ru_maxrss would count the parent's too
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, elsewhere KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def clock(seconds: float) -> str:
    """Write a duration of `seconds`.

    >>> clock(75), clock(7500)
    ('1:15', '2:05:00')
    """
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}:{m % 60:02}:{s:02}" if m >= 60 else f"{m}:{s:02}"


class Trainer:
    """A model in training: its precision, its optimizer, and steps that all ranks take alike."""

    def __init__(self, cfg: LoopConfig, ranks: Ranks, model: VLM, loss: Callable):
        self.cfg, self.ranks, self.model, self.loss = cfg, ranks, model, loss
        self.dtype, self.why = choose_precision(cfg.precision, ranks.device)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = adam(self.params, set(model.videomlp.parameters()), cfg.lr)
        half = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(ranks.device.type, init_scale=128.0, enabled=half)

    def facts(self) -> dict[str, object]:
        """Return what all ranks must hold alike and a resumed run should."""
        size, device = sum(p.numel() for p in self.params), self.ranks.device.type
        facts = {"parameters": size, "torch": str(torch.__version__), "ranks": self.ranks.world}
        return facts | {"device": device, "precision": str(self.dtype)}

    def begin(self) -> None:
        """Compile and wrap the model, whose weights are all there now, and say so."""
        cfg, facts, world = self.cfg, self.facts(), self.ranks.world
        self.objective = distribute(self.model, self.loss, self.ranks, cfg.compile)
        self.model.train()
        if facts["device"] == "cpu" and self.model.config.hidden_size < WIDE:
            hold_pages()
        self.ranks.say(f"training in {self.why}, {world} process{'es' * (world > 1)}, "
                       f"{facts['parameters']:,} parameters")  # fmt: skip

    def step(self, step: int, batches: list[Batch], counts: Tensor) -> tuple[list, float]:
        """Go forward and backward, one micro-batch at a time, then along the gradient.

        Args:    batches: this rank's, on the CPU. counts (2,): how much the step predicts of either
                 kind, over all ranks and micro-batches.
        Returns: ([(loss, batch)], the gradient's norm, in nats), by which alone all ranks see
                 whether the step was taken; NaN without batches.
        """
        for group, peak in zip(
            self.optimizer.param_groups, (self.cfg.lr, self.cfg.mlp_lr), strict=True
        ):
            group["lr"] = learning_rate(step, self.cfg, peak)
        torch.manual_seed(mix(self.cfg.seed, step, self.ranks.rank))  # for dropout
        parts, world, device = [], self.ranks.world, self.ranks.device
        for i, batch in enumerate(batches):
            batch = batch.to(device)
            wait = world > 1 and i < self.cfg.accumulate - 1
            alone = self.objective.no_sync() if wait else contextlib.nullcontext()
            with attention_kernel(device, self.dtype), alone:
                with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                    sums = self.objective(batch)  # products in half precision, sums are not
                # DDP averages gradients over ranks; the loss divides by the whole step's counts
                self.scaler.scale(sums.value(*counts) * world).backward()
            parts.append((sums, batch))
        if not parts:
            return parts, math.nan
        return parts, update(self.optimizer, self.scaler, self.params, self.cfg.clip)


def fit(
    cfg: LoopConfig,
    ranks: Ranks,
    model: VLM,
    out: Path,
    loss: Callable[[VLM, Batch], LossSums],
    count: Callable[[Batch], tuple[Tensor | int, Tensor | int]],
    draw: Callable[[int, int], Batch],
    save: Callable[[], None],
    facts: dict[str, object],
    check: Callable[[int, Log], bool] | None = None,
) -> Progress:
    """Train from the last checkpoint, or the start, to cfg.steps.

    Args:    out: the run directory. loss: (model, batch) -> LossSums. count: batch -> the two
             counts that loss will have. draw: (step, micro-batch) -> this rank's batch. save:
             writes the model beside trainer.pt. facts: what all ranks must hold alike and a resumed
             run should. check: (step, log) -> whether it validated after that step, which is then
             saved too.
    Returns: how far it came: fewer steps than cfg.steps when a signal asked to stop.
    Raises:  ValueError after ten steps in a row without a finite loss and gradient; the DataError
             of whichever rank met one, on every rank; OSError where a checkpoint cannot be written.
    """
    trainer = Trainer(cfg, ranks, model, loss)
    kept = Checkpoint(out / "trainer.pt", model, trainer.optimizer, trainer.scaler, cfg,
                      facts | trainer.facts(), save, ranks)  # fmt: skip
    reached = kept.resume()
    if reached.step > cfg.steps:
        raise ValueError(
            f"--steps {cfg.steps}: {out} is at step {reached.step} already, ask for more"
        )
    trainer.begin()
    log = Log(out / "log.jsonl", reached.step, ranks)
    start, begun = reached.step, time.monotonic()
    total, bad_in_a_row = Totals(ranks.device, start, begun), 0
    if not start:  # a disk that cannot take it says so now, and --resume always can
        kept.write()
    loader = load(Steps(draw, start, cfg.steps, cfg.accumulate), cfg.workers, ranks.device)
    for step in range(start, cfg.steps):
        batches, counts, stop_now, unread = read_step(loader, cfg, count, ranks)
        parts, norm = trainer.step(step, batches, counts)
        done = reached.step = step + 1

        # ---- all ranks hold the same gradients, so all skip a step or none does
        if math.isfinite(norm):
            total.add(parts)
            bad_in_a_row = 0
        else:
            bad_in_a_row, reached.skipped = bad_in_a_row + 1, reached.skipped + 1
        if bad_in_a_row == 10:
            cause = unread or "their loss or gradient was not finite"
            raise ValueError(
                f"ten steps in a row were skipped, the last one step {done}: {cause}; "
                f"the last good checkpoint is {last_checkpoint(out)}"
            )

        # ---- log
        now = time.monotonic()
        if done % cfg.log_every == 0 or done == cfg.steps:
            left = (now - begun) / (done - start) * (cfg.steps - done)
            lr = trainer.optimizer.param_groups[0]["lr"]
            row = log_row(total, ranks, reached, now=now, lr=lr, grad=norm, left=left)
            log(row, log_line(row, cfg.steps))
            total = Totals(ranks.device, done, now)

        # ---- validate, save
        checked = check is not None and check(done, log)
        if checked:
            model.train()
            total.since += time.monotonic() - now
        if done == cfg.steps or stop_now or checked or kept.due(done):
            kept.write()
        if stop_now:
            break
    kept.count_seconds()
    return reached


def adam(params: list[nn.Parameter], mlp: set[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Make Adam (sec. 5.2: betas 0.9, 0.98) of rate lr; mlp, the video MLP, is a group."""
    groups = [{"params": [p for p in params if (p in mlp) == own]} for own in (False, True)]
    return torch.optim.Adam(groups, lr, betas=(0.9, 0.98), eps=1e-8, fused=True)


def update(optimizer, scaler: torch.amp.GradScaler, params: list, clip: float) -> float:
    """Take a step along the gradient, its norm at most clip, if that is finite.

    Args:    clip: largest norm (sec. 5.2: 2.0), of the unit of the loss, nats.
    Returns: the norm as it was.
    """
    scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(params, clip))
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def read_step(loader, cfg: LoopConfig, count: Callable, ranks: Ranks) -> tuple:
    """Read this rank's micro-batches of a step, and learn how the others fared.

    Returns: (batches, the two counts over all ranks (2,), whether a signal asked any rank to stop,
             what could not be read). Where one rank could not read its own, none has any.
    Raises:  DataError on every rank for a file that one could not read, unless --skip-bad.
    """
    batches = list(itertools.islice(loader, cfg.accumulate))
    errors = [batch for batch in batches if isinstance(batch, DataError)]
    asked = [(0, 0)] if errors else [[int(n) for n in count(b)] for b in batches]
    counts = [*map(sum, zip(*asked, strict=True)), int(ranks.stop.asked), len(errors)]
    counts = ranks.sum(torch.tensor(counts, device=ranks.device))
    stop, bad = counts[2:].tolist()
    if not bad:
        return batches, counts[:2], bool(stop), ""
    on = "on rank {}: " if ranks.world > 1 else ""
    met = [on.format(r) + str(e) for r, each in enumerate(ranks.all(errors)) for e in each]
    if not cfg.skip_bad:
        raise DataError(met[0])
    ranks.say("\n".join(f"a step is skipped: {line}" for line in met))
    return [], counts[:2], bool(stop), met[0]


class Totals:
    """What the steps from `step`, at time `since`, add up to: on the device, so that none waits."""

    def __init__(self, device: torch.device, step: int, since: float):
        self.step, self.since = step, since
        self.sums = torch.zeros(7, device=device, dtype=torch.float64)
        self.chance, self.joint = (0.0, 0.0), True

    def add(self, parts: list[tuple[LossSums, Batch]]) -> None:
        """Count a step's micro-batches on this rank."""
        for sums, b in parts:
            tokens = b.video_valid.sum() + b.text_valid.sum() + 2 * len(b.video)  # [CLS] and [SEP]
            blind = (~b.video_valid.any(1)).sum()
            row = [sums.video_sum, sums.video_count, sums.text_sum, sums.text_count, tokens, blind]
            self.sums[:6] += torch.stack([x.detach().double() for x in row])
            self.sums[6] += len(b.video)
            self.chance, self.joint = (sums.video_chance, sums.text_chance), sums.joint

    def row(self, ranks: Ranks, seconds: float) -> dict:
        """Return the means of an interval of so many seconds over all ranks, and its rates."""
        *sums, tokens, blind, clips = ranks.sum(self.sums).cpu()
        whole = LossSums(*sums, *self.chance, self.joint)
        row = whole.means() | {"chance": whole.chance()}
        if not clips:  # every step was skipped
            row = dict.fromkeys(row)
        row |= {"clips_per_s": float(clips) / seconds, "tokens_per_s": float(tokens) / seconds}
        return row | {"clips_without_video": int(blind)}


def log_row(
    total: Totals, ranks: Ranks, reached: Progress, now: float, lr: float, grad: float, left: float
) -> dict:
    """Return what log.jsonl keeps of the steps that total holds.

    Args: now, left: the clock, and until the end, seconds. lr, grad: the last rate and norm.
    """
    seconds, steps = now - total.since, reached.step - total.step
    row = {"step": reached.step, **total.row(ranks, seconds), "lr": lr}
    row["grad"] = grad if math.isfinite(grad) else None  # JSON has no NaN
    row |= {"ms": 1000 * seconds / steps, "skipped": reached.skipped}
    return row | {"memory_mib": round(memory_mib(ranks.device)), "left_s": round(left)}


def log_line(row: dict, steps: int) -> str:
    """Write a log row for a reader."""
    loss = "no step was finite"
    if row["loss"] is not None:
        both = f"video {row['video']:.2f} text {row['text']:.2f}; "
        both = both if row["video"] and row["text"] else ""
        loss = f"loss {row['loss']:.3f} ({both}chance {row['chance']:.2f})"
    grad = "step skipped" if row["grad"] is None else f"grad {row['grad']:.2f}"
    line = (
        f"step {row['step']:>{len(str(steps))}}/{steps} | {loss} | "
        f"lr {row['lr']:.1e} | {grad} | {row['ms']:.0f} ms | "
        f"{row['clips_per_s']:.0f} clips/s | {row['tokens_per_s']:.0f} tokens/s | "
        f"{row['memory_mib']} MiB | {clock(row['left_s'])} left"
    )
    line += f" | {row['skipped']} skipped" if row["skipped"] else ""
    return line + (f" | {n} clips without video" if (n := row["clips_without_video"]) else "")


def mix(*key: int) -> int:
    """Make one seed of several numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])
