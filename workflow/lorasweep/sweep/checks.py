"""Check everything that an experiment needs from outside its file, before any job is planned."""

import json
import re
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import cast
from urllib.parse import unquote, urlsplit

from lorasweep.checkpoints.chat_template import (
    CHAT_TEMPLATE,
    find_given_template,
    find_system_refusal,
    read_chat_template,
    writes_think_block,
)
from lorasweep.checkpoints.checkpoint import INDEX, Checkpoint, read_checkpoint
from lorasweep.checkpoints.vocabulary import check_open_end, check_readable, check_vocabulary
from lorasweep.experiment.points import Point
from lorasweep.experiment.roles import get_folders, is_local
from lorasweep.experiment.sections import DATA_KEYS, SET_KEY, Controls, Data, Evaluation, Experiment, Model, ModelRole
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.experiment.training_data import check_data
from lorasweep.hub.references import explain_absence
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorasweep.trainers import OWN_TRAINERS, Trainer, TrainingSpec, get_trainer
from lorasweep.util.digest import digest_file, digest_files
from lorasweep.util.errors import InputError, find_reason, naming_key

_NO_TEMPLATE = (
    "the tokenizer has no chat template, so training and evaluation write a prompt as 'user: ' with the text and a "
    "line break. To ask with the text alone: data.format: completion. To shape the text: data.prompt. To name a "
    "template for the base model: model.chat_template."
)

_THINK_BLOCK = (
    "the chat template writes an empty <think> block before an answer, so training teaches it as part of the answer, "
    "and scorers see it: exact counts such an answer as wrong. To have the block in the prompt instead: tasks with "
    'assistant_prefix: "<think>\\n\\n</think>\\n\\n".'
)


def check_inputs(experiment: Experiment, points: Iterable[Point], tasks: Iterable[TaskEntry], results: Path) -> None:
    """Check the data and the base model, and that the experiment's sections are consistent.

    `results` is the experiment's folder. A missing base model is not an error here, as a dry run works without it: see
    `find_missing_model`.

    Raises:
        InputError: a check failed; the message has the key, the value, and what is expected.
    """
    evaluation, tasks = experiment.evaluation, list(tasks)
    if evaluation.enabled and not tasks:
        raise InputError("evaluation.tasks: [] is invalid", "at least one Inspect task, or enabled: false")
    names = [task.name for task in tasks]
    if experiment.report.task and experiment.report.task not in names:
        raise InputError(
            f"report.task: {experiment.report.task!r} is invalid",
            ", ".join(names) or "null, where no task is evaluated",
        )
    if _is_evaluating(experiment):
        _check_place(results.resolve())
    points = list(points)
    _check_prompts(experiment.data, "")
    for data, place in _list_data(points).items():
        _check_prompts(data, place)
    _check_backend(experiment, points)
    for point in points:
        _check_base(experiment, point)
    if evaluation.gpus not in (1, "auto") and experiment.model.device != "cuda":
        raise InputError(
            f"evaluation.gpus: {evaluation.gpus} is invalid with model.device: {experiment.model.device}", "1, or cuda"
        )
    for point in points:
        # A point's own adapter would be deleted before it is copied; another point's may not exist yet.
        if point.adapter and Path(point.adapter).resolve().is_relative_to(results.resolve()):
            raise InputError(
                f"runs: adapter: {point.adapter!r} (run '{point.name}') is in this experiment's folder",
                f"an adapter outside of {results}",
            )
    for index, baseline in enumerate(evaluation.baselines if evaluation.enabled else ()):
        where = f"evaluation.baselines.{index}.model"
        if Path(baseline.model).resolve().is_relative_to(results.resolve()):
            raise InputError(
                f"{where}: {baseline.model!r} ('{baseline.name}') is in this experiment's folder",
                f"a model outside of {results}",
            )
        with naming_key(where):
            _check_tokenizer(experiment, read_checkpoint(Path(baseline.model)))
    for name, role in evaluation.model_roles.items():
        _check_role_folders(experiment, role, f"evaluation.model_roles.{name}")
    trained = [point for point in points if point.is_trained]
    if trained:
        samples: dict[Data, int] = {}
        for point in trained:
            if point.data not in samples:
                samples[point.data] = _check_files(experiment, point)
            _check_weights_key(point)
            if not point.controls.packed:  # the number of packs is known when tokens are counted
                check_batch(point, samples[point.data])
    models = list_models(experiment, points)
    named = {_get_model_key(point): point.model_name for point in points}
    templates = {
        key: find_given_template(model, Data(), _get_template_key(experiment, named.get(key)))
        for key, model in models.items()
    }
    if find_missing_model(experiment, points, ""):
        return
    checkpoints = {key: _read(model.path, key, templates[key]) for key, model in models.items()}
    for key, checkpoint in checkpoints.items():
        with naming_key(key):
            _check_tokenizer(experiment, checkpoint, [p for p in trained if p.model == models[key]])
            asked = [point.data.format for point in points if point.model == models[key]] or [experiment.data.format]
            if _is_evaluating(experiment) and "completion" in asked:
                check_open_end(checkpoint)
    _check_system_role(experiment, points, tasks)
    for key, model in models.items():
        own = [point for point in trained if point.model == model]
        _check_base_model(experiment, key, model, checkpoints[key], own)


