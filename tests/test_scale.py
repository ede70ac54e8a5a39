"""Many videos, many shards, two nodes: what is held in memory, and who needs which files."""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import scale
from data import Captions
from tests.runs import REPO, free_address

# ---- what is in memory


@pytest.mark.parametrize("shards", [0, 3])
def test_opening_a_corpus_holds_no_features_and_no_captions(tmp_path, shards):
    """20 videos are 16 MB of features and 90 kB of captions; an index of them is a few kB.

    Catches a store that reads what it should map, and a draw that reads a video whole.
    """
    scale.write_corpus(tmp_path / "corpus", videos=20, shards=shards, E=1024)
    scale.open_root(tmp_path / "corpus").step(0, 2)  # whatever is made once is made
    tracemalloc.start()
    corpus = scale.open_root(tmp_path / "corpus")
    opened = tracemalloc.get_traced_memory()[1]
    corpus.clips([(0, 0, 0)])
    drawn = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 50_000, f"{opened} bytes to open"
    assert drawn < opened + 600_000, f"{drawn} bytes for a clip"  # 32 seconds, a few times over
    assert all(isinstance(getattr(corpus.captions, n).base, np.memmap) for n in Captions.ARRAYS)


@pytest.mark.parametrize("shards", [1, 7])
def test_shards_and_files_give_the_same_clips(tmp_path, shards):
    """Where a video lies changes nothing."""
    scale.write_corpus(tmp_path / "a", videos=9, shards=0, E=8)
    scale.write_corpus(tmp_path / "b", videos=9, shards=shards, E=8)
    a, b = (scale.open_root(tmp_path / x).step(3, 64) for x in "ab")
    assert all(torch.equal(x, y) for x, y in zip(a.fields()[:7], b.fields()[:7], strict=True))


# ---- the measurement


def test_the_synthetic_corpus_has_howto100ms_proportions(tmp_path):
    """110 captions and 390 seconds a video, at 2.4 word pieces a second (sec. 5.1.1)."""
    scale.write_corpus(tmp_path / "corpus", videos=3, shards=2, E=4)
    corpus = scale.open_root(tmp_path / "corpus")
    cap = corpus.captions
    assert np.diff(cap.first_caption).tolist() == [110, 110, 110]
    assert len(corpus.features.open(corpus.ids[2])) == 390 == cap.end.max()
    assert abs(len(cap.tokens) / 3 / 390 - 2.4) < 0.1
    assert (cap.start < cap.end).all() and (np.diff(cap.first_token) >= 4).all()


def test_a_clips_cost_is_measured_over_videos_and_shards(tmp_path):
    """A short form; times are not tested."""
    rows = scale.flat(tmp_path, argparse.Namespace(videos=300, repeat=1))
    assert [r["name"] for r in rows] == ["videos", "shards"]
    assert all(r["ratio"] > 0 and r["unit"] == "clips/s" for r in rows)


def test_a_fresh_process_reports_its_memory(tmp_path):
    """Seconds, the peak, and what is still held: in that order, and never more than the peak."""
    scale.write_corpus(tmp_path / "corpus", videos=5, shards=2, E=4)
    seconds, peak, held = scale.first_batch(tmp_path / "corpus")
    assert seconds > 0 and 50 < held <= peak < 2000


def test_too_few_videos_to_measure_growth_are_an_error():
    with pytest.raises(ValueError, match="--videos is 99, wanted at least 100"):
        bench.main(["scale", "--videos", "99"])


@pytest.mark.slow
def test_scale_is_measured(monkeypatch, tmp_path, capsys):
    """All rows of `python bench.py scale` in a short form, its child processes included."""
    monkeypatch.setattr(bench, "start_ranks", lambda: None)
    monkeypatch.setattr(scale, "TRAINED", "--width 32 --layers 1 --batch 8")
    path = tmp_path / "rows.json"
    args = ["scale", "--videos", "400", "--repeat", "1", "--json", str(path)]
    assert bench.main(args) == 0
    rows = json.loads(path.read_text())
    names = [
        "videos",
        "shards",
        *2 * ["start shards", "start .npy"],
        *2 * ["state"],
        "ranks",
        "two runs",
    ]
    assert sorted(r["name"] for r in rows) == sorted(names)
    # 400 videos hold less than the noise of a process's memory: bytes a video may come out below 0
    assert all(r["ratio"] > 0 for r in rows if r["name"] != "state")


# ---- two nodes


def agents(folders: list[Path], *flags: str) -> list[str]:
    """Run train.py under a torchrun agent in each folder, as nodes that meet at one address."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(folders)}"]
    torchrun += ["--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=7"]
    torchrun += [f"--rdzv-endpoint={free_address()}", "--local-addr=127.0.0.1"]
    command = [*torchrun, str(REPO / "train.py"), *flags]
    nodes = [
        subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for cwd in folders
    ]
    try:
        return [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()


SHORT = "--width 32 --layers 1 --batch 8 --steps 6 --log-every 1".split()


@pytest.mark.slow
def test_two_nodes_that_share_no_files_train_the_model_of_one_process(toy, tmp_path):
    """Two torchrun agents meet over c10d on loopback; one finds the toy world, one writes its own.

    Six steps of Adam in fp32: sums in another order, so 1e-4 of the largest weight, where a rank
    that trained on other clips, or on its own gradients, is off by a learning rate (1e-3) a step.
    """
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    shutil.copytree(toy, nodes[0] / "toy")
    said = agents(nodes, *SHORT)
    assert sum("2 processes" in text for text in said) == 1, said
    runs = [node / "runs" / "toy" for node in nodes if (node / "runs").exists()]
    assert len(runs) == 1, "one node writes the run"
    alone = [sys.executable, str(REPO / "train.py"), "--data", str(toy), "--out", "one", *SHORT]
    subprocess.run(alone, cwd=tmp_path, check=True, capture_output=True)
    one, two = (
        torch.load(run / "trainer.pt", weights_only=True)["model"]
        for run in (tmp_path / "one", runs[0])
    )
    for name, x in one.items():
        assert (x - two[name]).abs().max() < 1e-4 * max(1, x.abs().max()), name
    a, b = ([json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()]
            for run in (tmp_path / "one", runs[0]))  # fmt: skip
    assert len(a) == len(b) == 7
    for x, y in zip(a, b, strict=True):
        assert math.isclose(x["loss"], y["loss"], rel_tol=1e-4), (x, y)


@pytest.mark.slow
def test_a_node_without_the_data_says_so_and_neither_hangs(small_toy, tmp_path):
    """The corpus lies on one node alone: a line that names the folder, and both agents end."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    shutil.copytree(small_toy, nodes[0] / "corpus")
    said = "".join(agents(nodes, "--data", "corpus", *SHORT))
    # which of the two becomes rank 0 is the rendezvous' choice
    assert re.search(r"error: (on rank 1: )?corpus: no such folder", said)
    assert not list(tmp_path.glob("*/runs/*/trainer.pt"))
