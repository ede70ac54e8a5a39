"""Pre-training: ranks, accumulation, precision, resuming, signals, bad numbers, bad input."""

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import loop
import train
from benchmarks import DataError
from keep import read_checkpoint
from loop import adam, learning_rate, parse, update
from ranks import Ranks
from tests.runs import (
    RESUME,
    TINY,
    command,
    config,
    flags,
    on_two_ranks,
    poison,
    rows,
    start,
    until,
    weights,
)
from tests.two_ranks import gradients
from train import TrainConfig, main
from vlm import load_run, save_run


def same_numbers(a: list[dict], b: list[dict]) -> bool:
    """Compare two logs without what the clock says."""
    keys = ("step", "loss", "video", "text", "chance", "lr", "grad", "R@1", "R@10")
    return [[r.get(k) for k in keys] for r in a] == [[r.get(k) for k in keys] for r in b]


# ---- who computes what changes nothing


@pytest.mark.parametrize("loss", ["vlm", pytest.param("mfm-mlm", marks=pytest.mark.slow)])
def test_two_processes_have_the_gradients_of_one(small_toy, tmp_path, loss):
    """Catches a V' that is not gathered, a gather without gradients, a mean of means.

    The gradient is that of the whole batch in one process, where nothing is gathered; in float64,
    so that 1e-12 leaves room for the order of sums alone.
    """
    on_two_ranks(str(small_toy), loss, str(tmp_path / "two.pt"))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    one, total = gradients(str(small_toy), loss, Ranks())
    assert two["grads"].keys() == one.keys()
    for name, grad in one.items():
        assert (grad - two["grads"][name]).abs().max() < 1e-12 * max(1, grad.abs().max()), name
    assert abs(two["loss"] - total) < 1e-9


def test_accumulated_micro_batches_are_their_own_losses_under_one_count(small_toy, tmp_path):
    """The gradient that the optimizer meets is that of all sums over all hidden (Eq. 8's mean).

    The log's row too: a mean of the micro-batches' means, or a kind in the other's place, fails.
    """
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(params, limit):
        seen.append([p.grad.clone() for p in params])
        return clip(params, limit)

    cfg = config(small_toy, tmp_path / "run", steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.nn.utils, "clip_grad_norm_", spy)
        main(dataclasses.replace(cfg, accumulate=4))
    cfg = train.settle(dataclasses.replace(cfg, out=None), set())
    model, _, data = train.build(cfg, print)
    model.cls["predictions"].bias.requires_grad_(False)
    parts = [data.train.step(0, 8, i, 4) for i in range(4)]
    sums = [model.pretrain_loss(part) for part in parts]
    hidden = sum(int(s.video_count + s.text_count) for s in sums)
    (sum(s.video_sum + s.text_sum for s in sums) / hidden).backward()
    params = [p for p in model.parameters() if p.requires_grad]
    for p, grad in zip(params, seen[0], strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-4, atol=1e-6)
    found = rows(tmp_path / "run")[0]
    video, text = (sum(getattr(s, f"{k}_sum").item() for s in sums) for k in ("video", "text"))
    n_video, n_text = (sum(int(getattr(s, f"{k}_count")) for s in sums) for k in ("video", "text"))
    assert found["video"] == pytest.approx(video / n_video, rel=1e-5)
    assert found["text"] == pytest.approx(text / n_text, rel=1e-5)
    assert found["loss"] == pytest.approx((video + text) / hidden, rel=1e-5)
    chance = n_video * sums[-1].video_chance + n_text * sums[-1].text_chance
    assert found["chance"] == pytest.approx(chance / hidden, rel=1e-9)


@pytest.mark.slow
def test_two_ranks_and_accumulation_train_like_one(small_toy, tmp_path):
    """Whole runs: the printed losses of 1 and 2 ranks agree to rounding over six steps."""
    runs = {}
    for name, ranks, more in (("one", 0, {}), ("two", 2, {})):
        args = flags(data=small_toy, out=tmp_path / name, **TINY, **more)
        subprocess.run(command(*args, ranks=ranks), check=True, capture_output=True, cwd=tmp_path)
        runs[name] = rows(tmp_path / name)
    for a, b in zip(runs["one"], runs["two"], strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4), (a, b)


