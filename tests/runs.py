"""Small runs of train.py and finetune.py, for all tests that start, disturb or compare some."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import torch

import loop
from finetune import TuneConfig
from train import TrainConfig

REPO = Path(__file__).resolve().parents[1]
TINY = dict(width=32, layers=1, batch=8, steps=6, save_every=3, log_every=1)
RESUME = {"out", "resume"}  # the flags of whoever goes on and changes nothing


def config(data: Path, out: Path, **settings) -> TrainConfig:
    """A run of a few seconds."""
    return TrainConfig(data=str(data), out=str(out), **TINY | settings)


def tuning(data: Path, out: Path, init: Path, task: str = "qa", **settings) -> TuneConfig:
    """The same for fine-tuning."""
    few = dict(epochs=2, batch=8, held_out=0.2, init=str(init), log_every=1) | settings
    return TuneConfig(data=str(data), out=str(out), task=task, **few)


def flags(**settings) -> list[str]:
    """Write settings as flags."""
    return [x for k, v in settings.items() for x in ("--" + k.replace("_", "-"), str(v))]


def free_address() -> str:
    """Name a port of this machine that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def torchrun(ranks: int, *args: str) -> list[str]:
    """Build the command line of several ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={ranks}", *args]


def command(*args: str, ranks: int = 0, script: Path = REPO / "train.py") -> list[str]:
    """Build the command line of a script, under torchrun when ranks are given."""
    made = [str(script), *args]
    return torchrun(ranks, *made) if ranks else [sys.executable, *made]


def start(*args: str, **how) -> subprocess.Popen:
    """Start train.py in a process group of its own, with pipes."""
    pipe = subprocess.PIPE
    made = command(*args, **how)
    return subprocess.Popen(made, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def until(process: subprocess.Popen, beginning: str) -> None:
    """Read lines until one begins so."""
    assert any(line.startswith(beginning) for line in process.stdout), process.communicate()


def on_two_ranks(*args: str) -> None:
    """Run tests/two_ranks.py to its end: DATA, what to do, the file that it writes."""
    made = torchrun(2, "-m", "tests.two_ranks", *args)
    done = subprocess.run(made, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rows(run: Path) -> list[dict]:
    """Read a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Read the losses of a run's steps."""
    return [row["loss"] for row in rows(run) if "step" in row and "loss" in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Read a run's trained tensors."""
    return torch.load(run / "trainer.pt", weights_only=True)["model"]


def poison(monkeypatch, bad: set[int]) -> None:
    """Make the video of some steps infinite, past the store's own check."""
    get = loop.Steps.__getitem__

    def spoil(self, i):
        batch = get(self, i)
        if self.start + i // self.accumulate in bad:
            batch.video = batch.video * math.inf
        return batch

    monkeypatch.setattr(loop.Steps, "__getitem__", spoil)
