"""Measure what README's table says: each row a ratio, A and B taken in turn in one run.

    python bench.py step           a pre-training step against a plain padded reading of the model
    python bench.py caption        beam search with kept keys and values against recomputing
    python bench.py encode         retrieval encoding apart against one padded joint pass
    python bench.py data           clip sampling and masking against a loop over clips
    python bench.py metrics        caption metrics against pycocoevalcap and its Java
    python bench.py s3d            the video encoder, laid out for a CPU against as it is written
    python bench.py all --json FILE

Medians of --repeat runs of each. BERT-base sizes and the paper's clip lengths (sec. 5.2): U{8..64}
word pieces at 2.4 a second of video. The plain readings are here, built from the model's own parts.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Corpus, hide, lay_out, open_captions, open_corpus, open_features, special_ids
from data import uniforms as numbers_a_clip
from loop import memory_mib, start_ranks
from toy import OBJECTS, TOOLS, VERBS, write_toy
from vlm import VLM, Batch, VLMConfig, attention_mask, load_tokenizer, run

# ---------------------------------------------------------------------------------------------
# Measuring


def in_turn(a: Callable, b: Callable, repeat: int) -> tuple[float, float]:
    """Time two functions in turn, after one run of each: median seconds of both."""
    seconds = {a: [], b: []}
    for n in range(repeat + 1):
        for f in (a, b):
            wait()
            begun = time.perf_counter()
            f()
            wait()
            if n:
                seconds[f].append(time.perf_counter() - begun)
    return statistics.median(seconds[a]), statistics.median(seconds[b])


def wait() -> None:
    """Let a GPU finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(name: str, what: str, a: float, b: float, unit: str, higher: bool = False) -> dict:
    """Make a row: b is ours; ratio says how many times better it is."""
    return dict(name=name, what=what, a=a, b=b, unit=unit, ratio=b / a if higher else a / b)


def half() -> torch.dtype | None:
    """Return bfloat16 where this processor multiplies it natively."""
    if torch.cuda.is_available():
        return torch.bfloat16
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else None


def ceiling(device, dtype: torch.dtype, n: int = 2048) -> float:
    """Measure the machine's matrix multiplication: operations a second."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        wait()
        begun = time.perf_counter()
        a @ b
        wait()
        best = max(best, 2 * n**3 / (time.perf_counter() - begun))
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


def padded_loss(model: VLM, batch: Batch) -> Tensor:
    """Eq. 8-9 read plainly: every position computed up to max_len, all logits held at once."""
    c, B = model.config, len(batch.video)
    V, T = c.max_video_len, c.max_text_len
    wide = [F.pad(x, (0, 0, 0, V - x.shape[1])) for x in (batch.video,)]
    video_valid, video_hidden = (
        F.pad(x, (0, V - x.shape[1])) for x in (batch.video_valid, batch.video_hidden)
    )
    text, text_valid, text_hidden, target = (
        F.pad(x, (0, T - x.shape[1]))
        for x in (batch.text, batch.text_valid, batch.text_hidden, batch.text_target)
    )
    own = model.videomlp(wide[0])  # (B, V, D)
    x_video = model.videomlp(wide[0] * ~video_hidden[:, :, None])
    cls, sep = model.special(c.cls_token_id, B), model.special(c.sep_token_id, B)
    x = torch.cat([cls, x_video.to(cls), sep, model.word_tokens(text)], 1)  # (B, L, D)
    every = torch.ones(B, x.shape[1], dtype=torch.bool, device=x.device)
    attend = attention_mask("full", video_valid, text_valid)
    h = model.bert(x, *model.places(V, T, x.device), every, attend)
    e = model.cls["predictions"](h.flatten(0, 1)).view_as(h)
    D = model.bert.embeddings["word_embeddings"].weight
    pool = torch.cat([own[video_valid & ~video_hidden], D.to(own)])
    words = len(pool) - len(D)
    logits = (e.flatten(0, 1) @ pool.T.to(e)).view(B, x.shape[1], -1).float()
    true = (e[:, 1 : V + 1] * own).sum(2, keepdim=True).float()
    video = torch.cat([true, logits[:, 1 : V + 1]], 2)[video_hidden]
    text = logits[:, V + 2 :][text_hidden]
    total = F.cross_entropy(video, torch.zeros(len(video), dtype=torch.long, device=x.device),
                            reduction="sum")  # fmt: skip
    total = total + F.cross_entropy(text, words + target[text_hidden], reduction="sum")
    return total / (video_hidden.sum() + text_hidden.sum())


def trainer(which: str, dtype: torch.dtype | None, B: int, layers: int) -> Callable[[], float]:
    """Make one optimizer step of BERT-base: `padded` or `ours`, in fp32 or autocast to dtype."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = VLM(VLMConfig(num_hidden_layers=layers)).to(device).train()
    params = [p for n, p in model.named_parameters() if n != "cls.predictions.bias"]
    optimizer = torch.optim.Adam(params, 5e-5, betas=(0.9, 0.98), fused=True)
    batches = [paper_batch(B, model.config, seed).to(device) for seed in range(4)]
    turn = iter(range(10**9))

    def step() -> float:
        batch = batches[next(turn) % 4]
        with torch.autocast(device.type, dtype or torch.float32, enabled=dtype is not None):
            loss = padded_loss(model, batch) if which == "padded" else None
            loss = model.pretrain_loss(batch).value() if loss is None else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


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
    layer = 2 * (4 * D * D + 2 * D * inner)
    pool = c.vocab_size + int((batch.video_valid & ~batch.video_hidden).sum())
    head = hidden * 2 * (D * D + D * pool)
    mlp = int(batch.video_valid.sum()) * 2 * (c.video_dim * D + D * D)
    return 3 * (tokens * c.num_hidden_layers * layer + head + mlp)


