"""SHA256SUMS: every writer of a directory of weights seals it, every reader compares, and no flipped bit is loaded."""

import hashlib
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import distributed
import pytest
import tiny
import torch
from complaints import complaint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_peft import base_directory, made
from test_weights import write
from written import write as write_rows

from megamod.config import LoraConfig, ModelConfig, ParallelConfig
from megamod.data.tokenizer import Tokenizer
from megamod.errors import MegamodError
from megamod.model.build import build
from megamod.model.lora import Adapters
from megamod.model.shape import read_shape
from megamod.parallel.grid import started
from megamod.weights import bitsandbytes, checksums, peft, pissa
from megamod.weights.checksums import SUMS, seal, verify
from megamod.weights.export import export
from megamod.weights.load import load, weights_at
from megamod.weights.merge import merge
from megamod.weights.quantization import Quantization
from tools import ask, bench_checksums, make_checkpoint

FLIPS = 250  # of each kind of directory
LORA = LoraConfig(r=3, lora_alpha=7.0)
PISSA = LoraConfig(r=3, init_lora_weights="pissa", target_modules=("q_proj",))


# --- who writes ------------------------------------------------------------------------------------------------------------


def exported(root: Path) -> None:
    """As a run does, on 4 ranks: an export, and the beginning of a PiSSA adapter."""
    shape = tiny.shape("qwen2")
    with started(ParallelConfig(tp=2, pp=2), shape) as grid:
        source = weights_at(root / "base", shape, 0)
        chunks: Any = build(ModelConfig(path="", dtype="float32"), shape, grid)[0]
        load(chunks, shape, grid, source)
        export(chunks, shape, grid, root / "export", source=root / "base", texts={"moderation.json": "{}\n"}, shard_bytes=20_000)
        pissa.begin(root / "pissa", source, PISSA, shape, grid)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of everything that writes directories of weights; `base` is somebody else's, without checksums."""
    root, shape = tmp_path_factory.mktemp("sealed"), tiny.shape("qwen2")
    base = base_directory(root / "base", "qwen2", torch.float32)
    (base / "LICENSE").write_text("free\n")
    (base / "chat_template.jinja").write_text("{{ messages }}\n")
    distributed.run(4, exported, root)
    adapter = made(LORA, shape, torch.float32)
    peft.write(root / "adapter", adapter, LORA, shape, base="base", texts={"moderation.json": "{}\n"})
    merge(root / "export", root / "adapter", root / "merged", shard_bytes=40_000)
    bitsandbytes.quantize(root / "export", root / "quantized", Quantization(), shard_bytes=40_000)
    rows = write_rows(root / "rows.jsonl", [{"text": "abc", "label": "safe"}])
    make_checkpoint.make(root / "begun", rows, vocab=300, layers=1, hidden=8, heads=2, seed=1)
    return root


SEALED = ("export", "pissa", "adapter", "merged", "quantized", "begun")


@pytest.mark.parametrize("name", SEALED)
def test_every_file_is_listed(root: Path, name: str) -> None:
    files = {file.name for file in (root / name).iterdir()} - {SUMS}
    assert checksums.read(root / name) == {file: hashlib.sha256((root / name / file).read_bytes()).hexdigest() for file in files}
    assert any(file.endswith(".safetensors") for file in files)
    assert (root / name / SUMS).stat().st_mode & 0o777 == (root / name).stat().st_mode & 0o666
    verify(root / name)


@pytest.mark.parametrize("name", SEALED)
def test_coreutils_reads_the_list(root: Path, name: str) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=root / name, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(list((root / name).iterdir())) - 1


# --- no flipped bit --------------------------------------------------------------------------------------------------------