def _check_place(results: Path) -> None:
    """Check that Inspect can write its logs into a folder: it takes their paths for URLs."""
    if unquote(urlsplit(f"file://{results}").path) != str(results):
        raise InputError(
            f"{results}: the results cannot be here, since Inspect takes the paths of its logs for URLs",
            "a path without '#' and '?', and without '%' before two hexadecimal digits",
        )


def _check_base_model(
    experiment: Experiment, key: str, model: Model, checkpoint: Checkpoint, trained: Iterable[Point]
) -> None:
    """Check that a base model suits the data of the points that are trained on it, and `evaluation.base_model`."""
    other = experiment.evaluation.base_model
    for data, place in _list_data(trained).items() if not checkpoint.has_chat_template else ():
        if data.format in ("chat", "sharegpt"):
            raise InputError(
                f"{key}: the tokenizer in {model.path!r} has no chat template, but data.format: {data.format}{place} "
                "needs one",
                f"a checkpoint with a chat template, one in {key.removesuffix('path')}chat_template, or data.format: "
                "instruct",
            )
    if other and _read(other, "evaluation.base_model").fingerprint != checkpoint.fingerprint:
        raise InputError(
            f"evaluation.base_model: {other!r} holds another model than {key} ({model.path!r})",
            "the model that the adapters are trained on",
        )


def _check_system_role(experiment: Experiment, points: Iterable[Point], tasks: Iterable[TaskEntry]) -> None:
    """Check that the chat templates of all models take a system message, if there is one."""
    points = list(points)
    given = {"data.system_prompt": experiment.data.system_prompt}
    given |= {f"data.system_prompt{place}": data.system_prompt for data, place in _list_data(points).items()}
    if experiment.evaluation.enabled:
        given |= {f"evaluation.tasks: '{task.name}': system_prompt": task.spec.system_prompt for task in tasks}
    if validation := experiment.evaluation.validation_task:
        given["evaluation.validation_task.system_prompt"] = validation.system_prompt
    if experiment.prune and experiment.prune.task:
        given["prune.by.system_prompt"] = experiment.prune.task.system_prompt
    place = next((key for key, text in given.items() if text), None)
    for source, template in _list_templates(experiment, points).items() if place else ():
        if template and (refusal := find_system_refusal(template)) is not None:
            raise InputError(
                f"{place}: the chat template of {source!r} refuses a system message: {refusal}",
                "no system_prompt; or the text in data.prompt",
            )


def _list_data(points: Iterable[Point]) -> dict[Data, str]:
    """Return the data sections of points, each with the name of its first point, for messages."""
    sections: dict[Data, str] = {}
    for point in points:
        sections.setdefault(point.data, f" (point '{point.name}')")
    return sections


def _check_files(experiment: Experiment, point: Point) -> int:
    """Check the samples of a point to train; return how many it is trained on."""
    names = {key: key if key in point.swept else f"data.{key}" for key in DATA_KEYS}
    chosen = experiment.data.sets[point.data_set].given if point.data_set else ()
    names |= {key: f"data.sets.{point.data_set}.{key}" for key in DATA_KEYS if key in chosen}
    is_own = any(key in point.swept for key in (SET_KEY, *Data.model_fields))
    where = {key: f"{name} (point '{point.name}')" if is_own else "" for key, name in names.items()}
    samples = check_data(point.data, "train", where["train"]).samples
    most = point.data.max_samples
    if most and samples < most and "max_samples" in point.swept:
        # Its name and the axis of a learning curve would say what is not so.
        raise InputError(
            f"max_samples: {most} (point '{point.name}') is invalid: there are {samples} samples", f"at most {samples}"
        )
    if point.data.validation:
        check_data(point.data, "validation", where["validation"])
    return samples


