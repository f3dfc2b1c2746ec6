"""Whether an engine multiplies in the formats that were planned, read from the builder's own list of kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from headwise.export.listing import ListingSummary
from headwise.export.quantize import Promise
from headwise.gates.judge import Outcome, Verdict
from headwise.model.quantization import Format

GATE = "kernels"

_TYPES: Mapping[Format, str] = {"int8": "Int8", "fp8": "FP8", "int4": "Int4", "nvfp4": "FP4E2M1", "mxfp8": "FP8"}
"""Formats by the names that builders give them."""
_FLOATS = frozenset({"Half", "Float", "BFloat16"})


def judge_kernels(listing: ListingSummary | None, promises: Sequence[Promise], stage: str) -> list[Verdict]:
    """FAIL for every scheme of which a promised matrix runs in another format; nothing where nothing was promised.

    Args:
        listing: what the builder said; None where it said nothing.
        promises: what the graph asks for.
        stage: name of the engine's stage.
    """
    schemes: dict[str, list[Promise]] = {}
    for promise in promises:
        schemes.setdefault(promise.scheme, []).append(promise)
    return [_judge(listing, scheme, group, stage) for scheme, group in schemes.items()]


def _judge(listing: ListingSummary | None, scheme: str, group: Sequence[Promise], stage: str) -> Verdict:
    if listing is None or not listing.constants:
        outcome, missing, reason = Outcome.NOT_RUN, math.nan, "the builder does not say what it made of the graph"
    else:
        broken = {promise.matrix: found for promise in group if (found := _broken(listing, promise))}
        missing = float(len(broken))
        outcome = Outcome.FAIL if broken else Outcome.PASS
        apart = sum(listing.products.get(promise.node) in _FLOATS for promise in group)
        reason = f"{len(group)} of {len(group)} as planned" + (f", {apart} decoded by a kernel before" if apart else "")
        if broken:
            named = ", ".join(f"{matrix} ({found})" for matrix, found in list(broken.items())[:3])
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            reason = f"{len(broken)} of {len(group)} matrices do not run as planned: {named}{more}"
    return Verdict(
        gate=GATE,
        stage=stage,
        output=scheme,
        metric="matrices",
        outcome=outcome,
        difference=missing,
        limit=0.0,
        samples=len(group),
        reason=reason,
    )


def _broken(listing: ListingSummary, promise: Promise) -> str:
    """What became of a matrix instead; empty where the promise is kept.

    Weights are stored in the format; where activations are too, the multiplication reads nothing else.
    """
    wanted = _TYPES[promise.format]
    if promise.weights_only:
        found = listing.constants.get(promise.decode, "not found")
    else:
        found = listing.products.get(promise.node, "not found")
    return "" if found == wanted else found
