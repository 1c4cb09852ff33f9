"""Ask an exported model for its verdict of messages; transformers runs it, so this is the proof that an export stands alone.

    python tools/ask.py --model runs/quickstart/hf/step-00000400 "I will find out where you live." "明天见。"

The Hugging Face directory is loaded by AutoModelForCausalLM, every weight it asks for must be there, and its own chat template
puts the question; megamod only reads the verdicts, in the format that the directory's moderation.json names (else
qwen3guard's lines). Ends with status 1 when no answer is a verdict.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megamod.command import command
from megamod.config import ChatConfig
from megamod.data import chat
from megamod.data.jsonl import row_of
from megamod.errors import MegamodError, listed
from megamod.verdicts import Severity, Verdict
from megamod.weights import checksums

COLOURS: dict[Severity, str] = {"safe": "green", "controversial": "yellow", "unsafe": "bold red"}


@dataclass(frozen=True)
class Answer:
    """What the model said of a message."""

    message: str
    text: str
    verdict: Verdict | None  # None: `text` is not in the verdict format


@torch.no_grad()
def ask(directory: str, messages: Sequence[str], max_new_tokens: int = 128) -> list[Answer]:
    """The model's answers, decoded greedily. Raises MegamodError for a directory that cannot be used."""
    encoder = chat.encoder(chat.read_settings(directory, ChatConfig()), directory)
    tokenizer, model = encoder.tokenizer, load(directory)
    of_model = model.generation_config.eos_token_id
    ends = {tokenizer.end, *(of_model if isinstance(of_model, list) else [of_model])} - {None}
    answers = []
    for number, message in enumerate(messages, 1):
        row = row_of({"text": message}, f"message {number}")
        prompt = torch.from_numpy(encoder.prompts(row).windows[0]).long().to(model.device)[None]  # [1, T]
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(ends),
            pad_token_id=tokenizer.end,
        )  # fmt: skip
        said = tokenizer.decode([token for token in ids[0, prompt.shape[1] :].tolist() if token not in ends])
        text = said.removeprefix(encoder.lead(row)).strip()
        answers.append(Answer(message, text, encoder.format.parse(text)))
    return answers


def load(directory: str) -> Any:
    """The model as transformers makes it: bfloat16 on a GPU, float32 elsewhere.

    Raises:
        MegamodError: it cannot, or the directory lacks weights, which transformers would draw at random.
    """
    on_gpu = torch.cuda.is_available()
    checksums.verify(directory)
    try:
        model, about = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16 if on_gpu else torch.float32, local_files_only=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise MegamodError(f"{directory}: transformers cannot load a model from it: {reason}") from None
    for what in ("missing_keys", "mismatched_keys"):
        if about[what]:
            raise MegamodError(f"{directory}: {what.replace('_keys', '')} weights: {listed(sorted(map(str, about[what])))}")
    return model.to("cuda" if on_gpu else "cpu").eval()


def table(answers: Sequence[Answer]) -> Table:
    """One line a message: the verdict, or the raw text where there is none."""
    # fold: Chinese has no spaces to break at, and would be cut off
    shown = Table(*(Column(name, overflow="fold") for name in ("message", "severity", "categories", "reason")))
    for answer in answers:
        v = answer.verdict
        if v is None:
            shown.add_row(_text(answer.message), Text("no verdict", "magenta"), "", _text(answer.text or "(said nothing)"))
        else:
            severity = Text(v.severity, COLOURS[v.severity])
            shown.add_row(_text(answer.message), severity, _text(", ".join(v.categories)), _text(v.reason or ""))
    return shown


def _text(words: str) -> Text:
    """Without control characters, which a terminal would obey."""
    return Text("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in words))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("messages", nargs="+", metavar="message")
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_intermixed_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.max_new_tokens < 1:
        raise MegamodError(f"--max-new-tokens {args.max_new_tokens}: at least 1 was expected")
    answers = ask(args.model, args.messages, args.max_new_tokens)
    Console().print(table(answers))
    if all(answer.verdict is None for answer in answers):
        raise MegamodError(f"{args.model}: no answer is a verdict in the model's format")


if __name__ == "__main__":
    sys.exit(main())
