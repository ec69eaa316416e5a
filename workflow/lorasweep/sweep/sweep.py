"""The sweep as one object: the points, jobs and files that follow from an experiment, its model and its results.

Independent of Snakemake. Used by the rules, the plan, the run and the commands.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.architecture import has_environment
from lorasweep.checkpoints.chat_template import find_given_template
from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.checkpoints.shapes import read_shape
from lorasweep.evaluation.spec import EvaluationSpec, Mode, make_evaluation_spec
from lorasweep.evaluation.state import is_evaluated
from lorasweep.experiment.devices import check_device
from lorasweep.experiment.loading import load_experiment, read_overrides
from lorasweep.experiment.points import (
    Baseline,
    Point,
    get_baselines,
    get_evaluated_model,
    get_points,
    recall_points,
)
from lorasweep.experiment.pruning import check_pruning, get_rivals_key, get_setting_key
from lorasweep.experiment.roles import check_roles
from lorasweep.experiment.sections import (
    BASE_KEY,
    DATA_KEYS,
    NAME_PATTERN,
    Base,
    Data,
    Evaluation,
    Experiment,
    Model,
)
from lorasweep.experiment.task_choice import choose_tasks, list_tasks, with_own_tasks
from lorasweep.experiment.tasks import TaskEntry, get_pruning_task, get_tasks, get_validation_task
from lorasweep.experiment.training_data import check_data
from lorasweep.hub.references import check_fetched, read_revisions, with_local_paths
from lorasweep.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BATCHES,
    LAST_EPOCH,
    MERGED,
    METRICS,
    POINTS,
    PRUNE,
    RECORD,
    REVISIONS,
    STATE,
    TRAININGS,
    get_decision_file,
    get_epoch_folder,
    get_part_name,
    get_rung_name,
    split_part_name,
)
from lorasweep.stages import TASK_RULES, TRAINER_RULES, TRAINING_RULES, get_stages
from lorasweep.sweep import resources
from lorasweep.sweep.batches import assign_batches, group_alike, read_batches
from lorasweep.sweep.checks import (
    check_inputs,
    check_metric_loggers,
    check_registered_tasks,
    check_role_models,
    check_trainer,
    find_missing_model,
    find_trainer,
    has_configuration,
    has_weights,
    make_recipe,
)
from lorasweep.sweep.pruning import Contender, Race
from lorasweep.sweep.trainings import is_trained, share_trainings
from lorasweep.trainers import get_trainer
from lorasweep.trainers.identity import head_recipe
from lorasweep.trainers.rungs import find_stop, has_nothing_to_train
from lorasweep.util.errors import InputError, naming_file, naming_key

ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, RECORD)
"""The files of an adapter that rules declare. Its tokenizer is in the same folder."""

RESULTS = Path("results")
"""The folder of results in the working directory; it has one folder per experiment."""

_ANY_TRAINING = "<training>"
"""Placeholder in a recipe for the training's name, which is derived from the recipe."""

_NEEDS_ENVIRONMENT = "Without weights it needs the evaluation environment: run 'make install'."

_ENDED = {"mem_mb": 1000, "runtime": 10, "disk_mb": 500}
"""Requests of a training's job that has only to publish what is there, or to say that the training was stopped."""

_DECIDING = {"mem_mb": 500, "runtime": 10}
"""Requests of a decision by the validation loss."""

MISSING_MODEL_AMOUNT = 1000
"""The value of every resource request in a dry run without the base model."""


