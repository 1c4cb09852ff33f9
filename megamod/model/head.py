"""The head: from hidden states to log-probabilities or scores, the only place that knows how the vocabulary is sharded.

It takes the labelled rows only, multiplies in chunks and keeps three numbers a row, and of the logits no more than KEPT_BYTES, so logits
of the whole row, `[T, V/tp]`, never exist, unless every token of a row so short is labelled that they are fewer. Padded vocabulary
columns are left out of the product, which is to count them as -∞.
"""

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megamod.errors import MegamodError
from megamod.model.shape import Score, unnamed

CHUNK_BYTES = 256 << 20  # of logits at a time, in the accumulation's dtype
# Of the logits, what one question keeps for its backward, which saves that a product; all others are computed again. As it is a number of
# bytes, no row is too long and no vocabulary too large; 128 MiB hold those of 8 % of 2,048 positions and 152,064 columns in fp32.
KEPT_BYTES = 128 << 20
# Columns at a time on a CPU: few enough that their logits are still in its cache when they are asked for again; fewer still gain little
# on idle cores, and where other work shares them every operation is one more at which threads wait for each other.
CPU_COLUMNS = 8192


class Statistics(NamedTuple):
    """What one pass over the vocabulary gives at each labelled position, `[N]` each."""

    logprob: Tensor  # log p(id), in the shape of the ids
    logsumexp: Tensor  # log Σ_v exp z_v
    entropy: Tensor  # -Σ_v p_v log p_v


