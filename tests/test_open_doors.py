"""From outside in, end to end: real clips to a fine-tuned run, sentences to moments, evil files.

python -m pytest tests/test_open_doors.py -m slow      whole commands on real data, minutes
"""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

import eval as evaluation
import finetune
import s3d
from benchmarks import DataError, read_msrvtt, read_youcook2
from data import Captions, FeatureStore, fingerprint
from loop import read_checkpoint
from search import best_of_each, search
from vlm import VLM, VLMConfig, load_bert, load_mmpt, load_run, load_tokenizer

REPO = Path(__file__).resolve().parents[1]
HELD_OUT = 5  # clips of the fifteen that are not trained on


def python(*args, cwd: Path) -> str:
    """Run one of the project's commands; return what it prints."""
    me = dict(cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run([sys.executable, REPO / args[0], *map(str, args[1:])], **me)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ---- real video files, all the way


def write_msrvtt(root: Path, captions: dict[str, list[str]]) -> list[str]:
    """Write MSR-VTT's files for these clips; return the ids that are tested."""
    folder = root / "msrvtt"
    folder.mkdir(parents=True)
    ids = sorted(captions)
    train, test = ids[HELD_OUT:], ids[:HELD_OUT]
    sentences = [{"video_id": v, "caption": c} for v in ids for c in captions[v]]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    (folder / "MSRVTT_train.csv").write_text("\n".join(["video_id", *train]) + "\n")
    rows = [f'ret{i},{v},{v},"{captions[v][0]}"' for i, v in enumerate(test)]
    text = "\n".join(["key,vid_key,video_id,sentence", *rows]) + "\n"
    (folder / "MSRVTT_JSFUSION_test.csv").write_text(text)
    return test


def check_lengths(features: Path, clips: Path) -> None:
    """Every clip has one row for each second that its container states, and one at most more."""
    av, paths = pytest.importorskip("av"), sorted(clips.iterdir())
    assert len(paths) == 15
    for path in paths:
        with av.open(str(path)) as file:
            stated = file.duration / 1e6
        rows = np.load(features / f"{path.stem}.npy")
        assert 0 <= len(rows) - stated + 0.05 < 1.05, path.name
        assert rows.shape[1] == 512 and rows.dtype == np.float16
        assert np.abs(np.linalg.norm(rows.astype(np.float32), axis=1) - 1).max() < 2e-3


def test_real_clips_become_a_fine_tuned_run_that_is_tested_and_searched(
    shared, tmp_path, monkeypatch, capsys
):
    """Fifteen real files at 32 x 32 pixels; catches a door that does not take what another gives.

    The weights are random: what is found is not looked at, only that everything fits together.
    """
    pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    monkeypatch.setattr(s3d, "SIZE", 32)
    root, clips = tmp_path / "data", shared / "msvd" / "clips"
    captions = json.loads((shared / "msvd" / "captions.json").read_text())
    where = ["--random-weights", "0", "--out", str(root / "features")]
    for shard in ("1/2", "2/2"):
        assert s3d.main([str(clips), *where, "--shard", shard]) == 0
        assert "RANDOM WEIGHTS (seed 0)" in capsys.readouterr().out
    check_lengths(root / "features", clips)
    test = write_msrvtt(root, captions)
    settings = dict(task="retrieval", epochs=2, batch=5, lr=1e-4, out=str(tmp_path / "run"))
    settings |= dict(bert=str(shared / "weights" / "bert_tiny"), held_out=0.2)
    summary = finetune.main(finetune.TuneConfig(data=str(root), **settings), {"epochs"})
    assert summary["final"] and summary["n"] == HELD_OUT
    capsys.readouterr()
    files = ["--json", str(tmp_path / "t.json"), "--predictions", str(tmp_path / "p.json")]
    run = ["--run", str(tmp_path / "run")]
    assert evaluation.main(["retrieval", *run, "--data", str(root), *files]) == 0
    said, table = capsys.readouterr().out, json.loads((tmp_path / "t.json").read_text())
    assert "dot product  " in said and table["model"] == summary["model"]
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [row["text"] for row in rows] == [captions[v][0] for v in test]
    assert all(sorted(row["top"]) == test for row in rows)
    find = ["search", *run, "--features", str(root / "features"), "a woman mixes rice"]
    assert evaluation.main(find) == 0
    assert capsys.readouterr().out.startswith("15 videos, by their best window\n   1  ")


@pytest.mark.slow
def test_the_commands_do_the_same_at_full_size(shared, tmp_path):
    """The clips of two seconds and more through the commands themselves: about three minutes."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    root, clips = tmp_path / "data", shared / "msvd" / "clips"
    said = python("s3d.py", clips, "--random-weights", 0, "--out", root / "features",
                  "--precision", "bf16", cwd=tmp_path)  # fmt: skip
    assert "RANDOM WEIGHTS" in said and "15 videos" in said and " left" in said
    check_lengths(root / "features", clips)
    write_msrvtt(root, json.loads((shared / "msvd" / "captions.json").read_text()))
    tune = ["--bert", shared / "weights/bert_tiny", "--out", "run", "--batch", 5, "--epochs", 3]
    python("finetune.py", "retrieval", "--data", root, *tune, cwd=tmp_path)
    said = python("eval.py", "retrieval", "--run", "run", "--data", root, cwd=tmp_path)
    assert "retrieval on msrvtt, 5 items, fine-tuned for retrieval" in said


# ---- what a search finds


def found_within(model, tokenizer, features, queries: list[tuple[str, str]], top: int) -> float:
    """Return the share of (sentence, video) whose video is among the first `top`."""
    videos, hits = sorted({video for _, video in queries}), 0
    for text, own in queries:
        best = best_of_each(search(model, tokenizer, features, text, videos))
        hits += own in [moment.video for moment in best[:top]]
    return hits / len(queries)


@pytest.mark.slow
def test_search_finds_held_out_toy_clips(tmp_path):
    """400 steps from nothing; steps of the clips' kind were never shown or said in training."""
    python("train.py", "--steps", 400, "--out", "run", cwd=tmp_path)
    model, tokenizer = load_run(tmp_path / "run")
    features = FeatureStore(tmp_path / "toy" / "features")
    clips = read_msrvtt(tmp_path / "toy" / "msrvtt")["test"]
    assert len(clips) == 300
    queries = [(clip.text, clip.video) for clip in clips[:60]]
    share = found_within(model, tokenizer, features, queries, 10)
    assert share > 5 * 10 / 60, share


# ---- nothing in a file is run


class Evil:
    """A pickle that makes a file when it is opened by anything that trusts it."""

    def __init__(self, mark: Path, how: str):
        self.mark, self.how = str(mark), how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.mark}",)
        if self.how == "exec":
            return exec, (f"open({self.mark!r}, 'w')",)
        return open, (self.mark, "w")


