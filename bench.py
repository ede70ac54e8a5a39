"""Measure what README's table says: each row a ratio, A and B taken in turn in one run.

    python bench.py step           a pre-training step against a plain padded reading of the model;
                                   a small one with freed memory held against given back
    python bench.py precision      200 steps in bf16 and fp16 against fp32
    python bench.py caption        beam search with kept keys and values against recomputing
    python bench.py encode         retrieval apart against padded joint passes, with backward too
    python bench.py data           clip sampling and masking against a loop over clips
    python bench.py metrics        caption metrics against pycocoevalcap and its Java
    python bench.py s3d            the video encoder, four seconds at once, against one by one
    python bench.py scale          many videos, shards and processes against one
    python bench.py all --json FILE
    python bench.py ablation       Tables 8 and 9 in miniature, hours: see ablation.py

Medians of --repeat runs of each. BERT-base sizes and the paper's clip lengths (sec. 5.2): U{8..64}
word pieces at 2.4 a second of video. The plain readings are built from the model's own parts.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import ablation
from data import Corpus, lay_out
from keep import can_write, write_json
from loop import check_compile
from ranks import start_ranks
from scale import growth, in_turn, open_root, row, write_corpus
from step import DEVICE, half, peak, precision, read_padded, step
from toy import OBJECTS, TOOLS, VERBS, write_toy
from vlm import VLM, Batch, VLMConfig, run

# ---------------------------------------------------------------------------------------------
# Captions, retrieval


@torch.no_grad()
def search_again(model: VLM, video: Tensor, valid: Tensor, beams: int, steps: int, padded: bool):
    """Beam search that reads the clip and all words again for every word; never stops early.

    Args:    video (B, V, E), valid (B, V). padded: all positions, or real tokens alone.
    Returns: (B, beams, 1 + steps + 1) int64: [CLS] and the words, best first.
    """
    B, W, V = len(valid), model.config.vocab_size, model.config.max_video_len
    words = torch.full((B, 1, 1), model.config.cls_token_id, device=video.device)
    score = torch.zeros(B, 1, device=video.device)
    for t in range(steps + 1):
        k = words.shape[1]
        text = words.flatten(0, 1)
        wide = [x.repeat_interleave(k, 0) for x in (video, valid)]
        batch = Batch(*wide, text, torch.ones_like(text, dtype=torch.bool))
        if padded:
            h = read_padded(model, batch, "captioning")[2][:, V + 2 + t]
        else:
            h = model(batch, "captioning")[:, -1]
        log_p = model.word_logits(h).log_softmax(1)
        score, index = (score[:, :, None] + log_p.view(B, k, W)).flatten(1).topk(beams)
        words = words[torch.arange(B, device=video.device)[:, None], index // W]
        words = torch.cat([words, (index % W)[:, :, None]], 2)
    return words


def caption(args) -> list[dict]:
    """Captions of 24 word pieces by beams of 5."""
    torch.manual_seed(0)
    model = VLM(VLMConfig(num_hidden_layers=args.layers)).to(DEVICE).eval()
    model.cls["predictions"].bias.data[model.config.sep_token_id] = -1e4  # no caption ends early
    B, rows = args.clips, []
    video = torch.randn(B, 12, 512, device=DEVICE)
    valid = torch.ones(B, 12, dtype=torch.bool, device=DEVICE)
    for name, padded in (("caption", True), ("caption unpadded", False)):
        a, b = in_turn(
            lambda padded=padded: search_again(model, video, valid, 5, 24, padded),
            lambda: model.generate(video, valid, 5, 24),
            args.repeat,
        )
        how = "all 96 positions" if padded else "real tokens alone"
        what = f"captions of 24 pieces, beam 5, {B} clips of 12 s: kept keys against reading {how}"
        rows.append(row(name, f"{what} again", B / a, B / b, "captions/s", higher=True))
    return rows


# Deciles of YouCook2's 3,492 validation clips (seconds, of which 32 are read) and of the word
# pieces of their sentences: what retrieval encodes.
YOUCOOK2 = (
    (1, 5, 7, 9, 11, 14, 18, 22, 28, 32, 32),
    (2, 5, 6, 7, 8, 9, 10, 11, 13, 16, 56),
)


def retrieval_batch(B: int, c: VLMConfig) -> Batch:
    """Draw clips and sentences as long as YouCook2's; what is in them is noise."""
    g = torch.Generator().manual_seed(0)
    u = torch.rand(2, B, generator=g).numpy()
    seconds, pieces = (
        np.interp(x, np.linspace(0, 1, 11), q).astype(np.int64)
        for x, q in zip(u, YOUCOOK2, strict=True)
    )
    video = torch.randn(int(seconds.sum()), c.video_dim, generator=g).numpy()
    text = torch.randint(1000, c.vocab_size, (int(pieces.sum()),), generator=g).numpy()
    return lay_out(video, seconds, text, pieces, c).to(DEVICE)


