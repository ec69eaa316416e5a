"""What a run prints while it goes on: a line when a job starts and when it ends, in words of the sweep.

On a terminal, lines below say how far running jobs are; elsewhere, each says so every few minutes. Snakemake's own
words are in its log (`.snakemake/log`), and `--verbose` prints them.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lorasweep.util.formats import format_seconds

PLAIN_SECONDS = 300.0
"""Minimum time between two lines on the same job where lines are not replaced."""

_MOST_LINES = 10
"""Maximum number of running jobs shown on a terminal."""

_WORDS = {
    "train": ("training", "trained"),
    "train_part": ("training", "trained so far"),
    "prune": ("choosing what goes on", "chosen what goes on"),
    "choose_epoch": ("choosing the epoch", "epoch chosen"),
    "export": ("writing the full model", "full model written"),
    "merge": ("merging", "merged"),
    "evaluate": ("evaluating", "evaluated"),
    "evaluate_adapters": ("evaluating", "evaluated"),
    "adopt": ("checking its adapter", "adapter copied"),
    "cleanup": ("", "done"),
    "read_samples": ("", "scores read"),
    "collect": ("", "table written"),
    "report": ("", "report written"),
}
"""What is said of a job's start and of its end, by rule. Nothing is said of other rules, whose jobs take no time."""

_NOISE = re.compile(
    r"Using (workflow specific )?profile|Using shell|Building DAG|Assuming unrestricted shared filesystem|Provided "
    r"(cores|remote nodes|resources)|Rules claiming more threads|Conda environments: ignored|host: |Select jobs to "
    r"execute|Elapsed time|Execute \d+ jobs|Removing temporary output|Touching output|Complete log|SLURM run ID|"
    r"This was a dry-run|The order of jobs does not reflect|Reasons:|\s+\(check individual jobs|\s+(input|output) files"
    r"|Shell command: None$|Shutting down, this might take|Would remove temporary output|Cleaning up conda"
)
"""Beginnings of Snakemake's messages that say nothing of the sweep."""

_TOLD_BETTER = re.compile(
    r"RuleException:\n(CalledProcess|Job)Error|Exiting because a job execution failed|"
    r"WorkflowError:\nAt least one job did "
)
"""Beginnings of Snakemake's errors that a line of the failed job, or the summary of the run, says in plain words."""

_AGAIN = re.compile(r"Trying to restart job (\d+)")
_SLURM_STATE = re.compile(r"SLURM status is: '(\w+)")
_SUBMITTED = re.compile(r"Job (\d+) has been submitted with SLURM jobid (\d+)")


class RunView:
    """The lines of a run. `emit` takes Snakemake's log records, one at a time; `show` may be called beside it."""

    def __init__(self, stream: TextIO, label: Callable[[str, str], str]) -> None:
        """`label` returns what a job is called, by its rule and the name in its wildcard."""
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._label = label
        self._live: Live | None = None
        self._jobs: dict[int, tuple[str, str]] = {}
        self._began: dict[int, float] = {}
        self._told: dict[str, float] = {}
        self._done, self._total = 0, 0
        self._stats = ""

    def emit(self, record: logging.LogRecord, text: str) -> None:
        """Print what a record means, if anything; `text` is the record as Snakemake prints it."""
        event, fields = str(getattr(record, "event", None) or ""), record.__dict__
        if event == "job_info":
            name = str(next(iter((fields["wildcards"] or {}).values()), ""))
            self._jobs[fields["jobid"]] = fields["rule_name"], name
            self._announce(fields["jobid"])
        elif event == "job_started":
            self._began |= dict.fromkeys(fields["jobs"], time.monotonic())
            for job in fields["jobs"]:
                self._announce(job)
        elif event == "job_finished":
            self._end(fields["job_id"])
        elif event == "progress":
            self._done, self._total = fields["done"], fields["total"]
        elif event == "job_error":
            self._fail(fields["jobid"], fields["log"], str(fields.get("rule_msg") or ""))
        elif event == "run_info":
            self._total = (fields.get("stats") or {}).get("total", self._total)
            if text != self._stats:  # of a dry run, it is told twice
                self._pass_on(record, text)
            self._stats = text
        elif event in ("", "shellcmd", "error", "group_error", "debug_dag"):
            self._pass_on(record, text)

    def show(self, lines: Iterable[tuple[str, str]]) -> None:
        """Say how far running jobs are: the name of each, and how far it is."""
        if self._console.is_terminal:
            listed = list(lines)
            shown = [f"  {name}: {state}" for name, state in listed[:_MOST_LINES]]
            if hidden := len(listed) - len(shown):
                shown.append(f"  ... {hidden} more: lorasweep status")
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
                self._live.start()
            self._live.update(Text("\n".join(shown), no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        now = time.monotonic()
        for name, state in lines:
            if now - self._told.setdefault(name, now) >= PLAIN_SECONDS:
                self._told[name] = now
                self._print(f"{name}: {state}")

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _announce(self, job: int) -> None:
        """Print that a job starts, once it has started and what it is is known."""
        if job in self._jobs and job in self._began and _WORDS.get(self._jobs[job][0], ("", ""))[0]:
            self._print(self._name(job))

    def _end(self, job: int) -> None:
        rule, name = self._jobs.get(job, ("", ""))
        if not (words := _WORDS.get(rule, ("", ""))[1]):
            return
        seconds = time.monotonic() - self._began.get(job, time.monotonic())
        took = f" in {format_seconds(seconds)}" if _WORDS[rule][0] and seconds >= 1 else ""
        # The record with the new number of jobs comes after this one.
        of = f" of {self._total}" if self._total else ""
        self._print(f"{self._label(rule, name)}: {words}{took} (job {self._done + 1}{of})")

    def _fail(self, job: int, logs: Iterable[object], message: str) -> None:
        where, state = ", ".join(map(str, logs)), _SLURM_STATE.search(message)
        told = f" (SLURM: {state[1]})" if state else ""
        self._print(f"{self._name(job)} failed{told}; its log: {where}", style="red")

    def _name(self, job: int) -> str:
        """Return what a job is called and what it does."""
        rule, name = self._jobs.get(job, ("job", str(job)))
        return f"{self._label(rule, name)}: {get_words(rule)}"

    def _pass_on(self, record: logging.LogRecord, text: str) -> None:
        if submitted := _SUBMITTED.search(text):
            self._print(f"{self._name(int(submitted[1]))}, as SLURM job {submitted[2]}")
            return
        if again := _AGAIN.match(text):
            self._print(f"{self._name(int(again[1]))} again")
            return
        begin = text.lstrip("\n")
        is_noise = _TOLD_BETTER.match(begin) or (record.levelno < logging.WARNING and _NOISE.match(begin))
        if begin and not is_noise:
            self._print(text, style="yellow" if record.levelno == logging.WARNING else "")

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style))


VIEW: list[RunView] = []
"""The view of this process's run, if it has one."""

LABELS: dict[str, Mapping[str, str]] = {"train": {}, "evaluate_adapters": {}}
"""What jobs are called whose wildcard is not a point, by rule and by the name in the wildcard."""


def get_label(rule: str, name: str) -> str:
    """Return what a job is called: its point, or what `LABELS` says; a job of the whole experiment, `results`."""
    return LABELS.get(rule, {}).get(name, name) or "results"


def get_words(rule: str) -> str:
    """Return what is said of a job of a rule while it runs."""
    return _WORDS.get(rule, ("", ""))[0] or rule


def show(lines: Iterable[tuple[str, str]]) -> None:
    """Say how far running jobs are, in this process's view; see `RunView.show`."""
    for view in VIEW:
        view.show(lines)
