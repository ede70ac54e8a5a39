"""The authors' checkpoint in, through doors that run nothing; sizes from its tensors."""

import argparse
import collections
import os
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import vlm
from vlm import VLM, Batch, VLMConfig, load_mmpt, load_run, read_tensors
from weights import mmpt_config, read_mmpt

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
SIZES |= dict(max_position_embeddings=110, video_dim=6)


def make(**changes) -> VLM:
    """A small random model, none of whose tensors is 0 or 1 throughout."""
    torch.manual_seed(0)
    model = VLM(VLMConfig(**dict(vocab_size=110) | SIZES | changes)).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    return model


def released(model: VLM, prefix: str = "mmmodel.mm_encoder.", bias: bool = False) -> dict:
    """Name a model's tensors as the release does, with what it has besides."""
    skip = ("video_mean", "text_mean", *([] if bias else ["cls.predictions.bias"]))
    state = {prefix + k: x for k, x in model.state_dict().items() if k not in skip}
    words = model.bert.embeddings["word_embeddings"].weight.detach()
    D = words.shape[1]
    state[f"{prefix}cls.predictions.decoder.weight"] = words
    state[f"{prefix}bert.embeddings.seg_embeddings.weight"] = torch.randn(7, D)
    state[f"{prefix}bert.embeddings.position_ids"] = torch.arange(110)[None]
    state[f"{prefix}bert.pooler.dense.weight"] = torch.randn(D, D)
    state[f"{prefix}bert.pooler.dense.bias"] = torch.randn(D)
    return state


@pytest.fixture
def fairseq(tmp_path, monkeypatch):
    """A function that writes a checkpoint as fairseq does: with objects of a package that is gone
    when it is read, a Namespace, an enum, nested containers."""
    package = types.ModuleType("fairseq_gone")

    class DictConfig(dict):
        def __reduce__(self):
            return (DictConfig, (), {"_content": dict(self)}, None, iter(self.items()))

    for cls in (DictConfig,):
        cls.__module__, cls.__qualname__ = "fairseq_gone", cls.__name__
        setattr(package, cls.__name__, cls)

    def write(state: dict, **torch_save) -> Path:
        path = tmp_path / "checkpoint_best.pt"
        extra = {"args": argparse.Namespace(lr=[5e-5], arch="mm"), "task_state": {}}
        extra |= {"cfg": DictConfig(model=argparse.Namespace(x=1), common=DictConfig(seed=1))}
        extra |= {"criterion": None, "optimizer_history": [{"num_updates": 3}]}
        extra |= {"extra_state": {"train_iterator": {"epoch": 15}, "path": Path("a/b")}}
        extra |= {
            "last_optimizer_state": collections.defaultdict(list, {"exp_avg": [torch.ones(2)]})
        }
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "fairseq_gone", package)
            torch.save({"model": state, **extra}, path, **torch_save)
        return path

    return write


def outputs(model: VLM) -> list[torch.Tensor]:
    """What a model makes of two clips."""
    g = torch.Generator().manual_seed(1)
    video, text = torch.randn(2, 5, 6, generator=g), torch.randint(5, 100, (2, 7), generator=g)
    valid = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    with torch.no_grad():
        h = model(Batch(video, valid[0], text, valid[1]))
        return [h, model.word_logits(h[:, 8:]), model.embed_video(video, valid[0])]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["mmmodel.mm_encoder.", "mm_encoder.", ""])
def test_a_fairseq_checkpoint_gives_the_outputs_of_the_model_it_came_from(fairseq, prefix, legacy):
    """Old and new containers, with and without prefixes; every tensor accounted for by name."""
    model = make()
    path = fairseq(released(model, prefix), _use_new_zipfile_serialization=not legacy)
    with pytest.raises(Exception, match="(?i)weights.only"):
        torch.load(path, weights_only=True)  # why this door exists
    lines, other = [], VLM(VLMConfig(**mmpt_config(path, heads=3)))
    report = load_mmpt(other, path, lines.append)
    other.eval()
    other.cls["predictions"].bias.data.copy_(model.cls["predictions"].bias)  # not in the release
    for a, b in zip(outputs(model), outputs(other), strict=True):
        assert torch.equal(a, b)
    names = "bert.embeddings.seg_embeddings.weight", "bert.embeddings.position_ids"
    assert set(report.unused) >= {prefix + n for n in names} and len(report.unused) == 4
    assert report.new == ["cls.predictions.bias"]
    assert f"{report.found - 4} of {report.found} tensors loaded" in lines[0]
    assert "seg_embeddings" in lines[0] and "cls.predictions.decoder.weight" in str(report.loaded)


