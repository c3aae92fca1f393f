"""Steps that learn from labels, and text that has none."""

from __future__ import annotations

from collections.abc import Sequence

from pocketsize.data.labels import UNKNOWN, by_labels, is_labelled
from pocketsize.data.text import Corpus
from pocketsize.errors import DataError
from pocketsize.models.model import Model
from pocketsize.recipes.step import Step
from pocketsize.recipes.training import Training
from pocketsize.training.examples import Examples

# The key by which teachers are weighed by labels.
WEIGHED = "weigh: loss"


def require_heeded(steps: Sequence[Step], model: Model, corpus: Corpus) -> bool:
    """Refuses text without the labels that one of the steps heeds, before the first one begins.

    Whether any step heeds labels.
    """
    heeded = False
    for step in steps:
        model = step.outline(model)
        heeds = step.heeds if isinstance(step, Training) and step.reads else ""
        if not heeds or model.arch.task != "classify":
            continue
        if not is_labelled(corpus):
            raise unlabelled(corpus.name, heeds)
        if heeds == WEIGHED and by_labels(corpus)[1] is not None:
            raise some_unlabelled(corpus.name)
        heeded = True
    return heeded


def require_labels(examples: Examples, heeds: str) -> Examples:
    """Those of the examples that have labels; refuses text without any for what heeds them."""
    if examples.labels is None:
        raise unlabelled(examples.name, heeds)
    known = examples.labels != UNKNOWN
    return examples if known.all() else examples.part(known.nonzero()[0].tolist())


def unlabelled(name: str, heeds: str) -> DataError:
    """What is said of text without labels."""
    return DataError(f"{name}: its texts have no labels, which {heeds} needs; name labelled text as `train`")


def some_unlabelled(name: str) -> DataError:
    """What is said of files without labels beside others, where teachers are weighed by labels."""
    return DataError(
        f"{name}: weigh: loss: some of its files have no labels to weigh teachers by; use equal, or leave "
        "them out"
    )
