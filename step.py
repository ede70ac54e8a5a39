"""A pre-training step against a plain padded reading of the same model: `python bench.py step`.

The padded reading computes every position and holds all logits, with the model's own parts. On a
CPU each side steps in a process of its own (`Apart`), and peak memory is that of processes too.
"""

import dataclasses
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import bert
from bert import Layer
from data import hide, lay_out, special_ids
from data import uniforms as numbers_a_clip
from keep import hold_pages, read_log
from loop import memory_mib
from ranks import start_ranks
from scale import in_turn, row, wait, write_corpus
from toy import write_toy
from vlm import VLM, Batch, VLMConfig, attention_mask, load_tokenizer

# ---------------------------------------------------------------------------------------------
# The machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = Path(__file__).parent


def half() -> torch.dtype | None:
    """Return bfloat16 where this processor multiplies it natively."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else None
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else None


def ceiling(device, dtype: torch.dtype) -> float:
    """Measure the machine's matrix multiplication: operations a second."""
    n, times = (8192, 5) if device == "cuda" else (2048, 1)  # long enough to be timed from outside
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        wait()
        begun = time.perf_counter()
        for _ in range(times):
            a @ b
        wait()
        best = max(best, times * 2 * n**3 / (time.perf_counter() - begun))
    return best


# ---------------------------------------------------------------------------------------------
# A pre-training step


def paper_batch(B: int, c: VLMConfig, seed: int = 0) -> Batch:
    """Draw clips of the paper's lengths (sec. 5.2), tokens hidden; what is in them is noise."""
    g = torch.Generator().manual_seed(seed)
    pieces = torch.randint(8, 65, (B,), generator=g).clamp(max=c.max_text_len - 1).numpy()
    seconds = np.clip(np.ceil(pieces / 2.4), 1, c.max_video_len).astype(np.int64)
    video = torch.randn(int(seconds.sum()), c.video_dim, generator=g).numpy()
    text = torch.randint(1000, c.vocab_size, (int(pieces.sum()),), generator=g).numpy()
    batch = lay_out(video, seconds, text, pieces, c)
    return hide(batch, torch.rand(B, numbers_a_clip(c), generator=g), c)


def read_padded(model: VLM, batch: Batch, kind: str) -> tuple[Batch, Tensor, Tensor]:
    """Read clips plainly: every position up to max_len is computed, padding or not.

    Returns: the batch at full length; MLP of its features, hidden ones too (B, V, D); h (B, L, D).
    """
    c, B = model.config, len(batch.video)
    short = c.max_video_len - batch.video.shape[1], c.max_text_len - batch.text.shape[1]
    video = F.pad(batch.video, (0, 0, 0, short[0]))
    video_valid, text_valid = (
        F.pad(x, (0, n)) for x, n in zip((batch.video_valid, batch.text_valid), short, strict=True)
    )
    batch = Batch(video, video_valid, F.pad(batch.text, (0, short[1])), text_valid, *(
        x if x is None else F.pad(x, (0, n))
        for x, n in zip(batch.fields()[4:7], (short[0], short[1], short[1]), strict=True)
    ))  # fmt: skip
    own = model.videomlp(video)  # (B, V, D)
    x_video = own
    if batch.video_hidden is not None:
        x_video = model.videomlp(video * ~batch.video_hidden[:, :, None])
    special = batch.text.new_tensor([c.cls_token_id, c.sep_token_id]).expand(B, 2)
    words = model.word_tokens(torch.cat([special, batch.text], 1))  # (B, 2+T, D)
    x = torch.cat([words[:, :1], x_video.to(words), words[:, 1:]], 1)  # (B, L, D)
    every = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    attend = attention_mask(kind, video_valid, text_valid)
    V, T = c.max_video_len, c.max_text_len
    plain = mock.patch.object(Layer, "recomputed", lambda self, f, *args: f(*args))
    with plain, mock.patch.object(bert, "WIDE", 2**20):  # holds all for backward; PyTorch's dropout
        return batch, own, model.bert(x, *model.places(V, T, x.device), every, attend)


