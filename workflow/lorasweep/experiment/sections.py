"""The experiment file: its typed models, and the messages for what does not fit them.

These classes are the single source of the keys: ``workflow/schemas/experiment.schema.json`` and
``config/README.md`` are generated from them (``make docs``).
"""

import re
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._+=-]*"
"""What names of experiments, runs and tasks may look like: they become folder names, file names and job names."""

NAME_RULE = "letters, digits and . _ + = - only, starting with a letter or a digit, without '..'"

_NUMBER_AS_TEXT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` as text, since it lacks a dot; whoever writes it means the number."""
    return float(value) if isinstance(value, str) and _NUMBER_AS_TEXT.fullmatch(value) else value


def _name(value: str) -> str:
    if not re.fullmatch(NAME_PATTERN, value) or ".." in value:
        raise ValueError(f"a name of {NAME_RULE}")
    return value


def _path(value: str) -> str:
    if set(value) & set("*?[]{}\n"):
        raise ValueError("a path without * ? [ ] { } and line breaks: they would be taken for patterns")
    return value


_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"

MODEL_REFERENCE = rf"hf://(?!datasets/){_REPOSITORY}(?:@(?P<revision>[^@\s]+))?"
DATA_REFERENCE = (
    rf"hf://datasets/{_REPOSITORY}(?:@(?P<revision>refs/pr/\d+|refs/convert/\w+|[^/@\s]+))?"
    r"/(?P<file>[^@\s]+\.(?:jsonl|json|parquet))"
)
"""Models, and files of data sets, on the Hugging Face hub; see lorasweep.hub."""


def _model_path(value: str) -> str:
    if value.startswith("hf:") and (not re.fullmatch(MODEL_REFERENCE, value) or ".." in value):
        raise ValueError("a local Hugging Face checkpoint directory, or hf://org/name[@revision] on the hub")
    return value


def _data_path(value: str) -> str:
    if value.startswith("hf:") and (not re.fullmatch(DATA_REFERENCE, value) or ".." in value):
        raise ValueError(
            "a local file, or hf://datasets/org/name[@revision]/FILE on the hub, of .jsonl, .json or .parquet"
        )
    return value


def _prompt(value: str) -> str:
    """A template with `{input}`, as `str.format` reads it; none where it is the input alone."""
    expected = "text with {input}, where the sample's input stands; other braces are doubled, {{ and }}"
    if value in ("", "{input}"):
        return ""
    try:
        fields = [part[1:] for part in Formatter().parse(value) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{expected} ({error})") from error
    if set(fields) != {("input", "", None)}:
        raise ValueError(expected)
    return value


def _or_none(value: str | None) -> str | None:
    return value or None


PositiveNumber = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NonNegativeNumber = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
MOST_ADAPTERS = 200
"""Points that a job can evaluate: their names stand in its command, which may have 128 KiB."""

Name = Annotated[str, AfterValidator(_name)]
Text = Annotated[str, Field(min_length=1)]
Prompt = Annotated[str, AfterValidator(_prompt)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_path)]
ModelPath = Annotated[PathText, AfterValidator(_model_path)]
DataPath = Annotated[PathText, AfterValidator(_data_path)]
AttentionModule = Literal["q_proj", "k_proj", "v_proj", "output_proj"]
ModelFormat = Literal["hf", "adapter"]


def _epochs(value: Any) -> Any:
    if value in ("last", "all"):
        return value
    epochs = value if isinstance(value, list) else []
    is_right = all(type(epoch) is int and epoch > 0 for epoch in epochs) and len(set(epochs)) == len(epochs)
    if not epochs or not is_right:
        raise ValueError("'last', 'all', or a list of distinct epochs, counted from 1")
    return sorted(epochs)


Epochs = Annotated[Literal["last", "all"] | list[PositiveInt], BeforeValidator(_epochs)]


class Section(BaseModel):
    """A section of the experiment file: unknown keys are errors, and text is no number and no truth value."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class About(Section):
    """What the experiment is called, and what it asks."""

    name: Name
    """Names the folder `results/<name>/`."""
    question: str = ""
    """What the sweep is run to find out; carried into the results."""


class Controls(Section):
    """How every point is trained. Names and meanings are torchtune's own. Each of them can be a variable instead."""

    epochs: PositiveInt = 1
    """Passes over the training data."""
    max_steps_per_epoch: PositiveInt | None = None
    """Optimizer steps after which an epoch ends early; `null`: the whole data."""
    batch_size: PositiveInt = 2
    """Samples in a forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes for one optimizer step; the effective batch is `batch_size` times this, times `gpus`."""
    gpus: Annotated[PositiveInt, Field(exclude_if=lambda value: value == 1)] = 1
    """GPUs of one node that share a training (FSDP; processes, on a CPU). `batch_size` is that of each: the effective
    batch is `batch_size` times `gradient_accumulation_steps` times this."""
    lr: PositiveNumber = 3e-4
    """Peak learning rate."""
    weight_decay: NonNegativeNumber = 0.01
    """AdamW's weight decay."""
    num_warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up before the cosine decay."""
    clip_grad_norm: PositiveNumber | None = None
    """Largest norm of the gradients; `null`: not clipped."""
    lora_rank: PositiveInt = 8
    """Rank r of the update B·A."""
    lora_alpha: PositiveNumber | None = None
    """The update is scaled by alpha / r; `null`: twice the rank, so that the scale is 2 at every rank."""
    lora_dropout: Fraction = 0.0
    """Dropout on the input of A during training."""
    lora_attn_modules: Annotated[list[AttentionModule], Field(min_length=1)] = ["q_proj", "v_proj"]
    """Attention projections that get an adapter (`output_proj` is Hugging Face's `o_proj`)."""
    apply_lora_to_mlp: bool = False
    """Whether the three MLP projections get an adapter too."""
    apply_lora_to_output: bool = False
    """Whether the language model head gets an adapter too; refused where the head is tied to the embeddings."""
    max_seq_len: PositiveInt | None = None
    """Samples are cut to this many tokens; `null`: not cut."""
    packed: bool = False
    """Whether several samples share a sequence of `max_seq_len` tokens."""
    seed: NonNegativeInt = 0
    """Seed of the adapter's initial weights and of dropout; torchtune shuffles the data alike whatever the seed."""
    compile: bool = False
    """Whether torch.compile is used."""
    enable_activation_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass: less memory, more time."""
    override: dict[str, Any] = Field(default={}, alias="_override")
    """Merged into the torchtune recipe last; `${...}` refers to any key of the recipe or of `controls`."""


Bounds = Annotated[list[Annotated[float, BeforeValidator(_number)]], Field(min_length=2, max_length=2)]
PositiveBounds = Annotated[list[PositiveNumber], Field(min_length=2, max_length=2)]
WholeBounds = Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]
PositiveWholeBounds = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


class Dimension(Section):
    """How the values of a key are drawn: one of these. Bounds can be drawn themselves. A list stands for `choices`."""

    choices: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these, each as likely."""
    uniform: Bounds | None = None
    """Between two numbers, rounded to 3 significant digits."""
    log_uniform: PositiveBounds | None = None
    """The same, by the logarithm: each power of ten is as likely."""
    int_uniform: WholeBounds | None = None
    """A whole number from the first to the second."""
    int_log_uniform: PositiveWholeBounds | None = None
    """The same, by the logarithm."""

    @model_validator(mode="after")
    def _check(self) -> "Dimension":
        given = {key: value for key, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"one of {', '.join(type(self).model_fields)}")
        for key, bounds in given.items():
            if key != "choices" and bounds[0] >= bounds[1]:
                raise ValueError(f"{key} of two bounds, the smaller first")
        return self


class Sample(Section):
    """Points drawn at random: each value by the seed, its key and the number of the draw alone, with Python's
    `random()`, which stays the same in every version. So more `points` keep those that there were, names and all, and
    the order of keys is of no matter. A key more or less in `space`, or another range, makes other points."""

    points: PositiveInt
    """How many, all distinct; `exclude` leaves out of them, and none is drawn instead."""
    seed: NonNegativeInt = 0
    """Another seed draws other points."""
    space: Annotated[
        dict[str, Annotated[Dimension, BeforeValidator(lambda v: {"choices": v} if isinstance(v, list) else v)]],
        Field(min_length=1),
    ]
    """How the values of each key that can be a variable are drawn."""


class Model(Section):
    """The base model."""

    path: ModelPath
    """A local Hugging Face checkpoint directory (config.json, safetensors, tokenizer), or `hf://org/name[@revision]` on
    the hub, which is fetched once: see docs/hub.md."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of training, merging and evaluation."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where training and evaluation run; `cuda` asks for one GPU a job, or `controls.gpus` for a training."""


class Data(Section):
    """The training data: one JSON object a sample, as JSON lines or as one JSON array."""

    train: DataPath | None = None
    """The file of training samples, or `hf://datasets/org/name[@revision]/FILE` on the hub (.jsonl, .json or .parquet);
    not needed where every point has an adapter already."""
    validation: DataPath | None = None
    """A file of samples like `train`, never trained on, whose loss is measured after each epoch; `null`: none."""
    format: Literal["instruct", "chat", "completion"] = "instruct"
    """`instruct`: an input and an output column; `chat`: a column of messages with `role` and `content`; `completion`:
    a column of plain text, all of which is learnt; the evaluation's prompts are plain text then, in no template."""
    text_column: Annotated[Text, Field(exclude_if=lambda value: value == "text")] = "text"
    """`completion`: the column that holds the text."""
    input_column: Text = "input"
    """`instruct`: the column that holds the user's turn."""
    output_column: Text = "output"
    """`instruct`: the column that holds the answer to learn."""
    messages_column: Text = "messages"
    """`chat`: the column that holds the list of messages."""
    system_prompt: Annotated[str | None, AfterValidator(_or_none)] = None
    """A system message put before every sample, and of the evaluation; `chat` samples have none of their own then.
    `null` or `""`: none. Can be a variable, and a run's own."""
    prompt: Annotated[Prompt | None, AfterValidator(_or_none), Field(exclude_if=lambda value: value is None)] = None
    """`instruct`: a template of the user's turn, in training and evaluation, such as `"Capitalise: {input}"`; `{{` and
    `}}` stand for braces. `null`, `""` or `"{input}"`: the input alone. Can be a variable, and a run's own."""
    max_samples: Annotated[PositiveInt | None, Field(exclude_if=lambda value: value is None)] = None
    """Train on the first so many samples only; `null`: all."""
    train_on_input: bool = False
    """Whether the loss counts the prompt's tokens too."""


