"""Make a model fit, or as small as it can be for what it must keep.

python examples/to_a_goal.py MODEL OUT --fit 80MB
python examples/to_a_goal.py MODEL OUT --keep 95%
"""

import argparse

import pocketsize as ps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="sample:smollm2-135m")
    parser.add_argument("out", nargs="?", default="to-a-goal")
    parser.add_argument("--fit", help="largest file, such as 80MB")
    parser.add_argument("--ratio", help="times smaller than the download, such as 4x")
    parser.add_argument("--keep", help="share of quality, such as 95%%")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()

    goal = {"fit": given.fit, "ratio": given.ratio, "keep": given.keep}
    texts = ps.Data(sequences=given.sequences, length=given.length)
    result = ps.shrink(given.model, out=given.out, data=texts, **goal)

    step = result.record.steps[0]
    print(f"chosen: {step.kind} {step.options['scheme']}, embeddings {step.options['embeddings'] or 'kept'}")
    for artifact in result.record.artifacts:
        print(f"{artifact.format}: {artifact.bytes / 1e6:.2f} MB in {result.folder / artifact.path}")
        print(*(f"  read back: {check}" for check in artifact.checks), sep="\n")
    print(*(f"finding: {found.message} {found.where}" for found in result.record.all_findings), sep="\n")


if __name__ == "__main__":
    main()