def padded_loss(model: VLM, batch: Batch) -> Tensor:
    """Eq. 8-9 read plainly: every position up to max_len, all logits held at once; a scalar."""
    batch, own, h = read_padded(model, batch, "full")
    V, (B, L, _) = own.shape[1], h.shape
    e = model.cls["predictions"](h.flatten(0, 1)).view_as(h)
    D = model.bert.embeddings["word_embeddings"].weight
    pool = torch.cat([own[batch.video_valid & ~batch.video_hidden], D.to(own)])
    words = len(pool) - len(D)
    logits = (e.flatten(0, 1) @ pool.T.to(e)).view(B, L, -1).float()
    true = (e[:, 1 : V + 1] * own).sum(2, keepdim=True).float()
    video = torch.cat([true, logits[:, 1 : V + 1]], 2)[batch.video_hidden]
    text = logits[:, V + 2 :][batch.text_hidden]
    first = torch.zeros(len(video), dtype=torch.long, device=h.device)
    total = F.cross_entropy(video, first, reduction="sum")
    target = words + batch.text_target[batch.text_hidden]
    total = total + F.cross_entropy(text, target, reduction="sum")
    return total / (batch.video_hidden.sum() + batch.text_hidden.sum())


def trainer(which: str, dtype: torch.dtype | None, B: int, compiled=False, **sizes) -> Callable:
    """Make one optimizer step of BERT-base: `padded` or `ours`, in fp32 or autocast to dtype."""
    torch.manual_seed(0)
    model = VLM(VLMConfig(**sizes)).to(DEVICE).train()
    if compiled:
        model.compile_parts()
    params = [p for n, p in model.named_parameters() if n != "cls.predictions.bias"]
    optimizer = torch.optim.Adam(params, 5e-5, betas=(0.9, 0.98), fused=True)
    batches = [paper_batch(B, model.config, seed).to(DEVICE) for seed in range(4)]
    turn = itertools.count()

    def step() -> float:
        batch = batches[next(turn) % 4]
        with torch.autocast(DEVICE, dtype or torch.float32, enabled=dtype is not None):
            loss = padded_loss(model, batch) if which == "padded" else None
            loss = model.pretrain_loss(batch).value() if loss is None else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


class Apart:
    """A `trainer` in a process of its own, where nobody else has freed memory; a call is a step."""

    def __init__(self, which: str, dtype: torch.dtype | None, B: int, layers: int):
        me = f"import step, torch; step.serve({which!r}, {dtype}, {B}, {layers})"
        self.child = subprocess.Popen([sys.executable, "-c", me], text=True, cwd=HERE,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def __call__(self) -> None:
        print(file=self.child.stdin, flush=True)
        if not self.child.stdout.readline():
            raise RuntimeError(f"a process that takes steps ended: {self.child.wait()}")

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_) -> None:
        self.child.communicate()  # no more lines: it ends


def serve(which: str, dtype: torch.dtype | None, B: int, layers: int) -> None:
    """Take a step for each line read, and say when it is done."""
    start_ranks()
    once = trainer(which, dtype, B, num_hidden_layers=layers)
    for _ in sys.stdin:
        once()
        print(flush=True)


def repeat(do: Callable, n: int) -> None:
    """Do something n times."""
    for _ in range(n):
        do()


@torch.no_grad()
def check_readings() -> None:
    """Make sure that both readings are one loss before their time is compared."""
    model = VLM(VLMConfig(num_hidden_layers=2)).eval()
    batch = paper_batch(4, model.config)
    losses = [float(padded_loss(model, batch)), float(model.pretrain_loss(batch).value())]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], f"the two readings differ: {losses}"


