"""The rules of a sweep: one table of what each is for, in the order in which a point goes through them.

Whoever adds a rule writes its rule file in `workflow/rules/`, and one row here.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A rule of the workflow."""

    name: str
    modes: tuple[str, ...] = ()
    """The modes of the points that have a job of it; none for a rule of the whole experiment."""
    makes_adapter: bool = False
    """Whether it comes before a point has its adapter."""
    is_timed: bool = False
    """Whether its jobs take so long that their time is planned, recorded and counted for the point."""
    has_gpu: bool = False
    """Whether its jobs have a GPU, where `model.device` is `cuda`."""
    priority: int = 0
    """Of jobs that wait for the same room, a plan starts those of the lower number first."""


_KEPT, _ALL = ("A", "B1", "B2"), ("A", "B1", "B2", "base")

RULES = (
    Rule("configure", _KEPT, makes_adapter=True),
    Rule("train", _KEPT, makes_adapter=True, is_timed=True, has_gpu=True, priority=2),
    Rule("take", _KEPT, makes_adapter=True),
    Rule("adopt", _KEPT, makes_adapter=True),
    Rule("merge", ("A",), is_timed=True, priority=1),
    Rule("evaluate", ("A", "base"), is_timed=True, has_gpu=True),
    Rule("evaluate_merged", ("B1",), is_timed=True, has_gpu=True),
    Rule("evaluate_adapters", ("B2",), is_timed=True, has_gpu=True),
    Rule("publish", ("B2",)),
    Rule("cleanup", _ALL),
    Rule("read_samples"),
    Rule("collect"),
    Rule("report"),
)

RULE_NAMES = tuple(rule.name for rule in RULES)
PRIORITIES = {rule.name: rule.priority for rule in RULES}
GPU_RULES = tuple(rule.name for rule in RULES if rule.has_gpu)
TIMED_RULES = tuple(rule.name for rule in RULES if rule.is_timed)
ADAPTER_RULES = tuple(rule.name for rule in RULES if rule.makes_adapter)

_LAST = tuple(rule.name for rule in RULES if not rule.modes)


def get_timed_rules(mode: str) -> tuple[str, ...]:
    """Return the rules whose time a point of a mode takes."""
    return tuple(rule.name for rule in RULES if rule.is_timed and mode in rule.modes)


def _get_branch(mode: str) -> tuple[str, ...]:
    """The rules between the adapter of a point of a mode and its clean-up."""
    return tuple(r.name for r in RULES if mode in r.modes and not r.makes_adapter and r.name != "cleanup")


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
        branch = [rule for rule in _get_branch(mode) if rule == "merge" or name in evaluated]
        pass_through(*made, *branch, "cleanup", count_from=2 if name in taken and name not in trained else 0)
    stages = [
        # In which order the points stand in the file makes no other drawing.
        Stage(
            rule, None if rule == "evaluate_adapters" else jobs[rule], tuple(sorted(after[rule], key=RULE_NAMES.index))
        )
        for rule in RULE_NAMES
        if rule in jobs
    ]
    for previous, rule in zip(("cleanup", *_LAST), _LAST, strict=False):
        stages.append(Stage(rule, 1, ("cleanup", previous) if rule == "collect" else (previous,)))
    return stages
