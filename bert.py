"""BERT (Devlin et al., 2019), written here: post-LayerNorm, erf GELU, original weights (sec. 3.1).

    pytest tests/test_bert.py           with -m hf: hidden states beside Hugging Face's

Token-wise work runs on real tokens only: a padded batch (B, L) is packed to N rows once, and only
attention sees the rectangle again. Modules are named as in Hugging Face's files, so that weights go
in and out as they are. Keys and values can be kept for generation (sec. 4.5).

Letters: `B` clips, `L` tokens of a sequence, `N` real tokens of a batch, `D` width, `H` heads.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from benchmarks import DataError, is_words, read_json, shown

# ---------------------------------------------------------------------------------------------
# Sizes


@dataclass
class VLMConfig:
    """Sizes under Hugging Face's BERT names; the defaults are BERT-base uncased (sec. 5.2), with
    which VLM has 110 million parameters (Table 1).

    Raises ValueError for sizes that cannot be built, naming the value and what would do.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    unk_token_id: int = 100
    cls_token_id: int = 101
    sep_token_id: int = 102
    mask_token_id: int = 103
    # what VLM adds to BERT
    video_dim: int = 512  # E: 512 for S3D
    max_video_len: int = 32  # seconds
    max_len: int = 96  # L at most: [CLS], 32 seconds, [SEP], 61 word pieces, [SEP]
    num_labels: int = 0  # K: action segmentation; 0 builds no classifier
    labels: list = dataclasses.field(default_factory=list)  # their ids; 0 is the background
    # what these weights are: "untrained", "pre-trained" or "fine-tuned", on which task and data
    stage: str = "untrained"
    task: str = ""
    data: str = ""
    split: str = ""  # of CrossTask, as Task.split; older runs name none: theirs was "val"

    def __post_init__(self):
        check_sizes(self)

    @property
    def parameters(self) -> int:
        """Count the weights, roughly: biases and the classifier left out."""
        D = self.hidden_size
        tables = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        layers = self.num_hidden_layers * (4 * D + 2 * self.intermediate_size)
        return D * (tables + layers + self.video_dim + 2 * D)

    @property
    def max_text_len(self) -> int:
        """T at most, the text's [SEP] included: 62 at the paper's sizes."""
        return self.max_len - self.max_video_len - 2

    @classmethod
    def from_json(cls, path: str | Path, **changes) -> "VLMConfig":
        """Read a config.json, of a run or of a Hugging Face BERT, its unknown keys left aside.

        Raises: ValueError for no JSON object, or a BERT of another kind (as relative positions).
        """
        saved = read_json(path, dict)
        for key, wanted in {"hidden_act": "gelu", "position_embedding_type": "absolute"}.items():
            if saved.get(key, wanted) != wanted:
                seen = shown(saved[key])
                raise DataError(f"{path}: {key} is {seen}; this BERT has {wanted!r} only")
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**({k: v for k, v in saved.items() if k in known} | changes))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------
# The encoder


WIDE = 512  # hidden size from which products take nearly all of a CPU's step, and memory counts


def pad(x: Tensor, rows: Tensor, B: int, L: int) -> Tensor:
    """Lay packed real tokens x (N, D), rows (N,) of B L, out as (B, L, D), zeros elsewhere."""
    D = x.shape[1]
    # index_put, for index_copy would keep x until backward
    return x.new_zeros(B * L, D).index_put((rows,), x).view(B, L, D)


def square(real: Tensor) -> Tensor:
    """Let real tokens (B, L) look at each other, all others at themselves alone: (B, L, L)."""
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return real[:, :, None] & real[:, None, :] | itself


class LookUp(torch.autograd.Function):
    """Embed ids by a table of words, and hand the table on to be predicted from.

    Either use alone has a gradient as large as the table, 94 MB at BERT-base, and their sum is a
    third one; here what the look-up adds goes into the other one's, row by row.
    """

    @staticmethod
    def forward(ctx, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """ids any shape, table (W, D) -> its rows (.., D), and itself (W, D)."""
        ctx.save_for_backward(ids)
        ctx.set_materialize_grads(False)
        ctx.words = len(table)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx, rows: Tensor | None, table: Tensor | None) -> tuple[None, Tensor | None]:
        """Gradients of both, (.., D) and (W, D), or None -> that of the table (W, D)."""
        if rows is None:
            return None, table
        if table is None:  # predicts nothing
            table = rows.new_zeros(ctx.words, rows.shape[-1])
        words, which = ctx.saved_tensors[0].flatten().unique(return_inverse=True)
        total = rows.new_zeros(len(words), rows.shape[-1])
        total.index_add_(0, which, rows.flatten(0, -2))  # in order, as PyTorch's own adds them up
        # in place: the gradient of a product, which nobody else holds
        return None, table.index_add_(0, words, total)


