"""Tables on a terminal of any width: names fold between their parts, numbers do not fold, and nothing is cut."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from lorasweep.cli import ledger
from lorasweep.layout import LEDGER
from lorasweep.planning.planner import PointPlan, SweepPlan
from lorasweep.planning.timeline import Timeline
from lorasweep.planning.view import show_plan
from lorasweep.results.table import show_table
from lorasweep.running.ledger import make_ledger, write_ledger
from lorasweep.util.tables import FoldingTable, fold

NAMES = (
    "baseline",
    "lora_attn_modules=q_proj+v_proj__lora_rank=8__lr=1e-4__seed=0",
    "lora_attn_modules=q_proj+k_proj+v_proj__lora_rank=256__lr=1.25e-4__seed=12__epoch=3",
)
WIDTHS = (60, 80, 120)


WHOLE = SweepPlan(
    kept_bytes=10**8,
    temporary_bytes=10**9,
    written_bytes=10**10,
    jobs={"train": 12},
    seconds={"train": 7e4},
    gpu_seconds={"train": 7e4},
    steps=12345,
    tokens=10**8,
    wall_seconds=1e5,
    mem_mb=12000,
    timeline=Timeline(),
)


def make_point(name: str, mode: str = "B1") -> PointPlan:
    return PointPlan(
        name,
        mode,
        is_done=False,
        steps=12345,
        tokens=123456789,
        kept_bytes=123456789,
        kept_bytes_by_mode={},
        temporary_bytes=10**9,
        written_bytes=10**10,
        seconds={"train": 7e4, "evaluate": 3600.0},
        gpu_hours=20.0,
        mem_mb=12000,
    )


def say(shown: RenderableType | Callable[[Console], None], width: int) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        shown(console) if callable(shown) else console.print(shown)
    return captured.get()


def check(said: str, width: int) -> None:
    """Each part of each name is in one line, in order; nothing is cut, and no line is wider than the terminal."""
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= width
    words = set(said.split())
    for name in NAMES:
        for part in name.replace("__", "__ ").split():
            assert any(part in word for word in words), (part, said)
    # A word with a key is a whole part, or several.
    parts = {part for name in NAMES for part in name.split("__")}
    for word in words:
        if "=" in word:
            assert {*filter(None, word.split("__"))} <= parts, word


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_of_results_folds_names_between_their_parts(width: int) -> None:
    metrics = {"letters_in_order/accuracy": 0.5, "letters_in_order/accuracy:low": 0.4321}
    metrics |= {"letters_in_order/accuracy:high": 0.5678, "grader/mean": 1.25, "grader/stderr": 0.5}
    rows = [
        {"point": n, "mode": "B1", "task": "letters", "samples": 1200, **metrics, "bytes": 123456789} for n in NAMES
    ]
    said = say(lambda console: show_table(pd.DataFrame(rows), "ranks", console), width)
    check(said, width)
    for number in ("1200", "0.500 [0.432, 0.568]", "1.250 ± 0.500", "123 MB"):
        assert said.count(number) == len(NAMES)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_plan_folds_names_between_their_parts(width: int) -> None:
    points = [make_point(name, mode) for name, mode in zip(NAMES, ("base", "B1", "B2"), strict=True)]
    whole = dict.fromkeys(("A", "B1", "B2", "another"), WHOLE)
    said = say(lambda console: show_plan(console, "ranks", WHOLE, whole, points, ["a note"]), width)
    check(said, width)
    assert said.count("19.4 h") >= len(NAMES)
    assert said.count("12, 19.4 h") == 5


@pytest.mark.parametrize("width", WIDTHS)
def test_the_ledger_folds_names_between_their_parts(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranks").mkdir()
    rows = make_ledger(
        tmp_path / "ranks", [make_point(name) for name in NAMES], [], [], dict.fromkeys(NAMES, 10**9), WHOLE
    )
    write_ledger(rows, tmp_path / "ranks" / LEDGER)
    monkeypatch.setenv("COLUMNS", str(width))
    ledger.run(argparse.Namespace(experiment=tmp_path / "ranks"))
    said = capsys.readouterr().out
    check(said, width)
    assert said.count("123 MB") == len(NAMES)


@given(st.lists(st.from_regex(r"[a-z]{1,9}=[0-9a-z.+-]{1,9}", fullmatch=True), min_size=1), st.integers(21, 90))
def test_a_folded_name_is_the_name_in_whole_parts(parts: list[str], width: int) -> None:
    name = "__".join(parts)
    lines = fold(name, width).splitlines()
    assert "".join(lines) == name
    assert all(len(line) <= width for line in lines)
    assert all(line.endswith("__") for line in lines[:-1])


def test_a_part_wider_than_the_terminal_is_broken_after_a_sign_or_else_anywhere() -> None:
    assert fold("system_prompt=You_are_a_helper-1a2b3c__lr=1", 16).split("\n") == [
        *("system_prompt=", "You_are_a_", "helper-1a2b3c__", "lr=1")
    ]
    assert fold("a" * 25, 10).split("\n") == ["a" * 10, "a" * 10, "a" * 5]


def test_a_table_that_has_room_is_whole_and_another_repeats_the_names() -> None:
    table = FoldingTable(["point", *(f"metric {i}" for i in range(9))], title="many")
    for name in NAMES:
        table.add_row(name, *("0.123 [0.100, 0.140]" for _ in range(9)))
    assert sum(NAMES[2] in line for line in say(table, 400).splitlines()) == 1
    said = say(table, 80)
    check(said, 80)
    assert said.count("0.123 [0.100, 0.140]") == 9 * len(NAMES)
    assert said.count("point") > 1


def test_names_have_lines_of_their_own_where_their_longest_part_leaves_no_room_for_numbers() -> None:
    table = FoldingTable(["point", "accuracy"])
    table.add_row(NAMES[2], "0.123 [0.100, 0.140]")
    lines = [line.strip() for line in say(table, 60).splitlines()]
    assert lines[4:] == [
        *("lora_attn_modules=q_proj+k_proj+v_proj__lora_rank=256__", "lr=1.25e-4__seed=12__epoch=3"),
        *("0.123 [0.100, 0.140]", ""),
    ]
