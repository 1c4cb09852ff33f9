"""The loops of `nf4` on a CPU, compiled by Numba: for some of a shard's numbers, in their flat order, what nf4's references make of all.

Numbers come as their bits, `[n]` uint16 or uint32, line k from k · pitch on. A loop takes no more of them than fit in a core's first
cache, as lines and then blocks cut them, wherever a cut falls; what follows is vectorised. Nothing is reordered or fused: results are the
references' to the bit. A call holds no lock of Python's, so that pieces of a shard can be shared out to threads.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from megamod_kernels import nf4
from megamod_kernels.nf4 import NESTED

CHUNK = 4096  # numbers
SMALLEST = np.float32(nf4.SMALLEST)
BFLOAT16, FLOAT16, FLOAT32 = 1, 2, 3  # what bits are of
ONE, HALF, LEAST = np.float32(1), np.float32(0.5), np.float32(-1)
PLACES = np.float32(0.5 * 65535)  # half of those to which bitsandbytes rounds; exact
NF4, FP4 = (tuple(nf4.bounds(kind)[0].numpy()) for kind in ("nf4", "fp4"))  # the 15 numbers between the codes in their order
ORDER = np.array([i << 4 | j for i in nf4.bounds("fp4")[1] for j in nf4.bounds("fp4")[1]], np.uint8)  # of a byte of two places in it
NF4_PAIRS, FP4_PAIRS = (
    np.array([[i, j] for i in nf4.CODES[kind] for j in nf4.CODES[kind]], np.float32).view(np.uint64)[:, 0] for kind in ("nf4", "fp4")
)
DYNAMIC, NEAREST = nf4.dynamic_map().numpy(), nf4._nearest_dynamic().numpy()


def compiled(function: Callable[..., Any]) -> Any:
    """Kept in a cache beside this file or in the user's; anew in each process where neither can be written."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)


@compiled
def _of_float16(bits):  # type: ignore[no-untyped-def]
    most = np.uint32(np.uint32(bits) & np.uint32(0x7FFF))
    wide = np.uint32(most << np.uint32(13))
    # 2^112 apart are the two formats' exponents; infinities and NaN have the largest of each.
    value = wide.view(np.float32) * np.float32(2.0**112)
    special = np.uint32(wide | np.uint32(0x7F800000)).view(np.float32)
    value = special if most >= np.uint32(0x7C00) else value
    return -value if bits & np.uint16(0x8000) else value


@compiled
def _scaled(bits, kind, factor, out):  # type: ignore[no-untyped-def]
    """Numbers times a factor."""
    if kind == BFLOAT16:
        for i in range(len(bits)):
            out[i] = np.uint32(np.uint32(bits[i]) << np.uint32(16)).view(np.float32) * factor
    elif kind == FLOAT16:
        for i in range(len(bits)):
            out[i] = _of_float16(np.uint16(bits[i])) * factor
    else:
        for i in range(len(bits)):
            out[i] = np.uint32(bits[i]).view(np.float32) * factor


