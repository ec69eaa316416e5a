"""A run of a sweep: the work before its first job and after its last, and the handling of Snakemake's messages.

`run.smk` calls it. A dry run creates a `Run` too, which leaves no files behind.
"""

import contextlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.experiment.loading import write_experiment
from lorasweep.experiment.points import record_points
from lorasweep.experiment.sections import Model
from lorasweep.hub import references as hub
from lorasweep.layout import (
    BATCHES,
    EXPERIMENT,
    FAILURE_RECORD,
    HOLDER,
    MERGED,
    POINTS,
    REVISIONS,
    SLURM,
    TRAININGS,
    WANTED_PLAN,
    split_part_name,
)
from lorasweep.planning import counting as measuring
from lorasweep.planning.costs import Base
from lorasweep.planning.forecast import Forecast, make_forecast
from lorasweep.running import start, view
from lorasweep.running.accounts import Accounts
from lorasweep.running.controller import give_up, hold, read_holder, release, remove_locks
from lorasweep.running.events import FailureRecorder, JobWatcher
from lorasweep.running.lengths import check_lengths, get_samples
from lorasweep.running.merged_models import MergedModels
from lorasweep.running.orphans import Orphan, find_orphans
from lorasweep.running.outages import OutageWatcher
from lorasweep.running.partial_results import drop_partial_results, write_partial_results
from lorasweep.running.summary import summarise, write_failures
from lorasweep.stages import TASK_RULES, TRAINER_RULES, TRAINING_RULES
from lorasweep.sweep.batches import record_batches
from lorasweep.sweep.checks import warn_of_prompts
from lorasweep.sweep.sweep import Sweep
from lorasweep.sweep.trainings import drop_unused
from lorasweep.util.digest import digest_text
from lorasweep.util.errors import InputError, ending_with_a_message
from lorasweep.util.files import write_aside
from lorasweep.util.slurm import LOGS, cancel_jobs, use_patient_commands
from lorasweep.util.slurm_commands import CLOSED, MARKS, PATIENCE

SCHEDULER = "lorasweep"
"""The scheduler that limits the number of merged models: workflow/snakemake_scheduler_plugin_lorasweep."""

MOST_PARALLEL = 1000
"""Assumed number of parallel jobs on a scheduler without a limit."""

THREADS = 4
"""Number of threads of an evaluation, and of each process of a training, as assumed by the plan."""

LOCKS = Path(".snakemake/locks")
"""Folder of Snakemake's locks in the working directory."""

CONFIGURATION = "configuration"
"""Folder, in a run's folder on SLURM, of copies of the experiment's files."""

LOGGER = logging.getLogger("snakemake.logging")
"""Snakemake's own logger, so that messages from here appear in its log."""

Jobs = Collection[tuple[str, str]]
"""Planned jobs: pairs of a rule and the name of a point or batch, "" for jobs of the whole experiment."""


@dataclass(frozen=True)
class Places:
    """Limits on what runs in parallel."""

    cores: int | None
    nodes: int | None
    """Maximum number of jobs submitted to a scheduler; `None` on one machine."""
    gpus: int | None
    """Maximum number of GPUs of all jobs together; `None` if not limited."""
    evaluation_threads: int = THREADS


@dataclass(frozen=True)
class Options:
    """Options of Snakemake that a run depends on."""

    scheduler: str
    subsample: int | None
    """Maximum number of jobs that the scheduler sees at a time; `None` if not limited."""
    keeps_temporary: bool
    """Whether temporary outputs stay."""
    retries: int
    """Number of times that a failed job is started again."""
    is_touch: bool

    def check(self) -> None:
        """Check that the number of merged models (mode B1) is limited.

        Raises:
            InputError: it is not.
        """
        problem = "does not limit the number of merged models (mode B1)"
        if self.scheduler != SCHEDULER:
            raise InputError(f"--scheduler: {self.scheduler!r} {problem}", f"{SCHEDULER}, as in profiles/default")
        if self.subsample is not None:
            raise InputError(f"--scheduler-subsample: {self.subsample} {problem}", "no such option")
        if self.keeps_temporary:
            raise InputError(f"--notemp {problem}", "no such option; mode A (model_format: hf) keeps full models")