@dataclass(frozen=True)
class Sweep:
    """An experiment and everything derived from it. Created by `load`; slow properties are computed on first use."""

    experiment: Experiment
    """The experiment, with local paths in place of hub references."""
    as_written: Experiment
    """The experiment as in its file."""
    source: str
    """The experiment file's name in messages."""
    named_points: Mapping[str, Point]
    """Points by name, as planned by `get_points` or, in a job, as recorded. `points` also has their trainings."""
    baselines: Mapping[str, Baseline]
    """The models that are evaluated without an adapter, by name."""
    tasks: Sequence[TaskEntry]
    validation: TaskEntry | None = None
    """The task that chooses the epoch of each training, if one does."""
    pruning_task: TaskEntry | None = None
    """The task by whose scores trainings stop, if one is."""
    is_job: bool = False
    """Whether this process runs a job of a sweep that another process planned."""
    shared_gpus: int | None = None
    """Number of GPUs that all jobs on one machine share (`--resources gpu=N`); `None`: each job has its own."""
    _recipes: dict[str, str] = field(default_factory=dict, repr=False)
    _identities: dict[str, str] = field(default_factory=dict, repr=False)
    _specs: dict[Any, EvaluationSpec] = field(default_factory=dict, repr=False)
    _samples: dict[Data, int] = field(default_factory=dict, repr=False)
    _checkpoints: dict[Model, Checkpoint | None] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        config: Mapping[str, Any],
        source: str,
        *,
        overrides: Mapping[str, Any] | None = None,
        is_job: bool = False,
        shared_gpus: int | None = None,
    ) -> "Sweep":
        """Load a sweep from an experiment's configuration; `overrides` are the values set on the command line.

        Raises:
            InputError: the file, one of its task files, or a record of the experiment is invalid.
        """
        as_written = load_experiment(read_overrides(config, overrides or {}), source)
        results = RESULTS / as_written.experiment.name
        with naming_file(source):
            find_trainer(as_written.trainer)
            for name, model in as_written.models.items():
                with naming_key(f"models.{name}.trainer"):
                    get_trainer(model.trainer or as_written.trainer)
            tasks = get_tasks(as_written.evaluation.tasks)
            validation = get_validation_task(as_written.evaluation, tasks)
            pruning_task = get_pruning_task(as_written.prune, tasks)
            check_roles(as_written.evaluation)
            revisions = read_revisions(results / REVISIONS)
            check_fetched(as_written, revisions, source)
            experiment = with_local_paths(as_written, revisions)
            registry = results / POINTS
            # The record has the points' tasks.
            points = (
                recall_points(experiment, registry)
                if is_job
                else choose_tasks(experiment, tasks, get_points(experiment, registry))
            )
            baselines = get_baselines(experiment, points)
            for trainer in sorted({point.trainer for point in points.values() if not point.adapter}):
                check_trainer(trainer, experiment)
            check_pruning(experiment, points.values())
        choosing = (validation, pruning_task)
        return cls(experiment, as_written, source, points, baselines, tasks, *choosing, is_job, shared_gpus)

    def check(self, *, asks_inspect: bool) -> None:
        """Check everything that a run needs from outside the experiment file, except the base model's presence.

        For the latter, see `missing_model`. `asks_inspect`: whether the environments are installed, so that registered
        tasks and metric loggers can be looked up there.

        Raises:
            InputError: a check failed; the message has the file, the key, the value and what is expected.
        """
        with naming_file(self.source):
            check_device(self.experiment)
            check_inputs(self.experiment, self.named_points.values(), self.tasks, self.results)
            self._check_gpus()
            if asks_inspect:
                run = str(Path(__file__).parents[3] / "scripts/run")
                check_registered_tasks(self.tasks, [run, self.evaluation_stage])
                for entry in filter(None, (self.validation, self.pruning_task)):
                    check_registered_tasks([entry], [run, self.evaluation_stage], entry.place)
                check_role_models(self.experiment.evaluation, [run, self.evaluation_stage])
                trainers = sorted({point.trainer for point in self.named_points.values() if point.is_trained})
                stages = {name: [run, get_trainer(name).STAGE] for name in trainers}
                check_metric_loggers(self.experiment.training.metric_loggers, stages)
        for point in self.named_points.values() if not self.missing_model else ():
            if not point.adapter:
                self.make_recipe(point)

    def _check_gpus(self) -> None:
        for name in self._asked if self.experiment.evaluation.backend == "vllm" else ():
            model, gpus = self.get_model(name), self.get_model_gpus(name)
            base = self.get_checkpoint(model)
            if base and not resources.can_split(base, gpus):
                raise InputError(
                    f"evaluation.gpus: {gpus} is invalid: vLLM cannot split the heads of {model.path!r} over so many",
                    ", ".join(str(fewer) for fewer in range(1, gpus) if resources.can_split(base, fewer)),
                )
        if not self.is_on_gpus or self.shared_gpus is None:
            return
        for key, gpus in (("controls.gpus", self._most_train_gpus), ("evaluation.gpus", self._most_evaluation_gpus)):
            if gpus > self.shared_gpus:
                raise InputError(
                    f"{key}: {gpus} is invalid with --resources gpu={self.shared_gpus}", f"at most {self.shared_gpus}"
                )
        if self.most_gpus < self.shared_gpus:
            raise InputError(
                f"gpu={self.shared_gpus}: jobs on one machine take its first GPUs, so that concurrent jobs would share "
                "them",
                f"gpu={self.most_gpus}, or one run per GPU, each with its own CUDA_VISIBLE_DEVICES and directory",
                file="--resources",
            )

    # The experiment's folder and its models.

    @property
    def results(self) -> Path:
        """The experiment's folder, relative to the working directory."""
        return RESULTS / self.experiment.experiment.name

    def get_model(self, name: str) -> Model:
        """Return the model on which a point, a training, a batch or a baseline is evaluated, without an adapter."""
        if name in self.baselines:
            return self.baselines[name].model
        if name not in self.named_points:
            name = self.trainings[name] if name in self.trainings else self.batches[name][0]
        return get_evaluated_model(self.experiment, self.named_points[name].model)

    def get_model_path(self, name: str) -> str:
        """Return the path of `get_model`."""
        return self.get_model(name).path

    def get_dtype(self, name: str) -> str:
        """Return the precision of `get_model`."""
        return self.get_model(name).dtype

    @cached_property
    def _base_models(self) -> Sequence[Model]:
        """The base models that adapters are evaluated on."""
        names = [*self.named_points, *(name for name, baseline in self.baselines.items() if baseline.is_base)]
        return list(dict.fromkeys(map(self.get_model, names)))

    @cached_property
    def missing_model(self) -> str | None:
        """A message about a missing base model; `None` if all exist."""
        missing = find_missing_model(self.experiment, self.named_points.values(), self.source)
        return missing and f"{self.source}: {missing}"

    @cached_property
    def missing_sizes(self) -> str:
        """Why the sizes of a base model cannot be known; empty if they can."""
        absent = [Path(model.path) for model in self._base_models if not has_weights(Path(model.path))]
        for path in absent:
            if not has_configuration(path):
                return f"{path}/config.json is missing. The plan needs no other file of the model."
        return "" if not absent or has_environment() else _NEEDS_ENVIRONMENT

    def get_checkpoint(self, model: Model) -> Checkpoint | None:
        """Return a model's checkpoint; without weights, tensor shapes from its configuration; `None` without that."""
        if model not in self._checkpoints:
            path = Path(model.path)
            if has_weights(path):
                self._checkpoints[model] = read_checkpoint(path)
            else:
                can_read = has_configuration(path) and has_environment()
                self._checkpoints[model] = read_shape(path) if can_read else None
        return self._checkpoints[model]

    def get_fingerprint(self, name: str) -> str:
        """Return the fingerprint of `get_model`; while a base model is missing, the message `missing_model`."""
        return self.missing_model or read_checkpoint(Path(self.get_model_path(name))).fingerprint

    def count_samples(self, point: str) -> int:
        """Return the number of training samples of a point."""
        data = self.points[point].data
        if data not in self._samples:
            with naming_file(self.source):
                self._samples[data] = check_data(data).samples
        return self._samples[data]

    # Points, trainings and evaluations.

    @cached_property
    def points(self) -> Mapping[str, Point]:
        """Points by name, with their trainings.

        Raises:
            InputError: the trainer cannot train one of the points.
        """
        if self.is_job:
            return self.named_points
        return share_trainings(self.named_points, self.identify_training, self.results)

    @cached_property
    def trained(self) -> Mapping[str, tuple[int, ...]]:
        """The points that own a training, each with the epochs before the last whose adapters the training keeps."""
        epochs: dict[str, set[int]] = {point.name: set() for point in self.points.values() if point.is_trained}
        for point in self.points.values():
            if point.epoch and point.trained_by:
                epochs[point.trained_by].add(point.epoch)
        return {name: tuple(sorted(kept)) for name, kept in epochs.items()}

    @cached_property
    def trainings(self) -> Mapping[str, str]:
        """The name of the owning point of each training, by the training's name."""
        return {str(self.points[point].training): point for point in self.trained}

    @cached_property
    def trainers(self) -> Mapping[str, str]:
        """The environment of each trainer, by the trainer's name."""
        return {name: get_trainer(name).STAGE for name in sorted({self.points[p].trainer for p in self.trained})}

    def get_trainer(self, training: str) -> str:
        """Return the name of the trainer of a training or of a part."""
        return self.points[self.job_owners[training]].trainer

    def get_training_stage(self, training: str) -> str:
        """Return the name of the environment of a training."""
        return self.trainers[self.get_trainer(training)]

    @cached_property
    def evaluated(self) -> Mapping[str, Mode]:
        """The mode of each evaluated point and baseline, by name. A baseline's mode is `base`."""
        if not self.experiment.evaluation.enabled:
            return {}
        modes: dict[str, Mode] = {point.name: point.mode for point in self.points.values() if point.is_evaluated}
        modes.update(dict.fromkeys(self.baselines, "base"))
        return modes

    @property
    def _asked(self) -> Sequence[str]:
        """Names of the points and baselines whose models are asked; the first of them for those of epochs."""
        return [*self.evaluated, *(self.trained if self.validation or self.pruning_task else ())]

    @cached_property
    def folders(self) -> Sequence[str]:
        """Names of the points and baselines: each has a folder in the results."""
        return tuple(dict.fromkeys([*self.points, *self.evaluated]))

    @cached_property
    def variables(self) -> Sequence[str]:
        """The keys that vary between points."""
        swept = sorted({key for point in self.points.values() for key in point.swept})
        return [*swept, *(["epoch"] if any(point.epoch for point in self.points.values()) else [])]

    @property
    def deciding_tasks(self) -> Sequence[str]:
        """The tasks' names in the experiment's order, but `report.task` first."""
        names = [task.name for task in self.tasks] if self.experiment.evaluation.enabled else []
        return sorted(names, key=lambda name: name != self.experiment.report.task)

    @property
    def all_tasks(self) -> Sequence[TaskEntry]:
        """The tasks on which points are evaluated, and the one that chooses epochs or points, if one does."""
        return [*self.tasks, *([self.choosing_task] if self.choosing_task else [])]

    @property
    def choosing_task(self) -> TaskEntry | None:
        """The task that chooses the epoch of each training, or the trainings that go on, if one does."""
        return self.validation or self.pruning_task

    @cached_property
    def task_files(self) -> Sequence[str]:
        """The source files of all tasks. A change in one of them invalidates what the task's scores decide."""
        return sorted({file for entry in self.all_tasks for file in entry.files})

    def get_tasks(self, name: str) -> Sequence[TaskEntry]:
        """Return the tasks that a point, a batch or a baseline is evaluated on."""
        own = list_tasks((task.name for task in self.tasks), self._get_point(name))
        return [task for task in self.tasks if task.name in own]

    def _get_point(self, name: str) -> Point | Baseline:
        """Return a point, a baseline, or the first point of a batch."""
        if name in self.baselines:
            return self.baselines[name]
        return self.points[name if name in self.points else self.batches[name][0]]

    def get_task_files(self, name: str) -> Sequence[str]:
        """Return the source files of the tasks of a point, a batch or a baseline."""
        return sorted({file for entry in self.get_tasks(name) for file in entry.files})

    @property
    def evaluation_stage(self) -> str:
        """The name of the environment that runs evaluations."""
        return "vllm" if self.experiment.evaluation.backend == "vllm" else "eval"

    @property
    def pipeline(self) -> str:
        """The rules in order, each with its number of jobs, as JSON."""
        modes = {**{point.name: point.mode for point in self.points.values()}, **self.evaluated}
        taken = {point.name for point in self.points.values() if point.training}
        stages = get_stages(
            modes,
            self.evaluated,
            self.trained,
            taken,
            chooses_epoch=self.validation is not None,
            rungs=len(self.experiment.rungs),
        )
        return json.dumps([asdict(stage) for stage in stages])

    @property
    def digest(self) -> str:
        """The digest of the settings that the report shows. It does not depend on their order in the file."""

        def sort(value: Any) -> Any:
            if isinstance(value, dict):
                return sorted((key, sort(part)) for key, part in value.items())
            return sorted(map(sort, value), key=json.dumps) if isinstance(value, list) else value

        shown = self.experiment.model_dump(by_alias=True, exclude={"plan", "slurm", "training"})
        return hashlib.sha256(json.dumps(sort(shown)).encode()).hexdigest()

    def match_points(self, is_wanted: Callable[[str], bool]) -> str:
        """Return a regular expression that matches the names in `folders` for which `is_wanted` is true."""
        chosen = [name for name in self.folders if is_wanted(name)]
        excluded = [name for name in self.folders if not is_wanted(name)]
        # The pattern lists the shorter of the two.
        few = "|".join(map(re.escape, sorted(chosen if len(chosen) <= len(excluded) else excluded)))
        return few or "(?!)" if len(chosen) <= len(excluded) else f"(?!(?:{few})/){NAME_PATTERN}"

    # Files of a point. `<results>` is Snakemake's path variable.

    def get_adapter_files(self, point: str) -> list[str]:
        """Return the files of a point's adapter."""
        return [f"<results>/{point}/adapter/{name}" for name in ADAPTER_FILES]

    @property
    def deciding_stage(self) -> str:
        """The name of the environment in which it is decided which trainings go on."""
        return self.evaluation_stage if self.pruning_task else "driver"

    # Pruning. A training has a part before each rung; a part's name is that of its training with the rung's.

    @cached_property
    def race(self) -> Race | None:
        """The trainings that compete, if `prune` is set."""
        prune = self.experiment.prune
        if prune is None:
            return None
        users: dict[str, list[str]] = {}
        for name, point in self.points.items():
            if point.training:
                users.setdefault(point.training, []).append(name)
        contenders = []
        for training, owner in self.trainings.items():
            point = self.points[owner]
            spec = self._get_choice_spec(point) if self.pruning_task and not self.missing_model else None
            contenders.append(
                Contender(
                    training,
                    tuple(sorted(users[training])),
                    get_setting_key(point),
                    get_rivals_key(point, prune),
                    self.identify_training(point),
                    point.controls.epochs,
                    spec.model_dump_json() if spec else "",
                    spec.sha256 if spec else "",
                )
            )
        return Race(self.results, prune, contenders)

    @cached_property
    def job_names(self) -> Mapping[str, str]:
        """The names of the jobs of trainings and their parts, each with the owning point in place of the training."""
        parts = {
            get_part_name(training, after): get_part_name(point, after)
            for training, point in self.trainings.items()
            for after in self.experiment.rungs
        }
        return {**self.trainings, **parts}

    @cached_property
    def job_owners(self) -> Mapping[str, str]:
        """The owning point of each training, by the name of the training and of each of its parts."""
        return {name: split_part_name(job)[0] for name, job in self.job_names.items()}

    def get_rung_parts(self, rung: str) -> list[str]:
        """Return the records that the decision at a rung waits for: of trainings whose numbers are not known yet."""
        if self.is_job or not self.race:
            return []
        after = int(rung.partition("=")[2])
        names = [get_part_name(each.training, after) for each in self.race.list_missing(after)]
        return [f"<results>/{PRUNE}/{name}.json" for name in names]

    def get_earlier_decision(self, rung: str) -> list[str]:
        """Return the decision before the one at a rung, which takes only the trainings that it lets go on."""
        return self._get_last_decision(self._list_rungs_before(int(rung.partition("=")[2])))

    def get_awaited_decision(self, name: str) -> list[str]:
        """Return the decision that a training, or a part of it, waits for. That one waits for the earlier ones."""
        return self._get_last_decision(self._list_rungs(name))

    def _get_last_decision(self, rungs: Sequence[int]) -> list[str]:
        return [f"<results>/{PRUNE}/{get_rung_name(rungs[-1])}.json"] if rungs else []

    def _list_rungs(self, name: str) -> list[int]:
        """Return the epochs before the end of a training, or of a part of it, after which settings are compared."""
        return self._list_rungs_before(split_part_name(name)[1] if self.experiment.rungs else None)

    def _list_rungs_before(self, after: int | None) -> list[int]:
        return [epoch for epoch in self.experiment.rungs if after is None or epoch < after]

    def get_training_options(self, name: str) -> list[str]:
        """Return the options of a training, or of a part of it, that say where it may have been stopped."""
        if not self.experiment.rungs:
            return []
        training, after = split_part_name(name)
        rungs = ",".join(map(str, self._list_rungs(name)))
        last = ["--last-epoch", str(self.points[self.trainings[training]].controls.epochs)]
        return [*(["--rungs", rungs] if rungs else []), *(["--until", str(after)] if after else last)]

    def has_ended(self, name: str) -> bool:
        """Whether a training's job, or that of a part, has nothing to train: the training was stopped before.

        It depends on decisions that other jobs of the run make: it is known when the job is ready.
        """
        rungs = self._list_rungs(name)
        if not rungs:
            return False
        training, after = split_part_name(name)
        stopped = find_stop([get_decision_file(self.results, epoch) for epoch in rungs], training)
        return stopped is not None and (after is not None or has_nothing_to_train(self.results, training, stopped))

    def get_training_record(self, training: str) -> str:
        """Return the record of the adapter that points take from a training."""
        return f"<results>/{TRAININGS}/{training}/adapter/{RECORD}"

    @property
    def last_epoch_folder(self) -> str:
        """The folder, in its training's, in which a training publishes the adapter of its last epoch."""
        return LAST_EPOCH if self.validation else "adapter"

    def get_trained_file(self, training: str) -> str:
        """Return the record of a training's last adapter. It exists only when all other outputs of the training do."""
        return f"<results>/{TRAININGS}/{training}/{self.last_epoch_folder}/{RECORD}"

    def get_data_files(self, training: str) -> list[str]:
        """Return the files of training and validation samples of a training."""
        data = self.points[self.job_owners[training]].data
        return [file for key in DATA_KEYS for file in data.get_files(key)]

    def get_taken_files(self, point: str) -> dict[str, str]:
        """Return the declared outputs of a point's training that the point uses."""
        training = str(self.points[point].training)
        recipe = f"<results>/{TRAININGS}/{training}/recipe.yaml"
        return {"recipe": recipe, "record": self.get_training_record(training)}

    def get_taken_folder(self, point: str) -> str:
        """Return the folder, in its training's, of the adapter that a point uses."""
        epoch = self.points[point].epoch
        folder = get_epoch_folder(epoch) if epoch else "adapter"
        return f"{self.results}/{TRAININGS}/{self.points[point].training}/{folder}"

    def get_training_state(self, point: str) -> str:
        """Return the folder of files that a point's training needs only while it runs."""
        return f"{self.results}/{TRAININGS}/{self.points[point].training}/{STATE}"

    def get_given_adapter(self, point: str) -> list[str]:
        """Return the files of the existing adapter that a point adopts."""
        return [f"{self.points[point].adapter}/{name}" for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]

    def get_given_template(self, point: str) -> str | None:
        """Return the text of a chat template that replaces the base model's own for a point; `None`: none does."""
        return find_given_template(self.points[point].model, self.points[point].data)

    def get_adoption_options(self, point: str) -> list[str]:
        """Return the option with the chat template that an adopted adapter is asked with, if it replaces the base's."""
        given = self.get_given_template(point)
        return [] if given is None else [f"--chat-template={given}"]

    def get_model_files(self, point: str) -> dict[str, Any]:
        """Return the files of a point that its evaluation reads; empty for a baseline, whose model is not declared."""
        if point in self.baselines:
            return {}
        folders = {"A": f"<results>/{point}/hf_model", "B1": f"<results>/{MERGED}/{point}"}
        return {"adapter": self.get_adapter_files(point), "model": folders[self.points[point].mode]}

    def get_model_options(self, point: str) -> list[str]:
        """Return the evaluation's option that names a point's full model; empty for a baseline."""
        model = self.get_model_files(point).get("model")
        return ["--model", str(model).replace("<results>", str(self.results))] if model else []

    def get_kept_files(self, point: str) -> dict[str, list[str]]:
        """Return the files that a point keeps, by kind, without its manifest and the logs of its tasks.

        Rules cannot declare outputs that differ between points, and points can have different tasks: the metrics, which
        are written after the logs, stand for them.
        """
        kept = {}
        if point in self.points:
            if self.points[point].training:
                kept["recipe"] = [f"<results>/{point}/recipe.yaml"]
            kept["adapter"] = self.get_adapter_files(point)
            if self.points[point].mode == "A":
                kept["model"] = [f"<results>/{point}/hf_model"]
        if point in self.evaluated:
            kept["metrics"] = [f"<results>/{point}/eval/{METRICS}"]
        return kept

    # Parameters of rules, as text: a change in one of them reruns the job.

    def make_recipe(self, point: Point) -> str:
        """Return a point's recipe, with a placeholder for the training's name; without the base model, its settings.

        Raises:
            InputError: the trainer cannot train this model with these settings.
        """
        if self.missing_model:
            sections = [point.model.model_dump_json(), point.data.model_dump_json()]
            return json.dumps([dict(point.controls), *sections, point.trainer])
        key = point.trained_name
        if key not in self._recipes:
            folder = f"{RESULTS}/{_ANY_TRAINING}"
            with naming_file(self.source):
                self._recipes[key] = make_recipe(self.experiment, point, folder)
        return self._recipes[key]

    def get_recipe(self, training: str) -> str:
        """Return the text of a training's recipe; without the base model, the message `missing_model`."""
        if self.missing_model:
            return self.missing_model
        point = self.points[self.trainings[training]]
        text = self.make_recipe(point).replace(f"{RESULTS}/{_ANY_TRAINING}", f"{self.results}/{TRAININGS}/{training}")
        return head_recipe(text, self.identify_training(point))

    def identify_training(self, point: Point) -> str:
        """Return the sha256 of what determines a training's result: its recipe, without paths, and its base model.

        If a task chooses the epoch, that choice is a part of it: the adapters of other epochs are not kept.
        The recipe names its data by their digests too, so that the same files elsewhere are the same training.
        """
        key = point.trained_name
        if key not in self._identities:
            text = self.make_recipe(point)
            files = [file for key in DATA_KEYS for file in point.data.get_files(key)]
            for path in (point.model.path, *files):
                text = re.sub(rf"(?m)(?<=[:-] ){re.escape(path)}$", "<path>", text)
            chosen = f"\n{self._describe_choice(point)}" if self.validation else ""
            fingerprint = self.get_fingerprint(point.name)
            self._identities[key] = hashlib.sha256(f"{fingerprint}\n{text}{chosen}".encode()).hexdigest()
        return self._identities[key]

    def _describe_choice(self, point: Point) -> str:
        """Return what determines which epoch of a point's training a task chooses, as text."""
        chosen = self.experiment.evaluation.validation_task
        assert chosen
        spec = chosen.model_dump_json() if self.missing_model else self._get_choice_spec(point).sha256
        return json.dumps([spec, chosen.metric, chosen.higher_is_better])

    def _get_choice_spec(self, point: Point) -> EvaluationSpec:
        assert self.choosing_task
        base = self.experiment.evaluation.base
        return self._get_spec("B2", point.name, point.data, base, [self.choosing_task])

    def get_choice_spec(self, training: str) -> str:
        """Return the specification of the evaluations that choose a training's epoch, as JSON."""
        return self._get_choice_spec(self.points[self.trainings[training]]).model_dump_json()

    def get_taking_options(self, point: str) -> list[str]:
        """Return the options with which a point takes its training's adapter: how the epoch is to be chosen."""
        owner = self.trainings[str(self.points[point].training)]
        return ["--choice", self._get_choice_spec(self.points[owner]).sha256] if self.validation else []

    def get_choice_options(self, training: str) -> list[str]:
        """Return the options of the choice of a training's epoch."""
        chosen = self.experiment.evaluation.validation_task
        epochs = ["--epochs", str(self.points[self.trainings[training]].controls.epochs)]
        metric = ["--metric", chosen.metric] if chosen and chosen.metric else []
        return [*epochs, *metric, *([] if not chosen or chosen.higher_is_better else ["--lower-is-better"])]

    def get_evaluation_spec(self, point: str) -> EvaluationSpec:
        """Return the specification of a point's evaluation: everything it depends on, except the adapter's weights."""
        data = self.points[point].data if point in self.points else self.experiment.data
        return self._get_spec(self.evaluated[point], point, data, self.get_base(point), self.get_tasks(point))

    def _get_spec(self, mode: Mode, name: str, data: Data, base: Base, tasks: Sequence[TaskEntry]) -> EvaluationSpec:
        """Return the specification of an evaluation of the model of a point or a baseline."""
        model = self.get_model(name)
        key = (mode, model, data.asked, base, tuple(task.name for task in tasks))
        if key not in self._specs:
            files = [Path(file) for file in sorted({file for task in tasks for file in task.files})]
            fingerprint = self.get_fingerprint(name)
            self._specs[key] = make_evaluation_spec(self.experiment, tasks, files, mode, fingerprint, model, data, base)
        return self._specs[key]

    def get_base(self, name: str) -> Base:
        """Return whether a point or a baseline is evaluated on the full or on the quantized base model."""
        if name in self.points:
            return self.points[name].base
        baseline = self.baselines[name]
        return self.experiment.evaluation.base if baseline.is_base and baseline.model.quantize else "full"

    def get_settings(self, point: str) -> str:
        """Return the settings in a point's manifest, as JSON."""
        return json.dumps(self.get_plain_settings(point), sort_keys=True)

    def get_plain_settings(self, point: str) -> dict[str, Any]:
        """Return the settings in a point's manifest, as values of JSON."""
        if point in self.points:
            settings = self.points[point].settings
        else:
            settings = self.baselines[point].settings
            if any(other.base != "full" for other in self.points.values()):
                settings[BASE_KEY] = self.get_base(point)
        made_on = {"dtype": self.get_dtype(point), "device": self.experiment.model.device}
        plain: dict[str, Any] = json.loads(json.dumps({**made_on, **settings}))
        return plain

    def get_task_names(self, point: str) -> list[str]:
        """Return the names of the tasks that a point is evaluated on."""
        return sorted(task.name for task in self.get_tasks(point)) if point in self.evaluated else []

    def get_cleanup_options(self, name: str) -> list[str]:
        """Return the clean-up's options: the training whose time is counted for this point, and its evaluation."""
        point = self.points.get(name)
        training = ["--training", str(point.training)] if point and point.is_trained else []
        return training + (["--evaluation", self.get_evaluation_spec(name).sha256] if name in self.evaluated else [])

    @property
    def reading_options(self) -> list[str]:
        """The options with which the samples' scores are read."""
        cluster = self.experiment.report.cluster
        return ["--cluster", cluster] if cluster else []

    @property
    def summary_settings(self) -> str:
        """The settings of the rules that summarise the points, by rule in their order, as JSON of text."""
        report = self.experiment.report.model_dump_json()
        # The paths in the table contain the experiment's name.
        table = [self.experiment.experiment.name, self.variables, self.deciding_tasks, report, list(self.baselines)]
        settings = {
            "read_samples": [*self.baselines, *self.reading_options],
            "collect": table,
            # The report reads the experiment from a file that each run writes at its start, which is not an input.
            "report": [self.pipeline, self.digest],
        }
        return json.dumps({rule: json.dumps(values) for rule, values in settings.items()})

    # Batches: the points that one job evaluates on one loaded base (mode B2).

    @cached_property
    def batches(self) -> Mapping[str, list[str]]:
        """The points of each batch, by the batch's name. A job reads the batches that its run recorded."""
        record = self.results / BATCHES
        if self.is_job:
            recorded = read_batches(record).items()
            return {
                batch: current for batch, points in recorded if (current := [p for p in points if p in self.evaluated])
            }
        direct = [point for point, mode in self.evaluated.items() if mode == "B2"]
        if not direct:
            return {}
        trained = {point for point in direct if self._has_adapter(point)}
        done = {point for point in trained if not self.missing_model and self._is_evaluated(point)}
        batches: dict[str, list[str]] = {}
        for alike in group_alike([self.points[point] for point in direct]):
            model, own = self.get_model(alike[0]), self._get_evaluation(alike[0])
            given = self.experiment.evaluation.adapters_per_job
            guess = len(direct) if given == "auto" else given
            base = self.get_checkpoint(model)
            size = resources.get_adapters_per_job(base, model, own) if base else guess
            for batch, points in assign_batches(alike, done, trained, size, record).items():
                batches.setdefault(batch, []).extend(points)
        return batches

    @cached_property
    def batch_of(self) -> Mapping[str, str]:
        """The name of each point's batch, for points that have one."""
        return {point: batch for batch, points in self.batches.items() for point in points}

    def get_batch_file(self, point: str) -> str:
        """Return the file that marks a point's batch as evaluated. The outcome is in the point's state."""
        return f"<results>/.batches/{self.batch_of[point]}"

    def get_batch_adapters(self, batch: str) -> list[str]:
        """Return the adapter files of a batch's points."""
        return [file for point in self.batches[batch] for file in self.get_adapter_files(point)]

    def get_batch_folders(self, batch: str) -> list[str]:
        """Return the folders of a batch's points."""
        return [str(self.results / point) for point in self.batches[batch]]

    def _get_evaluation(self, name: str) -> Evaluation:
        """Return the section `evaluation` with the tasks of a point, a batch or a baseline alone."""
        names = [task.name for task in self.tasks]
        return with_own_tasks(self.experiment.evaluation, names, self._get_point(name))

    def _is_evaluated(self, point: str) -> bool:
        return is_evaluated(self.get_evaluation_spec(point), self.results / point)

    def _has_adapter(self, point: str) -> bool:
        """Whether a point's adapter exists, in its own folder or in its training's."""
        training = self.points[point].training
        if training:
            return is_trained(self.results / TRAININGS / training)
        return all((self.results / point / "adapter" / name).is_file() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG))

    # Resource requests.

    @property
    def is_on_gpus(self) -> bool:
        """Whether trainings and evaluations run on GPUs."""
        return self.experiment.model.device == "cuda"

    @property
    def most_gpus(self) -> int:
        """The most GPUs of one training or evaluation, whatever the device."""
        return max(self._most_train_gpus, self._most_evaluation_gpus)

    @cached_property
    def _most_train_gpus(self) -> int:
        return max((self.points[point].controls.gpus for point in self.trained), default=1)

    @cached_property
    def _most_evaluation_gpus(self) -> int:
        return max(map(self._count_gpus, {self.get_model(name) for name in self._asked}), default=1)

    def _count_gpus(self, model: Model) -> int:
        return resources.get_evaluation_gpus(self.get_checkpoint(model), model, self.experiment)

    @property
    def evaluation_gpus(self) -> int:
        """The most GPUs that an evaluation of a point, or of a base model, requests."""
        own = max(map(self._count_gpus, self._base_models), default=1)
        return self.is_on_gpus * (self.most_gpus if self.shared_gpus is not None else own)

    def get_evaluation_gpus(self, name: str) -> int:
        """Return the number of GPUs that the evaluation of a point, a training, a batch or a baseline requests.

        If jobs share one machine's GPUs, each job reserves all of them.
        """
        return self.is_on_gpus * self.most_gpus if self.shared_gpus is not None else self.get_model_gpus(name)

    def get_model_gpus(self, name: str) -> int:
        """Return the number of GPUs that the evaluation of a point, a training, a batch or a baseline uses."""
        return self.is_on_gpus * self._count_gpus(self.get_model(name))

    def get_train_gpus(self, training: str) -> int:
        """Return the number of GPUs of a training or of a part; 0 if it has nothing to train any more."""
        if self.has_ended(training):
            return 0
        own = self.points[self.job_owners[training]].controls.gpus
        return self.is_on_gpus * (self.most_gpus if self.shared_gpus is not None else own)

    def get_training_gpus(self, training: str) -> int:
        """Return the number of GPUs that a training or a part uses, however many it requests."""
        return self.is_on_gpus * (not self.has_ended(training)) * self.points[self.job_owners[training]].controls.gpus

    def get_train_threads(self, training: str) -> int:
        """Return the number of threads of a training or of a part: four per process."""
        return 1 if self.has_ended(training) else 4 * self.points[self.job_owners[training]].controls.gpus

    def get_kept_epochs(self, training: str) -> tuple[int, ...]:
        """Return the epochs before the last whose adapters a training keeps, if only until one is chosen."""
        owner = self.job_owners[training]
        return tuple(range(1, self.points[owner].controls.epochs)) if self.validation else self.trained[owner]

    def get_epochs(self, training: str) -> str:
        """Return all epochs whose adapters a training keeps, joined by commas; the last is called `last` or `best`."""
        last = "best" if self.experiment.evaluation.keeps_best_by_loss else "last"
        return ",".join([*map(str, self.get_kept_epochs(training)), last])

    def request(self, rule: str, resource: str, name: str, attempt: int = 1) -> int:
        """Return a job's resource request at an attempt: `mem_mb` and `disk_mb` in MB, `runtime` in minutes.

        `name` is the name of the job's point, training or batch.
        """
        if self.missing_model:
            return MISSING_MODEL_AMOUNT
        if rule == "prune":
            return attempt * self._request_decision(resource)
        if rule in TRAINER_RULES and self.has_ended(name):
            return attempt * _ENDED[resource]
        after = split_part_name(name)[1] if rule == "train_part" else None
        name = self.job_owners.get(name, name) if rule in TRAINING_RULES else name
        model = self.get_model(name)
        if after and resource == "runtime":
            controls = self.points[name].controls.model_copy(update={"epochs": after})
            base = read_checkpoint(Path(model.path))
            return attempt * resources.train_runtime(base, controls, model, self.count_samples(name))
        rule = "train" if rule == "train_part" else rule
        amount = _REQUESTS[rule, resource](self, name, read_checkpoint(Path(model.path)), model)
        if resource == "mem_mb" and rule in TASK_RULES:
            amount += resources.roles_mem_mb(self.experiment.evaluation)
        return attempt * amount

    def _request_decision(self, resource: str) -> int:
        """Return a request of a decision: by a task, of each base model, one after the other."""
        if not self.pruning_task or not self.experiment.prune:
            return _DECIDING[resource]
        evaluation = self.experiment.evaluation.model_copy(update={"tasks": [self.experiment.prune.task]})
        models = Counter(self.get_model(point) for point in self.trained)
        bases = {model: read_checkpoint(Path(model.path)) for model in models}
        if resource == "runtime":
            return sum(resources.evaluate_runtime(bases[m], m, evaluation, adapters=n) for m, n in models.items())
        roles = resources.roles_mem_mb(self.experiment.evaluation)
        return roles + max(resources.evaluate_mem_mb(bases[model], model) for model in models)

    def get_deciding_gpus(self, rung: str) -> int:
        """Return the number of GPUs that a decision requests."""
        if not self.pruning_task or not self.is_on_gpus:
            return 0
        return self.most_gpus if self.shared_gpus is not None else self.get_deciding_model_gpus(rung)

    def get_deciding_model_gpus(self, _: str) -> int:
        """Return the number of GPUs that a decision uses."""
        models = {self.get_model(point) for point in self.trained} if self.pruning_task and self.is_on_gpus else ()
        return max(map(self._count_gpus, models), default=0)


