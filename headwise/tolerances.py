"""Every numeric tolerance of headwise, in one table, with the reason for its size."""

from __future__ import annotations

TWIN = 1e-4
"""Largest absolute difference between an edit and its exact twin, relative to the largest output (float32).

Measured on the tiny models of the tests: 0 for removed heads, about 1e-6 where a matrix product is reordered."""

ONNX_PARITY = 1e-4
"""Largest absolute difference between torch and ONNX Runtime in float32, relative to the largest output or 1.

Measured: 1e-7 to 1e-6 on tiny models, 4e-6 on a 6-layer BERT."""

GOLDEN = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1, "codes": 1e-1}
"""Largest absolute difference of a deployed output to its golden values, relative to the largest of these.

By the precision of its arithmetic; ``codes`` where activations are quantized."""