def _list_templates(experiment: Experiment, points: Collection[Point]) -> dict[str, str | None]:
    """Return the chat templates by which models are asked, by the model's folder, or the file that replaces its own."""
    if all(data.format == "completion" for data in (experiment.data, *(point.data for point in points))):
        return {}
    baselines = experiment.evaluation.baselines if experiment.evaluation.enabled else []
    bases = list_models(experiment, points).values()
    folders = [*(model.path for model in bases if not model.chat_template), *(b.model for b in baselines)]
    templates = {folder: read_chat_template(Path(folder)) for folder in folders if Path(folder).is_dir()}
    given = {str(model.chat_template): find_given_template(model, Data()) for model in bases if model.chat_template}
    return templates | given


def find_trainer(name: str) -> Trainer:
    """Return a trainer that the experiment names.

    Raises:
        InputError: no trainer has that name, or its module is not a complete trainer.
    """
    with naming_key("trainer"):
        return get_trainer(name)


def check_trainer(name: str, experiment: Experiment) -> None:
    """Check that a trainer is there, and that it can keep the best epoch or pause if the experiment asks for that.

    Raises:
        InputError: it is not, or it cannot.
    """
    trainer = find_trainer(name)
    if experiment.prune and not getattr(trainer, "CAN_PAUSE", False):
        raise InputError(
            f"prune: does not go with trainer: {name}, which has no CAN_PAUSE = True",
            f"trainer: {' or '.join(OWN_TRAINERS)}; or no prune",
        )
    if experiment.evaluation.keeps_best_by_loss and not getattr(trainer, "KEEPS_BEST_EPOCH", False):
        raise InputError(
            f"evaluation.epochs: 'best' is invalid with trainer: {name}, which has no KEEPS_BEST_EPOCH = True",
            f"trainer: {' or '.join(OWN_TRAINERS)}; or an evaluation.validation_task; or last, all, or a list of "
            "epochs",
        )


def find_missing_model(experiment: Experiment, points: Iterable[Point], source: str) -> str | None:
    """Return a message about a missing base model of the points; `None` if all models and their weights exist.

    `source` is the experiment file.
    """
    named = {key: model.path for key, model in list_models(experiment, points).items()}
    if path := experiment.evaluation.base_model:
        named["evaluation.base_model"] = path
    for key, value in named.items():
        if not Path(value).is_dir():
            return f"{key}: {explain_absence(value, source)}"
        if has_configuration(Path(value)) and not has_weights(Path(value)):
            problem = f"{key}: {value!r} has a config.json but no weights, which is enough for a plan, not for a run"
            return str(InputError(problem, "a local Hugging Face checkpoint directory"))
    return None


def _get_model_key(point: Point) -> str:
    return f"models.{point.model_name}.path" if point.model_name else "model.path"


def _get_template_key(experiment: Experiment, model: str | None) -> str:
    """Return the key that names a base model's chat template: its own under `models`, or that of `model`."""
    named = experiment.models.get(model or "")
    return f"models.{model}.chat_template" if named and named.chat_template else "model.chat_template"


@contextmanager
def _naming_model(experiment: Experiment, model: str | None) -> Iterator[None]:
    """Name one of `models` in an InputError of a trainer, which knows the keys of `model` only."""
    own = experiment.models.get(model or "")
    try:
        yield
    except InputError as error:
        if own:
            keys = tuple(f"model.{key}:" for key, value in own if value is not None)
            error.problems = [
                f"models.{model}.{problem.removeprefix('model.')}"
                if problem.startswith(keys)
                else f"models.{model}: {problem}"
                for problem in error.problems
            ]
        raise


def list_models(experiment: Experiment, points: Iterable[Point]) -> dict[str, Model]:
    """Return the base models of points by the keys of their paths; of an experiment without points, that of `model`."""
    models = {_get_model_key(point): point.model for point in points}
    if not models and experiment.model.path:
        models["model.path"] = experiment.choose_model(None)
    return models