def operations(batch: Batch, c: VLMConfig) -> float:
    """Count a step's multiplications and additions on real tokens, forward and backward."""
    tokens = int(batch.video_valid.sum() + batch.text_valid.sum()) + 2 * len(batch.video)
    hidden = int(batch.video_hidden.sum() + batch.text_hidden.sum())
    D, inner = c.hidden_size, c.intermediate_size
    last = hidden if D >= bert.WIDE else tokens  # of which the last layer reads on
    layers = 2 * ((c.num_hidden_layers - 1) * tokens * (4 * D * D + 2 * D * inner)
                  + tokens * 3 * D * D + last * (D * D + 2 * D * inner))  # fmt: skip
    pool = c.vocab_size + int((batch.video_valid & ~batch.video_hidden).sum())
    head = hidden * 2 * (D * D + D * pool)
    mlp = int(batch.video_valid.sum()) * 2 * (c.video_dim * D + D * D)
    return 3 * (layers + head + mlp)


def step(args) -> list[dict]:
    """A pre-training step: forward, backward, Adam."""
    B, rows = args.batch, []
    c = VLMConfig(num_hidden_layers=args.layers)
    work = statistics.mean(operations(paper_batch(B, c, seed), c) for seed in range(4))
    check_readings()
    peaks, fast = {}, DEVICE == "cuda"  # there the padded reading has the same precision as ours
    for which in ("padded", "ours"):
        if fast:
            peaks[which] = peak(which, args)
            continue
        me = [sys.executable, HERE / "bench.py", "step", "--which", which, "--batch", str(B)]
        me += ["--layers", str(args.layers)]  # a process each, for peaks do not go down again
        runs = [subprocess.run(me, check=True, stdout=subprocess.PIPE) for _ in range(args.repeat)]
        peaks[which] = statistics.median(float(run.stdout) for run in runs)
    kind = "bf16" if fast and half() else "fp32"
    what = f"peak memory of the step, {B} clips, {kind}, weights and Adam's "
    rows.append(row("memory", what + "state among it", peaks["padded"], peaks["ours"], "MiB"))
    for name, dtype in (("fp32", None), ("bf16", half()), ("fp16", torch.float16)):
        if name == "bf16" and dtype is None:
            print("bf16: this processor has no bf16 multiplication, left out", file=sys.stderr)
            continue
        if name == ("fp32" if fast else "fp16"):
            continue  # CPUs have no fast fp16 for training, and nobody trains in fp32 on a GPU
        n = 5 if fast else 1  # steps that are timed together
        if fast:
            plain = trainer("padded", dtype, B, num_hidden_layers=args.layers)
            ours = trainer("ours", dtype, B, args.compile, num_hidden_layers=args.layers)
            a, b = in_turn(*(partial(repeat, f, n) for f in (plain, ours)), args.repeat)
            del plain, ours
            torch.cuda.empty_cache()  # for the next, and for train.py beside us
        else:
            with Apart("padded", None, B, args.layers) as plain, \
                 Apart("ours", dtype, B, args.layers) as ours:  # fmt: skip
                a, b = in_turn(plain, ours, args.repeat)
        what = f"pre-training step of {B} clips, ours in {name}{', compiled' * args.compile} "
        what += f"against padded in {name if fast else 'fp32'}"
        rows.append(row(f"step {name}", what, n * B / a, n * B / b, "clips/s", higher=True))
        share = n * work / b / ceiling(DEVICE, dtype or torch.float32)
        what = f"share of the matrix ceiling in {name}, counting real tokens only"
        rows.append(row(f"ceiling {name}", what, 1.0, share, "of 1", higher=True))
    return rows + (whole_loop(args, n * B / b) if fast else pages(args))


