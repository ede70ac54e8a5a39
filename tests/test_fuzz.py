"""Damaged files at every door: each is read rightly, or refused in one line that names it.

    pytest tests/test_fuzz.py                          30 damaged files a reader (half a minute)
    VLM_FUZZ=2000 pytest tests/test_fuzz.py -k coin    as many as one likes; VLM_FUZZ_SEED: others

Never another exception, a hang, a gigabyte of memory, or a file outside the output folder. What the
long form found is kept by name in test_border.py.
"""

import gzip
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import data
from benchmarks import is_id, is_span, is_words
from captions import caption_scores, read_hypotheses, read_references
from data import Captions, FeatureStore, open_data, special_ids
from keep import read_checkpoint
from meteor import word_lists
from s3d import load_s3d
from tasks import open_task
from tests.mutate import mutant
from toy import write_toy
from vlm import VLM, VLMConfig, load_bert, load_mmpt, load_run, load_tokenizer, save_run
from weights import mmpt_config

COUNT = int(os.environ.get("VLM_FUZZ", 30))
SEED = int(os.environ.get("VLM_FUZZ_SEED", 0))
KEPT = Path(tempfile.gettempdir()) / "vlm-fuzz"  # what a reader got wrong
SECONDS, MEMORY = 10, 2**30  # for one damaged file; for all of a reader

SIZES = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16)
SIZES |= dict(max_position_embeddings=96, video_dim=6)


class Hang(BaseException):
    """A damaged file took longer than SECONDS."""


def hang(*_) -> None:
    """End a reader that takes too long."""
    raise Hang


@dataclass
class Reader:
    """A door: the files that come in by it (glob and kind of damage), and what reads them all."""

    files: list[tuple[str, str]]
    read: Callable[[Path, random.Random], object]
    named: bool = True  # an error names a file or a folder


def peak_bytes() -> int:
    """Return the most memory this process had at once since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


def forget_peak() -> int:
    """Begin to watch memory anew: what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


# ---- the doors


def narration(folder: Path, rng: random.Random) -> None:
    """raw_caption.json and the lists, loose or packed: clips are drawn and looked at."""
    tokenizer = load_tokenizer(folder)
    c = VLMConfig(**SIZES, **special_ids(tokenizer))
    found, said = open_data(folder, FeatureStore(folder / "features"), tokenizer, c,
                            skip_bad=rng.random() < 0.5, clips_per_video=2, min_text=3)  # fmt: skip
    batch = found.train.step(0, 8)
    assert 0 <= int(batch.text.min()) <= int(batch.text.max()) < c.vocab_size
    assert batch.video.isfinite().all() and batch.video_valid.any(1).all()
    assert all(map(is_id, found.train.captions.ids)) and all(map(str.isprintable, said))


def benchmark(*names: str) -> Callable:
    """A benchmark's own files, as the tasks read them."""

    def read(folder: Path, rng: random.Random) -> None:
        store, (name, dataset) = FeatureStore(folder / "features"), rng.choice(names)
        task = open_task(name, folder, store, dataset, rng.random() < 0.5, rng.choice([0, 0.3]))
        for item in [*task.test, *task.val, *(i for group in task.train for i in group)]:
            assert is_id(item.clip.video) and is_span(item.clip.start, min(1e6, item.clip.end))
            assert all(map(is_words, item.texts)) or name == "localization"
        assert all(map(str.isprintable, task.said))

    return read


def features(folder: Path, rng: random.Random) -> None:
    """Loose arrays, shards, pickles: all rows."""
    place = next((p for p in folder.glob("*.pickle")), folder)
    store = FeatureStore(place)
    for video in store.place:
        assert is_id(video)
        rows = store.rows(video, np.arange(len(store.open(video))))
        assert rows.shape[1] == store.width and rows.dtype == np.float32


def pack(folder: Path, rng: random.Random) -> None:
    """Pack into shards; `fuzz` sees to it that nothing is written elsewhere."""
    out = folder.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    data.main(["pack", str(folder), "--out", str(out)])
    features(out / "features", rng)
    if (out / "captions").exists():
        Captions.open(out / "captions", load_tokenizer(folder))


def check(folder: Path, rng: random.Random) -> None:
    """`data.py check` counts what is bad and says it; it never fails itself."""
    assert data.main(["check", str(folder)]) in (0, 1)


