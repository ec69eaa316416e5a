"""Keep the accounts of a run in progress: attempts of jobs, samples of disk usage, the ledger and the status."""

import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lorasweep.experiment.points import Baseline, Point
from lorasweep.layout import JOB_RECORDS, LEDGER, RECORD, RUNS, STORAGE, TRAININGS, get_part_file, split_part_name
from lorasweep.planning.forecast import WHOLE, Forecast
from lorasweep.planning.history import DONE, JobRecord, append_records, read_records
from lorasweep.running import view
from lorasweep.running.events import Attempt, FailureRecorder, JobWatcher, Running, measure_temporary
from lorasweep.running.ledger import (
    RunRecord,
    describe_ledger,
    make_ledger,
    read_kept_bytes,
    read_runs,
    record_run,
    write_ledger,
)
from lorasweep.running.outages import OutageWatcher, PendingReasons
from lorasweep.running.progress import StepWatch, TimeLeft, count_stages, estimate_left
from lorasweep.running.status import (
    BADLY,
    INTERRUPTED,
    MOST_LISTED,
    STATUS,
    WELL,
    FailureStatus,
    JobStatus,
    RunStatus,
    get_training_log,
    read_step,
    write_status,
)
from lorasweep.running.status_view import describe_wait, is_queued
from lorasweep.running.storage_log import StorageLog, take_sample
from lorasweep.stages import TIMED_RULES, TRAINER_RULES
from lorasweep.util.files import find_record
from lorasweep.util.formats import format_seconds
from lorasweep.util.slurm import read_elapsed

SAMPLE_SECONDS = 5.0
"""Minimum time between two samples of disk usage."""

LOOKING_SHARE = 0.05
"""Maximum share of time spent on sampling. On a slow file system, samples are taken less often."""

UPDATE_SECONDS = 60.0
"""Minimum time between two updates of the ledger."""