class Head:
    """Hidden states of one micro-batch and the vocabulary's weight.

    Args:
        hidden: `[T', 1, C]` or `[T', C]`, T' the positions of this rank: T/cp, and T/(cp·tp) with sequence parallelism.
        weight: `[V/tp, C]`, this rank's rows, padding included.
        vocab: V without padding.
        rows: `[N]` positions of the labelled tokens in this rank's T/cp.
        tp: the tensor-parallel group; None for a single process.
        sp: whether `hidden` is split over `tp` along T.
    """

    shared: ClassVar[bool] = True  # whether tensor-parallel ranks divide the product, so that each gets a part of hidden's gradient

    def __init__(
        self, hidden: Tensor, weight: Tensor, vocab: int, rows: Tensor, tp: dist.ProcessGroup | None = None, sp: bool = False
    ) -> None:
        self.weight, self.vocab, self.tp = weight, vocab, tp
        self._all, self._rows, self._sp = hidden, rows, sp
        shard = weight.shape[0]
        self.first = shard * (tp.rank() if tp is not None else 0)
        self.columns = max(0, min(shard, vocab - self.first))  # those that are not padding

    @classmethod
    def whole(cls, hidden: Tensor, weight: Tensor) -> "Head":
        """The head of a single process, on `[N, C]` labelled positions: the same loss in a notebook."""
        return cls(hidden, weight, len(weight), torch.arange(len(hidden), device=hidden.device))

    @cached_property
    def hidden(self) -> Tensor:
        """`[N, C]`: the labelled rows, the same on every tensor-parallel rank; where these divide what follows, gradients are summed."""
        with torch.enable_grad():  # it is kept: who asks first, and without a gradient, must not take it from the others
            x = self._all.reshape(-1, self._all.shape[-1])
            if self.tp is None or self.tp.size() == 1:
                return x[self._rows]
            if self._sp:  # backward: reduce-scatter; where every rank has the whole gradient, its own stretch of it
                return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=self.shared, group=self.tp)[self._rows]
            return copy_to_tensor_model_parallel_region(x[self._rows], group=self.tp) if self.shared else x[self._rows]

    def statistics(self, ids: Tensor) -> Statistics:
        """Log-probability of `ids` `[N]` or `[N, K]`, log-sum-exp and entropy, all from one pass; differentiable. At least fp32."""
        return Statistics(*self._statistics(ids, entropy=True))

    def logprobs(self, ids: Tensor) -> Tensor:
        """`[N]` log p(ids[i]) at the labelled positions; of ids `[N, K]`, K of them at each, `[N, K]`."""
        return self._statistics(ids, entropy=False)[0]

    def logsumexp(self) -> Tensor:
        """`[N]` log Σ exp z: what a z-loss (Chowdhery et al. 2022) squares."""
        return self._statistics(self._any_id(), entropy=False)[1]

    def entropy(self) -> Tensor:
        """`[N]` entropy of the next token's distribution, in nats."""
        return self.statistics(self._any_id()).entropy

    def mean_logit(self) -> Tensor:
        """`[N]` the mean of z over the vocabulary, so that less log Σ exp z it is that of log p. It costs no pass; differentiable."""
        total = self.weight[: self.columns].sum(0, dtype=_at_least_fp32(self.weight.dtype))  # [C]
        z = self.hidden.to(total.dtype) @ total / self.vocab
        return z if self.tp is None or self.tp.size() == 1 else reduce_from_tensor_model_parallel_region(z, group=self.tp)

    @torch.no_grad()
    def log_collision(self) -> Tensor:
        """`[N]` log Σ_v p_v², how likely two draws of the next token agree, without a gradient."""
        n = len(self.hidden)
        total = torch.full((n,), float("-inf"), dtype=_at_least_fp32(self.hidden.dtype), device=self.hidden.device)
        for block in _chunks(self.columns, self._width):
            z = (self.hidden @ self.weight[block].t()).to(total.dtype)
            total = torch.logaddexp(total, (2 * z).logsumexp(-1))
        if self.tp is not None and self.tp.size() > 1:
            total = gather_from_tensor_model_parallel_region(total[:, None], group=self.tp).logsumexp(-1)
        return total - 2 * self.logsumexp()

    def _statistics(self, ids: Tensor, entropy: bool) -> tuple[Any, ...]:
        """The fields of Statistics; without `entropy`, which costs passes over all logits, None in its place."""
        group = self.tp if self.tp is not None and self.tp.size() > 1 else None
        keep = KEPT_BYTES if torch.is_grad_enabled() else 0
        return _Vocabulary.apply(self.hidden, self.weight, ids, self.first, self.columns, self._width, group, entropy, keep)

    @torch.no_grad()
    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest log-probabilities (all V when k is larger) and their token ids, `[N, k]` each, without a gradient."""
        k = min(k, self.vocab)
        values, ids = self._largest(k)
        values, order = values.topk(k, dim=-1)
        return values - self.logsumexp()[:, None], ids.gather(-1, order)

    @torch.no_grad()
    def greedy(self) -> Tensor:
        """`[N]` the most probable token's id."""
        values, ids = self._largest(1)
        return torch.where(values == values.amax(-1, keepdim=True), ids, self.vocab).amin(-1)

    def _largest(self, k: int) -> tuple[Tensor, Tensor]:
        """`[N, k·tp]`: each tensor-parallel rank's k largest logits and their ids; a rank with fewer columns offers -∞."""
        here, w = min(k, self.columns), self.weight[: self.columns]
        n = len(self.hidden)
        values = torch.full((n, k), float("-inf"), dtype=_at_least_fp32(self.hidden.dtype), device=self.hidden.device)
        ids = torch.zeros(values.shape, dtype=torch.long, device=self.hidden.device)
        for part in _chunks(n if here else 0, self._chunk):
            values[part, :here], ids[part, :here] = (self.hidden[part] @ w.t()).to(values.dtype).topk(here, dim=-1)
        ids += self.first
        if self.tp is not None and self.tp.size() > 1:
            values, ids = (gather_from_tensor_model_parallel_region(x, group=self.tp) for x in (values, ids))
        return values, ids

    def logits(self) -> Tensor:
        """`[N, V]`, whole on every rank: the way out for what nothing above computes. It is large; differentiable."""
        z = (self.hidden @ self.weight.t()).to(_at_least_fp32(self.hidden.dtype))
        if self.tp is not None and self.tp.size() > 1:
            z = gather_from_tensor_model_parallel_region(z, group=self.tp)
        return z[:, : self.vocab]

    def scores(self) -> Tensor:
        """What a head of scores has instead of log-probabilities: see ScoreHead. Raises MegamodError."""
        raise MegamodError("this model's head is the vocabulary, which has no scores: set model.score for a head that has")

    def labels(self) -> tuple[str, ...]:
        """What the scores are called. Raises MegamodError."""
        raise MegamodError("this model's head is the vocabulary, which has no scores: set model.score for a head that has")

    @property
    def _chunk(self) -> int:
        """Rows whose logits, of all columns, are computed at a time."""
        return max(1, CHUNK_BYTES // (_at_least_fp32(self.hidden.dtype).itemsize * max(1, self.columns)))

    @property
    def _width(self) -> int:
        """Columns whose logits, of all rows, are computed at a time."""
        width = max(1, CHUNK_BYTES // (_at_least_fp32(self.hidden.dtype).itemsize * max(1, len(self._rows))))
        return min(width, CPU_COLUMNS) if self.hidden.device.type == "cpu" else width

    def _any_id(self) -> Tensor:
        return torch.zeros(len(self._rows), dtype=torch.long, device=self._rows.device)


class Scores(nn.Module):
    """The parameters of a head of scores: `weight` `[L, C]` and, where every token is scored, `bias` `[L]`; whole on every rank.

    Args:
        config: megatron-core's TransformerConfig, for C, the dtype and the device.
    """

    def __init__(self, config: Any, score: Score) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        count, like = len(score.labels), {"dtype": config.params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size, **like))
        self.bias = nn.Parameter(torch.empty(count, **like)) if score.every_token else None


class ScoreHead(Head):
    """The head of scores of one micro-batch: L numbers for each labelled position, computed alike on every tensor-parallel rank.

    Args:
        hidden: as in Head.
        weight: `[L, C]`.
        bias: `[L]`, of a head that scores every token.
        rows: as in Head; a classifier of whole texts has its labels at their last tokens.
        score: what the scores are called.
    """

    shared = False

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, score: Score, rows: Tensor, tp: dist.ProcessGroup | None = None,
        sp: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(hidden, weight, len(weight), rows, tp, sp)
        self.bias, self.score = bias, score

    @classmethod
    def whole(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, labels: tuple[str, ...] | None = None) -> "ScoreHead":
        """The head of a single process, on `[N, C]` labelled positions: the same loss in a notebook."""
        score = Score(labels or unnamed(len(weight)), "regression", every_token=bias is not None)
        return cls(hidden, weight, bias, score, torch.arange(len(hidden), device=hidden.device))

    def labels(self) -> tuple[str, ...]:
        """What the L scores are called."""
        return self.score.labels

    def scores(self) -> Tensor:
        """`[N, L]` at the labelled positions: x Wᵀ + b, multiplied in at least fp32, so that no score is rounded to bfloat16."""
        work = _at_least_fp32(self.hidden.dtype)
        z = self.hidden.to(work) @ self.weight.t().to(work)
        return z if self.bias is None else z + self.bias.to(work)


def _refusal(question: str) -> Callable[..., NoReturn]:
    def refuse(self: ScoreHead, *args: Any, **kwargs: Any) -> NoReturn:
        raise MegamodError(f"this model has {self.score}: a loss asks head.scores(), not head.{question}()")

    return refuse


# Whatever a loss may ask of a vocabulary, now or later, is no question to a head that has none.
for _name, _ in inspect.getmembers(Head, inspect.isfunction):
    if not _name.startswith("_") and _name not in vars(ScoreHead):
        setattr(ScoreHead, _name, _refusal(_name))


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Vocabulary(torch.autograd.Function):
    """z = h Wᵀ over this rank's columns, a block of columns at a time for all rows.

    By columns rather than by rows, since a block's rows of the weight's gradient are then complete with one product: they are
    written once, in the weight's dtype, and what is summed over blocks is as small as h. The first blocks' z, up to `keep` bytes, are
    kept as the product gave them; the backward gives up each as it writes those rows, and computes the others again, and all where it
    is run a second time: the same numbers either way.

    With p = softmax(z) and gradients a, b, c of log p(id), log-sum-exp and entropy H:
    dz = a·(onehot(id) - p) + b·p - c·p·(log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, first: int, columns: int, width: int, group: dist.ProcessGroup | None,
        with_entropy: bool, keep: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        work = _at_least_fp32(hidden.dtype)
        n = len(hidden)
        local = (ids[:, None] if ids.dim() == 1 else ids) - first  # [N, K]
        top = torch.full((n,), float("-inf"), dtype=work, device=hidden.device)  # the largest z so far
        # Σ exp(z - top), Σ exp(z - top)·z, and each z[id]
        sums = torch.zeros(2 + local.shape[1], n, dtype=work, device=hidden.device)
        kept: dict[int, Tensor] = {}  # a block's first column → its product
        for block in _chunks(columns, width):
            product = hidden @ weight[block].t()  # [N, width]
            if (keep := keep - product.nbytes) >= 0:
                kept[block.start] = product
            z = product.to(work)
            at, here = _within(local, block)
            sums[2:] += torch.where(here, z.gather(-1, at), 0).t()
            before, top = top, torch.maximum(top, z.amax(-1))
            sums[:2] *= (before - top).exp()
            needed = with_entropy or z is kept.get(block.start)
            e = (z - top[:, None] if needed else z.sub_(top[:, None])).exp_()
            sums[0] += e.sum(-1)
            if with_entropy:
                sums[1] += (e * z).sum(-1)
        highest = top.clone()
        if group is not None:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
            sums[:2] *= (top - highest).exp()
            dist.all_reduce(sums, group=group)
        lse = sums[0].log() + highest
        entropy = lse - sums[1] / sums[0] if with_entropy else None
        ctx.save_for_backward(hidden, weight, local, lse, entropy)
        ctx.columns, ctx.width, ctx.kept = columns, width, kept
        ctx.set_materialize_grads(False)  # None says that the entropy's gradient was not asked, and its passes can be left out
        return (sums[2:] - lse).t().reshape(ids.shape), lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob: Tensor | None, d_lse: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, local, lse, entropy = ctx.saved_tensors
        to_id = torch.zeros(local.shape, dtype=lse.dtype, device=lse.device) if d_logprob is None else d_logprob.reshape(local.shape)
        to_p = -to_id.sum(-1) if d_lse is None else d_lse - to_id.sum(-1)
        d_hidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if d_weight is not None:
            d_weight[ctx.columns :].zero_()  # padding; every other row is written below
        for block in _chunks(ctx.columns, ctx.width):
            w = weight[block]
            product = ctx.kept.pop(block.start, None)
            if product is None:
                product = hidden @ w.t()
            log_p = product.to(lse.dtype).sub_(lse[:, None])  # [N, width]
            if d_entropy is None:
                dz = log_p.exp_().mul_(to_p[:, None])
            else:
                p = log_p.exp()
                dz = log_p.add_(entropy[:, None]).mul_(-d_entropy[:, None]).add_(to_p[:, None]).mul_(p)
            at, here = _within(local, block)
            dz.scatter_add_(-1, at, to_id * here)
            dz = dz.to(hidden.dtype)
            if d_hidden is not None and d_hidden.dtype == dz.dtype:
                d_hidden.addmm_(dz, w)
            elif d_hidden is not None:
                d_hidden += dz @ w
            if d_weight is not None:
                torch.mm(dz.t(), hidden, out=d_weight[block])
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None, None, None, None, None


def _within(local: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Each id's column in a block of columns, any column where it is not there, and whether it is there; `[N, K]` each."""
    at = local - block.start
    here = (at >= 0) & (local < block.stop)
    return at.clamp(0, block.stop - block.start - 1), here


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
