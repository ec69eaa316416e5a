"""The rules of a sweep, how many jobs each has, and which follow which: what the report draws."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_BRANCHES = {
    "A": ("merge", "evaluate"),
    "B1": ("evaluate_merged",),
    "B2": ("evaluate_adapters", "publish"),
    "base": ("evaluate",),
}
"""The rules between an adapter and its clean-up, by mode."""

_LAST = ("read_samples", "collect", "report")


@dataclass(frozen=True)
class Stage:
    """A rule of the sweep."""

    rule: str
    jobs: int | None
    """None where each run decides anew how many points a job takes."""
    after: tuple[str, ...]


def get_stages(
    points: Mapping[str, str], evaluated: Collection[str], trained: Collection[str], taken: Collection[str] = ()
) -> list[Stage]:
    """Return the rules in the order of the work; `points` are modes by name, the baselines among them.

    `taken` are the points that take their adapter from a training, `trained` those for which one is counted.
    """
    jobs: Counter[str] = Counter()
    after: dict[str, dict[str, None]] = {}

    def pass_through(*rules: str, count_from: int = 0) -> None:
        for previous, rule in zip(("", *rules), rules, strict=False):
            after.setdefault(rule, {}).update({previous: None} if previous else {})
        jobs.update(rules[count_from:])

    for name, mode in points.items():
        made = ("configure", "train", "take") if name in taken else () if mode == "base" else ("adopt",)
        branch = [rule for rule in _BRANCHES[mode] if rule == "merge" or name in evaluated]
        pass_through(*made, *branch, "cleanup", count_from=2 if name in taken and name not in trained else 0)
    order = [
        "configure",
        "train",
        "take",
        "adopt",
        "merge",
        "evaluate",
        "evaluate_merged",
        "evaluate_adapters",
        "publish",
    ]
    stages = [
        # In which order the points stand in the file makes no other drawing.
        Stage(rule, None if rule == "evaluate_adapters" else jobs[rule], tuple(sorted(after[rule], key=order.index)))
        for rule in (*order, "cleanup")
        if rule in jobs
    ]
    for previous, rule in zip(("cleanup", *_LAST), _LAST, strict=False):
        stages.append(Stage(rule, 1, ("cleanup", previous) if rule == "collect" else (previous,)))
    return stages
