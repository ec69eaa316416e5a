"""Make the plan of one run from the experiment, the jobs that Snakemake will run, and records of earlier runs."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from rich.console import Console

from lorasweep.experiment.devices import get_device_name
from lorasweep.experiment.points import Baseline, Point
from lorasweep.experiment.sections import Data, Experiment
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.layout import JOB_RECORDS, MANIFEST, PICTURE, PLAN, split_part_name
from lorasweep.planning.costs import TASK_SAMPLES, Base, Costs
from lorasweep.planning.counting import Samples, guess_lengths, guess_task_sizes, read_count, read_task_sizes
from lorasweep.planning.disk_space import explain_shortage, find_room
from lorasweep.planning.history import Experience, JobRecord, get_last_error, learn, read_records
from lorasweep.planning.lengths import BYTES_PER_TOKEN, Lengths
from lorasweep.planning.planner import MODES, Planner, PointPlan, SweepPlan
from lorasweep.planning.timeline import PlannedJob
from lorasweep.planning.view import describe_error, describe_shortly, describe_times, draw_storage, show_plan
from lorasweep.stages import RULE_NAMES, TRAINER_RULES
from lorasweep.sweep.checks import warn_of_prompts
from lorasweep.util.files import get_size, write_aside
from lorasweep.util.formats import format_bytes, format_seconds

BATCH_RULE = "evaluate_adapters"

EVALUATIONS_READ = 50
"""The most finished evaluations whose logs are measured."""

WHOLE = "whole"

UNPRUNED = "without prune"
"""Name of the plan of the whole sweep as it would be without `prune`."""


@dataclass(frozen=True)
class Forecast:
    """A plan, and the data that it is made from."""

    experiment: Experiment
    results: Path
    planner: Planner
    experience: Mapping[str, Experience]
    records: Sequence[JobRecord]
    wanted: Collection[tuple[str, str]]
    """The remaining jobs: pairs of a rule and the name of a point or a batch."""
    batches: Mapping[str, Sequence[str]]
    """Points of each batch, by the batch's name."""

    @cached_property
    def unfinished(self) -> set[str]:
        """The points with remaining jobs."""
        return {member for rule, name in self.wanted for member in self.get_members(rule, name)}

    @cached_property
    def remaining(self) -> SweepPlan:
        """The plan of the remaining jobs."""
        return self.planner.plan_remaining(self.wanted, self.batches)

    @cached_property
    def jobs(self) -> dict[tuple[str, str], PlannedJob]:
        """The remaining jobs that take time, by rule and name."""
        return self.planner.list_rest(self.wanted, self.batches)

    @cached_property
    def whole(self) -> dict[str, SweepPlan]:
        """Plans of the whole sweep: as configured, and in each mode."""
        unpruned = replace(self.planner, experiment=self.experiment.model_copy(update={"prune": None}))
        return {
            WHOLE: self.planner.plan_all(),
            **({UNPRUNED: unpruned.plan_all()} if self.experiment.prune else {}),
            **{mode: self.planner.plan_all(mode) for mode in MODES},
        }

    @cached_property
    def points(self) -> list[PointPlan]:
        """The figures of every point. A point is done if it has a manifest and no remaining job."""
        names = {*self.planner.baselines, *self.planner.points} - self.unfinished
        return self.planner.plan_points({name for name in names if (self.results / name / MANIFEST).is_file()})

    def get_members(self, rule: str, name: str) -> Sequence[str]:
        """Return the names of a job's points."""
        if rule == BATCH_RULE:
            return self.batches.get(name, ())
        if rule == "prune":
            return ()
        return [split_part_name(name)[0] if rule == "train_part" else name] if name else ()

    def describe_shortly(self) -> str:
        """Return the summary that a dry run prints."""
        done = sum(point.is_done for point in self.points)
        guessed = [rule for rule in RULE_NAMES if rule in self.remaining.seconds and not self.planner.is_counted(rule)]
        notes = self._note_merged_models if any(rule == "merge" for rule, _ in self.wanted) else []
        if any(rule == "train" for rule, _ in self.wanted):
            notes = [*notes, *self._note_patience, *self._note_warmup]
        notes += [*self._note_pruning, *self._note_unevaluated]
        parallel = self.planner.parallel
        return describe_shortly(self.remaining, self.whole, done, len(self.points), parallel, guessed, notes)

    def show(self, console: Console) -> None:
        """Print the whole plan."""
        show_plan(console, self.results.name, self.remaining, self.whole, self.points, self._notes)

    @cached_property
    def _notes(self) -> list[str]:
        rules = [rule for rule in self.whole[WHOLE].seconds if self.whole[WHOLE].seconds[rule]]
        tokens = (
            "counted" if self.planner.is_counted("train") else f"guessed ({BYTES_PER_TOKEN} bytes of the file each)"
        )
        samples = (
            "counted" if self.planner.is_counted("evaluate") else f"guessed ({TASK_SAMPLES} for a task without a limit)"
        )
        return [
            describe_times(self.experience, rules, self.planner.device_name)
            + " "
            + describe_error(get_last_error(self.records)),
            f"Jobs at a time: {self.planner.parallel}. Training tokens are {tokens}, evaluation samples are {samples}."
            + self._note_gpus,
            *self._note_merged_models,
            *self._note_patience,
            *self._note_warmup,
            *self._note_pruning,
            *self._note_unevaluated,
            *warn_of_prompts(self.experiment, self.planner.points.values()),
        ]

    @property
    def _note_gpus(self) -> str:
        if self.experiment.model.device != "cuda":
            return ""
        trained = [name for name, point in self.planner.points.items() if point.is_trained]
        evaluation = self.experiment.evaluation
        names = self.planner.costs if evaluation.enabled or evaluation.validation_task else []
        most = {
            "trainings": max((self.planner.get_gpus("train", name) for name in trained), default=0),
            "evaluations": max((self.planner.get_gpus("evaluate", name) for name in names), default=0),
        }
        several = [f"{jobs} on up to {gpus} GPUs" for jobs, gpus in most.items() if gpus > 1]
        return f" Every training or evaluation job uses one GPU{', except ' if several else ''}{' and '.join(several)}."

    @property
    def _note_merged_models(self) -> list[str]:
        if not self.whole["B1"].jobs.get("merge"):
            return []
        size = format_bytes(max(map(self.planner.get_model_bytes, self.planner.points)))
        folder = self.experiment.evaluation.merged_models_in
        where = f" in {folder}, which is not included above" if folder else ""
        return [f"Mode B1 has up to {self.planner.max_merged_models} merged models of {size} at a time{where}."]

    @property
    def _note_patience(self) -> list[str]:
        if not any(point.is_trained and point.controls.patience for point in self.planner.points.values()):
            return []
        return [
            "Trainings are planned with all their epochs, which is an upper bound: they stop after controls.patience "
            "epochs without a lower validation loss."
        ]

    @property
    def _note_warmup(self) -> list[str]:
        steps = {
            name: self.planner.costs[name].get_training(point.controls, point.data).steps
            for name, point in self.planner.points.items()
            if point.is_trained and point.controls.num_warmup_steps
        }
        names = [name for name in steps if self.planner.points[name].controls.num_warmup_steps >= steps[name]]
        if not names:
            return []
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return [
            f"controls.num_warmup_steps: {self.planner.points[names[0]].controls.num_warmup_steps} is not below the "
            f"{steps[names[0]]} steps of the training, whose learning rate does not reach lr: {names[0]}{more}."
        ]

    @property
    def _note_pruning(self) -> list[str]:
        prune, trained = self.experiment.prune, [p for p in self.planner.points.values() if p.is_trained]
        if prune is None or not trained:
            return []
        left = [
            round(sum(self.planner.shares[point.name][i] for point in trained)) for i in range(len(prune.after) + 1)
        ]
        whole, unpruned = self.whole[WHOLE], self.whole[UNPRUNED]
        hours = [sum(plan.seconds.get(rule, 0.0) for rule in TRAINER_RULES) for plan in (whole, unpruned)]
        gpu_hours = [
            sum(plan.gpu_seconds.get(rule, 0.0) for rule in (*TRAINER_RULES, "prune")) / 3600
            for plan in (whole, unpruned)
        ]
        gpu = f", {gpu_hours[0]:,.1f} GPU hours in place of {gpu_hours[1]:,.1f}" if any(gpu_hours) else ""
        counts = ", ".join(f"{number} after epoch {after}" for number, after in zip(left[1:], prune.after, strict=True))
        return [
            f"prune: of {left[0]} trainings, {counts} go on, without ties; the whole sweep trains for "
            f"{format_seconds(hours[0])} in place of {format_seconds(hours[1])}{gpu}, if all settings are alike."
        ]

    @property
    def _note_unevaluated(self) -> list[str]:
        names = [name for name, point in self.planner.points.items() if point.tasks == ()]
        if not names or not self.experiment.evaluation.enabled:
            return []
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return [f"Kept, but not evaluated, as no task is for them: {names[0]}{more}."]

    def write(self) -> list[Path]:
        """Write the plan and its picture. Return the paths of both files."""
        content = {
            "experiment": self.results.name,
            "device": self.planner.device_name,
            "parallel_jobs": self.planner.parallel,
            "tokens_are_counted": self.planner.is_counted("train"),
            "times_from": {rule: asdict(experience) for rule, experience in self.experience.items()},
            "last_run_took_of_its_plan": get_last_error(self.records),
            "to_do": self.remaining.as_json(),
            **{name.replace(" ", "_"): plan.as_json() for name, plan in self.whole.items()},
            "points": [asdict(point) for point in self.points],
        }
        self.results.mkdir(parents=True, exist_ok=True)
        write_aside(self.results / PLAN, json.dumps(content, indent=1) + "\n")
        draw_storage(self.whole, self.results / PICTURE)
        return [self.results / PLAN, self.results / PICTURE]

    def explain_shortage(self) -> str | None:
        """Return a message if the remaining jobs do not fit on disk; else `None`."""
        need = self.remaining.kept_bytes + self.remaining.temporary_bytes
        rooms = find_room(self.results, self.experiment.plan.storage_limit_gb)
        if not explain_shortage(rooms, need, self.planner.parallel, {}):
            return None
        # Files that a job replaces are removed before the job starts.
        need -= sum(
            get_size(self.results / point / folder)
            for rule, folder in (("adopt", "adapter"), ("export", "hf_model"))
            for wanted, point in self.wanted
            if wanted == rule
        )
        alternatives: dict[str, int] = {}
        if any(rule == "merge" for rule, _ in self.wanted) and not self.experiment.evaluation.merged_models_in:
            evaluation = self.experiment.evaluation.model_copy(update={"max_merged_models": 1})
            bounded = replace(self.planner, experiment=self.experiment.model_copy(update={"evaluation": evaluation}))
            plan = bounded.plan_remaining(self.wanted, self.batches)
            alternatives["evaluation.max_merged_models: 1"] = plan.kept_bytes + plan.temporary_bytes
        names = {"B1": "merge_adapters: true", "B2": "merge_adapters: false"}
        for mode, setting in names.items():
            plan = self.whole[mode]
            if plan.kept_bytes + plan.temporary_bytes < need:
                alternatives[f"mode {mode} (model_format: adapter, {setting})"] = plan.kept_bytes + plan.temporary_bytes
        return explain_shortage(rooms, need, self.planner.parallel, alternatives)


