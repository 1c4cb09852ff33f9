"""Ranks → Hugging Face: a directory that transformers, vLLM and mistral.rs load, written by all ranks, seen whole or not at all.

The same table as in loading says where each tensor's pieces lie. In a pipeline stage the tensors are dealt to the TP ranks by
size; pieces travel to their tensor's writer one tensor at a time, so a rank holds one shard at most, and ranks write at once.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from megamod import foreign
from megamod.errors import MegamodError, listed
from megamod.files import finish, sync
from megamod.model.shape import Score, Shape, both_spellings, read_config, read_shape, with_score
from megamod.parallel.collectives import gathered, together
from megamod.parallel.grid import Grid
from megamod.weights import checksums
from megamod.weights.load import INDEX
from megamod.weights.table import Piece, hf_shapes, placed

# What makes a directory stand alone beside its config and weights; copied where they are.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MODEL = ("generation_config.json", "LICENSE*")

T = TypeVar("T")
# Hugging Face name → its pieces over the TP ranks, once each: the rank that owns it, this rank's parameter, the piece.
Stage = Mapping[str, Sequence[tuple[int, nn.Parameter, Piece]]]


def export(
    chunks: Sequence[nn.Module],
    shape: Shape,
    grid: Grid,
    directory: str | Path,
    *,
    source: str | Path,
    tokenizer: str | Path | None = None,
    texts: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 4_000_000_000,
) -> Path:
    """Write the model to `directory`, which must be new or empty, and on storage that all ranks share; every rank calls it.

    Args:
        chunks: this rank's, bare or wrapped in DistributedDataParallel.
        source: the Hugging Face directory that the run began from: its config.json, tokenizer and licence are copied.
        tokenizer: where the tokenizer comes from instead; None: `source`.
        texts: further small files, by name; they replace companions of that name.
        dtype: of the written tensors; None: the parameters' own, bit for bit.
        shard_bytes: a file holds at most so much, or a single larger tensor.

    Raises:
        MegamodError: on every rank alike: a target that holds something, a source that describes another model, a failed write.
    """
    target = Path(directory).resolve()
    draft = target.with_name(f".{target.name}.tmp")
    stage = _stage(chunks, shape, grid.tp.size)
    dtype = dtype or next((held[0][1].dtype for held in stage.values()), torch.float32)  # a stage may be empty, the first is not
    shards = _deal(stage, grid.tp.size, dtype.itemsize, shard_bytes)
    try:
        # Where it fails, the others learn of it: each step ends with all ranks agreed that it is done, or with the same error.
        others = (Path(tokenizer or source), texts or {})
        together(lambda: _prepare(shape, Path(source), target, draft, dtype, *others), acts=grid.rank == 0)
        files = _name_files(shards[grid.tp.rank] if grid.dp_cp.rank == 0 else [], shape, grid)
        together(lambda: _write_shards(stage, shards, files[grid.rank], draft, grid, dtype), acts=grid.dp_cp.rank == 0)
        sums = gathered(together(lambda: checksums.digests(draft, files[grid.rank], quiet=grid.rank != 0)) or {})
        known = {name: digest for own in sums for name, digest in own.items()}
        together(lambda: _finish(files, shape, draft, target, dtype, known), acts=grid.rank == 0)
    except MegamodError:
        if grid.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return Path(directory)


def check(shape: Shape, source: str | Path, target: str | Path, tokenizer: str | Path | None = None) -> None:
    """Refuse an export that cannot succeed; cheap, so a run asks before its first step.

    Raises:
        MegamodError: a target that holds something, a source that is not there or describes another model, or a companion that
            is a link out of its directory.
    """
    _companions(Path(source), Path(tokenizer or source))
    refuse_taken(Path(target))
    found = read_shape(source).scored(shape.score)
    differ = [f.name for f in fields(Shape) if getattr(found, f.name) != getattr(shape, f.name)]
    if differ:
        raise MegamodError(f"{source}: config.json describes another model than the one to export: its {listed(differ)} differ")


def refuse_taken(target: Path) -> None:
    """Raises MegamodError for a target that holds something."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise MegamodError(f"{target}: exists and is not an empty directory; export to a new one, or remove it")


