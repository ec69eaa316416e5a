"""Plan a sweep: bytes, hours and jobs, as configured and in each other mode.

Sizes of weights are exact (lorasweep.checkpoints.sizes). Times are estimates (lorasweep.planning.costs).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.sizes import (
    LOG_ROW,
    SMALL_FILES,
    get_adapter_size,
)
from lorasweep.experiment.points import Baseline, Point
from lorasweep.experiment.pruning import expect_shares
from lorasweep.experiment.sections import Experiment
from lorasweep.experiment.task_choice import list_tasks, with_own_tasks
from lorasweep.layout import ADAPTER_WEIGHTS, get_part_name, get_rung_name
from lorasweep.planning.costs import Base, Costs, TaskSize, Training
from lorasweep.planning.timeline import PlannedJob, Timeline, simulate
from lorasweep.stages import GPU_RULES, TASK_RULES, TRAINER_RULES, TRAINING_RULES, get_timed_rules
from lorasweep.sweep import resources
from lorasweep.sweep.batches import group_alike

MODES = ("A", "B1", "B2")

LOG_BYTES = 8_000
"""Bytes of an evaluation log without its samples."""

SAMPLE_BYTES = 600
"""Assumed bytes of a sample in a compressed log, if no finished evaluation shows the size."""


@dataclass(frozen=True)
class PointPlan:
    """The cost of one point, whether or not it is done."""

    name: str
    mode: str
    is_done: bool
    steps: int
    tokens: int
    kept_bytes: int
    kept_bytes_by_mode: Mapping[str, int]
    temporary_bytes: int
    """The most temporary bytes of one of its jobs."""
    written_bytes: int
    seconds: Mapping[str, float]
    """Duration by rule, as if no job were shared with other points."""
    gpu_hours: float
    mem_mb: int
    """The largest memory request of its jobs at the first attempt."""


@dataclass(frozen=True)
class SweepPlan:
    """The cost of a set of jobs."""

    kept_bytes: int
    temporary_bytes: int
    """The most bytes of temporary files at one moment."""
    written_bytes: int
    jobs: Mapping[str, int]
    """Number of jobs by rule."""
    seconds: Mapping[str, float]
    """Total duration of the jobs, by rule."""
    gpu_seconds: Mapping[str, float]
    """Total GPU time by rule: each job's duration times its GPUs."""
    steps: int
    """Total optimizer steps of all trainings."""
    tokens: int
    """Total tokens of all trainings."""
    wall_seconds: float
    mem_mb: int
    timeline: Timeline = field(repr=False)

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def gpu_hours(self) -> float:
        return sum(self.gpu_seconds.values()) / 3600

    def as_json(self) -> dict[str, Any]:
        return {
            "kept_bytes": self.kept_bytes,
            "temporary_bytes": self.temporary_bytes,
            "written_bytes": self.written_bytes,
            "jobs": dict(self.jobs),
            "steps": self.steps,
            "tokens": self.tokens,
            "job_hours": {rule: seconds / 3600 for rule, seconds in self.seconds.items()},
            "gpu_hours": {rule: seconds / 3600 for rule, seconds in self.gpu_seconds.items()},
            "wall_hours": self.wall_seconds / 3600,
            "mem_mb": self.mem_mb,
        }


