"""The layers of a finished folder, worst first, from its record.json alone.

python examples/layer_errors.py OUT --top 20
"""

import argparse

import pocketsize as ps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", default="demo", help="what shrink, run or quantize wrote")
    parser.add_argument("--top", type=int, default=20)
    given = parser.parse_args()

    record = ps.result(given.folder).record
    layers = [layer for step in record.steps for layer in step.layers]
    layers.sort(key=lambda layer: layer.error, reverse=True)
    print(f"{record.origin.name}: {len(layers)} matrices; the error is that of a layer's output, squared")
    print(f"{'error':>9} {'of RTN':>7} {'bits':>5} {'damp':>6}  matrix")
    for layer in layers[: given.top]:
        share = layer.error / layer.rtn_error if layer.rtn_error else 1.0
        print(f"{layer.error:9.2e} {share:7.0%} {layer.bits_per_weight:5.2f} {layer.damp:6.3f}  {layer.name}")


if __name__ == "__main__":
    main()
