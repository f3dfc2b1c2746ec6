"""The quantize stage of a run."""
