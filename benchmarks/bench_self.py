"""A graph timed against itself: does the interval of ``headwise bench`` hold 1 as often as it says?

    python benchmarks/bench_self.py --out benchmarks/bench_self --starts 6

Makes eight products of 256 x 256 with a softmax behind each, on 64 rows: about a millisecond with one thread.
``--starts 1`` has the same number of rounds in one pair of processes. A run that was cut short goes on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import onnx
from common import Results, Row, table
from onnx import TensorProto, helper, numpy_helper

from headwise.pipeline.bench.rounds import BenchOptions, bench

LAYERS, WIDTH, ROWS = 8, 256, 64


def make_graph(path: Path) -> None:
    random = np.random.default_rng(0)
    weights = [(random.normal(size=(WIDTH, WIDTH)) / 16).astype(np.float32) for _ in range(LAYERS)]
    nodes = []
    for layer in range(LAYERS):
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"y{layer}"]))
        nodes.append(helper.make_node("Softmax", [f"y{layer}"], [f"x{layer + 1}"]))
    first, last = (helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, [1, ROWS, WIDTH]) for n in (0, LAYERS))
    constants = [numpy_helper.from_array(weight, f"w{layer}") for layer, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "products", [first], [last], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def write(part: Row) -> str:
    rows = part["rows"]
    loads = [row["load"] for row in rows]
    held = sum(low <= 1 <= high for row in rows for low, high in [row["interval"]])
    mean = np.exp(np.mean([np.log(row["ratio"]) for row in rows]))
    lines = [
        (str(n), *(f"{value:.4f}" for value in (row["ratio"], *row["interval"])), f"{row['median_ms']:.3f}")
        for n, row in enumerate(rows, start=1)
    ]
    return (
        f"## {part['rounds']} rounds over {part['starts']} start{'s' * (part['starts'] > 1)}\n\n"
        f"{held} of {len(rows)} intervals of 95 % hold 1; the geometric mean of the ratios is {mean:.4f}. Between "
        f"{min(loads):.1f} and {max(loads):.1f} processes per core were ready; ONNX Runtime {rows[0]['runtime']}.\n\n"
        + table(["", "ratio", "from", "to", "median ms"], lines)
    )


RESULTS = Results(title="A graph against itself", writers={"6 starts": write, "1 start": write})


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Results, no suffix.")
@click.option("--starts", type=click.Choice(["6", "1"]), default="6", show_default=True)
@click.option("--times", default=10, show_default=True)
@click.option("--rounds", default=60, show_default=True)
def main(out: Path, starts: str, times: int, rounds: int) -> None:
    """Run the same comparison several times."""
    options = BenchOptions(rounds=rounds, starts=int(starts))
    part = "1 start" if options.starts == 1 else f"{starts} starts"
    content: Row = {"starts": options.starts, "rounds": rounds}
    rows = RESULTS.rows(out, part, content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        make_graph(path)
        while len(rows) < times:
            found = bench([str(path)] * 2, options)
            results = found["cases"][0]["results"]
            speed = {name: results[1]["speedup"][name] for name in ("ratio", "interval")}
            more = {"load": found["load"], "runtime": found["variants"][0]["version"]}
            rows.append({**speed, "median_ms": results[0]["median_ms"], **more})
            RESULTS.save(out, part, {**content, "rows": rows})
            click.echo(f"{part}: {rows[-1]}", err=True)


if __name__ == "__main__":
    main()