# ---- stop and go on


@pytest.mark.parametrize("more", [{}, {"precision": "fp16"}, {"dropout": 0.1, "accumulate": 2}])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    small_toy, tmp_path, monkeypatch, more
):
    """Catches anything that a checkpoint forgets: optimizer, scaler, data position, dropout, lr."""
    cfg = config(small_toy, tmp_path / "whole", **more)
    main(cfg)

    class Killed(Exception):
        pass

    step = train.Corpus.step

    def die(self, n, *args):
        if n == 4:
            raise Killed
        return step(self, n, *args)

    cfg = dataclasses.replace(cfg, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Corpus, "step", die)
        main(cfg)
    assert torch.load(tmp_path / "cut" / "trainer.pt", weights_only=True)["step"] == 3
    main(TrainConfig(out=str(tmp_path / "cut"), resume=True), RESUME)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert same_numbers(rows(tmp_path / "whole"), rows(tmp_path / "cut"))


def test_sigterm_saves_and_the_printed_command_goes_on(small_toy, tmp_path):
    """SIGTERM in the middle of a step: exit code 0, a checkpoint, a line that resumes the run."""
    long = TINY | {"steps": 100000, "save_every": 50000}
    process = start(*flags(data=small_toy, out=tmp_path / "run", **long))
    until(process, "step ")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    said = re.search(r"stopped at step (\d+); to go on: torchrun train.py (.*)", out)
    step, args = int(said[1]), said[2].split()
    assert torch.load(tmp_path / "run" / "trainer.pt", weights_only=True)["step"] == step
    more = command(*args, "--steps", str(step + 2))
    done = subprocess.run(more, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"resuming with --steps {step + 2}, it was 100000" in done.stdout
    assert rows(tmp_path / "run")[-1]["steps"] == step + 2


# ---- numbers


def test_the_optimizer_is_the_papers_adam():
    """Sec. 5.2: betas 0.9, 0.98, the gradient's norm cut to 2; by Adam's formula in float64."""
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = adam([p], {p}, 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    theta, m, v = p.detach().clone(), torch.zeros(2), torch.zeros(2)
    for t, grad in enumerate(([3.0, -4.0], [0.3, 0.4], [0.0, 1.0]), 1):
        p.grad = torch.tensor(grad, dtype=torch.float64)
        norm = float(p.grad.norm())
        g = p.grad * min(1.0, 2.0 / norm)
        assert update(optimizer, scaler, [p], 2.0) == pytest.approx(norm)
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        theta -= 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.98**t)).sqrt() + 1e-8)
        assert torch.allclose(p.detach(), theta, rtol=0, atol=1e-6)