_Request = Callable[[Sweep, str, Checkpoint, Model], int]

_REQUESTS: Mapping[tuple[str, str], _Request] = {
    ("train", "mem_mb"): lambda s, point, base, model: resources.train_mem_mb(
        base, s.points[point].controls, model, s.points[point].data
    ),
    ("train", "runtime"): lambda s, point, base, model: resources.train_runtime(
        base, s.points[point].controls, model, s.count_samples(point)
    ),
    ("train", "disk_mb"): lambda s, point, base, model: resources.train_disk_mb(
        base,
        s.points[point].controls,
        model,
        s.points[point].trainer,
        kept=1 + len(s.get_kept_epochs(str(s.points[point].training))),
    ),
    ("choose_epoch", "mem_mb"): lambda s, point, base, model: resources.evaluate_mem_mb(base, model),
    ("choose_epoch", "runtime"): lambda s, point, base, model: resources.evaluate_runtime(
        base, model, s.experiment.evaluation.for_validation(), adapters=s.points[point].controls.epochs
    ),
    ("merge", "mem_mb"): lambda s, point, base, model: resources.merge_mem_mb(base),
    ("merge", "runtime"): lambda s, point, base, model: resources.merge_runtime(base, model),
    ("merge", "disk_mb"): lambda s, point, base, model: resources.model_disk_mb(base, model),
    ("evaluate", "mem_mb"): lambda s, point, base, model: resources.evaluate_mem_mb(base, model),
    ("evaluate", "runtime"): lambda s, point, base, model: resources.evaluate_runtime(
        base, model, s._get_evaluation(point)
    ),
    ("evaluate_adapters", "mem_mb"): lambda s, batch, base, model: resources.evaluate_mem_mb(base, model),
    ("evaluate_adapters", "runtime"): lambda s, batch, base, model: resources.evaluate_runtime(
        base, model, s._get_evaluation(batch), adapters=len(s.batches[batch])
    ),
}
