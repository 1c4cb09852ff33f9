"""The rules by which megamod reads what others have made, each with its tests, in this order:

1.  Tensors are safetensors, everything else is JSON or text. Nothing that a run writes or reads is pickled.
2.  A foreign `.pt`, `.bin` or other pickle is not opened, not even with `weights_only=True`: megamod reads no weights from one.
    Megatron-LM's checkpoints are pickles around plain numbers: weights/torch_dist.py, which no run uses, looks at these with an unpickler
    that has no function and no class of anybody's. What it refuses: test_convert.py.
3.  Shard names are bare, end in `.safetensors` and lie in the directory after resolving links; each key once, in its own shard. For a
    checkpoint's manifest see test_checkpoint.py, for SHA256SUMS test_checksums.py.
4.  No code of a checkpoint runs: `trust_remote_code` is never true, a config.json with `auto_map` is refused, adapter_config.json's
    `auto_mapping` imports nothing.
5.  Chat templates run in jinja2's sandbox alone, and come from no GGUF. What a template may do there: test_chat.py.
6.  Nothing here listens on the network; what is shown with a server names 127.0.0.1. (torchrun's store, gloo and NCCL do listen.)
7.  Code comes from a file whose path the operator gives: a config, `--sets`. Data is never evaluated.
8.  Nothing is fetched: megamod's modules import nothing that could. There are no images yet; their rules come with them.
9.  Whatever size, depth or number a file claims, the answer is one line, and memory does not follow the claim.
"""

import ast
import gzip
import io
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import distributed
import pytest
import tiny
import torch
from complaints import complaint
from safetensors.torch import load_file, save_file
from test_house import MODULES, ROOT, files, imports, name_of, parsed
from test_peft import made
from test_weights import write

from megamod import config, foreign
from megamod.config import ChatConfig, LoraConfig
from megamod.data import chat
from megamod.data.importers import Source as Set
from megamod.data.importers import import_dataset
from megamod.data.jsonl import read_rows
from megamod.data.tokenizer import Tokenizer
from megamod.errors import MegamodError
from megamod.model.shape import read_config, read_shape
from megamod.train import train
from megamod.weights import bitsandbytes, checksums, peft, torch_dist
from megamod.weights.load import INDEX, SINGLE, Safetensors, weights_at
from megamod.weights.quantization import Quantization
from tools import make_checkpoint

TOOLS = sorted((ROOT / "tools").glob("*.py"))
PYTHON = [*MODULES, *TOOLS, *sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "kernels").rglob("*.py")), ROOT / "setup.py"]
Reader = Callable[[Path], Any]


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def calls(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call: what is called, as it is written, and the keyword arguments."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords}


def callers(*names: str) -> set[str]:
    """The files that call one of `names`, whatever it is an attribute of."""
    return {relative(file) for file in PYTHON for name, _ in calls(file) if name in names or name.rpartition(".")[2] in names}


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_the_trap_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()


# --- 1. safetensors and JSON -----------------------------------------------------------------------------------------------

PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}


LOOKS = ROOT / "megamod" / "weights" / "torch_dist.py"


@pytest.mark.parametrize("file", [file for file in PYTHON if file != LOOKS], ids=relative)
def test_nothing_that_pickles_is_called(file: Path) -> None:
    assert not {name.partition(".")[0] for name in imports(parsed(file))} & PICKLES
    for name, words in calls(file):
        assert name not in ("torch.save", "torch.load", "torch.hub.load", "np.save", "pandas.read_pickle"), name
        if name in ("np.load", "np.savez", "np.savez_compressed"):
            assert words.get("allow_pickle") == "False", name