def vocabulary(folder: Path, rng: random.Random) -> None:
    """vocab.txt or tokenizer.json: words it has never seen are encoded and decoded."""
    tokenizer = load_tokenizer(folder)
    ids = special_ids(tokenizer)
    texts = ["dice the onion", "Zürich 茶 [SEP] \u202e🍜 x" * 9, "y" * 500, ""]
    for found in tokenizer.encode_batch(texts, add_special_tokens=False):
        assert all(0 <= i < ids["vocab_size"] for i in found.ids)
        tokenizer.decode(found.ids)


def run_folder(folder: Path, rng: random.Random) -> None:
    """config.json, model.safetensors, tokenizer.json of a run: its numbers are finite."""
    model, tokenizer = load_run(folder)
    ids = torch.tensor([tokenizer.encode("dice the onion", add_special_tokens=False).ids[:9]])
    if ids.numel() and len(ids[0]) <= model.config.max_text_len:
        with torch.no_grad():
            model.embed_text(ids, torch.ones_like(ids, dtype=torch.bool))


def bert(folder: Path, rng: random.Random) -> None:
    """An original BERT: a folder with model.safetensors or pytorch_model.bin."""
    load_bert(VLM(VLMConfig(vocab_size=30, **TOKENS, **SIZES)), folder, lambda line: None)


def release(folder: Path, rng: random.Random) -> None:
    """The authors' checkpoint."""
    path = folder / "checkpoint.pt"
    load_mmpt(VLM(VLMConfig(**TOKENS | mmpt_config(path, heads=3))), path, lambda line: None)


TOKENS = dict(pad_token_id=0, unk_token_id=1, cls_token_id=2, sep_token_id=3, mask_token_id=4)


def s3d(folder: Path, rng: random.Random) -> None:
    """Weights of the video tower, a small one."""
    load_s3d(tower(), folder / "s3d.pth", lambda line: None)


def tower() -> torch.nn.Module:
    """Stand in for S3D, of which nothing but the names and shapes of tensors is asked."""
    return torch.nn.Sequential(torch.nn.Conv3d(2, 3, 1), torch.nn.BatchNorm3d(3))


def checkpoint(folder: Path, rng: random.Random) -> None:
    """trainer.pt, as resuming opens it."""
    read_checkpoint(folder / "trainer.pt")


def meteor(folder: Path, rng: random.Random) -> None:
    """METEOR's jar and paraphrase table; captions are scored with them."""
    os.environ["XDG_CACHE_HOME"] = str(folder.with_name("out"))
    if (text := folder / "paraphrases.txt").exists():
        (folder / "paraphrase-en.gz").write_bytes(gzip.compress(text.read_bytes(), 1))
    word_lists.cache_clear()
    scores = caption_scores(*CAPTIONS, "space", meteor_data=folder)
    assert all(map(math.isfinite, scores.values()))


CAPTIONS = {"a": ["the big mouse sat"], "b": ["x"]}, {"a": "a large rodent sat", "b": "Dr. y"}


def caption_files(folder: Path, rng: random.Random) -> None:
    """References and hypotheses of `eval.py captions`, in all their forms."""
    references = read_references(rng.choice(sorted(folder.glob("R*.json"))))
    hypotheses = read_hypotheses(rng.choice(sorted(folder.glob("H*.json"))))
    both = [key for key in references if key in hypotheses]
    refs, ours = ({key: x[key] for key in both} for x in (references, hypotheses))
    scores = caption_scores(refs, ours, rng.choice(["ptb", "space"]), None, folder / "words", True)
    assert all(math.isfinite(x) for name, x in scores.items() if name != "per item")


