"""Run in an environment that has optimum-onnx: what one of its classes makes of an exported folder.

    python optimum_reads.py FOLDER CLASS INPUTS.npz OUTPUTS.npz

A causal model writes 12 tokens greedily behind the inputs; all others give their outputs.
"""

import sys

import numpy as np
import torch
from optimum import onnxruntime


def main(folder: str, kind: str, inputs: str, outputs: str) -> None:
    model = getattr(onnxruntime, kind).from_pretrained(folder)
    given = {name: torch.from_numpy(array) for name, array in np.load(inputs).items()}
    if model.can_generate():
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        found = {"sequences": model.generate(**given, **options)}
    else:
        found = dict(model(**given))
    np.savez(outputs, **{name: tensor.numpy() for name, tensor in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
