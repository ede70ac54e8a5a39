"""Fine-tuning: the five losses against loops, epochs, the best one, ranks, resuming, bad input."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval
import finetune
import tasks
import train
from benchmarks import DataError
from data import open_features
from eval import Options, evaluate
from finetune import LOSS, TuneConfig, collate, contrast, count, draw_items, main, quality
from ranks import Ranks
from tasks import DATASETS, open_task
from tests.runs import REPO, RESUME, command, flags, on_two_ranks, rows, tuning, weights
from tests.two_ranks import gradients
from train import TrainConfig
from vlm import load_run, read_tensors, save_run

# ---- the losses


def test_contrast_equals_a_loop_over_the_batch():
    """-log softmax of each row's own score among all keys, in float64 by hand."""
    q, k = (torch.randn(5, 7, dtype=torch.double) for _ in range(2))
    slow = 0.0
    for i in range(5):
        scores = [float(q[i] @ k[j]) for j in range(5)]
        slow -= scores[i] - math.log(sum(map(math.exp, scores)))
    found = contrast(q, k, lambda x: x)
    assert float(found.value()) == pytest.approx(slow / 5, rel=1e-5)
    assert found.chance() == pytest.approx(math.log(5)) and int(found.text_count) == 5


def by_loop(model, batch, name: str) -> tuple[float, int]:
    """Each task's loss as its section says, one pair, second or word at a time: (sum, count)."""
    B = len(batch.video)
    states = [model.encode_video(batch.video[i : i + 1, : int(v.sum())],
                                 v[None, : int(v.sum())])[0]
              for i, v in enumerate(batch.video_valid)]  # fmt: skip
    texts = [model.encode_text(t[None, : int(v.sum())], v[None, : int(v.sum())])[0].mean(0)
             for t, v in zip(batch.text, batch.text_valid, strict=True)]  # fmt: skip
    videos, total, n = [h.mean(0) for h in states], 0.0, 0
    if name in ("retrieval", "qa"):
        for i in range(B):
            ask, among = (texts[i], videos) if name == "retrieval" else (videos[i], texts)
            scores = torch.stack([ask @ x for x in among])
            total, n = total - scores.log_softmax(0)[i], n + 1
    for i in range(B if batch.label is not None else 0):
        for v in range(int(batch.video_valid[i].sum())):
            if name == "segmentation":
                logits = model.classifier(states[i][v])
                total, n = total - logits.log_softmax(0)[batch.label[i, v]], n + 1
                continue
            for s, shown in enumerate(batch.label[i, v].tolist()):
                if shown >= 0:
                    p = torch.sigmoid(states[i][v] @ texts[s])
                    total, n = total - torch.log(p if shown else 1 - p), n + 1
    return total, n


