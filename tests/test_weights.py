"""Weights in and out: the authors' checkpoint, any BERT, runs; nothing in a file is run."""

import argparse
import collections
import json
import os
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm
from tests.small import (
    PIECES,
    SEP,
    UNK,
    W,
    random_batch,
    tiny_model,
    tiny_tokenizer,
)
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
        return open, (str(self.mark), "w")


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


# ---- original BERTs


def bert_file(path: Path, prefix="bert.", old_names=False, head=True, decoder=None) -> dict:
    """Write a BERT as one of the programs that write BERTs would; return it under our names."""
    source = tiny_model(seed=1, dtype=torch.float32).state_dict()
    ours = {
        k: v for k, v in source.items() if k.startswith("bert.") or head and k.startswith("cls.")
    }
    file = {k.replace("bert.", prefix, 1): v for k, v in ours.items()}
    if old_names:
        rename = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in rename.items():
            file = {k.replace(new, old): v for k, v in file.items()}
    words = ours["bert.embeddings.word_embeddings.weight"]
    if decoder == "tied":
        file["cls.predictions.decoder.weight"] = words.clone()
    if decoder == "untied":
        file["cls.predictions.decoder.weight"] = words + 1
    if decoder == "bias only":  # newer transformers: the bias under the decoder's name alone
        file["cls.predictions.decoder.bias"] = file.pop("cls.predictions.bias")
    file[f"{prefix}pooler.dense.weight"] = torch.ones(12, 12)
    file[f"{prefix}embeddings.position_ids"] = torch.arange(23)[None]
    write = save_file if path.suffix == ".safetensors" else torch.save
    write(file, path)
    return ours


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.pt"])
@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("decoder", ["no head", None, "tied", "untied", "bias only"])
def test_a_bert_loads_whoever_wrote_its_file(tmp_path, capsys, name, prefix, old_names, decoder):
    """Catches a spelling of names that leaves a tensor at its random start without a word."""
    head = decoder != "no head"
    ours = bert_file(tmp_path / name, prefix, old_names, head, decoder)
    model = tiny_model(seed=2, dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = vlm.load_bert(model, tmp_path if "model" in name else tmp_path / name)
    after = model.state_dict()
    for key in after:
        assert torch.equal(after[key], ours.get(key, before[key])), key
    assert set(report.new) == set(dict(model.named_parameters())) - set(ours)
    unused = {f"{prefix}pooler.dense.weight", f"{prefix}embeddings.position_ids"}
    if decoder == "untied":
        unused |= {"cls.predictions.decoder.weight"}
    assert set(report.unused) == unused
    assert len(report.loaded) == len(ours) + (decoder == "tied")
    assert report.found == len(report.loaded) + len(unused)
    printed = capsys.readouterr().out
    assert f"{len(report.loaded)} of {report.found} tensors loaded" in printed
    assert "newly initialised: " in printed and "videomlp.linear1.weight" in printed
    assert str(report) in printed and "position_ids" in printed.split("in the file, unused: ")[1]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_wrong_or_missing_bert_tensors_are_errors_that_name_them_and_load_nothing(tmp_path, name):
    """Catches a half-loaded encoder, and the wrong config.json beside the weights."""
    ours = bert_file(tmp_path / name)
    model = tiny_model(seed=2, dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    write = save_file if name.endswith("safetensors") else torch.save
    layer = "bert.encoder.layer.1.output.dense.weight"
    for broken, message in (
        (ours | {layer: ours[layer].T.contiguous()}, rf"{layer} is \(20, 12\).* \(12, 20\)"),
        ({k: v for k, v in ours.items() if k != layer}, f"1 encoder tensors are missing.*{layer}"),
        (ours | {"cls.predictions.bias": torch.ones(W + 1)}, r"cls.predictions.bias is \(42,\)"),
        ({"unrelated": torch.ones(3)}, "encoder tensors are missing, first bert.embeddings"),
        (ours | {layer: ours[layer] * torch.nan}, f"{layer} holds NaN or infinity"),
        (ours | {layer[5:]: ours[layer].clone()}, f"{layer} are the same tensor twice"),
    ):
        write(broken, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            vlm.load_bert(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "damage", ["empty", "text", "noise", "cut short", "missing", "a list", "numbered"]
)
def test_a_damaged_weights_file_is_one_error_that_names_the_file(tmp_path, name, damage):
    """Catches tracebacks from inside a reader, which differ by format and version."""
    path = tmp_path / name
    bert_file(path)
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "text": b"<html>404</html>\n" * 9,
        "cut short": whole[: len(whole) // 2],
    }
    noise = torch.randint(0, 256, (999,), generator=torch.Generator().manual_seed(0))
    contents["noise"] = bytes(noise.tolist())
    if damage == "missing":
        path.unlink()
    elif damage in ("a list", "numbered"):  # as .safetensors, a torch file is noise too
        torch.save([torch.ones(2)] if damage == "a list" else {7: torch.ones(2)}, path)
    else:
        path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=str(path)):
        vlm.load_bert(tiny_model(), path)
    if damage == "missing":
        with pytest.raises(
            ValueError, match="holds neither model.safetensors nor pytorch_model.bin"
        ):
            vlm.load_bert(tiny_model(), tmp_path)


@pytest.mark.parametrize("container", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint_best.pt"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, container, name):
    """Catches weights_only=False: opening somebody's weights must never run somebody's code.

    Opened by a reader that trusts it, the file does make its mark: shown first.
    """
    victim, path = tmp_path / "victim", tmp_path / name
    contents = {"bert.embeddings.word_embeddings.weight": Evil(victim, "open")}
    if container == "torch.save":
        torch.save(contents, path)
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps(contents, protocol=2))
        pickle.loads(path.read_bytes())
    assert victim.exists()
    victim.unlink()
    with pytest.raises(ValueError, match="not a plain file of tensors"):
        vlm.load_bert(tiny_model(), path)
    assert not victim.exists()


# ---- run directories


@torch.no_grad()
def test_a_saved_run_opens_as_the_same_model_and_tokenizer(tmp_path):
    """Catches a tensor, a size or the stage lost between save_run and load_run; exact."""
    changes = dict(num_labels=4, stage="fine-tuned", task="segmentation", data="COIN", video_dim=10)
    model = tiny_model(dtype=torch.float32, **changes)
    model.video_mean += 1.0
    tokenizer, batch = tiny_tokenizer(), random_batch()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    for _ in range(2):  # a second save replaces the first
        vlm.save_run(tmp_path / "runs" / "a", model, tokenizer)
    names = {path.name for path in (tmp_path / "runs" / "a").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    again, words = vlm.load_run(tmp_path / "runs" / "a")
    assert again.config == model.config and not again.training
    for ours, theirs in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert torch.equal(again(batch, "captioning"), model(batch, "captioning"))
    video = (batch.video, batch.video_valid)
    assert torch.equal(again.segment(*video), model.segment(*video))
    assert words.encode("Stir the soups").ids == [5, 6, 7, 8]  # neither cut nor padded
    assert SEP not in words.encode("the [SEP] soup").ids  # somebody's caption, not our [SEP]


def test_a_vocabulary_alone_gives_the_same_pieces_as_its_tokenizer_json(tmp_path):
    """Catches a vocab.txt read with case, without its specials, or with [SEP] as a special."""
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    tiny_tokenizer().save(str(tmp_path / "words.json"))
    text = "Stir the soups, the [SEP] pan"
    ids = [
        vlm.load_tokenizer(tmp_path / name).encode(text, add_special_tokens=False).ids
        for name in ("", "vocab.txt", "words.json")
    ]
    assert ids == [[5, 6, 7, 8, UNK, 6, UNK, UNK, UNK, 9]] * 3
    for bad in ("", "stir\nsoup\n"):
        (tmp_path / "vocab.txt").write_text(bad)
        with pytest.raises(ValueError, match="vocab.txt: not a BERT tokenizer"):
            vlm.load_tokenizer(tmp_path)


def test_a_run_with_other_tensors_than_its_config_is_an_error_that_names_one(tmp_path):
    """Catches strict=False: a classifier or an encoder silently left at its random start."""
    vlm.save_run(tmp_path, tiny_model(dtype=torch.float32, num_labels=4), tiny_tokenizer())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, sizes = load_file(weights), json.loads(config.read_text())
    for tensors, changes, message in (
        ({k: v for k, v in good.items() if k != "video_mean"}, {}, "1 tensors .* first video_mean"),
        (good | {"extra": torch.ones(1)}, {}, "1 tensors .* first extra"),
        (good, {"num_labels": 0}, "2 tensors .* first classifier.bias"),
        (good, {"num_labels": 7}, "2 tensors .* first classifier.weight"),
        (good, {"num_hidden_layers": 1}, "16 tensors .* first bert.encoder.layer.1"),
    ):
        save_file(tensors, weights)
        config.write_text(json.dumps(sizes | changes))
        with pytest.raises(ValueError, match=message):
            vlm.load_run(tmp_path)
    config.write_text(json.dumps(sizes))
    save_file({k: x for k, x in good.items() if not k.startswith("videomlp.")}, weights)
    with pytest.raises(ValueError, match="holds a BERT, not a run: train.py and finetune.py have"):
        vlm.load_run(tmp_path)
    save_file(good, weights)
    with pytest.raises(ValueError, match="device abacus: "):
        vlm.load_run(tmp_path, "abacus")


def test_a_run_with_a_missing_or_damaged_file_is_an_error_that_names_it(tmp_path):
    """Catches tracebacks from a JSON, Rust or torch reader on a folder that is no run."""
    with pytest.raises(ValueError, match="no run here .config.json is missing"):
        vlm.load_run(tmp_path)
    vlm.save_run(tmp_path, tiny_model(dtype=torch.float32), tiny_tokenizer())
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        file = tmp_path / name
        good = file.read_bytes()
        for bad in (b"", good[: len(good) // 2], b"\xff\xfe garbage"):
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=str(file)):
                vlm.load_run(tmp_path)
        file.unlink()
        with pytest.raises(ValueError, match=name):
            vlm.load_run(tmp_path)
        file.write_bytes(good)
    vlm.load_run(tmp_path)
