"""Small models and batches, for all tests of vlm.py, bert.py and weights.py.

Sizes differ from one another (B=3, V=5, T=7, E=10, D=12 ..), so that a swapped axis has no place
to hide. Features at padding are NaN in every test: one read would poison the result. Weights are
ten times as wide as BERT's, LayerNorms and biases included, so that nothing is 0 or 1 by luck.
"""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from vlm import VLM, Batch, VLMConfig

PAD, UNK, CLS, SEP, MASK, FIRST_WORD, W = 0, 1, 2, 3, 4, 5, 41
B, V, T, L = 3, 5, 7, 1 + 5 + 1 + 7
SEP_PLACE = 10  # max_video_len + 1: where the video's [SEP] stands, and text one further
LOSSES = ("vlm", "mfm-mlm")


def tiny_config(**changes) -> VLMConfig:
    """Build a config of mutually different sizes, without dropout."""
    sizes = dict(
        vocab_size=W,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=23,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        unk_token_id=UNK,
        cls_token_id=CLS,
        sep_token_id=SEP,
        mask_token_id=MASK,
        video_dim=10,
        max_video_len=SEP_PLACE - 1,
        max_len=20,
    )
    return VLMConfig(**sizes | changes)


def shake(module: torch.nn.Module) -> None:
    """Move every parameter by 0.2, so that no LayerNorm is 1 and no bias 0."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn_like(p)


def tiny_model(seed: int = 0, dtype=torch.float64, **changes) -> VLM:
    """Build a model whose every parameter is random."""
    torch.manual_seed(seed)
    model = VLM(tiny_config(**changes))
    shake(model)
    return model.to(dtype).eval()


def random_batch(seed: int = 0, B: int = B, V: int = V, T: int = T) -> Batch:
    """Draw ragged clips, NaN at video padding; 40 % hidden, some of either kind for sure."""
    g = torch.Generator().manual_seed(seed)
    n_video, n_text = torch.randint(1, V, (B,), generator=g), torch.randint(3, T, (B,), generator=g)
    n_video[0], n_text[-1] = V, T
    video_valid = torch.arange(V) < n_video[:, None]
    text_valid = torch.arange(T) < n_text[:, None]
    words = torch.arange(T) < n_text[:, None] - 1
    text = torch.randint(FIRST_WORD, W, (B, T), generator=g).where(words, PAD)
    text[torch.arange(B), n_text - 1] = SEP
    video = torch.randn(B, V, 10, generator=g).where(video_valid[..., None], torch.nan)
    video_hidden = (torch.rand(B, V, generator=g) < 0.4) & video_valid
    text_hidden = (torch.rand(B, T, generator=g) < 0.4) & words
    video_hidden[0, :2], text_hidden[-1, :2] = torch.tensor([True, False]), True
    return hide(Batch(video, video_valid, text, text_valid), video_hidden, text_hidden)


def hide(batch: Batch, video_hidden=None, text_hidden=None) -> Batch:
    """Hide these tokens and no others: None hides nothing of that kind."""
    text = batch.text if batch.text_target is None else batch.text_target
    if video_hidden is None:
        video_hidden = torch.zeros_like(batch.video_valid)
    if text_hidden is None:
        text_hidden = torch.zeros_like(batch.text_valid)
    masked = text.masked_fill(text_hidden, MASK)
    return Batch(
        batch.video, batch.video_valid, masked, batch.text_valid, video_hidden, text_hidden, text
    )


def clips(batch: Batch, index) -> Batch:
    """Take some clips of a batch, in this order."""
    return Batch(*(x if x is None else x[index] for x in batch.fields()))


def pad_right(batch: Batch, video: int, text: int) -> Batch:
    """Add padding on both sides: NaN seconds and, to see whether they are read, real words."""
    add = torch.nn.functional.pad
    return Batch(
        add(batch.video, (0, 0, 0, video), value=torch.nan),
        add(batch.video_valid, (0, video)),
        add(batch.text, (0, text), value=W - 1),
        add(batch.text_valid, (0, text)),
        add(batch.video_hidden, (0, video)),
        add(batch.text_hidden, (0, text)),
        add(batch.text_target, (0, text), value=W - 2),
    )


def real_places(batch: Batch) -> torch.Tensor:
    """Mark the real tokens of [CLS] v.. [SEP] t..: (B, L) bool."""
    one = torch.ones(len(batch.text), 1, dtype=torch.bool)
    return torch.cat([one, batch.video_valid, one, batch.text_valid], 1)


def gradients(value: torch.Tensor, model: VLM) -> list[torch.Tensor]:
    """Differentiate by every parameter, zeros for those that the value does not touch."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def value_and_gradients(model: VLM, batch: Batch, *args, **kwargs):
    """Run pretrain_loss and return [value, every gradient]."""
    value = model.pretrain_loss(batch, *args, **kwargs).value()
    return [value, *gradients(value, model)]


def same(actual, expected, tolerance: float) -> None:
    """Compare tensors or lists of them: |a - b| <= tolerance (1 + |b|)."""
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Count(TorchDispatchMode):
    """Count the new tensors of a shape that operations return."""

    def __init__(self, *shape: int):
        super().__init__()
        self.shape, self.seen = shape, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.shape == self.shape:
                self.seen.add(x.untyped_storage())  # kept: no two may lie in one place
        return out


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "stir", "the", "soup", "##s", "pan"]


def tiny_tokenizer() -> Tokenizer:
    """Build a WordPiece tokenizer with the special ids of tiny_config."""
    model = models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(PIECES[:5])
    return tokenizer
