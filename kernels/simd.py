"""Vectors of float32 and int32 in numba kernels: types whose values are LLVM vectors, and intrinsics that work on them.

LLVM does not make permutations of a table look-up in a loop, so the kernels ask for them. How many lanes a vector has,
and which instructions look values up, depends on numba's CPU (NUMBA_CPU_NAME forces one). There are three ways:

    avx512   16 lanes. A permutation of one register finds 16 values, that of two registers 32.
    avx2     8 lanes. A permutation finds 8 values. Of larger tables, blends choose between several permutations.
    generic  8 lanes on any target of LLVM. Each lane is looked up in memory.

A vector takes as many codes as it has lanes: groups of 8 codes of k bits, which are k bytes with the most significant
bit first (kbit.numerics.reference.pack). A shuffle puts the bytes of each code into its lane, and a shift brings the
code to the lower end. The bits above the code are those of its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from jaxtyping import Float32
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.registry import cpu_target
from numba.extending import intrinsic, register_model

LEVELS: Final = 4  # of the search for a code among 15 thresholds
OVERREAD: Final = 16  # bytes after the first byte of a vector's codes that load_codes may read

F32, I32, _I8, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(8), ir.IntType(64)
_ZERO: Final = 0x80  # a place from which pshufb takes 0


class Isa(NamedTuple):
    """How the kernels are compiled.

    Attributes:
        name: avx512, avx2 or generic.
        lanes: float32 values of a vector.
        permuted_bits: the most bits of a code that permutations look up. Codes of more bits are looked up in memory.
    """

    name: str
    lanes: int
    permuted_bits: int


AVX512: Final = Isa("avx512", 16, 8)
AVX2: Final = Isa("avx2", 8, 5)
GENERIC: Final = Isa("generic", 8, 0)

_PROBE: Final = """
declare float @llvm.fma.f32(float, float, float)
define float @multiply(float %a) {
  %r = call float @llvm.fma.f32(float %a, float %a, float %a)
  ret float %r
}
define <64 x i8> @add(<64 x i8> %a, <64 x i8> %b) {
  %r = add <64 x i8> %a, %b
  ret <64 x i8> %r
}
"""


@functools.cache
def find_isa() -> Isa:
    """Return how kernels are compiled for numba's CPU. What LLVM makes of a sum of 64 bytes tells its registers."""
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvm.parse_assembly(_PROBE))
    by_sums = {1: AVX512, 2: AVX2}
    return by_sums.get(assembly.count("vpaddb"), GENERIC) if "vfmadd" in assembly else GENERIC


