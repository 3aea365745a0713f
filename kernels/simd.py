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
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.registry import cpu_target
from numba.extending import intrinsic, register_model

OVERREAD: Final = 16  # bytes after the first byte of a vector's codes that load_codes may read

_F32, _I32, _I8, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(8), ir.IntType(64)
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
        super().__init__(manager, fe_type, _vector_of(_F32 if fe_type.kind == "float" else _I32))


def _vector_of(element: ir.Type, lanes: int = 0) -> ir.VectorType:
    return ir.VectorType(element, lanes or find_isa().lanes)


def _constant(element: ir.Type, values: Sequence[int | float]) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, len(values)), [ir.Constant(element, value) for value in values])


def _every(element: ir.Type, value: float) -> ir.Constant:
    return _constant(element, [value] * find_isa().lanes)


def call_target(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
    """Call a function of LLVM, or an instruction of the target."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def _point(context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value, place: ir.Value, to: ir.Type) -> Any:
    """Return a pointer to array[place] that points to a value of type `to`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [place]), to.as_pointer())


def _load(builder: ir.IRBuilder, pointer: ir.Value, alignment: int) -> ir.Value:
    value = builder.load(pointer)
    value.align = alignment
    return value


def _shuffle(builder: ir.IRBuilder, vector: ir.Value, places: Sequence[int]) -> ir.Value:
    undefined = ir.Constant(vector.type, ir.Undefined)
    return builder.shuffle_vector(vector, undefined, _constant(_I32, places))


def _splat(builder: ir.IRBuilder, value: ir.Value, lanes: int = 0) -> ir.Value:
    vector = ir.Constant(_vector_of(value.type, lanes), ir.Undefined)
    first = builder.insert_element(vector, value, ir.Constant(_I32, 0))
    return _shuffle(builder, first, [0] * first.type.count)


@intrinsic
def load(typing, array, place):
    """Return the float32 vector at array[place]."""

    def generate(context, builder, signature, arguments):
        pointer = _point(context, builder, signature.args[0], *arguments, _vector_of(_F32))
        return _load(builder, pointer, 4)

    return Vector("float")(array, place), generate


@intrinsic
def store(typing, array, place, vector):
    """Write a float32 vector to array[place]."""

    def generate(context, builder, signature, arguments):
        pointer = _point(context, builder, signature.args[0], *arguments[:2], _vector_of(_F32))
        builder.store(arguments[2], pointer).align = 4
        return context.get_dummy_value()

    return types.void(array, place, vector), generate