MetricLogger = Literal["disk", "tensorboard", "wandb"]


class Training(Section):
    """How trainings are watched and saved. Nothing here reruns anything."""

    metric_loggers: list[MetricLogger] = ["disk"]
    """What is told each step's loss: `adapter/training_log.csv` (`disk`, always), TensorBoard, Weights & Biases."""
    save_minutes: PositiveInt = 10
    """After so many minutes the state of a training is saved: one that is killed goes on from there."""


class Task(Section):
    """One Inspect task. A plain text stands for `{task: text}`."""

    task: PathText
    """`file.py@task`, relative to the working directory, or a name that an installed package registers."""
    name: Name | None = None
    """Names the log and the row of the table; `null`: the task's own name."""
    args: dict[str, Any] = {}
    """The task's arguments. Inspect runs a task in the folder of its file: relative paths start there."""
    files: list[PathText] = []
    """Other files that the task reads (data sets, modules): a change in one evaluates anew, as in `file.py`."""
    limit: PositiveInt | None = None
    """Evaluate the first so many samples only; `null`: all."""
    epochs: PositiveInt | None = None
    """Answers to each sample, whose scores are reduced to their mean, or as the task says; `null`: as the task says."""
    max_tokens: PositiveInt | None = None
    """Most tokens that an answer may have; `null`: `evaluation.max_tokens`, as far as the task does not say."""
    temperature: NonNegativeNumber | None = None
    """0: greedy decoding; above: sampling, in this task alone; `null`: `evaluation.temperature`."""
    system_prompt: str | None = None
    """In place of `data.system_prompt`, with which training prompts begin; `null`: that one; `""`: none."""
    prompt: Prompt | None = None
    """In place of `data.prompt`, a template of the last user message before any solver runs; `null`: that one; `""`:
    none."""
    solver: PathText | None = None
    """In place of the task's solver: a registered `@solver` or `@agent`, or `file.py@solver`; `null`: the task's."""
    solver_args: dict[str, Any] = {}
    """Arguments of `solver`."""
    scorer: PathText | None = None
    """In place of the task's scorers: a registered `@scorer`, or `file.py@scorer`; `null`: the task's."""
    scorer_args: dict[str, Any] = {}
    """Arguments of `scorer`."""