class Vector(types.Type):
    """As many float32 ("float") or int32 ("int") as the CPU's registers hold."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(name=f"Vector({kind}, {find_isa().name})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Vector) -> None:
        super().__init__(manager, fe_type, vector_of(F32 if fe_type.kind == "float" else I32))


def vector_of(element: ir.Type, lanes: int = 0) -> ir.VectorType:
    return ir.VectorType(element, lanes or find_isa().lanes)


def _constant(element: ir.Type, values: Sequence[int | float]) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, len(values)), [ir.Constant(element, value) for value in values])


def every(element: ir.Type, value: float) -> ir.Constant:
    return _constant(element, [value] * find_isa().lanes)


def call_target(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
    """Call a function of LLVM, or an instruction of the target."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def point(context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value, place: ir.Value, to: ir.Type) -> Any:
    """Return a pointer to array[place] that points to a value of type `to`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [place]), to.as_pointer())


def load_at(builder: ir.IRBuilder, pointer: ir.Value, alignment: int) -> ir.Value:
    value = builder.load(pointer)
    value.align = alignment
    return value


def shuffle(builder: ir.IRBuilder, vector: ir.Value, places: Sequence[int]) -> ir.Value:
    undefined = ir.Constant(vector.type, ir.Undefined)
    return builder.shuffle_vector(vector, undefined, _constant(I32, places))


def splat_value(builder: ir.IRBuilder, value: ir.Value, lanes: int = 0) -> ir.Value:
    vector = ir.Constant(vector_of(value.type, lanes), ir.Undefined)
    first = builder.insert_element(vector, value, ir.Constant(I32, 0))
    return shuffle(builder, first, [0] * first.type.count)


@intrinsic
def load(typing, words, place):
    """Return the float32 vector that begins at words[place], whose words are float32 or the bits of bfloat16."""

    def generate(context, builder, signature, arguments):
        kind = F32 if isinstance(words.dtype, types.Float) else ir.IntType(16)
        pointer = point(context, builder, signature.args[0], *arguments, vector_of(kind))
        loaded = load_at(builder, pointer, 4 if kind == F32 else 2)
        if kind == F32:
            return loaded
        return builder.bitcast(builder.shl(builder.zext(loaded, vector_of(I32)), every(I32, 16)), vector_of(F32))

    return Vector("float")(words, place), generate


@intrinsic
def store(typing, array, place, vector):
    """Write a float32 vector to array[place]."""

    def generate(context, builder, signature, arguments):
        pointer = point(context, builder, signature.args[0], *arguments[:2], vector_of(F32))
        builder.store(arguments[2], pointer).align = 4
        return context.get_dummy_value()

    return types.void(array, place, vector), generate


@intrinsic
def count_lanes(typing):
    """Return the lanes of a vector."""
    return types.uint64(), lambda context, builder, signature, arguments: ir.Constant(_I64, find_isa().lanes)


@intrinsic
def splat(typing, value):
    """Return a vector with a float32 in each lane."""
    return Vector("float")(types.float32), lambda context, builder, signature, arguments: splat_value(
        builder, *arguments
    )


@intrinsic
def multiply(typing, a, b):
    """Return a b, lane by lane."""
    return a(a, b), lambda context, builder, signature, arguments: builder.fmul(*arguments)


@intrinsic
def add(typing, a, b):
    """Return a + b, lane by lane."""
    return a(a, b), lambda context, builder, signature, arguments: builder.fadd(*arguments)


def add_product(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    if find_isa() == GENERIC:  # a target without the instruction would call a function for each lane
        return builder.fadd(builder.fmul(a, b), c)
    return call_target(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


@intrinsic(prefer_literal=True)
def load_codes(typing, packed, place, bits):
    """Return a vector of the codes from byte packed[place] on. It reads OVERREAD bytes at most."""
    k = bits.literal_value

    def generate(context, builder, signature, arguments):
        def read(kind: ir.Type) -> ir.Value:
            array, place = arguments[:2]
            return load_at(builder, point(context, builder, signature.args[0], array, place, kind), 1)

        lanes = find_isa().lanes
        if k == 8:
            return builder.zext(read(vector_of(_I8)), vector_of(I32))
        if k * lanes in (16, 32) and 8 % k == 0:  # no code is in two bytes, and all are in one word
            word = builder.zext(read(ir.IntType(k * lanes)), I32) if k * lanes < 32 else read(I32)
            return builder.lshr(
                splat_value(builder, word), _constant(I32, [8 * b + s for b, s in _list_places(k)[:lanes]])
            )
        words = _shuffle_bytes(builder, read, k)
        return builder.lshr(words, _constant(I32, [shift for _, shift in _list_places(k)[:lanes]]))

    return Vector("int")(packed, place, bits), generate


def _list_places(bits: int) -> list[tuple[int, int]]:
    """Return the byte in which each code begins, and the shift of the one or two bytes that brings it to the end."""
    found = []
    for first in range(0, 16 * bits, bits):
        rest = first % 8 + bits
        found.append((first // 8, (8 if rest <= 8 else 16) - rest))
    return found


def _list_bytes(bits: int) -> list[int]:
    """Return, for each byte of the lanes' words, the byte of the codes that belongs there."""
    found = []
    for lane in range(find_isa().lanes):
        first, is_split = lane * bits // 8, lane * bits % 8 + bits > 8
        found += [first + 1, first, _ZERO, _ZERO] if is_split else [first, _ZERO, _ZERO, _ZERO]
    return found