class Accounts:
    """The accounts of one run. Call `start` and `stop` once each."""

    def __init__(
        self,
        forecast: Forecast,
        watcher: JobWatcher,
        failures: FailureRecorder,
        outages: OutageWatcher | None = None,
    ) -> None:
        self._forecast = forecast
        self._watcher = watcher
        self._failures = failures
        self._began = datetime.now(UTC).isoformat(timespec="seconds")
        self._started = time.monotonic()
        self._written = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._storage = StorageLog(forecast.results / STORAGE)
        self._kept: dict[str, int] = {}
        self._looked_at = 0
        self._steps = StepWatch()
        self._outages = outages
        self._reasons = PendingReasons()
        self._trouble: OSError | None = None
        self.peak_temporary_bytes = 0

    def start(self) -> None:
        """Start the thread that samples disk usage and updates status and ledger."""
        self._thread.start()

    def stop(self, is_well: bool) -> str:
        """Write the final ledger and status; return the ledger's totals as text, or why it could not be written."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._watcher.end_all()
        text = self._update()
        self._look(SAMPLE_SECONDS, WELL if is_well else BADLY if self._failures.failures else INTERRUPTED)
        if self._trouble:
            text += f"\n{STATUS} or {STORAGE} could not always be written: {self._trouble}"
        return text

    def _run(self) -> None:
        done = [point.name for point in self._forecast.points if point.is_done]
        self._kept = {name: read_kept_bytes(self._forecast.results / name) for name in done}
        updated = time.monotonic()
        wait = SAMPLE_SECONDS
        while True:
            began = time.monotonic()
            self._look(wait)
            wait = max(SAMPLE_SECONDS, (time.monotonic() - began) / LOOKING_SHARE)
            if self._ended.wait(wait):
                return
            if time.monotonic() - updated > UPDATE_SECONDS:
                self._update()
                updated = time.monotonic()

    def _look(self, interval: float, outcome: str = "") -> None:
        """Sample disk usage and running jobs, and write the storage log and the status."""
        temporary = measure_temporary(self._forecast.results, self._list_unfinished())
        self.peak_temporary_bytes = max(self.peak_temporary_bytes, temporary)
        for attempt in self._watcher.attempts[self._looked_at :]:
            self._looked_at += 1
            if attempt.rule == "cleanup" and attempt.state == DONE:
                self._kept[attempt.name] = read_kept_bytes(self._forecast.results / attempt.name)
        try:
            self._storage.add(take_sample(sum(self._kept.values()), temporary), is_last=bool(outcome))
            status = self._make_status(temporary, interval, outcome)
            timed = [job for job in status.running if job.rule in TIMED_RULES]
            view.show(
                (view.get_label(job.rule, job.name), describe_progress(self._forecast.results, job)) for job in timed
            )
            write_status(status, self._forecast.results / STATUS)
        except OSError as error:  # a full disk must not end the accounts of the run
            self._trouble = error

    def _list_unfinished(self) -> set[str]:
        """Return the folders of unfinished points and of their trainings, relative to the results."""
        points, unfinished = self._forecast.planner.points, self._forecast.unfinished
        trainings = {points[name].training for name in unfinished if name in points}
        return unfinished | {f"{TRAININGS}/{training}" for training in trainings if training}

    def _make_status(self, temporary: int, interval: float, outcome: str) -> RunStatus:
        forecast = self._forecast
        # Running jobs before attempts: a job that ends in between then counts as done, and is not lost.
        running = self._watcher.list_running()
        attempts = list(self._watcher.attempts)
        again = {(job.rule, split_part_name(job.name)[0]) for job in running}
        failures = [f for f in self._failures.failures if (f.rule, f.point) not in again]
        left = estimate_left(forecast, attempts, running, dict(self._look_at_trainings(running)))
        outage = self._outages.line if self._outages and not outcome else ""
        on_slurm = {job.slurm_job for job in running if job.slurm_job}
        reasons = self._reasons.get(on_slurm) if on_slurm and not outcome and not outage else {}
        return RunStatus(
            host=socket.gethostname(),
            pid=os.getpid(),
            began=self._began,
            updated=datetime.now(UTC).isoformat(timespec="seconds"),
            interval_seconds=round(interval, 1),
            outcome=outcome,
            outage=outage,
            points=count_stages(forecast, attempts, running, {failure.point for failure in failures}),
            jobs=len(forecast.wanted),
            jobs_done=len({(a.rule, a.name) for a in attempts if a.state == DONE} & set(forecast.wanted)),
            running=[self._describe(job, left, reasons) for job in running[:MOST_LISTED]],
            running_jobs=len(running),
            failures=[
                FailureStatus(rule=f.rule, point=f.point, reason=f.reason, log=str(f.log))
                for f in failures[-MOST_LISTED:]
            ],
            failed_jobs=len(failures),
            kept_bytes=sum(self._kept.values()),
            planned_kept_bytes=sum(point.kept_bytes for point in forecast.points),
            temporary_bytes=temporary,
            peak_temporary_bytes=self.peak_temporary_bytes,
            seconds_left=None if outcome or left.seconds is None else round(left.seconds, 1),
            planned_wall_seconds=round(forecast.remaining.wall_seconds, 1),
            error=None if left.error is None else round(left.error, 3),
        )

    def _look_at_trainings(self, running: Iterable[Running]) -> Iterator[tuple[str, float]]:
        for job in running:
            steps = self._get_steps(job)
            step = read_step(self._forecast.results / self._get_log(job)) if steps else None
            if steps and step:
                left = self._steps.estimate_left(job.name, step.step, steps, time.monotonic())
                if left is not None:
                    yield job.name, left

    def _get_steps(self, job: Running) -> int | None:
        planner = self._forecast.planner
        point, after = self._find_training(job)
        if point is None:
            return None
        steps = planner.costs[point.name].get_training(point.controls, point.data).steps
        return steps * after // point.controls.epochs if after else steps

    def _get_log(self, job: Running) -> str:
        point, _ = self._find_training(job)
        return get_training_log(point.training) if point and point.training else ""

    def _find_training(self, job: Running) -> tuple[Point | None, int | None]:
        """Return the point that a job trains, and the epoch after which the job ends, if that is not the last."""
        name, after = split_part_name(job.name) if job.rule == "train_part" else (job.name, None)
        points = self._forecast.planner.points if job.rule in TRAINER_RULES else {}
        return points.get(name), after

    def _describe(self, job: Running, left: TimeLeft, reasons: Mapping[str, str]) -> JobStatus:
        return JobStatus(
            rule=job.rule,
            name=job.name,
            points=len(self._forecast.get_members(job.rule, job.name)),
            since=(datetime.now(UTC) - timedelta(seconds=job.seconds)).isoformat(timespec="seconds"),
            slurm_job=job.slurm_job,
            job_log=os.path.relpath(job.log, self._forecast.results) if job.log else "",
            steps=self._get_steps(job),
            log=self._get_log(job),
            seconds_left=left.jobs.get((job.rule, job.name)),
            reason=reasons.get(job.slurm_job or "", ""),
        )

    def _update(self) -> str:
        try:
            return self._write()
        except OSError as error:  # a full disk must not hide how the run went
            return f"The ledger could not be written: {error}"

    def _write(self) -> str:
        forecast = self._forecast
        attempts = self._watcher.attempts[self._written :]
        seconds = read_elapsed(attempt.slurm_job for attempt in attempts if attempt.slurm_job)
        append_records(make_records(forecast, self._began, attempts, seconds), Path(forecast.results, JOB_RECORDS))
        self._written += len(attempts)
        return settle(
            forecast,
            RunRecord(
                began=self._began,
                folder=str(forecast.results.resolve()),
                wall_seconds=round(time.monotonic() - self._started, 3),
                peak_temporary_bytes=self.peak_temporary_bytes,
                planned_wall_seconds=round(forecast.remaining.wall_seconds, 3),
                planned_temporary_bytes=forecast.remaining.temporary_bytes,
            ),
        )


def describe_progress(results: Path, job: JobStatus) -> str:
    """Return how far a running job is, such as `training, step 20 of 38, loss 0.31, 1 min left`."""
    parts = [view.get_words(job.rule)]
    if is_queued(results, job):
        return f"{parts[0]}: {describe_wait(job.reason)}"
    if step := read_step(results / job.log) if job.log else None:
        parts += [f"step {step.step}" + (f" of {job.steps}" if job.steps else ""), f"loss {step.loss:.3g}"]
    if job.points > 1:
        parts.append(f"{job.points} points")
    if job.seconds_left is not None:
        parts.append(f"{format_seconds(job.seconds_left)} left")
    return ", ".join(parts)


def make_records(
    forecast: Forecast, run: str, attempts: Iterable[Attempt], slurm_seconds: Mapping[str, float]
) -> list[JobRecord]:
    """Return the records of a run's attempts for later plans. Rules whose jobs take no notable time are left out.

    `slurm_seconds` are the elapsed seconds from SLURM's accounting, by job id.
    """
    planner, records = forecast.planner, []
    for attempt in attempts:
        members = forecast.get_members(attempt.rule, attempt.name)
        if attempt.rule == "prune":
            members = planner.list_deciding()
        # A point that fails in a batch is recorded as a failure of its `publish`.
        is_kept = attempt.rule in TIMED_RULES or (attempt.rule == "publish" and attempt.state != DONE)
        if not is_kept or not members:
            continue
        points = list(map(planner.get_point, members))
        costs = planner.costs[members[0]]
        accounted = slurm_seconds.get(attempt.slurm_job or "")
        is_planned = attempt.rule in TIMED_RULES
        share = _get_trained_share(forecast, attempt, points[0])
        # Durations modelled from guessed counts must not calibrate later plans, nor those of unknown work: a decision
        # scores only what has no score yet.
        is_modelled = is_planned and costs.is_counted(attempt.rule) and share > 0 and attempt.rule != "prune"
        records.append(
            JobRecord(
                run=run,
                rule=attempt.rule,
                name=attempt.name,
                members=";".join(members),
                state=attempt.state,
                seconds=round(attempt.seconds if accounted is None else accounted, 3),
                is_queued=attempt.slurm_job is not None and accounted is None,
                gpus=planner.get_gpus(attempt.rule, members[0]),
                planned_seconds=round(_get_planned(forecast, attempt, points), 3) if is_planned else 0,
                modelled_seconds=round(costs.model_share(attempt.rule, points, share), 3) if is_modelled else 0,
                device=costs.device_name,
                base=costs.base.fingerprint,
            )
        )
    return records


def _get_planned(forecast: Forecast, attempt: Attempt, points: Sequence[Point | Baseline]) -> float:
    if forecast.experiment.prune and (job := forecast.jobs.get((attempt.rule, attempt.name))):
        return job.seconds
    return forecast.planner.costs[points[0].name].estimate(attempt.rule, points)


def _get_trained_share(forecast: Forecast, attempt: Attempt, point: Point | Baseline) -> float:
    """Return the share of a finished training's epochs that a job made; 1 unless it stopped early, or has parts, and 0
    if `prune` had stopped it, or it diverged."""
    is_part = attempt.rule == "train_part"
    if not (is_part or attempt.rule == "train") or attempt.state != DONE or not isinstance(point, Point):
        return 1.0
    record = find_record(forecast.results / TRAININGS / str(point.training) / "adapter" / RECORD)
    if forecast.experiment.prune:
        after = split_part_name(attempt.name)[1] if is_part else point.controls.epochs
        made = find_record(get_part_file(forecast.results, str(point.training), after or 0)) if is_part else record
        if made.keys() & {"stopped", "diverged", "pruned"}:
            return 0.0
        begin = next(begin for begin, end in forecast.planner.list_parts(point) if end == after)
        return ((after or 0) - begin) / point.controls.epochs
    epochs: int = record.get("best_epoch", {}).get("epochs_trained", point.controls.epochs)
    return epochs / point.controls.epochs


def settle(forecast: Forecast, run: RunRecord) -> str:
    """Write the run's record and the ledger; return the ledger's totals as text."""
    results = forecast.results
    record_run(run, results / RUNS)
    full = {name: forecast.planner.get_model_bytes(name) for name in forecast.planner.points}
    records, runs = read_records(results / JOB_RECORDS), read_runs(results / RUNS)
    trainings = {name: point.training for name, point in forecast.planner.points.items() if point.training}
    rows = make_ledger(results, forecast.points, records, runs, full, forecast.whole[WHOLE], trainings)
    write_ledger(rows, results / LEDGER)
    return describe_ledger(rows)