def test_learning_rate_warms_up_and_decays_to_zero():
    """Worked by hand: 4 steps of warm-up to 8, then a straight line to 0 at step 12."""
    cfg = TrainConfig(lr=8.0, warmup=4, steps=12)
    rates = [learning_rate(s, cfg) for s in range(13)]
    assert rates == [2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    cfg.decay_steps = 20
    assert learning_rate(12, cfg) == 4 and learning_rate(30, cfg) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_wide_model_trains_in_every_precision(small_toy, tmp_path, precision):
    """Without dropout PyTorch has two kernels for attention: backward computes by forward's."""
    main(config(small_toy, tmp_path / "run", width=512, steps=2, dropout=0.0, precision=precision))
    assert all(x.isfinite().all() for x in weights(tmp_path / "run").values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(small_toy, tmp_path, precision):
    """The loss of 40 steps falls by a nat in fp32, bf16 and fp16 with its scaler, on a CPU too."""
    settings = dict(steps=40, lr=3e-3, warmup=4, precision=precision)
    main(config(small_toy, tmp_path / "run", **settings))
    loss = [r["loss"] for r in rows(tmp_path / "run")[:-1]]
    assert np.mean(loss[-3:]) < np.mean(loss[:3]) - 1


@pytest.mark.parametrize("times, hint", [(7.0, "7 times faster"), (0.6, "bf16, as asked")])
def test_a_processor_that_only_imitates_bf16_is_told_of(monkeypatch, times, hint):
    """Without its instructions a step takes minutes; the first line of a run says why."""
    monkeypatch.setattr(loop, "half_costs", lambda dtype: times)
    dtype, why = loop.choose_precision("bf16", torch.device("cpu"))
    assert dtype == torch.bfloat16 and why.startswith("bf16, as asked") and hint in why
    assert ("leave out --precision" in why) == (times > 2)


def test_a_step_that_is_not_finite_is_skipped_and_counted(small_toy, tmp_path, monkeypatch):
    """Catches weights spoilt by one bad batch; the log says how many steps were skipped."""
    poison(monkeypatch, {2, 4})
    main(config(small_toy, tmp_path / "run", log_every=6))
    assert all(x.isfinite().all() for x in weights(tmp_path / "run").values())
    row = rows(tmp_path / "run")[0]
    assert row["skipped"] == 2 and math.isfinite(row["loss"])


def test_a_skipped_step_is_a_row_that_other_readers_of_json_can_read(
    small_toy, tmp_path, monkeypatch, capsys
):
    """Catches a bare NaN or Infinity, which Python writes and jq, JavaScript and others refuse."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    poison(monkeypatch, {1, 5})
    main(config(small_toy, tmp_path / "run"))
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    log = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["grad"] is None for row in log[:-1]] == [n in (1, 5) for n in range(6)]
    assert [row["loss"] is None for row in log[:-1]] == [n in (1, 5) for n in range(6)]
    said = capsys.readouterr().out
    assert (
        len(re.findall(r"step [26]/6 \| no step was finite \| lr .* \| step skipped \|", said)) == 2
    )


def test_ten_bad_steps_in_a_row_stop_the_run_and_name_the_last_checkpoint(
    small_toy, tmp_path, monkeypatch
):
    """Nine bad steps pass, a tenth does not; the checkpoint that is named is a good one."""
    poison(monkeypatch, set(range(4, 13)))
    main(config(small_toy, tmp_path / "a", steps=14))
    poison(monkeypatch, set(range(4, 14)))
    with pytest.raises(ValueError, match=r"ten steps in a row.*step 14.*b/trainer.pt, step 12"):
        main(config(small_toy, tmp_path / "b", steps=14))
    assert all(x.isfinite().all() for x in weights(tmp_path / "b").values())


# ---- the run


def test_a_run_leaves_a_model_a_log_and_a_summary(small_toy, tmp_path, capsys):
    """Catches a summary without its keys, a model that does not open, means that were not kept."""
    summary = main(config(small_toy, tmp_path / "run", json=str(tmp_path / "s.json")))
    out = capsys.readouterr().out
    log = rows(tmp_path / "run")
    assert (
        log[-1] == json.loads((tmp_path / "s.json").read_text()) == json.loads(json.dumps(summary))
    )
    wanted = {"final", "steps", "loss", "chance", "R@1", "R@10", "R@10_chance", "seconds"}
    assert wanted <= log[-1].keys() and log[-1]["final"] is True
    assert [r["step"] for r in log[:-1]] == [1, 2, 3, 4, 5, 6]
    made = TrainConfig(**log[-1]["settings"])  # with what was left open filled in
    assert (made.width, made.steps, made.seed, made.out) == (32, 6, 0, str(tmp_path / "run"))
    assert made.lr == 1e-3 and made.warmup == 0 and made.dropout == 0
    assert dataclasses.asdict(made) == read_checkpoint(tmp_path / "run" / "trainer.pt")["config"]
    assert log[-1]["versions"] == {"torch": torch.__version__, "python": sys.version.split()[0]}
    for name in ("dot product", "centred cosine", "chance", "constant"):
        assert name in out
    model, tokenizer = load_run(tmp_path / "run")
    assert (model.config.stage, model.config.task, model.config.data) == (
        "pre-trained",
        "vlm",
        "toy",
    )
    assert (
        model.video_mean.abs().sum() > 0 and tokenizer.get_vocab_size() == model.config.vocab_size
    )
    again = main(config(small_toy, tmp_path / "next", init=str(tmp_path / "run")))
    assert again["steps"] == 6


def test_held_out_numbers_are_numbers_where_a_batch_shows_no_video(small_toy):
    """Catches the mean of no second at all, NaN, which also spoils the summary as JSON."""
    cfg = train.settle(TrainConfig(data=str(small_toy), width=32, layers=1, batch=1), set())
    model, _, data = train.build(cfg, print)
    table = train.validate(model, data.val, "vlm", 1, 1.0, Ranks())
    assert all(math.isfinite(x) for row in table.values() for x in row.values()), table


@pytest.mark.parametrize(
    "more", [{"mmm": 0.0}, {"loss": "mfm-mlm"}, {"min_text": 16}, {"workers": 2}]
)
def test_every_ablation_of_table_8_runs(small_toy, tmp_path, more):
    """Catches a setting that is parsed but not used: each but `workers` changes the first loss."""
    losses = []
    for name, settings in (("a", {}), ("b", more)):
        main(config(small_toy, tmp_path / name, **{"steps": 1} | settings))
        losses.append(rows(tmp_path / name)[0]["loss"])
    assert (losses[0] == losses[1]) == ("workers" in more)


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_trains_in_the_half_precision_that_it_has(monkeypatch, capability, dtype):
    """PyTorch calls bf16 supported where it is only imitated, and has no attention kernel there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert loop.choose_precision("auto", torch.device("cuda"))[0] == dtype


@pytest.mark.slow
def test_compiled_layers_train_like_plain_ones(small_toy, tmp_path):
    """`--compile` changes speed only: losses agree to rounding."""
    for name, compiled in (("plain", False), ("compiled", True)):
        main(config(small_toy, tmp_path / name, compile=compiled))
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "compiled"), strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-3)