class Baseline(Section):
    """A full model that exists: it is evaluated as it is, and not trained."""

    name: Name
    """Names its folder and its row of the table, whose mode is `base`."""
    model: ModelPath
    """A local Hugging Face checkpoint directory, or `hf://org/name[@revision]`."""


class Evaluation(Section):
    """How each point is evaluated, and how its checkpoint is kept."""

    enabled: bool = True
    """Whether points are evaluated; `false`: trained and kept only."""
    baseline: bool = True
    """Whether the untouched base model is evaluated on the same tasks too."""
    baselines: list[Baseline] = []
    """Further models to evaluate on the same tasks: other base models, checkpoints of other trainings."""
    model_format: ModelFormat = "adapter"
    """`hf`: the full model is kept (mode A); `adapter`: only the adapter (mode B). Can be a variable."""
    merge_adapters: bool = True
    """With `adapter`: evaluate a temporary merged model (B1), or both in memory (B2, `false`). A variable too."""
    epochs: Annotated[Epochs, Field(exclude_if=lambda value: value == "last")] = "last"
    """After which epochs of its training a point is kept and evaluated: `last`, `all`, or a list, counted from 1. Each
    but the last has a folder and rows of its own, `<point>__epoch=<epoch>`; more of them later train anew."""
    max_merged_models: PositiveInt | None = None
    """Most merged models (B1) that exist at any moment; `null`: as many as evaluate at once."""
    merged_models_in: Literal["results", "tmpdir"] = "results"
    """Where they are made: as a temporary output, or in the temporary folder (`TMPDIR`) of the node that evaluates."""
    base_model: ModelPath | None = None
    """The checkpoint directory that adapters are evaluated on; `null`: `model.path`. Must hold the same model."""
    tasks: list[Annotated[Task, BeforeValidator(lambda v: {"task": v} if isinstance(v, str) else v)]] = []
    """The Inspect tasks."""
    adapters_per_job: Annotated[int, Field(ge=1, le=MOST_ADAPTERS)] | Literal["auto"] = "auto"
    """Points (B2) that one job evaluates on one loaded base; `auto`: until its start is a tenth of the job's time."""
    job_minutes: PositiveInt = 240
    """With `auto`: a job gets no more points than are expected to be done in this time."""
    backend: Literal["hf", "vllm"] = "hf"
    """What generates: transformers, or (B2 and the baseline only) a vLLM server; see docs/direct.md."""
    max_connections: PositiveInt = 32
    """Samples generated as one batch (Inspect's name)."""
    max_tokens: PositiveInt | None = None
    """Most tokens that an answer may have; `null`: Inspect's default."""
    temperature: NonNegativeNumber = 0.0
    """0: greedy decoding; above: sampling."""
    seed: NonNegativeInt = 0
    """Seed of sampling."""


