"""Search: windows of one's own videos ranked by a sentence, against a loop."""

import json

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import FeatureStore, open_features
from search import best_of_each, search, spaces
from vlm import load_run


@pytest.fixture(scope="module")
def a_run(small_toy, tmp_path_factory):
    """A tiny pre-trained run."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    sizes = dict(width=32, layers=1, batch=8, steps=4)
    train.main(train.TrainConfig(data=str(small_toy), out=str(out), **sizes))
    return out


@pytest.mark.parametrize("stage", ["pre-trained", "fine-tuned"])
def test_windows_are_ranked_as_a_loop_ranks_them(small_toy, a_run, stage):
    """Each window alone: its embedding, its cosine or dot product with the sentence's."""
    model, tokenizer = load_run(a_run)
    model.config.stage = stage
    features = open_features(small_toy)
    videos = ["how_train_0000", "video7001", "how_val_0001"]
    found = search(model, tokenizer, features, "chop the onion", videos, stride=12)
    ids = [*tokenizer.encode("chop the onion", add_special_tokens=False).ids, 3]
    with torch.no_grad():
        text = model.embed_text(torch.tensor([ids]), torch.ones(1, len(ids)).bool())[0]
    slow = {}
    for video in videos:
        n, start = len(features.open(video)), 0
        while True:
            rows = features.rows(video, np.arange(start, min(n, start + 32)))
            x = torch.from_numpy(rows)[None]
            with torch.no_grad():
                v = model.embed_video(x, torch.ones(x.shape[:2], dtype=torch.bool))[0]
            if stage == "pre-trained":
                a, b = text - model.text_mean, v - model.video_mean
                score = (a @ b) / (a.norm() * b.norm())
            else:
                score = text @ v
            slow[video, start, start + len(rows)] = float(score)
            if start + 32 >= n:
                break
            start += 12
    assert {(m.video, m.start, m.end) for m in found} == set(slow)
    assert (model.video_mean.any() and model.text_mean.any()).item()
    for m in found:
        assert m.score == pytest.approx(slow[m.video, m.start, m.end], abs=1e-4)
    assert [m.score for m in found] == sorted((m.score for m in found), reverse=True)
    best = best_of_each(found)
    assert sorted(m.video for m in best) == sorted(videos)
    for m in best:
        assert m.score == max(x.score for x in found if x.video == m.video)


def test_a_run_without_means_is_not_called_centred(small_toy, a_run):
    """A converted checkpoint has none: its plain cosine would stand under that name."""
    model, _ = load_run(a_run)
    pair = torch.randn(2, 3, 32)
    assert list(spaces(model, *pair)) == ["dot product", "centred cosine"]
    model.text_mean.zero_()
    assert list(spaces(model, *pair)) == ["dot product"]


def test_the_command_prints_times_and_writes_json(small_toy, a_run, tmp_path, capsys):
    """Ten rows of videos; the windows of one video with --within."""
    args = ["search", "--run", str(a_run), "--features", str(small_toy / "features")]
    args += ["--json", str(tmp_path / "s.json"), "slice the lemon"]
    assert evaluation.main(args) == 0
    out, n = capsys.readouterr().out, len(FeatureStore(small_toy / "features"))
    assert out.startswith(f"{n} videos, by their best window") and out.count("\n") == 11
    rows = json.loads((tmp_path / "s.json").read_text())
    assert len(rows) == n and set(rows[0]) == {"video", "start", "end", "score", "when"}
    assert evaluation.main([*args, "--within", "how_val_0001"]) == 0
    assert "windows of how_val_0001" in capsys.readouterr().out


def test_bad_searches_say_what_would_do(small_toy, a_run, tmp_path):
    args = ["search", "--run", str(a_run), "--features", str(small_toy / "features")]
    for more, message in (
        ([" "], "the query is empty"),
        (["x", "--within", "nobody"], "video 'nobody' has no features"),
        (["x", "--stride", "33"], r"stride is 33, wanted 1\.\.32"),
        (["x", "--top", "0"], "--top is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.main([*args, *more])
    np.save(tmp_path / "a.npy", np.zeros((4, 5), np.float32))
    with pytest.raises(ValueError, match="features are 5 wide, the run .* reads 64"):
        evaluation.main(["search", "--run", str(a_run), "--features", str(tmp_path), "x"])
