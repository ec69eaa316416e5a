"""Statistical inference: confidence intervals, tests, and corrections for multiple comparisons.

All functions work on one score per training and sample: the mean over the sample's epochs. Scores vary with the sample
and with the seed of the training, and both count. With few samples or seeds, no normality of means is assumed: 0 of 20
right has an interval too, and no interval of a share leaves 0 to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import scipy  # its parts are imported when they are used: the report and `show` need none
from numpy.typing import NDArray

CONFIDENCE = 0.95

WILSON = "Wilson score"
EFFECTIVE_WILSON = "Wilson score, effective sample size"
STUDENT = "Student's t"
PAIRED_WILSON = "paired Wilson (Newcombe)"
PAIRED = "paired (MOVER)"
UNPAIRED = "unpaired (MOVER)"

POWER = 0.8
"""Probability of finding a difference for which a number of samples is enough."""

_RESAMPLES = 4000
_SEED = 0

MANY = 500
"""Number of samples from which on permutations agree with Student's test at a hundred times the cost."""

Values = NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A confidence interval with the method that computed it."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Scores:
    """The scores of one setting on a task."""

    values: Values
    """Shape (trainings, samples); shape (trainings, 1) for a metric that is no mean over samples."""
    samples: tuple[str, ...] = ()
    """Names of the samples; empty for a metric that is no mean over samples."""
    clusters: Values | None = None
    """The cluster of each sample, shape (samples,); `None` for samples that are independent."""
    is_share: bool = True
    """Whether scores are between 0 and 1, whatever is scored."""
    is_trained: bool = True
    """Whether another seed would give other scores. The base model has no seed."""

    @property
    def mean(self) -> float:
        """The mean over trainings and samples."""
        return float(self.values.mean())

    @property
    def seeds(self) -> int:
        """The number of trainings."""
        return len(self.values)

    @property
    def by_sample(self) -> Values:
        """The mean of each sample over trainings, shape (samples,)."""
        return np.asarray(self.values.mean(axis=0))

    @property
    def by_training(self) -> Values:
        """The mean of each training over samples, shape (trainings,)."""
        return np.asarray(self.values.mean(axis=1))

    @property
    def is_binary(self) -> bool:
        """Whether these are scores of 0 and 1 of samples."""
        return self.is_share and bool(self.samples) and bool(np.isin(self.values, (0.0, 1.0)).all())

    @property
    def is_plain(self) -> bool:
        """Whether these are scores of 0 and 1 of one training on independent samples."""
        return self.is_binary and self.seeds == 1 and self.clusters is None

    def is_paired(self, other: "Scores") -> bool:
        """Whether both are scores of the same samples."""
        return bool(self.samples) and self.samples == other.samples

    def sum_by_cluster(self, values: Values) -> Values:
        """Return the sums of one value per sample over the samples of each cluster, shape (clusters,)."""
        if self.clusters is None or not self.samples:
            return values
        return np.bincount(np.unique(self.clusters, return_inverse=True)[1], weights=values)


@dataclass(frozen=True)
class _Variance:
    """The estimated variance of a mean, from one source, with its degrees of freedom."""

    value: float
    degrees: float

    def square_half(self, tail: float) -> float:
        """Return the squared half width of the interval of this variance alone, for a probability on each side."""
        return float(scipy.stats.t.isf(tail, self.degrees)) ** 2 * self.value


def get_standard_error(scores: Scores) -> float | None:
    """Return the standard error of the mean, of clusters of samples and of seeds; `None` if it cannot be estimated.

    Clusters: Miller (2024), arXiv:2411.00640, with the correction for their number as in Inspect.
    """
    parts = [_get_sample_variance(scores, scores.by_sample), _get_seed_variance(scores)]
    known = [part.value for part in parts if part is not None]
    return sqrt(sum(known)) if known else None


