"""Which linears of a base are kept in 4 bits, and how: in the words of transformers' BitsAndBytesConfig."""

from dataclasses import dataclass, fields
from typing import Any

from megamod import foreign
from megamod.errors import MegamodError, nearest
from megamod_kernels.nf4 import BLOCK_SIZES, CODES, QuantType


@dataclass(frozen=True)
class Quantization:
    """A frozen base in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): the linears of its layers; the rest stays as it is."""

    quant_type: QuantType = "nf4"  # nf4, or fp4
    use_double_quant: bool = True  # the blocks' largest numbers in 8 bits: 4.13 bits a weight, without 4.5
    blocksize: int = 64  # weights that share a largest number
    modules_to_not_convert: tuple[str, ...] = ()  # names, or their beginnings or ends: "down_proj", "model.layers.0"

    def converts(self, module: str) -> bool:
        """Whether the linear `module`, such as `model.layers.3.mlp.up_proj`, is in 4 bits."""
        padded = f".{module}."
        return not any(padded.startswith(f".{name}.") or padded.endswith(f".{name}.") for name in self.modules_to_not_convert)

    def fault(self) -> str | None:
        """What is wrong with it, as the end of a line; None: nothing."""
        if self.quant_type not in CODES:
            return f"quant_type = {self.quant_type!r}, {nearest(str(self.quant_type), CODES)}"
        if self.blocksize not in BLOCK_SIZES:
            return f"blocksize = {self.blocksize}: one of {', '.join(map(str, BLOCK_SIZES))} was expected"
        return None

    def __str__(self) -> str:
        """`nf4, double quantisation, blocks of 64`"""
        return f"{self.quant_type}, {'double quantisation, ' if self.use_double_quant else ''}blocks of {self.blocksize}"


def quantization_from_json(value: Any, where: str) -> Quantization | None:
    """The Quantization of which `config.as_json` made `value`, an object or its text; None for null. Raises MegamodError."""
    try:
        found = foreign.parse_json(value) if isinstance(value, str) else value
        if found is None:
            return None
        given = {f.name: found[f.name] for f in fields(Quantization)}
        names = given["modules_to_not_convert"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or type(given["use_double_quant"]) is not bool:
            raise TypeError("a list of names, and true or false, were expected")
        quantization = Quantization(**{**given, "modules_to_not_convert": tuple(names)})
        fault = quantization.fault()
    except (ValueError, KeyError, TypeError) as error:
        raise MegamodError(f"{where}: {value!r} is no quantisation ({error})") from None
    if fault is not None:
        raise MegamodError(f"{where}: {fault}")
    return quantization