def test_megatron_s_pickles_are_looked_at() -> None:
    """One file may, in one way; and no run imports it."""
    assert not {name for name, _ in calls(LOOKS)} & {"pickle.load", "pickle.loads", "torch.load", "pickle.Unpickler", "eval", "exec"}
    modules = "import sys, megamod.train, megamod.moderator; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", modules], capture_output=True, text=True, check=True).stdout.split()
    assert "megamod.weights.load" in imported
    assert not {"megamod.weights.torch_dist", "megamod.weights.convert"} & set(imported)
    for module, name in (
        ("builtins", "eval"),
        ("os", "system"),
        ("torch", "load"),
        ("torch", "hub"),
        ("numpy", "load"),
        ("megamod", "train"),
    ):
        with pytest.raises(MegamodError, match="no data of a checkpoint"):
            torch_dist._Looking(io.BytesIO()).find_class(module, name)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("pickled")


def unpickled_run(folder: Path) -> list[str]:
    """On one rank: train, save, resume, export, of all weights and of an adapter, where nothing can be pickled."""
    tiny_run = str(ROOT / "configs" / "tiny.py")
    small = ["data.row_length=64", "data.train.documents=16", "data.train.mean_length=20", "log.tensorboard=false", "data.rows_per_step=2"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("dump", "dumps", "load", "loads"):
            patch.setattr(pickle, name, refuse)
        patch.setattr(torch, "save", refuse)
        patch.setattr(torch, "load", refuse)
        for kind, more in (("full", []), ("lora", ["lora.r=2"])):
            for steps in (1, 2):  # the second goes on from the first's checkpoint
                train(config.load(tiny_run, [*small, *more, f"dir={folder / kind}", f"steps={steps}", "optim.warmup_steps=0"]))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_run_pickles_nothing(tmp_path: Path) -> None:
    (written,) = distributed.run(1, unpickled_run, tmp_path)
    kinds = {Path(name).suffix or Path(name).name for name in written}
    assert {".safetensors", ".json", ".jsonl", checksums.SUMS} <= kinds
    assert kinds <= {".safetensors", ".json", ".jsonl", ".npy", ".bin", ".txt", ".jinja", "lock", "latest", checksums.SUMS}, kinds
    for name in written:
        start = (tmp_path / name).read_bytes()[:4]
        assert not start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), name


# --- 2. foreign pickles ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """A model and an adapter, each file of whose weights is a pickle that makes the folder `sprung`."""
    data = pickle.dumps(Trap(tmp_path / "sprung"))
    model = write(tmp_path / "model", tiny.config("qwen2"), tiny.weights("qwen2", torch.float32))
    peft.write(tmp_path / "adapter", made(LoraConfig(), tiny.shape("qwen2")), LoraConfig(), tiny.shape("qwen2"), base="b")
    (tmp_path / "adapter" / checksums.SUMS).unlink()
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        (model / name).write_bytes(data)
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(data)
    return tmp_path


def test_a_pickle_is_not_opened(trapped: Path) -> None:
    shape = tiny.shape("qwen2")
    weights_at(trapped / "model", shape, 0)  # what lies beside the weights is not looked at
    for file, read in (
        (trapped / "model" / SINGLE, lambda: weights_at(trapped / "model", shape, 0)),
        (trapped / "adapter" / peft.TENSORS, lambda: peft.opened(trapped / "adapter", shape)),
    ):
        file.write_bytes((trapped / "adapter" / "adapter_model.bin").read_bytes())  # a pickle by another name
        assert complaint(read).startswith(f"{file}: not a whole safetensors file")
        file.unlink()
    assert complaint(lambda: weights_at(trapped / "model", shape, 0)) == f"{trapped}/model: holds neither {INDEX} nor {SINGLE}"
    assert "adapter_model.bin: a pickle may hold code and is not opened" in complaint(lambda: peft.opened(trapped / "adapter", shape))
    assert not (trapped / "sprung").exists()


# --- 3. names of shards ----------------------------------------------------------------------------------------------------


def indexed(folder: Path, kind: str) -> Path:
    """A directory with an index, of each kind that is read by one."""
    base = write(folder / "base", tiny.config("qwen2"), tiny.weights("qwen2", torch.float32), files=2)
    if kind == "4 bits":
        bitsandbytes.quantize(base, folder / "out", Quantization(), shard_bytes=40_000)
        (folder / "out" / checksums.SUMS).unlink()
        return folder / "out"
    return base


