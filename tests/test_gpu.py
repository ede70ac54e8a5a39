"""What a GPU computes against the CPU, and training on one: `pytest -m gpu`.

NCCL gives a GPU to one process only, so one process stands for several here: a group of one that
goes every way that a group of eight does.
"""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist

import finetune
import loop
import train
from data import Corpus, open_captions, open_corpus, open_features, special_ids
from finetune import TuneConfig
from keep import read_log
from pictures import attention
from ranks import Ranks
from tests.runs import losses
from tests.test_loss import compare_compiled_nce
from train import TrainConfig
from vlm import KINDS, VLM, Batch, VLMConfig, load_run, load_tokenizer

NONE = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU, or not run by -m gpu alone"
)
pytestmark = [pytest.mark.gpu, NONE]

TRAINED = dict(width=64, layers=2, batch=16, steps=30, log_every=10)


@pytest.fixture(scope="module")
def corpus(small_toy) -> Corpus:
    """Open the toy world's narration."""
    tokenizer = load_tokenizer(small_toy)
    c = VLMConfig(video_dim=open_features(small_toy).width, **special_ids(tokenizer))
    return open_corpus(
        small_toy, open_features(small_toy), open_captions(small_toy, tokenizer), "train", c
    )[0]


@pytest.fixture(scope="module")
def pair(corpus) -> tuple[VLM, VLM, Batch]:
    """Make one model twice, on the CPU and on the GPU, and a batch with hidden tokens."""
    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
    c = dataclasses.replace(corpus.c, max_position_embeddings=96, initializer_range=0.1, **shape)
    here, there = VLM(c).eval(), VLM(c).eval()
    there.load_state_dict(here.state_dict())
    return here, there.cuda(), corpus.step(0, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_cpu_s_hidden_states_under_every_mask(pair, kind):
    """In fp32, which `--precision fp32` and evaluation use."""
    here, there, batch = pair
    with torch.no_grad():
        a, b = here(batch, kind), there(batch.to("cuda"), kind).cpu()
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_attention_heads_are_drawn_as_on_a_cpu(pair):
    """Where the layers themselves need no mask, the picture has one all the same."""
    here, there, batch = pair
    a, b = attention(here, batch), attention(there, batch.to("cuda"))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["vlm", "mfm-mlm"])
@pytest.mark.parametrize("at_once", [None, 4096])
def test_a_gpu_gives_the_cpu_s_losses_and_gradients(pair, loss, at_once):
    """Whole and chunk by chunk."""
    here, there, batch = pair
    found = []
    for model, b in ((here, batch), (there, batch.to("cuda"))):
        model.zero_grad()
        value = model.pretrain_loss(b, loss, at_once=at_once).value()
        value.backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        found.append((value.item(), grads))
    (a, grads_a), (b, grads_b) = found
    assert b == pytest.approx(a, rel=1e-5) and grads_a.keys() == grads_b.keys()
    for name, x in grads_a.items():
        assert torch.allclose(x, grads_b[name], rtol=1e-3, atol=1e-5 + 1e-4 * float(x.abs().max()))


def test_a_gpu_writes_the_cpu_s_captions(pair):
    """Beam search with kept keys and values, clips of mixed lengths."""
    here, there, batch = pair
    video, valid = batch.video[:6], batch.video_valid[:6]
    a = here.generate(video, valid, 5, 12)
    assert a == there.generate(video.cuda(), valid.cuda(), 5, 12) and any(a)


def test_a_gpu_reads_long_videos_in_windows(pair):
    """A video of 70 seconds beside one of 20: window averages are the CPU's."""
    here, there, batch = pair
    video = torch.randn(2, 70, batch.video.shape[2])
    valid = torch.arange(70) < torch.tensor([[70], [20]])
    with torch.no_grad():
        a = here.encode_video(video, valid)
        b = there.encode_video(video.cuda(), valid.cuda()).cpu()
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_compiled_nce_has_the_gradients_of_the_plain_one():
    """On a GPU another compiler writes it than on a CPU."""
    compare_compiled_nce("cuda")


