"""The activations between the two GEMMs: silu(gate) * up, stored with one float32 scale per row and 128 channels.

Two formats. float16 keeps 11 bits, so the result passes the `strict` tier; GEMM2 then runs at half the tensor-core
rate, which costs nothing while it waits for weights. float8_e4m3fn keeps 4 bits and the full rate. Unscaled float16
would overflow: with random inputs the values pass 1e4.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu(up, gate):
    """silu(gate) * up in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def store_channel_group(values_ptr, scale_ptr, x, rows, mask, group, R, I: tl.constexpr, EMULATE_FP8: tl.constexpr):
    """Scale x [BLOCK_M, 128] float32 so that a row's largest magnitude is LARGEST, and store it with its scale."""
    IS_FP8: tl.constexpr = values_ptr.dtype.element_ty == tl.float8e4nv
    LARGEST: tl.constexpr = 448.0 if IS_FP8 else 32768.0
    # The bound keeps LARGEST / largest finite; what it flushes is far below any result's last bit.
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)
    scaled = x * (LARGEST / largest)[:, None]
    if IS_FP8:
        values = to_float8(scaled, EMULATE_FP8)
    else:
        values = scaled.to(tl.float16)
    offs = rows[:, None].to(tl.int64) * I + (group * 128 + tl.arange(0, 128))[None, :]
    tl.store(values_ptr + offs, values, mask=mask[:, None])
    tl.store(scale_ptr + group * R + rows, largest * (1.0 / LARGEST), mask=mask)


@triton.jit
def to_float8(x, EMULATE: tl.constexpr):
    """float32 in [-448, 448] to float8_e4m3fn, to nearest even. EMULATE: by integers, since the interpreter's own
    conversion is wrong for many values."""
    if EMULATE:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Normal: drop 20 mantissa bits, rebias the exponent from 127 to 7. Subnormal: units of 2^-9, rounded by the
        # float32 adder, whose last bit is 2^-9 at 2^14.
        rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
        normal = (rounded >> 20) - ((127 - 7) << 3)
        subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
        code = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2^-6, the smallest normal
        code = tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)