def can_look_packed(x: Tensor, heads: int) -> bool:
    """Tell whether PyTorch has a kernel for packed tokens x (.., D), in fp32, fp16 and bf16 alike.

    That is CUDA's from Ampere on (8.0), for heads a multiple of 8 wide.
    """
    if not x.is_cuda or torch.version.hip or x.dtype == torch.float64:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0) and x.shape[-1] // heads % 8 == 0


def survivors(shape: Sequence[int], p: float) -> Tensor:
    """Draw what dropout of share p, in 0..1, spares on a CPU: bool, of any shape.

    16 random bits a number, to which p is rounded, are drawn faster than by PyTorch's bernoulli_,
    one number at a time, which a wide model's step would feel, in bf16 most.
    """
    n = math.prod(shape)
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (bits[:n] >= round(p * 2**16) - 2**15).view(*shape)


def draws_itself(x: Tensor, p: float) -> bool:
    """Tell whether dropout of share p, in 0..1, in a layer that reads x (N, D), is `survivors`'."""
    compiled = torch.compiler.is_compiling()
    return x.device.type == "cpu" and x.shape[-1] >= WIDE and 0 < p < 1 and not compiled


class Dropout(nn.Dropout):
    """PyTorch's, which on a CPU, where a model is wide, draws by `survivors`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, D), a share p of it zeros and the rest larger by 1 / (1 - p)."""
        if not self.training or not draws_itself(x, self.p):
            return super().forward(x)
        return x * survivors(x.shape, self.p) * (1 / (1 - self.p))


