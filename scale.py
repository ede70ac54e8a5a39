"""What a corpus costs as it grows, and what a second process brings: `python bench.py scale`.

The corpus is synthetic, packed, of HowTo100M's proportions (sec. 5.1.1): 390 seconds and 110
captions a video. How every row of bench.py is measured stands here too: A and B in turn, medians.
"""

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from data import Captions, Corpus, open_captions, open_corpus, open_features, special_ids
from keep import read_log
from loop import memory_mib
from toy import write_toy, write_vocabulary
from vlm import VLMConfig, load_tokenizer

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
    """Make a row of a and b, in `unit`: b is ours; ratio says how many times better it is."""
    return dict(name=name, what=what, a=a, b=b, unit=unit, ratio=b / a if higher else a / b)


# ---------------------------------------------------------------------------------------------
# The corpus


def open_root(root: Path, **settings) -> Corpus:
    """Open the training videos of a folder."""
    tokenizer = load_tokenizer(root)
    stores = open_features(root), open_captions(root, tokenizer)
    c = VLMConfig(video_dim=stores[0].width, **special_ids(tokenizer))
    return open_corpus(root, *stores, "train", c, **settings)[0]


def write_corpus(root: Path, videos: int, shards: int, E: int) -> None:
    """Write packed narration of HowTo100M's proportions (sec. 5.1.1): 390 s and 110 captions of
    4..13 word pieces a video, all alike; features in so many shards, or .npy files for 0."""
    rng, n, seconds = np.random.default_rng(0), 110, 390
    (root / "features").mkdir(parents=True)
    write_vocabulary(root, ["a b c d e f g h i j k"] * 9)
    ids = [f"{i:011x}" for i in rng.permutation(videos)]  # as long as YouTube's
    (root / "train.lst").write_text("".join(f"{video}\n" for video in ids))
    pieces = rng.integers(4, 14, n)
    start = np.tile(np.arange(n) * seconds / n, videos)
    arrays = {"first_caption": np.arange(videos + 1) * n, "start": start}
    arrays |= {"end": start + seconds / n, "tokens": np.full(pieces.sum() * videos, 35, np.uint16)}
    arrays["first_token"] = np.concatenate([[0], np.cumsum(np.tile(pieces, videos))])
    Captions(ids, arrays).save(root / "captions", load_tokenizer(root))
    x, shards = rng.standard_normal((seconds, E)).astype(np.float16), min(shards, videos)
    for k in range(shards):
        part = ids[k * videos // shards : (k + 1) * videos // shards]
        save_file(dict.fromkeys(part, x), root / "features" / f"shard-{k:05}.safetensors")
    for video in [] if shards else ids:
        np.save(root / "features" / f"{video}.npy", x)


# ---------------------------------------------------------------------------------------------
# As it grows


def growth(args) -> Iterator[dict]:
    """What a corpus of HowTo100M's kind costs as it grows, and what a second process brings."""
    for part in (flat, start_up, two_processes):
        with tempfile.TemporaryDirectory() as folder:
            yield from part(Path(folder), args)


def flat(root: Path, args) -> list[dict]:
    """A clip's cost from 1 to a tenth of --videos videos, and from 1 to 100 shards; features are
    narrow, so that finding a clip is what costs."""
    many, corpora, rows = max(100, args.videos // 10), {}, []
    for videos, shards in ((1, 0), (many, 0), (many, 1), (many, 100)):
        write_corpus(part := root / f"{videos}-{shards}", videos, shards, E=8)
        corpora[videos, shards] = open_root(part)

    def draw(corpus: Corpus) -> Callable:
        turn = itertools.count()
        return lambda: [corpus.step(next(turn), 256) for _ in range(8)]

    for name, few, all_, what in (
        ("videos", (1, 0), (many, 0), f"clips drawn from {many:,} videos against from one"),
        ("shards", (many, 1), (many, 100), "clips drawn from 100 shards against from one"),
    ):
        a, b = in_turn(draw(corpora[few]), draw(corpora[all_]), max(5, args.repeat))
        rows.append(row(name, what, 8 * 256 / a, 8 * 256 / b, "clips/s", higher=True))
    return rows


def start_up(root: Path, args) -> list[dict]:
    """Seconds and memory of a fresh process up to its first batch, shards and .npy files."""
    n, rows = args.videos, []
    for name, shards in (("shards", 100), (".npy", 0)):
        found = {}
        for videos in (n // 100, n):
            write_corpus(part := root / f"{name}-{videos}", videos, shards, E=2)
            found[videos] = [first_batch(part) for _ in range(args.repeat)]
        seconds, mib, held = (
            {k: statistics.median(run[i] for run in v) for k, v in found.items()} for i in range(3)
        )
        what = f"seconds from python to the first batch, {n:,} videos in {name}; a is the limit"
        rows.append(row(f"start {name}", what, 10.0, seconds[n], "s"))
        what = f"peak memory of that process, {n:,} videos in {name}; a is the limit"
        rows.append(row(f"start {name}", what, 500.0, mib[n], "MiB"))
        captions = sum(x.stat().st_size for x in (part / "captions").glob("*.npy")) / n
        state = (held[n] - held[n // 100]) * 2**20 / (n - n // 100)
        what = f"a video in memory ({name}) against on disk, 390 s x 512 in fp16 and its captions"
        rows.append(row("state", what, 390 * 512 * 2 + captions, state, "bytes"))
    return rows


def first_batch(root: Path) -> tuple[float, float, float]:
    """Open a corpus in a fresh process: seconds in all, peak MiB, MiB held beside mapped files."""
    begun = time.perf_counter()
    code = f"import scale; scale.show_memory({str(root)!r})"
    me = dict(cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", code], **me)
    return time.perf_counter() - begun, *map(float, done.stdout.split())


def show_memory(root: str) -> None:
    """Draw a batch, then print peak memory, and memory now without mapped files, in MiB."""
    corpus = open_root(Path(root))
    corpus.step(0, 256)
    now = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    print(memory_mib(torch.device("cpu")), int(now) / 2**10)


TRAINED = "--width 256 --layers 4 --batch 64"  # large enough that gradients take time to sum


def two_processes(root: Path, args) -> list[dict]:
    """Pre-training by two processes against one, a thread and a core each; and what two runs that
    have nothing to do with each other reach at once, which is all that two cores have."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(mine) < 2:
        print("ranks: left out; one core", file=sys.stderr)
        return []
    rates = {"one": [], "ranks": [], "apart": []}
    write_toy(root / "toy", scale=0.1)
    os.sched_setaffinity(0, mine[:2])  # for the children: a rank takes the cores it may use
    try:
        for n in range(args.repeat):
            rates["one"].append(train_rate(root, 1, f"one-{n}"))
            rates["ranks"].append(train_rate(root, 2, f"ranks-{n}"))
            with ThreadPoolExecutor(2) as pool:
                runs = [pool.submit(train_rate, root, 1, f"apart-{n}-{i}") for i in range(2)]
            rates["apart"].append(sum(run.result() for run in runs))
    finally:
        os.sched_setaffinity(0, mine)
    one, ranks, apart = (statistics.median(x) for x in rates.values())
    what = "pre-training by two processes against one, a thread each, 4 layers 256 wide, 64 clips"
    return [row("ranks", what, one, ranks, "clips/s", higher=True),
            row("two runs", "two runs of one process each at once, against one of them", one, apart,
                "clips/s", higher=True)]  # fmt: skip


def train_rate(folder: Path, ranks: int, name: str) -> float:
    """Run train.py for twelve steps: clips a second of the last eight."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    me = [*(torchrun if ranks > 1 else []), str(Path(__file__).with_name("train.py"))]
    flags = f"--data toy {TRAINED} --steps 12 --log-every 4 --out {name}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = [sys.executable, *me, *flags.split()]
    subprocess.run(done, cwd=folder, env=env, check=True, capture_output=True)
    log = read_log(folder / name / "log.jsonl")
    return statistics.mean(x["clips_per_s"] for x in log if x.get("step", 0) > 4)