class Run:
    """One call of Snakemake on a sweep."""

    def __init__(
        self,
        sweep: Sweep,
        root: Path,
        sources: Path,
        outdated: str = "",
        *,
        uses_conda: bool,
        ignores_shortage: bool,
    ) -> None:
        """`root` is the clone.

        `sources` is the folder of Snakemake's copies of the rules for this call. `outdated` says which results are made
        again, and why.
        `ignores_shortage`: whether to run although there is not enough disk space according to the plan.
        """
        self._sweep = sweep
        # Shown in the summary only.
        self._command = shlex.join(["snakemake", *sys.argv[1:]])
        self._root = root
        self._sources = sources.absolute()
        self._outdated = outdated
        self._uses_conda = uses_conda
        self._ignores_shortage = ignores_shortage
        self._directory = Path.cwd()
        self._holder = self._sweep.results / HOLDER
        self._failures = FailureRecorder(self._sweep.results / "logs", sweep.job_owners)
        self._jobs = JobWatcher(sweep.job_names)
        self._orphans: list[Orphan] = []
        self._slurm_run: str | None = None
        self._leaves_name = False
        self._accounts: Accounts | None = None
        self._outages: OutageWatcher | None = None
        self._merged_models = MergedModels(self._sweep.results / MERGED)

    def listen(
        self, logger: logging.Logger, is_dry_run: Callable[[], bool], look: Callable[[], tuple[Jobs, Places]]
    ) -> None:
        """Attach the log handlers, and warn if another process runs the sweep.

        `look` returns the planned jobs and the limits, once Snakemake has computed them.
        """
        os.environ.setdefault(PATIENCE, str(3600 * self._sweep.experiment.slurm.wait_hours))
        hub.forget_token()
        view.LABELS |= dict.fromkeys(TRAINING_RULES, self._sweep.job_names)
        logger.addHandler(self._failures)
        logger.addHandler(self._jobs)
        logger.addHandler(self._merged_models)
        logger.addHandler(_Ending(self, is_dry_run, look))
        logger.addFilter(_says_something)
        holder = read_holder(self._holder)
        if holder and not holder.is_gone:
            logger.warning(
                f"'{self._sweep.results}' is being run by {holder}. A dry run continues; a run must wait until that "
                "one ends. If its machine is gone, run the same command with --unlock first."
            )
        elif holder:
            if remove_locks(LOCKS, str(self._sweep.results)):
                logger.warning(
                    f"A run of '{self._sweep.results}' by {holder} ended before it was done; its lock is removed."
                )
            self._orphans = find_orphans(holder.slurm_runs)
        for warning in warn_of_prompts(self._sweep.experiment, self._sweep.named_points.values()):
            logger.warning(warning)
        if self._sweep.missing_model:
            logger.warning(f"{self._sweep.missing_model}\nA dry run continues without it; a run stops here.")

    def count_merged_models(self, places: Places) -> int:
        """Return the maximum number of merged models that exist at a time."""
        sweep = self._sweep
        return sweep.experiment.evaluation.max_merged_models or count_parallel_evaluations(sweep, places) + 1

    @property
    def slurm_folder(self) -> Path:
        """The folder for a run on SLURM, in the experiment's folder: another sweep's run has its own."""
        return self._sweep.results / SLURM

    @property
    def slurm_logs(self) -> Path:
        """The folder of the logs of SLURM jobs."""
        return self.slurm_folder / LOGS

    def get_awaited_job(self, rule: str, name: str) -> str | None:
        """Return the SLURM job of an earlier run that still does a job's training, or a part of it, if there is one."""
        training = split_part_name(name)[0]
        awaited = (each.job for each in self._orphans if each.is_awaited and split_part_name(each.name)[0] == training)
        return next(awaited, None) if rule in TRAINER_RULES else None

    def prepare_slurm(self) -> None:
        """Have this process and its jobs wait out SLURM's outages, which are told of from now on."""
        # Of earlier runs; what the jobs that still run write is of no interest.
        for part in ("jobs", "done", MARKS, "outages"):
            shutil.rmtree(self.slurm_folder / part, ignore_errors=True)
        self.slurm_folder.mkdir(parents=True, exist_ok=True)
        (self.slurm_folder / CLOSED).unlink(missing_ok=True)
        use_patient_commands(self.slurm_folder)
        self._outages = OutageWatcher(self.slurm_folder)
        self._outages.start()

    def keep_configuration(self, texts: Iterable[str]) -> list[Path]:
        """Write the experiment files of this run for its SLURM jobs, and return the paths.

        A job reads them when it starts, hours or days later. What is edited meanwhile is for the next run.
        """
        folder = self.slurm_folder / CONFIGURATION
        folder.mkdir(exist_ok=True)
        files = []
        for text in texts:
            # Jobs of an earlier run may still need its own.
            file = folder.absolute() / f"{digest_text(text)[:16]}.yaml"
            write_aside(file, text)
            files.append(file)
        return files

    def begin(
        self,
        wanted: Jobs,
        places: Places,
        slurm_run: str | None,
        options: Options,
        environments: Mapping[str, Path],
        refusals: Collection[str] = (),
    ) -> None:
        """Do the work before the first job. End the process with a message if the run is not possible.

        `slurm_run` is the name of this run's jobs on SLURM; `None` without SLURM. `environments` are the folders of
        conda environments by stage; empty without conda, and if they are made where the jobs run. `refusals` are the
        reasons why SLURM would refuse jobs for ever.
        """
        sweep, results = self._sweep, self._sweep.results
        with ending_with_a_message():
            if sweep.missing_model:
                raise InputError(sweep.missing_model)
            self._check_environments()
            if refusals:
                raise InputError.join(InputError(refusal) for refusal in refusals)
            takes_time = any(rule in (*TRAINING_RULES, *TASK_RULES) for rule, _ in wanted)
            if sweep.experiment.plan.count and takes_time and not options.is_touch:
                self._look({rule for rule, _ in wanted}, environments)
            notes = check_lengths(sweep, {name for rule, name in wanted if rule == "train"})
            notes += start.note_shared_samples(sweep)
            forecast = forecast_run(sweep, wanted, places)
            assert forecast
            if shortage := forecast.explain_shortage():
                if not self._ignores_shortage:
                    raise InputError(shortage)
                LOGGER.warning(shortage)
            self._settle_orphans()
            self._merged_models.expect_retries(options.retries)
            if any(rule == "merge" for rule, _ in wanted):
                options.check()
                self._merged_models.prepare(sweep.experiment.evaluation.merged_models_in)
            self._slurm_run = slurm_run
            self._leaves_name = slurm_run is not None  # until its jobs are known to have ended
            awaited = {orphan.run for orphan in self._orphans if orphan.is_awaited}
            hold(self._holder, sorted(awaited | ({slurm_run} if slurm_run else set())))
            record_points(sweep.points, results / POINTS)
            write_experiment(
                hub.with_commits(sweep.as_written, hub.read_revisions(results / REVISIONS)), results / EXPERIMENT
            )
            if sweep.race:
                sweep.race.record()
            if sweep.batches:
                record_batches(dict(sweep.batches), results / BATCHES)
                view.LABELS["evaluate_adapters"] = {
                    batch: points[0] if len(points) == 1 else f"{points[0]} and {len(points) - 1} more"
                    for batch, points in sweep.batches.items()
                }
            if self._outdated:
                LOGGER.warning(self._outdated)
            LOGGER.info("\n".join([forecast.describe_shortly(), *notes]))
            if not options.is_touch:
                self._accounts = Accounts(forecast, self._jobs, self._failures, self._outages)
                self._accounts.start()

    def conclude(self, unfinished: Collection[str], *, is_well: bool) -> None:
        """Do the work after the last job, and print the summary.

        `unfinished` are the points with a planned job that was not done.
        """
        sweep, results = self._sweep, self._sweep.results
        # The next run finds jobs that still run by the name in the holder file.
        is_over = is_well or self._cancel_forgotten_jobs()
        for leftover in (*results.glob("*/.*.partial"), results / ".batches"):
            shutil.rmtree(leftover, ignore_errors=True)
        if is_over:
            self._merged_models.remove_all()
            shutil.rmtree(self.slurm_folder / CONFIGURATION, ignore_errors=True)
        drop_unused(results / TRAININGS, sweep.trainings)
        summary = summarise(results, sweep.folders, unfinished, self._failures.failures, self._command)
        try:
            if is_well:
                (results / FAILURE_RECORD).unlink(missing_ok=True)
                drop_partial_results(results)
            elif self._failures.failures:
                write_failures(self._failures.failures, results / FAILURE_RECORD)
        except OSError as error:  # a full disk must not hide how the run went
            summary += f"\n{FAILURE_RECORD} could not be written: {error}"
        if self._accounts:
            summary += f"\n{self._accounts.stop(is_well)}"
        # Last: `lorasweep status` considers a run without a holder as ended.
        self._leaves_name = not is_over
        self.end()
        LOGGER.log(logging.INFO if is_well else logging.ERROR, summary)
        if not is_well:
            message = write_partial_results(sweep, unfinished, self._root, reads_samples=not self._uses_conda)
            if message:
                LOGGER.error(message)

    def show_plan(self, wanted: Jobs, places: Places) -> None:
        """Print the plan at the end of a dry run: in short, or in full for `lorasweep plan`."""
        sweep = self._sweep
        is_whole = os.environ.get(WANTED_PLAN) == "whole"
        with contextlib.chdir(self._directory):
            if self._outdated:
                print(self._outdated)
            rules = {rule for rule, _ in wanted}
            fault = start.find_faults(sweep, rules)
            if is_whole and not self._uses_conda:
                try:
                    self._look(rules, {})
                    fault = None
                except InputError as error:
                    fault = error
            forecast = forecast_run(sweep, wanted, places)
            if forecast is None:
                print(f"No plan: {sweep.missing_sizes}")
                return
            if is_whole:
                from rich.console import Console

                forecast.show(Console())
                print("Written:", *forecast.write())
            else:
                print(forecast.describe_shortly())
            notes: list[str] = []
            too_long = None
            try:
                notes = check_lengths(sweep, {name for rule, name in wanted if rule == "train"})
            except InputError as error:
                too_long = error
            for note in (*notes, *start.note_shared_samples(sweep)):
                print(note)
            for reason in filter(None, [fault, too_long, forecast.explain_shortage()]):
                print(f"A run would be refused: {reason}")

    def end(self) -> None:
        """Remove this process's holder file, unless jobs still run that the next run must find by it."""
        shutil.rmtree(self._sources, ignore_errors=True)
        if self._leaves_name:
            return
        with contextlib.chdir(self._directory):
            release(self._holder)

    def give_up(self) -> None:
        """Mark the holder as dead, after `--unlock` by the user."""
        give_up(self._holder)

    def _look(self, rules: Collection[str], environments: Mapping[str, Path]) -> None:
        """Look at what jobs of these rules need.

        Raises:
            InputError: something is wrong with it.
        """
        if self._uses_conda and not environments:
            return
        count_tokens(self._sweep, self._root, environments)
        start.look(self._sweep, self._root, rules, environments)
        if fault := start.find_faults(self._sweep, rules):
            raise fault

    def _check_environments(self) -> None:
        stages = {*self._sweep.trainers.values(), "eval", self._sweep.evaluation_stage}
        for stage in () if self._uses_conda else stages:
            if not (self._root / ".venv" / stage / "installed").exists():
                raise InputError(
                    f".venv/{stage}: the environment is missing; run 'make install"
                    f"{'-vllm' if stage == 'vllm' else ''}', or use '--sdm conda'"
                )

    def _settle_orphans(self) -> None:
        """Cancel jobs of a dead run, or wait for its trainings, so that no two jobs write the same files."""
        for orphan in self._orphans:
            fate = "is cancelled"
            if orphan.is_awaited:
                fate = "still runs: the same training waits for its end, and reuses what it produced"
            LOGGER.warning(f"SLURM job {orphan.job} of an earlier run ({orphan.rule} of {orphan.name}) {fate}.")
        if remaining := cancel_jobs(orphan.job for orphan in self._orphans if not orphan.is_awaited):
            raise InputError(
                f"SLURM jobs of an earlier run do not end: scancel {' '.join(sorted(remaining))}, and run again"
            )

    def _cancel_forgotten_jobs(self) -> bool:
        """Cancel SLURM jobs that still run at the end; return whether all jobs have ended.

        At Ctrl-C, Snakemake cancels only the jobs on its list, which is empty while it queries their status.
        """
        jobs = [job.job for job in find_orphans([self._slurm_run] if self._slurm_run else [])]
        try:
            return not (jobs and cancel_jobs(jobs))
        except (OSError, subprocess.SubprocessError) as error:
            LOGGER.error(f"SLURM jobs {' '.join(jobs)} still run and could not be cancelled: {error}")
            return False