@intrinsic(prefer_literal=True)
def read_word(typing, stored, place, bits):
    """Return word number `place`, of so many bits, of an array of bytes, as uint32."""

    def generate(context, builder, signature, arguments):
        kind = ir.IntType(bits.literal_value)
        first = builder.mul(arguments[1], ir.Constant(_I64, bits.literal_value // 8))
        word = _load(builder, _point(context, builder, signature.args[0], arguments[0], first, kind), 1)
        return builder.zext(word, _I32) if bits.literal_value < 32 else word

    return types.uint32(stored, types.uint64, bits), generate


@intrinsic
def splat(typing, value):
    """Return a vector with a float32 in each lane."""
    return Vector("float")(types.float32), lambda context, builder, signature, arguments: _splat(builder, *arguments)


@intrinsic
def multiply(typing, a, b):
    """Return a b, lane by lane."""
    return a(a, b), lambda context, builder, signature, arguments: builder.fmul(*arguments)


@intrinsic
def add(typing, a, b):
    """Return a + b, lane by lane."""
    return a(a, b), lambda context, builder, signature, arguments: builder.fadd(*arguments)


@intrinsic(prefer_literal=True)
def zeros(typing, count):
    """Return a tuple of so many vectors of zeros."""
    result = types.UniTuple(Vector("float"), count.literal_value)

    def generate(context, builder, signature, arguments):
        return context.make_tuple(builder, result, [_every(_F32, 0.0)] * result.count)

    return result(count), generate


@intrinsic
def multiply_add(typing, values, x, place, stride, sums):
    """Return sums[m] + values x[place + m stride ...] for each m, rounded once."""

    def generate(context, builder, signature, arguments):
        values, x, place, stride, sums = arguments
        found = []
        for total in cgutils.unpack_tuple(builder, sums):
            inputs = _load(builder, _point(context, builder, signature.args[1], x, place, _vector_of(_F32)), 4)
            found.append(_multiply_add(builder, values, inputs, total))
            place = builder.add(place, stride)
        return context.make_tuple(builder, signature.return_type, found)

    return sums(values, x, types.uint64, types.uint64, sums), generate


@intrinsic
def scale_add(typing, values, scale, sums):
    """Return sums[m] + values[m] scale for each m, rounded once."""

    def generate(context, builder, signature, arguments):
        scale = _splat(builder, arguments[1])
        pairs = zip(*(cgutils.unpack_tuple(builder, arguments[i]) for i in (0, 2)), strict=True)
        found = [_multiply_add(builder, value, scale, total) for value, total in pairs]
        return context.make_tuple(builder, signature.return_type, found)

    return sums(values, types.float32, sums), generate


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    if find_isa() == GENERIC:  # a target without the instruction would call a function for each lane
        return builder.fadd(builder.fmul(a, b), c)
    return call_target(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


@intrinsic
def add_lanes(typing, vectors):
    """Return the sum of the lanes of each vector of a tuple."""
    result = types.UniTuple(types.float32, vectors.count)

    def generate(context, builder, signature, arguments):
        sums = [_add_lanes(builder, vector) for vector in cgutils.unpack_tuple(builder, arguments[0])]
        return context.make_tuple(builder, result, sums)

    return result(vectors), generate


def _add_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    while (half := vector.type.count // 2) >= 1:
        lower, upper = (_shuffle(builder, vector, range(start, start + half)) for start in (0, half))
        vector = builder.fadd(lower, upper)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@intrinsic(prefer_literal=True)
def load_codes(typing, packed, place, bits):
    """Return a vector of the codes from byte packed[place] on. It reads OVERREAD bytes at most."""
    k = bits.literal_value

    def generate(context, builder, signature, arguments):
        def read(kind: ir.Type) -> ir.Value:
            array, place = arguments[:2]
            return _load(builder, _point(context, builder, signature.args[0], array, place, kind), 1)

        lanes = find_isa().lanes
        if k == 8:
            return builder.zext(read(_vector_of(_I8)), _vector_of(_I32))
        if k * lanes in (16, 32) and 8 % k == 0:  # no code is in two bytes, and all are in one word
            word = builder.zext(read(ir.IntType(k * lanes)), _I32) if k * lanes < 32 else read(_I32)
            return builder.lshr(_splat(builder, word), _constant(_I32, [8 * b + s for b, s in _list_places(k)[:lanes]]))
        words = _shuffle_bytes(builder, read, k)
        return builder.lshr(words, _constant(_I32, [shift for _, shift in _list_places(k)[:lanes]]))

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
        where = _constant(_I32, [bits if place == _ZERO else place for place in places])
        return builder.bitcast(builder.shuffle_vector(codes, zero, where), _vector_of(_I32))
    if isa == AVX2:
        codes = builder.bitcast(_splat(builder, read(_I64), 4), ir.VectorType(_I8, 32))
        found = call_target(builder, "llvm.x86.avx2.pshuf.b", codes.type, [codes, _constant(_I8, places)])
    else:
        codes = _shuffle(builder, read(ir.VectorType(_I8, 16)), [*range(16)] * 4)
        found = call_target(builder, "llvm.x86.avx512.pshuf.b.512", codes.type, [codes, _constant(_I8, places)])
    return builder.bitcast(found, _vector_of(_I32))


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
        pointer = _point(context, builder, signature.args[0], arguments[0], ir.Constant(_I64, 0), _vector_of(_F32))
        vectors = [_load(builder, builder.gep(pointer, [ir.Constant(_I64, i)]), 4) for i in range(registers)]
        if (values := 2**bits.literal_value) < isa.lanes:  # so that the bits above the code do not matter
            vectors = [_shuffle(builder, vectors[0], [lane % values for lane in range(isa.lanes)])]
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
            return permute(builder, cgutils.unpack_tuple(builder, arguments[0]), arguments[1])
        codes = builder.and_(arguments[1], _every(_I32, 2**k - 1))
        values = ir.Constant(_vector_of(_F32), ir.Undefined)
        for lane, place in enumerate(_list_lanes(builder, codes)):
            value = builder.load(_point(context, builder, signature.args[0], arguments[0], place, _F32))
            values = builder.insert_element(values, value, ir.Constant(_I32, lane))
        return values

    return Vector("float")(table, codes, bits), generate


@intrinsic
def load_line(typing, codebook, step, bits):
    """Return what compute takes for a codebook of evenly spaced values: the first one and their distance."""
    result = types.UniTuple(Vector("float"), 2)

    def generate(context, builder, signature, arguments):
        first = builder.load(context.make_array(signature.args[0])(context, builder, arguments[0]).data)
        return context.make_tuple(builder, result, [_splat(builder, first), _splat(builder, arguments[1])])

    return result(codebook, types.float32, bits), generate


@intrinsic(prefer_literal=True)
def compute(typing, line, codes, bits):
    """Return first + step code, rounded once: look_up for a codebook of evenly spaced values."""
    most = 2**bits.literal_value - 1

    def generate(context, builder, signature, arguments):
        first, step = cgutils.unpack_tuple(builder, arguments[0])
        numbers = builder.sitofp(builder.and_(arguments[1], _every(_I32, most)), first.type)
        return _multiply_add(builder, numbers, step, first)

    return Vector("float")(line, codes, bits), generate


def _list_lanes(builder: ir.IRBuilder, codes: ir.Value) -> Iterator[ir.Value]:
    """Yield the lanes as 64-bit integers. Two are taken out at once, since that costs more than a shift."""
    pairs = builder.bitcast(codes, _vector_of(_I64, codes.type.count // 2))
    for place in range(pairs.type.count):
        pair = builder.extract_element(pairs, ir.Constant(_I32, place))
        yield builder.and_(pair, ir.Constant(_I64, 2**32 - 1))
        yield builder.lshr(pair, ir.Constant(_I64, 32))


def permute(builder: ir.IRBuilder, table: Sequence[ir.Value], codes: ir.Value) -> ir.Value:
    """Look codes up in a table of one or more registers."""
    kind = table[0].type
    if len(table) == 1:
        name = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}[kind.count]
        return call_target(builder, name, kind, [table[0], codes])
    if len(table) == 2 and kind.count == 16:
        return call_target(builder, "llvm.x86.avx512.vpermi2var.ps.512", kind, [table[0], codes, table[1]])
    half = len(table) // 2
    lower, upper = (permute(builder, part, codes) for part in (table[:half], table[half:]))
    bit = int(np.log2(half * kind.count))  # of the code, which chooses the half: moved to the sign
    sign = builder.shl(codes, _every(_I32, 31 - bit))
    return builder.select(builder.icmp_signed("<", sign, _every(_I32, 0)), upper, lower)