INDEXED: Mapping[str, Reader] = {
    "plain": lambda path: weights_at(path, tiny.shape("qwen2"), 0),
    "4 bits": lambda path: weights_at(path, tiny.shape("qwen2"), 0),
    "PiSSA": Safetensors,
}
ESCAPES = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "..", "", "~/x.safetensors", "a\0.safetensors", 7, None]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("kind", INDEXED)
def test_a_name_that_leaves_the_directory(tmp_path: Path, kind: str, name: Any) -> None:
    path = indexed(tmp_path, kind)
    index = json.loads((path / INDEX).read_text())
    key = next(iter(index["weight_map"]))
    (path / "sub").mkdir()
    for where in (path.parent, path / "sub"):  # where the name leads, there is a good shard
        save_file({key: torch.zeros(1)}, where / "x.safetensors")
    index["weight_map"][key] = name
    (path / INDEX).write_text(json.dumps(index))
    text = complaint(lambda: INDEXED[kind](path))
    assert text == f"{path / INDEX}: {name!r} must be a bare *.safetensors name inside the directory"


@pytest.mark.parametrize("kind", [*INDEXED, "adapter"])
def test_a_link_is_followed_inside_the_directory_only(tmp_path: Path, kind: str) -> None:
    if kind == "adapter":
        cfg, shape = LoraConfig(), tiny.shape("qwen2")
        path = peft.write(tmp_path / "adapter", made(cfg, shape), cfg, shape, base="b")
        (path / checksums.SUMS).unlink()
    else:
        path = indexed(tmp_path, kind)
    read: Reader = peft.Peft if kind == "adapter" else INDEXED[kind]
    file = next(path.glob("*.safetensors"))
    file.rename(tmp_path / "outside.safetensors")
    (tmp_path / "stairs").symlink_to(tmp_path)
    for target in (tmp_path / "outside.safetensors", Path("../outside.safetensors"), tmp_path / "stairs" / "outside.safetensors"):
        file.symlink_to(target)
        said = "a link that leaves the directory is not followed" if kind == "adapter" else "name inside the directory"
        assert said in complaint(lambda: read(path))
        file.unlink()
    file.symlink_to(file.name)  # of itself
    complaint(lambda: read(path))
    file.unlink()
    (tmp_path / "outside.safetensors").rename(path / "elsewhere.safetensors")
    file.symlink_to("elsewhere.safetensors")
    read(path)
    (tmp_path / "door").symlink_to(path)  # the directory itself may be a link
    read(tmp_path / "door")


@pytest.mark.parametrize("kind", INDEXED)
def test_a_key_is_in_one_shard_and_in_its_own(tmp_path: Path, kind: str) -> None:
    path = indexed(tmp_path, kind)
    first, second = sorted(path.glob("*.safetensors"))[:2]
    key, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), key: tensor}, second)
    assert complaint(lambda: INDEXED[kind](path)) == f"{path / INDEX}: {key} is said to be in {first.name}, and {second.name} holds it"


def header(file: Path, text: str, data: bytes = bytes(16)) -> Path:
    """A safetensors file with this header."""
    file.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)
    return file


ONE = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
TWO = ONE.replace("[0, 8]", "[8, 16]")


@pytest.mark.parametrize("text", [f"{{{ONE}, {TWO}}}", f"{{{ONE}, {ONE}}}"])
def test_a_key_that_a_header_has_twice(tmp_path: Path, text: str) -> None:
    header(tmp_path / SINGLE, text)
    assert complaint(lambda: Safetensors(tmp_path)).startswith(f"{tmp_path / SINGLE}: not a whole safetensors file (")


# --- 4. no code of a checkpoint --------------------------------------------------------------------------------------------