def warn_of_prompts(experiment: Experiment, points: Iterable[Point]) -> list[str]:
    """Return a warning for each model that has no chat template, or is trained by one that adds to answers; and for
    each existing adapter with another template beside it than the one by which it is asked."""
    points = list(points)
    taught_by = {point.model.chat_template or point.model.path for point in points if point.is_trained}
    warnings = [
        f"{model}: {_THINK_BLOCK if template else _NO_TEMPLATE}"
        for model, template in _list_templates(experiment, points).items()
        if not template or (model in taught_by and writes_think_block(template))
    ]
    asked = [point for point in points if point.adapter and point.data.format != "completion"]
    adapters = dict.fromkeys(str(point.adapter) for point in asked if _has_other_template(point))
    return warnings + [
        f"{adapter}: has another chat template than the one by which it is asked, so it may have been trained on other "
        f"prompts. To ask by its own: model.chat_template, a file such as {adapter}/{CHAT_TEMPLATE}."
        for adapter in adapters
    ]


def _has_other_template(point: Point) -> bool:
    own, base = read_chat_template(Path(str(point.adapter))), Path(point.model.path)
    given = find_given_template(point.model, point.data)
    return own is not None and base.is_dir() and own != (read_chat_template(base) if given is None else given)


def has_configuration(path: Path) -> bool:
    """Whether a checkpoint directory has a configuration, which is enough for a plan."""
    return (path / "config.json").is_file()


def has_weights(path: Path) -> bool:
    """Whether a checkpoint directory has weights, of a kind that can be read or not."""
    return any(any(path.glob(pattern)) for pattern in (INDEX, "*.safetensors", "*.bin", "*.gguf"))


def make_recipe(experiment: Experiment, point: Point, output_dir: str) -> str:
    """Return the text of a point's `recipe.yaml`.

    Comments at its head hold digests of the training and validation data, and of the trainer's module unless it is
    one of lorasweep's. So a change in the content of these files changes the recipe.

    Raises:
        InputError: the trainer cannot train this model with these settings.
    """
    key = _get_template_key(experiment, point.model_name)
    given = find_given_template(point.model, point.data, key)
    spec = TrainingSpec(
        checkpoint=_read(point.model.path, _get_model_key(point), given),
        controls=point.controls,
        swept=tuple(key for key in point.swept if key in Controls.model_fields),
        model=point.model,
        data=point.data,
        output_dir=output_dir,
        keeps_best_epoch=experiment.evaluation.keeps_best_by_loss,
    )
    trainer = find_trainer(point.trainer)
    if given is not None and not getattr(trainer, "TAKES_CHAT_TEMPLATE", False):
        raise InputError(
            f"{key}: {point.model.chat_template!r} is invalid with trainer: {point.trainer}, which has no "
            "TAKES_CHAT_TEMPLATE = True",
            f"trainer: {' or '.join(OWN_TRAINERS)}; or null",
        )
    with _naming_model(experiment, point.model_name):
        recipe = trainer.recipe(spec)
    named = {"training": point.data.get_files("train"), "validation": point.data.get_files("validation")}
    digests = [f"# {what} data sha256: {digest_files(files)}\n" for what, files in named.items() if files]
    if point.trainer not in OWN_TRAINERS:
        module = Path(str(cast(ModuleType, trainer).__file__))
        digests.append(f"# trainer: {point.trainer} sha256: {digest_file(module)}\n")
    return "".join(digests) + recipe