def test_half_precision_and_bare_containers_are_read(fairseq, tmp_path):
    """fp16 tensors become fp32; {"state_dict": ..} and a bare dict are as good."""
    model = make().half().float()
    half = {k: x.half() if x.is_floating_point() else x for k, x in released(model).items()}
    for name, data in (("a", {"state_dict": half}), ("b", half), ("c", {"model": half})):
        torch.save(data, tmp_path / name)
        other = VLM(VLMConfig(**mmpt_config(tmp_path / name, heads=3)))
        load_mmpt(other, tmp_path / name, lambda line: None)
        words = other.bert.embeddings["word_embeddings"].weight
        assert words.dtype == torch.float32
        assert torch.equal(words, model.bert.embeddings["word_embeddings"].weight)


@pytest.mark.parametrize(
    "change, stage, task",
    [
        (lambda m, s: s, "pre-trained", "vlm"),
        (lambda m, s: {k: x for k, x in s.items() if "cls." not in k}, "fine-tuned", "retrieval"),
        (lambda m, s: s | {"cls.predictions.decoder.bias": m.cls["predictions"].bias.detach()},
         "fine-tuned", "captioning"),
        (lambda m, s: s | {"classifier.weight": m.bert.embeddings["position_embeddings"].weight[:9],
                           "classifier.bias": torch.ones(9)}, "fine-tuned", "segmentation"),
    ],
)  # fmt: skip
def test_the_stage_is_told_by_the_tensors(fairseq, change, stage, task):
    """Fine-tuned releases differ in what heads they hold; all of it is loaded."""
    model = make()
    path = fairseq(change(model, released(model, "")))
    config = VLMConfig(**mmpt_config(path))
    assert (config.stage, config.task.split(",")[0]) == (stage, task)
    assert config.num_attention_heads == 1 and config.num_labels == (9 if "seg" in task else 0)
    other = VLM(VLMConfig(**mmpt_config(path, heads=3)))
    load_mmpt(other, path, lambda line: None)
    if task == "captioning":
        bias = model.cls["predictions"].bias
        assert torch.equal(other.cls["predictions"].bias, bias)
    if task == "segmentation":
        assert torch.equal(other.classifier.bias, torch.ones(9))