EVIL = "import os\nos.mkdir({!r})\nclass A:\n    pass\n"


def test_remote_code_is_never_trusted() -> None:
    loaders = [(f, words) for f in PYTHON for name, words in calls(f) if name.endswith((".from_pretrained", ".from_config"))]
    assert len(loaders) > 5
    assert [words for _, words in loaders if words.get("trust_remote_code", "False") != "False"] == []
    ours = [words for file, words in loaders if file in MODULES]
    assert [(words["trust_remote_code"], words["local_files_only"]) for words in ours] == [("False", "True")] * len(ours)


def test_auto_map_is_refused(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A"}
    write(tmp_path / "model", tiny.config("qwen2", auto_map=auto_map), tiny.weights("qwen2", torch.float32))
    (tmp_path / "model" / "evil.py").write_text(EVIL.format(str(tmp_path / "sprung")))
    line = f"{tmp_path}/model/config.json: names code to run (`auto_map`); megamod runs none from a checkpoint: remove that key"
    readers: list[Reader] = [read_config, read_shape, bitsandbytes.says_four_bits, lambda path: weights_at(path, tiny.shape("qwen2"), 0)]
    for read in readers:
        assert complaint(lambda read=read: read(tmp_path / "model")) == line  # type: ignore[misc]
    assert not (tmp_path / "sprung").exists()


def test_an_adapter_s_classes_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT imports `auto_mapping`'s parent_library. What this file does not know, such as auto_map, is refused."""
    (tmp_path / "evil.py").write_text(EVIL.format(str(tmp_path / "sprung")))
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg, shape = LoraConfig(), tiny.shape("qwen2")
    path = peft.write(tmp_path / "adapter", made(cfg, shape), cfg, shape, base="b")
    (path / checksums.SUMS).unlink()
    about = json.loads((path / peft.CONFIG).read_text())
    (path / peft.CONFIG).write_text(json.dumps({**about, "auto_mapping": {"base_model_class": "A", "parent_library": "evil"}}))
    peft.opened(path, shape)
    (path / peft.CONFIG).write_text(json.dumps({**about, "auto_map": {"AutoModel": "evil.A"}}))
    assert "auto_map = {'AutoModel': 'evil.A'}: not known here" in complaint(lambda: peft.opened(path, shape))
    assert not (tmp_path / "sprung").exists()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a tokenizer, without checksums."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "rows.jsonl").write_text('{"text": "abc", "label": "safe"}\n')
    make_checkpoint.make(folder / "hf", folder / "rows.jsonl", vocab=300, layers=1, hidden=8, heads=2, seed=1)
    (folder / "hf" / checksums.SUMS).unlink()
    return folder / "hf"


def tokenizer_of(begun: Path, path: Path, **about: Any) -> Path:
    """A copy with another tokenizer_config.json."""
    path.mkdir()
    for file in begun.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "chat_template.jinja").unlink(missing_ok=True)
    known = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**known, "chat_template": make_checkpoint.TEMPLATE, **about}))
    return path


def test_a_tokenizer_s_code_is_not_run(begun: Path, tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["evil.A", "evil.A"]}
    path = tokenizer_of(begun, tmp_path / "evil", auto_map=auto_map, tokenizer_class="A")
    (path / "evil.py").write_text(EVIL.format(str(tmp_path / "sprung")))
    try:
        Tokenizer(path)
    except MegamodError as error:
        assert "no tokenizer that can be read" in str(error)  # noqa: PT017 (transformers may also pass over it)
    assert not (tmp_path / "sprung").exists()


# --- 5. chat templates -----------------------------------------------------------------------------------------------------

