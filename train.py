"""Pre-train VLM (sec. 5.2).

    torchrun train.py                                  toy world, two to three minutes on two cores
    torchrun --nproc_per_node=2 train.py --data DATA --bert BERT             your own data
    torchrun --nproc_per_node=8 train.py --data HOWTO --bert bert-base-uncased     paper scale
    torchrun train.py --resume --out runs/toy          goes on where a run stopped, bit for bit

A run directory holds model.safetensors, config.json, tokenizer.json (the model), trainer.pt (what
resuming needs besides, from before the first step on), log.jsonl (what was printed; its last line
is the summary) and lock (who writes here).

Without --steps and --epochs: the toy world takes 1,000 steps of 32 clips, 2 of a video, without
dropout; other data the paper's 15 epochs of 256 clips, 32 of a video. The loop itself, with ranks,
precision, schedule and checkpoints, stands in loop.py.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import platform
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import DataError
from data import Corpus, Data, open_data, open_features, special_ids
from eval import set_means, validate, zero_shot_retrieval
from keep import (
    Progress,
    Stopped,
    append,
    can_write,
    fingerprint,
    hold,
    read_checkpoint,
    read_log,
    write_json,
)
from loop import LoopConfig, clock, fit, launch, opt
from loss import LossSums
from ranks import Ranks, start_ranks
from toy import write_toy
from vlm import VLM, Batch, VLMConfig, load_bert, load_run, load_tokenizer, run, save_run

# ---------------------------------------------------------------------------------------------
# Settings


@dataclass
class TrainConfig(LoopConfig):
    """Pre-train. Settings left at None take the toy world's values there, else the paper's."""

    min_text: int = opt(
        8, "shortest clip text in word pieces; the longest is 64 (paper: 8)", "data"
    )
    clips_per_video: int | None = opt(
        None, "clips of one video in a batch (default: toy 2; paper 32)"
    )
    layers: int = opt(
        3, "without --bert and --init: layers of a new, random BERT (paper: 12)", "model"
    )
    width: int = opt(128, "without them: hidden size, a multiple of 32 (paper: 768)")
    loss: str = opt("vlm", "masked token loss (Eq. 8) or L_MFM-MLM (Eq. 7)", "objective",
                    choices=("vlm", "mfm-mlm"))  # fmt: skip
    mmm: float = opt(0.5, "share of clips, 0..1, that lose a whole modality (paper: 0.5)")

    POSITIVE = ("clips_per_video", "layers", "width")
    WARMUP = 1000  # steps (sec. 5.2)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.mmm <= 1:
            raise ValueError(f"--mmm is {self.mmm}, wanted 0..1")
        if not 1 <= self.min_text <= Corpus.MAX_TEXT:
            raise ValueError(f"--min-text is {self.min_text}, wanted 1..{Corpus.MAX_TEXT}")
        if self.width % 32:
            raise ValueError(f"--width is {self.width}, wanted a multiple of 32")


TOY = dict(steps=1000, batch=32, clips_per_video=2, dropout=0.0)
PAPER = dict(epochs=15, batch=256, clips_per_video=32)  # sec. 5.2; lr and warm-up: `fill_in`
MADE = ("bert", "scratch", "init", "layers", "width", "loss", "dataset")  # a resumed run has these


# ---------------------------------------------------------------------------------------------
# Pre-training


def agreed(cfg: LoopConfig, given: set[str], ranks: Ranks, *defaults: dict) -> LoopConfig:
    """Settle a command on rank 0, for all; ValueError where a rank was given another one."""
    command = {f"--{k.replace('_', '-')}": v for k, v in dataclasses.asdict(cfg).items()}
    ranks.agree({"program": type(cfg).__name__, "torch": str(torch.__version__), **command})
    return ranks.first(lambda: settle(cfg, set(given), *defaults))


def settle(cfg: LoopConfig, given: set[str], toy: dict = TOY, paper: dict = PAPER) -> LoopConfig:
    """Fill what was left open: from the run that goes on, or the toy world's or the paper's.

    Raises: ValueError when the run that should go on is one of another kind.
    """
    if cfg.resume:
        return settle_resumed(cfg, given)
    if (cfg.bert or cfg.init) and (sizes := given & {"layers", "width"}):
        source = f"--bert {cfg.bert}" if cfg.bert else f"--init {cfg.init}"
        raise ValueError(f"--{min(sizes)}: {source} has its own: leave the flag out")
    defaults = toy if is_toy(cfg.data) else paper
    empty = {k: v for k, v in defaults.items() if getattr(cfg, k) is None}
    if cfg.epochs is not None:
        empty.pop("steps", None)
    elif cfg.steps is not None:
        empty.pop("epochs", None)  # they would have no part in it
    return dataclasses.replace(cfg, **empty)


def settle_resumed(cfg: LoopConfig, given: set[str]) -> LoopConfig:
    """Take the settings of the run that goes on, but for those given again; ValueError as above."""
    out = Path(cfg.out or newest_run(cfg))
    saved = read_checkpoint(out / "trainer.pt")["config"]
    ended = any(row.get("final") for row in read_log(out / "log.jsonl")[-1:])
    known = {f.name for f in dataclasses.fields(cfg)}
    if "task" in saved and saved["task"] != getattr(cfg, "task", None):
        task = saved["task"]
        raise ValueError(f"{out} was fine-tuned for {task}: resume it as that, "
                         f"torchrun finetune.py {task} --resume --out {out}")  # fmt: skip
    if "task" in known and "task" not in saved:
        raise ValueError(f"{out} is a pre-training run: torchrun train.py --resume goes on")
    changed = {k: getattr(cfg, k) for k in given - {"resume", "out", "json"}}
    changed = {k: v for k, v in changed.items() if saved.get(k) != v}
    for name, value in changed.items():
        flag, was = f"--{name.replace('_', '-')} {value}", saved.get(name)
        if name in MADE:
            raise ValueError(f"{flag}: the run in {out} has {was}, and its model is made: "
                             "leave the flag out, or start another run")  # fmt: skip
        if ended and not changed.keys() & {"steps", "epochs"}:
            raise ValueError(f"{flag}: the run in {out} has ended, with {was}: leave the flag out, "
                             "or train on with more --steps")  # fmt: skip
        print(f"resuming with {flag}, it was {was}")
    for name in saved.keys() - known:
        print(f"the run's setting {name} = {saved[name]} is unknown here and left out")
    values = {k: v for k, v in saved.items() if k in known} | changed
    if "epochs" in changed and "steps" not in changed:
        values["steps"] = None
    return type(cfg)(**values | {"resume": True, "out": str(out), "json": cfg.json})


def fill_in(cfg: LoopConfig, model: VLM, epoch: float) -> None:
    """Fill what depends on the model and on how many steps an epoch has."""
    if cfg.steps is None:
        cfg.steps = max(1, math.ceil(cfg.epochs * epoch))
    cfg.log_every = cfg.log_every or max(1, cfg.steps // 50)
    # DEVIATION: a narrow model wants larger steps, and a short run a shorter warm-up (README). The
    # power leads from the paper's 5e-5 at BERT-base to 1e-3, found by trial, at width 128.
    cfg.lr = cfg.lr or min(1e-3, 5e-5 * (768 / model.config.hidden_size) ** 1.7)
    cfg.warmup = min(cfg.WARMUP, cfg.steps // 10) if cfg.warmup is None else cfg.warmup


def is_toy(data: str) -> bool:
    """Tell the toy world, there or still to be written, from other data."""
    return (Path(data) / "toy.json").exists() or (data == "toy" and not Path(data).exists())


def named_after(cfg: LoopConfig, run: Path) -> bool:
    """Tell whether a run has the name that it gets without --out: runs/toy, runs/toy-2 .."""
    return bool(re.fullmatch(re.escape(cfg.name) + r"(-\d+)?", run.name))


def newest_run(cfg: LoopConfig) -> Path:
    """Find the newest run of this name, which --resume without --out means; ValueError if none."""
    runs = [p.parent for p in Path("runs").glob("*/trainer.pt") if named_after(cfg, p.parent)]
    for path in sorted(runs, key=lambda p: (p / "trainer.pt").stat().st_mtime, reverse=True):
        data = read_checkpoint(path / "trainer.pt", mmap=True)["config"].get("data")
        if data and Path(data).resolve() == Path(cfg.data).resolve():  # runs/a-2: of a or a-2
            return path
    raise ValueError("--resume: no run with a trainer.pt under runs/ that was trained on "
                     f"{cfg.data}: name one with --out")  # fmt: skip


def run_directory(cfg: LoopConfig, ranks: Ranks) -> Path:
    """Choose or check the run directory, and lock it on rank 0; all ranks learn which.

    Raises: ValueError for a new run in another one's, or one that another process has; OSError
            where it cannot be made.
    """

    def choose() -> Path:
        if cfg.out:
            out = Path(cfg.out)
            if out.exists() and not out.is_dir():
                raise ValueError(f"--out {out} is a file, wanted a folder")
            if (out / "lock").exists():  # who has it is a better answer than that it is not empty
                ranks.lock = hold(out)
            if not cfg.resume and out.exists() and not is_free(out):
                raise ValueError(
                    f"--out {out} is not empty: add --resume to go on, or choose another"
                )
            out.mkdir(parents=True, exist_ok=True)
        else:
            out = new_directory(cfg.name)
        ranks.lock = ranks.lock or hold(out)
        return out

    def chosen() -> Path:
        try:
            return choose()
        except OSError as error:
            where = f"--out {cfg.out}" if cfg.out else "runs/ in this folder"
            raise OSError(
                f"{where} cannot be written: {error.strerror}: choose another --out"
            ) from None

    return ranks.first(chosen)


def new_directory(name: str) -> Path:
    """Make runs/NAME, or NAME-2 and so on, which no other run that starts now takes as well."""
    for n in itertools.count(1):
        out = Path("runs") / (name + (f"-{n}" if n > 1 else ""))
        with contextlib.suppress(FileExistsError):
            out.mkdir(parents=True)
            return out


def is_free(out: Path) -> bool:
    """Tell an empty folder, or what is left of a run that ended before its first checkpoint."""
    if not out.is_dir():
        return False
    names = {p.name for p in out.iterdir() if p.suffix != ".partial"}
    if "log.jsonl" in names and not (out / "log.jsonl").stat().st_size:
        # its first model may be there: trainer.pt, which --resume wants, is written after it
        return names <= {"lock", "log.jsonl", "model.safetensors", "config.json", "tokenizer.json"}
    return names <= {"lock"}


def make_model(cfg: LoopConfig, E: int, say: Callable[[str], None]) -> tuple[VLM, Tokenizer]:
    """Make the model for features E wide; its weights depend on seed, --bert and --init alone.

    Raises: DataError where features, vocabulary and weights do not fit together.
    """
    torch.manual_seed(cfg.seed)
    if run_to_read := cfg.out if cfg.resume else cfg.init:
        model, tokenizer = load_run(run_to_read)
        if (was := model.config.video_dim) != E:
            if cfg.resume:
                raise DataError(f"features are {E} wide, the run {run_to_read} reads {was}: "
                                "pass --features of that width")  # fmt: skip
            say(f"features are {E} wide, the run {run_to_read} read {was}: a new video MLP")
            kept = {k: x for k, x in model.state_dict().items() if not k.startswith("videomlp.")}
            model = VLM(dataclasses.replace(model.config, video_dim=E))
            model.load_state_dict(kept, strict=False)
    elif cfg.bert:
        if Path(cfg.bert).is_file():
            raise DataError(f"--bert {cfg.bert} is a file, wanted a folder with config.json, "
                            "vocabulary and weights")  # fmt: skip
        tokenizer = load_tokenizer(cfg.bert)
        ids = special_ids(tokenizer)  # config.json names [PAD] at most; not all are BERT-base's
        ids.pop("vocab_size")  # config.json's, which may be larger
        model = VLM(VLMConfig.from_json(Path(cfg.bert) / "config.json", video_dim=E, **ids))
        if not cfg.scratch:
            load_bert(model, cfg.bert, say)
    else:
        if not (Path(cfg.data) / "tokenizer.json").exists():
            raise DataError(f"{cfg.data} has no tokenizer.json of its own: pass --bert DIR")
        tokenizer = load_tokenizer(cfg.data)
        shape = dict(
            hidden_size=cfg.width, num_hidden_layers=cfg.layers, intermediate_size=4 * cfg.width
        )
        shape |= dict(num_attention_heads=cfg.width // 32, max_position_embeddings=96)
        model = VLM(VLMConfig(video_dim=E, **shape, **special_ids(tokenizer)))
    if cfg.dropout is not None:
        model.set_dropout(cfg.dropout)
    for name, own in special_ids(tokenizer).items():
        theirs = getattr(model.config, name)
        if own > theirs or own != theirs and name != "vocab_size":
            raise DataError(
                f"the tokenizer's {name} is {own}, the model's {theirs}: they are not a pair"
            )
    return model, tokenizer


def build(cfg: TrainConfig, say: Callable[[str], None]) -> tuple[VLM, Tokenizer, Data]:
    """Make the model and open the data to pre-train on."""
    features = open_features(cfg.data, cfg.features)
    model, tokenizer = make_model(cfg, features.width, say)
    settings = dict(seed=cfg.seed, clips_per_video=cfg.clips_per_video)
    settings |= dict(min_text=cfg.min_text, mmm=cfg.mmm)
    data, said = open_data(cfg.data, features, tokenizer, model.config, cfg.skip_bad, **settings)
    say("\n".join(said))
    return model, tokenizer, data


def begin(cfg: LoopConfig, ranks: Ranks) -> None:
    """Write the toy world if it is asked for and not there.

    Raises: ValueError for a batch that ranks and micro-batches do not divide.
    """
    if cfg.batch % (ranks.world * cfg.accumulate):
        raise ValueError(
            f"--batch {cfg.batch} is not divisible by {ranks.world} ranks x "
            f"--accumulate {cfg.accumulate}"
        )
    ranks.first(lambda: can_write(cfg.json, "--json"))
    if ranks.first(lambda: is_toy(cfg.data) and not Path(cfg.data).exists()):
        ranks.first(lambda: write_toy(cfg.data))
        ranks.say(f"toy world written to {cfg.data}/")
    # A node that does not see rank 0's files writes its own toy world, which is the same one.
    if os.environ.get("LOCAL_RANK") == "0" and is_toy(cfg.data) and not Path(cfg.data).exists():
        write_toy(cfg.data)
    ranks.wait()


def main(cfg: TrainConfig, given: set[str] = frozenset()) -> dict:
    """Pre-train and evaluate; return the summary, the last line of log.jsonl."""
    with start_ranks() as ranks:
        return pre_train(agreed(cfg, given, ranks), ranks)


def pre_train(cfg: TrainConfig, ranks: Ranks) -> dict:
    """Do what `main` says, as one of the ranks."""
    begin(cfg, ranks)
    model, tokenizer, data = ranks.every(lambda: build(cfg, ranks.say))
    fill_in(cfg, model, len(data.train.ids) * cfg.clips_per_video / cfg.batch)
    out = run_directory(cfg, ranks)
    cfg.out = str(out)
    # What a loss never reads, DDP must not wait for: a classifier of --init, and biases in Eq. 9.
    model.set_labels([])
    if not cfg.resume:  # means of --init are another model's after a step
        model.video_mean.zero_(), model.text_mean.zero_()
    model.to(ranks.device)
    model.cls["predictions"].bias.requires_grad_(cfg.loss == "mfm-mlm")
    c = model.config
    c.stage, c.task, c.data = "pre-trained", cfg.loss, cfg.name
    ranks.say(f"run directory {out}, {cfg.steps} steps of {cfg.batch} clips")

    def loss(model: VLM, batch: Batch) -> LossSums:
        return model.pretrain_loss(batch, cfg.loss, ranks.gather)

    def count(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.video_hidden.sum(), batch.text_hidden.sum()

    def draw(step: int, micro: int) -> Batch:
        part = ranks.rank * cfg.accumulate + micro
        return data.train.step(step, cfg.batch, part, ranks.world * cfg.accumulate)

    def save() -> None:
        save_run(out, model, tokenizer)

    captions = data.train.captions
    facts = {"training videos": fingerprint(data.train.ids), "captions": len(captions.start)}
    facts |= {"word pieces": len(captions.tokens), "vocabulary": tokenizer.get_vocab_size()}
    reached = fit(
        cfg, ranks, model, out=out, loss=loss, count=count, draw=draw, save=save, facts=facts
    )
    end = partial(finish, cfg, ranks, model, tokenizer, data, out, reached)
    return ended(cfg, ranks, reached, end, "train.py")


def ended(
    cfg: LoopConfig, ranks: Ranks, reached: Progress, finish: Callable[[], dict], program: str
) -> dict:
    """Finish a run, or say how one that a signal stopped goes on; return its summary."""
    with contextlib.suppress(Stopped):
        if reached.step == cfg.steps:
            return finish()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    flags = f"--nproc_per_node={here} " * (here > 1)
    flags += "[nodes as before] " * (here < ranks.world)  # how they meet only torchrun knows
    again = f"torchrun {flags}{program} --resume --out {shlex.quote(cfg.out)}"
    ranks.say(f"stopped at step {reached.step}; to go on: {again}")
    return {"final": False, "steps": reached.step}


def finish(cfg, ranks, model: VLM, tokenizer, data: Data, out: Path, reached: Progress) -> dict:
    """Evaluate the model, save it with its means, log the summary; Stopped if a signal comes."""
    set_means(model, data.train)
    summary = {"final": True, "steps": cfg.steps, "loss": None, "chance": None}
    if data.val:
        titles = {
            cfg.mmm: f"as in training (MMM {cfg.mmm:.0%})",
            1.0: "from the other modality alone",
        }
        for mmm, title in titles.items():
            ranks.go_on()
            table = validate(model, data.val, cfg.loss, cfg.batch, mmm, ranks)
            ranks.say(f"\nheld-out videos, nats a hidden token, {title}")
            ranks.say(f"{'':10}{'video':>8}{'text':>8}{'loss':>8}")
            for name, row in table.items():
                ranks.say(f"{name:10}" + "".join(f"{x:8.3f}" for x in row.values()))
            summary.setdefault("val", {})[str(mmm)] = table
        first = summary["val"][str(cfg.mmm)]
        summary |= {"loss": first["model"]["loss"], "chance": first["chance"]["loss"]}
    if data.test:
        ranks.go_on()
        model.eval()
        with contextlib.suppress(Stopped), ranks.stop.soon():
            found = zero_shot_retrieval(model, tokenizer, data.features, data.test)
        ranks.go_on()  # where one was stopped all leave, and none waits for it below
        ranks.say(f"\nzero-shot text-to-video retrieval, {len(data.test)} {data.test_name}")
        for name, row in found.items():
            ranks.say(f"{name:16}" + "  ".join(f"{k} {v:.3f}" for k, v in row.items()))
        summary |= {"R@1": found["dot product"]["R@1"], "R@10": found["dot product"]["R@10"]}
        summary |= {"R@10_chance": found["chance"]["R@10"], "retrieval": found}
    ranks.first(lambda: save_run(out, model, tokenizer))
    conclude(cfg, ranks, out, summary, reached)
    return summary


def conclude(cfg: LoopConfig, ranks: Ranks, out: Path, summary: dict, reached: Progress) -> None:
    """Complete the summary, with what made it; write it to log.jsonl and --json, say where."""
    summary |= {"skipped": reached.skipped, "seconds": round(reached.seconds, 1)}
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    summary |= {"settings": dataclasses.asdict(cfg), "versions": versions}
    if ranks.rank == 0:
        with open(out / "log.jsonl", "a") as f:
            append(f, summary)
        write_json(cfg.json, summary)
    skipped = f", {reached.skipped} steps skipped" if reached.skipped else ""
    ranks.say(f"\n{clock(reached.seconds)} of training{skipped}; the model is in {out}")


def cli() -> int:
    """Run the command line."""
    return launch(main, TrainConfig, __doc__)


if __name__ == "__main__":
    run(cli)