def get_mean_interval(scores: Scores, confidence: float = CONFIDENCE) -> Interval | None:
    """Return the confidence interval of the mean; `None` if there are too few scores, or they do not vary.

    Shares of one training on independent samples have the interval of Wilson (1927), J. Am. Stat. Assoc. 22:209. Others
    have Wilson's interval for the effective number of samples (Franco et al. 2019, J. Surv. Stat. Methodol. 7:334): the
    number at which a share has the half width that `_get_half_widths` gives for samples and seeds. Scores of other
    ranges have a symmetric interval of that half width.
    """
    halves = _get_half_widths(scores, confidence)
    if halves is None:
        return None
    mean, square = scores.mean, halves[0] ** 2 + halves[1] ** 2
    if not scores.is_share:
        half = sqrt(square)
        return Interval(mean - half, mean + half, STUDENT) if half else None
    spread = mean * (1 - mean)
    if scores.is_binary and spread == 0:
        # All right or all wrong: each cluster is one observation.
        units = len(scores.sum_by_cluster(scores.by_sample))
        ratio = float(scipy.stats.norm.isf((1 - confidence) / 2)) ** 2 / units
    elif square == 0 or spread == 0:
        return None
    else:
        ratio = square / spread
    middle, half = (mean + ratio / 2) / (1 + ratio), sqrt(ratio * spread + ratio**2 / 4) / (1 + ratio)
    method = WILSON if scores.is_plain else EFFECTIVE_WILSON
    return Interval(max(0.0, middle - half), min(1.0, middle + half), method)


def get_difference_interval(scores: Scores, base: Scores, confidence: float = CONFIDENCE) -> Interval | None:
    """Return the confidence interval of the difference of two means; `None` if neither varies, or that is unknown.

    It is combined of the intervals of both (MOVER; Zou and Donner 2008, Stat. Med. 27:1693), with the correlation of
    the means if both have the same samples. For shares of one training on independent samples, that is Newcombe (1998),
    Stat. Med. 17:2635, method 10, or 17:873, method 10.
    """
    halves, others = (_get_half_widths(each, confidence) for each in (scores, base))
    if halves is None or others is None:
        return None
    own, other = (get_mean_interval(each, confidence) for each in (scores, base))
    if own is None and other is None:
        return None
    correlation, method = 0.0, UNPAIRED
    if scores.is_paired(base):
        correlation, method = _get_correlation(scores, base), PAIRED
        # Means vary together by their samples only, not by their seeds.
        for by_samples, by_seeds in (halves, others):
            both = sqrt(by_samples**2 + by_seeds**2)
            correlation *= by_samples / both if both else 1.0
        if own and other and own.method == other.method == WILSON:
            method = PAIRED_WILSON
    mean, base_mean = scores.mean, base.mean
    below, above = (mean - own.low, own.high - mean) if own else (0.0, 0.0)
    base_below, base_above = (base_mean - other.low, other.high - base_mean) if other else (0.0, 0.0)
    difference = mean - base_mean
    low = difference - _combine(below, base_above, correlation)
    high = difference + _combine(above, base_below, correlation)
    return Interval(low, high, method)


def get_p_value(scores: Scores, base: Scores) -> float | None:
    """Return the two-sided p-value of no difference between the means of two models; `None` if no test is possible.

    It is the larger of two. Over samples: the test of `get_paired_p_value`, if both have the same ones. Over samples
    and seeds, if any has several: the level at which the interval of the difference, with the half width of
    `_get_half_widths`, begins at 0. Of two settings, one that was trained once is taken to vary between seeds as the
    other does.
    """
    is_paired = scores.is_paired(base)
    p_values = [get_paired_p_value(scores, base)] if is_paired else []
    if max(scores.seeds, base.seeds) > 1:
        seeds = _get_seed_variances(scores, base)
        if is_paired:
            parts = [_get_sample_variance(scores, scores.by_sample - base.by_sample), *seeds]
        else:
            parts = [*(_get_sample_variance(each, each.by_sample) for each in (scores, base) if each.samples), *seeds]
        known = [part for part in parts if part is not None and part.value > 0]
        if any(part in known for part in seeds) or is_paired:
            p_values.append(_find_level(scores.mean - base.mean, known))
    return max(p_values, default=None)