ATTACKS = [
    "{{{{ cycler.__init__.__globals__.os.mkdir({path!r}) }}}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__['os'].mkdir({path!r}) }}}}",
    "{{% set x = self.__init__.__globals__.__builtins__ %}}{{{{ x['__import__']('os').mkdir({path!r}) }}}}",
    "{{{{ messages | attr('__class__') }}}}{{{{ lipsum.__globals__['os'].mkdir({path!r}) }}}}",
    "{{{{ raise_exception.__globals__.__builtins__.open({path!r}, 'w') }}}}",
    "{{{{ '{{0.__class__.__init__.__globals__}}'.format(raise_exception) }}}}{{{{ namespace.__init__.__globals__.os.mkdir({path!r}) }}}}",
]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["the checkpoint's", "the operator's"])
def test_a_template_that_attacks(begun: Path, tmp_path: Path, attack: str, place: str) -> None:
    template = attack.format(path=str(tmp_path / "sprung"))
    if place == "the checkpoint's":
        tokenizer = Tokenizer(tokenizer_of(begun, tmp_path / "evil", chat_template=template))
    else:
        tokenizer = Tokenizer(begun, template)
    assert tokenizer.template == template
    text = complaint(lambda: tokenizer.render([{"role": "user", "content": "x"}], prompt=True, where="row 1"))
    assert text.startswith("row 1: the chat template fails on this conversation: SecurityError")
    assert not (tmp_path / "sprung").exists()


def test_no_template_comes_from_a_gguf() -> None:
    """One tool reads one GGUF file, whose SHA-256 it has: whoever wrote that template, it is this one (tests/test_real_weights.py)."""
    assert {relative(f) for f in PYTHON for _, words in calls(f) if "gguf_file" in words} == {"tools/real_weights.py"}
    source = (ROOT / "tools" / "real_weights.py").read_text()
    assert source.index("if digest(folder / GGUF) != SHA256") < source.index("gguf_file=GGUF")


# --- 6. servers ------------------------------------------------------------------------------------------------------------


def test_nothing_listens() -> None:
    servers = ("bind", "listen", "serve_forever", "HTTPServer", "ThreadingHTTPServer", "TCPServer", "create_server", "start_server")
    assert {file for file in callers(*servers) if not file.endswith("megamod/config.py")} == set()  # inspect's bind
    words = [("0.0.0", ".0"), ("--host ", "::"), ("INADDR", "_ANY")]
    texts = {path: path.read_bytes() for path in files() if path.suffix in (".py", ".sh", ".sbatch", ".md", ".json", ".toml")}
    assert [relative(path) for path, text in texts.items() if any("".join(word).encode() in text for word in words)] == []


# --- 7. code and data ------------------------------------------------------------------------------------------------------


def test_no_data_is_evaluated() -> None:
    bare = {"eval", "exec", "compile", "__import__"}
    members = {"import_module", "exec_module", "run_path", "run_module", "literal_eval", "system", "popen"}
    found: dict[str, set[str]] = {}
    for file in PYTHON:
        for name, words in calls(file):
            if name in bare or name.rpartition(".")[2] in members:
                found.setdefault(relative(file), set()).add(name)
            assert words.get("shell", "False") == "False", f"{relative(file)}: {name}"
    assert found == {
        "megamod/config.py": {"runpy.run_path", "ast.literal_eval"},  # the config that is named on the command line, and its overrides
        "tools/import_dataset.py": {"runpy.run_path"},  # --sets
    }


def test_an_override_is_no_expression(tmp_path: Path) -> None:
    code = f"__import__('os').mkdir({str(tmp_path / 'sprung')!r})"
    for key in ("dir", "steps", "loss.verdict_weight", "data.train"):
        try:
            config.load(ROOT / "configs" / "tiny.py", [f"{key}={code}"])
        except MegamodError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 (a text is a good `dir`)
    assert not (tmp_path / "sprung").exists()


def test_a_run_s_record_names_functions_and_imports_none(tmp_path: Path) -> None:
    """`loss` is a name in run.json and config.json; the function comes from the config file alone."""
    cfg = config.load(ROOT / "configs" / "tiny.py")
    config.save(cfg, tmp_path / "saved.json")
    assert json.loads((tmp_path / "saved.json").read_text())["loss"]["call"] == "megamod.losses:moderation"
    assert complaint(lambda: config.load(tmp_path / "absent.py")) == f"{tmp_path}/absent.py: no such config file"
    complaint(lambda: config.load(tmp_path / "saved.json"))


