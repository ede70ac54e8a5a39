"""VLM: one BERT that reads video, text or both (Xu et al., Findings of ACL 2021, Figure 1).

    position   0      1 .. 32        33      34 ..               95
    token     [CLS]   v1 .. v32     [SEP]    t1 .. tn  [SEP] [PAD] ..       Eq. 2
    segment    0      0              0       1 ..

Sec. 3 and 4, to be read from top to bottom: a batch, attention masks (Figure 3), what VLM adds to
BERT (bert.py), the whole model: encoding, captions, both pre-training losses (whose sums are in
loss.py). Which tokens are hidden (sec. 3.2, 3.3, Figure 2) says data.hide; weights come and go
through weights.py.

    python vlm.py masks                 draws the six attention masks in the terminal (instantly)
    python vlm.py convert CHECKPOINT --bert BERT --out RUN      the authors' release as a run

Letters are sizes: `B` clips, `V` video tokens (one a second), `T` text tokens (word pieces and
their [SEP]), `L = 1+V+1+T` the whole sequence, `D` width, `H` heads, `E` width of the frozen video
features, `W` vocabulary, `K` labels, `N` real tokens of a batch (padding left out), `M` hidden, `P`
candidates; in Eq. 5-9 alone `V_` and `D` are the paper's sets V' and D, of video tokens and words.
Three words for what is often called "mask", all bool: `*_valid` is real, not padding; `*_hidden`
must be predicted; `attend (B, L, L)`: the row may look at the column.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from benchmarks import DataError
from bert import Bert, Layer, LookUp, VLMConfig, pad, square
from keep import run
from loss import LossSums, nce, nce_in_chunks
from weights import (
    LoadReport,
    convert,
    first_line,
    load_bert,
    load_mmpt,
    load_tokenizer,
    read_tensors,
    save_run,
    write_aside,
)

__all__ = [  # other files' and scripts' one address for the model
    "VLM", "Batch", "LoadReport", "LossSums", "VLMConfig", "attention_mask", "load_bert",
    "load_mmpt", "load_run", "load_tokenizer", "nce", "read_tensors", "run", "save_run",
    "write_aside",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------
# A batch


@dataclass
class Batch:
    """B clips. Pre-training hides tokens and fills three more fields, fine-tuning may give labels.

    video        (B, V, E) float: features as extracted, hidden ones too: the model zeroes them
    video_valid  (B, V) bool
    text         (B, T) int64: word pieces as the model reads them, then [SEP], then [PAD]
    text_valid   (B, T) bool: True up to and including [SEP]
    video_hidden (B, V) bool, text_hidden (B, T) bool: to be predicted; never padding, never [SEP]
    text_target  (B, T) int64: the original word pieces
    label        segmentation: (B, V) int64, 0..K-1; localization: (B, V, S) int64, 1 where second v
                 shows text s; -1 where nothing is asked. S texts may differ from B clips there.
    """

    video: Tensor
    video_valid: Tensor
    text: Tensor
    text_valid: Tensor
    video_hidden: Tensor | None = None
    text_hidden: Tensor | None = None
    text_target: Tensor | None = None
    label: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on another device."""
        return Batch(*(x if x is None else x.to(device, non_blocking=True) for x in self.fields()))

    def pin_memory(self) -> "Batch":
        """Return the same batch in memory that a GPU reads while the CPU goes on."""
        return Batch(*(x if x is None else x.pin_memory() for x in self.fields()))

    def fields(self) -> list[Tensor | None]:
        """List the eight tensors in the order above."""
        return [getattr(self, f.name) for f in dataclasses.fields(self)]


# ---------------------------------------------------------------------------------------------
# Attention masks (Figure 3): one isolated mask used four ways, one triangle, one full square

# DEVIATION: sec. 4.2-4.4 put a dummy token beside a lone modality. It stands in the other square,
# which nobody of this one looks at: encode_video and encode_text leave it out (footnote 2).
ISOLATED = ("retrieval", "segmentation", "localization", "qa")
KINDS = ("full", *ISOLATED, "captioning")