def test_half_precision_and_compiled_layers_train_as_fp32_does(small_toy, tmp_path):
    """bf16, fp16 and compiled layers against fp32, over thirty steps on the same clips."""
    found = {}
    for name, settings in {
        "fp32": dict(precision="fp32"),
        "bf16": dict(precision="bf16"),
        "fp16": dict(precision="fp16"),
        "compiled": dict(precision="fp32", compile=torch.__version__ >= (2, 5)),
        "workers": dict(precision="fp32", workers=2),
    }.items():
        out = tmp_path / name
        train.main(TrainConfig(data=str(small_toy), out=str(out), **TRAINED, **settings))
        found[name] = losses(out)
        assert read_log(out / "log.jsonl")[-1]["skipped"] == 0
    assert found["bf16"] == pytest.approx(found["fp32"], rel=1e-2)
    assert found["fp16"] == pytest.approx(found["fp32"], rel=3e-3)
    assert found["compiled"] == pytest.approx(found["fp32"], rel=1e-3)
    assert found["workers"] == pytest.approx(found["fp32"], rel=1e-3)
    assert found["fp32"][-1] < found["fp32"][0] - 0.5


def test_a_run_on_a_gpu_goes_on_where_it_stopped_and_opens_on_a_cpu(small_toy, tmp_path):
    """Ten steps, then twenty more, are thirty; the scaler of fp16 goes on too."""
    settings = dict(data=str(small_toy), precision="fp16", dropout=0.1)
    train.main(TrainConfig(out=str(tmp_path / "whole"), **TRAINED, **settings))
    cut = TRAINED | dict(steps=10, decay_steps=30, warmup=3)
    train.main(TrainConfig(out=str(tmp_path / "cut"), **cut, **settings))
    again = dict(out=str(tmp_path / "cut"), resume=True, steps=30)
    train.main(TrainConfig(**again), {*again})
    a, b = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert b == pytest.approx(a, rel=2e-3)
    model, _ = load_run(tmp_path / "cut")
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("task", ["retrieval", "captioning", "segmentation"])
def test_tasks_are_fine_tuned_and_tested_on_a_gpu(small_toy, tmp_path, task):
    """Two epochs of each kind of loss, with the test at the end."""
    train.main(TrainConfig(data=str(small_toy), out=str(tmp_path / "run"), **TRAINED))
    settings = dict(task=task, data=str(small_toy), init=str(tmp_path / "run"), epochs=2)
    summary = finetune.main(TuneConfig(out=str(tmp_path / "tuned"), **settings), {*settings})
    assert summary["final"] and all(v is not None for v in summary["model"].values())


class Several(int):
    """One that says it is more than one."""

    def __gt__(self, other):
        return True

    def __eq__(self, other):
        return False

    __hash__ = int.__hash__


def test_nccl_carries_all_that_ranks_tell_each_other(small_toy, tmp_path, monkeypatch):
    """DDP, the joined V', counts, errors and settings: a step by NCCL equals one without it."""
    settings = dict(data=str(small_toy), precision="fp32", accumulate=2)
    train.main(TrainConfig(out=str(tmp_path / "alone"), **TRAINED, **settings))
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541", "RANK": "0", "WORLD_SIZE": "1"}
    monkeypatch.setattr(os, "environ", os.environ | here)
    device, met = torch.device("cuda", 0), []

    def ranks() -> Ranks:
        dist.init_process_group("nccl", device_id=device)
        return Ranks(0, Several(1), device)

    wrapped = loop.DistributedDataParallel
    monkeypatch.setattr(
        loop, "DistributedDataParallel", lambda *a, **k: met.append(1) or wrapped(*a, **k)
    )
    monkeypatch.setattr(train, "start_ranks", ranks)
    train.main(TrainConfig(out=str(tmp_path / "nccl"), **TRAINED, **settings))
    assert met and not dist.is_initialized()
    assert losses(tmp_path / "nccl") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)