def test_convert_writes_a_run_directory(fairseq, small_toy, tmp_path, capsys):
    """`python vlm.py convert CHECKPOINT --bert VOCABULARY --out RUN`, then load_run as any run."""
    tokenizer = vlm.load_tokenizer(small_toy)
    model = make(vocab_size=tokenizer.get_vocab_size())
    path = fairseq(released(model))
    args = ["convert", str(path), "--bert", str(small_toy), "--heads", "3", "--out"]
    vlm.main([*args, str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "tensors loaded" in said and "pre-trained (vlm), 2 layers of width 24" in said
    loaded, _ = load_run(tmp_path / "run")
    assert torch.equal(outputs(loaded)[0], outputs(model)[0])
    assert loaded.config.data == "the authors' release"
    with pytest.raises(ValueError, match="--out .* is not empty"):
        vlm.main([*args, str(tmp_path / "run")])
    vlm.main(["convert", str(path), "--heads", "3", "--out", str(tmp_path / "bare")])
    assert "copy the vocabulary it was trained with, vocab.txt, into" in capsys.readouterr().out
    with pytest.raises(ValueError, match="bare: wanted tokenizer.json or vocab.txt, found neither"):
        load_run(tmp_path / "bare")
    shutil.copy(small_toy / "tokenizer.json", tmp_path / "bare")
    assert torch.equal(outputs(load_run(tmp_path / "bare")[0])[0], outputs(model)[0])
    other = fairseq(released(make()))
    with pytest.raises(ValueError, match="word pieces, the checkpoint 110: they are not a pair"):
        vlm.main(["convert", str(other), *args[2:], str(tmp_path / "more")])
    torch.save({"model": released(make()), "config": {}, "facts": {}}, tmp_path / "trainer.pt")
    with pytest.raises(ValueError, match="trainer.pt: a checkpoint of this code: its folder is a"):
        vlm.main(["convert", str(tmp_path / "trainer.pt"), *args[2:], str(tmp_path / "more")])


BROKEN = {
    "1 encoder tensors are missing, first bert.encoder.layer.1.output.dense.weight": lambda s: (
        s.pop("bert.encoder.layer.1.output.dense.weight")
    ),
    r"query.weight is \(3, 3\), this model wants \(24, 24\)": lambda s: s.update(
        {"bert.encoder.layer.0.attention.self.query.weight": torch.ones(3, 3)}
    ),
    "linear2.bias holds NaN": lambda s: s["videomlp.linear2.bias"].fill_(torch.nan),
    "videomlp.linear1.weight is missing: not a checkpoint of VLM": lambda s: s.pop(
        "videomlp.linear1.weight"
    ),
    "epoch is no tensor; wanted tensors by name": lambda s: s.update({"epoch": 15}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_wrong_checkpoint_is_an_error_that_names_the_tensor(fairseq, message):
    state = {k: x.clone() for k, x in released(make(), "").items()}
    BROKEN[message](state)
    path = fairseq(state)
    with pytest.raises(ValueError, match=message):
        load_mmpt(VLM(VLMConfig(**mmpt_config(path, heads=3))), path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 no zip", pickle.dumps([1, 2])])
def test_what_is_no_checkpoint_is_an_error(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="x.pt: (not a PyTorch checkpoint|wanted a dict)"):
        read_mmpt(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no such file"):
        read_mmpt(tmp_path / "y.pt")


# ---- nothing in a file is run


class Evil:
    """A pickle that makes a file when it is opened by anything that trusts it."""

    def __init__(self, mark: Path, how: str):
        self.mark, self.how = mark, how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.mark}",)
        if self.how == "exec":
            return exec, (f"open({str(self.mark)!r}, 'w')",)
        return getattr, (Path(self.mark), "touch")


@pytest.mark.parametrize("how", ["system", "exec"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_creates_nothing(fairseq, tmp_path, how, legacy):
    """Through every door for PyTorch files: the release's, BERT's, a run's trainer.pt.

    Opened by a reader that trusts it, each of these files does make the mark: shown first.
    """
    from keep import read_checkpoint

    mark = tmp_path / "mark"
    state = released(make(), "")
    path = fairseq(state | {"x": Evil(mark, how)}, _use_new_zipfile_serialization=not legacy)
    sys.modules["fairseq_gone"] = types.ModuleType("fairseq_gone")
    sys.modules["fairseq_gone"].DictConfig = collections.OrderedDict
    try:
        torch.load(path, weights_only=False)
    finally:
        del sys.modules["fairseq_gone"]
    assert mark.exists()
    mark.unlink()
    with pytest.raises(ValueError, match="x is no tensor"):
        read_mmpt(path)
    for reader in (read_tensors, read_checkpoint):
        with pytest.raises(ValueError):
            reader(path)
    assert not mark.exists()
    outside = tmp_path / "outside.pt"  # beside the tensors it is not looked at, and not run
    torch.save({"model": state, "cfg": Evil(mark, how)}, outside,
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    assert len(read_mmpt(outside)) == len(state)
    assert not mark.exists()


def test_a_torchscript_program_is_refused(tmp_path):
    """torch.load would hand such a file to its own interpreter."""

    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.save(torch.jit.script(Program()), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        read_mmpt(tmp_path / "x.pt")
    with pytest.raises(ValueError):
        read_tensors(tmp_path / "x.pt")