def tiny() -> VLM:
    """A model of no size."""
    return VLM(VLMConfig(vocab_size=110, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
                         intermediate_size=4, max_position_embeddings=96, video_dim=2))  # fmt: skip


def in_torch(evil, path: Path, legacy: bool = False) -> None:
    """Beside a tensor, in PyTorch's container."""
    torch.save({"x": torch.ones(2), "evil": evil}, path, _use_new_zipfile_serialization=not legacy)


def in_old_torch(evil, path: Path) -> None:
    """The same in PyTorch's container of before 1.6."""
    in_torch(evil, path, legacy=True)


def in_pickle(evil, path: Path) -> None:
    """Beside an array."""
    path.write_bytes(pickle.dumps({"x": np.ones((2, 2), np.float32), "evil": evil}))


def in_array(evil, path: Path) -> None:
    """Inside an array of objects."""
    with open(path, "wb") as f:
        np.save(f, np.array([[evil]], dtype=object), allow_pickle=True)


def in_archive(evil, path: Path) -> None:
    """Inside an archive of arrays of objects."""
    with open(path, "wb") as f:
        np.savez(f, x=np.array([[evil]], dtype=object))


def trust(path: Path) -> None:
    """Open a file as readers do that run what is in it."""
    for read in (
        lambda: torch.load(io.BytesIO(path.read_bytes()), weights_only=False),
        lambda: np.load(path, allow_pickle=True)["x"],
        lambda: np.load(path, allow_pickle=True),
        lambda: pickle.loads(path.read_bytes()),
    ):
        try:
            read()
        except Exception:  # another kind of file
            continue


def packed_captions(path: Path) -> Captions:
    """Open a folder of packed captions, one of whose arrays is the evil one."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    about = {"tokenizer": fingerprint(tokenizer), "ids": ["v"], "words": 0, "removed": 0}
    (path.parent / "about.json").write_text(json.dumps(about))
    for name in Captions.ARRAYS:
        if name != path.stem:
            np.save(path.with_name(f"{name}.npy"), np.zeros(2, np.int64))
    return Captions.open(path.parent, tokenizer)


DOORS = {  # what is opened, by which function, and the containers that may pose as it
    "v.pickle": (FeatureStore, (in_pickle, in_torch, in_old_torch)),
    "v.pkl": (FeatureStore, (in_pickle,)),
    "v.npy": (lambda path: FeatureStore(path.parent), (in_array, in_pickle)),
    "v.npz": (FeatureStore, (in_archive,)),
    "v.safetensors": (lambda path: FeatureStore(path.parent), (in_torch, in_pickle)),
    "youcookii_data.pickle": (lambda path: read_youcook2(path.parent), (in_pickle, in_torch)),
    "tokens.npy": (packed_captions, (in_array, in_pickle)),
    "pytorch_model.bin": (lambda path: load_bert(tiny(), path.parent), (in_torch, in_old_torch)),
    "bert.pt": (lambda path: load_bert(tiny(), path), (in_torch, in_old_torch, in_pickle)),
    "model.safetensors": (lambda path: load_bert(tiny(), path.parent), (in_torch, in_pickle)),
    "checkpoint.pt": (lambda path: load_mmpt(tiny(), path), (in_torch, in_old_torch, in_pickle)),
    "trainer.pt": (read_checkpoint, (in_torch, in_old_torch, in_pickle)),
    "s3d_howto100m.pth": (lambda path: s3d.load_s3d(s3d.S3D(), path), (in_torch, in_old_torch)),
    "tokenizer.json": (load_tokenizer, (in_pickle, in_torch)),
}  # fmt: skip


@pytest.mark.parametrize("how", ["system", "exec", "open"])
@pytest.mark.parametrize(
    "name, pack", [pytest.param(n, p, id=f"{n}-{p.__name__}") for n in DOORS for p in DOORS[n][1]]
)
def test_a_malicious_file_is_refused_at_every_door_and_creates_nothing(tmp_path, name, pack, how):
    """Shown first: a reader that trusts the file does create the mark."""
    folder, mark = tmp_path / "in", tmp_path / "mark"
    folder.mkdir()
    path = folder / name
    pack(Evil(mark, how), path)
    trust(path)
    assert mark.exists()
    mark.unlink()
    with pytest.raises((DataError, ValueError)) as error:
        DOORS[name][0](path)
    assert not mark.exists()
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
