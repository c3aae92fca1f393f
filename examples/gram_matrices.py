"""Walk a model and look at what its linears read: one Gram matrix for each tensor that is read.

python examples/gram_matrices.py MODEL

`rank` is the number of directions the inputs spread over (participation ratio of the
eigenvalues), `top` the share of energy in the strongest 1 % of the inputs.
"""

import argparse

import torch

import pocketsize as ps
from pocketsize.data.calibration import windows
from pocketsize.data.text import default_corpora
from pocketsize.models.load import tokenizer_of
from pocketsize.models.walk import walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="sample:smollm2-135m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()

    model, (text, _) = ps.load(given.model), default_corpora()
    shape = {"count": given.sequences, "length": given.length}
    chosen = windows(text, tokenizer_of(model), **shape, seed=0, special=True)
    for site in walk(model, chosen.input_ids, chosen.mask):
        H = site.gram.mean()
        eigenvalues, energy = torch.linalg.eigvalsh(H).clamp(min=0), H.diagonal().sort(descending=True)[0]
        rank = float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
        top = float(energy[: max(len(H) // 100, 1)].sum() / energy.sum())
        print(f"rank {rank:6.1f} of {len(H):5}  top {top:5.1%}  {', '.join(site.names)}")


if __name__ == "__main__":
    main()
