"""Every numeric tolerance of headwise, in one table, with the reason for its size."""

from __future__ import annotations

TWIN = 1e-4
"""Largest absolute difference between an edit and its exact twin, relative to the largest output (float32).

Measured on the tiny models of the tests: 0 for removed heads, about 1e-6 where a matrix product is reordered."""

ONNX_PARITY = 1e-4
"""Largest absolute difference between torch and ONNX Runtime in float32, relative to the largest output or 1.

Measured: 1e-7 to 1e-6 on tiny models, 4e-6 on a 6-layer BERT."""

GOLDEN = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1, "codes": 1e-1}
"""Largest absolute difference of a deployed output to its golden values, relative to the largest of these.

By the arithmetic. Measured on a 6-layer BERT and a 5-layer Llama: 1e-6 between two orders of fp32 sums; 1e-3 and 3e-3
between fp16 and fp32, of which a deeper model makes more; 4e-3 and 7e-3 for weights rounded to bf16, whose arithmetic
is eight times as coarse as that of fp16. ``tf32`` is fp32 on a GPU: TensorRT may multiply with the mantissa of fp16.
``codes`` is for quantized activations, where another kernel moves values over a rounding edge; int8 changed the Llama
by 8e-2, so that what is allowed is about what quantization costs at all."""
