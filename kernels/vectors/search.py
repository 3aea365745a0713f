"""Codes of up to 5 bits found in vectors: each comparison halves what is left of the thresholds.

The code of v is the number of thresholds <= v. The thresholds form a balanced tree: level l has 2^l of them, of which a
permutation chooses each lane's by the bits of the code that are found already. A comparison then gives the next bit. So
k bits take k permutations and k comparisons for as many values as a vector has lanes, without a load from memory.

                          t[3]                 code = 1 if v >= t[3]
                  t[1]            t[5]         code = 2 code + 1 if v >= t[1 + 4 code]
              t[0]    t[2]    t[4]    t[6]     code = 2 code + 1 if v >= t[2 code]

Missing thresholds are NaN, at or below which no value lies.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from jaxtyping import Float32
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from kbit.kernels.cpu_chunks import find_codes, jit
from kbit.kernels.simd import AVX2, AVX512, Vector, find_isa, permute

LEVELS: Final = (3, 4, 5)  # of the trees that are compiled. With more levels the comparisons cost more than a table
_SLOTS: Final = 16  # float32 of a level in memory, at least: the lanes of the largest vector

Tree = Float32[np.ndarray, " nodes"]


def make_tree(thresholds: Float32[np.ndarray, " thresholds"]) -> tuple[Tree, int]:
    """Return the tree of ascending thresholds, level after level, and how many levels it has, 0 if none serves them."""
    levels = next((count for count in LEVELS if thresholds.size < 2**count), 0)
    if find_isa() not in (AVX2, AVX512):
        levels = 0
    padded = np.full(2**levels - 1, np.nan, np.float32)
    padded[: thresholds.size] = thresholds[: padded.size]
    parts = [np.empty(0, np.float32)]
    for level in range(levels):
        nodes = padded[2 ** (levels - level - 1) - 1 :: 2 ** (levels - level)]  # every second one of what is left
        parts.append(np.resize(nodes, max(_SLOTS, nodes.size)))
    return np.concatenate(parts), levels


@jit()
def find_codes_by_tree(buffer, count, table, codes):
    """Do what cpu_chunks.find_codes does. table is a kbit.kernels.cpu.SearchTable with a tree."""
    unknown = table.first[0x7FC0]  # the code of NaN
    if table.levels == 3:
        done = np.int64(_search(buffer, count, table.tree, unknown, codes, 3))
    elif table.levels == 4:
        done = np.int64(_search(buffer, count, table.tree, unknown, codes, 4))
    else:
        done = np.int64(_search(buffer, count, table.tree, unknown, codes, 5))
    if done < count:
        find_codes(buffer[done:], count - done, table.first, table.thresholds, table.compares, codes[done:])


def _search(*arguments: Any) -> None:
    """Find the codes of whole vectors, and return how many these are. _search_of compiles it per number of levels."""
    raise NotImplementedError


@overload(_search, inline="never", prefer_literal=True)
def _search_of(buffer, count, tree, unknown, codes, levels):
    k, lanes = levels.literal_value, np.uint64(find_isa().lanes)
    if find_isa() not in (AVX2, AVX512):
        return lambda buffer, count, tree, unknown, codes, levels: np.uint64(0)  # make_tree says that nobody calls it

    def search(buffer, count, tree, unknown, codes, levels):
        registers, place = load_tree(tree, k), np.uint64(0)
        for _ in range(np.uint64(count) // lanes):
            store_codes(codes, place, descend(registers, buffer, place, np.int32(unknown)))
            place += lanes
        return place

    return search


@intrinsic(prefer_literal=True)
def load_tree(typing, tree, levels):
    """Return the thresholds of each level in registers, as a tuple of all."""
    lanes = find_isa().lanes
    starts = [
        sum(max(_SLOTS, 2**above) for above in range(level)) + first
        for level in range(levels.literal_value)
        for first in range(0, max(1, 2**level), lanes)
    ]
    result = types.UniTuple(Vector("float"), len(starts))

    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        vectors = []
        for start in starts:
            first = builder.gep(data, [ir.Constant(ir.IntType(64), start)])
            pointer = builder.bitcast(first, ir.VectorType(ir.FloatType(), lanes).as_pointer())
            vectors.append(builder.load(pointer))
            vectors[-1].align = 4
        return context.make_tuple(builder, result, vectors)

    return result(tree, levels), generate


@intrinsic
def descend(typing, registers, buffer, place, unknown):
    """Return the codes of the vector of values at buffer[place], and the code `unknown` for NaN."""

    def generate(context, builder, signature, arguments):
        lanes = find_isa().lanes
        words = ir.VectorType(ir.IntType(32), lanes)
        tables = cgutils.unpack_tuple(builder, arguments[0])
        data = context.make_array(signature.args[1])(context, builder, arguments[1]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[2]]), tables[0].type.as_pointer())
        values = builder.load(pointer)
        values.align = 4
        codes, level = ir.Constant(words, [0] * lanes), 0
        while tables:
            count = max(1, 2**level // lanes)
            own, tables = tables[:count], tables[count:]
            nodes = own[0] if level == 0 else permute(builder, own, codes)
            is_above = builder.sext(builder.fcmp_ordered(">=", values, nodes), words)  # -1 where it is so
            codes = builder.sub(builder.add(codes, codes), is_above)
            level += 1
        other = ir.Constant(words, ir.Undefined)
        other = builder.insert_element(other, arguments[3], ir.Constant(ir.IntType(32), 0))
        other = builder.shuffle_vector(other, other, ir.Constant(words, [0] * lanes))
        return builder.select(builder.fcmp_unordered("uno", values, values), other, codes)

    return Vector("int")(registers, buffer, types.uint64, types.int32), generate


@intrinsic
def store_codes(typing, codes, place, vector):
    """Write a vector of codes as bytes to codes[place]."""

    def generate(context, builder, signature, arguments):
        kind = ir.VectorType(ir.IntType(8), find_isa().lanes)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), kind.as_pointer())
        builder.store(builder.trunc(arguments[2], kind), pointer).align = 1
        return context.get_dummy_value()

    return types.void(codes, types.uint64, vector), generate
