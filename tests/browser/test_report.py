"""The report in a real browser: it opens from a file, offline, without an error, and its table sorts and filters."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pandas as pd
import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

from chromium import find_chromium
from lorasweep.layout import BASELINE
from lorasweep.results.comparison import compare, read_experiments
from lorasweep.results.comparison_page import make_page
from lorasweep.results.report import make_report
from lorasweep.stages import get_stages
from made_results import collect, make_results

PROMPTS = [f"You are a careful assistant. Answer {how}." for how in ("in one word", "in a sentence of six words")]

SPACES: dict[str, dict[str, list[Any]]] = {
    "one variable": {"lora_rank": [4, 8, 16, 32]},
    "two variables and seeds": {"lora_rank": [4, 8, 16], "lr": [1e-4, 1e-3], "seed": [0, 1]},
    "three variables": {"lora_rank": [4, 8], "lr": [1e-4, 1e-3], "packed": [True, False]},
    "four variables": {"lora_rank": [4, 8, 16], "lr": [1e-4, 1e-3], "packed": [True, False], "epochs": [1, 2, 3]},
    "prompts and modes": {"lora_rank": [4], "system_prompt": PROMPTS, "mode": ["A", "B1", "B2"]},
}

WIDE = {"width": 1400, "height": 900}
NARROW = {"width": 400, "height": 800}
PAPER = {"width": 718, "height": 1000}
"""A4 with margins of 10 mm."""


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

    def open_page(file: Path, viewport: Any = None, theme: Any = "light", table: str = "results") -> Page:
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
        page.wait_for_selector(f"#{table}_wrapper tbody tr")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def read_titles(page: Page) -> list[str]:
    return page.locator("#results thead th").all_inner_texts()


def read_column(page: Page, title: str) -> list[str]:
    """The cells of a column of the table, as they are shown."""
    place = read_titles(page).index(title) + 1
    return page.locator(f"#results tbody tr td:nth-child({place})").all_inner_texts()


def find_cut(page: Page) -> list[str]:
    """What has more in it than is seen, and whatever ends beyond the window's right edge."""
    return page.evaluate(
        """[...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && e.getClientRects().length
        && getComputedStyle(e).display != 'inline' && !e.matches('.dt-column-header, option')
        && (e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth + 1))
        .map(e => `${e.tagName} ${e.className} ${e.textContent.slice(0, 60)}`)"""
    )


