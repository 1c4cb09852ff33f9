"""Weights in 4 bits as bitsandbytes stores them in a Hugging Face directory: read by boxes, made of plain ones, and written.

Beside a matrix X.weight of N numbers, two to a byte in uint8 [⌈N/2⌉, 1], stand

    X.weight.quant_map          [16] fp32          the codes
    X.weight.absmax             [⌈N/B⌉] fp32       of each block of B; uint8 where these are quantised in turn, and then also
    X.weight.nested_absmax      [⌈N/B/256⌉] fp32
    X.weight.nested_quant_map   [256] fp32         the dynamic numbers
    X.weight.quant_state.bitsandbytes__nf4         JSON, a byte each: type, block size, the dtype and shape of the weight, m

The equations are those of `megamod_kernels.nf4`. A matrix is handled in chunks, so that no copy of it in fp32 is made on the way.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamod import foreign
from megamod.errors import MegamodError, listed, nearest
from megamod.model.shape import ConfigJsonError, in_four_bits, read_config, read_shape
from megamod.weights import checksums
from megamod.weights.export import begin, drafting, refuse_taken, stream
from megamod.weights.load import Safetensors, Scored, Source, check_keys, directories, verify
from megamod.weights.quantization import Quantization
from megamod.weights.table import hf_shapes
from megamod_kernels import nf4
from megamod_kernels.nf4 import Absmax, Lines, QuantType, Shard

AT_A_TIME = 1 << 21  # numbers, an even count; what is done to each of them takes some forty bytes
STATE = "quant_state.bitsandbytes__"
SIDE = re.compile(r"(.+)\.(quant_map|absmax|nested_quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)")
LARGEST = torch.finfo(torch.float32).max
LARGEST_STATE = 1 << 16  # bytes of JSON; bitsandbytes writes some two hundred
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """A whole matrix in 4 bits, in a file or in memory."""

    shape: tuple[int, int]
    data: Callable[[int, int], Tensor]  # its bytes from one number to another, [count] uint8
    absmax: Absmax
    blocksize: int
    quant_type: QuantType

    def shard(self, offset: Sequence[int], size: Sequence[int]) -> Shard:
        """The box of `size` at `offset`, its codes packed anew in its own order."""
        lines = Lines.of(self.shape, _pair(offset), _pair(size))
        absmax = self.absmax.of(lines, self.blocksize)
        return Shard(self._packed(lines), absmax, self.absmax.nested, self.absmax.offset, lines, self.blocksize, self.quant_type)

    def values(self, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The numbers of the box, in fp32."""
        (row, column), (height, width) = _pair(offset), _pair(size)
        out = torch.empty(height, width)
        rows = max(1, AT_A_TIME // max(1, width))
        for first in range(0, height, rows):
            part = out[first : first + rows]
            nf4.dequantize(self.shard((row + first, column), part.shape), part)
        return out

    def _packed(self, lines: Lines) -> Tensor:
        """`[⌈n/2⌉]` uint8; in a last byte that is not full a zero's code follows, as if the shard had been quantised by itself."""
        if lines.count == 1 and lines.start % 2 == 0:  # bytes as they are stored
            data = self.data(lines.start // 2, -(-(lines.start + lines.width) // 2)).clone()
        else:
            data, filled = torch.empty(-(-lines.numel // 2), dtype=torch.uint8), 0
            for first, count, width in _spans(lines):
                codes = self._codes(first, first + (count - 1) * lines.stride + width)
                codes = torch.nn.functional.pad(codes.as_strided((count, width), (lines.stride, 1)).flatten(), (0, count * width % 2))
                data[filled : filled + len(codes) // 2] = codes[::2] << 4 | codes[1::2]
                filled += len(codes) // 2
        if lines.numel % 2:
            data[-1] = (data[-1] & 240) | _code_of_zero(self.quant_type)
        return data

    def _codes(self, first: int, last: int) -> Tensor:
        """`[last - first]` uint8, one to a byte."""
        data = self.data(first // 2, -(-last // 2))
        return torch.stack((data >> 4, data & 15), 1).flatten()[first % 2 : first % 2 + last - first]


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    return numbers[0], numbers[1]


def _spans(lines: Lines) -> Iterator[tuple[int, int, int]]:
    """`lines` in chunks of which all but the last are an even count of numbers: the first one's place, how many lines, how wide."""
    if lines.count == 1:
        for done in range(0, lines.width, AT_A_TIME):
            yield lines.start + done, 1, min(AT_A_TIME, lines.width - done)
    else:
        at_once = max(2, AT_A_TIME // lines.stride // 2 * 2)
        for done in range(0, lines.count, at_once):
            yield lines.start + done * lines.stride, min(at_once, lines.count - done), lines.width


def _code_of_zero(quant_type: QuantType) -> int:
    limits, order = nf4.bounds(quant_type)
    return int(order[torch.bucketize(torch.zeros(()), limits)])


class FourBits(ABC):
    """A Source some of whose matrices are in 4 bits; what is read of these is what the 4 bits stand for, in fp32 and not rounded.

    The last matrix that was read is kept: what it takes in 4 bits.
    """

    quantization: Quantization

    def __init__(self, source: Source, matrices: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.source, self._matrices, self._shapes = source, matrices, shapes
        self._last: tuple[str, Stored] | None = None

    @property
    def directories(self) -> tuple[Path, ...]:
        """What is read, which may have checksums."""
        return directories(self.source)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the tensors, by name, as if none was quantised."""
        return self._shapes

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor before it was quantised."""

    def read(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Tensor:
        """The box of `size` at `offset` of a tensor: in fp32 where it is in 4 bits, else as it is stored."""
        return self.stored(name).values(offset, size) if name in self._matrices else self.source.read(name, offset, size)

    def shard(self, name: str, offset: Sequence[int], size: Sequence[int]) -> Shard | None:
        """The box in 4 bits, see `megamod_kernels.nf4`; None: this tensor is not in 4 bits."""
        return self.stored(name).shard(offset, size) if name in self._matrices else None

    def stored(self, name: str) -> Stored:
        """A whole matrix in 4 bits."""
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is made
            self._last = name, self._made(name)
        return self._last[1]

    @abstractmethod
    def _made(self, name: str) -> Stored: ...


def four_bits(source: Source) -> FourBits | None:
    """`source`, or what it is beneath a new head of scores, if it has matrices in 4 bits."""
    inner = source.source if isinstance(source, Scored) else source
    return inner if isinstance(inner, FourBits) else None


def quantised(source: Source, quantization: Quantization | None, where: str) -> Source:
    """`source` as an adapter at `where` knew it in training, which says `quantization`; None: `source` as it is.

    Raises:
        MegamodError: a source in other 4 bits.
    """
    there = four_bits(source)
    if quantization is None:
        return source
    if there is None:
        return Quantizing(source, quantization)
    if (theirs := there.quantization) != quantization:
        linears = [name.removesuffix(".weight") for name, size in source.shapes().items() if is_linear(name, size)]
        differ = [module for module in linears if theirs.converts(module) != quantization.converts(module)]
        if differ or str(theirs) != str(quantization):
            which = f": {listed(differ, 3)} in one only" if differ else ""
            raise MegamodError(f"{where}: an adapter of a base in {quantization}, and this base is in {theirs}{which}")
    return source


def is_linear(name: str, size: Sequence[int]) -> bool:
    """Whether the tensor `name` is the weight of a layer's linear: what can be in 4 bits."""
    return len(size) == 2 and name.startswith("model.layers.")


class Quantizing(FourBits):
    """A plain Source as `quantization` leaves it, each matrix quantised when it is read: exactly as bitsandbytes would.

    Memory: one whole tensor as it is, and in 4 bits.

    Raises:
        MegamodError: what cannot be quantised so; in reading, NaN or an infinite number.
    """

    def __init__(self, source: Source, quantization: Quantization) -> None:
        if (fault := quantization.fault()) is not None:
            raise MegamodError(f"quantization.{fault}")
        linears = {name: _pair(size) for name, size in source.shapes().items() if is_linear(name, size)}
        for one in quantization.modules_to_not_convert:
            only = Quantization(modules_to_not_convert=(one,))
            modules = [name.rpartition(".")[0] for name, size in source.shapes().items() if len(size) == 2] + ["lm_head"]  # also a tied one
            if all(only.converts(module) for module in modules):
                leaves = {module.rpartition(".")[2] for module in modules}
                raise MegamodError(f"modules_to_not_convert: {one!r} names no linear of this model, {nearest(one, leaves)}")
        matrices = {name: size for name, size in linears.items() if quantization.converts(name.removesuffix(".weight"))}
        if not matrices:
            raise MegamodError("modules_to_not_convert: no linear is left to quantise")
        super().__init__(source, matrices, source.shapes())
        self.quantization = quantization

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor before it was quantised."""
        return self.source.dtype(name)

    def _made(self, name: str) -> Stored:
        shape, block, kind = self._matrices[name], self.quantization.blocksize, self.quantization.quant_type
        tensor, whole = self.source.read(name, (0, 0), shape), Lines.of(shape, (0, 0), shape)
        absmax = torch.zeros(-(-whole.total // block))
        for part, lines in _chunks(tensor):
            if not bool(part.isfinite().all()):
                raise MegamodError(f"{name}: holds NaN or an infinite number, and cannot be in 4 bits")
            torch.maximum(absmax, nf4.block_absmax(part, lines, block), out=absmax)
        absmax = nf4.whole_blocks(absmax, whole, block)
        data = torch.empty(-(-whole.total // 2), dtype=torch.uint8)
        for part, lines in _chunks(tensor):
            codes = nf4.quantize(part, absmax, lines, block, kind)
            data[lines.start // 2 : lines.start // 2 + len(codes)] = codes
        kept = nf4.compress(absmax) if self.quantization.use_double_quant else Absmax(absmax)
        return Stored(shape, lambda first, last: data[first:last], kept, block, kind)

    def size(self, name: str) -> int:
        """Bytes of what `tensors` gives, but for the JSON."""
        numbers = math.prod(self._shapes[name])
        if name not in self._matrices:
            return numbers * self.dtype(name).itemsize
        blocks = -(-numbers // self.quantization.blocksize)
        statistics = blocks + 4 * -(-blocks // nf4.NESTED) + 4 * 256 if self.quantization.use_double_quant else 4 * blocks
        return -(-numbers // 2) + 4 * 16 + statistics

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A tensor as bitsandbytes stores it, by the names of the module docstring; one that is not in 4 bits as it is."""
        size = self._shapes[name]
        if name not in self._matrices:
            return {name: self.source.read(name, [0] * len(size), size)}
        one = self.stored(name)
        said: dict[str, Any] = {"quant_type": one.quant_type, "blocksize": one.blocksize, "dtype": _word(self.dtype(name)), "shape": size}
        sides = {"absmax": one.absmax.values, "quant_map": torch.tensor(nf4.CODES[one.quant_type])}
        if one.absmax.nested is not None and one.absmax.offset is not None:
            said |= {"nested_blocksize": nf4.NESTED, "nested_dtype": "float32", "nested_offset": one.absmax.offset.item()}
            sides |= {"nested_absmax": one.absmax.nested, "nested_quant_map": nf4.dynamic_map().clone()}
        sides[f"{STATE}{one.quant_type}"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        data = one.data(0, -(-math.prod(size) // 2))[:, None]
        return {name: data, **{f"{name}.{part}": tensor for part, tensor in sides.items()}}


def _chunks(tensor: Tensor) -> Iterator[tuple[Tensor, Lines]]:
    """A matrix in chunks of whole rows, in fp32; all but the last of an even count of numbers."""
    rows, columns = tensor.shape
    at_once = max(2, AT_A_TIME // max(1, columns) // 2 * 2)
    for first in range(0, rows, at_once):
        part = tensor[first : first + at_once]
        yield part.float(), Lines.of((rows, columns), (first, 0), _pair(part.shape))


# --- a directory -----------------------------------------------------------------------------------------------------------


def says_four_bits(path: str | Path) -> bool:
    """Whether the config.json at `path`, if there is one, says that the weights are in bitsandbytes' 4 bits.

    Raises:
        MegamodError: they are quantised in another way.
    """
    try:
        return (Path(path) / "config.json").is_file() and in_four_bits(read_config(path))
    except ConfigJsonError as error:
        raise MegamodError(f"{path}: config.json: {error}") from None


def quantization_at(path: str | Path) -> Quantization | None:
    """How the Hugging Face directory at `path` is quantised; None: it is not. Raises MegamodError, see `BitsAndBytes`."""
    return BitsAndBytes(path).quantization if says_four_bits(path) else None


@dataclass(frozen=True)
class State:
    """What bitsandbytes' JSON says of one matrix."""

    quant_type: QuantType
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, int]
    offset: float | None  # m; None: absmax is in fp32


class BitsAndBytes(FourBits):
    """A Hugging Face directory that bitsandbytes has quantised. Only what is asked for is read of the matrices.

    Raises:
        MegamodError: see `Safetensors` and `read_shape`; tensors that are missing, of another shape, dtype or quantisation than
            config.json and each other, or codes that are not bitsandbytes' own; in reading, a damaged absmax.
    """

    def __init__(self, directory: str | Path) -> None:
        self._file, self._root = Safetensors(directory), Path(directory)
        found: dict[str, dict[str, str]] = {}  # matrix → part → the tensor that holds it
        for key in self._file.shapes():
            if match := SIDE.fullmatch(key):
                found.setdefault(match[1], {})[match[2]] = key
        self._expected = hf_shapes(read_shape(directory))
        self._states = {name: self._state(name, parts) for name, parts in sorted(found.items())}
        side = {key for parts in found.values() for key in parts.values()}
        matrices = {name: state.shape for name, state in self._states.items()}
        super().__init__(self._file, matrices, {k: matrices.get(k, size) for k, size in self._file.shapes().items() if k not in side})
        for name in self._shapes:
            if name not in matrices and self._file.dtype(name) is torch.uint8:
                raise self._wrong(f"{name}.{STATE}…", "missing, and the tensor is in uint8")
        self.quantization = self._common()

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor before it was quantised."""
        return self._states[name].dtype if name in self._states else self._file.dtype(name)

    def _wrong(self, key: str, what: str) -> MegamodError:
        return MegamodError(f"{self._root}: {key}: {what}")

    def _state(self, name: str, parts: Mapping[str, str]) -> State:
        """Of one matrix, everything checked but the numbers of absmax."""
        states = [part for part in parts if part.startswith(STATE)]
        if len(states) != 1:
            raise self._wrong(f"{name}.{STATE}…", f"{len(states) or 'none'} there: one was expected")
        key = parts[states[0]]
        state = self._parsed(key, states[0].removeprefix(STATE))
        numbers = math.prod(state.shape)
        if (wanted := self._expected.get(name, state.shape)) != state.shape:
            raise self._wrong(key, f"shape = {list(state.shape)}: config.json needs {list(wanted)}")
        blocks, nested = -(-numbers // state.blocksize), state.offset is not None
        sides = {"quant_map": ((16,), torch.float32), "absmax": ((blocks,), torch.uint8 if nested else torch.float32)}
        if nested:
            sides |= {"nested_absmax": ((-(-blocks // nf4.NESTED),), torch.float32), "nested_quant_map": ((256,), torch.float32)}
        self._check(name, (-(-numbers // 2), 1), torch.uint8)
        for part, (size, dtype) in sides.items():
            self._check(f"{name}.{part}", size, dtype)
        for part in parts.keys() - sides.keys() - set(states):
            raise self._wrong(f"{name}.{part}", f"not expected, since {key} tells of no second quantisation")
        for part, code in (("quant_map", torch.tensor(nf4.CODES[state.quant_type])), ("nested_quant_map", nf4.dynamic_map())):
            if part in sides and not torch.equal(self._whole(f"{name}.{part}"), code):
                raise self._wrong(f"{name}.{part}", f"other numbers than the {len(code)} that bitsandbytes has for {state.quant_type}")
        return state

    def _check(self, key: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
        if key not in self._file.shapes():
            raise self._wrong(key, "missing, and its matrix is in 4 bits")
        there = self._file.shapes()[key], self._file.dtype(key)
        if there != (size, dtype):
            said = [f"{list(s)} {str(d).removeprefix('torch.')}" for s, d in (there, (size, dtype))]
            raise self._wrong(key, f"is {said[0]}: {said[1]} was expected")

    def _whole(self, key: str) -> Tensor:
        size = self._file.shapes()[key]
        return self._file.read(key, [0] * len(size), size)

    def _parsed(self, key: str, quant_type: str) -> State:
        """The JSON in the tensor `key`, each entry of its kind."""
        if quant_type not in nf4.CODES:
            raise self._wrong(key, f"bitsandbytes' types are {' and '.join(nf4.CODES)}")
        self._check(key, (size := math.prod(self._file.shapes()[key]),), torch.uint8)
        if size > LARGEST_STATE:
            raise self._wrong(key, f"{size:,} bytes: a short JSON object was expected")
        try:
            said = foreign.parse_json(bytes(self._whole(key).tolist()))
        except ValueError as error:
            raise self._wrong(key, f"not JSON ({error})") from None
        if not isinstance(said, dict):
            raise self._wrong(key, f"a JSON object was expected, not {type(said).__name__}")
        nested: Mapping[str, Sequence[Any]]
        nested = {"nested_blocksize": [nf4.NESTED], "nested_dtype": ["float32"]} if "nested_offset" in said else {}
        kinds: Mapping[str, Sequence[Any]] = {
            "quant_type": [quant_type], "blocksize": nf4.BLOCK_SIZES, "dtype": list(DTYPES), **nested,
        }  # fmt: skip
        for entry, right in kinds.items():
            if type(value := said.get(entry)) not in (int, str) or value not in right:
                raise self._wrong(key, f"{entry} = {value!r}: one of {', '.join(map(str, right))} was expected")
        shape, offset = said.get("shape"), said.get("nested_offset")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise self._wrong(key, f"shape = {shape!r}: two positive integers were expected")
        if "nested_offset" in said and not (isinstance(offset, float | int) and abs(offset) <= LARGEST):
            raise self._wrong(key, f"nested_offset = {offset!r}: a finite number was expected")
        return State(said["quant_type"], said["blocksize"], DTYPES[said["dtype"]], (shape[0], shape[1]), offset)

    def _common(self) -> Quantization:
        """How all the matrices are quantised."""
        if not self._states:
            raise MegamodError(f"{self._root}: config.json says bitsandbytes, and no tensor has the quant_state of 4 bits")
        kept = [name for name, size in self._expected.items() if is_linear(name, size) and name not in self._states]
        first, *_ = self._states
        one = self._states[first]
        for name, state in self._states.items():
            for entry, here, there in (
                ("quant_type", state.quant_type, one.quant_type),
                ("blocksize", state.blocksize, one.blocksize),
                ("double quantisation", state.offset is not None, one.offset is not None),
            ):
                if here != there:
                    raise self._wrong(name, f"{entry} = {here}, and {first} has {there}: one for all matrices was expected")
        said = read_config(self._root)["quantization_config"]
        for entry, value in (("bnb_4bit_quant_type", one.quant_type), ("bnb_4bit_use_double_quant", one.offset is not None)):
            if said.get(entry, value) != value:
                raise MegamodError(f"{self._root}: config.json: {entry} = {said[entry]!r}, and the tensors have {value!r}")
        skipped = tuple(name.removesuffix(".weight") for name in kept)
        return Quantization(one.quant_type, one.offset is not None, one.blocksize, skipped)

    def _made(self, name: str) -> Stored:
        state = self._states[name]
        values, nested, offset = self._whole(f"{name}.absmax"), None, None
        if state.offset is not None:
            nested, offset = self._whole(f"{name}.nested_absmax"), torch.tensor(state.offset, dtype=torch.float32)
        part, largest = ("absmax", values) if nested is None else ("nested_absmax", nested)
        if not bool((largest.isfinite() & (largest >= 0)).all()):
            raise self._wrong(f"{name}.{part}", "holds NaN, an infinite or a negative number: damaged; copy the file again")

        def data(first: int, last: int) -> Tensor:
            return self._file.read(name, (first, 0), (last - first, 1)).flatten()

        return Stored(state.shape, data, Absmax(values, nested, offset), state.blocksize, state.quant_type)


# --- writing ---------------------------------------------------------------------------------------------------------------


def quantize(
    source: str | Path,
    out: str | Path,
    quantization: Quantization,
    *,
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = 4_000_000_000,
) -> Path:
    """Write the weights at `source` in 4 bits to `out`, the bytes that transformers and bitsandbytes write, to be loaded by these.

    Memory holds one file's tensors, and one as it is.

    Args:
        source: a plain Hugging Face directory; its config.json, tokenizer and licence are copied.
        out: new, or empty.
        texts: further small files, by name; they replace the source's of that name.
        shard_bytes: a file holds at most so much, or a single larger tensor.

    Raises:
        MegamodError: a source that is quantised already, or see `Quantizing`; a target that holds something, or a write that fails;
            `out` is not there then.
    """
    refuse_taken(Path(out))
    shape = read_shape(source)
    if says_four_bits(source):
        raise MegamodError(f"{source}: is in 4 bits already: plain weights were expected")
    plain = Safetensors(source)
    check_keys(plain, shape, str(source))
    verify(plain)
    made, linears = Quantizing(plain, quantization), [name for name, size in hf_shapes(shape).items() if is_linear(name, size)]
    for name in linears:
        if made.dtype(name) not in DTYPES.values():
            raise MegamodError(f"{source}: {name} is in {_word(made.dtype(name))}: bitsandbytes reads {', '.join(DTYPES)}")
    dtype = plain.dtype("model.embed_tokens.weight")
    kept = [module for name in linears if not quantization.converts(module := name.removesuffix(".weight"))]
    said = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": _word(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quantization.quant_type,
        "bnb_4bit_use_double_quant": quantization.use_double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        # By whole names, which transformers and its servers read alike: a part of a name means something else to each of them.
        "llm_int8_skip_modules": ["lm_head" if shape.score is None else "score", *kept],
        "llm_int8_threshold": 6.0,
    }
    sizes = {name: made.size(name) for name in hf_shapes(shape)}
    with drafting(Path(out)) as draft:
        begin(draft, Path(source), Path(source), dtype, texts or {}, quantization=said)
        stream(draft, sizes, made.tensors, shard_bytes, "quantising")
        checksums.seal(draft)
    return Path(out)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