@contextmanager
def drafting(target: Path) -> Iterator[Path]:
    """A new directory by one process: a neighbour to fill, which is given `target`'s name at the end, and removed after a fault.

    Raises:
        MegamodError: a target that holds something, or a write that fails.
    """
    refuse_taken(target)
    final = target.resolve()
    draft = final.with_name(f".{final.name}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)  # left by one that was killed
        draft.mkdir()
        yield draft
        sync(draft)
        os.rename(draft, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        raise MegamodError(f"{target}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _stage(chunks: Sequence[nn.Module], shape: Shape, tp: int) -> Stage:
    """Where the tensors of this pipeline stage lie; each TP rank finds the same names in the same order."""
    stage: dict[str, list[tuple[int, nn.Parameter, Piece]]] = {}
    for rank in range(tp):
        for item in placed(chunks, shape, tp, rank):
            for piece in item.pieces:
                if piece.owned:
                    stage.setdefault(piece.hf, []).append((rank, item.param, piece))
    for name, held in stage.items():
        assert sum(piece.numel for _, _, piece in held) == math.prod(held[0][2].shape), f"the pieces of {name} are not the whole"
    return stage


def _deal(stage: Stage, tp: int, itemsize: int, shard_bytes: int) -> list[list[list[str]]]:
    """For each TP rank the shards that it writes, a shard being the names of its tensors in the stage's order.

    A tensor goes to the rank with the fewest bytes so far. So their shards fill, and are written, at the same time. Only as
    many ranks write as there are shards to fill.
    """
    sizes = {name: math.prod(held[0][2].shape) * itemsize for name, held in stage.items()}
    writers = min(tp, max(1, math.ceil(sum(sizes.values()) / shard_bytes)))
    shards: list[list[list[str]]] = [[] for _ in range(tp)]
    total, room = [0] * writers, [0] * writers
    for name, size in sizes.items():
        writer = total.index(min(total))
        if size > room[writer]:
            shards[writer].append([])
            room[writer] = shard_bytes
        shards[writer][-1].append(name)
        total[writer] += size
        room[writer] -= size
    return shards


def _name_files(own: Sequence[Sequence[str]], shape: Shape, grid: Grid) -> list[dict[str, Sequence[str]]]:
    """Every rank's files and the tensors in each, numbered through all ranks."""
    everyone = gathered(own)
    names = sorted(name for shards in everyone for shard in shards for name in shard)
    assert names == sorted(hf_shapes(shape)), "the stages together hold each tensor once"
    count, number, files = sum(map(len, everyone)), 0, []
    for shards in everyone:
        files.append({f"model-{number + i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards, 1)})
        number += len(shards)
    return files


def _prepare(shape: Shape, source: Path, target: Path, draft: Path, dtype: torch.dtype, tokenizer: Path, texts: Mapping[str, str]) -> None:
    """Rank 0, first: refuse what cannot succeed, then begin the draft with all but the weights."""
    check(shape, source, target, tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    if draft.exists():  # left by an export that was killed
        shutil.rmtree(draft)
    draft.mkdir()
    begin(draft, source, tokenizer, dtype, texts, shape.score)


def begin(
    draft: Path, source: Path, tokenizer: Path, dtype: torch.dtype, texts: Mapping[str, str], score: Score | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """All of a Hugging Face directory but its weights. Arguments and errors as in `export`.

    Args:
        score: the model's head; None: the one that `source` has.
        quantization: config.json's `quantization_config`; None: the weights are plain, whatever `source` has.
    """
    config = {key: value for key, value in read_config(source).items() if key != "quantization_config"}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    if score is not None:
        config = with_score(config, score, padding(tokenizer, config))
    write_json(draft / "config.json", both_spellings(config, str(dtype).removeprefix("torch.")))
    for file in _companions(source, tokenizer):
        shutil.copyfile(file, draft / file.name)
        sync(draft / file.name)
    write_texts(draft, texts)


def padding(tokenizer: Path, config: Mapping[str, Any]) -> int | None:
    """The token that the tokenizer at `tokenizer` fills up batches with; None: none, or one that may also end a text.

    transformers' ForSequenceClassification reads the rightmost token that is not `pad_token_id`. Where the end token also pads, as
    in many models without a padding token, a text's own end would be passed over, and the scores would be those of the token before
    it. Without `pad_token_id` transformers reads the last token of a single text and refuses several; vLLM pads nothing and reads
    the last token always.
    """
    about = {**_read_small(tokenizer / "special_tokens_map.json"), **_read_small(tokenizer / "tokenizer_config.json")}
    ids = {str(token["content"]): int(token["id"]) for token in _read_small(tokenizer / "tokenizer.json").get("added_tokens", ())}
    ids |= {str(token["content"]): int(number) for number, token in about.get("added_tokens_decoder", {}).items()}

    def token(kind: str) -> int | None:
        value = about.get(kind)
        return ids.get(str(value["content"] if isinstance(value, dict) else value))

    ends = config.get("eos_token_id")
    taken = {token("eos_token"), *(ends if isinstance(ends, list) else [ends])}
    pad = token("pad_token")
    return pad if pad not in taken and pad is not None and pad < int(config["vocab_size"]) else None


def _read_small(file: Path) -> dict[str, Any]:
    """A JSON object of the tokenizer's; empty where it is missing or is something else: the tokenizer itself is no concern here."""
    try:
        value = foreign.read_json(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_texts(draft: Path, texts: Mapping[str, str]) -> None:
    """Small files, by name."""
    for name, text in texts.items():
        (draft / name).write_text(text, encoding="utf-8")
        sync(draft / name)


def _companions(source: Path, tokenizer: Path) -> list[Path]:
    """The small files to copy. Raises MegamodError for one that is a link out of its directory."""
    found = []
    for directory, patterns in ((tokenizer, TOKENIZER), (source, MODEL)):
        for file in sorted(f for pattern in patterns for f in directory.glob(pattern)):
            if not foreign.is_inside(directory, file.name):  # what it shows might be a secret of this machine
                raise MegamodError(f"{file}: a link that leaves the directory is not followed; put the file itself there")
            if file.is_file():
                found.append(file)
    return found


def _write_shards(
    stage: Stage, shards: Sequence[Sequence[Sequence[str]]], files: Mapping[str, Sequence[str]], draft: Path, grid: Grid, dtype: torch.dtype
) -> None:
    """The ranks of one TP group: bring each tensor to its writer, and write a shard when its last tensor is there."""
    writers = {name: rank for rank, own in enumerate(shards) for shard in own for name in shard}
    last = {names[-1]: file for file, names in files.items()}
    shard: dict[str, Tensor] = {}
    fault: Exception | None = None
    for name, held in tqdm(stage.items(), desc="exporting", unit="tensor", delay=3, mininterval=3, disable=grid.rank != 0):
        tensor = _gather(held, writers[name], grid, dtype)
        if tensor is None or fault is not None:
            continue  # after a fault too the exchange goes on, or the others would wait for this rank
        shard[name] = tensor
        if name in last:
            try:
                save_file(shard, draft / last[name], metadata={"format": "pt"})
                finish(draft / last[name])
            except (OSError, SafetensorError) as error:
                fault = error
            shard = {}
    if fault is not None:
        raise fault


def _gather(held: Sequence[tuple[int, nn.Parameter, Piece]], writer: int, grid: Grid, dtype: torch.dtype) -> Tensor | None:
    """One tensor on the CPU of its writer; None on the other ranks, which send what they own of it.

    Every rank goes through all pieces of all tensors in the same order, so a blocking send always meets its receiver.
    """
    me, group = grid.tp.rank, grid.tp.group
    whole = torch.empty(held[0][2].shape, dtype=dtype) if me == writer else None
    for owner, param, piece in held:
        if me not in (owner, writer):
            continue
        if me == owner:
            part = piece.of(param).detach().to(dtype).contiguous()
            if me != writer:
                dist.send(part, group=group, group_dst=writer)
        else:
            part = torch.empty(piece.size, dtype=dtype, device=param.device)
            dist.recv(part, group=group, group_src=owner)
        if whole is not None:
            whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.size, strict=True))] = part.cpu()
    return whole


def _finish(
    files: Sequence[Mapping[str, Sequence[str]]], shape: Shape, draft: Path, target: Path, dtype: torch.dtype, known: Mapping[str, str]
) -> None:
    """Rank 0, last: the index, the checksums (`known`: the shards'), and the directory's name."""
    where = {name: file for own in files for file, names in own.items() for name in names}
    write_index(draft, where, sum(math.prod(size) for size in hf_shapes(shape).values()) * dtype.itemsize)
    checksums.seal(draft, known)
    sync(draft)
    os.rename(draft, target)
    sync(target.parent)


def stream(draft: Path, sizes: Mapping[str, int], made: Callable[[str], Mapping[str, Tensor]], shard_bytes: int, doing: str) -> None:
    """The weights and their index, by one process. Memory holds one file's tensors.

    Args:
        sizes: name → bytes of what is made of it.
        made: of a name the tensors, by their own names.
        shard_bytes: as in `export`.
        doing: what to call it meanwhile.
    """
    where: dict[str, str] = {}
    total = 0
    shards = dealt(sorted(sizes, key=in_order), sizes.__getitem__, shard_bytes)
    with tqdm(total=sum(sizes.values()), desc=doing, unit="B", unit_scale=True, delay=3, mininterval=3) as progress:
        for i, names in enumerate(shards, 1):
            file, tensors = f"model-{i:05d}-of-{len(shards):05d}.safetensors", dict[str, Tensor]()
            for name in names:
                tensors |= made(name)
                progress.update(sizes[name])
            save_file(tensors, draft / file, metadata={"format": "pt"})
            finish(draft / file)
            where |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(draft, where, total)


def dealt(items: Iterable[T], nbytes: Callable[[T], int], shard_bytes: int) -> list[list[T]]:
    """Items dealt to files in their order: at most `shard_bytes` to each, or a single larger one."""
    shards: list[list[T]] = [[]]
    room = shard_bytes
    for item in items:
        if shards[-1] and nbytes(item) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(item)
        room -= nbytes(item)
    return shards


def in_order(name: str) -> tuple[int, int]:
    """Where a tensor comes, as a key to sort by: the embedding, the layers in their order, the rest."""
    parts = name.split(".")
    return (1, int(parts[2])) if parts[1] == "layers" else (0 if "embed" in name else 2, 0)


def write_index(draft: Path, where: Mapping[str, str], total: int) -> None:
    """Which file of `draft` holds which tensor, and how many bytes they are together."""
    write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """One of the directory's small files, synced."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(file)
