"""The table of results: one row a point and task, made from the manifests alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from lorasweep.layout import MANIFEST
from lorasweep.points import format_value

_PROOF = ("adapter_sha256", "base_model_fingerprint", "merged_weights_sha256", "probe_distance")


def make_table(results: Path, points: Sequence[str], variables: Sequence[str]) -> pd.DataFrame:
    """Return the rows of the given points.

    Columns: `point`, a column for each variable (empty for the baseline), `mode`, `task`, `samples`, the metrics as
    `<score>/<metric>` with their standard errors, the digests, the seconds of each stage, the bytes kept, `log`.
    """
    rows = []
    for point in points:
        manifest = json.loads((results / point / MANIFEST).read_text())
        evaluation = manifest["evaluation"]
        shared = {
            "point": point,
            **{key: _plain(manifest["settings"].get(key)) for key in variables},
            "mode": manifest["mode"],
        }
        proof = {key: (evaluation.get("proof") or {}).get(key) for key in _PROOF}
        rest = {
            **proof,
            "adapter_sha256": manifest["adapter_sha256"],
            "merged_weights_sha256": manifest.get("merged_weights_sha256"),
            **{f"{stage}_seconds": value for stage, value in manifest["seconds"].items()},
            "bytes": manifest["bytes"],
            "git_revision": manifest["git_revision"],
            "versions": _join_versions(manifest),
        }
        for task, scored in (evaluation.get("tasks") or {None: {"scores": {}, "samples": None}}).items():
            log = {"log": str(results / point / "eval" / f"{task}.eval") if task else None}
            rows.append({**shared, "task": task, "samples": scored["samples"], **scored["scores"], **rest, **log})
    # Whole numbers stay whole beside the baseline, which has none.
    table = pd.DataFrame(rows).convert_dtypes()
    metrics = sorted(column for column in table.columns if "/" in column)
    first = ["point", *variables, "mode", "task", "samples", *metrics]
    table = table[[*first, *(column for column in table.columns if column not in first)]]
    # The baseline first, then by value: numbers by size, which text would not be.
    order = sorted(range(len(rows)), key=lambda i: _order(rows[i], variables))
    return table.iloc[order].reset_index(drop=True)


def show_table(table: pd.DataFrame, title: str, console: Console) -> None:
    """Print what a reader wants first: the points, the metrics with standard errors, and what each point keeps."""
    metrics = [column for column in table.columns if "/" in column and not column.endswith("/stderr")]
    facts = ["point", "mode", "task", "samples"]
    if table["task"].nunique() == 1:
        facts.remove("task")
        title = f"{title}: {table['task'].iloc[0]}"
    shown = Table(title=title)
    for column in [*facts, *metrics, "kept"]:
        shown.add_column(column, justify="left" if column in ("point", "mode", "task") else "right", no_wrap=True)
    best = {metric: table[metric].max() for metric in metrics}
    for _, row in table.iterrows():
        cells = ["" if pd.isna(row[fact]) else format_value(row[fact]) for fact in facts]
        for metric in metrics:
            error = row.get(f"{metric.rpartition('/')[0]}/stderr")
            text = "" if pd.isna(row[metric]) else f"{row[metric]:.3f}"
            text += "" if error is None or pd.isna(error) else f" ± {error:.3f}"
            cells.append(f"[bold]{text}[/bold]" if row[metric] == best[metric] else text)
        shown.add_row(*cells, f"{row['bytes'] / 1e6:,.1f} MB")
    console.print(shown)


def _join_versions(manifest: Mapping[str, Any]) -> str:
    made_with = {**manifest["training"].get("versions", {}), **manifest["evaluation"].get("versions", {})}
    return " ".join(f"{package}={version}" for package, version in sorted(made_with.items()))


def _plain(value: Any) -> Any:
    return format_value(value) if isinstance(value, list) else value


def _order(row: Mapping[str, Any], variables: Sequence[str]) -> tuple[Any, ...]:
    def rank(value: Any) -> tuple[int, float, str]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and not pd.isna(value)
        return (0, float(value), "") if is_number else (1, 0.0, str(value))

    return (row["mode"] != "base", *(rank(row[key]) for key in variables), str(row["point"]), str(row["task"]))
