"""What is said of how sure numbers are is right: by published examples, and by how often intervals cover the truth."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.results import inference as statistics
from lorasweep.results.inference import (
    Interval,
    adjust_p_values,
    get_baseline_p_value,
    get_mean_interval,
    get_paired_interval,
    get_paired_p_value,
    get_replicates_interval,
    get_replicates_p_value,
    get_unpaired_interval,
    widen,
)


def right(count: int, of: int) -> statistics.Scores:
    return np.array([1.0] * count + [0.0] * (of - count))


def pairs(both: int, first: int, second: int, neither: int) -> tuple[statistics.Scores, statistics.Scores]:
    """Scores of two models on the same samples, by how many both, one, or neither got right."""
    counts = (both, first, second, neither)
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    # Newcombe (1998), Stat. Med. 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_wilsons(count: int, of: int, low: float, high: float) -> None:
    found = get_mean_interval(right(count, of))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.method == statistics.WILSON


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    # Newcombe (1998), Stat. Med. 17:2635, table III, method 10.
    [((36, 12, 2, 0), 0.0569, 0.3404), ((36, 14, 0, 0), 0.1528, 0.4167), ((54, 0, 0, 0), -0.0664, 0.0664)],
)
def test_the_interval_of_a_paired_difference_is_newcombes(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    scores, base = pairs(*counts)
    found = get_paired_interval(scores, base)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    swapped = get_paired_interval(base, scores)
    assert swapped is not None
    assert (-swapped.high, -swapped.low) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_an_unpaired_difference_is_newcombes() -> None:
    # Newcombe (1998), Stat. Med. 17:873, table II, example (a), method 10.
    first, second = right(56, 70), right(48, 80)
    found = get_unpaired_interval(0.8, get_mean_interval(first), 0.6, get_mean_interval(second))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_all_right_against_all_wrong_has_an_interval() -> None:
    found = get_paired_interval(right(20, 20), right(0, 20))
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
    shares: tuple[float, float], draw_pair: Callable[..., tuple[statistics.Scores, statistics.Scores]]
) -> None:
    draw = np.random.default_rng(0)
    found = [get_paired_interval(*draw_pair(draw, 30)) for _ in range(2000)]
    covered = [i is not None and i.low <= shares[0] - shares[1] <= i.high for i in found]
    assert 0.93 <= np.mean(covered) <= 0.99


def test_bootstrap_intervals_cover_the_truth_nearly_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    found = [get_mean_interval(draw.beta(2, 5, size=40)) for _ in range(300)]
    assert all(i is not None and i.method == statistics.BOOTSTRAP for i in found)
    few = [get_mean_interval(draw.uniform(size=5)) for _ in range(300)]
    assert 0.89 <= np.mean([i is not None and i.low <= 0.5 <= i.high for i in few]) <= 0.98
    assert 0.90 <= np.mean([i is not None and i.low <= 2 / 7 <= i.high for i in found]) <= 0.98


def test_many_samples_have_students_interval_which_is_the_bootstraps() -> None:
    scores = np.random.default_rng(0).beta(2, 5, size=statistics.MANY)
    student, bootstrap = get_mean_interval(scores), get_mean_interval(scores[:-1])
    assert student is not None
    assert bootstrap is not None
    assert (student.method, bootstrap.method) == (statistics.STUDENT, statistics.BOOTSTRAP)
    assert (student.low, student.high) == pytest.approx((bootstrap.low, bootstrap.high), abs=2e-3)


@pytest.mark.parametrize("scores", [np.array([]), np.array([0.3]), np.array([0.3, 0.3, 0.3])])
def test_scores_that_do_not_vary_have_no_interval(scores: statistics.Scores) -> None:
    assert get_mean_interval(scores) is None


def test_the_p_value_of_paired_shares_is_the_exact_mcnemar_tests() -> None:
    # 10 discordant pairs, 1 of them for the base: 2 * (1 + 10) / 2**10.
    assert get_paired_p_value(*pairs(5, 9, 1, 5)) == pytest.approx(22 / 1024)
    assert get_paired_p_value(*pairs(5, 0, 0, 5)) == 1.0


def test_the_p_value_of_other_pairs_is_by_all_signs() -> None:
    # Of the 2**5 signs, the observed and its opposite are the most extreme.
    assert get_paired_p_value(np.array([1.1, 1.2, 1.3, 1.4, 1.5]), np.ones(5)) == pytest.approx(2 / 32)


def test_no_p_value_is_bounded_by_the_number_of_permutations() -> None:
    base = np.random.default_rng(0).uniform(size=100)
    assert get_paired_p_value(base + 0.5 + base / 10, base) < 1e-12


def test_no_difference_is_found_as_often_as_the_level_says() -> None:
    draw = np.random.default_rng(0)
    p_values = [get_paired_p_value(draw.normal(size=12), draw.normal(size=12)) for _ in range(300)]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.08


def test_p_values_are_corrected_for_their_number() -> None:
    # Holm (1979): 0.005 * 4, 0.01 * 3, then the larger of 0.03 * 2 and what came before.
    assert adjust_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_p_values([]) == []


@given(st.lists(st.floats(0, 1), max_size=20))
def test_a_corrected_p_value_is_no_smaller_and_keeps_its_rank(p_values: list[float]) -> None:
    adjusted = adjust_p_values(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    assert [a for _, a in sorted(zip(p_values, adjusted, strict=True))] == sorted(adjusted)


def test_replicates_have_students_interval_over_seeds() -> None:
    found = get_replicates_interval(np.array([0.70, 0.74, 0.78]))
    assert found is not None
    # 0.74 ± t(0.975, 2) * 0.04 / sqrt(3)
    assert (found.low, found.high) == pytest.approx(
        (0.74 - 4.3027 * 0.04 / 3**0.5, 0.74 + 4.3027 * 0.04 / 3**0.5), abs=1e-4
    )
    assert get_replicates_interval(np.array([0.7])) is None


def test_one_training_says_nothing_of_other_seeds() -> None:
    one, several = np.array([0.7]), np.array([0.70, 0.74, 0.78])
    assert get_replicates_p_value(one, several) is None
    assert get_baseline_p_value(one, 0.1) is None
    assert get_replicates_p_value(several, several) == pytest.approx(1.0)
    assert get_replicates_p_value(several, several - 0.5) < 0.001  # type: ignore[operator]
    # Nor do trainings that all give the same.
    same = np.array([0.5, 0.5])
    assert get_replicates_p_value(same, same + 0.2) is None  # type: ignore[operator]
    assert get_baseline_p_value(same, 0.1) is None
    assert get_replicates_interval(same) is None


def test_the_wider_interval_covers_both() -> None:
    first, second = Interval(0.1, 0.4, "a"), Interval(0.2, 0.5, "b")
    assert widen(first, second) == Interval(0.1, 0.5, "the wider of a and b")
    assert widen(first, None) == first
    assert widen(None, None) is None