@compiled
def _largest(bits, kind):  # type: ignore[no-untyped-def]
    """The largest |number|, as bits of fp32, whose order without the sign is the numbers', NaN the last."""
    most = np.uint32(0)
    if kind == FLOAT32:
        for i in range(len(bits)):
            most = max(most, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
        return most
    found = np.uint16(0)
    for i in range(len(bits)):
        found = max(found, np.uint16(bits[i] & np.uint16(0x7FFF)))
    if kind == BFLOAT16:
        return np.uint32(np.uint32(found) << np.uint32(16))
    return np.float32(_of_float16(found)).view(np.uint32)


@compiled
def _rank(value, limits):  # type: ignore[no-untyped-def]
    """How many of 15 limits are below it, of NaN all. As a loop it would not be vectorised."""
    found = np.uint8(not value <= limits[0]) + np.uint8(not value <= limits[1]) + np.uint8(not value <= limits[2])
    found += np.uint8(not value <= limits[3]) + np.uint8(not value <= limits[4]) + np.uint8(not value <= limits[5])
    found += np.uint8(not value <= limits[6]) + np.uint8(not value <= limits[7]) + np.uint8(not value <= limits[8])
    found += np.uint8(not value <= limits[9]) + np.uint8(not value <= limits[10]) + np.uint8(not value <= limits[11])
    return found + np.uint8(not value <= limits[12]) + np.uint8(not value <= limits[13]) + np.uint8(not value <= limits[14])


@compiled
def block_absmax(bits, kind, pitch, width, start, stride, blocksize, first, last, found, edges):  # type: ignore[no-untyped-def]
    """Of numbers first … last - 1 the largest of each block.

    Args:
        found: `[⌈N/B⌉]` uint32, bits of fp32: written where a block is touched, but of the first and the last that these numbers touch,
            which others may hold, too.
        edges: `[2]` uint32, these.
    """
    head = (start + first // width * stride + first % width) // blocksize
    tail = (start + (last - 1) // width * stride + (last - 1) % width) // blocksize
    at, line, column = first, first // width, first % width
    while at < last:
        here, place = line * pitch + column, start + line * stride + column
        stop = at + min(last - at, width - column)
        block, room = place // blocksize, blocksize - place % blocksize
        while at < stop:
            n = min(stop - at, room)
            most = _largest(bits[here : here + n], kind)
            if block == head:
                edges[0] = max(edges[0], most)
            elif block == tail:
                edges[1] = max(edges[1], most)
            else:
                found[block] = max(found[block], most)
            at, here, block, room = at + n, here + n, block + 1, blocksize
        line, column = line + 1, 0


@compiled
def quantize(bits, kind, pitch, width, start, stride, total, blocksize, absmax, fp4, first, last, out):  # type: ignore[no-untyped-def]
    """Codes of numbers first … last - 1 into out, two a byte.

    Args:
        absmax: `[⌈N/B⌉]` fp32.
        first: even.
    """
    values, ranks = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint8)
    pairs = ranks.view(np.uint16)
    whole = total // blocksize
    at, line, column = first, first // width, first % width
    while at < last:
        begin, end = at, min(at + CHUNK, last)
        while at < end:
            here, place = line * pitch + column, start + line * stride + column
            stop = at + min(end - at, width - column)
            block, room = place // blocksize, blocksize - place % blocksize
            column += stop - at
            while at < stop:
                n = min(stop - at, room)
                some, most = values[at - begin : at - begin + n], absmax[block]
                most = SMALLEST if most < SMALLEST else most
                if block < whole:
                    _scaled(bits[here : here + n], kind, ONE / most, some)
                else:
                    _scaled(bits[here : here + n], kind, ONE, some)
                    for i in range(n):
                        some[i] = some[i] / most
                at, here, block, room = at + n, here + n, block + 1, blocksize
            if column == width:
                line, column = line + 1, 0
        n = end - begin
        if n % 2:
            values[n] = 0
        if fp4:
            for i in range(n + n % 2):
                ranks[i] = _rank(values[i], FP4)
        else:
            for i in range(n + n % 2):
                ranks[i] = _rank(values[i], NF4)
        codes = out[begin // 2 : (end + 1) // 2]
        for i in range(len(codes)):  # the first of two lies in the low half of their word
            codes[i] = np.uint8(pairs[i] << np.uint16(4) | pairs[i] >> np.uint16(8))
        if fp4:  # whose codes are in another order
            for i in range(len(codes)):
                codes[i] = ORDER[codes[i]]


@compiled
def dequantize(data, fp4, absmax, nested, offset, width, start, stride, blocksize, first, last, out, rounded):  # type: ignore[no-untyped-def]
    """ŵ of numbers first … last - 1.

    Args:
        absmax: `[lines, M]` fp32, or uint8: codes of dynamic numbers, with A in `nested` and m `offset`.
        first: even.
        out: `[last - first]` fp32; or `[0]`, and
        rounded: `[last - first]` uint16, bits of bf16; or `[0]`.
    """
    values = np.empty(CHUNK, np.float32)
    pairs, bits = values.view(np.uint64), values.view(np.uint32)
    at, line, column = first, first // width, first % width
    while at < last:
        begin, end = at, min(at + CHUNK, last)
        codes, table = data[begin // 2 : (end + 1) // 2], FP4_PAIRS if fp4 else NF4_PAIRS
        for i in range(len(codes)):
            pairs[i] = table[codes[i]]
        while at < end:
            place, stop = start + line * stride + column, at + min(end - at, width - column)
            block, room = place // blocksize, blocksize - place % blocksize
            own = absmax[line, block - (start + line * stride) // blocksize :]
            column += stop - at
            number = 0
            while at < stop:
                n = min(stop - at, room)
                most = DYNAMIC[np.uint8(own[number])] * nested[block // NESTED] + offset if len(nested) else np.float32(own[number])
                some = values[at - begin : at - begin + n]
                for i in range(n):
                    some[i] = some[i] * most
                at, number, block, room = at + n, number + 1, block + 1, blocksize
            if column == width:
                line, column = line + 1, 0
        for i in range(len(out[begin - first : end - first])):
            out[begin - first + i] = values[i]
        some16 = rounded[begin - first : end - first]
        for i in range(len(some16)):  # to the nearest, of two that are as near the even one
            near = np.uint32(bits[i] + np.uint32(0x7FFF) + np.uint32(np.uint32(bits[i] >> np.uint32(16)) & np.uint32(1)))
            some16[i] = np.uint16(near >> np.uint32(16)) if values[i] == values[i] else np.uint16(0x7FC0)


@compiled
def compress(values, offset, first, last, codes, nested):  # type: ignore[no-untyped-def]
    """Values first … last - 1, of which `first` begins a group of NESTED, in 8 bits; `nested` of their groups."""
    centred, places = np.empty(NESTED, np.float32), np.empty(NESTED, np.int32)
    for left in range(first, last, NESTED):
        n = min(NESTED, last - left)
        own, bits = values[left : left + n], centred[:n].view(np.uint32)
        for i in range(n):
            centred[i] = own[i] - offset
        most = np.uint32(_largest(bits, FLOAT32)).view(np.float32)
        nested[left // NESTED] = most
        inverse = ONE / most
        for i in range(n):
            scaled = centred[i] * inverse
            scaled = LEAST if scaled < LEAST else ONE if scaled > ONE else scaled
            # Half of the places and the middle of one are exact numbers: one product for bitsandbytes' two.
            place = (scaled + ONE) * PLACES + HALF
            places[i] = np.int32(place) if place == place else 0  # of a group of zeros: code 0
        some = codes[left : left + n]
        for i in range(n):
            some[i] = NEAREST[places[i]]
