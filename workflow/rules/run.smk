"""The run: the work before the first job and after the last. A dry run ends with a short plan.

The work is done by `lorasweep.running.run.Run`; this file passes on what only Snakemake knows.
"""

# A job needs nothing of a run's beginning and end, and half of its start would be their imports.
if workflow.is_main_process:
    from snakemake.io import IOFile

    from lorasweep.running.outdated import describe_outdated
    from lorasweep.running.run import THREADS, Options, Places, Run
    from lorasweep.running.slurm_plugin import (
        find_refusals,
        mend_end_by_signal,
        mend_plugin,
        warn_of_other_versions,
    )
    from lorasweep.stages import TASK_RULES, TRAINER_RULES
    from lorasweep.util.slurm import count_gpus, forget_settings

    forget_settings()
    warn_of_other_versions()
    SOURCES = Path(workflow.sourcecache.runtime_cache_path)
    THIS_RUN = Run(
        SWEEP, ROOT, SOURCES, describe_outdated(SWEEP, OUTDATED), uses_conda=USES_CONDA, ignores_shortage=FORCES_PLAN
    )
    mend_plugin(
        THIS_RUN.slurm_logs,
        lambda job: job.rule.name in TRAINER_RULES and SWEEP.has_ended(job.wildcards[0]),
        lambda job: THIS_RUN.get_awaited_job(job.rule.name, next(iter(job.wildcards), "")),
    )
    with ending_with_a_message():
        THIS_RUN.listen(logger, lambda: workflow.dryrun, lambda: (get_wanted_jobs(), get_places()))


def get_places():
    """Return the limits on what runs in parallel."""
    threads = workflow.resource_settings.overwrite_threads.get("evaluate", THREADS)
    gpus = workflow.global_resources.get("gpu").value
    if gpus is None and workflow.nodes:
        gpus = count_gpus()
    return Places(workflow.resource_settings.cores, workflow.nodes, gpus, int(getattr(threads, "value", threads)))


# A merge holds one of these, and an evaluation of its model. The scheduler reads the number that no job holds.
if workflow.is_main_process and workflow.global_resources.get("merged_models").value is None:
    workflow.register_resource("merged_models", THIS_RUN.count_merged_models(get_places()))


def get_wanted_jobs():
    """Return the planned jobs: pairs of a rule and the name of a point or batch, "" for jobs of the whole experiment.

    A training is listed under the point that it is counted for, and so are its parts.
    """
    return {
        (job.rule.name, SWEEP.job_names.get(name := str(next(iter(job.wildcards), "")), name))
        for job in workflow.dag.needrun_jobs(exclude_finished=False)
        if job.rule.name not in ("all", "configure_all")
    }


def get_unfinished():
    """Return the points with a planned job that was not done."""
    unfinished = {str(name) for job in workflow.dag.needrun_jobs() for name in job.wildcards}
    return {name for name in SWEEP.folders if {name, name in POINTS and POINTS[name].training} & unfinished}


def get_slurm_run():
    """Return the name of this run's jobs on SLURM, else `None`. No public attribute gives access to the executor."""
    return workflow.scheduler._executor.run_uuid if workflow.executor_plugin.name == "slurm" else None


def ask_slurm():
    """Return why SLURM would refuse planned jobs for ever; [] without SLURM."""
    if workflow.executor_plugin.name != "slurm":
        return []
    THIS_RUN.prepare_slurm()
    # What Snakemake passes to its jobs.
    workflow.config_settings.configfiles = THIS_RUN.keep_configuration(CONFIG_TEXTS)
    jobs = [job for job in workflow.dag.needrun_jobs() if not job.is_local]
    return find_refusals(workflow.scheduler._executor, jobs, count_used_gpus)


def count_used_gpus(job):
    """Return how many GPUs a job uses, whatever a profile requests."""
    if job.rule.name in TRAINER_RULES:
        return SWEEP.get_train_gpus(job.wildcards[0])
    if job.rule.name == "prune":
        return SWEEP.get_deciding_model_gpus(job.wildcards[0])
    return SWEEP.get_model_gpus(job.wildcards[0]) if job.rule.name in TASK_RULES else 0


def get_conda_environments():
    """Return the folders of conda environments, which Snakemake has made by now, by stage."""
    folders = {}
    for job in workflow.dag.needrun_jobs(exclude_finished=False) if USES_CONDA else ():
        if job.rule.name in TRAINER_RULES:
            folders[SWEEP.get_training_stage(job.wildcards[0])] = Path(job.conda_env.address)
        elif job.rule.name in TASK_RULES and (job.rule.name != "prune" or SWEEP.pruning_task):
            folders[SWEEP.evaluation_stage] = Path(job.conda_env.address)
    return {stage: folder for stage, folder in folders.items() if folder.is_dir()}


def conclude(is_well):
    # Batches exist in one run only: the next run forms new ones.
    for batch in SWEEP.batches:
        workflow.persistence.cleanup_metadata(IOFile(f"{RESULTS}/.batches/{batch}"))
    THIS_RUN.conclude(get_unfinished(), is_well=is_well)


onstart:
    THIS_RUN.begin(
        get_wanted_jobs(),
        get_places(),
        get_slurm_run(),
        Options(
            scheduler=workflow.scheduling_settings.scheduler,
            subsample=workflow.scheduling_settings.subsample,
            keeps_temporary=workflow.storage_settings.notemp,
            retries=workflow.execution_settings.retries,
            is_touch=workflow.touch,
        ),
        get_conda_environments(),
        ask_slurm(),
    )
    mend_end_by_signal(workflow.scheduler)
    # Otherwise, Snakemake does not report the end of a job with --quiet progress.
    workflow.scheduler.print_progress = True


onsuccess:
    conclude(is_well=True)


onerror:
    conclude(is_well=False)
