"""Statistics of a table: what may be said about a handful of seeds, and no more.

Differences are paired by seed (the two runs of a seed share initialisation and data order), their interval is
Student's t, and a row is said to differ only after Holm's correction over the rows of its table. A bootstrap of three
seeds would cover far less than it promises.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import special  # not scipy.stats: the same t distribution, and tables start in half the time

CONFIDENCE = 0.95
# Differences that agree to this fraction are equal but for rounding, which is no spread to judge by.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Difference:
    """A difference of means, paired by seed.

    Args:
        n: number of seeds that both rows have.
        mean: mean of the differences, row minus baseline.
        low: lower end of the confidence interval; None where there is none (one seed, or no spread at all).
        high: upper end of the confidence interval, or None.
        p: two-sided p-value of Student's t-test, before correction, or None.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean, None of nothing."""
    return math.fsum(values) / len(values) if values else None


def sample_std(values: Sequence[float]) -> float | None:
    """Sample standard deviation (divided by n - 1), None of fewer than two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def paired_difference(
    row: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Difference between a row and the baseline over the seeds they share.

    Args:
        row: value of each seed.
        baseline: value of each seed of the baseline row.
        confidence: of the interval, between 0 and 1.

    Returns:
        None without a common seed. The interval and p are None with one common seed, and where the differences are
        all the same: such seeds carry no estimate of the spread, so they neither show nor exclude a difference.

    Raises:
        ValueError: a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, expected a number between 0 and 1, such as 0.95")
    seeds = sorted(set(row) & set(baseline))
    differences = [row[seed] - baseline[seed] for seed in seeds]
    centre, spread = mean(differences), sample_std(differences)
    if centre is None:
        return None
    n = len(seeds)
    scale = max(abs(values[seed]) for seed in seeds for values in (row, baseline))
    if spread is None or spread <= _ROUNDING * scale:
        return Difference(n, centre)
    error = spread / math.sqrt(n)
    half_width = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * error
    p = 2 * float(special.stdtr(n - 1, -abs(centre) / error))
    return Difference(n, centre, centre - half_width, centre + half_width, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of a family of p-values.

    Args:
        p_values: one a row; None where no test was made, which does not count towards the family.

    Returns:
        The corrected p-values in the same order; a row differs at level a if its corrected value is below a.

    Raises:
        ValueError: a p-value that is not from 0 to 1.
    """
    tested = []
    for index, p in enumerate(p_values):
        if p is None:
            continue
        if not 0 <= p <= 1:
            raise ValueError(f"p-value {p!r} at position {index}, expected a number from 0 to 1")
        tested.append((p, index))
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(sorted(tested)):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[index] = highest
    return corrected
