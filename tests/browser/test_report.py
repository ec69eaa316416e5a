"""The report in a real browser: it opens from a file, offline, without an error, and its table sorts and filters."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

from chromium import find_chromium
from lorasweep.layout import BASELINE
from lorasweep.results.report import make_report
from lorasweep.stages import get_stages
from made_results import collect, make_results

SPACES: dict[str, dict[str, list[Any]]] = {
    "one variable": {"lora_rank": [4, 8, 16, 32]},
    "two variables and seeds": {"lora_rank": [4, 8, 16], "lr": [1e-4, 1e-3], "seed": [0, 1]},
    "three variables": {"lora_rank": [4, 8], "lr": [1e-4, 1e-3], "packed": [True, False]},
    "four variables": {"lora_rank": [4, 8, 16], "lr": [1e-4, 1e-3], "packed": [True, False], "epochs": [1, 2, 3]},
}

WIDE = {"width": 1200, "height": 900}
NARROW = {"width": 390, "height": 800}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium here: make test installs one where root can do so")
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"{path} does not start: {error.message.splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            results = tmp_path_factory.mktemp("results") / name.replace(" ", "_")
            results.mkdir()
            make_results(results, SPACES[name], lambda settings: 0.4 + settings["lora_rank"] / 60)
            collect(results, list(SPACES[name]))
            points = {path.parent.name: "B1" for path in results.glob("*/adapter")}
            stages = [vars(stage) for stage in get_stages({**points, BASELINE: "base"}, [*points, BASELINE], points)]
            make_report(results / "results.csv", stages, results / "report.html", results / "plots")
            made[name] = results / "report.html"
        return made[name]

    return get


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page; at the test's end, there must have been no error, and nothing asked of a network."""
    said: list[str] = []
    contexts = []

    def open_page(file: Path, viewport: Any = None, theme: Any = "light") -> Page:
        context = browser.new_context(viewport=viewport or WIDE, color_scheme=theme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on(
            "request", lambda request: said.append(request.url) if urlparse(request.url).scheme[:4] == "http" else None
        )
        page.goto(file.as_uri())
        page.wait_for_function(
            "document.querySelectorAll('.plot svg.marks').length == document.querySelectorAll('.plot').length"
        )
        page.wait_for_selector("#results_wrapper tbody tr")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def read_column(page: Page, title: str) -> list[str]:
    """The cells of a column of the table, as they are shown."""
    titles = page.locator("#results_wrapper .dt-scroll-head input, .dt-scroll-head th").evaluate_all(
        "cells => [...new Set(cells.map(cell => cell.placeholder || cell.textContent.trim()))].filter(text => text)"
    )
    place = titles.index(title) + 1
    return page.locator(f"#results_wrapper .dt-scroll-body tbody tr td:nth-child({place})").all_inner_texts()


# For every commit each space in one way, and among them each way.
LOOKS = [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light")]
PAIRS = [(name, *look) for name in SPACES for look in LOOKS]
QUICK = [
    ("one variable", WIDE, "dark"),
    ("three variables", WIDE, "light"),
    ("two variables and seeds", NARROW, "light"),
    ("four variables", WIDE, "light"),
]


@pytest.mark.parametrize(
    ("name", "viewport", "theme"), [p if p in QUICK else pytest.param(*p, marks=pytest.mark.long) for p in PAIRS]
)
def test_a_report_opens_in_both_themes_and_on_a_narrow_screen(
    reports: Callable[[str], Path], open_page: Callable[..., Page], name: str, viewport: Any, theme: str
) -> None:
    page = open_page(reports(name), viewport, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 200
    assert is_dark == (theme == "dark")
    assert re.search(r" score(s best| equally) on letters: match/accuracy 0\.", page.locator("#answer").inner_text())
    # Axes and legends can be read on the page's ground.
    labels = page.locator(".plot svg.marks").locator(
        ".role-axis-label text, .role-axis-title text, .role-legend-label text"
    )
    assert labels.count() > 10
    fills = labels.evaluate_all("texts => texts.map(text => getComputedStyle(text).fill)")
    assert background not in fills
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_every_link_of_a_report_leads_to_a_file(reports: Callable[[str], Path], open_page: Callable[..., Page]) -> None:
    links = open_page(reports("one variable")).locator("a[href]").evaluate_all("links => links.map(link => link.href)")
    assert len(links) > 10
    assert [link for link in links if not Path(unquote(urlparse(link).path)).exists()] == []


def test_the_table_sorts_by_numbers(reports: Callable[[str], Path], open_page: Callable[..., Page]) -> None:
    page = open_page(reports("one variable"))
    header = page.locator(".dt-scroll-head th", has=page.get_by_placeholder("lora_rank")).first
    orders = []
    for _ in range(2):
        header.locator(".dt-column-order").click()
        for _ in range(100):  # the table is drawn anew some time after a click
            order = [int(cell) for cell in read_column(page, "lora_rank") if cell]
            if order in ([4, 8, 16, 32], [32, 16, 8, 4]) and order not in orders:
                break
            page.wait_for_timeout(100)
        orders.append(order)
    assert sorted(orders) == [[4, 8, 16, 32], [32, 16, 8, 4]]


def test_the_table_filters_by_a_column(reports: Callable[[str], Path], open_page: Callable[..., Page]) -> None:
    page = open_page(reports("one variable"))
    assert len(read_column(page, "point")) == 5
    page.get_by_placeholder("point").first.press_sequentially("rank=16")
    page.wait_for_function("document.querySelectorAll('#results_wrapper .dt-scroll-body tbody tr').length == 1")
    assert read_column(page, "point") == ["lora_rank=16"]