# For every commit each space in one way, and among them each way.
LOOKS = [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light")]
PAIRS = [(name, *look) for name in SPACES for look in LOOKS]
QUICK = [
    ("one variable", WIDE, "dark"),
    ("three variables", WIDE, "light"),
    ("two variables and seeds", NARROW, "light"),
    ("four variables", WIDE, "light"),
    ("prompts and modes", WIDE, "light"),
    ("prompts and modes", NARROW, "light"),
]


@pytest.mark.parametrize(
    ("name", "viewport", "theme"), [p if p in QUICK else pytest.param(*p, marks=pytest.mark.long) for p in PAIRS]
)
def test_a_report_opens_in_both_themes_and_on_a_narrow_screen(
    reports: Callable[[str], Path], open_page: Callable[..., Page], name: str, viewport: Any, theme: str
) -> None:
    page = open_page(reports(name), viewport, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert viewport != WIDE or find_cut(page) == []
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


@pytest.mark.parametrize("name", SPACES)
def test_a_printed_report_is_whole_and_dark_on_light(
    reports: Callable[[str], Path], open_page: Callable[..., Page], name: str
) -> None:
    page = open_page(reports(name), theme="dark")
    rows = len(pd.read_csv(reports(name).with_name("results.csv")))
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.set_viewport_size(PAPER)
    page.emulate_media(media="print")
    assert find_cut(page) == []
    plots = page.locator(".plot svg.marks").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().right)")
    assert max(plots) <= PAPER["width"]
    assert len(read_column(page, "point")) == rows
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert (
        page.locator(".plot .role-axis-label text").first.evaluate("t => getComputedStyle(t).fill") == "rgb(31, 35, 40)"
    )


def test_metrics_come_first_and_low_before_high(reports: Callable[[str], Path], open_page: Callable[..., Page]) -> None:
    page = open_page(reports("two variables and seeds"))
    gain = ["over base", "95% interval", "p, corrected"]
    assert read_titles(page) == [
        *("point", "match/accuracy", "95% interval", *gain, "lora_rank", "lr", "seed", "train loss", "size", "log")
    ]
    for score, interval in zip(read_column(page, "match/accuracy"), read_column(page, "95% interval"), strict=True):
        low, high = map(float, interval.split(" to "))
        assert low <= float(score) <= high
    assert set(read_column(page, "size")) == {"10 B", "5 MB"}


def test_labels_have_only_what_differs_and_modes_their_letters(
    reports: Callable[[str], Path], open_page: Callable[..., Page]
) -> None:
    page = open_page(reports("prompts and modes"))
    hows = ("…one word.", "…a sentence of six words.")
    labels = {f"system_prompt={how}, mode={mode}" for how in hows for mode in ("A", "B1", "B2")}
    assert set(read_column(page, "point")) == {BASELINE, *labels}
    assert set(read_column(page, "mode")) == {"base", "A", "B1", "B2"}
    listed = page.locator("[data-plot=letters-settings] .role-axis-label text").all_text_contents()
    assert labels <= set(listed)
    named = page.locator("#answer b").all_inner_texts()
    assert named
    assert all(any(name in label for label in labels) for name in named)


@pytest.mark.parametrize(
    ("name", "title", "entries"),
    [
        ("one variable", "lora_rank", {"4", "8", "16", "32"}),
        ("three variables", "training", None),
        ("four variables", "lora_rank", {"4", "8", "16"}),
    ],
)
def test_loss_curves_have_a_legend(
    reports: Callable[[str], Path], open_page: Callable[..., Page], name: str, title: str, entries: set[str] | None
) -> None:
    legend = open_page(reports(name)).locator("[data-plot=loss] .role-legend")
    assert legend.locator(".role-legend-title").all_text_contents() == [title]
    labels = legend.locator(".role-legend-label").all_text_contents()
    assert set(labels) == entries if entries else len(set(labels)) == 8


@pytest.mark.parametrize(("viewport", "theme"), [(WIDE, "dark"), (NARROW, "light")])
def test_a_comparison_opens_as_a_report_does(
    reports: Callable[[str], Path], open_page: Callable[..., Page], tmp_path: Path, viewport: Any, theme: str
) -> None:
    folders = [reports(name).parent for name in ("one variable", "two variables and seeds")]
    experiments = read_experiments(folders)
    made = compare(experiments, None, None)
    make_page(experiments, made, tmp_path / "compared.html")
    page = open_page(tmp_path / "compared.html", viewport, theme, table="results-1")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.locator(".answer").inner_text() == made[0].sentences[0]
    settings = page.locator("#results-1 tbody tr td:nth-child(2)").all_inner_texts()
    assert settings == list(made[0].rows["setting"])
    links = page.locator("a[href]").evaluate_all("links => links.map(link => link.href)")
    assert {unquote(urlparse(link).path) for link in links} >= {str(folder / "report.html") for folder in folders}


def test_every_link_of_a_report_leads_to_a_file(reports: Callable[[str], Path], open_page: Callable[..., Page]) -> None:
    links = open_page(reports("one variable")).locator("a[href]").evaluate_all("links => links.map(link => link.href)")
    assert len(links) > 10
    assert [link for link in links if not Path(unquote(urlparse(link).path)).exists()] == []


def test_the_table_sorts_by_numbers(reports: Callable[[str], Path], open_page: Callable[..., Page]) -> None:
    page = open_page(reports("one variable"))
    header = page.locator("#results thead th").nth(read_titles(page).index("lora_rank"))
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


def test_the_table_finds_the_points_that_have_all_the_words(
    reports: Callable[[str], Path], open_page: Callable[..., Page]
) -> None:
    page = open_page(reports("two variables and seeds"))
    assert len(read_column(page, "point")) == 13
    page.locator(".dt-search input").press_sequentially("rank=16 lr=1e-4")
    page.wait_for_function("document.querySelectorAll('#results tbody tr').length == 2")
    assert read_column(page, "point") == [f"lora_rank=16, lr=1e-4, seed={seed}" for seed in (0, 1)]