def attention_mask(kind: str, video_valid: Tensor, text_valid: Tensor) -> Tensor:
    """Say which token may look at which (Figure 3, sec. 4.1-4.5).

    Args:    kind: one of KINDS. video_valid (B, V), text_valid (B, T): bool, True = real token.
    Returns: attend (B, L, L) bool over [CLS] v.. [SEP] t.. [SEP]: the row may look at the column.
             A padded row looks at itself alone, so that no row is empty and no softmax is NaN.
    Raises:  ValueError for an unknown kind or when the two disagree on B.

    >>> one = torch.ones(1, 1, dtype=torch.bool)
    >>> attention_mask("captioning", one, one)[0].int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    if kind not in KINDS:
        raise ValueError(f"attention mask {kind!r} is unknown: choose one of {', '.join(KINDS)}")
    if len(video_valid) != len(text_valid):
        raise ValueError(f"{len(video_valid)} clips of video but {len(text_valid)} of text")
    one = video_valid.new_ones(len(video_valid), 1)
    no_video, no_text = torch.zeros_like(video_valid), torch.zeros_like(text_valid)
    cls = torch.cat([one, no_video, ~one, no_text], 1)  # (B, L) each: which token belongs to whom
    video = torch.cat([~one, video_valid, one, no_text], 1)  # v.. and their [SEP]
    text = torch.cat([~one, no_video, ~one, text_valid], 1)  # t.. and their [SEP]

    if kind == "full":
        return square(cls | video | text)
    if kind == "captioning":  # text is generated: it sees the video and the words before it
        before = square(text).tril()
        return square(cls | video) | (text[:, :, None] & (cls | video)[:, None, :]) | before
    # isolated: two squares; [CLS] would join them, so it stands alone
    return square(video) | square(text)


# ---------------------------------------------------------------------------------------------
# What VLM adds to BERT


class VideoMLP(nn.Module):
    """x_v = MLP(feature) (Eq. 1): the only part of VLM that BERT's weights do not fill."""

    def __init__(self, c: VLMConfig):
        super().__init__()
        self.linear1 = nn.Linear(c.video_dim, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, 1e-5)  # the release's; all others 1e-12
        self.linear2 = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, feature: Tensor) -> Tensor:
        """feature (N, E) -> x_v (N, D)."""
        return self.linear2(self.LayerNorm(F.gelu(self.linear1(feature))))


class PredictionHead(nn.Module):
    """Eq. 4, shared by video and text: BERT's own head, e = LayerNorm(gelu(W h + b)).

    DEVIATION: the paper writes a linear projection, e = W h + b; the release has BERT's.
    """

    def __init__(self, c: VLMConfig):
        super().__init__()
        D = c.hidden_size
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(D, D), "LayerNorm": nn.LayerNorm(D, c.layer_norm_eps)}
        )
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))  # MLM and captioning only, not Eq. 9

    def forward(self, h: Tensor) -> Tensor:
        """h (M, D) -> predicted token embeddings e (M, D)."""
        return self.transform["LayerNorm"](F.gelu(self.transform["dense"](h)))


# ---------------------------------------------------------------------------------------------
# Beam search (sec. 4.5)


class Beams:
    """The hypotheses of B clips, of which the best `beams` go on; knows words, no model.

    words (B, k, t) int64, score (B, k): k open hypotheses a clip, sums of log-probabilities.
    """

    def __init__(self, B: int, beams: int, sep: int, device):
        self.beams, self.sep = beams, sep
        self.words = torch.zeros(B, 1, 0, dtype=torch.long, device=device)
        self.score = torch.zeros(B, 1, device=device)
        self.done: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]

    def grow(self, logp: Tensor) -> Tensor:
        """Give every open hypothesis a next word, and keep the best: which one each grew from.

        Args:    logp (B, k, W): log-probabilities of the next word piece.
        Returns: origin (B, k'), 0..k-1.
        """
        total = (self.score[:, :, None] + logp).flatten(1)  # (B, k W)
        # Of 2 x beams continuations at most k <= beams end, so `beams` that go on are there.
        best, index = total.topk(min(2 * self.beams, total.shape[1]))
        origin, token = index // logp.shape[2], index % logp.shape[2]
        ends = token == self.sep
        for b, rank in (ends & (best > -math.inf)).nonzero().tolist():
            if rank < self.beams and len(self.done[b]) < self.beams:
                text = self.words[b, origin[b, rank]].tolist()
                self.done[b].append((float(best[b, rank]) / (len(text) + 1), text))
        self.score, keep = best.masked_fill(ends, -math.inf).topk(min(self.beams, best.shape[1]))
        origin, token = origin.gather(1, keep), token.gather(1, keep)
        clip = torch.arange(len(logp), device=logp.device)[:, None]
        self.words = torch.cat([self.words[clip, origin], token[:, :, None]], 2)
        return origin

    def over(self) -> bool:
        """Say whether every clip has `beams` hypotheses that ended."""
        return all(len(d) == self.beams for d in self.done)

    def best(self) -> list[list[int]]:
        """Return each clip's words of the highest score a word, [SEP] counted."""
        return [max(d, key=lambda found: found[0])[1] for d in self.done]


