"""Pictures of the model and of a run (Figures 2-4, sec. 5.5.2): pip install matplotlib.

    python eval.py masks --plot masks.png                            the six attention masks
    python eval.py sequence --run RUN --data DATA --plot sequence.png         what is hidden (Eq. 2)
    python eval.py heads --run RUN --data DATA --plot heads.png      who looks at whom in one clip
    python eval.py space --run RUN --data DATA --plot space.png      video and word tokens, in 2-d
    python eval.py curves --run RUN --plot curves.png                loss and validation by step

Letters as in vlm.py.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import Clip
from data import Corpus, FeatureStore, open_data, pairs
from keep import read_log
from search import fitting_features
from tasks import DATASETS, open_task
from vlm import KINDS, VLM, Batch, attention_mask, load_run

BLUE, ORANGE, GREY = "#2060a0", "#d06020", "#808080"


def matplotlib():
    """Import pyplot, drawing to files; ValueError says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures want matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: str | Path) -> None:
    """Write a figure 1200 pixels wide, a PNG in 256 colours; ValueError if it cannot be."""
    try:
        figure.savefig(path, dpi=1200 / figure.get_figwidth())
        if str(path).endswith(".png"):
            from PIL import Image  # matplotlib brings it

            Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path}: cannot be written ({error})") from None


# ---------------------------------------------------------------------------------------------
# The six attention masks (Figure 3, and the full one), the sequence and what it hides (Figure 2)

USED = {  # what each mask is for, and what stands in the place of the modality that is not there
    "full": "pre-training (sec. 3)",
    "retrieval": "video and text apart (sec. 4.1)",
    "segmentation": "video alone, its text a dummy (sec. 4.2)",
    "localization": "video or a step, the other a dummy (sec. 4.3)",
    "qa": "video or an answer, the other a dummy (sec. 4.4)",
    "captioning": "a word sees the words before it (sec. 4.5)",
}


def token_names(V: int, T: int) -> list[str]:
    """Name the tokens of [CLS] v.. [SEP] t.. [SEP]; T counts the text's [SEP]."""
    video, text = (f"v{i + 1}" for i in range(V)), (f"t{i + 1}" for i in range(T - 1))
    return ["[CLS]", *video, "[SEP]", *text, "[SEP]"]


def mask_of(kind: str, V: int, T: int) -> torch.Tensor:
    """Return who may look at whom in a clip without padding: (L, L) bool."""
    valid = [torch.ones(1, n, dtype=torch.bool) for n in (V, T)]
    return attention_mask(kind, *valid)[0]


def draw_mask(kind: str, V: int, T: int) -> str:
    """Draw one attention mask in the terminal: rows look at columns."""
    rows = zip(token_names(V, T), mask_of(kind, V, T), strict=True)
    lines = [f"{name:>7} " + "".join("██" if x else "· " for x in row) for name, row in rows]
    return "\n".join([f"{kind:>12}", *lines])