# --- 8. nothing is fetched -------------------------------------------------------------------------------------------------

NETWORK = {"ssl", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "huggingface_hub", "fsspec", "PIL", "datasets"}


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_megamod_imports_nothing_that_fetches(file: Path) -> None:
    assert {name.partition(".")[0] for name in imports(parsed(file))} & NETWORK == set()
    assert {name for name, _ in calls(file) if name.startswith("socket.")} <= {"socket.gethostname"}


# --- 9. sizes, depths and numbers ------------------------------------------------------------------------------------------

SHARDS = [
    pytest.param((1 << 63).to_bytes(8, "little"), id="a header of 2^63 bytes"),
    pytest.param((1 << 40).to_bytes(8, "little") + bytes(100), id="a header of 2^40 bytes"),
    pytest.param(b"\xff" * 8, id="a header of 2^64 - 1 bytes"),
    pytest.param((100_000_001).to_bytes(8, "little") + b" " * 64, id="a header beyond safetensors' own limit"),
]
HEADERS = [
    '{"a": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 16]}}',
    '{"a": {"dtype": "F32", "shape": [9223372036854775807, 3], "data_offsets": [0, 16]}}',
    '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 18446744073709551615]}}',
    '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}',
    '{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}',
    '{"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}',
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"__metadata__": {"a": 3}}',
    "[]",
]


def bounded(read: Callable[[], Any], more: int = 1 << 30) -> str:
    """The complaint of `read`, which may not take more than so much memory than there is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else None
    try:
        if used is not None:
            resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
        return complaint(read)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def spoiled(folder: Path, kind: str, data: bytes) -> tuple[Path, Reader]:
    """The file of a directory's weights with other bytes, and who reads it."""
    if kind == "adapter":
        cfg, shape = LoraConfig(), tiny.shape("qwen2")
        path = peft.write(folder / "adapter", made(cfg, shape), cfg, shape, base="b")
        (path / checksums.SUMS).unlink()
        (path / peft.TENSORS).write_bytes(data)
        return path, lambda path: peft.opened(path, shape)
    path = indexed(folder, kind)
    next(path.glob("*.safetensors")).write_bytes(data)
    return path, INDEXED[kind]


@pytest.mark.parametrize("kind", ["plain", "4 bits", "adapter"])
@pytest.mark.parametrize("data", SHARDS)
def test_an_absurd_header_length(tmp_path: Path, kind: str, data: bytes) -> None:
    path, read = spoiled(tmp_path, kind, data)
    assert "not a whole safetensors file (" in bounded(lambda: read(path))