def get_paired_p_value(scores: Scores, base: Scores) -> float:
    """Return the two-sided p-value of no difference between two models on the same samples, whatever the seeds.

    Under the null hypothesis the two models are exchangeable in each sample or, if samples are clustered, in each
    cluster. Differences of one size: the exact McNemar test. Others: a sign-flip permutation test. Student's t is used
    from 500 samples on, and if no permutation is as extreme as the data, so that the number of permutations does not
    limit the p-value.
    """
    sums = scores.sum_by_cluster(scores.by_sample - base.by_sample)
    differences = sums[np.abs(sums) > 1e-12]
    if not len(differences):
        return 1.0
    if np.ptp(np.abs(differences)) < 1e-9:
        return float(scipy.stats.binomtest(int((differences > 0).sum()), len(differences)).pvalue)
    student = float(scipy.stats.ttest_1samp(sums, 0.0).pvalue)
    if len(sums) >= MANY:
        return student
    permuted = scipy.stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, 2_000_000 // len(differences)),
        rng=np.random.default_rng(_SEED),
    )
    is_exact = 2 ** len(differences) <= _RESAMPLES
    return student if not is_exact and permuted.pvalue <= 2 / (_RESAMPLES + 1) else float(permuted.pvalue)


def get_unpaired_p_value(scores: Scores, base: Scores) -> float | None:
    """Return the two-sided p-value of no difference between two models on different samples, whatever the seeds.

    Shares of one training on independent samples, and clusters that are all right or all wrong: Fisher's exact test
    (1935), J. R. Stat. Soc. 98:39. Others: the level
    at which the interval of the difference begins at 0. `None` for metrics that are no means, or that do not vary.
    """
    is_constant = scores.is_binary and base.is_binary and {scores.mean, base.mean} <= {0.0, 1.0}
    if is_constant or (scores.is_plain and base.is_plain):
        sums = [each.sum_by_cluster(each.by_sample) for each in (scores, base)]
        right = [int((each > 0).sum()) for each in sums]
        counts = [[count, len(each) - count] for count, each in zip(right, sums, strict=True)]
        return float(scipy.stats.fisher_exact(counts).pvalue)
    parts = [_get_sample_variance(each, each.by_sample) for each in (scores, base)]
    known = [part for part in parts if part is not None and part.value > 0]
    return _find_level(scores.mean - base.mean, known) if known else None


def count_needed_samples(scores: Scores, base: Scores, level: float) -> int | None:
    """Return the number of samples at which a paired test at a level finds the difference seen, with power `POWER`.

    Miller (2024), arXiv:2411.00640, on power: n = (z_level/2 + z_power)² Var(difference of a sample) / difference².
    Clusters are taken to be as large as these, and seeds not to vary. `None` without a difference, without the same
    samples, or if the difference is not found over the seeds, whatever the samples.
    """
    difference = scores.mean - base.mean
    if not scores.is_paired(base) or abs(difference) < 1e-12:
        return None
    variance = _get_sample_variance(scores, scores.by_sample - base.by_sample)
    seeds = [part for part in _get_seed_variances(scores, base) if part.value > 0]
    # No number of samples tells apart what seeds alone do not.
    if variance is None or (seeds and _find_level(difference, seeds) > level):
        return None
    reach = float(scipy.stats.norm.isf(level / 2) + scipy.stats.norm.ppf(POWER))
    return max(1, round(reach**2 * variance.value * len(scores.samples) / difference**2))