class _Ending(logging.Handler):
    """Show the plan of a dry run and release the sweep when Snakemake closes its log handlers, as its last step."""

    def __init__(self, run: Run, is_dry_run: Callable[[], bool], look: Callable[[], tuple[Jobs, Places]]) -> None:
        super().__init__()
        self._run, self._is_dry_run, self._look = run, is_dry_run, look
        self._is_planned = False

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage() if record.msg else ""
        if str(getattr(record, "event", "")) == "run_info" or message.startswith("Nothing to be done"):
            self._is_planned = True
        elif message == "Unlocked working directory.":
            self._run.give_up()

    def close(self) -> None:
        super().close()
        with ending_with_a_message():
            if self._is_planned and self._is_dry_run():
                self._run.show_plan(*self._look())
            self._run.end()


def _says_something(record: logging.LogRecord) -> bool:
    # Batches are computed in every run, so Snakemake's warning about their missing metadata is noise.
    return not str(record.msg).endswith("missing metadata: evaluate_adapters")


def forecast_run(sweep: Sweep, wanted: Jobs, places: Places) -> Forecast | None:
    """Make the plan of a run; return `None` if the base model's configuration is missing."""
    models = {name: sweep.get_model(name) for name in sweep.folders}
    bases: dict[Model, Base] = {}
    for model in dict.fromkeys(models.values()):
        checkpoint = sweep.get_checkpoint(model)
        if checkpoint is None:
            return None
        bases[model] = Base(model, checkpoint, "" if sweep.missing_model else checkpoint.fingerprint)
    return make_forecast(
        sweep.experiment,
        sweep.points,
        sweep.baselines,
        {name: bases[model] for name, model in models.items()},
        sweep.results,
        wanted,
        sweep.batches,
        count_parallel_jobs(sweep, places),
        count_parallel_evaluations(sweep, places),
        sweep.tasks,
        list(map(Path, sweep.task_files)),
        sweep.choosing_task,
    )