def make_forecast(
    experiment: Experiment,
    points: Mapping[str, Point],
    baselines: Mapping[str, Baseline],
    bases: Mapping[str, Base],
    results: Path,
    wanted: Collection[tuple[str, str]],
    batches: Mapping[str, Sequence[str]],
    parallel: int,
    evaluations: int,
    tasks: Sequence[TaskEntry],
    task_files: Sequence[Path],
    validation: TaskEntry | None = None,
) -> Forecast:
    """Return the plan of a run.

    Args:
        experiment: The experiment.
        points: Its points by name.
        baselines: The models that are evaluated without an adapter, by name.
        bases: The model of each point, and of each baseline, by name.
        results: The experiment's folder. Records of other experiments in its parent folder also correct the times.
        wanted: The remaining jobs: pairs of a rule and the name of a point or a batch.
        batches: Points of each batch, by the batch's name.
        parallel: Jobs at a time.
        evaluations: Evaluations at a time.
        tasks: The evaluation tasks.
        task_files: The source files of all tasks.
        validation: The task that chooses the epoch of each training, or the trainings that go on, if one does.
    """
    records = read_records(results / JOB_RECORDS)
    other_files = sorted(file for file in results.parent.glob(f"*/{JOB_RECORDS}") if file.parent != results)
    experiments = [*map(read_records, other_files), records]
    all_tasks = [*tasks, *([validation] if validation else [])]
    sizes = read_task_sizes(results, all_tasks, task_files, experiment.evaluation.model_roles)
    known = dict(sizes or guess_task_sizes(all_tasks))
    chooses = known.pop(validation.name) if validation else None
    experience: dict[str, Experience] = {}
    costs: dict[Base, Costs] = {}
    for base in dict.fromkeys(bases.values()):
        own = [point for point in points.values() if not point.adapter and bases[point.name] == base]
        lengths = _read_lengths(results, own, base.fingerprint)
        first = next(iter(lengths.values()), Lengths.count(experiment.data, []))
        past = learn(experiments, get_device_name(experiment), base.fingerprint)
        factors = {rule: jobs.factor for rule, jobs in past.items()}
        is_counted = bool(sizes)
        costs[base] = Costs(experiment, base, first, known, factors, lengths, is_counted, validation=chooses)
        # Of several models, the plan's notes tell the one with the most jobs.
        most = {rule: max(jobs, experience.get(rule, jobs), key=lambda each: each.jobs) for rule, jobs in past.items()}
        experience |= most
    log_bytes = _measure_logs(results, list(bases), tasks)
    by_name = {name: costs[base] for name, base in bases.items()}
    planner = Planner(experiment, points, baselines, by_name, parallel, log_bytes, evaluations)
    return Forecast(experiment, results, planner, experience, records, wanted, batches)


def _read_lengths(results: Path, points: Iterable[Point], fingerprint: str) -> dict[Data, Lengths]:
    """Return the lengths of the samples of points of one base model, counted or guessed, by their data sections."""
    lengths: dict[Data, Lengths] = {}
    for data, model, trainer in dict.fromkeys((point.data, point.model, point.trainer) for point in points):
        count = read_count(results, Samples(data, model, fingerprint, trainer))
        # Trainers that count otherwise than the first are planned by its counts.
        lengths.setdefault(data, (count and count.train) or guess_lengths(data))
    return lengths


def _measure_logs(results: Path, points: Sequence[str], tasks: Iterable[TaskEntry]) -> dict[str, int]:
    """Return the mean size in bytes of a task's log over some finished evaluations, by task; none before the first."""
    means = {}
    for task in tasks:
        logs = (results / point / "eval" / f"{task.name}.eval" for point in points)
        sizes = [log.stat().st_size for log in islice((log for log in logs if log.is_file()), EVALUATIONS_READ)]
        if sizes:
            means[task.name] = round(sum(sizes) / len(sizes))
    return means