def flip(file: Path, draw: random.Random) -> bytes:
    """One random bit of a file; what it held before."""
    before = file.read_bytes()
    at = draw.randrange(8 * len(before))
    after = bytearray(before)
    after[at // 8] ^= 1 << at % 8
    file.write_bytes(after)
    return before


@pytest.mark.parametrize("name", ["export", "adapter", "quantized"])
def test_no_flipped_bit_is_silent(root: Path, tmp_path: Path, name: str) -> None:
    """In every file alike, the list itself among them: half of the flips in any file, half spread over all bytes as a disk's are."""
    copy = shutil.copytree(root / name, tmp_path / "copy")
    draw, files = random.Random(name), sorted(copy.iterdir())
    by_size = draw.choices(files, [file.stat().st_size for file in files], k=FLIPS // 2)
    silent = []
    for file in (*draw.choices(files, k=FLIPS - len(by_size)), *by_size):
        before = flip(file, draw)
        try:
            verify(copy)
            silent.append(file.name)
        except MegamodError:
            pass
        file.write_bytes(before)
    assert silent == []
    verify(copy)


READERS: Mapping[str, tuple[str, str, Callable[[Path, Path], Any]]] = {
    # what is damaged, in which file, and who reads it from where
    "merge, the base": ("export", "model-0", lambda root, out: merge(root / "export", root / "adapter", out)),
    "merge, the adapter": ("adapter", peft.TENSORS, lambda root, out: merge(root / "export", root / "adapter", out)),
    "merge, a base in 4 bits": ("quantized", "model-0", lambda root, out: merge(root / "quantized", root / "adapter", out)),
    "quantize": ("export", "model-0", lambda root, out: bitsandbytes.quantize(root / "export", out, Quantization())),
    "adopt, the adapter": ("adapter", peft.TENSORS, lambda root, out: peft.adopt(root / "adapter", root / "export", out)),
    "adopt, the base": ("export", "model-0", lambda root, out: peft.adopt(root / "adapter", root / "export", out)),
    "adapter_config.json": ("adapter", peft.CONFIG, lambda root, out: peft.opened(root / "adapter", tiny.shape("qwen2"))),
    "config.json": ("export", "config.json", lambda root, out: read_shape(root / "export")),
    "a tokenizer": ("begun", "tokenizer.json", lambda root, out: Tokenizer(root / "begun")),
    "tools/ask.py": ("begun", "model.safetensors", lambda root, out: ask.ask(str(root / "begun"), ["a"])),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_compares(root: Path, tmp_path: Path, reader: str) -> None:
    name, start, read = READERS[reader]
    copy = shutil.copytree(root, tmp_path / "copy")
    file = max((file for file in (copy / name).iterdir() if file.name.startswith(start)), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    digit = next(at for at, byte in enumerate(data) if byte in b"0123456789")  # so that JSON stays JSON
    data[8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else digit] ^= 1  # the first number
    file.write_bytes(data)
    text = complaint(lambda: read(copy, tmp_path / "out"))
    assert text.startswith(f"{file}: not as it was written: its SHA-256 differs from {SUMS}; copy it again, or")
    assert not (tmp_path / "out").exists()


def loaded(root: Path, base: str, adapter: str) -> str:
    """On every rank: load base and adapter as training does; the complaint."""
    shape = tiny.shape("qwen2")
    with started(ParallelConfig(tp=2, pp=2), shape) as grid:
        chunks: Any = build(ModelConfig(path="", dtype="float32"), shape, grid)[0]
        try:
            load(chunks, shape, grid, weights_at(root / base, shape, 0))
            one = peft.opened(root / adapter, shape)
            Adapters(chunks, shape, grid, {"a": one.config}).fill("a", one)
        except MegamodError as error:
            return str(error)
    return ""


def test_ranks_read_a_share_each_and_say_the_same(root: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    assert distributed.run(4, loaded, copy, "export", "adapter") == [""] * 4
    for name, file in (("export", sorted((copy / "export").glob("*.safetensors"))[3]), ("adapter", copy / "adapter" / peft.TENSORS)):
        broken = Path(shutil.copytree(copy / name, copy / f"broken {name}"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 8
        (broken / file.name).write_bytes(data)
        names = ("broken export", "adapter") if name == "export" else ("export", "broken adapter")
        (said,) = set(distributed.run(4, loaded, copy, *names))
        assert said.startswith(f"{broken / file.name}: not as it was written")


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 100), max_size=20), st.integers(1, 9))
def test_shares_are_even(sizes: dict[str, int], world: int) -> None:
    dealt = checksums.shares(sizes, world)
    assert len(dealt) == world
    assert sorted(name for names in dealt for name in names) == sorted(sizes)
    total = [sum(sizes[name] for name in names) for names in dealt]
    assert max(total) - min(total) <= max(sizes.values(), default=0)


# --- what is wrong ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    directory = tmp_path / "small"
    directory.mkdir()
    save_file({"w": torch.arange(9.0)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    seal(directory)
    return directory


def test_who_changes_a_file_on_purpose_is_told_how(small: Path) -> None:
    (small / "config.json").write_text('{"a": 1}')
    assert complaint(lambda: verify(small)) == (
        f"{small}/config.json: not as it was written: its SHA-256 differs from SHA256SUMS; copy it again, or, if the change is meant, put "
        "the line that `sha256sum config.json` prints in the place of its own, or remove SHA256SUMS"
    )
    lines = (small / SUMS).read_text().splitlines(keepends=True)
    line = f"{hashlib.sha256((small / 'config.json').read_bytes()).hexdigest()}  config.json\n"
    (small / SUMS).write_text("".join(line if "config.json" in old else old for old in lines))
    verify(small)
    (small / "chat_template.jinja").write_text("{{ 1 }}")
    assert complaint(lambda: verify(small)).startswith(f"{small}/chat_template.jinja: not as it was written")
    (small / SUMS).unlink()
    verify(small)


@pytest.mark.parametrize("name", ["more.safetensors", "generation_config.json", "chat.jinja", "tokenizer.model", "merges.txt"])
def test_a_file_that_readers_read_and_nobody_listed(small: Path, name: str) -> None:
    (small / "README.md").write_text("what is not read may come later")
    verify(small)
    (small / name).write_text("{}")
    text = f"{small}/{name}: not listed in SHA256SUMS: remove it, or add the line that `sha256sum {name}` prints"
    assert complaint(lambda: verify(small)) == text
    assert complaint(lambda: verify(small, rank=3, world=4)) == text


def test_a_listed_file_that_is_not_there(small: Path, tmp_path: Path) -> None:
    file = small / "model.safetensors"
    file.rename(tmp_path / "away")
    missing = "missing, and SHA256SUMS lists it: copy it again, or, if it is meant to be gone, remove its line"
    assert complaint(lambda: verify(small)) == f"{file}: {missing}"
    file.symlink_to(tmp_path / "away")
    assert complaint(lambda: verify(small)) == f"{file}: a link that leaves the directory is not followed; put the file itself there"
    file.unlink()
    file.symlink_to(file)
    assert complaint(lambda: verify(small)) == f"{file}: {missing}"
    file.unlink()
    file.mkdir()
    assert complaint(lambda: verify(small)) == f"{file}: {missing}"


ZEROS = "0" * 64


@pytest.mark.parametrize(
    "line",
    [
        "", "x", f"{ZEROS} a", f"{ZEROS}  ", f"{ZEROS}  ../config.json", f"{ZEROS}  /etc/passwd", f"{ZEROS}  a/b", f"{ZEROS}  ..",
        f"{ZEROS}  .", f"{ZEROS}  {SUMS}", f"\\{ZEROS}  a\\nb", f"{ZEROS}  a\\b", f"{'A' * 64}  a",
        f"{ZEROS[1:]}  a", f"{ZEROS}  a\r", f"{ZEROS}  a\0",
        f"SHA256 (a) = {ZEROS}", "# a comment", f"{ZEROS}  config.json",
    ],
)  # fmt: skip
def test_a_line_that_is_none(small: Path, line: str) -> None:
    """One that escapes the directory is no line either; the last case is a name that is listed twice."""
    (small / SUMS).write_text((small / SUMS).read_text() + line + "\n")
    at = 4 + line.count("\n")
    damaged = "damaged: lines of a SHA-256, two spaces and a bare name were expected, each name once"
    assert complaint(lambda: verify(small)) == f"{small}/{SUMS}:{at}: {damaged}"


def test_a_list_that_is_cut_short(small: Path) -> None:
    whole = (small / SUMS).read_bytes()
    for length in range(len(whole)):
        (small / SUMS).write_bytes(whole[:length])
        complaint(lambda: verify(small))
    (small / SUMS).write_bytes(b"")
    with (small / SUMS).open("ab") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    assert complaint(lambda: verify(small)) == f"{small}/{SUMS}: {1 << 40:,} bytes: a list of files was expected"


def test_coreutils_s_binary_mark_is_read(small: Path) -> None:
    (small / SUMS).write_text((small / SUMS).read_text().replace("  ", " *"))
    verify(small)


def test_a_name_that_the_list_cannot_hold(small: Path) -> None:
    (small / "LICENSE\nMIT").write_text("")
    assert "'LICENSE\\nMIT' is no name that SHA256SUMS can hold: rename the file" in complaint(lambda: seal(small))


def test_an_export_of_an_export_has_sums_of_its_own(root: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", tiny.config("qwen2"), tiny.weights("qwen2", torch.float32))
    seal(source)
    bitsandbytes.quantize(source, tmp_path / "out", Quantization())
    verify(tmp_path / "out")
    assert (source / SUMS).read_text() != (tmp_path / "out" / SUMS).read_text()


def test_what_it_costs_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_checksums.main(["--gigabytes", "0.004", "--files", "2", "--repeats", "1", "--dir", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["files"] == 2
    assert set(told["results"]) == set(bench_checksums.WORK)
    assert all(one["cpu_seconds_per_gb"] > 0 for one in told["results"].values())
    assert list(tmp_path.iterdir()) == []
    assert bench_checksums.main(["--files", "0"]) == 1
    assert capsys.readouterr().err == "megamod: error: --files 0: a positive number was expected\n"