class Layer(nn.Module):
    """One transformer layer over packed tokens."""

    def __init__(self, c: VLMConfig):
        super().__init__()
        D, eps = c.hidden_size, c.layer_norm_eps
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(D, D) for name in names}),
                "output": nn.ModuleDict(
                    {"dense": nn.Linear(D, D), "LayerNorm": nn.LayerNorm(D, eps)}
                ),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, c.intermediate_size)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(c.intermediate_size, D), "LayerNorm": nn.LayerNorm(D, eps)}
        )
        self.heads, self.wide = c.num_attention_heads, D >= WIDE
        self.dropout = Dropout(c.hidden_dropout_prob)
        self.attention_dropout = c.attention_probs_dropout_prob

    def qkv(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values of packed tokens x (N, D): 3 x (N, D)."""
        return [linear(x) for linear in self.attention["self"].values()]

    def by_clip(self, three: Sequence[Tensor], rows: Tensor, B: int, L: int) -> list[Tensor]:
        """Lay three (N, D) each, rows (N,), out by clip and head: 3 x (B, H, L, D/H)."""
        # Matrices multiply real tokens only; attention alone needs the padded rectangle, and its
        # share is small: 4 L D of a layer's 24 D² + 4 L D operations a token, 2 % at BERT-base.
        D, H = three[0].shape[1], self.heads
        return [pad(y, rows, B, L).view(B, L, H, D // H).transpose(1, 2) for y in three]

    def dropped(self) -> float:
        """Return the share of attention weights to be dropped now, 0..1."""
        return self.attention_dropout if self.training else 0.0

    def look(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, attend: Tensor,
        past: list | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention as attend says, over the padded rectangle; arguments as those of `forward`.

        q, k, v (N, D), rows (N,), attend (B, L, L) or, with past, (B, L, P + L) -> (N, D).
        """
        (B, L, _), D = attend.shape, q.shape[1]
        q, k, v = self.by_clip((q, k, v), rows, B, L)  # (B, H, L, D/H)
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # (B, H, P+L, D/H)
            past[:] = k, v
        a = F.scaled_dot_product_attention(q, k, v, attend[:, None], dropout_p=self.dropped())
        # (B, H, L, D/H) -> (N, D)
        return a.transpose(1, 2).reshape(B * L, D).index_select(0, rows)

    def look_at_each(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], see: list[Tensor] | None,
        spared: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention clip by clip, where packed tokens lie side by side (wide models on a CPU).

        q, k, v (N, D), each clip's n of its lengths in turn -> (N, D). see: what a clip's tokens
        look at, (n, n) bool, or None for all of them. spared (sum of H n n,) bool: the weights
        that dropout leaves, clip by clip; None: PyTorch draws.
        """
        # No clip is padded to the longest: of the paper's clips 0.4 of the rectangle's products
        (N, D), H, p, given = q.shape, self.heads, self.dropped(), q.dtype
        kind = torch.promote_types(given, torch.float32)  # products so small are no faster in bf16
        q, k, v = (y.to(kind).view(N, H, D // H).transpose(0, 1) for y in (q, k, v))  # (H, N, D/H)
        three = [y.split(lengths, 1) for y in (q * q.shape[2] ** -0.5, k, v)]
        if spared is not None:
            spared = (spared.to(kind) * (1 / (1 - p))).split([H * n * n for n in lengths])
        out = []
        with torch.autocast("cpu", enabled=False):
            for i, (q, k, v) in enumerate(zip(*three, strict=True)):
                scores = torch.bmm(q, k.transpose(1, 2))  # (H, n, n)
                if see is not None:
                    scores = scores.masked_fill(~see[i], -math.inf)
                w = scores.softmax(2)
                w = F.dropout(w, p) if spared is None else w * spared[i].view_as(w)
                out.append(torch.bmm(w, v).transpose(0, 1))  # (n, H, D/H)
        return torch.cat(out).flatten(1).to(given)

    def look_at_all(self, x: Tensor, begins: Tensor, longest: int) -> Tensor:
        """Attention of each token to all of its clip, packed as they are (GPU): (N, D) -> (N, D).

        A clip's tokens begin in x at begins (B+1,) int32; none has more than `longest`.
        """
        # PyTorch's kernel under SDPA and nested tensors: neither rectangle nor mask, 96 x 96 a clip
        three = self.attention["self"].values()
        W, b = (torch.cat([getattr(y, name) for y in three]) for name in ("weight", "bias"))
        q, k, v = F.linear(x, W, b).view(1, len(x), 3, self.heads, -1).unbind(2)  # (1, N, H, D/H)
        p = self.dropped()
        kernel = torch.ops.aten._efficient_attention_forward
        a = kernel(q, k, v, None, begins, begins, longest, longest, p, 0, torch.is_grad_enabled())
        return a[0].view_as(x)

    def shrink(self, x: Tensor) -> Tensor:
        """The second half of the inner network: x (N, 4 D) -> (N, D)."""
        return self.output["dense"](F.gelu(x))

    def recomputed(self, f: Callable[..., Tensor], *args) -> Tensor:
        """Call f; in backward a wide layer on a CPU calls it again, and till then holds args alone.

        For what is large and cheap: attention's weights, (H, n, n) of a clip's n tokens three
        times over, and GELU's (N, 4 D). args: any shape.
        """
        compiled = torch.compiler.is_compiling()  # chooses for itself what it computes again
        cpu = args[0].device.type == "cpu"
        if self.wide and cpu and torch.is_grad_enabled() and not compiled:
            return checkpoint(f, *args, use_reentrant=False)
        return f(*args)

    def forward(
        self, x: Tensor, rows: Tensor, attend: Tensor | None, past: list | None = None,
        packed: tuple | None = None, asked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (N, D) real tokens, rows (N,) their places in the flattened (B, L) -> (N, D).

        past: keys and values (B, H, P, D/H) of tokens read before, which attend (B, L, P + L) then
        covers too, or an empty list; those of x are added to it. packed: instead of attend
        (B, L, L), what look_at_all wants on a GPU, where clips begin (B+1,) and the longest, or
        look_at_each on a CPU, lengths and see. asked (M,) int64: which of the N are wanted alone,
        -> (M, D).
        """
        if packed and x.is_cuda:
            a = self.look_at_all(x, *packed)  # (N, D)
        elif packed:
            p, spared = self.dropped(), None
            if draws_itself(x, p):  # once, for backward too
                spared = survivors((sum(self.heads * n * n for n in packed[0]),), p)
            a = self.recomputed(self.look_at_each, *self.qkv(x), *packed, spared)
        else:
            a = self.look(*self.qkv(x), rows, attend, past)
        if asked is not None:
            x, a = x.index_select(0, asked), a.index_select(0, asked)  # (M, D)
        out = self.attention["output"]
        x = out["LayerNorm"](x + self.dropout(out["dense"](a)))
        y = self.recomputed(self.shrink, self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.dropout(y))


class Bert(nn.Module):
    """BERT's embeddings and encoder (Eq. 3), without the pooler that VLM never uses."""

    def __init__(self, c: VLMConfig):
        super().__init__()
        D = c.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(c.vocab_size, D),
                "position_embeddings": nn.Embedding(c.max_position_embeddings, D),
                "token_type_embeddings": nn.Embedding(c.type_vocab_size, D),
                "LayerNorm": nn.LayerNorm(D, c.layer_norm_eps),
            }
        )
        layers = nn.ModuleList([Layer(c) for _ in range(c.num_hidden_layers)])
        self.encoder = nn.ModuleDict({"layer": layers})
        self.dropout = Dropout(c.hidden_dropout_prob)
        self.compiled = False  # whether its layers are

    def compile_layers(self) -> None:
        """Compile the layers, for any number of tokens."""
        self.compiled = True
        for layer in self.encoder["layer"]:
            layer.compile(dynamic=True)

    def forward(
        self, x: Tensor, position: Tensor, segment: Tensor, real: Tensor,
        attend: Tensor | None = None, past: list[list] | None = None, asked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Encode token vectors.

        Args:    x (B, L, D) word embeddings or video tokens; position (L,), segment (L,) int64;
                 real (B, L) bool; attend (B, L, L) bool, or (B, L, P + L) with `past`: each layer's
                 keys and values of the P tokens read before, to which those of x are added; None:
                 every real token looks at all real tokens of its clip (without `past`).
                 asked (B, L) bool, among the real ones: whose h will be read; None: all.
        Returns: h (B, L, D), zeros at padding, which is never computed; of tokens that are not
                 asked for, nothing to be read.
        """
        B, L, D = x.shape
        rows = real.flatten().nonzero()[:, 0]  # (N,): from here to the last line, real tokens only
        # The last layer need not compute what nobody reads. A narrow model does: otherwise it would
        # round otherwise, and README's tables, all of narrow models, be other ones.
        last = None if asked is None or D < WIDE else asked.flatten()[rows].nonzero()[:, 0]  # (M,)
        e = self.embeddings
        where = e["position_embeddings"](position) + e["token_type_embeddings"](segment)  # (L, D)
        x = x.reshape(B * L, D).index_select(0, rows) + where.index_select(0, rows % L)  # (N, D)
        x = self.dropout(e["LayerNorm"](x))
        layers, packed = self.encoder["layer"], None
        if attend is None and can_look_packed(x, layers[0].heads):
            packed = F.pad(real.sum(1).cumsum(0), (1, 0)).int(), L
        elif D >= WIDE and x.device.type == "cpu" and past is None and not self.compiled:
            see = None if attend is None else [
                a[r][:, r] for a, r in zip(attend, real, strict=True)
            ]  # fmt: skip
            packed = real.sum(1).tolist(), see
        elif attend is None:
            attend = square(real)
        for i, layer in enumerate(layers):
            which = last if i == len(layers) - 1 else None
            x = layer(x, rows, attend, past and past[i], packed, which)
        return pad(x, rows if last is None else rows[last], B, L)


# ---------------------------------------------------------------------------------------------
# What a config may say


MOST = {"num_hidden_layers": 512, "parameters": 2**32}  # of any other size 2**20, a million


def check_sizes(c: VLMConfig) -> None:
    """Refuse sizes that cannot be built: ValueError naming the value and what would do."""
    for field in dataclasses.fields(c):
        value, kind = getattr(c, field.name), field.type
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or isinstance(value, bool):
            raise ValueError(f"config: {field.name} is {shown(value)}, wanted {kind.__name__}")
        most = MOST.get(field.name, 2**20)
        if kind is int and value > most:
            raise ValueError(f"config: {field.name} is {shown(value)}, wanted at most {most}")
    positive = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    for name in (*positive, "intermediate_size", "video_dim", "max_video_len"):
        if getattr(c, name) < 1:
            raise ValueError(f"config: {name} is {getattr(c, name)}, wanted at least 1")
    if c.parameters > MOST["parameters"]:
        raise ValueError(f"config: {c.parameters:,} weights, wanted at most 4 billion")
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(
            f"config: hidden_size {c.hidden_size} is not divisible by "
            f"num_attention_heads {c.num_attention_heads}"
        )
    if not c.max_video_len + 4 <= c.max_len <= c.max_position_embeddings:
        raise ValueError(
            f"config: max_len is {c.max_len}, wanted {c.max_video_len + 4} (max_video_len"
            f" and 4) up to max_position_embeddings {c.max_position_embeddings}"
        )
    for name in ("pad", "unk", "cls", "sep", "mask"):
        token = getattr(c, f"{name}_token_id")
        if not 0 <= token < c.vocab_size:
            raise ValueError(f"config: {name}_token_id is {token}, wanted 0..{c.vocab_size - 1}")
    shares = ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")
    for name in (*shares, "initializer_range"):
        if not 0 <= getattr(c, name) <= 1:
            raise ValueError(f"config: {name} is {getattr(c, name)}, wanted 0..1")
    if c.num_labels < 0:
        raise ValueError(f"config: num_labels is {c.num_labels}, wanted 0 or more")
    if c.labels and len(c.labels) != c.num_labels:
        raise ValueError(f"config: {len(c.labels)} labels, but num_labels {c.num_labels}")
    said = [x for x in (*c.labels, c.stage, c.task, c.data, c.split) if x != ""]
    if odd := [x for x in said if not is_words(x)]:
        raise ValueError(f"config: {shown(odd[0])} among labels, stage, task .. split: no words")
    if c.type_vocab_size < 2:
        raise ValueError("config: type_vocab_size is below 2: video and text need a row each")
