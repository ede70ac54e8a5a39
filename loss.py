"""Noise contrastive estimation, the loss behind every prediction (Eq. 6 and 9), and its sums.

    pytest tests/test_loss.py           Eq. 9 worked by hand, Eq. 5-9 token by token

What is predicted from what, and among which candidates, says VLM.pretrain_loss (Eq. 5-9).

Letters: `D` width, `M` predictions (`M_v` of seconds, then `M_t` of words), `P` candidates. In
[V', D] alone V' and D are the paper's sets: un-hidden video tokens of all clips, and all words.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Logits held at a time, above which rows go chunk by chunk: 64 MiB on a CPU, where each chunk costs
# another gradient of D; on a GPU 1 GiB, which holds those of the paper's batch twice over.
LOGITS_AT_ONCE = {"cpu": 2**24, "other": 2**28}


def wide(x: Tensor) -> Tensor:
    """x, any shape -> x in fp32 or better, as large sums and dot products want it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_and_true(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (M, P) take log sum_j exp(x_j) of each row, (M,), and the last rows' own logits,
    at index (M_t,) int64: (M_t,).
    """
    total = logits.logsumexp(1)
    return total, logits[len(logits) - len(index) :].gather(1, index[:, None])[:, 0]


class SumAndTrue(torch.autograd.Function):
    """`sum_and_true`, whose gradient is written once, in one place of the logits' size, where
    PyTorch's own takes five and more: the most memory that a step takes is taken here.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """logits (M, P), index (M_t,) -> (M,), (M_t,)."""
        total, true = sum_and_true(logits, index)
        ctx.save_for_backward(logits, index, total)
        return total, true

    @staticmethod
    @once_differentiable
    def backward(ctx, by_total: Tensor, by_true: Tensor) -> tuple[Tensor, None]:
        """Gradients (M,), (M_t,) -> that of the logits (M, P): the softmax, and 1 at the truth."""
        logits, index, total = ctx.saved_tensors
        grad = (logits - total[:, None]).exp_().mul_(by_total[:, None])
        words = torch.arange(len(logits) - len(index), len(logits), device=index.device)
        grad[words, index] += by_true
        return grad, None


def nce(
    e: Tensor, pools: list[Tensor], own: Tensor | None = None, index: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Take -log [ exp(x_s.e_s) / (exp(x_s.e_s) + sum_j exp(x_j.e_s)) ] of each row (Eq. 6 and 9).

    Args:    e (M, D): predictions. pools: candidates x_j, (P, D) each, as [V', D]; a copy that
             joined them would cost as much as the sum. The true x_s of the first rows is own
             (M_v, D), each a candidate of its row alone; that of the others is row index (M_t,)
             int64 of the last pool. bias (P,) is added to the last pool's logits.
    Returns: (M,) nats, fp32 or better.

    >>> e, V_, D = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(2, 2)  # all look alike
    >>> round(float(nce(e, [V_, D], own=e).exp()))  # four candidates: the truth, V' and two words
    4
    """
    own = e[:0] if own is None else own
    logits = [wide(F.linear(e, x)) for x in pools]  # (M, P) each: x_j . e_s
    if bias is not None:
        logits[-1] = logits[-1] + bias
    # DEVIATION: the authors' words meet one more logit, 0, an artefact of how they pad two pools
    of_words = own.new_zeros(0, dtype=torch.long) if index is None else index
    take = sum_and_true if torch.compiler.is_compiling() else SumAndTrue.apply
    last, word = take(logits[-1], of_words)  # word: x_s . e_s of the rows that have an index
    # log of the sum over j; of torch.stack(..).logsumexp(0) PyTorch 2.13 compiles a wrong gradient
    total = functools.reduce(torch.logaddexp, [*(x.logsumexp(1) for x in logits[:-1]), last])
    true = (wide(own) * wide(e[: len(own)])).sum(1)  # x_s . e_s
    losses = torch.logaddexp(true, total[: len(own)]) - true
    if index is None:
        return losses
    # x_s and D without s are together D: exp(x_s.e_s) stands in the sum over j already
    return torch.cat([losses, total[len(own) :] - word])


def nce_in_chunks(
    e: Tensor, pools: list[Tensor], own: Tensor | None = None, index: Tensor | None = None,
    bias: Tensor | None = None, at_once: int | None = None, compiled: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Take `nce`, or `compiled`, of e (M, D), at most at_once logits or one row at a time: (M,).

    Args: own (M_v, D), index (M_t,), bias (P,): as there. at_once: LOGITS_AT_ONCE by default.

    Each chunk's logits are thrown away after its sum and computed again in backward.
    """
    at_once = at_once or LOGITS_AT_ONCE["cpu" if e.device.type == "cpu" else "other"]
    rows = max(1, at_once // max(1, sum(map(len, pools))))
    whole = compiled or nce
    if rows >= len(e):
        return whole(e, pools, own, index, bias)
    losses, M_v = [], 0 if own is None else len(own)
    for i in range(0, len(e), rows):
        first = None if own is None else own[i : i + rows]
        others = None if index is None else index[max(0, i - M_v) : max(0, i + rows - M_v)]
        again = dict(use_reentrant=False, preserve_rng_state=False)
        losses.append(checkpoint(whole, e[i : i + rows], pools, first, others, bias, **again))
    return torch.cat(losses)


@dataclass
class LossSums:
    """A pre-training loss as sums and counts, so that ranks and micro-batches divide by the whole.

    video_sum, text_sum: summed -log NCE of hidden tokens (nats); video_count, text_count: how many.
    video_chance, text_chance: log of the number of candidates, the loss of knowing nothing.
    """

    video_sum: Tensor
    video_count: Tensor
    text_sum: Tensor
    text_count: Tensor
    video_chance: float
    text_chance: float
    joint: bool  # True: one mean over both kinds (Eq. 8); False: the sum of two means (Eq. 7)

    def value(self, video_count: Tensor | None = None, text_count: Tensor | None = None) -> Tensor:
        """Divide by video_count, text_count, scalars () (default: this batch's own): nats a token.

        Nothing hidden: 0.
        """
        video = self.video_count if video_count is None else video_count
        text = self.text_count if text_count is None else text_count
        if self.joint:
            return (self.video_sum + self.text_sum) / (video + text).clamp(min=1)
        return self.video_sum / video.clamp(min=1) + self.text_sum / text.clamp(min=1)

    def chance(self) -> float:
        """Return `value()` of a model that finds all candidates equally likely."""
        video = self.video_count.double() * self.video_chance
        text = self.text_count.double() * self.text_chance
        return float(dataclasses.replace(self, video_sum=video, text_sum=text).value())

    def means(self) -> dict[str, float]:
        """Return the mean of each kind, and `value()`, which joins them: nats a token."""
        video = self.video_sum / self.video_count.clamp(min=1)
        text = self.text_sum / self.text_count.clamp(min=1)
        return {"video": float(video), "text": float(text), "loss": float(self.value())}