class Device(Section):
    """What a device does at its best, for the plan."""

    bf16_flops: PositiveNumber
    """Floating point operations a second in bf16, dense."""
    fp32_flops: PositiveNumber
    """The same in fp32."""
    bandwidth: PositiveNumber
    """Bytes a second of its memory."""


class Planning(Section):
    """What the plan of a sweep reckons with. Nothing here reruns anything."""

    device: Name | None = None
    """The GPU, by its name in docs/plan.md or under `devices`; `null`: a100, or cpu."""
    devices: dict[str, Device] = {}
    """Further devices, by name."""
    efficiency: Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)] = 0.35
    """Share of a device's operations that training reaches."""
    parallel_jobs: PositiveInt | None = None
    """Jobs that run at a time; `null`: Snakemake's `--jobs`, or as many as `--cores` has room for."""
    count: bool = True
    """Whether a run first counts tokens and samples that `lorasweep plan` did not count: some 10 seconds, once."""
    storage_limit_gb: PositiveNumber | None = None
    """Most that the experiment's folder may hold at any moment, in GB (1e9 bytes); `null`: as the file system says."""


class Report(Section):
    """What the report answers with. Nothing here trains or evaluates anything again."""

    task: Name | None = None
    """The task that decides which setting is best; `null`: the first under `evaluation.tasks`."""
    metric: Text | None = None
    """Its metric, `<score>/<metric>` as in the table; `null`: the first."""
    higher_is_better: bool = True
    """Whether more of it is better."""
    confidence: Annotated[float, Field(gt=0.5, lt=1), BeforeValidator(_number)] = 0.95
    """Of intervals; and one minus it is the level of tests."""