@pytest.mark.parametrize("name", ["retrieval", "qa", "segmentation", "localization"])
def test_losses_equal_slow_loops(small_toy, whole, name):
    """Value, count and gradients in float64; catches a pool that counts padding, labels that slip
    by a second, steps of another video's task, a query that is taken for a key."""
    task = open_task(name, small_toy, open_features(small_toy))
    cfg = train.settle(tuning(small_toy, "x", whole, name), set(), {"dropout": 0.0}, {})
    model, tokenizer = finetune.start_model(cfg, task, print)
    model = model.double().train()
    items = [group[0] for group in task.train[:: max(1, len(task.train) // 7)]][:7]
    batch = collate(task, items, tokenizer, model.config)
    batch.video = batch.video.double()
    found = LOSS[name](model, batch, lambda x: x)
    slow, n = by_loop(model, batch, name)
    assert (int(found.video_count), int(found.text_count)) == count(batch, name)
    assert n == sum(count(batch, name))
    assert found.value().item() == pytest.approx(slow.item() / n, rel=1e-10)
    params = [p for p in model.parameters() if p.requires_grad]
    a = torch.autograd.grad(found.value(), params, retain_graph=True, allow_unused=True)
    b = torch.autograd.grad(slow / n, params, allow_unused=True)
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.allclose(x, y, rtol=1e-8, atol=1e-10)


def test_steps_of_another_videos_task_are_not_asked(small_toy, whole):
    """Two tasks in a batch: every window has labels for its own task's steps alone."""
    task = open_task("localization", small_toy, open_features(small_toy))
    model, tokenizer = load_run(whole)
    by_task = {group[0].clip.key: group[0] for group in task.train}
    items = list(by_task.values())
    batch = collate(task, items, tokenizer, model.config)
    S = [len(item.texts) for item in items]
    assert len(batch.text) == sum(S) and len(items) == 2
    for i, item in enumerate(items):
        n, own = len(item.truth), slice(sum(S[:i]), sum(S[: i + 1]))
        assert (batch.label[i, :n, own].numpy() == item.truth).all()
        assert (batch.label[i, n:] == -1).all()
        assert (batch.label[i] >= 0).sum() == item.truth.size


# ---- epochs


@pytest.mark.parametrize("n, batch", [(10, 4), (7, 7), (5, 60), (12, 4)])
@pytest.mark.parametrize("parts", [1, 2])
def test_an_epoch_draws_every_group_once_whoever_computes(n, batch, parts):
    """No group is left out or comes twice, and two parts are the halves of the one."""
    groups = [[(k, i) for i in range(3)] for k in range(n)]
    steps = math.ceil(n / batch)
    seen = []
    for step in range(steps):
        drawn = draw_items(groups, step, batch, parts, seed=0)
        whole = draw_items(groups, step, batch, 1, seed=0)[0]
        assert len(drawn) == parts and sum(drawn, []) == whole and len(whole) <= batch
        seen += [k for k, _ in whole]
    assert sorted(seen) == list(range(n))
    other = [x for s in range(steps) for x in draw_items(groups, steps + s, batch, 1, seed=0)[0]]
    assert sorted(k for k, _ in other) == list(range(n))  # the second epoch: other order, choices
    assert other != [x for s in range(steps) for x in draw_items(groups, s, batch, 1, seed=0)[0]]
    assert {i for _, i in other} <= {0, 1, 2}


def test_no_rank_or_micro_batch_is_left_without_an_item():
    """Catches a batch as large as its parts are many, and items that it does not divide."""
    for parts in (1, 2, 3, 8):
        for batch in (parts, 2 * parts, 5 * parts):
            for n in range(parts, 50):
                groups, steps = [[i] for i in range(n)], finetune.epoch_steps(n, batch, parts)
                drawn = [draw_items(groups, s, batch, parts, seed=0) for s in range(steps)]
                assert all(len(step) == parts and all(step) for step in drawn)
                assert sorted(x for step in drawn for part in step for x in part) == [*range(n)]
                assert parts == batch or all(len(sum(step, [])) <= batch for step in drawn)


def test_joined_captions_are_a_clips_own_in_the_files_order(small_toy):
    """No other clip's sentence, none twice, never more than there are; held-out texts alike."""
    features = open_features(small_toy)
    plain, task = (open_task("retrieval", small_toy, features, "msrvtt", held_out=0.2, join=n)
                   for n in (1, 2))  # fmt: skip
    own = {g[0].clip.video: [item.clip.text for item in g] for g in task.train}
    assert max(map(len, own.values())) > 2
    for join in (2, 99):
        (drawn,) = draw_items(task.train, 0, len(task.train), 1, 0, join)
        for item in drawn:
            said = own[item.clip.video]
            pairs = [f"{a} {b}" for a, b in zip(said, said[1:] + said[:1], strict=True)]
            pairs[-1] = " ".join([said[0], said[-1]]) if len(said) > 1 else said[0]
            assert item.clip.text in (pairs if join == 2 else [" ".join(said)])
    assert len({item.clip.text for item in drawn}) == len(own)
    for one, both in zip(plain.val, task.val, strict=True):
        assert one.clip.text == one.texts[0] and both.clip.text == " ".join(both.texts[:2])
    assert [x.clip for x in plain.test] == [x.clip for x in task.test]


@pytest.mark.parametrize("task", list(DATASETS))
def test_every_task_runs_from_end_to_end(small_toy, whole, tmp_path, capsys, task):
    """A run directory that opens, a best epoch that is the log's best, the table of eval.py."""
    cfg = tuning(small_toy, tmp_path / "run", whole, task, json=str(tmp_path / "s.json"))
    summary = main(cfg)
    said, log = capsys.readouterr().out, rows(tmp_path / "run")
    assert (
        log[-1] == json.loads((tmp_path / "s.json").read_text()) == json.loads(json.dumps(summary))
    )
    checked = {row["step"]: row["validation"] for row in log if "validation" in row}
    assert len(checked) == 2 and checked[summary["best_step"]] == summary["held_out"]
    assert summary["held_out"] == max(checked.values())
    assert "chance" in said and f"fine-tuned for {task}" in said
    model, tokenizer = load_run(tmp_path / "run")
    assert (model.config.stage, model.config.task) == ("fine-tuned", task)
    again = open_task(task, small_toy, open_features(small_toy), labels=model.config.labels)
    report = evaluate(model, tokenizer, again, Options())
    assert report.to_json()["model"] == summary["model"]
    start, tuned = read_tensors(whole / "model.safetensors"), model.state_dict()
    moved = {k for k in start if not torch.equal(start[k], tuned[k])}
    assert "videomlp.linear1.weight" in moved
    assert ("cls.predictions.bias" in moved) == (task == "captioning")
    assert ("classifier.weight" in tuned) == (task == "segmentation")


def test_the_best_epoch_is_kept_not_the_last(small_toy, whole, tmp_path, monkeypatch):
    """Validation says 0.2, 0.9, 0.9, 0.1: the weights left behind are those after three epochs."""
    values, saved = iter([0.2, 0.9, 0.9, 0.1]), []
    monkeypatch.setattr(finetune, "quality", lambda *a: ("accuracy", next(values)))
    cfg = tuning(small_toy, tmp_path / "run", whole, "qa", epochs=4)
    save = finetune.save_run

    def spy(out, model, tokenizer):
        saved.append({k: x.clone() for k, x in model.state_dict().items()})
        save(out, model, tokenizer)

    monkeypatch.setattr(finetune, "save_run", spy)
    summary = main(cfg)
    steps = [r["step"] for r in rows(tmp_path / "run") if "validation" in r]
    assert len(saved) == 4 and summary["best_step"] == steps[2]  # the first: before any step
    left = read_tensors(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(left[k], saved[3][k]) for k in left)
    last = weights(tmp_path / "run")
    assert any(not torch.equal(left[k], last[k]) for k in left)


def test_an_epoch_is_tried_as_the_test_will_be_but_by_greedy_search(
    small_toy, whole, tmp_path, monkeypatch
):
    """Catches a best epoch that is chosen by another stride or tokenizer than it is tested by."""
    asked, plain = [], finetune.ANSWER["segmentation"]
    spy = lambda *args: asked.append(args[-1]) or plain(*args)  # noqa: E731
    monkeypatch.setitem(finetune.ANSWER, "segmentation", spy)
    settings = dict(epochs=1, stride=8, tokenizer="ptb")
    main(tuning(small_toy, tmp_path / "run", whole, "segmentation", **settings))
    found = [(options.stride, options.tokenizer, options.beams) for options in asked]
    assert found == [(8, "ptb", 1), (8, "ptb", 5)]


def test_without_held_out_videos_the_last_weights_are_kept(small_toy, whole, tmp_path):
    summary = main(tuning(small_toy, tmp_path / "run", whole, "qa", held_out=0.0))
    left = read_tensors(tmp_path / "run" / "model.safetensors")
    last = weights(tmp_path / "run")
    assert all(torch.equal(left[k], last[k]) for k in left) and summary["held_out"] is None


def test_many_short_epochs_are_not_each_validated(small_toy, whole, tmp_path, monkeypatch):
    """A dozen items are an epoch a step: hundreds of validations, and a checkpoint after each."""
    monkeypatch.setattr(finetune, "MOST", 3)
    many = dict(limit=8, epochs=7, batch=8)
    main(tuning(small_toy, tmp_path / "run", whole, "qa", **many))
    assert [r["step"] for r in rows(tmp_path / "run") if "validation" in r] == [3, 6, 7]


def test_epochs_are_compared_by_the_tasks_metric():
    assert quality("retrieval", {"R@1": 0.1, "R@5": 0.2, "R@10": 0.6, "median rank": 9})[1] == (
        pytest.approx(0.3)
    )
    assert quality("captioning", {"BLEU-4": 0.5, "CIDEr": 2})[1] == 0.5
    assert quality("localization", {"recall": 0.25}) == ("recall", 0.25)


# ---- ranks, and going on


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "captioning", "localization"])
def test_two_processes_have_the_gradients_of_one(small_toy, whole, tmp_path, task):
    """Catches negatives that stay on their rank, a gather without gradients, a mean of means."""
    where = f"{small_toy}:{whole}"
    on_two_ranks(where, task, str(tmp_path / "two.pt"))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    one, total = gradients(where, task, Ranks())
    assert two["grads"].keys() == one.keys()
    for name, grad in one.items():
        assert (grad - two["grads"][name]).abs().max() < 1e-10 * max(1, grad.abs().max()), name
    assert two["loss"] == pytest.approx(total, rel=1e-10)


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(
    small_toy, whole, tmp_path, monkeypatch
):
    """Bit for bit, and the best epoch before the kill is still known after it."""
    settings = dict(epochs=4, save_every=2)
    main(tuning(small_toy, tmp_path / "whole", whole, "captioning", **settings))
    draw = finetune.draw_items

    class Killed(Exception):
        pass

    def die(train, step, *args):
        if step == 8:
            raise Killed
        return draw(train, step, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(finetune, "draw_items", die)
        main(tuning(small_toy, tmp_path / "cut", whole, "captioning", **settings))
    step = torch.load(tmp_path / "cut" / "trainer.pt", weights_only=True)["step"]
    assert 0 < step <= 8
    main(TuneConfig(task="captioning", out=str(tmp_path / "cut"), resume=True), RESUME)
    a, b = (weights(tmp_path / n) for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    keys = ("step", "loss", "validation", "best_step", "model")
    one, two = ([[r.get(k) for k in keys] for r in rows(tmp_path / n)] for n in ("whole", "cut"))
    assert one == two
    left = [read_tensors(tmp_path / n / "model.safetensors") for n in ("whole", "cut")]
    assert all(torch.equal(left[0][k], left[1][k]) for k in left[0])


# ---- the video MLP's own rate


def test_the_video_mlp_alone_takes_mlp_lr_and_keeps_it_after_resuming(small_toy, whole, tmp_path):
    """Adam's first step moves a weight by its rate: 1e-2 in the MLP, 1e-6 elsewhere."""
    settings = dict(epochs=1, batch=60, lr=1e-6, mlp_lr=1e-2, warmup=0, held_out=0.0)
    run = tuning(small_toy, tmp_path / "a", whole, "qa", **settings)
    main(run)
    before, after = (load_run(p)[0].state_dict() for p in (whole, tmp_path / "a"))
    moved = {k: float((after[k] - before[k]).abs().max()) for k in after}
    assert {k for k, x in moved.items() if x > 1e-4} == {k for k in moved if "videomlp" in k}
    rows = {"out": str(tmp_path / "a"), "resume": True, "steps": 3, "mlp_lr": 5e-3}
    main(TuneConfig(task="qa", **rows), set(rows))
    groups = torch.load(tmp_path / "a" / "trainer.pt", weights_only=True)["optimizer"]
    assert [g["lr"] for g in groups["param_groups"]] == pytest.approx([1e-6 / 3, 5e-3 / 3])


# ---- where it starts


def test_features_of_another_width_get_a_new_video_mlp(small_toy, whole, tmp_path, capsys):
    """A run that read 64 columns is taken over to features of 5, its BERT as it was."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    for path in (world / "features").glob("*.npy"):
        np.save(path, np.load(path)[:, :5])
    main(tuning(world, tmp_path / "run", whole, "qa"))
    assert "features are 5 wide, the run" in capsys.readouterr().out
    assert load_run(tmp_path / "run")[0].config.video_dim == 5


def test_another_task_replaces_the_classifier(small_toy, whole, tmp_path):
    """From a segmentation run on: qa keeps none of it, other labels start a new one."""
    first = tmp_path / "seg"
    main(tuning(small_toy, first, whole, "segmentation"))
    main(tuning(small_toy, tmp_path / "qa", first, "qa"))
    model, _ = load_run(tmp_path / "qa")
    assert model.config.num_labels == 0 and model.classifier is None
    world = shutil.copytree(small_toy, tmp_path / "world")
    path = world / "coin" / "COIN.json"
    path.write_text(path.read_text().replace('"id": "3"', '"id": "333"'))
    main(tuning(world, tmp_path / "other", first, "segmentation"))
    assert "333" in load_run(tmp_path / "other")[0].config.labels


def test_pre_training_goes_on_from_a_tuned_run_without_its_classifier(small_toy, whole, tmp_path):
    """Two ranks would wait for the gradient of a classifier that no loss reads."""
    main(tuning(small_toy, tmp_path / "seg", whole, "segmentation", epochs=1))
    again = dict(data=str(small_toy), init=str(tmp_path / "seg"), out=str(tmp_path / "again"))
    train.main(TrainConfig(**again, batch=8, steps=1))
    assert load_run(tmp_path / "again")[0].classifier is None


def test_a_classifier_without_label_names_is_kept_if_it_fits(small_toy, whole, tmp_path):
    """A converted release has 779 outputs and no ids: its weights must not be drawn anew."""
    task = open_task("segmentation", small_toy, open_features(small_toy))
    model, tokenizer = load_run(whole)
    for extra, kept in {0: True, 1: False}.items():
        model.set_labels([str(i) for i in range(len(task.labels) + extra)])
        model.config.labels = []
        save_run(tmp_path / f"run{extra}", model, tokenizer)
        cfg = tuning(small_toy, tmp_path / "out", tmp_path / f"run{extra}", "segmentation")
        found, _ = finetune.start_model(cfg, task, print)
        assert torch.equal(found.classifier.weight, model.classifier.weight) == kept
        assert found.config.labels == task.labels
    with pytest.raises(ValueError, match=r"tells \d+ labels apart, the data has"):
        evaluate(model, tokenizer, task, Options())


def test_fine_tuning_starts_from_a_run_that_was_finished(small_toy, whole, tmp_path, monkeypatch):
    """A newer run that a kill cut short says that it is pre-trained, and is not."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_toy, "toy")
    data = {"toy": "toy", "toy-2": "toy", "toy-3": "elsewhere/toy", "trial": str(tmp_path / "toy")}
    for name in data:
        run = shutil.copytree(whole, tmp_path / "runs" / name)
        *log, last = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        last["settings"]["data"] = data[name]
        lines = [json.dumps(row) + "\n" for row in (log if name == "toy-2" else [*log, last])]
        (run / "log.jsonl").write_text("".join(lines))
    for name in ("toy-2", "toy-3"):  # the newer one is of another folder
        state = {"model": {}, "optimizer": {}, "step": 0, "config": {"data": data[name]}}
        torch.save(state, tmp_path / "runs" / name / "trainer.pt")
    assert finetune.pre_trained(TuneConfig(task="qa")) == Path("runs/toy")  # named after its data
    shutil.rmtree("runs/toy")
    assert finetune.pre_trained(TuneConfig(task="qa")) == Path("runs/trial")
    (tmp_path / "runs" / "odd").mkdir()  # a log that is none is no reason to stop
    (tmp_path / "runs" / "odd" / "log.jsonl").write_text("no json\n{}\n")
    assert finetune.pre_trained(TuneConfig(task="qa")) == Path("runs/trial")
    assert train.newest_run(TrainConfig()) == Path("runs/toy-2")
    with pytest.raises(ValueError, match="no run with a trainer.pt .* that was trained on x/toy"):
        train.newest_run(TrainConfig(data="x/toy"))


BAD = {
    "retrieval": "error: no run under runs/ pre-trained on toy: torchrun train.py makes one",
    "retrieval --data {toy}": "error: no run under .*: torchrun train.py --data .*toy makes one",
    "retrieval --data nowhere": "error: nowhere: no such folder",
    "retrieval --data {toy} --stride 8": "error: --stride is for segmentation and",
    "segmentation --data {toy} --join-captions 2": "error: --join-captions is for retrieval and",
    "captioning --init {run} --join-captions 2": "error: .* clip of youcook2 has one sentence",
    "captioning --data {toy} --init {run} --meteor-data nowhere": "error: nowhere: wanted meteor",
    "qa --data {toy} --init {run} --json no/x.json": "error: --json no/x.json: there is no folder",
    "qa --data {toy} --init {run} --out toy/coin/COIN.json": "error: .*COIN.json is a file, wanted",
    "qa --data {toy} --bert toy/tokenizer.json": "error: --bert toy/tokenizer.json is a",
    "qa --init {run} --data {toy} --dataset youcook2": "error: --dataset youcook2: qa is",
    "qa --init {run} --data {toy} --held-out 1": r"error: --held-out is 1.0, wanted 0 or more",
    "segmentation --init {run} --data {toy} --stride 40": r"error: --stride is 40, wanted at most",
    "segmentation --init {run} --data {toy} --stride 0": r"error: --stride is 0, wanted more than",
    "qa --init {run} --data {toy} --mlp-lr 0": r"error: --mlp-lr is 0.0, wanted more than 0",
    "qa --init {run} --data {toy} --join-captions 0": r"error: --join-captions is 0, wanted more",
    "qa --init {run} --data nowhere": r"error: nowhere: no such folder",
    "qa --init nowhere --data {toy}": r"error: nowhere: no run here",
    "captioning --data {toy} --resume --out {run}": "error: .* is a pre-training run",
    "qa --init {run} --data {toy} --batch 6 --accumulate 4": "error: --batch 6 is not",
}


@pytest.mark.parametrize("args", BAD)
def test_bad_commands_say_what_would_do_in_one_line(
    small_toy, whole, tmp_path, monkeypatch, capsys, args
):
    """Value seen, value wanted; exit code 2; no traceback; nothing left behind."""
    monkeypatch.chdir(tmp_path)
    if "{toy}" not in args or " toy/" in args:
        shutil.copytree(small_toy, "toy")
    words = args.format(toy=small_toy, run=whole).split()
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    with pytest.raises(SystemExit) as stopped:
        finetune.run(finetune.cli)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert re.match(BAD[args], err), err
    assert not list(tmp_path.glob("runs/*"))


def test_a_run_is_resumed_as_what_it_is(small_toy, whole, tmp_path):
    """A fine-tuned run goes on neither as pre-training nor as another task."""
    main(tuning(small_toy, tmp_path / "run", whole, "qa"))
    again = dict(out=str(tmp_path / "run"), resume=True)
    with pytest.raises(ValueError, match="was fine-tuned for qa: resume it as that"):
        main(TuneConfig(task="captioning", **again), RESUME)
    with pytest.raises(ValueError, match="was fine-tuned for qa: resume it as that"):
        train.main(TrainConfig(**again), RESUME)


def test_too_few_items_are_an_error(small_toy, whole, tmp_path):
    world = shutil.copytree(small_toy, tmp_path / "world")
    path = world / "msrvtt" / "MSRVTT_train.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:2]))
    with pytest.raises(ValueError, match="1 items to train on, wanted at least one for each of 1"):
        main(tuning(world, tmp_path / "run", whole, "qa", accumulate=2))
    path.write_text("video_id\n")
    with pytest.raises(DataError, match="nothing to train qa on: MSRVTT_data.json or MSRVTT_train"):
        main(tuning(world, tmp_path / "run", whole, "qa"))


@pytest.mark.slow
def test_a_real_bert_is_fine_tuned_on_real_data_by_two_ranks(shared, tmp_path):
    """Real features and weights, two gloo ranks, half an epoch: above chance is not asked."""
    args = flags(data=shared / "salads", bert=shared / "weights/bert_tiny", steps=12)
    made = command("segmentation", *args, ranks=2, script=REPO / "finetune.py")
    done = subprocess.run(made, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "segmentation on coin, 10 items" in done.stdout and "always 9" in done.stdout
    log = rows(tmp_path / "runs" / "salads-segmentation")
    assert log[-1]["final"] and dataclasses.asdict(TuneConfig())["task"] == "retrieval"


def test_no_run_is_tested_by_videos_that_it_was_trained_on(
    small_toy, whole, tmp_path, monkeypatch, capsys
):
    """CrossTask's two splits: a run keeps its own, and other features than its own would draw
    another; here of 3 videos a task, for 8 are too few for the authors' 30."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    drawn = tasks.authors_split
    monkeypatch.setattr(tasks, "authors_split", lambda task, found, n: drawn(task, found, 3))
    how = dict(task="localization", epochs=1)
    finetune.main(tuning(world, tmp_path / "val", whole, **how))
    finetune.main(tuning(world, tmp_path / "theirs", whole, split="authors", **how))
    assert load_run(tmp_path / "theirs")[0].config.split.startswith("authors ")
    for run, more, line in (("theirs", [], "localization on crosstask, --split authors: "),
                            ("theirs", ["--split", "val"], "crosstask, --split val: "),
                            ("val", [], "crosstask, --split val: ")):  # fmt: skip
        capsys.readouterr()
        me = ["localization", "--run", str(tmp_path / run), "--data", str(world)]
        assert eval.main([*me, *more]) == 0 and line in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="val was fine-tuned beside val, and may have been trained on"
    ):
        eval.main([*me, "--split", "authors"])
    with pytest.raises(
        ValueError, match="val was fine-tuned beside val, and may have been trained"
    ):
        finetune.main(tuning(world, tmp_path / "more", tmp_path / "val", split="authors", **how))
    finetune.main(tuning(world, tmp_path / "then", tmp_path / "val", epochs=1))  # qa
    with pytest.raises(ValueError, match="then was fine-tuned beside val"):
        eval.main(["localization", "--run", str(tmp_path / "then"), *me[3:], "--split", "authors"])
    pair = (world / "crosstask" / "videos.csv").read_text().split(",")[1]
    next(world.glob(f"features*/{pair}.npy")).unlink()
    with pytest.raises(
        ValueError, match="theirs was fine-tuned beside authors .* annotations it had"
    ):
        eval.main(["localization", "--run", str(tmp_path / "theirs"), "--data", str(world)])