def count_parallel_jobs(sweep: Sweep, places: Places) -> int:
    """Return the number of jobs that run in parallel, limited by the cores of this machine or by `--jobs`."""
    # As if each job had as many GPUs as the largest training.
    return _count_parallel(sweep, places, THREADS * sweep.most_gpus, sweep.most_gpus)


def count_parallel_evaluations(sweep: Sweep, places: Places) -> int:
    """Return the number of evaluations that run in parallel, limited like `count_parallel_jobs`."""
    return _count_parallel(sweep, places, places.evaluation_threads, max(1, sweep.evaluation_gpus))


def _count_parallel(sweep: Sweep, places: Places, threads: int, gpus: int) -> int:
    if sweep.experiment.plan.parallel_jobs:
        return sweep.experiment.plan.parallel_jobs
    cores = places.cores or 1
    most = [places.nodes or cores // min(cores, threads), MOST_PARALLEL]
    if sweep.is_on_gpus and places.gpus is not None:
        most.append(places.gpus // gpus)
    return max(1, min(most))


def count_tokens(sweep: Sweep, root: Path, environments: Mapping[str, Path]) -> None:
    """Have the trainers count tokens, unless the counts are on record."""
    results, trainings = sweep.results, {} if sweep.missing_model else sweep.trainings
    counted = {get_samples(sweep, sweep.points[point]): training for training, point in trainings.items()}
    if all(measuring.read_count(results, samples) for samples in counted):
        return
    recipes = {each: sweep.get_recipe(training) for each, training in counted.items()}
    try:
        measuring.count_lengths(results, recipes, start.make_trainer_command(sweep, root, environments))
    except InputError as error:
        print(f"Numbers of tokens are guessed: {error}")
