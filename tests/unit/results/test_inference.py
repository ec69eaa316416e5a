"""What is said of how sure numbers are is right: by published examples, and by how often intervals cover the truth."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from lorasweep.results import inference
from lorasweep.results.inference import (
    Scores,
    adjust_p_values,
    count_needed_samples,
    get_difference_interval,
    get_mean_interval,
    get_p_value,
    get_paired_p_value,
    get_standard_error,
)
from simulated_scores import Simulation


def of(values: Any, *, clusters: Any = None, is_share: bool = True) -> Scores:
    """Scores of one training, or of several in rows, on samples that are called by their place."""
    values = np.atleast_2d(values)
    clusters = None if clusters is None else np.asarray(clusters)
    return Scores(values, tuple(map(str, range(values.shape[1]))), clusters, is_share)


def means(*values: float, is_share: bool = True) -> Scores:
    """A metric of several trainings that is no mean over samples."""
    return Scores(np.array(values)[:, None], is_share=is_share)


def right(count: int, of: int) -> Any:
    return np.array([1.0] * count + [0.0] * (of - count))


def pairs(both: int, first: int, second: int, neither: int) -> tuple[Scores, Scores]:
    """Scores of two models on the same samples, by how many both, one, or neither got right."""
    counts = (both, first, second, neither)
    return of(np.repeat([1.0, 1.0, 0.0, 0.0], counts)), of(np.repeat([1.0, 0.0, 1.0, 0.0], counts))


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    # Newcombe (1998), Stat. Med. 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_wilsons(count: int, of: int, low: float, high: float) -> None:
    found = get_mean_interval(Scores(right(count, of)[None], tuple(map(str, range(of)))))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.method == inference.WILSON


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    # Newcombe (1998), Stat. Med. 17:2635, table III, method 10.
    [((36, 12, 2, 0), 0.0569, 0.3404), ((36, 14, 0, 0), 0.1528, 0.4167), ((54, 0, 0, 0), -0.0664, 0.0664)],
)
def test_the_interval_of_a_paired_difference_is_newcombes(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    scores, base = pairs(*counts)
    found = get_difference_interval(scores, base)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    swapped = get_difference_interval(base, scores)
    assert swapped is not None
    assert (-swapped.high, -swapped.low) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_an_unpaired_difference_is_newcombes() -> None:
    # Newcombe (1998), Stat. Med. 17:873, table II, example (a), method 10.
    found = get_difference_interval(of(right(56, 70)), of(right(48, 80)))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_all_right_against_all_wrong_has_an_interval() -> None:
    found = get_difference_interval(of(right(20, 20)), of(right(0, 20)))
    assert found is not None
    assert 0.7 < found.low < 1.0
    assert found.high == 1.0


@pytest.mark.parametrize(
    ("shares", "draw_pair"),
    [
        ((0.9, 0.5), lambda d, n: (hard := d.uniform(size=n)) is not None and ((hard < 0.9) * 1.0, (hard < 0.5) * 1.0)),
        ((0.7, 0.6), lambda d, n: ((d.uniform(size=n) < 0.7) * 1.0, (d.uniform(size=n) < 0.6) * 1.0)),
    ],
    ids=["hard samples are hard for both", "independent"],
)
def test_paired_intervals_cover_the_truth_as_often_as_they_say(
    shares: tuple[float, float], draw_pair: Callable[..., tuple[Any, Any]]
) -> None:
    draw = np.random.default_rng(0)
    found = [get_difference_interval(*map(of, draw_pair(draw, 30))) for _ in range(2000)]
    covered = [i is not None and i.low <= shares[0] - shares[1] <= i.high for i in found]
    assert 0.93 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("share", "spread"), [(0.5, 0.0), (0.5, 1.0), (0.9, 0.5)])
def test_intervals_of_few_seeds_cover_the_truth_at_least_as_often_as_they_say(
    seeds: int, share: float, spread: float
) -> None:
    simulation = Simulation(share, seeds, samples=60, spread=spread, gain=0.5)
    gain = simulation.truth - simulation.base_truth
    covered, gained = [], []
    for scores, _, base in simulation.draw(400):
        interval, difference = get_mean_interval(scores), get_difference_interval(scores, base)
        assert interval is not None
        assert difference is not None
        assert 0 <= interval.low <= scores.mean <= interval.high <= 1
        assert -1 <= difference.low <= difference.high <= 1
        covered.append(interval.low <= simulation.truth <= interval.high)
        gained.append(difference.low <= gain <= difference.high)
    assert np.mean(covered) >= 0.93
    assert np.mean(gained) >= 0.93


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_settings_that_are_alike_but_for_their_seeds_seldom_differ(seeds: int) -> None:
    drawn = Simulation(0.6, seeds, samples=40, spread=1.0).draw(150)
    p_values = [get_p_value(scores, alike) for scores, alike, _ in drawn]
    assert np.mean([p is not None and p < 0.05 for p in p_values]) <= 0.05


def test_seeds_that_all_agree_add_little_to_the_interval_over_samples() -> None:
    once = of(right(30, 60))
    thrice = get_mean_interval(of([right(30, 60)] * 3))
    alone = get_mean_interval(once)
    assert thrice is not None
    assert alone is not None
    assert (thrice.low, thrice.high) == pytest.approx((alone.low, alone.high), abs=5e-3)


@given(arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.sampled_from([0.0, 0.25, 1.0])))
def test_no_interval_of_shares_leaves_their_range(values: Any) -> None:
    found = get_mean_interval(of(values))
    difference = get_difference_interval(of(values), of(np.ones(values.shape[1])))
    assert found is None or 0 <= found.low <= found.high <= 1
    assert difference is None or -1 <= difference.low <= difference.high <= 1


def test_two_seeds_far_apart_leave_a_share_within_its_range() -> None:
    found = get_mean_interval(means(0.03, 0.77))
    assert found is not None
    assert 0 <= found.low < 0.05
    assert 0.95 < found.high <= 1


def test_shares_between_0_and_1_are_covered_nearly_as_often_as_intervals_say() -> None:
    draw = np.random.default_rng(0)
    found = [get_mean_interval(of(draw.beta(2, 5, size=40))) for _ in range(1000)]
    assert 0.93 <= np.mean([i is not None and i.low <= 2 / 7 <= i.high for i in found]) <= 0.97
    few = [get_mean_interval(of(draw.uniform(size=5))) for _ in range(1000)]
    assert 0.93 <= np.mean([i is not None and i.low <= 0.5 <= i.high for i in few]) <= 0.98


def test_scores_of_another_range_have_students_interval() -> None:
    scores = np.array([1.0, 4.0, 7.0, 9.0])
    found = get_mean_interval(of(scores, is_share=False))
    student = stats.t.interval(0.95, 3, scores.mean(), stats.sem(scores))
    assert found is not None
    assert (found.low, found.high) == pytest.approx(student)
    assert found.method == inference.STUDENT
    paired = get_difference_interval(of(scores, is_share=False), of(scores[::-1], is_share=False))
    difference = scores - scores[::-1]
    expected = stats.t.interval(0.95, 3, difference.mean(), stats.sem(difference))
    assert paired is not None
    assert (paired.low, paired.high) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [np.array([0.3]), np.array([0.3, 0.3, 0.3])])
def test_scores_that_do_not_vary_have_no_interval(scores: Any) -> None:
    assert get_mean_interval(of(scores)) is None


class TestClusters:
    """Samples in clusters of four that are all right or all wrong."""

    clusters = np.repeat(np.arange(30), 4)
    values = np.repeat(right(18, 30), 4)

    def test_samples_that_agree_count_once(self) -> None:
        clustered, once = (
            get_mean_interval(of(self.values, clusters=self.clusters)),
            get_mean_interval(of(right(18, 30))),
        )
        assert clustered is not None
        assert once is not None
        assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=0.06)
        independent = get_mean_interval(of(self.values))
        assert independent is not None
        assert clustered.high - clustered.low > 1.8 * (independent.high - independent.low)

    def test_the_standard_error_is_of_clusters_and_seeds(self) -> None:
        # As Inspect's stderr(cluster=...), for clusters of one size: that of their means.
        assert get_standard_error(of(self.values, clusters=self.clusters)) == pytest.approx(stats.sem(right(18, 30)))
        assert get_standard_error(of(self.values)) == pytest.approx(stats.sem(self.values))
        assert get_standard_error(means(0.4, 0.6)) == pytest.approx(0.1)
        assert get_standard_error(means(0.4)) is None

    def test_a_test_is_by_cluster(self) -> None:
        base = np.repeat(right(10, 30), 4)
        clustered = get_paired_p_value(of(self.values, clusters=self.clusters), of(base, clusters=self.clusters))
        assert clustered == pytest.approx(get_paired_p_value(of(right(18, 30)), of(right(10, 30))))
        assert get_paired_p_value(of(self.values), of(base)) < 1e-6 < clustered

    def test_intervals_cover_the_truth_as_often_as_they_say_by_cluster_only(self) -> None:
        simulation = Simulation(0.6, 1, samples=120, spread=0.0, size=6)
        covered: dict[bool, list[bool]] = {True: [], False: []}
        for scores, _, _ in simulation.draw(400):
            for is_told, kept in covered.items():
                found = get_mean_interval(scores if is_told else replace(scores, clusters=None))
                kept.append(found is not None and found.low <= simulation.truth <= found.high)
        assert np.mean(covered[True]) >= 0.93
        assert np.mean(covered[False]) < 0.9

    def test_one_cluster_says_nothing_of_others(self) -> None:
        assert get_mean_interval(of([1.0, 0.0, 1.0], clusters=[0, 0, 0])) is None


def test_the_samples_that_a_difference_needs_find_it_as_often_as_the_power_says() -> None:
    draw = np.random.default_rng(0)

    def draw_pair(samples: int) -> tuple[Scores, Scores]:
        return of((draw.uniform(size=samples) < 0.7) * 1.0), of((draw.uniform(size=samples) < 0.5) * 1.0)

    needed = count_needed_samples(of(np.tile(right(7, 10), 10)), of(np.repeat(right(5, 10), 10)), 0.05)
    assert needed is not None
    found = [get_paired_p_value(*draw_pair(needed)) < 0.05 for _ in range(400)]
    assert 0.72 <= np.mean(found) <= 0.86  # the exact test is a little conservative
    assert count_needed_samples(of(right(7, 10)), of(right(7, 10)), 0.05) is None


def test_the_p_value_of_paired_shares_is_the_exact_mcnemar_tests() -> None:
    # 10 discordant pairs, 1 of them for the base: 2 * (1 + 10) / 2**10.
    assert get_paired_p_value(*pairs(5, 9, 1, 5)) == pytest.approx(22 / 1024)
    assert get_paired_p_value(*pairs(5, 0, 0, 5)) == 1.0


def test_the_p_value_of_other_pairs_is_by_all_signs() -> None:
    # Of the 2**5 signs, the observed and its opposite are the most extreme.
    assert get_paired_p_value(of([1.1, 1.2, 1.3, 1.4, 1.5]), of(np.ones(5))) == pytest.approx(2 / 32)


def test_no_p_value_is_bounded_by_the_number_of_permutations() -> None:
    base = np.random.default_rng(0).uniform(size=100)
    assert get_paired_p_value(of(base + 0.5 + base / 10), of(base)) < 1e-12


def test_no_difference_is_found_as_often_as_the_level_says() -> None:
    draw = np.random.default_rng(0)
    p_values = [get_paired_p_value(of(draw.normal(size=12)), of(draw.normal(size=12))) for _ in range(300)]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.08


def test_p_values_are_corrected_for_their_number() -> None:
    # Holm (1979): 0.005 * 4, 0.01 * 3, then the larger of 0.03 * 2 and what came before.
    assert adjust_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_p_values([]) == []


def test_comparisons_of_one_setting_count_once() -> None:
    assert adjust_p_values([0.01, 0.01, 0.01, 0.04], ["a", "a", "a", "b"]) == pytest.approx([0.02, 0.02, 0.02, 0.04])


@given(st.lists(st.floats(0, 1), max_size=20))
def test_a_corrected_p_value_is_no_smaller_and_keeps_its_rank(p_values: list[float]) -> None:
    adjusted = adjust_p_values(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    assert [a for _, a in sorted(zip(p_values, adjusted, strict=True))] == sorted(adjusted)


def test_a_metric_that_is_no_mean_over_samples_is_compared_by_its_seeds() -> None:
    found = get_mean_interval(means(7.0, 7.4, 7.8, is_share=False))
    assert found is not None
    # 7.4 ± t(0.975, 2) * 0.4 / sqrt(3)
    assert (found.low, found.high) == pytest.approx(
        (7.4 - 4.3027 * 0.4 / 3**0.5, 7.4 + 4.3027 * 0.4 / 3**0.5), abs=1e-4
    )
    assert get_mean_interval(means(0.7)) is None
    base = replace(means(0.7), is_trained=False)
    expected = stats.ttest_1samp([0.70, 0.74, 0.78], 0.7).pvalue
    assert get_p_value(means(0.70, 0.74, 0.78), base) == pytest.approx(expected, rel=1e-6)
    assert get_p_value(means(0.70, 0.74, 0.78), means(0.20, 0.24, 0.28)) < 0.01  # type: ignore[operator]


def test_a_setting_that_was_trained_once_is_taken_to_vary_as_the_other() -> None:
    found = get_p_value(means(0.70, 0.74, 0.78), means(0.5))
    # The t-test of equal variances, of which one group has a single value.
    expected = stats.ttest_ind([0.70, 0.74, 0.78], [0.5], equal_var=True).pvalue
    assert found == pytest.approx(expected, rel=1e-6)


def test_trainings_that_say_nothing_of_other_seeds_are_not_tested_by_them() -> None:
    assert get_p_value(means(0.7), means(0.1)) is None
    assert get_p_value(means(0.5, 0.5), means(0.7, 0.7)) is None
    assert get_mean_interval(means(0.5, 0.5)) is None


def test_a_difference_has_to_hold_over_samples_and_over_seeds() -> None:
    base = of(right(10, 40))
    few_samples = get_p_value(of([right(2, 2)] * 3), of(right(0, 2)))
    assert few_samples == 0.5  # of the four ways in which two samples can differ, two are as extreme
    scattered = get_p_value(of([right(12, 40), right(38, 40)]), replace(base, is_trained=False))
    assert scattered is not None
    assert scattered > 0.2 > 0.001 > get_paired_p_value(of([right(12, 40), right(38, 40)]), base)
