"""Triton's interpreter, made to round as a GPU does: for the kernels' tests where there is no GPU.

The interpreter keeps bfloat16 as bare 16-bit patterns and computes with these as with whole numbers,
without a word; it also cuts float32 off to bfloat16, and rounds to 8-bit floats wrongly. Here each such
value is widened to float32, computed with, and rounded to nearest even by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Patched = Callable[..., Any]


def install() -> None:
    """Mend the interpreter of this process. Twice does no more than once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_as_a_gpu", False):
        return
    builder.rounds_as_a_gpu = True
    handle: Any = interpreter.TensorHandle
    narrow = {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }

    def widened(value: Any) -> Any:
        """The same numbers in float32."""
        dtype = narrow.get(value.dtype.scalar)
        if dtype is None:
            return value
        bits = torch.from_numpy(np.ascontiguousarray(value.data))
        return handle(bits.view(dtype).float().numpy(), tl.float32)

    def rounded(value: Any, wanted: Any) -> Any:
        """float numbers as `wanted`, one of the narrow types; beyond its range the largest, as the
        instructions of a GPU do for 8 bits."""
        dtype = narrow[wanted]
        exact = torch.from_numpy(np.ascontiguousarray(value.data)).float()
        if dtype.itemsize == 1:
            largest = torch.finfo(dtype).max
            exact = exact.clamp(-largest, largest)
        unsigned = torch.uint8 if dtype.itemsize == 1 else torch.uint16
        return handle(exact.to(dtype).view(unsigned).numpy(), wanted)

    def converted(value: Any, wanted: Any) -> Any:
        """Between any two types of floats, or of floats and whole numbers."""
        source = value.dtype.scalar
        if source == wanted:
            return value
        wide = widened(value)
        if wanted in narrow:
            return rounded(wide, wanted)
        return handle(wide.data.astype(interpreter._get_np_dtype(wanted)), wanted)

    def in_float32(original: Patched, comparison: tuple[Any, ...] = ()) -> Patched:
        def operate(self: Any, *arguments: Any) -> Any:
            *values, operation = arguments
            dtype = values[0].dtype.scalar
            if dtype not in narrow:
                return original(self, *arguments)
            result = original(self, *map(widened, values), operation)
            return result if operation in comparison else rounded(result, dtype)

        return operate

    compares = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
    builder.binary_op = in_float32(builder.binary_op, compares)
    builder.unary_op = in_float32(builder.unary_op)

    cast, dot, bitwise = builder.cast_impl, builder.create_dot, builder.ternary_op

    def cast_impl(self: Any, value: Any, wanted: Any) -> Any:
        if value.dtype.scalar in narrow or wanted.scalar in narrow:
            return converted(value, wanted.scalar)
        return cast(self, value, wanted)

    def create_fp_to_fp(self: Any, value: Any, wanted: Any, rounding: Any) -> Any:
        return converted(value, wanted.scalar)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *options)

    def ternary_op(self: Any, first: Any, second: Any, third: Any, operation: Any) -> Any:
        # A choice between two values moves their bits; arithmetic needs the numbers.
        if operation is np.where or third.dtype.scalar not in narrow:
            return bitwise(self, first, second, third, operation)
        result = bitwise(self, widened(first), widened(second), widened(third), operation)
        return rounded(result, third.dtype.scalar)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    builder.ternary_op = ternary_op