def step(args) -> list[dict]:
    """A pre-training step: forward, backward, Adam."""
    B, rows = args.batch, []
    c = VLMConfig(num_hidden_layers=args.layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = statistics.mean(operations(paper_batch(B, c, seed), c) for seed in range(4))
    check_readings()
    peaks = {}
    for which in ("padded", "ours"):  # a process each, for peaks do not go down again
        me = [sys.executable, __file__, "peak", "--which", which, "--batch", str(B)]
        done = subprocess.run([*me, "--layers", str(args.layers)], capture_output=True, text=True)
        peaks[which] = float(done.stdout)
    what = f"peak memory of the step, {B} clips, fp32, weights and Adam's state among it"
    rows.append(row("memory", what, peaks["padded"], peaks["ours"], "MiB"))
    plain = trainer("padded", None, B, args.layers)
    for name, dtype in (("fp32", None), ("bf16", half())):
        if name == "bf16" and dtype is None:
            print("bf16: this processor has no bf16 multiplication, left out", file=sys.stderr)
            continue
        ours = trainer("ours", dtype, B, args.layers)
        a, b = in_turn(plain, ours, args.repeat)
        what = f"pre-training step of {B} clips, ours in {name} against padded in fp32"
        rows.append(row(f"step {name}", what, B / a, B / b, "clips/s", higher=True))
        share = work / b / ceiling(device, dtype or torch.float32)
        what = f"share of the matrix ceiling in {name}, counting real tokens only"
        rows.append(row(f"ceiling {name}", what, 1.0, share, "of 1", higher=True))
        del ours
    return rows


def peak(args) -> None:
    """Print the peak memory of three steps."""
    once = trainer(args.which, None, args.batch, args.layers)
    for _ in range(3):
        once()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(memory_mib(device))


# ---------------------------------------------------------------------------------------------
# Captions, retrieval


@torch.no_grad()
def search_again(model: VLM, video: Tensor, valid: Tensor, beams: int, steps: int) -> Tensor:
    """Beam search that reads the clip and all words again for every word; never stops early."""
    B, W = len(valid), model.config.vocab_size
    words = torch.full((B, 1, 1), model.config.cls_token_id)
    score = torch.zeros(B, 1)
    for _ in range(steps + 1):
        k = words.shape[1]
        text = words.flatten(0, 1)
        wide = [x.repeat_interleave(k, 0) for x in (video, valid)]
        batch = Batch(*wide, text, torch.ones_like(text, dtype=torch.bool))
        log_p = model.word_logits(model(batch, "captioning")[:, -1]).log_softmax(1)
        score, index = (score[:, :, None] + log_p.view(B, k, W)).flatten(1).topk(beams)
        words = words[torch.arange(B)[:, None], index // W]
        words = torch.cat([words, (index % W)[:, :, None]], 2)
    return words


def caption(args) -> list[dict]:
    """Captions of 24 word pieces by beams of 5."""
    torch.manual_seed(0)
    model = VLM(VLMConfig(num_hidden_layers=args.layers)).eval()
    model.cls["predictions"].bias.data[model.config.sep_token_id] = -1e4  # no caption ends early
    B = 2
    video, valid = torch.randn(B, 12, 512), torch.ones(B, 12, dtype=torch.bool)
    a, b = in_turn(
        lambda: search_again(model, video, valid, 5, 24),
        lambda: model.generate(video, valid, 5, 24),
        args.repeat,
    )
    what = f"captions of 24 pieces, beam 5, {B} clips of 12 s, kept keys against recomputing"
    return [row("caption", what, B / a, B / b, "captions/s", higher=True)]


@torch.no_grad()
def encode(args) -> list[dict]:
    """Clips and sentences for retrieval."""
    torch.manual_seed(0)
    model = VLM(VLMConfig(num_hidden_layers=args.layers)).eval()
    c, B = model.config, 32
    batch = paper_batch(B, c)
    V, T = c.max_video_len, c.max_text_len
    every = torch.ones(B, V + T + 2, dtype=torch.bool)

    def jointly() -> Tensor:
        video = F.pad(batch.video, (0, 0, 0, V - batch.video.shape[1]))
        valid = F.pad(batch.video_valid, (0, V - batch.video_valid.shape[1]))
        text, text_valid = (F.pad(x, (0, T - x.shape[1])) for x in (batch.text, batch.text_valid))
        cls, sep = model.special(c.cls_token_id, B), model.special(c.sep_token_id, B)
        x = torch.cat([cls, model.videomlp(video), sep, model.word_tokens(text)], 1)
        attend = attention_mask("retrieval", valid, text_valid)
        return model.bert(x, *model.places(V, T, x.device), every, attend)

    def apart() -> tuple[Tensor, Tensor]:
        return (
            model.embed_video(batch.video, batch.video_valid),
            model.embed_text(batch.text, batch.text_valid),
        )

    a, b = in_turn(jointly, apart, args.repeat)
    what = f"{B} clips and sentences, apart and un-padded against one padded pass"
    return [row("encode", what, B / a, B / b, "pairs/s", higher=True)]


# ---------------------------------------------------------------------------------------------
# The data side


def slow_clip(corpus: Corpus, video: str, rng: np.random.Generator) -> tuple:
    """Sample and mask one clip token by token: what a loop over clips does."""
    cap, c = corpus.captions, corpus.c
    i = cap.index[video]
    first, last = int(cap.first_caption[i]), int(cap.first_caption[i + 1])
    want = rng.integers(corpus.min_text, corpus.MAX_TEXT + 1)
    lo = int(rng.integers(first, last))
    hi = lo + 1
    while cap.first_token[hi] - cap.first_token[lo] < want and hi - lo < last - first:
        if (rng.random() < 0.5 or hi == last) and lo > first:
            lo -= 1
        else:
            hi += 1
    x = corpus.features.open(video)
    start = min(int(cap.start[lo]), len(x) - 1)
    end = min(max(int(np.ceil(cap.end[hi - 1])), start + 1), len(x), start + c.max_video_len)
    rows = torch.stack([torch.from_numpy(np.array(x[t], dtype=np.float32)) for t in
                        range(start, end)])  # fmt: skip
    ids = [int(t) for t in cap.tokens[cap.first_token[lo] : cap.first_token[hi]]]
    ids = ids[: c.max_text_len - 1]
    u = rng.random()
    text, hidden, video_hidden = [], [], []
    for token in ids:
        take = 0.25 <= u < 0.5 or (u >= 0.5 and rng.random() < 0.15)
        hidden.append(take)
        how = rng.random()
        read = c.mask_token_id if how < 0.8 or u < 0.5 else int(rng.integers(c.vocab_size))
        text.append(read if take and how < 0.9 else token)
    for _ in range(len(rows)):
        video_hidden.append(u < 0.25 or (u >= 0.5 and rng.random() < 0.15))
    pad = c.max_text_len - len(ids) - 1
    out = torch.tensor(text + [c.sep_token_id] + [c.pad_token_id] * pad)
    return F.pad(rows, (0, 0, 0, c.max_video_len - len(rows))), out, hidden, video_hidden


def data(args) -> list[dict]:
    """Sampling, masking and collation of a batch of 256, 32 clips of each of 8 videos."""
    with tempfile.TemporaryDirectory() as folder:
        toy = Path(folder) / "toy"
        write_toy(toy, scale=0.3)
        tokenizer = load_tokenizer(toy)
        c = VLMConfig(video_dim=64, **special_ids(tokenizer))
        stores = open_features(toy), open_captions(toy, tokenizer)
        corpus, _ = open_corpus(toy, *stores, "train", c)
        turn, rng = iter(range(10**9)), np.random.default_rng(0)

        def slowly() -> list[Tensor]:
            clips = [slow_clip(corpus, corpus.ids[i // 32], rng) for i in range(256)]
            return [torch.stack(x) for x in list(zip(*clips, strict=True))[:2]]

        a, b = in_turn(slowly, lambda: corpus.step(next(turn), 256), max(5, args.repeat))
    what = "sampling, masking and collating 256 clips against a loop over clips"
    return [row("data", what, 256 / a, 256 / b, "clips/s", higher=True)]


# ---------------------------------------------------------------------------------------------
# Caption metrics


def sentences(n: int) -> tuple[dict, dict]:
    """Write n sentences and as many edits of them: words swapped, dropped, replaced."""
    rng = np.random.default_rng(0)
    words = [w for group in (VERBS, OBJECTS, TOOLS) for synonyms in group for w in synonyms]
    words += "the a in with into until and of slowly large some small hot over for it then".split()
    references, hypotheses = {}, {}
    for i in range(n):
        text = [words[k] for k in rng.integers(len(words), size=rng.integers(6, 16))]
        other = [w if rng.random() < 0.8 else words[rng.integers(len(words))] for w in text]
        k = rng.integers(len(text))
        references[str(i)], hypotheses[str(i)] = [" ".join(text)], " ".join(other[k:] + other[:k])
    return references, hypotheses


def metrics(args) -> list[dict]:
    """BLEU, ROUGE-L and CIDEr-D together, and METEOR, on 3,000 captions."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        print("metrics: left out; pip install --no-deps pycocoevalcap", file=sys.stderr)
        return []
    import captions
    import meteor

    n = 3000
    references, hypotheses = sentences(n)
    theirs = {k: [x] for k, x in hypotheses.items()}
    ours, refs = list(hypotheses.values()), list(references.values())

    def published() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            for scorer in (Bleu(4), Rouge(), Cider()):
                scorer.compute_score(references, theirs)

    def here() -> None:
        counts = captions.count_ngrams([t.split() for t in [*ours, *(r[0] for r in refs)]])
        captions.bleu(ours, refs, counts)
        captions.rouge_l(ours, refs)
        captions.cider_d(ours, refs, counts)

    a, b = in_turn(published, here, max(5, args.repeat))
    what = f"BLEU, ROUGE-L and CIDEr-D of {n} captions against pycocoevalcap"
    rows = [row("metrics", what, n / a, n / b, "captions/s", higher=True)]

    def java() -> None:
        from pycocoevalcap.meteor.meteor import Meteor

        scorer = Meteor()
        scorer.compute_score(references, theirs)
        scorer.meteor_p.kill()

    def aligned() -> None:
        meteor.word_lists.cache_clear()  # opened anew, as a fresh process does
        meteor.meteor_scores(ours, refs, meteor.word_lists(None))

    try:
        subprocess.run(["java", "-version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        print("METEOR: left out; no java on the path", file=sys.stderr)
        return rows
    a, b = in_turn(java, aligned, args.repeat)
    what = f"METEOR of {n} captions against the Java process, its start among it; our index warm"
    return [*rows, row("meteor", what, n / a, n / b, "captions/s", higher=True)]


# ---------------------------------------------------------------------------------------------
# The video encoder


@torch.inference_mode()
def s3d(args) -> list[dict]:
    """Four seconds of video, 30 frames of 224 x 224 each, through S3D."""
    from s3d import S3D, random_weights

    plain, fast = S3D().eval(), S3D().eval()
    for model in (plain, fast):
        random_weights(model, 0)
    fast.fuse()
    frames = torch.rand(4, 3, 30, 224, 224)
    rows = []
    for name, dtype in (("fp32", None), ("bf16", half())):
        if name == "bf16" and dtype is None:
            continue

        def ours(dtype=dtype) -> None:
            with torch.autocast("cpu", dtype or torch.float32, enabled=dtype is not None):
                fast(frames)

        a, b = in_turn(lambda: [plain(frames[i : i + 1]) for i in range(4)], ours, args.repeat)
        what = f"S3D, four seconds at once, BatchNorm folded, {name}, against one by one in fp32"
        rows.append(row(f"s3d {name}", what, 4 / a, 4 / b, "s of video/s", higher=True))
    return rows


# ---------------------------------------------------------------------------------------------
# python bench.py


BENCHES = dict(step=step, caption=caption, encode=encode, data=data, metrics=metrics, s3d=s3d)


def main(argv: list[str] | None = None) -> int:
    """Run one measurement, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=[*BENCHES, "all", "peak"], metavar="NAME",
                        help=f"{', '.join(BENCHES)} or all")  # fmt: skip
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="runs of each (5)")
    parser.add_argument("--batch", type=int, metavar="N", help="clips of a step (CPU 16, GPU 256)")
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="of the BERT (12)")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file too")
    parser.add_argument("--which", choices=("padded", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for flag in ("repeat", "layers"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} is {getattr(args, flag)}, wanted at least 1")
    args.batch = args.batch or (256 if torch.cuda.is_available() else 16)
    start_ranks()  # threads and caches as in training
    if args.name == "peak":
        peak(args)
        return 0
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads of "
          f"{os.cpu_count()} cores, {args.layers} layers, medians of {args.repeat}")  # fmt: skip
    rows = []
    for name in BENCHES if args.name == "all" else [args.name]:
        for found in BENCHES[name](args):
            rows.append(found)
            print(f"{found['name']:12} {found['ratio']:6.2f} x   {found['a']:9.2f} -> "
                  f"{found['b']:9.2f} {found['unit']:12} {found['what']}", flush=True)  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
