"""Every command of README and docs/small-corpus.md is run as it is written, made short.

Each stands in a folder of its own, with all that README names there: `toy` and `runs/toy`, DATA and
BERT and the other capitals. What makes it short follows it, for a flag given again replaces the
first one; eight processes become two, eight nodes one. One process is run in this one, for a
second's start is most of what it takes.
"""

import json
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import loop
import vlm
from s3d import S3D
from tests.runs import REPO, free_address
from tests.test_docs import TEXTS
from tests.test_s3d_videos import flat, write_video
from tests.test_weights import released

ELSEWHERE = {  # what is run as it is written, or made short, by others
    r"pip install -r requirements.txt && .*": ".ci/run, the first step and the last",
    r"torchrun finetune.py [a-z]+": ".ci/run",
    r"pytest -m (hf|coco|slow)": ".ci/run",
    r"pip install .*": ".ci/run, by requirements-dev.txt",
    r"(python|torchrun) X\.py": "any of them",
    r"pytest -m gpu": "nobody without a GPU",
    r'pytest -m "" -k NAME': "pytest's own",
    r"VLM_FUZZ=2000 pytest tests/test_fuzz.py": "the tests of each file, with 30",
    r"python tests/kill.py --kills 30": "test_safety.py, with 4",
    r"python bench.py step": "test_bench.py, as all that bench.py measures",
}


def written() -> list[str]:
    """List the commands: lines of their own, and what stands between back-ticks.

    One between back-ticks that another goes on with, such as `python train.py`, is a name only.
    TASK is each task that needs no fine-tuning.
    """
    words = r"(?:python|torchrun|pip|pytest|VLM_FUZZ=\d+)"
    lines, inline = [], []
    for text in TEXTS.values():
        text = re.sub(r"^```python\n.*?^```$", "", text, flags=re.M | re.S)
        lines += re.findall(rf"^(?:    )?({words} .*)$", text, re.M)
        prose = re.sub(r"^(    |```).*$", "", text, flags=re.M).replace("\n", " ")
        inline += re.findall(rf"`({words} [^`]+|for [^`]+; done)`", prose)
    lines = [re.split("  +# ", line)[0].strip() for line in lines]
    for command in inline:
        name = re.sub(r" (TASK|VIDEO\.\.)$", "", command)
        if not any(other.startswith(f"{name} ") for other in [*lines, *inline]):
            lines.append(command)
    tasks = ("retrieval", "qa", "localization")
    return list(dict.fromkeys(line.replace("TASK", task) for line in lines for task in tasks))


COMMANDS = written()
RUN = [c for c in COMMANDS if not any(re.fullmatch(p, c) for p in ELSEWHERE)]
SHORT = {  # the first that fits
    r"train.py --help": "",
    r"train.py --resume": "--steps 6",  # its run has ended after four
    r"train.py|python -c": "--steps 2 --batch 8 --log-every 1",
    r"finetune.py captioning": "--epochs 1 --init runs/toy --limit 8",
    r"finetune.py": "--steps 2 --batch 4 --limit 8 --log-every 1",
    r"bench.py ablation": "--rows mmm0 --seeds 1 --steps 4 --limit 8 8 --tune '--steps 2'",
    r"": "",
}


def make_short(command: str) -> str:
    """Put small settings behind a command; two ranks are as many as eight here, on one node."""
    fits = next(few for part, few in SHORT.items() if re.search(part, command))
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=2")
    command = command.replace("--nnodes=8", "--nnodes=1").replace("HOST0:29500", free_address())
    if "--nnodes" not in command:  # two tests at a time: a port each
        command = command.replace("torchrun ", "torchrun --standalone ")
    command = command.replace("VIDEO_OR_FOLDER..", "video.mkv")
    return f"{command} {fits}".strip()


@pytest.fixture
def folder(small_toy, a_run, tmp_path, monkeypatch) -> Path:
    """What README's capitals stand for, small; and the files of the project, to be called there."""
    there = tmp_path / "clone"
    (there / "runs").mkdir(parents=True)
    for file in REPO.glob("*.py"):
        (there / file.name).symlink_to(file)
    for name in ("toy", "DATA", "HOWTO100M"):
        shutil.copytree(small_toy, there / name)
    for name in ("runs/toy", "runs/toy-retrieval", "RUN", "OUT/mmm0-0/pre-training"):
        shutil.copytree(a_run, there / name)
    monkeypatch.chdir(there)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two only wait, where another test is busy
    return there


def fill(there: Path, command: str, a_run: Path) -> None:
    """Put into a reader's folder the one file or two that a command reads besides."""
    if "HOST0" in command:
        shutil.rmtree(there / "RUN")  # a new one
    for name in ("BERT", "MINILM", "bert-base-uncased"):
        if name in command:
            shutil.copytree(a_run, there / name)
    if "checkpoint_best.pt" in command:
        torch.save({"model": released(vlm.load_run(a_run)[0])}, there / "checkpoint_best.pt")
    if "--data PACKED" in command:
        assert not data.main(["pack", "DATA", "--out", "PACKED", "--bert", str(a_run)])
    if "FEATURES.pickle" in command:
        arrays = {p.stem: np.load(p) for p in (there / "DATA" / "features").glob("*.npy")}
        (there / "FEATURES.pickle").write_bytes(pickle.dumps(arrays))
    if "R.json" in command:
        (there / "R.json").write_text(json.dumps({"a": ["slice the onion", "cut the onion"]}))
        (there / "H.json").write_text(json.dumps({"a": "slice an onion"}))
    if "--plot" in command:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    if "s3d.py" in command:
        pytest.importorskip("av", reason="PyAV is not installed: pip install av")
        write_video(there / "video.mkv", map(flat, range(30)))
    if "s3d_howto100m.pth" in command:
        torch.save(S3D().state_dict(), there / "s3d_howto100m.pth")
    if command.startswith("for"):
        (there / "a.mp4.npy").touch()


def run(command: str, monkeypatch) -> int:
    """Run a command of one process in this one, others as they are; its exit code."""
    words = shlex.split(command)
    if words[0] == "for":
        words = ["bash", "-euc", command]
    elif words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    elif words[1].startswith("-"):
        words[0] = sys.executable
    else:
        monkeypatch.setattr(sys, "argv", words[1:])
        monkeypatch.setattr(loop, "ignore_signals", lambda: None)  # this process goes on
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0
    return subprocess.run(words, timeout=300).returncode


def test_all_commands_are_found():
    """Catches texts whose form changes, so that none is found any more, and claims of others."""
    assert len(RUN) > 35, RUN
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, c) for c in COMMANDS), pattern


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_every_command_that_is_written_down_runs(command, folder, a_run, monkeypatch, capfd):
    fill(folder, command, a_run)
    assert run(make_short(command), monkeypatch) == 0
    if command.startswith("python -c"):
        assert "centred cosine" in capfd.readouterr().out
    for promised in re.findall(r"--(?:out|plot) (\S+)", command):
        assert (folder / promised).exists()
    if command.startswith("for"):
        assert (folder / "a.npy").exists()
