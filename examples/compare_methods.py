"""Round to nearest against GPTQ at the same bits: what each keeps of a language model.

python examples/compare_methods.py MODEL --schemes W4A16 W3A16
"""

import argparse
import tempfile
from pathlib import Path

import pocketsize as ps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="sample:smollm2-135m")
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W3A16"])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()

    texts = ps.Data(sequences=given.sequences, length=given.length, written=0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for scheme in given.schemes:
            for step in (ps.Rtn(scheme=scheme), ps.Gptq(scheme=scheme)):
                out = Path(folder, f"{step.kind}-{scheme}")
                kept = ps.run(given.model, [step], out=out, export=["folder"], data=texts).measurements
                kl, top1 = kept["kl_mean"].value, kept["top1"].value
                rows.append((scheme, step.kind, kl, top1, kept["bytes of ."].value / 1e6))

    print(f"{'scheme':<7} {'method':<6} {'KL':>9} {'top-1':>7} {'MB':>7}")
    for scheme, kind, kl, top1, size in rows:
        print(f"{scheme:<7} {kind:<6} {kl:9.4f} {top1:7.1%} {size:7.2f}")


if __name__ == "__main__":
    main()