def whole_loop(args, bare: float) -> list[dict]:
    """Run train.py from files, drawing, clipping and logging among it.

    bare: the rate of its step alone, clips a second.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, bert = Path(folder, "data"), Path(folder, "bert")
        write_corpus(data, videos=64, shards=0, E=512)
        bert.mkdir()
        shutil.copy(data / "tokenizer.json", bert)
        c = VLMConfig(num_hidden_layers=args.layers, **special_ids(load_tokenizer(data)))
        (bert / "config.json").write_text(json.dumps(dataclasses.asdict(c)))
        me = [sys.executable, HERE / "train.py", "--data", data, "--bert", bert, "--scratch"]
        me += ["--batch", str(args.batch), "--steps", "60", "--log-every", "20", "--workers", "4"]
        me += [*["--compile"] * args.compile, "--precision", "fp16", "--out", f"{folder}/run"]
        subprocess.run(me, check=True, stdout=subprocess.DEVNULL)
        log = read_log(Path(folder, "run", "log.jsonl"))
    rate = statistics.mean(line["clips_per_s"] for line in log[1:-1])
    what = f"train.py, {args.batch} clips, fp16, 4 loader workers, against its bare step"
    return [row("loop", what, bare, rate, "clips/s", higher=True)]


def peak(which: str, args) -> float:
    """Return the peak memory of three steps, in bf16 on a GPU, in MiB."""
    fast = DEVICE == "cuda"
    if fast:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    compiled = args.compile and which == "ours"
    sizes = dict(num_hidden_layers=args.layers)
    repeat(trainer(which, half() if fast else None, args.batch, compiled, **sizes), 3)
    return memory_mib(torch.device(DEVICE))


def small_step(hold: bool, B: int) -> None:
    """Print the median seconds of a small model's step of B clips, and the peak memory in MiB."""
    if hold:
        hold_pages()
    start_ranks()
    sizes = dict(hidden_size=128, num_attention_heads=2, intermediate_size=512)
    once, seconds = trainer("ours", None, B, num_hidden_layers=2, **sizes), []
    for _ in range(6):
        begun = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begun)
    print(statistics.median(seconds[1:]), memory_mib(torch.device(DEVICE)))


def pages(args) -> list[dict]:
    """A small model's step: what it frees goes back to the system, or stays (keep.hold_pages)."""
    found, B = {False: [], True: []}, 4 * args.batch
    for hold in [False, True] * args.repeat:  # a process each: what malloc was told lasts
        me = [sys.executable, "-c", f"import step; step.small_step({hold}, {B})"]
        done = subprocess.run(me, check=True, capture_output=True, text=True, cwd=HERE)
        found[hold].append([float(x) for x in done.stdout.split()])
    a, b = (np.median(found[hold], 0).tolist() for hold in (False, True))  # seconds, MiB
    what = f"of {B} clips, 2 layers 128 wide, BERT's vocabulary: freed memory given back, and held"
    return [row("pages", f"step {what}", B / a[0], B / b[0], "clips/s", higher=True),
            row("pages memory", f"peak memory, step {what}", a[1], b[1], "MiB")]  # fmt: skip


STEPS = 200  # in which losses are compared, means of 20


def precision(args) -> list[dict]:
    """The toy world's loss over 200 steps in bf16 and fp16 against fp32, on the same clips."""
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        write_toy(Path(folder) / "toy", scale=0.3)
        for name in ("fp32", "bf16", "fp16"):
            me = [sys.executable, HERE / "train.py", "--data", f"{folder}/toy"]
            me += ["--precision", name, "--out", f"{folder}/{name}", "--log-every", "20"]
            subprocess.run([*me, "--steps", str(STEPS)], check=True, capture_output=True)
            log = read_log(Path(folder, name, "log.jsonl"))
            found[name] = [line["loss"] for line in log[:-1]]  # means of 20 steps
    for name in ("bf16", "fp16"):
        far = max(abs(x - y) / y for x, y in zip(found[name], found["fp32"], strict=True))
        what = f"mean loss of the last 20 of {STEPS} steps in fp32 and {name}; "
        what += f"means of 20 differ by {far:.2%} at most"
        rows.append(row(f"precision {name}", what, found["fp32"][-1], found[name][-1], "nats"))
    return rows
