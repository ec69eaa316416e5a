"""The scheduler starts no merge beyond the bound on merged models, and nothing else is held back."""

from dataclasses import dataclass, field
from typing import Any

from snakemake.io import AnnotatedString, flag

from snakemake_scheduler_plugin_lorasweep import Scheduler


@dataclass(eq=False)
class Job:
    """A job as the scheduler sees it."""

    name: str
    priority: int
    scheduler_resources: dict[str, int]
    output: list[Any] = field(default_factory=list)
    input: list[Any] = field(default_factory=list)


def merge(name: str, cores: int = 1) -> Job:
    return Job(name, 5, {"_cores": cores, "merged_models": 1}, [flag(AnnotatedString(f".merged/{name}"), "temp")])


def evaluate(name: str, **resources: int) -> Job:
    return Job(name, 10, {"_cores": 1, "merged_models": 1, **resources}, [AnnotatedString(f"{name}/eval")])


def train(name: str) -> Job:
    return Job(name, 0, {"_cores": 1, "merged_models": 0}, [AnnotatedString(f"{name}/adapter")])


def select(*jobs: Job, free: int, **available: int) -> list[str]:
    scheduler = Scheduler(None, None, None)  # type: ignore[arg-type]
    resources = {"_cores": 100, "merged_models": free, **available}
    return sorted(job.name for job in scheduler.select_jobs(jobs, jobs, resources, {}))


def test_as_many_merges_start_as_models_are_allowed() -> None:
    assert select(*map(merge, "abcd"), train("t"), free=2) == ["a", "b", "t"]
    assert select(*map(merge, "ab"), train("t"), free=0) == ["t"]


def test_a_model_that_waits_for_its_evaluation_counts_whether_that_starts_or_not() -> None:
    assert select(evaluate("e"), *map(merge, "ab"), free=2) == ["a", "e"]
    # No GPU is free, and a merge asks for none.
    assert select(evaluate("e", gpu=1), *map(merge, "ab"), free=2, gpu=0) == ["a"]
    assert select(evaluate("e", gpu=1), evaluate("f", gpu=1), merge("a"), free=2, gpu=1) == ["e"]
    # A retry asks for more memory than there is, while a merge would fit.
    assert select(evaluate("e", mem_mb=2000), merge("a"), free=1, mem_mb=1000) == []


def test_models_beyond_a_bound_that_was_lowered_are_evaluated_first() -> None:
    assert select(*map(evaluate, "efg"), merge("a"), free=2) == ["e", "f"]


def test_without_a_bound_nothing_is_held_back() -> None:
    scheduler = Scheduler(None, None, None)  # type: ignore[arg-type]
    jobs = [merge("a"), merge("b"), evaluate("e")]
    assert {job.name for job in scheduler.select_jobs(jobs, jobs, {"_cores": 9}, {})} == {"a", "b", "e"}