@pytest.mark.parametrize("text", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_lies(tmp_path: Path, text: str) -> None:
    header(tmp_path / SINGLE, text)
    assert bounded(lambda: Safetensors(tmp_path)).startswith(f"{tmp_path / SINGLE}: not a whole safetensors file (")


DEEP = "[" * 200_000 + "]" * 200_000
DIGITS = '{"vocab_size": ' + "9" * 5_000 + "}"


def settings_of(path: Path) -> Any:
    return chat.read_settings(path, ChatConfig())


JSON_FILES: Mapping[str, tuple[str, Reader]] = {
    "config.json": ("config.json", read_shape),
    "the index": (INDEX, Safetensors),
    "adapter_config.json": (peft.CONFIG, lambda path: peft.opened(path, tiny.shape("qwen2"))),
    "moderation.json": (chat.SETTINGS, settings_of),
    "tokenizer.json": ("tokenizer.json", Tokenizer),
    "tokenizer_config.json": ("tokenizer_config.json", Tokenizer),
}


@pytest.mark.parametrize("text", [DEEP, f'{{"a": {DEEP}}}', DIGITS, "", "\0", "nul", "[" * 5], ids=range(7))
@pytest.mark.parametrize("kind", JSON_FILES)
def test_json_that_is_none(begun: Path, tmp_path: Path, kind: str, text: str) -> None:
    name, read = JSON_FILES[kind]
    path = tokenizer_of(begun, tmp_path / "hf")
    (path / name).write_text(text)
    assert str(path) in bounded(lambda: read(path))


@pytest.mark.parametrize("kind", [kind for kind in JSON_FILES if "tokenizer" not in kind])
def test_a_json_file_of_a_tebibyte(begun: Path, tmp_path: Path, kind: str) -> None:
    name, read = JSON_FILES[kind]
    path = tokenizer_of(begun, tmp_path / "hf")
    with (path / name).open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    assert f"{foreign.LIMIT:,} bytes" in bounded(lambda: read(path))


def test_a_line_of_a_tebibyte(tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    line = f"{tmp_path}/rows.jsonl:1: a line of more than {foreign.LIMIT:,} bytes: one row a line was expected"
    assert bounded(lambda: list(read_rows(tmp_path / "rows.jsonl"))) == line


def test_a_packed_line_that_grows(tmp_path: Path) -> None:
    """512 MiB of spaces in half a megabyte."""
    with gzip.open(tmp_path / "train.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b" " * (1 << 23))
    sets = {"bomb": Set("a bomb", "none", "here", "en", {"train": ("train.jsonl.gz",)}, ("text",), lambda record: {})}
    text = bounded(lambda: import_dataset("bomb", tmp_path, tmp_path / "out.jsonl", sets=sets, split="train"))
    assert text == f"{tmp_path}/train.jsonl.gz:1: a line of more than {foreign.LIMIT:,} bytes: one row a line was expected"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers = 1000000000: at most 4096 were expected"),
        ({"num_hidden_layers": 10**30}, f"config.json: num_hidden_layers = {10**30}: at most {2**31} was expected"),
        ({"hidden_size": 1 << 40}, f"config.json: hidden_size = {1 << 40}: at most {2**31} was expected"),
        ({"vocab_size": 1 << 30}, "the tensors do not match config.json: 2 mis-shaped: "),
        ({"num_hidden_layers": 4000}, "the tensors do not match config.json: 47952 missing: "),
        ({"intermediate_size": 1 << 31}, "the tensors do not match config.json: 12 mis-shaped: "),
    ],
)
def test_a_config_that_asks_for_too_much(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """Weights are compared with config.json before there is a model to put them in."""
    write(tmp_path / "model", tiny.config("qwen2", **change), tiny.weights("qwen2", torch.float32))
    assert words in bounded(lambda: weights_at(tmp_path / "model", read_shape(tmp_path / "model"), 0))


def test_a_state_of_4_bits_that_is_large_or_deep(tmp_path: Path) -> None:
    path = indexed(tmp_path, "4 bits")
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    key = next(key for key in tensors if "quant_state" in key)
    for data, words in ((bytes(1 << 20), "1,048,576 bytes: a short JSON object was expected"), (b"[" * 60_000, "not JSON (")):
        save_file({**tensors, key: torch.frombuffer(bytearray(data), dtype=torch.uint8)}, file, metadata={"format": "pt"})
        assert words in bounded(lambda: weights_at(path, tiny.shape("qwen2"), 0))


def test_metadata_that_is_deep(tmp_path: Path) -> None:
    cfg, shape = LoraConfig(), tiny.shape("qwen2")
    path = peft.write(tmp_path / "adapter", made(cfg, shape), cfg, shape, base="b")
    (path / checksums.SUMS).unlink()
    tensors = load_file(path / peft.TENSORS)
    for key in (peft.NAMES, peft.QUANTIZATION):
        save_file(tensors, path / peft.TENSORS, metadata={"format": "pt", key: "[" * 100_000})
        assert f"{path / peft.TENSORS}: {key}: " in bounded(lambda: peft.opened(path, shape))