def check_registered_tasks(tasks: Iterable[TaskEntry], python: Sequence[str], where: str = "evaluation.tasks") -> None:
    """Check that tasks, solvers and scorers given by name are registered in the evaluation environment.

    `python` is the command that starts that environment's Python, and `where` the key of the tasks.

    Raises:
        InputError: a name is not registered, or the environment's Python failed.
    """
    names = [f"{kind}:{name}" for entry in tasks for kind, name in entry.registered]
    if not names:
        return
    program = (
        "import sys, inspect_ai.scorer, inspect_ai.solver; "
        "from inspect_ai._util.entrypoints import ensure_entry_points; "
        "from inspect_ai._util.registry import registry_lookup as find; ensure_entry_points(); "
        "pairs = [word.split(':', 1) for word in sys.argv[1:]]; kinds = {'solver': ('solver', 'agent')}; "
        "print(*[n for k, n in pairs if not any(find(kind, n) for kind in kinds.get(k, (k,)))], sep='\\n')"
    )
    result = subprocess.run(
        [*python, "-c", program, *names],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if result.returncode:
        raise InputError(
            f"{where}: could not check that {', '.join(names)} is registered in the evaluation environment "
            f"(is it installed? 'make install'): {_find_reason(result.stderr)}"
        )
    if result.stdout.split():
        raise InputError(
            f"{where}: no installed package registers {', '.join(result.stdout.split())}",
            "file.py@task, or a name registered by a package in the evaluation environment "
            "(.venv/eval/bin/pip install ...)",
        )


def check_metric_loggers(names: Iterable[str], trainers: Mapping[str, Sequence[str]]) -> None:
    """Check that MLflow is installed for each trainer, if it is among the metric loggers.

    `trainers` are the commands that start the Python of each trainer's environment, by the trainer's name.

    Raises:
        InputError: it is not installed, or an environment's Python failed.
    """
    program = "import sys; from importlib.util import find_spec; print(sys.executable, find_spec('mlflow') is not None)"
    for trainer, python in trainers.items() if "mlflow" in names else ():
        result = subprocess.run([*python, "-c", program], capture_output=True, encoding="utf-8", check=False)
        if result.returncode:
            raise InputError(f"training.metric_loggers: could not be checked: {_find_reason(result.stderr)}")
        executable, _, is_there = result.stdout.strip().rpartition(" ")
        if is_there != "True":
            raise InputError(
                f"training.metric_loggers: 'mlflow' is not installed for trainer: {trainer}",
                f"no mlflow, or '{executable} -m pip install mlflow-skinny'",
            )


def check_role_models(evaluation: Evaluation, python: Sequence[str]) -> None:
    """Check the roles' models with Inspect: their options, their providers, and what those need of the environment.

    `python` is the command that starts the evaluation environment's Python. No local model is loaded.

    Raises:
        InputError: Inspect refuses a model.
    """
    if not evaluation.model_roles:
        return
    program = (
        "import json, sys; from inspect_ai.model import GenerateConfig, get_model\n"
        "for name, role, is_local in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        options = {'config': GenerateConfig(**role['config']), 'base_url': role['base_url'], **role['args']}\n"
        "        is_local or get_model(role['model'], memoize=False, **options)\n"
        "    except Exception as error:\n"
        "        print(json.dumps([name, getattr(error, 'message', None) or str(error)]))\n"
    )
    roles = [[name, role.model_dump(), is_local(role.model)] for name, role in evaluation.model_roles.items()]
    result = subprocess.run(
        [*python, "-c", program, json.dumps(roles)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if result.returncode:
        raise InputError(f"evaluation.model_roles: could not be checked: {_find_reason(result.stderr)}")
    refused = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    if refused:
        raise InputError.join(
            InputError(f"evaluation.model_roles.{name}: {evaluation.model_roles[name].model}: {_make_plain(said)}")
            for name, said in refused
        )


def _find_reason(said: str) -> str:
    return find_reason(said.splitlines()) or said.strip()


def _make_plain(message: str) -> str:
    """Return a message of Inspect's in one line, without its markup."""
    return " ".join(re.sub(r"\[/?(?:bold|blue)\]|ERROR:?", "", message).split()).lstrip(": ")


def _check_role_folders(experiment: Experiment, role: ModelRole, key: str) -> None:
    folder, adapter = get_folders(role.model, role.args)
    if folder:
        with naming_key(key):
            _check_tokenizer(experiment, read_checkpoint(Path(folder)))
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG) if adapter else ():
        if not Path(str(adapter), name).is_file():
            raise InputError(f"{key}.args.adapter: no {name} in {adapter!r}", "the folder of a PEFT LoRA adapter")


def _check_tokenizer(experiment: Experiment, checkpoint: Checkpoint, trained: Iterable[Point] = ()) -> None:
    """Check the tokenizer of a model that is evaluated, or that these points are trained on."""
    is_evaluated = _is_evaluating(experiment) and experiment.evaluation.backend == "hf"
    if is_evaluated or any(find_trainer(point.trainer).STAGE == "eval" for point in trained):
        check_readable(checkpoint)
    check_vocabulary(checkpoint)


def _read(path: str, key: str, chat_template: str | None = None) -> Checkpoint:
    with naming_key(key):
        return read_checkpoint(Path(path), chat_template)


def _check_prompts(data: Data, where: str) -> None:
    """Check that a system prompt is used only with messages, and a prompt template only with an input column."""
    if data.format == "completion" and data.system_prompt:
        raise InputError(
            f"data.system_prompt: {data.system_prompt!r}{where} does not go with data.format: completion, which "
            "is plain text",
            "no system_prompt, or another format",
        )
    if data.format not in ("instruct", "alpaca") and data.prompt:
        raise InputError(
            f"data.prompt: {data.prompt!r}{where} does not go with data.format: {data.format}, whose samples "
            "have no input column",
            "no prompt, or data.format: instruct or alpaca; for a task: its own 'prompt'",
        )


def _is_evaluating(experiment: Experiment) -> bool:
    """Whether models are evaluated: for a report, or to choose an epoch or what is trained further."""
    chooses = experiment.evaluation.validation_task or (experiment.prune and experiment.prune.task)
    return experiment.evaluation.enabled or bool(chooses)


def _check_backend(experiment: Experiment, points: Sequence[Point]) -> None:
    evaluation = experiment.evaluation
    if evaluation.backend == "hf" or not _is_evaluating(experiment):
        return
    other = next((point for point in points if point.mode != "B2"), None)
    if other and evaluation.enabled:
        raise InputError(
            f"evaluation.backend: 'vllm' does not go with mode {other.mode} (point '{other.name}'): vLLM applies "
            "adapters itself",
            "model_format: adapter with merge_adapters: false, or backend: hf",
        )
    if any(data.format == "completion" for data in (experiment.data, *(point.data for point in points))):
        raise InputError(
            "evaluation.backend: 'vllm' does not go with data.format: completion, whose prompts have no template", "hf"
        )
    if experiment.model.device != "cuda":
        raise InputError(
            f"evaluation.backend: 'vllm' needs model.device: cuda, but it is {experiment.model.device!r}",
            f"hf on {experiment.model.device}",
        )


def _check_base(experiment: Experiment, point: Point) -> None:
    """Check that a quantized base is one that is there, in a mode and with adapters that leave it as it is."""
    if point.base == "full" or not point.is_evaluated:
        return
    problem = f"evaluation.base: 'quantized' (point '{point.name}')"
    if not point.model.quantize:
        key = f"models.{point.model_name}.quantize" if point.model_name else "model.quantize"
        raise InputError(f"{problem} does not go without {key}", f"full; or {key}: nf4 or int8")
    if point.mode != "B2":
        raise InputError(
            f"{problem} does not go with mode {point.mode}, which merges the adapter into the full base",
            "full; or model_format: adapter with merge_adapters: false",
        )
    if experiment.evaluation.backend != "hf":
        raise InputError(f"{problem} does not go with evaluation.backend: {experiment.evaluation.backend!r}", "hf")
    if point.controls.modules_to_save and not point.adapter:
        raise InputError(
            f"{problem} does not go with controls.modules_to_save, which replaces modules of the base", "full"
        )


def check_batch(point: Point, sequences: int, kind: str = "samples") -> None:
    """Check that an epoch of so many samples or packs has at least one optimizer step.

    Raises:
        InputError: it has none.
    """
    controls = point.controls
    if ceil(sequences / controls.gpus) // controls.batch_size >= controls.gradient_accumulation_steps:
        return
    gpus = f" on {controls.gpus} gpus" if controls.gpus > 1 else ""
    raise InputError(
        f"batch_size: {controls.batch_size} with gradient_accumulation_steps: "
        f"{controls.gradient_accumulation_steps}{gpus} (point '{point.name}') gives no optimizer step with {sequences} "
        f"{kind}, as incomplete batches are dropped",
        f"a product of {('the three' if gpus else 'the two')} of at most the number of {kind}",
    )


def _check_weights_key(point: Point) -> None:
    declared = find_trainer(point.trainer).declared_adapter_only(point.controls.override)
    if declared is not None and declared != (point.mode != "A"):
        expected = "hf" if not declared else "adapter"
        raise InputError(
            f"mode {point.mode} (point '{point.name}') does not go with save_adapter_weights_only: {declared} "
            "under controls._override",
            f"model_format: {expected}, or no save_adapter_weights_only",
        )
