"""The head: from hidden states to log-probabilities, the only place that knows how the vocabulary is sharded.

It takes the labelled rows only, multiplies in chunks and keeps three numbers a row, so logits of the whole row, `[T, V/tp]`,
never exist. Padded vocabulary columns are left out of the product, which is to count them as -∞.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

CHUNK_BYTES = 256 << 20  # of logits at a time, in the accumulation's dtype


class Statistics(NamedTuple):
    """What one pass over the vocabulary gives at each labelled position, `[N]` each."""

    logprob: Tensor  # log p(id)
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
        """`[N, C]`: the labelled rows, the same on every tensor-parallel rank; their gradients are summed over them."""
        with torch.enable_grad():  # it is kept: who asks first, and without a gradient, must not take it from the others
            x = self._all.reshape(-1, self._all.shape[-1])
            if self.tp is None or self.tp.size() == 1:
                return x[self._rows]
            if self._sp:  # backward: reduce-scatter
                return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.tp)[self._rows]
            return copy_to_tensor_model_parallel_region(x[self._rows], group=self.tp)

    def statistics(self, ids: Tensor) -> Statistics:
        """Log-probability of `ids` `[N]`, log-sum-exp and entropy, all from one pass; differentiable. At least fp32."""
        group = self.tp if self.tp is not None and self.tp.size() > 1 else None
        return Statistics(*_Vocabulary.apply(self.hidden, self.weight, ids, self.first, self.columns, self._chunk, group))

    def logprobs(self, ids: Tensor) -> Tensor:
        """`[N]` log p(ids[i]) at the labelled positions."""
        return self.statistics(ids).logprob

    def logsumexp(self) -> Tensor:
        """`[N]` log Σ exp z: what a z-loss (Chowdhery et al. 2022) squares."""
        return self.statistics(self._any_id()).logsumexp

    def entropy(self) -> Tensor:
        """`[N]` entropy of the next token's distribution, in nats."""
        return self.statistics(self._any_id()).entropy

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

    @property
    def _chunk(self) -> int:
        """Rows whose logits are computed at a time."""
        return max(1, CHUNK_BYTES // (_at_least_fp32(self.hidden.dtype).itemsize * max(1, self.columns)))

    def _any_id(self) -> Tensor:
        return torch.zeros(len(self._rows), dtype=torch.long, device=self._rows.device)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Vocabulary(torch.autograd.Function):
    """z = h Wᵀ over this rank's columns, chunk by chunk of rows; the backward computes each chunk's z again.

    With p = softmax(z) and gradients a, b, c of log p(id), log-sum-exp and entropy H:
    dz = a·(onehot(id) - p) + b·p - c·p·(log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, first: int, columns: int, rows: int, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = _at_least_fp32(hidden.dtype)
        w = weight[:columns]
        local = ids - first
        here = (local >= 0) & (local < columns)
        n = len(hidden)
        top = torch.full((n,), float("-inf"), dtype=work, device=hidden.device)
        sums = torch.zeros(3, n, dtype=work, device=hidden.device)  # Σ exp(z - top), Σ exp(z - top)·z, z[id]
        for part in _chunks(n if columns else 0, rows):
            z = (hidden[part] @ w.t()).to(work)  # [rows, V/tp]
            top[part] = z.amax(-1)
            sums[2, part] = z.gather(-1, local[part].clamp(0, columns - 1)[:, None])[:, 0] * here[part]
            e = (z - top[part, None]).exp()
            sums[0, part], sums[1, part] = e.sum(-1), (e * z).sum(-1)
        highest = top.clone()
        if group is not None:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
            sums[:2] *= (top - highest).exp()
            dist.all_reduce(sums, group=group)
        lse = sums[0].log() + highest
        entropy = lse - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, local, here, lse, entropy)
        ctx.columns, ctx.rows = columns, rows
        return sums[2] - lse, lse, entropy

    @staticmethod
    def backward(ctx: Any, d_logprob: Tensor, d_lse: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, here, lse, entropy = ctx.saved_tensors
        columns, work, w = ctx.columns, lse.dtype, weight[: ctx.columns]
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros(weight.shape, dtype=work, device=weight.device) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(hidden) if columns else 0, ctx.rows):
            log_p = (hidden[part] @ w.t()).to(work) - lse[part, None]  # [rows, V/tp]
            p = log_p.exp()
            dz = p * (d_lse[part] - d_logprob[part] - d_entropy[part] * entropy[part])[:, None]
            dz.addcmul_(p * log_p, d_entropy[part, None], value=-1)
            at = local[part].clamp(0, columns - 1)[:, None]
            dz.scatter_add_(-1, at, (d_logprob[part] * here[part])[:, None])
            dz = dz.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = dz @ w
            if d_weight is not None:
                d_weight[:columns] += dz.t() @ hidden[part]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None, None


def _chunks(n: int, rows: int) -> list[slice]:
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
