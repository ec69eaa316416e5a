"""Which points are evaluated by one job: nobody is left out, nobody twice, and who is done stays where he was."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.sweep.batches import assign_batches, read_batches, record_batches
from lorasweep.util.errors import InputError

NAMES = [f"seed={seed}" for seed in range(30)]


def assign(points: list[str], done: set[str], trained: set[str], size: int, record: Path) -> dict[str, list[str]]:
    batches = assign_batches(points, done, trained, size, record)
    record_batches(batches, record)
    return batches


def test_a_new_sweep_is_cut_in_the_order_of_the_file(tmp_path: Path) -> None:
    batches = assign(NAMES[:5], set(), set(), 2, tmp_path / "batches.json")
    assert list(batches.values()) == [NAMES[:2], NAMES[2:4], NAMES[4:5]]
    assert [name.partition("-")[0] for name in batches] == ["seed=0+1", "seed=2+1", "seed=4"]


def test_what_is_done_keeps_its_batch_and_the_rest_is_put_together_anew(tmp_path: Path) -> None:
    record = tmp_path / "batches.json"
    [first] = assign(NAMES[:5], set(), set(NAMES), 5, record)
    batches = assign(NAMES[:8], {"seed=0", "seed=3"}, set(NAMES), 5, record)
    assert batches[first] == ["seed=0", "seed=3"]
    assert [members for name, members in batches.items() if name != first] == [
        ["seed=1", "seed=2", "seed=4", "seed=5", "seed=6"],
        ["seed=7"],
    ]


def test_a_point_whose_training_failed_holds_up_none_that_is_trained(tmp_path: Path) -> None:
    batches = assign(NAMES[:4], set(), {"seed=0", "seed=2", "seed=3"}, 10, tmp_path / "batches.json")
    assert sorted(batches.values()) == [["seed=0", "seed=2", "seed=3"], ["seed=1"]]


def test_a_point_that_left_and_comes_back_has_its_batch_again(tmp_path: Path) -> None:
    record = tmp_path / "batches.json"
    before = assign(NAMES[:4], set(), set(NAMES), 3, record)
    assign([NAMES[0], NAMES[3]], set(NAMES), set(NAMES), 3, record)
    assert assign(NAMES[:4], set(NAMES), set(NAMES), 3, record) == before


def test_a_record_of_another_hand_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "batches.json").write_text("[1")
    with pytest.raises(InputError, match=r"batches\.json: not the record"):
        read_batches(tmp_path / "batches.json")


_SUBSET = st.sets(st.sampled_from(NAMES))


@given(st.lists(st.tuples(_SUBSET, _SUBSET, _SUBSET, st.integers(1, 9)), min_size=1, max_size=6))
def test_whatever_happens_each_point_is_in_one_batch_of_the_right_size(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[set[str], set[str], set[str], int]]
) -> None:
    record = tmp_path_factory.mktemp("record") / "batches.json"
    before: dict[str, list[str]] = {}
    largest = 0
    for chosen, done, trained, size in history:
        points = [name for name in NAMES if name in chosen]
        batches = assign(points, done, trained, size, record)
        largest = max(largest, size)
        assert sorted(point for members in batches.values() for point in members) == sorted(points)
        assert all(0 < len(members) <= largest for members in batches.values())
        for name, members in before.items():
            for point in set(members) & done & chosen:
                assert point in batches[name]
        before = batches