class Experiment(Section):
    """A whole experiment file."""

    experiment: About
    """What the experiment is called, and what it asks."""
    variables: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """What varies: values of `controls`, of `data.system_prompt` or `data.prompt`, and `mode`, how a checkpoint is kept
    (A, B1 or B2; or `model_format` and `merge_adapters`); every combination is a point."""
    zip: list[Annotated[list[str], Field(min_length=2)]] = []
    """Variables that vary together: `[[lora_rank, lora_alpha]]` takes the first values of both, then the second, ..."""
    sample: Sample | None = None
    """Points drawn at random; beside `variables`, each of these with every combination of those."""
    exclude: list[Text | Annotated[dict[str, Any], Field(min_length=1)]] = []
    """Combinations to leave out: those that have all values of an entry, or of which a condition is true, such as
    `lora_rank > 32 and lr >= 1e-3`."""
    runs: list[dict[str, Any]] = []
    """Points beside the grid: each a `name`, and values of its own for any key that can be a variable; or a `name` and
    an `adapter`, the path of one that exists, which is evaluated and not trained."""
    controls: Controls = Controls()
    """What stays the same for every point, with torchtune's own names."""
    trainer: Annotated[Text, Field(exclude_if=lambda value: value == "torchtune")] = "torchtune"
    """What trains: `torchtune`, or the dotted path of a module that has what `lorasweep.trainers.Trainer` says and that
    Python finds (`PYTHONPATH`). Another one trains anew."""
    model: Model
    """The base model."""
    data: Data = Data()
    """The training data."""
    training: Training = Training()
    """How trainings are watched and saved."""
    evaluation: Evaluation = Evaluation()
    """How each point is evaluated, and how its checkpoint is kept."""
    plan: Planning = Planning()
    """What the plan of the sweep reckons with."""
    report: Report = Report()
    """What the report answers with."""


CHECKPOINT_KEYS = ("model_format", "merge_adapters")
"""Keys of `evaluation` that can be variables: they say how a point's checkpoint is kept."""

MODE_KEY = "mode"
"""Stands for both of `CHECKPOINT_KEYS` among variables and in runs, and for whichever of them varies in names."""

Mode = Literal["A", "B1", "B2"]
"""How a checkpoint is kept: the full model (`A`), or the adapter, merged for its evaluation (`B1`) or not (`B2`)."""


def get_mode(model_format: str, merge_adapters: bool) -> Mode:
    """Return the mode that the two keys of `evaluation` say."""
    return "A" if model_format == "hf" else "B1" if merge_adapters else "B2"


PROMPT_KEYS = ("system_prompt", "prompt")
"""Keys of `data` that can be variables: they say how a point is asked, in training and evaluation."""

SETTING_KEYS = (
    *(key for key in Controls.model_fields if key != "override"),
    *PROMPT_KEYS,
    *CHECKPOINT_KEYS,
    MODE_KEY,
)
"""Every key that can be a variable, or be set by a run."""
