"""TRL's own trainers in one process, in float64: from texts to batches, values, gradients and whole runs.

TRL computes log-probabilities in fp32, in a kernel of its own; `in_double` puts the textbook's in its place, as oracle.in_double does
with transformers' RMSNorm and RoPE. All else is TRL's: tokenising, KTO's mismatched pairs, padding, masks, losses, the loop.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from megamod.data.documents import IGNORED, Document

EOS = 2  # of test_weights.write_tokenizer: TRL has every answer end in it
SPECIAL = 5  # ids below are special tokens


class _Textbook:
    """In the place of TRL's kernel: what the trainers ask of it, of all logits at once, in their dtype."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *settings: Any) -> tuple[Tensor | None, ...]:
        temperature, _, softcapping, scale, _ = settings
        assert (bias, temperature, softcapping, scale) == (None, 1.0, None, 1.0)
        z = hidden @ weight.t()
        logp = torch.log_softmax(z, -1)
        entropy = -(logp.exp() * logp).sum(-1)
        squares = (2 * logp).logsumexp(-1).detach()
        return logp.gather(-1, targets[:, None])[:, 0], entropy.detach(), squares, z.detach().mean(-1), z.argmax(-1) == targets


@contextmanager
def in_double() -> Iterator[None]:
    """Inside, the trainers' log-probabilities keep the dtype of the hidden states."""
    with mock.patch("trl.trainer.utils._ChunkedLogProbFunction", _Textbook):
        yield


def answer_of(document: Document) -> int:
    """Where the answer begins."""
    return int((document.labels != IGNORED).argmax())


def pairs_of(documents: Sequence[Document]) -> list[tuple[Document, Document]]:
    """Each pair's better and worse document."""
    return [(one, other) for one, other in pairwise(documents) if other.joined]


class Texts:
    """Documents as a user of TRL would have them. No text is changed by being read again."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def pairs(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """For DPO."""
        rows = []
        for better, worse in pairs_of(documents):
            (prompt, chosen), (same, rejected) = self._parts(better), self._parts(worse)
            assert prompt == same
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        return rows

    def rated(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """For KTO."""
        parts = [self._parts(document) for document in documents]
        return [
            {"prompt": prompt, "completion": answer, "label": document.side > 0}
            for (prompt, answer), document in zip(parts, documents, strict=True)
        ]

    @staticmethod
    def scored(documents: Sequence[Document]) -> list[dict[str, Any]]:
        """For a reward model, which TRL reads as tokens too."""
        return [
            {"chosen_ids": better.tokens.tolist(), "rejected_ids": worse.tokens.tolist(), "margin": better.margin}
            for better, worse in pairs_of(documents)
        ]

    def _parts(self, document: Document) -> tuple[str, str]:
        """Prompt and answer."""
        words = self.tokenizer.convert_ids_to_tokens(document.tokens.tolist())
        begin = answer_of(document)
        return " ".join(words[:begin]), " " + " ".join(words[begin:])


@dataclass
class Trl:
    """Makes trainers that write to `folder`."""

    folder: Path
    tokenizer: Any

    def trainer(
        self, kind: str, rows: Sequence[dict[str, Any]], model: nn.Module, *, batch: int | None = None, peft: Any = None,
        reference: nn.Module | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """A DPOTrainer, KTOTrainer or RewardTrainer that reads `rows` in their order.

        Args:
            batch: rows a step; None: all of them.
            options: of its config.
        """
        import datasets
        import trl

        datasets.disable_progress_bars()
        options = {"train_sampling_strategy": "sequential"} | options
        args = getattr(trl, f"{kind}Config")(
            output_dir=str(self.folder), per_device_train_batch_size=batch or len(rows), report_to=[], bf16=False, use_cpu=True,
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, **options,
        )  # fmt: skip
        given = {} if reference is None else {"ref_model": reference}
        with mock.patch.dict(os.environ, {"CI": "1"}):  # without telemetry
            made = getattr(trl, f"{kind}Trainer")(
                model=model, args=args, train_dataset=datasets.Dataset.from_list(list(rows)), processing_class=self.tokenizer,
                peft_config=peft, **given,
            )  # fmt: skip
        made.model.train()
        return made


def inputs_of(trainer: Any) -> dict[str, Any]:
    """The first batch, collated."""
    found: dict[str, Any] = next(iter(trainer.get_train_dataloader()))
    return found


def value_of(trainer: Any, inputs: dict[str, Any] | None = None) -> Tensor:
    """The loss of the first batch; gradients are then in the parameters, metrics in the trainer."""
    trainer.model.zero_grad()
    value = trainer.compute_loss(trainer.model, inputs if inputs is not None else inputs_of(trainer))
    assert isinstance(value, Tensor) and value.dtype is torch.float64
    value.backward()
    return value.detach()


def metrics_of(trainer: Any) -> dict[str, float]:
    """What the trainer has noted of its last batch."""
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}