# ---------------------------------------------------------------------------------------------
# The model


class VLM(nn.Module):
    """One encoder for video, text or both (sec. 3.1); only the attention mask differs by task.

    Every method takes any B, any device, V up to max_video_len (video alone: any) and T up to
    max_text_len. Padding may stand on the right of either side, as much as there is room for, and
    changes no result.
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.videomlp = VideoMLP(config)
        self.cls = nn.ModuleDict({"predictions": PredictionHead(config)})
        K = config.num_labels
        self.classifier = nn.Linear(config.hidden_size, K) if K else None
        # Means of embed_video and embed_text over training clips (eval.set_means): centred cosine.
        self.register_buffer("video_mean", torch.zeros(config.hidden_size))
        self.register_buffer("text_mean", torch.zeros(config.hidden_size))
        self.nce = None  # a compiled one, see compile_parts
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """Draw weights as BERT does: normal, 0.02 wide; biases 0; LayerNorm 1."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def set_dropout(self, p: float) -> None:
        """Change hidden and attention dropout to p, in 0..1, from now on and in the config."""
        self.config.hidden_dropout_prob = self.config.attention_probs_dropout_prob = p
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif isinstance(module, Layer):
                module.attention_dropout = p

    def compile_parts(self) -> None:
        """Compile what takes the time of a step, layers and Eq. 9, for any number of tokens."""
        self.bert.compile_layers()
        self.nce = torch.compile(nce, dynamic=True)

    # -- inputs ------------------------------------------------------------------------------

    def video_tokens(self, video: Tensor, valid: Tensor, hidden: Tensor | None = None):
        """Turn features into video tokens (Eq. 1), each real second through the MLP once.

        Args:    video (B, V, E); valid (B, V) bool; hidden (B, V) bool, inside valid, or None.
        Returns: x (B, V, D): what the encoder reads, a hidden second as MLP(0) (sec. 3.2);
                 own (N, D): MLP of every real second's own feature, hidden or not, packed.
        Raises:  ValueError for features of another width or a clip that is too long.
        """
        c = self.config
        if video.ndim != 3 or video.shape[:2] != valid.shape or video.shape[2] != c.video_dim:
            raise ValueError(
                f"video is {tuple(video.shape)} with video_valid {tuple(valid.shape)}, wanted "
                f"(B, V, {c.video_dim}) and (B, V): video_dim of this model is {c.video_dim}"
            )
        if video.shape[1] > c.max_video_len:
            raise ValueError(
                f"video is {video.shape[1]} seconds long, at most {c.max_video_len} fit: "
                "cut it (encode_video alone reads longer ones, in windows)"
            )
        rows = valid.flatten().nonzero()[:, 0]
        own = self.videomlp(
            video.flatten(0, 1).index_select(0, rows).to(self.videomlp.linear1.weight)
        )
        x = own
        if hidden is not None:
            blank = self.videomlp(own.new_zeros(1, c.video_dim))
            x = torch.where(hidden.flatten()[rows, None], blank, own)
        return pad(x, rows, *valid.shape), own

    def word_tokens(self, ids: Tensor) -> Tensor:
        """Look word pieces up: ids (B, T) int64 -> (B, T, D); ValueError outside 0..W-1."""
        return self.words_and_table(ids)[0]

    def words_and_table(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Look word pieces up, and lend the table to predict from: ids (B, T) int64 -> (B, T, D),
        and D (W, D). Raises: ValueError for an id outside 0..W-1.
        """
        table = self.bert.embeddings["word_embeddings"].weight
        if ids.device.type == "cpu" and ids.numel():  # elsewhere the look would stall the device
            low, high = ids.min().item(), ids.max().item()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"text holds ids {low}..{high}, vocab_size is {self.config.vocab_size}: "
                    "was it encoded by another tokenizer?"
                )
        if ids.device.type == "cpu":  # on a GPU LookUp would add up in any order
            return LookUp.apply(ids, table)
        return F.embedding(ids, table), table

    def special(self, token_id: int, B: int) -> Tensor:
        """Return the embedding of one special token for every clip: (B, 1, D)."""
        device = self.videomlp.linear1.weight.device
        return self.word_tokens(torch.full((B, 1), token_id, device=device))

    def places(self, V: int, T: int, device) -> tuple[Tensor, Tensor]:
        """Return position and segment ids (L,) of [CLS] v.. [SEP] t..: fixed, whatever V is.

        Raises: ValueError for a text that does not fit.
        """
        sep = self.config.max_video_len + 1
        if T > self.config.max_text_len:
            raise ValueError(
                f"text is {T} tokens long with its [SEP], at most {self.config.max_text_len} fit"
            )
        positions = [*range(V + 1), sep, *range(sep + 1, sep + 1 + T)]
        segments = [0] * (V + 2) + [1] * T
        return torch.tensor(positions, device=device), torch.tensor(segments, device=device)

    def join(
        self, x_video: Tensor, batch: Batch, kind: str,
        asked: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Encode [CLS] v.. [SEP] t.. [SEP] (Eq. 2-3) of x_video (B, V, D) and text.

        asked: which seconds (B, V) and words (B, T), bool, are to be read alone of h; None: all.
        Returns: h (B, L, D), and the table of words D (W, D), to predict from.
        """
        B, V, c = *x_video.shape[:2], self.config
        special = batch.text.new_tensor([c.cls_token_id, c.sep_token_id]).expand(B, 2)
        # one look-up for all: each has a gradient as large as the vocabulary
        words, D = self.words_and_table(torch.cat([special, batch.text], 1))  # (B, 2+T, D)
        cls, sep, x_text = words[:, :1], words[:, 1:2], words[:, 2:]
        x = torch.cat([cls, x_video.to(cls), sep, x_text], 1)
        one = batch.video_valid.new_ones(B, 1)
        real = torch.cat([one, batch.video_valid, one, batch.text_valid], 1)
        valid = batch.video_valid, batch.text_valid
        attend = None if kind == "full" else attention_mask(kind, *valid)  # None: all real ones
        if asked is not None:
            asked = torch.cat([~one, asked[0], ~one, asked[1]], 1)
        places = self.places(V, x_text.shape[1], x.device)
        return self.bert(x, *places, real, attend, asked=asked), D

    # -- encode ------------------------------------------------------------------------------

    def forward(self, batch: Batch, kind: str = "full") -> Tensor:
        """Encode clips in one pass under one of the six attention masks (Eq. 2-3, Figure 3).

        Returns: h (B, L, D) of [CLS] v.. [SEP] t.. [SEP], zeros at padding.
        """
        x, _ = self.video_tokens(batch.video, batch.video_valid, batch.video_hidden)
        return self.join(x, batch, kind)[0]

    def encode_video(self, video: Tensor, video_valid: Tensor, stride: int | None = None) -> Tensor:
        """Encode video alone: the isolated mask's first square (footnote 2), without text.

        A video longer than max_video_len is read in windows of that length, one every `stride`
        seconds (sec. 5.1.2: 32 and 16; default half a window), and a second's states are averaged
        where windows overlap. What is linear in a state, a label's logit or the dot product with a
        text, is thereby averaged too. The last window may be shorter; no other is.

        Args:    video (B, V, E), one feature a second, of any length; video_valid (B, V).
        Returns: (B, V+1, D): v.. and their [SEP] in the last place; zeros at padding.
        Raises:  ValueError for a wrong shape, or a stride outside 1..max_video_len.
        """
        (B, V), stride = video_valid.shape, self.window_stride(stride)
        if V > self.config.max_video_len:
            return self.encode_windows(video, video_valid, stride)
        x, _ = self.video_tokens(video, video_valid)
        sep = self.special(self.config.sep_token_id, B)
        position, segment = (place[1:] for place in self.places(V, 0, x.device))  # no [CLS]
        real = torch.cat([video_valid, video_valid.new_ones(B, 1)], 1)
        return self.bert(torch.cat([x.to(sep), sep], 1), position, segment, real)

    def window_stride(self, stride: int | None) -> int:
        """Return the seconds from one window to the next, half a window for None; or ValueError."""
        longest = self.config.max_video_len
        stride = max(1, longest // 2) if stride is None else stride
        if not 1 <= stride <= longest:
            raise ValueError(
                f"stride is {stride}, wanted 1..{longest}: every second must be in a window"
            )
        return stride

    def encode_windows(self, video: Tensor, video_valid: Tensor, stride: int) -> Tensor:
        """Read V > max_video_len seconds for `encode_video`: (B, V, E), (B, V) -> (B, V+1, D)."""
        (B, V), longest = video_valid.shape, self.config.max_video_len
        n = 1 + -(-(V - longest) // stride)  # windows
        extra = (n - 1) * stride + longest - V
        video, valid = F.pad(video, (0, 0, 0, extra)), F.pad(video_valid, (0, extra))
        seconds = (torch.arange(V, device=valid.device) + 1).mul(video_valid).amax(1)  # (B,)
        begin = stride * torch.arange(n, device=valid.device)
        # a window is used if the one before it did not reach the clip's end, padding left out
        used = (begin + longest - stride < seconds[:, None]) | (begin == 0)  # (B, n)
        valid = valid.unfold(1, longest, stride) & used[:, :, None]  # (B, n, longest)
        windows = video.unfold(1, longest, stride).transpose(2, 3)  # (B, n, longest, E)
        h = self.encode_video(windows.flatten(0, 1), valid.flatten(0, 1))
        h = h.view(B, n, longest + 1, -1)
        place = (begin[:, None] + torch.arange(longest, device=begin.device)).flatten()
        total = h.new_zeros(B, V + extra, h.shape[3])
        total = total.index_add(1, place, h[:, :, :longest].flatten(1, 2))
        times = h.new_zeros(B, V + extra).index_add(1, place, valid.flatten(1).to(h))
        sep = (h[:, :, longest] * used[:, :, None]).sum(1) / used.sum(1, keepdim=True)
        return torch.cat([(total / times.clamp(min=1)[:, :, None])[:, :V], sep[:, None]], 1)

    def encode_text(self, text: Tensor, text_valid: Tensor) -> Tensor:
        """Encode text alone: the isolated mask's second square (footnote 2), without video.

        Args:    text (B, T) int64 word pieces, then [SEP], then [PAD]; text_valid (B, T) bool.
        Returns: (B, T, D), the [SEP] included; zeros at padding.
        """
        x = self.word_tokens(text)
        position, segment = (place[2:] for place in self.places(0, text.shape[1], x.device))
        return self.bert(x, position, segment, text_valid)

    def embed_video(self, video: Tensor, video_valid: Tensor) -> Tensor:
        """Average a video's real tokens and its [SEP] (sec. 4.1): (B, V, E), (B, V) -> (B, D)."""
        h = self.encode_video(video, video_valid)
        return h.sum(1) / (video_valid.sum(1, keepdim=True) + 1)

    def embed_text(self, text: Tensor, text_valid: Tensor) -> Tensor:
        """Average a text's real word pieces and its [SEP] (sec. 4.1): (B, T), (B, T) -> (B, D)."""
        h = self.encode_text(text, text_valid)
        return h.sum(1) / text_valid.sum(1, keepdim=True).clamp(min=1)

    def segment(self, video: Tensor, video_valid: Tensor, stride: int | None = None) -> Tensor:
        """Give each second its label logits (sec. 4.2): (B, V, E), (B, V) -> (B, V, K).

        Videos of any length: a second's logits are averaged over the windows that hold it, one
        every `stride` seconds, as `encode_video` has them.
        Raises: ValueError without a classifier (num_labels 0).
        """
        if not self.config.num_labels:
            raise ValueError("this model has num_labels 0: fine-tune it for segmentation first")
        return self.classifier(self.encode_video(video, video_valid, stride)[:, :-1])

    def set_labels(self, labels: list[str]) -> None:
        """Give the model an untrained classifier (sec. 4.2) for label ids, background first."""
        self.config.labels, self.config.num_labels = list(labels), len(labels)
        if not labels:
            self.classifier = None
            return
        weight = self.videomlp.linear1.weight
        self.classifier = nn.Linear(self.config.hidden_size, len(labels)).to(weight)
        self._init(self.classifier)

    def word_logits(self, h: Tensor) -> Tensor:
        """Score the vocabulary as BERT's MLM head does: h (..., D) -> (..., W) logits."""
        head = self.cls["predictions"]
        return F.linear(head(h), self.bert.embeddings["word_embeddings"].weight, head.bias)

    # -- captioning (sec. 4.5) ---------------------------------------------------------------

    def caption_loss(self, batch: Batch, at_once: int | None = None) -> LossSums:
        """Predict each word of the text from the video and the words before it (sec. 4.5).

        The decoder is BERT under the `captioning` mask: it reads [CLS] t1 .. tn in the text's
        places and predicts t1 .. tn [SEP] with BERT's MLM head.

        Args:    batch: text (B, T) is t1 .. tn [SEP]. at_once: logits held at a time.
        Returns: text_sum in nats over text_count word pieces, each text's [SEP] among them.
        """
        V = batch.video.shape[1]
        start = torch.full_like(batch.text[:, :1], self.config.cls_token_id)
        shifted = torch.cat([start, batch.text[:, :-1]], 1)
        x, _ = self.video_tokens(batch.video, batch.video_valid, batch.video_hidden)
        asked = torch.zeros_like(batch.video_valid), batch.text_valid
        h, D = self.join(x, dataclasses.replace(batch, text=shifted), "captioning", asked)
        head, h = self.cls["predictions"], h[:, V + 2 :]  # (B, T, D)
        e, target = head(h[batch.text_valid]), batch.text[batch.text_valid]
        text_sum = nce_in_chunks(e, [D], None, target, head.bias, at_once, self.nce).sum()
        count, zero = batch.text_valid.sum(), text_sum.new_zeros(())
        return LossSums(zero, count.new_zeros(()), text_sum, count, 0.0, math.log(len(D)), True)

    def remember(self, video: Tensor, video_valid: Tensor) -> tuple[list[list[Tensor]], Tensor]:
        """Read the video once for `generate`: [CLS] v.. [SEP] never look at the text.

        Args:    video (B, V, E), video_valid (B, V).
        Returns: each layer's [keys, values], (B, H, V+2, D/H); real (B, V+2).
        """
        (B, V), c = video_valid.shape, self.config
        x, _ = self.video_tokens(video, video_valid)
        cls, sep = self.special(c.cls_token_id, B), self.special(c.sep_token_id, B)
        one = video_valid.new_ones(B, 1)
        real = torch.cat([one, video_valid, one], 1)
        past = [[] for _ in self.bert.encoder["layer"]]
        x = torch.cat([cls, x.to(cls), sep], 1)
        self.bert(x, *self.places(V, 0, x.device), real, square(real), past)
        return past, real

    @torch.no_grad()
    def generate(
        self, video: Tensor, video_valid: Tensor, beams: int = 5, max_new_tokens: int = 24
    ) -> list[list[int]]:
        """Caption clips by beam search (sec. 4.5); `beams=1` is greedy search.

        A hypothesis scores the sum of its log-probabilities over its length with [SEP]. In each
        step all continuations of a clip's open hypotheses are ranked by that sum: those among the
        first `beams` that end in [SEP] are done, the best `beams` of the others go on. A clip is
        done with `beams` hypotheses, or when all have `max_new_tokens` pieces and must end.
        DEVIATION: the authors' limit of 24, and their divisor, count three prompt ids too.

        Args:    video (B, V, E), V <= max_video_len; video_valid (B, V).
        Returns: each clip's word pieces, at most max_new_tokens, no special token among them.
        Raises:  ValueError for beams below 1 or max_new_tokens outside 1..max_text_len - 1.
        """
        c, B, device = self.config, len(video), video.device
        if beams < 1 or not 1 <= max_new_tokens < c.max_text_len:
            raise ValueError(
                f"beams {beams} and max_new_tokens {max_new_tokens}: wanted at least 1, and "
                f"1..{c.max_text_len - 1}"
            )
        past, real = self.remember(video, video_valid)
        banned = torch.zeros(c.vocab_size, device=device)
        banned[[c.pad_token_id, c.unk_token_id, c.cls_token_id, c.mask_token_id]] = -math.inf
        must_end = torch.full_like(banned, -math.inf)
        must_end[c.sep_token_id] = 0
        search = Beams(B, beams, c.sep_token_id, device)
        last = torch.full((B, 1), c.cls_token_id, device=device)  # (B, k): each one's last word
        clip = torch.arange(B, device=device)[:, None]
        # A clip's hypotheses are k queries that share its cache; which keys are its own ancestors'
        # is a mask, so that choosing among beams moves no key and no value.
        attend = real[:, None, :]  # (B, k, V + 2 + all text tokens so far)
        for t in range(max_new_tokens + 1):
            k = last.shape[1]
            itself = torch.eye(k, dtype=torch.bool, device=device).expand(B, k, k)
            attend = torch.cat([attend, itself], 2)
            place = torch.full((k,), c.max_video_len + 2 + t, device=device)
            real = torch.ones(B, k, dtype=torch.bool, device=device)
            x = self.word_tokens(last)
            h = self.bert(x, place, torch.ones_like(place), real, attend, past)  # (B, k, D)
            logp = self.word_logits(h).float().log_softmax(2) + banned  # (B, k, W)
            origin = search.grow(logp + must_end if t == max_new_tokens else logp)
            if search.over():
                break
            last, attend = search.words[:, :, -1], attend[clip, origin]
        return search.best()

    # -- pre-training ------------------------------------------------------------------------

    def pretrain_loss(
        self,
        batch: Batch,
        loss: str = "vlm",
        gather: Callable[[Tensor], Tensor] | None = None,
        at_once: int | None = None,
    ) -> LossSums:
        """Predict hidden tokens: masked token loss (Eq. 8-9) or MFM-MLM (Eq. 5-7).

        Args:    batch: with its three pre-training fields. loss: "vlm" or "mfm-mlm".
                 gather: joins the rows (P, D) of all ranks, gradients included; None on one rank.
                 at_once: logits held at a time; changes memory, not the result.
        Returns: sums and counts over this rank's hidden tokens.
        Raises:  ValueError for an unknown loss or a batch without hidden fields.
        """
        if loss not in ("vlm", "mfm-mlm"):
            raise ValueError(f"loss is {loss!r}, wanted 'vlm' or 'mfm-mlm'")
        if batch.video_hidden is None or batch.text_hidden is None or batch.text_target is None:
            raise ValueError("the batch hides nothing: set video_hidden, text_hidden, text_target")
        video_hidden = batch.video_hidden & batch.video_valid  # padding is never predicted
        text_hidden = batch.text_hidden & batch.text_valid
        V = batch.video.shape[1]
        x_masked, own = self.video_tokens(batch.video, batch.video_valid, video_hidden)
        hidden = video_hidden[batch.video_valid]
        x_video = own[hidden]  # (M_v, D): targets
        x_text = batch.text_target[text_hidden]  # (M_t,): targets, as rows of D
        # V': un-hidden video tokens of the whole batch. DEVIATION: all ranks'; theirs are one GPU's
        V_ = own[~hidden]
        # Before Eq. 3, for nonzero, and the count of others' rows, make the CPU wait for all that a
        # GPU was given.
        V_ = V_ if gather is None else gather(V_)
        at_video, at_text = (x.nonzero(as_tuple=True) for x in (video_hidden, text_hidden))
        h, D = self.join(x_masked, batch, "full", (video_hidden, text_hidden))  # Eq. 3
        head = self.cls["predictions"]
        e_video = head(h[:, 1 : V + 1][at_video])  # (M_v, D)  Eq. 4, hidden tokens only
        e_text = head(h[:, V + 2 :][at_text])  # (M_t, D)
        if loss == "vlm":  # Eq. 8-9: one pool V' + D for both kinds, no biases
            e = torch.cat([e_video, e_text])
            losses = nce_in_chunks(e, [V_, D], x_video, x_text, at_once=at_once, compiled=self.nce)
            video, text = losses.split([len(e_video), len(e_text)])
            candidates = len(V_) + len(D) + 1, len(V_) + len(D)
        else:  # Eq. 5-6 for video, BERT's own cross-entropy for words
            video = nce_in_chunks(e_video, [V_], x_video, at_once=at_once, compiled=self.nce)
            text = nce_in_chunks(e_text, [D], None, x_text, head.bias, at_once, self.nce)
            candidates = len(V_) + 1, len(D)
        counts = video_hidden.sum(), text_hidden.sum()
        chances = (math.log(n) for n in candidates)
        sums = video.sum(), counts[0], text.sum(), counts[1]
        return LossSums(*sums, *chances, joint=loss == "vlm")


def load_run(path: str | Path, device: str = "cpu") -> tuple[VLM, Tokenizer]:
    """Open a run directory: every tensor must be there and fit.

    Returns: (model in eval mode, tokenizer); `model.config.stage` says what the weights are.
    Raises:  ValueError naming the file and the tensor.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise DataError(
            f"{path}: no run here (config.json is missing): train one with train.py or finetune.py"
        )
    config, weights = VLMConfig.from_json(path / "config.json"), path / "model.safetensors"
    tensors = read_tensors(weights)
    if not any(name.startswith("videomlp.") for name in tensors):
        raise DataError(f"{path} holds a BERT, not a run: train.py and finetune.py have --bert")
    with torch.device("meta"):  # sizes first: nothing is made room for that the file does not hold
        ours = VLM(config).state_dict()
    odd = [k for k in sorted({*tensors, *ours}) if k not in tensors or k not in ours]
    odd += [k for k in ours if k in tensors and tensors[k].shape != ours[k].shape]
    if odd:
        raise DataError(f"{path}: {len(odd)} tensors do not fit config.json, first {odd[0]}")
    if odd := [k for k, x in tensors.items() if not x.isfinite().all()]:
        raise DataError(f"{weights}: {odd[0]} holds NaN or infinity")
    tokenizer, model = load_tokenizer(path), VLM(config)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise DataError(f"{path}: tokenizer.json has {tokenizer.get_vocab_size()} word pieces, "
                        f"config.json {config.vocab_size}")  # fmt: skip
    model.load_state_dict(tensors)
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device}: {first_line(error)}") from None


# ---------------------------------------------------------------------------------------------
# python vlm.py masks


def main(argv: list[str] | None = None) -> None:
    """Run one of this file's small commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "draw the six masks (Figure 3, and the full one)"
    a = commands.add_parser("masks", allow_abbrev=False, help=about, description=about,
                            epilog="example: python vlm.py masks", formatter_class=raw)  # fmt: skip
    how = "video tokens, one a second (default: 4)"
    a.add_argument("--video", type=int, default=4, metavar="N", help=how)
    how = "text tokens with their [SEP] (default: 4)"
    a.add_argument("--text", type=int, default=4, metavar="N", help=how)
    about = "turn the authors' fairseq checkpoint into a run"
    a = commands.add_parser(
        "convert", allow_abbrev=False, help=about, description=about, formatter_class=raw,
        epilog="example:\n  python vlm.py convert checkpoint_best.pt --bert bert-base-uncased "
               "--out RUN",
    )  # fmt: skip
    a.add_argument("checkpoint", type=Path, help="checkpoint_best.pt, as released")
    a.add_argument("--out", type=Path, required=True, metavar="RUN", help="a new run directory")
    how = "folder or file of its vocabulary, vocab.txt or tokenizer.json: bert-base-uncased's "
    how += "(default: none, and one is to be copied into RUN)"
    a.add_argument("--bert", metavar="DIR", help=how)
    a.add_argument("--heads", type=int, metavar="N", help="attention heads (default: width / 64)")
    args = parser.parse_args(argv)
    if args.command == "convert":
        make = lambda sizes: VLM(VLMConfig(**sizes))  # noqa: E731
        return convert(make, args.checkpoint, args.out, args.bert, args.heads)
    if not (0 <= args.video <= 100 and 1 <= args.text <= 100):
        raise ValueError(f"--video {args.video} --text {args.text}: wanted 0..100 and 1..100")
    from pictures import draw_mask  # which imports this file

    print("\n\n".join(draw_mask(kind, args.video, args.text) for kind in KINDS))


if __name__ == "__main__":
    run(main)
