"""Models rounded to nearest, for tests of what is written."""

from __future__ import annotations

from pocketsize.models.model import Model
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme

SCHEMES = {
    "Q4_0": Scheme(4, 32, symmetric=True),
    "Q4_1": Scheme(4, 32, scale_digits=7),
    "Q5_0": Scheme(5, 32, symmetric=True),
    "Q5_1": Scheme(5, 32, scale_digits=6),
    "Q8_0": Scheme(8, 32, symmetric=True),
}


def quantized(model: Model, scheme: Scheme, embeddings: Scheme | None = None) -> Model:
    """The model with all linears, and the two ends if asked, rounded to nearest."""
    weights = {name: rtn(model.matrix(name), scheme) for name in model.linears}
    for name in (model.arch.embedding, model.arch.head):
        if embeddings and name in model.checkpoint.entries:
            weights[name] = rtn(model.original(name), embeddings)
    return model.with_quantized(weights)