def encode(args) -> list[dict]:
    """Clips and sentences for retrieval, embedded; then a contrastive step with its backward."""
    torch.manual_seed(0)
    model, B, rows = VLM(VLMConfig(num_hidden_layers=args.layers)).to(DEVICE), 32, []
    batch = retrieval_batch(B, model.config)

    def jointly() -> tuple[Tensor, Tensor]:
        wide, own, h = read_padded(model, batch, "retrieval")
        valid, V = (wide.video_valid, wide.text_valid), own.shape[1]
        video, text = h[:, 1 : V + 2], h[:, V + 2 :]  # the video's [SEP] with it, the text's too
        real = F.pad(valid[0], (0, 1), value=True), valid[1]
        return tuple(
            (x * r[:, :, None]).sum(1) / r.sum(1, keepdim=True)
            for x, r in zip((video, text), real, strict=True)
        )

    def apart() -> tuple[Tensor, Tensor]:
        return (
            model.embed_video(batch.video, batch.video_valid),
            model.embed_text(batch.text, batch.text_valid),
        )

    def contrast(embed: Callable) -> None:
        video, text = embed()
        F.cross_entropy(text @ video.T, torch.arange(B, device=DEVICE)).backward()
        model.zero_grad(set_to_none=True)

    lengths = f"{B} clips and sentences of YouCook2's lengths"
    with torch.no_grad():
        model.eval()
        pair = zip(jointly(), apart(), strict=True)
        assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in pair), "they differ"
        a, b = in_turn(jointly, apart, args.repeat)
    what = f"{lengths}, encoded apart and un-padded against one padded pass"
    rows.append(row("encode", what, B / a, B / b, "pairs/s", higher=True))
    model.train()
    a, b = in_turn(lambda: contrast(jointly), lambda: contrast(apart), args.repeat)
    what = f"{lengths}, contrastive step forward and backward, apart against padded jointly"
    return [*rows, row("contrast", what, B / a, B / b, "pairs/s", higher=True)]


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
    file = corpus.features.files[corpus.features.place[video]] / f"{video}.npy"
    x = np.load(file, mmap_mode="r", allow_pickle=False)
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
    rows, repeat = [], args.repeat
    with tempfile.TemporaryDirectory() as folder:
        toy, wide = Path(folder) / "toy", Path(folder) / "wide"
        write_toy(toy, scale=0.3)
        write_corpus(wide, videos=32, shards=0, E=512)
        for name, root in (("data", toy), ("data wide", wide)):
            corpus, turn, rng = open_root(root), iter(range(10**9)), np.random.default_rng(0)

            def slowly(corpus=corpus, rng=rng) -> list[Tensor]:
                clips = [slow_clip(corpus, corpus.ids[i // 32], rng) for i in range(256)]
                return [torch.stack(x) for x in list(zip(*clips, strict=True))[:2]]

            def ours(corpus=corpus, turn=turn) -> Batch:
                return corpus.step(next(turn), 256)

            a, b = in_turn(slowly, ours, repeat)
            what = f"256 clips sampled, masked, collated, features {corpus.c.video_dim} wide, "
            what += "against a loop over clips"
            rows.append(row(name, what, 256 / a, 256 / b, "clips/s", higher=True))
        corpus = open_root(toy, clips_per_video=2)
        train = toy_step(corpus)
        turn = itertools.count()
        a, b = in_turn(train, lambda: corpus.step(next(turn), 32), repeat)
    what = "share of the toy world's step that drawing its 32 clips takes; a is the limit"
    return [*rows, row("data share", what, 0.05, b / a, "of 1")]


def toy_step(corpus: Corpus) -> Callable[[], None]:
    """Make a step of the model that `torchrun train.py` trains, the smallest there is."""
    shape = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4)
    c = dataclasses.replace(corpus.c, intermediate_size=512, **shape)
    model = VLM(c).train()
    params = [p for n, p in model.named_parameters() if n != "cls.predictions.bias"]
    optimizer = torch.optim.Adam(params, fused=True)
    batches = [corpus.step(n, 32) for n in range(4)]
    turn = itertools.count()

    def step() -> None:
        model.pretrain_loss(batches[next(turn) % 4]).value().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


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

    a, b = in_turn(published, here, args.repeat)
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
    from s3d import FPS, S3D, SIZE, random_weights

    plain, fast = S3D().eval(), S3D().eval()
    for model in (plain, fast):
        random_weights(model, 0)
    fast.fuse()
    frames = torch.rand(4, 3, FPS, SIZE, SIZE)
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
    return rows + s3d_file(fast, args)


def s3d_file(model, args) -> list[dict]:
    """A file of four seconds, decoded, resized and through S3D, against the network alone."""
    from s3d import FPS, SIZE, extract

    try:
        import av
    except ImportError:
        print("s3d file: left out; pip install av", file=sys.stderr)
        return []
    rows, rng = [], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.mp4"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            still = rng.integers(0, 256, (45, 80, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            for i in range(100):  # blocks of colour that move, as a camera does
                frame = av.VideoFrame.from_ndarray(np.roll(still, 3 * i, 1), format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        frames = torch.rand(4, 3, FPS, SIZE, SIZE)
        for precision in ["fp32"] + ["bf16"] * (half() is not None):
            bf16 = precision == "bf16"

            def network(bf16=bf16) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    model(frames)

            def file(precision=precision) -> None:
                extract(model, path, precision=precision)

            a, b = in_turn(network, file, args.repeat)
            what = f"S3D of a file of 640 x 360, decoding and all, {precision}, the network alone"
            rows.append(row(f"file {precision}", what, 4 / a, 4 / b, "s of video/s", higher=True))
    return rows


# ---------------------------------------------------------------------------------------------
# python bench.py


BENCHES = dict(
    step=step, precision=precision, caption=caption, encode=encode, data=data, metrics=metrics,
    s3d=s3d, scale=growth,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one measurement, or all."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["ablation"]:
        return ablation.main(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [*BENCHES, "all", "ablation"]
    parser.add_argument("name", choices=names, metavar="NAME",
                        help=f"{', '.join(names)}; the last has a --help of its own")  # fmt: skip
    a = parser.add_argument_group("measuring").add_argument
    a("--repeat", type=int, default=5, metavar="N", help="runs of each (default: 5)")
    a("--json", metavar="FILE", help="write the rows to this file too")
    a = parser.add_argument_group("sizes").add_argument
    a("--batch", type=int, metavar="N",
      help="step: clips (default: CPU 16, GPU the paper's 256)")  # fmt: skip
    a("--clips", type=int, default=8, metavar="N", help="caption: clips (default: 8)")
    a("--layers", type=int, default=12, metavar="N", help="layers of the BERT (default: 12)")
    a("--videos", type=int, default=100_000, metavar="N",
      help="scale: videos of its synthetic corpus (default: 100000)")  # fmt: skip
    a("--compile", action="store_true", help="step: compile our layers and Eq. 9")
    a("--which", choices=("padded", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.name == "ablation":
        raise ValueError("ablation has flags of its own and comes first: bench.py ablation --help")
    for flag, least in (("repeat", 1), ("layers", 1), ("clips", 1), ("videos", 100)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} is {getattr(args, flag)}, wanted at least {least}")
    can_write(args.json, "--json")
    check_compile(args.compile)
    args.batch = args.batch or (256 if torch.cuda.is_available() else 16)
    start_ranks()  # threads and caches as in training
    if args.which:
        print(peak(args.which, args))
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
    write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    run(main)
