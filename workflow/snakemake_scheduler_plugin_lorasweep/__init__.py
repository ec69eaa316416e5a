"""Snakemake's scheduler `lorasweep`: the greedy scheduler, with a bound on the merged models that exist at a time.

A merged model exists from the start of its merge to the end of its evaluation. Both jobs hold one unit of the resource
`merged_models` while they run. In between, while the evaluation waits for a GPU or for a retry, no job holds it. So
this scheduler starts no merge that would take the unit of a model that waits.

Snakemake finds the module by its name (https://snakemake.github.io/snakemake-plugin-catalog). profiles/default selects
it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from snakemake.scheduling.greedy import Scheduler as GreedyScheduler
from snakemake.scheduling.greedy import SchedulerSettings as GreedySettings

RESOURCE = "merged_models"


class Scheduler(GreedyScheduler):  # type: ignore[misc]
    """Select jobs by priority, and start no merge while as many merged models exist as are allowed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings = GreedySettings()

    def select_jobs(
        self,
        selectable_jobs: Sequence[Any],
        remaining_jobs: Sequence[Any],
        available_resources: Mapping[str, int | str],
        input_sizes: dict[Any, int],
    ) -> Sequence[Any]:
        """Return the jobs to start now, of those whose inputs exist (`selectable_jobs`)."""
        free = int(available_resources.get(RESOURCE, len(selectable_jobs)))
        jobs = list(hold_back_merges(selectable_jobs, free))
        selected: Sequence[Any] = super().select_jobs(jobs, remaining_jobs, available_resources, input_sizes)
        return selected


def hold_back_merges(jobs: Sequence[Any], free: int) -> Iterable[Any]:
    """Return the jobs without the merges that would exceed the bound; `free` is the number of units that no job holds.

    An evaluation among the jobs has its merged model already, whether it is selected now or not.
    """
    users = [job for job in jobs if job.scheduler_resources.get(RESOURCE)]
    merges = [job for job in users if any(file.is_flagged("temp") for file in job.output)]
    allowed = max(0, free - (len(users) - len(merges)))
    dropped = set(sorted(merges, key=lambda job: -job.priority)[allowed:])
    return (job for job in jobs if job not in dropped)