def plot_masks(path: str | Path, V: int = 6, T: int = 5) -> None:
    """Draw who may look at whom: V seconds of video, T text tokens with their [SEP]."""
    plt = matplotlib()
    names = token_names(V, T)
    kind = torch.tensor([1] + [2] * (V + 1) + [3] * T)  # the column's modality gives the colour
    colors = plt.matplotlib.colors.ListedColormap(["white", GREY, BLUE, ORANGE])
    figure, axes = plt.subplots(2, 3, figsize=(12, 9), layout="constrained")
    for axis, name in zip(axes.flat, KINDS, strict=True):
        axis.imshow((mask_of(name, V, T) * kind).numpy(), cmap=colors, vmin=0, vmax=3)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.set_xticks(np.arange(-0.5, len(names)), minor=True)
        axis.set_yticks(np.arange(-0.5, len(names)), minor=True)
        axis.grid(which="minor", color="white", lw=1.5)
        axis.tick_params(which="both", length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(f"{name}\n{USED[name]}", fontsize=11)
    figure.suptitle("rows may look at coloured columns: video blue, text orange", fontsize=12)
    save(figure, path)
    plt.close(figure)


def examples(batch: Batch, longest: int) -> list[tuple[str, int]]:
    """Find a clip of each way of hiding (sec. 3.3) that fits: (what is hidden, row of the batch).

    Raises: ValueError when the batch has none of at most `longest` tokens.
    """
    size = batch.video_valid.sum(1) + batch.text_valid.sum(1)
    video = (batch.video_hidden == batch.video_valid).all(1) & ~batch.text_hidden.any(1)
    words = batch.text_valid.sum(1) - 1
    text = (batch.text_hidden.sum(1) == words) & ~batch.video_hidden.any(1)
    some = batch.video_hidden.any(1) & batch.text_hidden.any(1)
    ways = {"25 %: all video": video, "25 %: all text": text, "50 %: single tokens": some}
    found = []
    for k, (name, rows) in enumerate(ways.items()):
        rows = (rows & (size <= longest)).nonzero()[:, 0].tolist()
        if not rows:
            raise ValueError(f"no clip of at most {longest} tokens shows this: {name} hidden")
        found.append((name, rows[k * len(rows) // 3]))  # clips of other videos
    return found


def plot_sequence(tokenizer: Tokenizer, corpus: Corpus, path: str | Path, longest: int = 34):
    """Draw three clips as the encoder reads them (Eq. 2), hidden tokens filled (sec. 3.2, 3.3)."""
    plt = matplotlib()
    batch = corpus.step(0, 1024)
    figure, axes = plt.subplots(3, 1, figsize=(12, 4.8), layout="constrained")
    for axis, (way, row) in zip(axes, examples(batch, longest), strict=True):
        V, T = int(batch.video_valid[row].sum()), int(batch.text_valid[row].sum())
        read = [tokenizer.id_to_token(i) for i in batch.text[row, :T].tolist()]
        names = ["[CLS]", *(f"v{i + 1}" for i in range(V)), "[SEP]", *read]
        hidden = [False, *batch.video_hidden[row, :V].tolist(), False]
        hidden += batch.text_hidden[row, :T].tolist()
        places = [*range(V + 1), corpus.c.max_video_len + 1]
        places += range(places[-1] + 1, places[-1] + 1 + T)
        for x, (name, h, place) in enumerate(zip(names, hidden, places, strict=True)):
            color = BLUE if 0 < x <= V else ORANGE if V + 1 < x < V + 1 + T else GREY
            face = color if h else "white"
            axis.add_patch(plt.Rectangle((x + 0.06, 0), 0.88, 1, fc=face, ec=color, lw=1.2))
            axis.text(x + 0.5, 0.5, name, rotation=90, ha="center", va="center", fontsize=9,
                      color="white" if h else "black")  # fmt: skip
            axis.text(x + 0.5, -0.16, place, ha="center", va="center", fontsize=8, color=GREY)
        axis.set(xlim=(0, longest + 2), ylim=(-0.3, 1.05))
        axis.set_axis_off()
        axis.set_title(f"{way} hidden", fontsize=11, loc="left")
    said = "Filled tokens are to be predicted: seconds v1.. read as zeros, words as [MASK] "
    said += "(single ones 10 % another, 10 % itself). Below: positions"
    figure.suptitle(said, fontsize=12)
    save(figure, path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# Attention heads (Figure 4)


@torch.no_grad()
def attention(model: VLM, batch: Batch, kind: str = "full") -> Tensor:
    """Return each head's attention, softmax(q k / sqrt(D/H)): (layers, B, H, L, L)."""
    seen, layers = [], model.bert.encoder["layer"]
    attend = attention_mask(kind, batch.video_valid, batch.text_valid)

    def look(layer, inputs) -> None:
        x, rows = inputs[:2]
        q, k, _ = layer.by_clip(layer.qkv(x), rows, *attend.shape[:2])
        score = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        seen.append(score.masked_fill(~attend[:, None], -torch.inf).softmax(3))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        model(batch, kind)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen).cpu()


def crossing(weights: Tensor, V: int) -> Tensor:
    """Measure how much each head looks from one modality at the other: (layers, H) in 0..1.

    weights (layers, 1, H, L, L), of one clip with V seconds.
    """
    video, text = slice(1, V + 1), slice(V + 2, weights.shape[3] - 1)
    over = weights[:, 0, :, video, text].sum(3).mean(2)
    return (over + weights[:, 0, :, text, video].sum(3).mean(2)) / 2


def plot_heads(
    model: VLM, tokenizer: Tokenizer, features: FeatureStore, clip: Clip, path: str, most: int = 4
) -> list[tuple[int, int]]:
    """Draw the heads of one clip that look most from one modality at the other (Figure 4).

    Returns: which ones, (layer, head) from 1.
    """
    plt = matplotlib()
    batch = pairs(features, [clip], tokenizer, model.config)
    V, T = int(batch.video_valid.sum()), int(batch.text_valid.sum())
    words = [tokenizer.id_to_token(i) for i in batch.text[0, :T].tolist()]
    names = ["[CLS]", *(f"{int(clip.start) + i} s" for i in range(V)), "[SEP]", *words]
    batch = batch.to(model.video_mean.device)
    weights = attention(model, batch)  # (layers, 1, H, L, L)
    share = crossing(weights, V)
    order = share.flatten().argsort(descending=True)[:most].tolist()
    chosen = [divmod(i, share.shape[1]) for i in order]
    columns = min(2, len(chosen))
    lines = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(12, 6.2 * lines + 0.6), squeeze=False, layout="constrained"
    )
    size = max(4.5, min(9, 300 / len(names)))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (layer, head) in zip(axes.flat, chosen, strict=False):
        axis.set_axis_on()
        seen = weights[layer, 0, head]
        axis.imshow(seen.sqrt().numpy(), cmap="Blues", vmin=0)
        for edge in (0.5, V + 0.5, V + 1.5):  # [CLS] | video | [SEP] | text
            axis.axhline(edge, color=ORANGE, lw=0.6)
            axis.axvline(edge, color=ORANGE, lw=0.6)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        axis.set_yticks(range(len(names)), names, fontsize=size)
        crossed = f"{share[layer, head]:.0%} to the other modality"
        title = f"layer {layer + 1}, head {head + 1}: {crossed}, darkest {seen.max():.0%}"
        axis.set_title(title, fontsize=11)
    said = f"{clip.video}: rows look at columns; darker is more (square root of attention, each "
    figure.suptitle(f"{said}head by its own largest)", fontsize=12)
    save(figure, path)
    plt.close(figure)
    return [(layer + 1, head + 1) for layer, head in chosen]


# ---------------------------------------------------------------------------------------------
# Token space (sec. 5.5.2)


def plane(x: Tensor) -> tuple[Tensor, list[float]]:
    """Project x (N, D) on its first two principal axes: (N, 2), and each axis's share, 0..1."""
    x = x.double() - x.double().mean(0)
    _, s, axes = torch.linalg.svd(x, full_matrices=False)
    return x @ axes[:2].T, (s[:2].square() / s.square().sum()).tolist()


@torch.no_grad()
def plot_space(
    model: VLM, tokenizer: Tokenizer, features: FeatureStore, clips: list[Clip], path: str
) -> None:
    """Draw video tokens x_v (Eq. 1) and the embeddings of the clips' words in one plane."""
    plt = matplotlib()
    video, ids = [], []
    for i in range(0, len(clips), 64):
        batch = pairs(features, clips[i : i + 64], tokenizer, model.config)
        batch = batch.to(model.video_mean.device)
        video.append(model.video_tokens(batch.video, batch.video_valid)[1].float().cpu())
        ids.append(batch.text[batch.text_valid].cpu())
    video = torch.cat(video)
    video = video[:: -(-len(video) // 3000)]  # 3,000 at most: more would be one blot
    ids, times = torch.cat(ids).unique(return_counts=True)
    special = {tokenizer.token_to_id(f"[{n}]") for n in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    keep = torch.tensor([int(i) not in special for i in ids])
    ids, times = ids[keep], times[keep]
    words = model.bert.embeddings["word_embeddings"].weight[ids.to(model.video_mean.device)]
    flat, share = plane(torch.cat([video, words.float().cpu()]))
    v, w = flat[: len(video)].numpy(), flat[len(video) :].numpy()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    left.scatter(*v.T, s=4, color=BLUE, alpha=0.4, label=f"{len(v)} video tokens", lw=0)
    left.scatter(*w.T, s=6, color=ORANGE, alpha=0.7, label=f"{len(w)} word pieces", lw=0)
    left.legend(markerscale=3)
    left.set_title("video tokens and word embeddings")
    own, own_share = plane(words.float().cpu())  # the words spread out on axes of their own
    right.scatter(*own.numpy().T, s=18, color=ORANGE, alpha=0.8, lw=0)
    room = (own.amax(0) - own.amin(0)) * torch.tensor([0.12, 0.03])  # that a name takes
    named: list[int] = []
    for i in times.argsort(descending=True)[:40].tolist():
        if not any(((own[i] - own[j]).abs() < room).all() for j in named):
            right.annotate(tokenizer.id_to_token(int(ids[i])), own[i].tolist(), fontsize=9,
                           xytext=(4, 2), textcoords="offset points")  # fmt: skip
            named.append(i)
    right.set_title(f"the words on axes of their own, {len(named)} of the commonest named")
    for axis, (first, second) in ((left, share), (right, own_share)):
        axis.set_xlabel(f"first principal axis ({first:.0%} of the variance)")
        axis.set_ylabel(f"second ({second:.0%})")
    save(figure, path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# Curves


def plot_curves(run: str | Path, path: str) -> None:
    """Draw what log.jsonl holds: the loss beside chance, each modality's, and validation.

    Raises: ValueError when there is no log with a step.
    """
    plt = matplotlib()
    log = Path(run) / "log.jsonl"
    if not log.exists():
        raise ValueError(f"{log}: no such file: --run wants a directory that train.py left")
    try:
        rows = read_log(log)
        losses = [r for r in rows if r.get("loss") is not None and "step" in r]
        checks = [r for r in rows if "validation" in r]
        steps = np.array([r["step"] for r in losses])
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{log}: not a log of train.py or finetune.py ({error})") from None
    if not losses:
        raise ValueError(f"{log}: holds no step yet")
    figure, axes = plt.subplots(
        1, 1 + bool(checks), figsize=(12, 5), squeeze=False, layout="constrained"
    )
    axis = axes[0, 0]
    both = any(r["video"] for r in losses) and any(r["text"] for r in losses)
    axis.plot(steps, [r["loss"] for r in losses], color="black", lw=2, label="loss")
    if both:
        axis.plot(steps, [r["video"] for r in losses], color=BLUE, label="hidden video tokens")
        axis.plot(steps, [r["text"] for r in losses], color=ORANGE, label="hidden word pieces")
    axis.plot(steps, [r["chance"] for r in losses], color=GREY, ls="--", label="chance")
    axis.set_xlabel("step")
    axis.set_ylabel("nats a token" if both else "nats")
    axis.set_ylim(bottom=0)
    axis.legend()
    axis.set_title(f"{Path(run).resolve().name}: training loss")
    if checks:
        axis = axes[0, 1]
        x, y = [r["step"] for r in checks], [r["validation"] for r in checks]
        axis.plot(x, y, color=BLUE, marker="o")
        axis.set_xlabel("step")
        axis.set_ylabel(checks[0].get("metric", "validation"))
        axis.set_title("held-out videos, after each epoch")
    save(figure, path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# python eval.py masks | sequence | heads | space | curves

PICTURES = {
    "masks": "Draw the six attention masks (five of them Figure 3's).",
    "sequence": "Draw three clips as the encoder reads them, hidden tokens filled (Eq. 2).",
    "heads": "Draw attention heads of a clip, with its words and seconds (Figure 4).",
    "space": "Draw video tokens and word embeddings in two dimensions (sec. 5.5.2).",
    "curves": "Draw the loss and the validation metric of a run by step.",
}


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare one picture's flags."""
    add = parser.add_argument
    add("--plot", required=True, metavar="FILE.png", help="picture to write")
    if name != "masks":
        add("--run", required=True, metavar="RUN", help="run directory")
    if name not in ("masks", "curves"):
        add("--data", required=True, metavar="DIR", help="folder as data.py says")
        add("--features", metavar="DIR|FILE", help="features elsewhere than in DATA")
    if name in ("heads", "space"):
        how = "whose test clips (default: the first there)"
        add("--dataset", choices=DATASETS["retrieval"], help=how)
    if name == "heads":
        how = "which test clip, from 0 (default: 0)"
        add("--item", type=int, default=0, metavar="N", help=how)


def command(name: str, args: argparse.Namespace) -> int:
    """Draw one picture."""
    if name == "masks":
        plot_masks(args.plot)
    elif name == "curves":
        plot_curves(args.run, args.plot)
    elif name == "sequence":
        model, tokenizer = load_run(args.run)
        features = fitting_features(args, model)
        data, _ = open_data(args.data, features, tokenizer, model.config)
        plot_sequence(tokenizer, data.train, args.plot)
    else:
        model, tokenizer = load_run(args.run)
        features = fitting_features(args, model)
        clips = [x.clip for x in open_task("retrieval", args.data, features, args.dataset).test]
        if name == "space":
            plot_space(model, tokenizer, features, clips, args.plot)
        elif not 0 <= args.item < len(clips):
            raise ValueError(f"--item is {args.item}, wanted 0..{len(clips) - 1}")
        else:
            clip = clips[args.item]
            chosen = plot_heads(model, tokenizer, features, clip, args.plot)
            print(f"{clip.video}: {clip.text}")
            print("layer, head: " + "; ".join(f"{layer}, {head}" for layer, head in chosen))
    print(f"written to {args.plot}")
    return 0