@pytest.mark.slow
def test_real_narration_and_a_real_bert_train_on_two_ranks(shared, tmp_path):
    """The README's command for one's own data, in short: real data and weights, two gloo ranks."""
    args = flags(
        data=shared / "workouts", bert=shared / "weights" / "bert_tiny", steps=20, batch=32
    )
    done = subprocess.run(command(*args, ranks=2), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16017 of 135027 words" in done.stdout and "newly initialised: videomlp" in done.stdout
    log = rows(tmp_path / "runs" / "workouts")
    assert log[0]["loss"] - 1 > log[-2]["loss"]


# ---- bad input


BAD = {
    "--data nowhere": "error: nowhere: no such folder",
    "--data {toy}/train.lst": "error: .*train.lst: a file, wanted the folder that it is in",
    "--data . --steps 0": "error: --steps is 0, wanted more than 0",
    "--mmm 1.5": "error: --mmm is 1.5, wanted 0..1",
    "--min-text 65": r"error: --min-text is 65, wanted 1..64",
    "--batch 9 --accumulate 2 --data {toy}": "error: --batch 9 is not divisible by 1 ranks x",
    "--data {toy} --bert {toy}": r"error: .*config.json: no such file",
    "--data {toy} --init {toy}": "error: .*no run here",
    "--data {toy} --features {toy}": r"error: .*no <video_id>.npy and no .* did you mean",
    "--resume": "error: --resume: no run with a trainer.pt",
    "--resume --out {toy}": "error: .*trainer.pt: no checkpoint to resume from",
    "--data {toy} --out {toy}": "error: --out .* is not empty",
    "--bert a --init b": "error: --bert and --init both",
    "--scratch": "error: --scratch wants the sizes and vocabulary of --bert",
    "--data {toy} --bert nowhere": "error: nowhere: .* no such file or folder",
    "--init {toy} --layers 2": "error: --layers: --init .* has its own: leave the flag out",
    "--width 33": "error: --width is 33, wanted a multiple of 32",
}


@pytest.mark.parametrize("args", BAD)
def test_bad_commands_say_what_would_do_in_one_line(small_toy, tmp_path, monkeypatch, capsys, args):
    """Value seen, value wanted; exit code 2; no traceback; nothing left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *args.format(toy=small_toy).split()])
    with pytest.raises(SystemExit) as stopped:
        train.run(train.cli)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert re.match(BAD[args], err), err
    assert not list(tmp_path.glob("runs/*"))


def test_an_old_pytorch_does_not_compile(monkeypatch):
    """2.4 does it anew for each length; what does not compile runs on it."""
    for version, old in (("2.4.1+cu121", True), ("2.5.0", False), ("2.13.0+cpu", False)):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        with pytest.raises(ValueError, match="2.4.1.* go without") if old else nullcontext():
            TrainConfig(compile=True)
        TrainConfig(compile=False)


def test_a_wrong_bert_is_named(small_toy, tmp_path, monkeypatch, capsys):
    """A config that does not fit the weights beside it, found before any step."""
    main(config(small_toy, tmp_path / "bert", steps=1))
    sizes = json.loads((tmp_path / "bert" / "config.json").read_text())
    sizes["intermediate_size"] += 1
    (tmp_path / "bert" / "config.json").write_text(json.dumps(sizes))
    cfg = TrainConfig(data=str(small_toy), bert=str(tmp_path / "bert"), **TINY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"intermediate.dense.bias is \(128,\).*wants \(129,\)"):
        main(cfg)


def test_bad_features_stop_a_run_with_their_name_from_a_worker_too(small_toy, tmp_path):
    """Catches an error that loses its line when a loader process raises it."""
    shutil.copytree(small_toy, tmp_path / "world")
    for path in (tmp_path / "world" / "features").glob("how_train*"):
        np.save(path, np.full((200, 64), np.nan, np.float16))
    line = r"how_train_\d+: features hold NaN or infinity"
    with pytest.raises(DataError, match=line):
        main(config(tmp_path / "world", tmp_path / "here"))
    args = flags(data=tmp_path / "world", out=tmp_path / "run", workers=1, **TINY)
    done = subprocess.run(command(*args), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match(f"error: .*: {line}", done.stderr)


def test_missing_features_and_bad_rows_are_counted_in_the_first_lines(small_toy, tmp_path, capsys):
    """Nothing is left out silently."""
    shutil.copytree(small_toy, tmp_path / "world")
    (tmp_path / "world" / "features" / "how_train_0004.npy").unlink()
    captions = json.loads((tmp_path / "world" / "raw_caption.json").read_text())
    captions["how_train_0001"]["text"][0] = ""
    (tmp_path / "world" / "raw_caption.json").write_text(json.dumps(captions))
    main(config(tmp_path / "world", tmp_path / "run", skip_bad=True))
    out = capsys.readouterr().out
    assert "train: 1 of 30 videos have no features, first how_train_0004" in out
    assert "1 bad rows left out, first:" in out and "how_train_0001, caption 0" in out


def test_the_command_line_is_the_dataclass():
    """Types, defaults, --no-x; an abbreviation or an unknown flag is an error."""
    cfg, given = parse(TrainConfig, ["--lr", "1", "--no-compile", "--min-text", "16"])
    assert (cfg.lr, cfg.compile, cfg.min_text, cfg.mmm) == (1.0, False, 16, 0.5)
    assert given == {"lr", "compile", "min_text"} and isinstance(cfg.lr, float)
    for wrong in (["--step", "5"], ["--loss", "l2"], ["--frobnicate"], ["--batch", "many"]):
        with pytest.raises(SystemExit):
            parse(TrainConfig, wrong)


def test_a_bert_has_the_special_tokens_of_its_own_vocabulary(small_toy, tmp_path):
    """Catches BERT-base's 101, 102 and 103 taken for [CLS], [SEP] and [MASK] of any vocabulary."""
    bert = tmp_path / "bert"
    bert.mkdir()
    words = [*(f"[unused{i}]" for i in range(7)), "[MASK]", "[SEP]", "[PAD]", "[UNK]", "[CLS]"]
    (bert / "vocab.txt").write_text("\n".join([*words, *"abcdefghij"]))
    sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40)
    sizes |= dict(vocab_size=40, max_position_embeddings=96, pad_token_id=0)
    (bert / "config.json").write_text(json.dumps(sizes))
    cfg = TrainConfig(data=str(small_toy), bert=str(bert), scratch=True)
    model, tokenizer = train.make_model(cfg, 64, print)
    c = model.config
    found = c.mask_token_id, c.sep_token_id, c.pad_token_id, c.unk_token_id, c.cls_token_id
    assert found == (7, 8, 9, 10, 11) and c.vocab_size == 40
    c.sep_token_id = 3
    save_run(tmp_path / "run", model, tokenizer)
    with pytest.raises(DataError, match="tokenizer's sep_token_id is 8, the model's 3: they ar"):
        train.make_model(TrainConfig(data=str(small_toy), init=str(tmp_path / "run")), 64, print)
