"""The rules of a sweep and their properties, in the order in which a point passes through them.

To add a rule, write its rule file in `workflow/rules/` and add one row here.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A rule of the workflow."""

    name: str
    modes: tuple[str, ...] = ()
    """Modes of the points that have a job of this rule; empty for a rule of the whole experiment."""
    makes_adapter: bool = False
    """Whether the rule is one of the steps that produce a point's adapter."""
    runs_tasks: bool = False
    """Whether the rule's jobs ask models the samples of tasks."""
    is_timed: bool = False
    """Whether the rule's jobs take long enough that their time is planned, recorded and counted for the point."""
    has_gpu: bool = False
    """Whether the rule's jobs use a GPU if `model.device` is `cuda`."""
    priority: int = 0
    """Order in which a plan starts jobs that wait for the same resources: lower numbers first."""


_KEPT, _ALL = ("A", "B1", "B2"), ("A", "B1", "B2", "base")

RULES = (
    Rule("configure", _KEPT, makes_adapter=True),
    Rule("train_part", _KEPT, makes_adapter=True, is_timed=True, has_gpu=True, priority=2),
    Rule("prune", _KEPT, makes_adapter=True, runs_tasks=True, is_timed=True, has_gpu=True),
    Rule("train", _KEPT, makes_adapter=True, is_timed=True, has_gpu=True, priority=2),
    Rule("choose_epoch", _KEPT, makes_adapter=True, runs_tasks=True, is_timed=True, has_gpu=True),
    Rule("take", _KEPT, makes_adapter=True),
    Rule("adopt", _KEPT, makes_adapter=True),
    Rule("export", ("A",), is_timed=True, priority=1),
    Rule("merge", ("B1",), is_timed=True, priority=1),
    Rule("evaluate", ("A", "B1", "base"), runs_tasks=True, is_timed=True, has_gpu=True),
    Rule("evaluate_adapters", ("B2",), runs_tasks=True, is_timed=True, has_gpu=True),
    Rule("publish", ("B2",)),
    Rule("cleanup", _ALL),
    Rule("read_samples"),
    Rule("collect"),
    Rule("report"),
)

RULE_NAMES = tuple(rule.name for rule in RULES)
PRIORITIES = {rule.name: rule.priority for rule in RULES}
GPU_RULES = tuple(rule.name for rule in RULES if rule.has_gpu)
TASK_RULES = tuple(rule.name for rule in RULES if rule.runs_tasks)
TRAINER_RULES = ("train_part", "train")
"""The rules whose jobs run a trainer."""
TRAINING_RULES = (*TRAINER_RULES, "choose_epoch")
"""The timed rules whose jobs are of a training, whatever points use its adapter."""
TIMED_RULES = tuple(rule.name for rule in RULES if rule.is_timed)
ADAPTER_RULES = tuple(rule.name for rule in RULES if rule.makes_adapter)

_LAST = tuple(rule.name for rule in RULES if not rule.modes)


def get_timed_rules(mode: str) -> tuple[str, ...]:
    """Return the timed rules of points of a mode."""
    return tuple(rule.name for rule in RULES if rule.is_timed and mode in rule.modes)


def _get_branch(mode: str) -> tuple[str, ...]:
    """Return the rules between the adapter and the clean-up of points of a mode."""
    return tuple(r.name for r in RULES if mode in r.modes and not r.makes_adapter and r.name != "cleanup")


@dataclass(frozen=True)
class Stage:
    """A rule with its number of jobs and the rules before it, as drawn in the report."""

    rule: str
    jobs: int | None
    """Number of jobs; `None` if each run decides how many points a job takes."""
    after: tuple[str, ...]


def get_stages(
    points: Mapping[str, str],
    evaluated: Collection[str],
    trained: Collection[str],
    taken: Collection[str] = (),
    *,
    chooses_epoch: bool = False,
    rungs: int = 0,
) -> list[Stage]:
    """Return the stages of a sweep in the order of the work.

    Args:
        points: Mode of each point, by name, including baselines.
        evaluated: Points that are evaluated.
        trained: Points that a training is counted for.
        taken: Points that take their adapter from a training.
        chooses_epoch: Whether a task chooses the epoch of each training.
        rungs: Number of epochs after which `prune` compares settings.
    """
    jobs: Counter[str] = Counter()
    after: dict[str, dict[str, None]] = {}

    def pass_through(*rules: str, count_from: int = 0) -> None:
        for previous, rule in zip(("", *rules), rules, strict=False):
            after.setdefault(rule, {}).update({previous: None} if previous else {})
        jobs.update(rules[count_from:])

    parts = ("train_part", "prune") if rungs else ()
    trainings = ("configure", *parts, "train", *(["choose_epoch"] if chooses_epoch else []))
    for name, mode in points.items():
        made = (*trainings, "take") if name in taken else () if mode == "base" else ("adopt",)
        branch = [rule for rule in _get_branch(mode) if rule == "export" or name in evaluated]
        pass_through(
            *made, *branch, "cleanup", count_from=len(trainings) if name in taken and name not in trained else 0
        )
    jobs["train_part"] *= rungs
    jobs["prune"] = min(jobs["prune"], 1) * rungs
    stages = [
        # Sorted, so that the drawing does not depend on the order of points in the file.
        Stage(
            rule, None if rule == "evaluate_adapters" else jobs[rule], tuple(sorted(after[rule], key=RULE_NAMES.index))
        )
        for rule in RULE_NAMES
        if rule in jobs and rule in after
    ]
    for previous, rule in zip(("cleanup", *_LAST), _LAST, strict=False):
        stages.append(Stage(rule, 1, ("cleanup", previous) if rule == "collect" else (previous,)))
    return stages