READERS = {
    "raw_caption": Reader([("raw_caption.json", "json"), ("*.lst", "text")], narration),
    "msrvtt": Reader(
        [("msrvtt/*.json", "json"), ("msrvtt/*.csv", "text"), ("msrvtt/*.csv", "text")],
        benchmark(("retrieval", "msrvtt"), ("captioning", "msrvtt")),
    ),
    "msrvtt qa": Reader([("msrvtt/*.csv", "text")], benchmark(("qa", "msrvtt"))),
    "youcook2": Reader(
        [("youcook2/*.json", "json"), ("youcook2/*.txt", "text")],
        benchmark(("captioning", "youcook2"), ("retrieval", "youcook2")),
    ),
    "coin": Reader([("coin/*.json", "json")], benchmark(("segmentation", "coin"))),
    "crosstask": Reader(
        [("crosstask/*.*", "text"), ("crosstask/annotations/*", "text")],
        benchmark(("localization", "crosstask")),
    ),
    "check": Reader(
        [("*/*.json", "json"), ("*.json", "json"), ("*/*.csv", "text"), ("*.lst", "text"),
         ("features/*.npy", "npy"), ("crosstask/*", "text")],
        check,
    ),
    "npy": Reader([("*.npy", "npy")], features),
    "shards": Reader([("*.safetensors", "safetensors")], features),
    "pickle": Reader([("*.pickle", "bytes")], features),
    "packed captions": Reader(
        [("captions/*", "npy"), ("captions/*.json", "json")], narration, named=False
    ),
    "pack": Reader([("raw_caption.json", "json"), ("features/*.npy", "npy"), ("*.lst", "text")],
                   pack),
    "vocab.txt": Reader([("vocab.txt", "text")], vocabulary, named=False),
    "tokenizer.json": Reader([("tokenizer.json", "json")], vocabulary, named=False),
    "config.json": Reader([("config.json", "json")], run_folder),
    "run": Reader([("model.safetensors", "safetensors"), ("tokenizer.json", "json")], run_folder),
    "safetensors": Reader([("model.safetensors", "safetensors")], bert),
    "bin": Reader([("*.bin", "zip")], bert),
    "bin legacy": Reader([("*.bin", "bytes")], bert),
    "release": Reader([("checkpoint.pt", "zip")], release, named=False),
    "release legacy": Reader([("checkpoint.pt", "bytes")], release, named=False),
    "trainer.pt": Reader([("trainer.pt", "zip")], checkpoint),
    "s3d": Reader([("s3d.pth", "zip")], s3d),
    "meteor": Reader([("*.jar", "zip"), ("paraphrases.txt", "text")], meteor),
    "meteor gz": Reader([("*.gz", "bytes")], meteor),
    "captions": Reader([("*.json", "json")], caption_files, named=False),
}  # fmt: skip


# ---- valid files of each kind, small


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder for each reader, with valid files."""
    root = tmp_path_factory.mktemp("fuzz")
    write_toy(root / "toy", scale=0.02)
    for name in ("raw_caption", "msrvtt", "msrvtt qa", "youcook2", "coin", "crosstask", "check"):
        (root / name).symlink_to(root / "toy")
    with open(os.devnull, "w") as null, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", null)
        data.main(["pack", str(root / "toy"), "--out", str(root / "packed captions")])
    shutil.copytree(root / "toy", root / "pack", ignore=shutil.ignore_patterns("*rosstask*",
                    "coin", "msrvtt", "youcook2", "cook*", "cross*"))  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {f"v{i}": rng.normal(size=(4 + i, 8)).astype(np.float16) for i in range(2)}
    for name in ("npy", "shards", "pickle", "vocab.txt", "meteor", "meteor gz", "captions", "s3d"):
        (root / name).mkdir()
    for video, x in arrays.items():
        np.save(root / "npy" / f"{video}.npy", x)
    safetensors.numpy.save_file(arrays, root / "shards" / "shard-00000.safetensors")
    (root / "pickle" / "x.pickle").write_bytes(pickle.dumps(arrays, 2))
    write_vocabularies(root)
    write_weights(root)
    write_captions(root)
    return root


def write_vocabularies(root: Path) -> None:
    """The toy world's words as vocab.txt, and as tokenizer.json."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "on", "##ion", "dice", "y"]
    (root / "vocab.txt" / "vocab.txt").write_text("\n".join(words))
    (root / "tokenizer.json").mkdir()
    tokenizer = load_tokenizer(root / "vocab.txt")
    tokenizer.save(str(root / "tokenizer.json" / "tokenizer.json"))


def write_weights(root: Path) -> None:
    """A run, an original BERT in three containers, the release in two, trainer.pt, a tower."""
    tokenizer = load_tokenizer(root / "vocab.txt")
    model = VLM(VLMConfig(**SIZES, **special_ids(tokenizer)))
    save_run(root / "config.json", model, tokenizer)
    shutil.copytree(root / "config.json", root / "run")
    model = VLM(VLMConfig(vocab_size=30, **TOKENS, **SIZES))
    state = {k: x for k, x in model.state_dict().items() if k.startswith(("bert.", "cls."))}
    (root / "safetensors").mkdir()
    safetensors.torch.save_file(state, root / "safetensors" / "model.safetensors")
    whole = {"model": {f"mmmodel.mm_encoder.{k}": x for k, x in model.state_dict().items()}}
    trainer = {"model": state, "optimizer": {}, "step": 3, "config": {}, "scaler": {}}
    for old, name in ((False, ""), (True, " legacy")):
        how = {"_use_new_zipfile_serialization": not old}
        for folder in (f"bin{name}", f"release{name}", "trainer.pt"):
            (root / folder).mkdir(exist_ok=True)
        torch.save(state, root / f"bin{name}" / "pytorch_model.bin", **how)
        torch.save(whole, root / f"release{name}" / "checkpoint.pt", **how)
    torch.save(trainer, root / "trainer.pt" / "trainer.pt")
    torch.save(tower().state_dict(), root / "s3d" / "s3d.pth")