def adjust_p_values(p_values: Sequence[float], settings: Sequence[Any] | None = None) -> list[float]:
    """Return p-values corrected for multiple comparisons (Holm 1979, Scand. J. Stat. 6:65).

    Comparisons of the same of the `settings` count as one; `None`: each counts.
    """
    order = list(np.argsort(p_values, kind="stable"))
    names = list(settings if settings is not None else range(len(p_values)))
    left: set[Any] = set()
    factors = []
    for index in reversed(order):
        left.add(names[index])
        factors.append(len(left))
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for factor, index in zip(reversed(factors), order, strict=True):
        largest = max(largest, min(1.0, factor * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _get_half_widths(scores: Scores, confidence: float) -> tuple[float, float] | None:
    """Return the half widths of the mean's interval by samples alone and by seeds alone; `None` if neither is known.

    Each is Student's t times a standard error. The half width for both is the root of the sum of their squares: its
    interval covers the mean at least as often as it says (Banerjee 1960, Sankhya 22:357), with two seeds too.
    """
    by_samples, by_seeds = _get_sample_variance(scores, scores.by_sample), _get_seed_variance(scores)
    if scores.is_plain:
        # The variance of a share is known by its mean.
        by_samples = _Variance(scores.mean * (1 - scores.mean) / len(scores.samples), np.inf)
    if by_samples is None and by_seeds is None:
        return None
    first, second = (sqrt(part.square_half((1 - confidence) / 2)) if part else 0.0 for part in (by_samples, by_seeds))
    return first, second


def _get_sample_variance(scores: Scores, values: Values) -> _Variance | None:
    """Return the variance of the mean of one value per sample; `None` for a metric that is no mean, or one cluster."""
    sums = scores.sum_by_cluster(values - values.mean())
    clusters = len(sums)
    if not scores.samples or clusters < 2:
        return None
    return _Variance(float((sums**2).sum()) * clusters / (clusters - 1) / len(values) ** 2, clusters - 1)


def _get_seed_variance(scores: Scores) -> _Variance | None:
    """Return the variance of the mean over trainings; `None` for one training."""
    if scores.seeds < 2:
        return None
    return _Variance(float(scores.by_training.var(ddof=1)) / scores.seeds, scores.seeds - 1)


def _get_seed_variances(scores: Scores, base: Scores) -> list[_Variance]:
    """Return the variances of two means over trainings; of one that was trained once, that of the other."""
    parts = []
    for own, other in ((scores, base), (base, scores)):
        part = _get_seed_variance(own)
        if part is None and own.is_trained and (like := _get_seed_variance(other)):
            part = _Variance(like.value * other.seeds, like.degrees)
        parts += [part] if part else []
    return parts


def _find_level(difference: float, variances: Sequence[_Variance]) -> float:
    """Return the level at which the interval of a difference with these variances begins at 0."""
    if not variances:
        return 1.0 if abs(difference) < 1e-12 else 0.0

    def excess(level: float) -> float:
        return sum(part.square_half(level / 2) for part in variances) - difference**2

    least = 1e-15
    return least if excess(least) < 0 else float(scipy.optimize.brentq(excess, least, 1.0, xtol=1e-15, rtol=1e-8))


def _get_correlation(scores: Scores, base: Scores) -> float:
    """Return the correlation of two models' means by their samples; 0 if a model's scores do not vary.

    Scores of 0 and 1 of one training each have Newcombe's continuity correction.
    """
    own, other = scores.by_sample, base.by_sample
    sums, others = (scores.sum_by_cluster(each - each.mean()) for each in (own, other))
    product = float((sums * others).sum())
    if scores.is_binary and base.is_binary and scores.seeds == base.seeds == 1 and product > 0:
        product = max(product - 0.5, 0.0)
    size = float((sums**2).sum()) * float((others**2).sum())
    return min(1.0, max(-1.0, product / sqrt(size))) if size > 0 else 0.0


def _combine(first: float, second: float, correlation: float) -> float:
    """Return the distance to a limit of a difference, from the distances to a limit of both means."""
    return sqrt(max(0.0, first**2 + second**2 - 2 * correlation * first * second))
