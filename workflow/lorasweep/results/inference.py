"""Statistical inference: confidence intervals, tests, and corrections for multiple comparisons.

All functions work on one score per sample, shape (samples,): the mean over the sample's epochs. With few samples, no
normality of means is assumed: 0 of 20 right has an interval too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95

WILSON = "Wilson score"
BOOTSTRAP = "bootstrap (BCa)"
STUDENT = "Student's t"
STUDENT_OF_SEEDS = "Student's t over seeds"
PAIRED_WILSON = "paired Wilson (Newcombe)"
PAIRED_BOOTSTRAP = "paired bootstrap (BCa)"
PAIRED_STUDENT = "paired Student's t"
UNPAIRED = "unpaired (MOVER)"

_RESAMPLES = 4000
_SEED = 0

FEW, MANY = 10, 500
"""Numbers of samples between which the bootstrap is used. Below, its coverage is too low; from 500 on it agrees with
Student's interval at a hundred times the cost."""

Scores = NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A confidence interval with the method that computed it."""

    low: float
    high: float
    method: str


def get_mean_interval(scores: Scores, confidence: float = CONFIDENCE) -> Interval | None:
    """Return the confidence interval of the mean score; `None` if there are too few samples or they do not vary.

    Scores of 0 and 1: Wilson (1927), J. Am. Stat. Assoc. 22:209. Others: the BCa bootstrap over samples (Efron 1987,
    J. Am. Stat. Assoc. 82:171), and Student's t below 10 samples and from 500 on.
    """
    if _are_binary(scores):
        wilson = stats.binomtest(round(scores.sum()), len(scores)).proportion_ci(confidence, method="wilson")
        return Interval(float(wilson.low), float(wilson.high), WILSON)
    return _get_interval(scores, confidence, BOOTSTRAP, STUDENT)


def get_paired_interval(scores: Scores, base: Scores, confidence: float = CONFIDENCE) -> Interval | None:
    """Return the confidence interval of the mean difference of two models on the same samples, in the same order.

    Scores of 0 and 1: Newcombe (1998), Stat. Med. 17:2635, method 10, which has an interval for 20 of 20 against 0 of
    20 too. Other scores: the interval of the mean of the differences.
    """
    if not (_are_binary(scores) and _are_binary(base)):
        return _get_interval(scores - base, confidence, PAIRED_BOOTSTRAP, PAIRED_STUDENT)
    own, other = get_mean_interval(scores, confidence), get_mean_interval(base, confidence)
    combined = _combine(scores.mean(), own, base.mean(), other, _get_correlation(scores, base))
    return combined and Interval(*combined, PAIRED_WILSON)


def get_unpaired_interval(
    mean: float, interval: Interval | None, base_mean: float, base_interval: Interval | None
) -> Interval | None:
    """Return the confidence interval of the difference of two means from the intervals of both.

    The method is MOVER (Zou and Donner 2008, Stat. Med. 27:1693); for proportions it equals Newcombe's hybrid score
    interval.
    """
    combined = _combine(mean, interval, base_mean, base_interval, 0.0)
    return combined and Interval(*combined, UNPAIRED)


def get_paired_p_value(scores: Scores, base: Scores) -> float:
    """Return the two-sided p-value of no difference between two models on the same samples.

    Under the null hypothesis the two models are exchangeable in each sample. Scores of 0 and 1: the exact McNemar test.
    Other scores: a sign-flip permutation test. Student's t is used from 500 samples on, and if no permutation is as
    extreme as the data, so that the number of permutations does not limit the p-value.
    """
    differences = scores - base
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    if len(np.unique(np.abs(differences))) == 1:
        return float(stats.binomtest(int((differences > 0).sum()), len(differences)).pvalue)
    student = float(stats.ttest_1samp(scores - base, 0.0).pvalue)
    if len(scores) >= MANY:
        return student
    permuted = stats.permutation_test(
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


def get_unpaired_p_value(scores: Scores, others: Scores) -> float | None:
    """Return the two-sided p-value of no difference between two models on different samples.

    Scores of 0 and 1: Fisher's exact test (1935), J. R. Stat. Soc. 98:39. Other scores: Welch's t; `None` if a model
    has one sample only, or no score varies.
    """
    if _are_binary(scores) and _are_binary(others):
        counts = [[values.sum(), len(values) - values.sum()] for values in (scores, others)]
        return float(stats.fisher_exact(counts).pvalue)
    return get_replicates_p_value(scores, others)


def get_replicates_interval(means: Scores, confidence: float = CONFIDENCE) -> Interval | None:
    """Return Student's interval of the mean over trainings, shape (seeds,); `None` if they do not vary."""
    if len(means) < 2 or np.ptp(means) == 0:
        return None
    return _get_student_interval(means, confidence, STUDENT_OF_SEEDS)


