"""A job's end is seen by the mark that it leaves, or else by asking SLURM, which is asked seldom."""

from collections.abc import Callable

import pytest

from slurm_sweep import TRAINING_ONLY, SlurmSweep, check_undisturbed, stumble
from sweep import Sweep


def test_the_ends_of_jobs_are_seen_while_slurm_says_that_all_run(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("marks", variables={"seed": [0, 1]})
    sweep.edit(evaluation={"merge_adapters": False, "baseline": False})
    sweep.program = Sweep.program  # one test looks at its jobs when the plugin does
    stumble(sweep, "squeue", 'date +%s.%N >> $0.times; exec $real "$@" | sed "s/|COMPLET[A-Z]*/|RUNNING/"')
    sweep.run("--retries", "0")
    check_undisturbed(sweep)
    times = [float(line) for line in (sweep.directory / "stumbling/squeue.times").read_text().split()]
    # Never more than one in five seconds, whoever of the run asks.
    assert len(times) <= (times[-1] - times[0]) / 5 + 2


@pytest.mark.long  # test_failures says so of the job of a node that dies
def test_the_end_of_a_job_without_a_mark_is_seen_by_asking(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("no_marks", runs=[{"name": "point"}])
    sweep.edit(evaluation=TRAINING_ONLY)
    (sweep.results / ".slurm").mkdir(parents=True)
    (sweep.results / ".slurm/ended").touch()  # where the folder of marks would be
    sweep.run("--retries", "0")
    check_undisturbed(sweep)
