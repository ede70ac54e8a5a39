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
from benchmarks import Clip, DataError
from data import Captions, FeatureStore, encode, special_ids, vocabulary_digest
from keep import read_checkpoint
from search import best_of_each, search
from univl import read_youcook2
from vlm import VLM, VLMConfig, load_bert, load_mmpt, load_run, load_tokenizer, save_run

REPO = Path(__file__).resolve().parents[1]
HELD_OUT = 5  # clips of the fifteen that are not trained on


def python(*args, cwd: Path) -> str:
    """Run one of the project's commands; return what it prints."""
    me = dict(cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run([sys.executable, REPO / args[0], *map(str, args[1:])], **me)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ---- real video files, all the way


def write_msrvtt(root: Path, captions: dict[str, list[str]], held_out: int) -> list[str]:
    """Write MSR-VTT's files for these clips; return the ids that are tested, the first ones."""
    folder = root / "msrvtt"
    folder.mkdir(parents=True)
    ids = sorted(captions)
    train, test = ids[held_out:], ids[:held_out]
    sentences = [{"video_id": v, "caption": c} for v in ids for c in captions[v]]
    (folder / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    (folder / "MSRVTT_train.csv").write_text("\n".join(["video_id", *train]) + "\n")
    rows = [f'ret{i},{v},{v},"{captions[v][0]}"' for i, v in enumerate(test)]
    text = "\n".join(["key,vid_key,video_id,sentence", *rows]) + "\n"
    (folder / "MSRVTT_JSFUSION_test.csv").write_text(text)
    return test


def check_lengths(features: Path, clips: list[Path]) -> None:
    """Every clip has one row for each second that its container states, and one at most more."""
    av = pytest.importorskip("av")
    for path in clips:
        with av.open(str(path)) as file:
            stated = file.duration / 1e6
        rows = np.load(features / f"{path.stem}.npy")
        assert 0 <= len(rows) - stated + 0.05 < 1.05, path.name
        assert rows.shape[1] == 512 and rows.dtype == np.float16
        assert np.abs(np.linalg.norm(rows.astype(np.float32), axis=1) - 1).max() < 2e-3


@pytest.mark.slow
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
    assert len(list(clips.iterdir())) == 15
    check_lengths(root / "features", list(clips.iterdir()))
    test = write_msrvtt(root, captions, HELD_OUT)
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
    """The four shortest clips, 19 seconds, through the commands themselves: a minute."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    captions = json.loads((shared / "msvd" / "captions.json").read_text())
    clips = sorted((shared / "msvd" / "clips").iterdir())
    clips.sort(key=lambda path: np.subtract(*map(int, path.stem.split("_")[:-3:-1])))
    clips, root = clips[:4], tmp_path / "data"
    said = python("s3d.py", *clips, "--random-weights", 0, "--out", root / "features",
                  cwd=tmp_path)  # fmt: skip
    assert "RANDOM WEIGHTS" in said and "4 videos" in said and " left" in said
    check_lengths(root / "features", clips)
    assert [len(np.load(root / "features" / f"{x.stem}.npy")) for x in clips] == [4, 5, 5, 5]
    write_msrvtt(root, {path.stem: captions[path.stem] for path in clips}, 2)
    tune = ["--bert", shared / "weights/bert_tiny", "--out", "run", "--batch", 2, "--steps", 9]
    python("finetune.py", "retrieval", "--data", root, *tune, cwd=tmp_path)
    said = python("eval.py", "retrieval", "--run", "run", "--data", root, cwd=tmp_path)
    assert "retrieval on msrvtt, 2 items, fine-tuned for retrieval" in said


# ---- what a search finds


def ranks(run: Path, features: FeatureStore, clips: list[Clip], videos: list[str], stride: int):
    """Search for each clip's text; return the ranks of the clips' own videos."""
    model, tokenizer = load_run(run)
    found = []
    for clip in clips:
        best = best_of_each(search(model, tokenizer, features, clip.text, videos, stride))
        found.append(1 + [moment.video for moment in best].index(clip.video))
    return np.array(found)


@pytest.mark.slow
def test_search_finds_real_workouts_by_what_is_done_in_them(shared, tmp_path):
    """A minute of fine-tuning; 134 sentences about exercises that no training video shows."""
    data = shared / "workouts"
    tune = ["--data", data, "--dataset", "youcook2", "--features", data / "features"]
    tune += ["--bert", shared / "weights" / "bert_tiny", "--batch", 64, "--steps", 80]
    python("finetune.py", "retrieval", *tune, "--held-out", 0, "--out", "run", cwd=tmp_path)
    clips = read_youcook2(data / "youcook2")["validation"]
    videos = sorted({clip.video for clip in clips})
    found = ranks(tmp_path / "run", FeatureStore(data / "features"), clips, videos, 32)
    first, three = (found <= 1).mean(), (found <= 3).mean()
    print(f"{first:.2f} first of 19, {three:.2f} among the first 3, by chance 0.05 and 0.16")
    assert len(videos) == 19 and len(clips) == 134 and first > 0.12 and three > 0.28


# ---- to Hugging Face and back


@pytest.mark.hf
@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_a_run_goes_to_hugging_face_and_comes_back(small_toy, tmp_path, safe):
    """README's lines: the same ids, every layer the same, and all of BERT there again."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = load_tokenizer(small_toy)
    sizes = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=3, video_dim=7)
    model = VLM(VLMConfig(**special_ids(tokenizer), **sizes)).eval()
    for p in model.parameters():
        p.normal_(0, 0.2)
    save_run(tmp_path / "run", model, tokenizer)

    bert = transformers.BertModel.from_pretrained(tmp_path / "run").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = theirs("slice the onion", add_special_tokens=False).input_ids + [theirs.sep_token_id]
    text = torch.tensor([ids])
    where = dict(position_ids=34 + torch.arange(len(ids))[None])
    where |= dict(token_type_ids=torch.ones_like(text), output_hidden_states=True)
    wanted, valid = encode(["slice the onion"], tokenizer, model.config)
    assert torch.equal(text, wanted) and valid.all()
    layers = []
    for layer in model.bert.encoder["layer"]:
        layer.register_forward_hook(lambda m, i, out: layers.append(out))
    h, found = model.encode_text(wanted, valid), bert(text, **where)
    layers = [x[0] if isinstance(x, tuple) else x for x in layers]
    assert len(layers) == 3
    for ours, out in zip(layers, found.hidden_states[1:], strict=True):
        assert torch.allclose(ours.reshape(out.shape), out, atol=1e-5)
    assert torch.allclose(h, found.last_hidden_state, atol=1e-5)

    other = transformers.BertForMaskedLM.from_pretrained(tmp_path / "run")
    other.save_pretrained(tmp_path / "back")
    if not safe:  # transformers 5 writes no .bin any more; it is torch.save of the same names
        torch.save(other.state_dict(), tmp_path / "back" / "pytorch_model.bin")
        (tmp_path / "back" / "model.safetensors").unlink()
    again = VLM(VLMConfig.from_json(tmp_path / "back" / "config.json", video_dim=7)).eval()
    report = load_bert(again, tmp_path / "back")
    assert not report.unused and all(name.startswith("videomlp.") for name in report.new)
    assert torch.equal(again.encode_text(wanted, valid), h)
    assert torch.equal(again.word_logits(h), model.word_logits(h))


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
    about = {"tokenizer": vocabulary_digest(tokenizer), "ids": ["v"], "words": 0, "removed": 0}
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