def get_replicates_p_value(means: Scores, others: Scores) -> float | None:
    """Return Welch's two-sided p-value for the means of two settings' trainings, shapes (seeds,) and (other seeds,).

    `None` if a setting was trained only once, or neither setting varies: then the variation between seeds is unknown.
    """
    if len(means) < 2 or len(others) < 2 or (np.ptp(means) == 0 and np.ptp(others) == 0):
        return None
    return float(stats.ttest_ind(means, others, equal_var=False).pvalue)


def get_baseline_p_value(means: Scores, baseline: float) -> float | None:
    """Return Student's two-sided p-value for trainings' means, shape (seeds,), against a baseline; `None` as above."""
    if len(means) < 2 or np.ptp(means) == 0:
        return None
    return float(stats.ttest_1samp(means, baseline).pvalue)


def widen(first: Interval | None, second: Interval | None) -> Interval | None:
    """Return the smallest interval that covers both; if one is `None`, return the other."""
    if first is None or second is None:
        return first or second
    method = first.method if first.method == second.method else f"the wider of {first.method} and {second.method}"
    return Interval(min(first.low, second.low), max(first.high, second.high), method)


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple comparisons (Holm 1979, Scand. J. Stat. 6:65)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _are_binary(scores: Scores) -> bool:
    return len(scores) > 0 and bool(np.isin(scores, (0.0, 1.0)).all())


def _get_interval(values: Scores, confidence: float, bootstrap: str, student: str) -> Interval | None:
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    if not FEW <= len(values) < MANY:
        return _get_student_interval(values, confidence, student)
    limits = stats.bootstrap(
        (values,),
        np.mean,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=_RESAMPLES,
        batch=max(1, 2_000_000 // len(values)),
        method="BCa",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Interval(float(limits.low), float(limits.high), bootstrap)


def _get_student_interval(values: Scores, confidence: float, method: str) -> Interval:
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / sqrt(len(values))
    return Interval(float(values.mean() - half), float(values.mean() + half), method)


def _get_correlation(scores: Scores, base: Scores) -> float:
    """Return the correlation of paired binary scores, with Newcombe's continuity correction; 0 if a margin is empty."""
    both, first = float((scores * base).sum()), float((scores * (1 - base)).sum())
    second, neither = float(((1 - scores) * base).sum()), float(((1 - scores) * (1 - base)).sum())
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if margins == 0:
        return 0.0
    product = both * neither - first * second
    if product > 0:
        product = max(product - len(scores) / 2, 0.0)
    return product / sqrt(margins)


def _combine(
    mean: float, interval: Interval | None, other_mean: float, other: Interval | None, correlation: float
) -> tuple[float, float] | None:
    """Return the limits of a difference of means from the limits of both means; `None` if an interval is missing."""
    if interval is None or other is None:
        return None
    difference = mean - other_mean

    def reach(first: float, second: float) -> float:
        return sqrt(max(0.0, first**2 + second**2 - 2 * correlation * first * second))

    low = difference - reach(mean - interval.low, other.high - other_mean)
    high = difference + reach(interval.high - mean, other_mean - other.low)
    return float(low), float(high)