@dataclass(frozen=True)
class Planner:
    """Make plans of an experiment: of the whole sweep, of the remaining jobs, of each point."""

    experiment: Experiment
    points: Mapping[str, Point]
    baselines: Mapping[str, Baseline]
    """The models that are evaluated without an adapter, by name."""
    costs: Mapping[str, Costs]
    """The cost model of each point and baseline, by name."""
    parallel: int
    """The number of jobs at a time."""
    log_bytes: Mapping[str, int] = field(default_factory=dict)
    """Mean bytes of a log, by task; without those of tasks that no point was evaluated on yet."""
    evaluations: int | None = None
    """The number of evaluations at a time; `None`: as many as jobs."""

    @property
    def max_merged_models(self) -> int:
        """The maximum number of merged models: by default one for each evaluation, and one that is merged meanwhile."""
        return self.experiment.evaluation.max_merged_models or (self.evaluations or self.parallel) + 1

    @cached_property
    def _evaluation(self) -> bool:
        return self.experiment.evaluation.enabled

    def get_gpus(self, rule: str, name: str) -> int:
        """Return the number of GPUs of a job; `name` is one of its points."""
        if self.experiment.model.device != "cuda" or rule not in GPU_RULES:
            return 0
        point = self.points.get(name)
        if rule in TRAINER_RULES and point:
            return point.controls.gpus
        if rule == "prune" and not self._pruning_task:
            return 0
        base = self.get_base(name)
        return resources.get_evaluation_gpus(base.checkpoint, base.model, self.experiment)

    def get_base(self, name: str) -> Base:
        """Return the model of a point or of a baseline."""
        return self.costs[name].base

    @cached_property
    def sizes(self) -> Mapping[str, TaskSize]:
        """The sizes of the tasks, by name."""
        return self._first.tasks

    @cached_property
    def device_name(self) -> str:
        """The name of the device that is planned for."""
        return self._first.device_name

    @property
    def _validation(self) -> TaskSize | None:
        """The size of the task that chooses the epoch of each training, if one does."""
        return self._first.validation if self.experiment.evaluation.validation_task else None

    @property
    def _pruning_task(self) -> TaskSize | None:
        """The size of the task by whose scores trainings stop, if one is."""
        return self._first.validation if self.experiment.prune and self.experiment.prune.task else None

    @cached_property
    def shares(self) -> Mapping[str, Sequence[float]]:
        """The share of each part of a training that will be trained, by point, if all settings are alike."""
        return expect_shares(self.points, self.experiment.prune) if self.experiment.prune else {}

    def list_parts(self, point: Point) -> list[tuple[int, int]]:
        """Return the parts of a training as pairs of epochs: that after which it begins, and its last. It has one
        without `prune`."""
        ends = [*self.experiment.rungs, point.controls.epochs]
        return list(zip([0, *ends], ends, strict=False))

    def list_deciding(self) -> list[str]:
        """Return the points whose trainings a task scores, if `prune` is by a task."""
        return [name for name, point in self.points.items() if point.is_trained] if self._pruning_task else []

    def expect_share(self, point: Point) -> float:
        """Return the share of a training's steps that will be made, if all settings are alike."""
        parts = zip(self.list_parts(point), self.shares.get(point.name, [1.0]), strict=True)
        return sum(share * (end - begin) for (begin, end), share in parts) / point.controls.epochs

    @property
    def _first(self) -> Costs:
        return next(iter(self.costs.values()))

    def is_counted(self, rule: str) -> bool:
        """Whether the workload behind a rule's time was counted, not guessed."""
        return all(costs.is_counted(rule) for costs in self.costs.values())

    def get_model_bytes(self, name: str) -> int:
        """Return the bytes of the full model of a point."""
        return self.get_base(name).folder_bytes

    def _get_merged_bytes(self, name: str) -> int:
        """Return the bytes of a point's merged model in the results' file system."""
        return 0 if self.experiment.evaluation.merged_models_in else self.get_model_bytes(name)

    def get_point(self, name: str) -> Point | Baseline:
        """Return a point or a baseline."""
        return self.points[name] if name in self.points else self.baselines[name]

    def _get_log_bytes(self, point: Point | Baseline) -> int:
        """Return the bytes of the logs of a point or a baseline."""
        if not self._is_evaluated(point):
            return 0
        sizes = {
            name: self.log_bytes.get(name, LOG_BYTES + size.samples * SAMPLE_BYTES) for name, size in self.sizes.items()
        }
        return sum(sizes[name] for name in list_tasks(sizes, point))

    @cached_property
    def _takers(self) -> Counter[str]:
        """The number of points that take an adapter from each training, by the point that owns the training."""
        return Counter(point.trained_by or name for name, point in self.points.items() if not point.adapter)

    def _is_evaluated(self, point: Point | Baseline) -> bool:
        return self._evaluation and (isinstance(point, Baseline) or point.is_evaluated)

    def get_adapter_bytes(self, point: Point) -> int:
        """Return the bytes of a point's adapter weights: computed, or measured for an existing adapter."""
        if point.adapter:
            return Path(point.adapter, ADAPTER_WEIGHTS).stat().st_size
        base = self.get_base(point.name)
        return get_adapter_size(base.checkpoint, point.controls, base.model.dtype)

    def _get_adapter_folder_bytes(self, point: Point) -> int:
        """Return the bytes of an adapter with its tokenizer."""
        return self.get_adapter_bytes(point) + self.get_base(point.name).tokenizer_bytes

    def _get_state_bytes(self, point: Point) -> int:
        """Return the bytes of the saved states of a point's training."""
        base = self.get_base(point.name)
        return resources.count_state_bytes(base.checkpoint, point.controls, base.model, point.trainer)

    def _get_training(self, point: Point) -> Training:
        return self.costs[point.name].get_training(point.controls, point.data)

    def get_kept_bytes(self, point: Point | Baseline, mode: str) -> int:
        """Return the bytes that a point keeps in a mode, or a baseline."""
        if isinstance(point, Baseline):
            return self._get_log_bytes(point) + SMALL_FILES
        model = self.get_model_bytes(point.name) if mode == "A" else 0
        return self._get_adapter_folder_bytes(point) + model + self._get_log_bytes(point) + self._get_small_bytes(point)

    def _get_small_bytes(self, point: Point) -> int:
        return SMALL_FILES + (0 if point.adapter else LOG_ROW * self._get_training(point).steps)

    def plan_all(self, mode: str | None = None) -> SweepPlan:
        """Plan the whole sweep from scratch: all points in `mode`, or each point in its own mode."""
        modes = {name: mode or point.mode for name, point in self.points.items()}
        direct = [point for name, point in self.points.items() if modes[name] == "B2" and self._is_evaluated(point)]
        batches = []
        for alike in group_alike(direct):
            own = with_own_tasks(self.experiment.evaluation, list(self.sizes), self.points[alike[0]])
            base = self.get_base(alike[0])
            size = resources.get_adapters_per_job(base.checkpoint, base.model, own)
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        jobs = self._make_jobs(modes, batches)
        counts = {
            "configure": sum(point.is_trained for point in self.points.values()),
            "take": sum(not point.adapter for point in self.points.values()),
            "publish": len(direct),
            "cleanup": len(modes) + len(self.baselines),
            **dict.fromkeys(("read_samples", "collect", "report"), 1),
        }
        return self._sum_up(jobs, {**Counter(job.rule for job in jobs), **counts})

    def plan_remaining(self, wanted: Collection[tuple[str, str]], batches: Mapping[str, Sequence[str]]) -> SweepPlan:
        """Plan the remaining jobs: pairs of a rule and the name of a point or a batch."""
        return self._sum_up(list(self.list_rest(wanted, batches).values()), Counter(rule for rule, _ in wanted))

    def list_rest(
        self, wanted: Collection[tuple[str, str]], batches: Mapping[str, Sequence[str]]
    ) -> dict[tuple[str, str], PlannedJob]:
        """Return the remaining jobs that take time, by rule and name; each follows the jobs that it waits for."""
        modes = {name: point.mode for name, point in self.points.items()}
        named = {tuple(members): name for name, members in batches.items()}
        jobs = self._make_jobs(modes, list(batches.values()))
        kept: dict[tuple[str, str], PlannedJob] = {}
        moved: dict[int, int] = {}
        for index, job in enumerate(jobs):
            name = named[job.points] if job.rule == "evaluate_adapters" else job.name or job.points[0]
            if (job.rule, name) not in wanted:
                continue
            moved[index] = len(kept)
            after = tuple(moved[i] for i in job.after if i in moved)
            # What earlier jobs left is on disk already: it is no part of what the rest will need.
            left = job.left if job.left > 0 or after else 0
            if self.experiment.rungs and left < 0:
                parts = (kept.get(("train_part", get_part_name(name, rung))) for rung in self.experiment.rungs)
                left = -sum(part.left for part in parts if part)
            kept[job.rule, name] = replace(job, after=after, left=left)
        return kept

    def plan_points(self, done: Collection[str]) -> list[PointPlan]:
        """Return the figures of every baseline and point; `done` are the names of the finished ones."""
        temporary: dict[str, int] = {}
        written: dict[str, int] = {}
        own_batches = [[name] for name, p in self.points.items() if p.mode == "B2" and self._is_evaluated(p)]
        for job in self._make_jobs({name: point.mode for name, point in self.points.items()}, own_batches):
            here = job.temporary + (job.merged if job.rule == "merge" else 0)
            temporary[job.points[0]] = max(temporary.get(job.points[0], 0), here)
            written[job.points[0]] = written.get(job.points[0], 0) + self._get_written_bytes(job)
        rows = []
        for name in (*self.baselines, *self.points):
            point = self.get_point(name)
            mode = point.mode if isinstance(point, Point) else "base"
            training = self._get_training(point) if isinstance(point, Point) and point.is_trained else None
            seconds = {rule: self.costs[name].estimate(rule, [point]) for rule in self._get_rules(point, mode)}
            rows.append(
                PointPlan(
                    name=name,
                    mode=mode,
                    is_done=name in done,
                    steps=training.steps if training else 0,
                    tokens=training.tokens if training else 0,
                    kept_bytes=self.get_kept_bytes(point, mode),
                    kept_bytes_by_mode={
                        other: self.get_kept_bytes(point, other) for other in MODES if name in self.points
                    },
                    temporary_bytes=temporary.get(name, 0),
                    written_bytes=written.get(name, 0),
                    seconds=seconds,
                    gpu_hours=sum(self.get_gpus(rule, name) * taken for rule, taken in seconds.items()) / 3600,
                    mem_mb=max((self._get_memory(rule, name) for rule in seconds), default=0),
                )
            )
        return rows

    def _get_rules(self, point: Point | Baseline, mode: str) -> list[str]:
        is_trained = isinstance(point, Point) and point.is_trained
        is_evaluated = self._is_evaluated(point)
        return [
            rule
            for rule in get_timed_rules(mode)
            if (is_trained if rule in TRAINING_RULES else is_evaluated or rule not in TASK_RULES)
            if rule not in ("train_part", "prune", *(() if self._validation else ("choose_epoch",)))
        ]

    def _get_memory(self, rule: str, name: str) -> int:
        base, point = self.get_base(name), self.points.get(name)
        if rule == "prune" and not self._pruning_task:
            return 0
        if rule in TRAINER_RULES and point:
            return resources.train_mem_mb(base.checkpoint, point.controls, base.model, point.data)
        merge = resources.merge_mem_mb(base.checkpoint)
        evaluate = resources.evaluate_mem_mb(base.checkpoint, base.model)
        evaluate += resources.roles_mem_mb(self.experiment.evaluation)
        return {"adopt": 0, "merge": merge, "export": merge}.get(rule, evaluate)

    def _make_jobs(self, modes: Mapping[str, str], batches: Sequence[Sequence[str]]) -> list[PlannedJob]:
        """Return all jobs that take time; each follows the jobs that it waits for."""
        jobs: list[PlannedJob] = []
        trained: dict[str, int] = {}

        def add(rule: str, names: Sequence[str], **changes: Any) -> int:
            points = list(map(self.get_point, names))
            seconds = self.costs[names[0]].estimate(rule, points)
            jobs.append(PlannedJob(rule, tuple(names), seconds, **changes))
            return len(jobs) - 1

        for name, baseline in self.baselines.items():
            add("evaluate", [name], kept=self._get_log_bytes(baseline))
        decided = self._add_parts(jobs)
        # Points that own a training come first: other points wait for it.
        for name, mode in sorted(modes.items(), key=lambda item: bool(self.points[item[0]].trained_by)):
            point = self.points[name]
            before: tuple[int, ...] = ()
            if point.adapter:
                trained[name] = add("adopt", [name], kept=self._get_adapter_folder_bytes(point) + SMALL_FILES)
            elif point.trained_by:
                trained[name] = trained[point.trained_by]
            else:
                epochs = 2 * point.controls.epochs * self._get_adapter_folder_bytes(point)
                state = epochs + self._get_state_bytes(point)
                own = self._takers[name] * self._get_adapter_folder_bytes(point)
                small = self._takers[name] * self._get_small_bytes(point)
                # The points keep the adapters. The training holds copies if the file system has no hard links.
                undecided = epochs if self._validation else 0
                kept_state, left = (0, -self._get_left_bytes(point)) if self.experiment.rungs else (state, undecided)
                trained[name] = add("train", [name], kept=own + small, temporary=own + kept_state, left=left)
                if self.experiment.rungs:
                    jobs[-1] = replace(jobs[-1], seconds=self._estimate_part(point, -1), after=decided)
                if size := self._validation:
                    logs = point.controls.epochs * (LOG_BYTES + size.samples * SAMPLE_BYTES)
                    copy = self._get_adapter_folder_bytes(point)
                    after = (trained[name],)
                    trained[name] = add("choose_epoch", [name], after=after, temporary=logs + copy, left=-undecided)
            before = (trained[name],)
            if mode == "A":
                before = (add("export", [name], after=before, kept=self.get_model_bytes(name)),)
            if mode == "B2" or not self._is_evaluated(point):
                continue
            merged = self._get_merged_bytes(name) if mode == "B1" else 0
            if mode == "B1":
                before = (add("merge", [name], after=before, merged=merged),)
            kept, reads_merged = self._get_log_bytes(point), mode == "B1"
            add("evaluate", [name], after=before, kept=kept, reads_merged=reads_merged, merged=merged)
        for batch in batches if self._evaluation else ():
            add(
                "evaluate_adapters",
                batch,
                after=tuple(trained[name] for name in batch if name in trained),
                kept=sum(self._get_log_bytes(self.points[name]) for name in batch),
            )
        return jobs

    def _add_parts(self, jobs: list[PlannedJob]) -> tuple[int, ...]:
        """Add the parts of all trainings, and the decisions between them; return the index of the last decision."""
        decided: tuple[int, ...] = ()
        trained = [point for point in self.points.values() if point.is_trained]
        for index, after in enumerate(self.experiment.rungs if trained else ()):
            begin = len(jobs)
            for point in trained:
                adapter = self._get_adapter_folder_bytes(point)
                left = adapter if index else self._get_left_bytes(point) - (len(self.experiment.rungs) - 1) * adapter
                seconds = self._estimate_part(point, index)
                name = get_part_name(point.name, after)
                jobs.append(PlannedJob("train_part", (point.name,), seconds, decided, 0, left, left, name=name))
            names = tuple(point.name for point in trained)
            parts = tuple(range(begin, len(jobs)))
            jobs.append(
                PlannedJob("prune", names, self._estimate_decision(names, index), parts, name=get_rung_name(after))
            )
            decided = (len(jobs) - 1,)
        return decided

    def _get_left_bytes(self, point: Point) -> int:
        """Return the bytes that all parts of a training leave until its end: its state, and an adapter each."""
        copies = 2 * point.controls.epochs + len(self.experiment.rungs)
        return copies * self._get_adapter_folder_bytes(point) + self._get_state_bytes(point)

    def _estimate_part(self, point: Point, index: int) -> float:
        """Return the expected seconds of a part of a training, which is trained with a probability."""
        begin, end = self.list_parts(point)[index]
        rule = "train" if end == point.controls.epochs else "train_part"
        return self.costs[point.name].estimate_part(rule, point, begin, end) * self.shares[point.name][index]

    def _estimate_decision(self, names: Sequence[str], index: int) -> float:
        """Return the expected seconds of a decision: the scores of the trainings that are still in the race."""
        by_base: dict[Base, list[str]] = {}
        for name in names if self._pruning_task else ():
            by_base.setdefault(self.get_base(name), []).append(name)
        seconds = 0.0
        for members in by_base.values():
            racing = ceil(sum(self.shares[name][index] for name in members) - 1e-9)
            seconds += self.costs[members[0]].estimate("prune", [self.points[name] for name in members[:racing]])
        return seconds

    def _get_written_bytes(self, job: PlannedJob) -> int:
        return job.written + (self.get_model_bytes(job.points[0]) if job.rule == "merge" else 0)

    def simulate(self, jobs: Sequence[PlannedJob]) -> Timeline:
        """Simulate jobs of this sweep, as many at a time as the plan assumes."""
        return simulate(jobs, self.parallel, self.max_merged_models)

    def _sum_up(self, jobs: Sequence[PlannedJob], counts: Mapping[str, int]) -> SweepPlan:
        line = self.simulate(jobs)
        seconds: dict[str, float] = {}
        gpu_seconds: dict[str, float] = {}
        written, memory, steps, tokens = 0, 0, 0, 0
        for job in jobs:
            seconds[job.rule] = seconds.get(job.rule, 0.0) + job.seconds
            if job.rule in GPU_RULES:
                taken = self.get_gpus(job.rule, job.points[0]) * job.seconds
                gpu_seconds[job.rule] = gpu_seconds.get(job.rule, 0.0) + taken
            written += self._get_written_bytes(job)
            if job.rule == "train":
                point = self.points[job.points[0]]
                training, share = self._get_training(point), self.expect_share(point)
                steps, tokens = steps + round(share * training.steps), tokens + round(share * training.tokens)
            memory = max(memory, self._get_memory(job.rule, job.points[0]))
        return SweepPlan(
            kept_bytes=line.kept,
            temporary_bytes=line.peak_temporary,
            written_bytes=written,
            jobs={rule: number for rule, number in counts.items() if number},
            seconds=seconds,
            steps=steps,
            tokens=tokens,
            gpu_seconds=gpu_seconds,
            wall_seconds=line.seconds,
            mem_mb=memory,
            timeline=line,
        )
