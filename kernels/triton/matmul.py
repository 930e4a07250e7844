"""Matrix products that accumulate in float32 and are exact in their operands."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter multiplies the bit patterns of bfloat16 operands, so there they are widened first."""


@triton.jit
def as_operand(x):
    """What a matrix instruction multiplies exactly: fp8 widened, 16-bit types as they are."""
    if x.dtype.primitive_bitwidth == 8:
        x = x.to(tl.float16).to(tl.bfloat16)  # both conversions of an e4m3 are exact
    return x


@triton.constexpr_function
def operand_type(dtype):
    """The type that ``as_operand`` makes of elements of this one."""
    return tl.bfloat16 if dtype.primitive_bitwidth == 8 else dtype


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in float32."""
    if INTERPRETED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        result = tl.dot(a, b, acc)
    return result


@triton.jit
def dot_split(a, b, acc):
    """``acc + a @ b`` for a float32 ``a`` and a 16-bit ``b``: ``a`` goes in as two terms of b's type."""
    high = a.to(b.dtype)
    acc = dot(high, b, acc)
    return dot((a - high.to(tl.float32)).to(b.dtype), b, acc)