def _shuffle_bytes(builder: ir.IRBuilder, read: Callable[[ir.Type], ir.Value], bits: int) -> ir.Value:
    """Return a vector whose lanes hold the bytes of their codes, the most significant one first."""
    isa, places = find_isa(), _list_bytes(bits)
    if isa == GENERIC:
        codes = read(ir.VectorType(_I8, bits))  # 8 codes
        zero = ir.Constant(codes.type, [0] * bits)
        where = _constant(I32, [bits if place == _ZERO else place for place in places])
        return builder.bitcast(builder.shuffle_vector(codes, zero, where), vector_of(I32))
    if isa == AVX2:
        codes = builder.bitcast(splat_value(builder, read(_I64), 4), ir.VectorType(_I8, 32))
        found = call_target(builder, "llvm.x86.avx2.pshuf.b", codes.type, [codes, _constant(_I8, places)])
    else:
        codes = shuffle(builder, read(ir.VectorType(_I8, 16)), [*range(16)] * 4)
        found = call_target(builder, "llvm.x86.avx512.pshuf.b.512", codes.type, [codes, _constant(_I8, places)])
    return builder.bitcast(found, vector_of(I32))


@intrinsic(prefer_literal=True)
def load_table(typing, codebook, step, bits):
    """Return what look_up takes for a codebook of 256 values: registers for few bits, else the codebook itself.

    A step means nothing here: load_line takes the same arguments.
    """
    isa = find_isa()
    if bits.literal_value > isa.permuted_bits:
        return codebook(codebook, step, bits), _return_first
    registers = max(1, 2**bits.literal_value // isa.lanes)
    result = types.UniTuple(Vector("float"), registers)

    def generate(context, builder, signature, arguments):
        pointer = point(context, builder, signature.args[0], arguments[0], ir.Constant(_I64, 0), vector_of(F32))
        vectors = [load_at(builder, builder.gep(pointer, [ir.Constant(_I64, i)]), 4) for i in range(registers)]
        if (values := 2**bits.literal_value) < isa.lanes:  # so that the bits above the code do not matter
            vectors = [shuffle(builder, vectors[0], [lane % values for lane in range(isa.lanes)])]
        return context.make_tuple(builder, result, vectors)

    return result(codebook, step, bits), generate


def _return_first(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
    context.nrt.incref(builder, signature.return_type, arguments[0])
    return arguments[0]


@intrinsic(prefer_literal=True)
def look_up(typing, table, codes, bits):
    """Return the codebook's value of each code. The bits above a code are ignored."""
    k = bits.literal_value

    def generate(context, builder, signature, arguments):
        if isinstance(signature.args[0], types.UniTuple):
            return _permute(builder, cgutils.unpack_tuple(builder, arguments[0]), arguments[1])
        codes = builder.and_(arguments[1], every(I32, 2**k - 1))
        values = ir.Constant(vector_of(F32), ir.Undefined)
        for lane, place in enumerate(_list_lanes(builder, codes)):
            value = builder.load(point(context, builder, signature.args[0], arguments[0], place, F32))
            values = builder.insert_element(values, value, ir.Constant(I32, lane))
        return values

    return Vector("float")(table, codes, bits), generate


def arrange_in_tree(thresholds: Float32[np.ndarray, " thresholds"]) -> Float32[np.ndarray, " levels"]:
    """Return at most 15 thresholds level by level, 16 numbers each: the middle one, the two beside it, 4, and 8.

    Nothing is returned for more thresholds.
    """
    if thresholds.size >= 2**LEVELS:
        return np.empty(0, np.float32)
    padded = np.full(2**LEVELS - 1, np.nan, np.float32)  # nothing is >= NaN
    padded[: thresholds.size] = thresholds
    strides = [2**level for level in range(LEVELS, 0, -1)]
    return np.concatenate([np.resize(padded[stride // 2 - 1 :: stride], 16) for stride in strides])


@intrinsic
def load_levels(typing, levels):
    """Return what find_codes takes, from what arrange_in_tree returns."""
    result = types.UniTuple(Vector("float"), LEVELS)

    def generate(context, builder, signature, arguments):
        places = [ir.Constant(_I64, 16 * level) for level in range(result.count)]
        pointers = [point(context, builder, signature.args[0], arguments[0], place, vector_of(F32)) for place in places]
        return context.make_tuple(builder, result, [load_at(builder, pointer, 4) for pointer in pointers])

    return result(levels), generate


@intrinsic
def find_codes(typing, levels, values):
    """Return, for each value, how many of 15 sorted thresholds are <= it.

    Each level gives the next bit of the code. Without permutations, all thresholds are compared.
    """

    def generate(context, builder, signature, arguments):
        codes, isa = every(I32, 0), find_isa()

        def compare(bound: ir.Value) -> ir.Value:  # -1 where a value is at or above
            return builder.sext(builder.fcmp_ordered(">=", arguments[1], bound), codes.type)

        for level, thresholds in enumerate(cgutils.unpack_tuple(builder, arguments[0])):
            if isa == GENERIC:
                for lane in range(2**level):
                    codes = builder.sub(codes, compare(shuffle(builder, thresholds, [lane] * isa.lanes)))
            else:
                bound = _permute(builder, [thresholds], codes) if level else thresholds
                codes = builder.sub(builder.add(codes, codes), compare(bound))
        return codes

    return Vector("int")(levels, values), generate


@intrinsic
def store_bytes(typing, array, place, vector):
    """Write the lowest byte of each lane to array[place] and the bytes after it."""

    def generate(context, builder, signature, arguments):
        stored = builder.trunc(arguments[2], vector_of(_I8))
        builder.store(stored, point(context, builder, signature.args[0], *arguments[:2], stored.type)).align = 1
        return context.get_dummy_value()

    return types.void(array, place, vector), generate


@intrinsic
def normalize(typing, values, scale, offset):
    """Return (values - offset) / scale, 0 where the scale is 0."""

    def generate(context, builder, signature, arguments):
        values, scale, offset = arguments
        zero = every(F32, 0.0)
        quotients = builder.fdiv(builder.fsub(values, offset), scale)
        return builder.select(builder.fcmp_ordered("==", scale, zero), zero, quotients)

    return values(values, scale, offset), generate


def _list_lanes(builder: ir.IRBuilder, codes: ir.Value) -> Iterator[ir.Value]:
    """Yield the lanes as 64-bit integers. Two are taken out at once, since that costs more than a shift."""
    pairs = builder.bitcast(codes, vector_of(_I64, codes.type.count // 2))
    for place in range(pairs.type.count):
        pair = builder.extract_element(pairs, ir.Constant(I32, place))
        yield builder.and_(pair, ir.Constant(_I64, 2**32 - 1))
        yield builder.lshr(pair, ir.Constant(_I64, 32))


def _permute(builder: ir.IRBuilder, table: Sequence[ir.Value], codes: ir.Value) -> ir.Value:
    """Look codes up in a table of one or more registers."""
    kind = table[0].type
    if len(table) == 1:
        name = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}[kind.count]
        return call_target(builder, name, kind, [table[0], codes])
    if len(table) == 2 and kind.count == 16:
        return call_target(builder, "llvm.x86.avx512.vpermi2var.ps.512", kind, [table[0], codes, table[1]])
    half = len(table) // 2
    lower, upper = (_permute(builder, part, codes) for part in (table[:half], table[half:]))
    bit = int(np.log2(half * kind.count))  # of the code, which chooses the half: moved to the sign
    sign = builder.shl(codes, every(I32, 31 - bit))
    return builder.select(builder.icmp_signed("<", sign, every(I32, 0)), upper, lower)
