"""Matrices that could not be compressed as asked: they are counted, and too many of them are an error.

Such is one whose Gram matrix took more damping than was asked for. What is decided before a run and told by
its plan (stand-ins) is none, nor is what the text does not show (experts that no token reached, few tokens,
dead inputs): findings tell that, since no setting of the step is at fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pocketsize.errors import NumericalError
from pocketsize.recipes.record import Finding, LayerReport

# The share of a model's matrices that may fall back, and how many may in a small one: queries, keys and
# values share one Gram matrix.
SHARE, SPARED = 0.01, 3
_NAMED = 5


def require_few_fallbacks(kind: str, reports: Sequence[LayerReport], total: int) -> None:
    """Refuse to go on once more than 1 % of all matrices of a model, and more than three, fell back."""
    raised = [r for r in reports if r.escalations]
    if len(raised) <= max(SPARED, SHARE * total):
        return
    names = ", ".join(r.name for r in raised[:_NAMED])
    more = f" and {len(raised) - _NAMED} more" if len(raised) > _NAMED else ""
    most = max(r.damp for r in raised)
    raise NumericalError(
        f"{kind}: the inputs of {len(raised)} of {total} matrices, more than {SHARE:.0%}, could not be "
        f"factorised with the damping asked for; it took up to {most:g}: {names}{more}; give more "
        f"calibration text, or damp: {most:g} to a step that has it"
    )


def raised_damping(reports: Sequence[LayerReport]) -> Iterator[Finding]:
    """Whose damping was raised: one finding, which names the worst."""
    raised = [r for r in reports if r.escalations]
    if raised:
        worst = max(raised, key=lambda r: r.damp)
        said = f"damping raised for {len(raised)} of {len(reports)} matrices, at most to {worst.damp:g}"
        yield Finding("damping-raised", said, worst.name)
