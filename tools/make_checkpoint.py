"""A small untrained checkpoint with a tokenizer of its own, in Hugging Face format: to begin from nothing, on a laptop.

python tools/make_checkpoint.py OUT --data train.jsonl --layers 4 --hidden 192

The tokenizer (byte-level BPE, ChatML template) is learned from the conversations and verdicts of --data; the model is a Qwen3 of
the given size with random weights.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megamod import files
from megamod.command import command
from megamod.data.jsonl import read_rows
from megamod.errors import MegamodError, expected
from megamod.model.shape import shape_of
from megamod.verdicts import FORMATS
from megamod.weights import checksums
from megamod.weights.load import Random
from megamod.weights.table import hf_shapes

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of conversations, for the tokenizer")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6, help="query heads; kv heads are half as many")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with expected("a directory that can be made"):
        make(args.out, args.data, vocab=args.vocab, layers=args.layers, hidden=args.hidden, heads=args.heads, seed=args.seed)


def make(out: Path, data: Path, *, vocab: int, layers: int, hidden: int, heads: int, seed: int) -> None:
    """Write the checkpoint to `out`, whole or not at all. Raises MegamodError."""
    if out.exists():
        raise MegamodError(f"{out}: exists; a new directory was expected")
    for name, value, fits, right in (
        ("--vocab", vocab, vocab >= 300, "at least 300: 256 bytes and the special tokens"),
        ("--layers", layers, layers >= 1, "at least 1"),
        ("--heads", heads, heads >= 2 and heads % 2 == 0, "an even number"),
        ("--hidden", hidden, hidden >= 2 and hidden % (2 * max(heads, 1)) == 0, f"a multiple of {2 * heads}, for an even head size"),
    ):
        if not fits:
            raise MegamodError(f"{name} {value}: {right} was expected")
    tokenizer = learn(data, vocab)
    draft = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tokenizer.save_pretrained(str(draft))
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "head_dim": hidden // heads, "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": True, "attention_bias": False, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "dtype": "float32",
    }  # fmt: skip
    (draft / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    shape = shape_of(config)
    source = Random(shape, seed)
    tensors = {name: source.read(name, [0] * len(size), size).to(torch.float32) for name, size in hf_shapes(shape).items()}
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    files.finish(draft / "model.safetensors")
    checksums.seal(draft)
    os.rename(draft, out)
    print(f"{out}: Qwen3 of {shape.parameters():,} weights, {layers} layers of {hidden}, {len(tokenizer):,} tokens")


def learn(data: Path, vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens, from the texts of a JSONL file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts(data), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def texts(data: Path) -> Iterator[str]:
    """All that a model will read and say: messages, and verdicts in the default format."""
    for row in read_rows(data):
        yield from (message["content"] for message in row.messages)
        if row.verdict is not None:
            yield FORMATS["qwen3guard"].render(row.verdict, row.is_response).text


if __name__ == "__main__":
    sys.exit(main())