def write_captions(root: Path) -> None:
    """Caption files in four forms, and METEOR's word lists."""
    rows = [{"image_id": i, "caption": f"Cut the onion, {i} times."} for i in range(3)]
    kept = {str(i): ["cut it", f"slice the onion {i}"] for i in range(3)}
    steps = [{"id": i, "segment": [0, 2], "sentence": "dice the (red) onion"} for i in range(2)]
    for name, made in {
        "R1": kept, "R2": {"annotations": rows}, "R3": {"database": {"v": {"annotations": steps}}},
        "H1": {str(i): "cut the onion's skin" for i in range(3)}, "H2": rows,
        "H3": {"v_0": "dice it", "v_1": ""},
    }.items():  # fmt: skip
        (root / "captions" / f"{name}.json").write_text(json.dumps(made))
    table = "0.5\nthe big mouse\na large rodent\n0.25\nsat\nsat down\n"
    with zipfile.ZipFile(root / "meteor" / "meteor-1.5.jar", "w") as jar:
        jar.writestr("function/english.words", "the\na\nin\nto\n")
        jar.writestr("nonbreaking/english.prefixes", "# dots\n\nDr\nNo #NUMERIC_ONLY# \n")
        jar.writestr("synonym/english.synsets", "big\n01 02\nlarge\n02\nmouse\n03\nrodent\n03\n")
        jar.writestr("synonym/english.exceptions", "mouse\nmice mouses\n")
    (root / "meteor" / "paraphrase-en.gz").write_bytes(b"")
    (root / "meteor" / "paraphrases.txt").write_text(table)
    shutil.copyfile(root / "meteor" / "meteor-1.5.jar", root / "meteor gz" / "meteor-1.5.jar")
    (root / "meteor gz" / "paraphrase-en.gz").write_bytes(gzip.compress(table.encode()))
    shutil.copytree(root / "meteor gz", root / "captions" / "words")


# ---- the loop


def bad_message(error: ValueError, wanted: str) -> str:
    """Say what is wrong with an error's text: not ours, not one line, does not say where."""
    text, ours = str(error), type(error) in (ValueError, data.DataError)
    good = ours and text.strip() and text.isprintable() and len(text) <= 1500 and wanted in text
    return "" if good else f"{type(error).__name__}: {text[:300]!r}"


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_rightly_or_refused_in_one_line(name, world, tmp_path, monkeypatch):
    """Catches whatever a reader takes for granted; what failed is kept in the folder it names."""
    reader, folder = READERS[name], tmp_path / "in"
    shutil.copytree(world / name, folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "out"))
    reader.read(folder, random.Random(0))  # as it is, it is read
    files = [(path, kind) for glob, kind in reader.files for path in sorted(folder.glob(glob))
             if path.is_file()]  # fmt: skip

    before, wrong, held = signal.signal(signal.SIGALRM, hang), [], forget_peak()
    outcomes = {"read": 0, "refused": 0}
    for n in range(COUNT):
        rng = random.Random(f"{SEED} {name} {n}")
        path, kind = rng.choice(files)
        valid = path.read_bytes()
        path.write_bytes(mutant(valid, "json" if path.suffix == ".json" else kind, rng))
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(folder, rng)
            outcomes["read"] += 1
        except ValueError as error:
            outcomes["refused"] += 1
            if what := bad_message(error, "" if not reader.named else str(tmp_path)):
                wrong.append((n, path, what))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            wrong.append((n, path, "".join(traceback.format_exception(error)[-3:])[-900:]))
        finally:
            signal.alarm(0)
            if wrong and wrong[-1][0] == n:
                KEPT.mkdir(exist_ok=True)
                shutil.copyfile(path, KEPT / f"{name} {n} {path.name}")
            path.write_bytes(valid)
    signal.signal(signal.SIGALRM, before)
    grown = peak_bytes() - held
    print(f"{name}: {COUNT} inputs, {outcomes}, {len(wrong)} wrong, {grown >> 20} MiB more")
    assert not wrong, f"{len(wrong)} of {COUNT}\n" + "\n".join(
        f"--- {n} {path.name}: {what}" for n, path, what in wrong[:12]
    )
    assert grown < MEMORY, f"{grown >> 20} MiB"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "in", "out"]
    assert not list((tmp_path / "cwd").iterdir())
