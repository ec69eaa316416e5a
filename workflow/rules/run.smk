"""The run: what happens before the first job and after the last. A dry run ends with the plan in short.

All of it is `lorasweep.run.Run`; here it is told what Snakemake alone knows.
"""

from snakemake.io import IOFile

from lorasweep.running.run import Places, Run
from lorasweep.util.slurm import forget_settings
from lorasweep.running.slurm_plugin import (
    mend_end_by_signal,
    mend_python_path,
    mend_status_queries,
    warn_of_other_versions,
)

mend_python_path()

if workflow.is_main_process:
    forget_settings()
    warn_of_other_versions()
    mend_status_queries()
    SOURCES = Path(workflow.sourcecache.runtime_cache_path)
    THIS_RUN = Run(SWEEP, ROOT, SOURCES, uses_conda=USES_CONDA, ignores_shortage=FORCES_PLAN)
    THIS_RUN.listen(logger, lambda: workflow.dryrun, lambda: (get_wanted_jobs(), get_places()))


def get_orphan_dependency():
    """A resource of `train`: a training that an earlier run left going is waited for by the scheduler."""
    jobs = THIS_RUN.awaited_jobs if workflow.is_main_process else {}

    def depend(wildcards):
        return f"--dependency=afterany:{jobs[wildcards.training]}" if wildcards.training in jobs else ""

    return {"slurm_extra": depend} if jobs else {}


def get_wanted_jobs():
    """What is to do: pairs of a rule and the name of a point or of a batch, if it has one.

    A training stands under the point for which it is counted.
    """
    return {
        (job.rule.name, SWEEP.trainings.get(name := str(next(iter(job.wildcards), "")), name))
        for job in workflow.dag.needrun_jobs(exclude_finished=False)
        if job.rule.name not in ("all", "configure_all")
    }


def get_unfinished():
    """The points of jobs that this run was to do and did not."""
    unfinished = {str(name) for job in workflow.dag.needrun_jobs() for name in job.wildcards}
    return {name for name in SWEEP.folders if {name, name in POINTS and POINTS[name].training} & unfinished}


def get_places():
    """How much runs at a time."""
    return Places(workflow.resource_settings.cores, workflow.nodes, workflow.global_resources.get("gpu").value)


def get_slurm_run():
    """By what name SLURM knows the jobs of this run. No public attribute leads to the executor."""
    return workflow.scheduler._executor.run_uuid if workflow.executor_plugin.name == "slurm" else None


def conclude(is_well):
    # What says that a batch was evaluated is of this run alone: the next one puts other points together.
    for batch in SWEEP.batches:
        workflow.persistence.cleanup_metadata(IOFile(f"{RESULTS}/.batches/{batch}"))
    THIS_RUN.conclude(get_unfinished(), is_well=is_well)


onstart:
    THIS_RUN.begin(get_wanted_jobs(), get_places(), get_slurm_run(), is_touch=workflow.touch)
    mend_end_by_signal(workflow.scheduler)
    # Else Snakemake does not say when a job has ended, under --quiet progress.
    workflow.scheduler.print_progress = True


onsuccess:
    conclude(is_well=True)


onerror:
    conclude(is_well=False)
