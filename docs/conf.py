"""The site of these pages, by Sphinx with MyST: `make docs` writes it to `.venv/site`.

Its source is the whole repository, so that a page can link to any file. The pages are plain Markdown. What the site
needs beyond them, such as its navigation, is made here.
"""

import re
import shutil
from pathlib import Path
from typing import Any

project = "lorasweep"
author = "The lorasweep authors"
copyright = "2026, the lorasweep authors"
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "config/README.md",
    "profiles/README.md",
]
# Folders that are large, or change while the site is made.
exclude_patterns = [".venv*", ".git", ".snakemake", "results", "downloads"]
extensions = ["myst_parser"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "lorasweep"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False


def add_navigation(app: Any, page: str, source: list[str]) -> None:
    """Add the navigation to the first page: its headings, and the pages that each of them lists."""
    if page != root_doc:
        return
    for heading, part in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", source[0], flags=re.MULTILINE | re.DOTALL):
        pages = re.findall(r"^- \[[^]]+\]\(([^)#:]+\.md)\)", part, flags=re.MULTILINE)
        if pages:
            source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {heading}", "", *pages, "```", ""])


def add_files(app: Any, error: Exception | None) -> None:
    """Add the pictures that the README shows by HTML, a first page at the site's root that leads to ours, and a style
    by which lines of code fit into wide windows."""
    if error is None:
        style = "@media (min-width: 83em) { .content { width: clamp(46em, 100vw - 37em, 56em) } }\n"
        (Path(app.outdir) / "_static/site.css").write_text(style, encoding="utf-8")
        for picture in Path(__file__).parent.glob("*.svg"):
            shutil.copy(picture, Path(app.outdir) / "docs")
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>{project}</title>\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_files)
