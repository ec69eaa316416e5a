"""Typed models of the experiment file, and the messages for invalid values.

These classes are the single source of the keys: ``workflow/schemas/experiment.schema.json`` and
``config/README.md`` are generated from them (``make docs``).
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date
from itertools import pairwise
from math import inf
from string import Formatter
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    field_serializer,
    model_serializer,
    model_validator,
)

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._+=-]*"
"""Pattern for the names of experiments, runs and tasks, which become names of folders, files and jobs."""

NAME_RULE = "letters, digits and . _ + = - only, starting with a letter or a digit, without '..'"

_LONGEST_NAME = 200
"""A file's name may have 255 characters; the rest is for suffixes."""

_NUMBER_AS_TEXT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def read_number(value: Any) -> Any:
    """Convert text such as ``1e-4`` to a number: YAML 1.1 reads it as text, because it has no dot."""
    return float(value) if isinstance(value, str) and _NUMBER_AS_TEXT.fullmatch(value) else value


def _name(value: str) -> str:
    if not re.fullmatch(NAME_PATTERN, value) or ".." in value or len(value) > _LONGEST_NAME:
        raise ValueError(f"a name of {NAME_RULE}, of at most {_LONGEST_NAME} characters")
    return value


def _path(value: str) -> str:
    if set(value) & set("*?[]{}\n"):
        raise ValueError("a path without line breaks and * ? [ ] { }, which would be read as patterns")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("an absolute path, of a directory that all nodes see")
    return value


_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"

MODEL_REFERENCE = rf"hf://(?!datasets/){_REPOSITORY}(?:@(?P<revision>[^@\s]+))?"
MODEL_NAME = r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?"
DATA_REFERENCE = (
    rf"hf://datasets/{_REPOSITORY}(?:@(?P<revision>refs/pr/\d+|refs/convert/\w+|[^/@\s]+))?"
    r"/(?P<file>[^@\s]+\.(?:jsonl|json|csv|parquet))"
)
"""Patterns of references to models, and to files of data sets, on the Hugging Face hub; see lorasweep.hub. A
`MODEL_NAME` is a reference only if it is no local path."""


def _model_path(value: str) -> str:
    if value.startswith("hf:") and (not re.fullmatch(MODEL_REFERENCE, value) or ".." in value):
        raise ValueError("a local Hugging Face checkpoint directory, or hf://org/name[@revision] on the hub")
    return value


def _data_path(value: str) -> str:
    if value.startswith("hf:") and (not re.fullmatch(DATA_REFERENCE, value) or ".." in value):
        raise ValueError(
            "a local file, or hf://datasets/org/name[@revision]/FILE on the hub (.jsonl, .json, .csv or .parquet)"
        )
    return value


def _data_files(value: Any) -> Any:
    """Check a file or a list of files; return a list as a tuple, so that the section can be hashed."""
    files = value if isinstance(value, list | tuple) else [value]
    if not files or not all(isinstance(file, str) and file for file in files):
        raise ValueError("a file, or a list of files")
    checked = tuple(_data_path(_path(file)) for file in files)
    return checked if isinstance(value, list | tuple) else checked[0]


def _increasing(values: list[int]) -> list[int]:
    if any(earlier >= later for earlier, later in pairwise(values)):
        raise ValueError("epochs in increasing order, each once")
    return values


def _prompt(value: str) -> str:
    """Check a `str.format` template with `{input}`; return "" if the template is `{input}` alone."""
    expected = "text with {input} as the placeholder of the sample's input, and other braces doubled: {{ and }}"
    if value in ("", "{input}"):
        return ""
    try:
        fields = [part[1:] for part in Formatter().parse(value) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{expected} ({error})") from error
    if set(fields) != {("input", "", None)}:
        raise ValueError(expected)
    return value


def _day(value: Any) -> Any:
    """Check a date. YAML reads a date without quotes as a date, not as text."""
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError as error:
        raise ValueError("a date as YYYY-MM-DD") from error


def _or_none(value: str | None) -> str | None:
    return value or None


PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(read_number)]
NonNegativeNumber = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(read_number)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(read_number)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # numpy takes no other
TEMPLATE_DATE = "2024-07-26"
"""Default of `data.template_date`: the date that Llama's templates write where there is no clock."""

MOST_ADAPTERS = 200
"""Most points that one job can evaluate. The job's command lists their names and is limited to 128 KiB."""

Name = Annotated[str, AfterValidator(_name)]
Text = Annotated[str, Field(min_length=1)]
Prompt = Annotated[str, AfterValidator(_prompt)]
Day = Annotated[str, BeforeValidator(_day)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_path)]
ModelPath = Annotated[PathText, AfterValidator(_model_path)]
DataFiles = Annotated[Text | tuple[Text, ...], BeforeValidator(_data_files)]


def _attention_module(value: Any) -> Any:
    if value == "o_proj":
        raise ValueError("output_proj, which is Hugging Face's o_proj; or lora_modules, which takes the model's names")
    return value


AttentionModule = Annotated[Literal["q_proj", "k_proj", "v_proj", "output_proj"], BeforeValidator(_attention_module)]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"]
Schedule = Literal["cosine", "linear", "constant"]
ModelFormat = Literal["hf", "adapter"]
Base = Literal["full", "quantized"]


def _epochs(value: Any) -> Any:
    if value in ("last", "all", "best"):
        return value
    if isinstance(value, dict):
        raise ValueError("'best' without more; a task that chooses the epoch is evaluation.validation_task")
    epochs = value if isinstance(value, list) else []
    is_right = all(type(epoch) is int and epoch > 0 for epoch in epochs) and len(set(epochs)) == len(epochs)
    if not epochs or not is_right:
        raise ValueError("'last', 'all', 'best', or a list of distinct epochs, counted from 1")
    return sorted(epochs)


def _modules(value: Any) -> Any:
    is_list = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
    is_pattern = isinstance(value, dict) and [*value] == ["regex"] and isinstance(value["regex"], str)
    if value != "all-linear" and not is_list and not is_pattern:
        raise ValueError("all-linear, a list of the model's own names of modules, or {regex: PATTERN}")
    if is_pattern:
        try:
            re.compile(value["regex"])
        except re.error as error:
            raise ValueError(f"a regular expression ({error})") from error
    return value


def _initialization(value: str) -> str:
    if value not in ("kaiming", "gaussian", "olora", "pissa") and not re.fullmatch(r"pissa_niter_[1-9]\d*", value):
        raise ValueError("kaiming, gaussian, olora, pissa, or pissa_niter_N with a number N of iterations")
    return value


def _alpha(value: Any) -> Any:
    number = read_number(value)
    if value not in ("r", "2r") and (
        isinstance(number, bool | str) or not isinstance(number, int | float) or not 0 < number < inf
    ):
        raise ValueError("a finite number above 0, r, or 2r")
    return number


DESCRIBES = "LORASWEEP_DESCRIBES"
"""Environment variable: whether the schema of the sections has their keys' descriptions."""

Alpha = Annotated[Literal["r", "2r"] | float, BeforeValidator(_alpha)]
Modules = Annotated[Literal["all-linear"] | list[str] | dict[str, str], BeforeValidator(_modules)]
Initialization = Annotated[str, AfterValidator(_initialization)]
Epochs = Annotated[Literal["last", "all", "best"] | list[PositiveInt], BeforeValidator(_epochs)]


class Section(BaseModel):
    """A section of the experiment file. Unknown keys are errors; text is not converted to a number or boolean."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        # Reads this file as text: half the time of its import, which every job pays, for what the docs alone print.
        use_attribute_docstrings=DESCRIBES in os.environ,
    )


class About(Section):
    """The experiment's name and question."""

    name: Name
    """Names the folder `results/<name>/`."""
    question: str = ""
    """The question that the sweep should answer; copied into the results."""


DEFAULT_TRAINER = "torchtune"

MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
"""Names, in Hugging Face's Llama, of the layers that torchtune's `apply_lora_to_mlp` means."""


class Controls(Section):
    """How every point is trained. Names and meanings are torchtune's, or PEFT's where torchtune has none. Each key can
    be a variable instead. Keys that begin with `trl` are refused by torchtune."""

    epochs: PositiveInt = 1
    """Passes over the training data."""
    max_steps_per_epoch: PositiveInt | None = None
    """Optimizer steps after which an epoch ends early; `null`: no limit."""
    patience: Annotated[PositiveInt | None, Field(exclude_if=lambda value: value is None)] = None
    """With `evaluation.epochs: best` by the validation loss: epochs without a lower one after which a training stops
    early; `null`: never. The learning rate follows the schedule of all `epochs`."""
    batch_size: PositiveInt = 2
    """Samples per forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step. Effective batch: `batch_size` × `gradient_accumulation_steps` × `gpus`.
    Batches that are left over in an epoch: torchtune adds them to the next epoch's first step, and trl leaves them
    out."""
    gpus: Annotated[PositiveInt, Field(exclude_if=lambda value: value == 1)] = 1
    """GPUs of one node that share a training (on a CPU: processes), with FSDP; `trl`: with DDP. `batch_size` is per
    GPU. Effective batch: `batch_size` × `gradient_accumulation_steps` × `gpus`."""
    lr: PositiveNumber = 3e-4
    """Peak learning rate."""
    weight_decay: NonNegativeNumber = 0.01
    """Weight decay of the optimizer."""
    optimizer: Annotated[Optimizer, Field(exclude_if=lambda value: value == "adamw")] = "adamw"
    """`trl`: the optimizer. `adamw_8bit` and `paged_adamw_8bit` are bitsandbytes', with moments of 8 bits; `adafactor`
    has a fixed learning rate here, as the others."""
    schedule: Annotated[Schedule, Field(exclude_if=lambda value: value == "cosine")] = "cosine"
    """`trl`: how the learning rate changes after the warm-up: to 0 by a cosine or a line, or not at all."""
    num_warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    warmup_ratio: Annotated[Fraction | None, Field(exclude_if=lambda value: value is None)] = None
    """`trl`: the warm-up as a fraction of all steps, rounded up, in place of `num_warmup_steps`."""
    clip_grad_norm: PositiveNumber | None = None
    """Norm to which gradients are clipped; `null`: no clipping."""
    lora_rank: PositiveInt = 8
    """Rank r of the LoRA update B·A."""
    lora_alpha: Alpha | None = None
    """LoRA alpha: a number, `r` or `2r`; `null`: `2r`. The update is scaled by alpha / r, so that `2r` is a scale of 2
    at every rank, and a number one that falls with the rank; see docs/how-to/trainers.md."""
    lora_dropout: Fraction = 0.0
    """Dropout on the input of A during training."""
    use_rslora: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """`trl`: scale the update by alpha / √r instead (rsLoRA, arXiv:2312.03732)."""
    use_dora: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """`trl`: also learn the length of each weight's columns (DoRA, arXiv:2402.09353)."""
    loraplus_lr_ratio: Annotated[PositiveNumber | None, Field(exclude_if=lambda value: value is None)] = None
    """`trl`: how many times `lr` is the learning rate of B (LoRA+, arXiv:2402.12354); `null`: 1. Refused with an
    adapter on an embedding."""
    init_lora_weights: Annotated[Initialization, Field(exclude_if=lambda value: value == "kaiming")] = "kaiming"
    """`trl`: initial weights. `kaiming`, torchtune's and PEFT's default, and `gaussian` start with B = 0. `pissa`,
    `pissa_niter_N` (faster, N iterations) and `olora` start from parts of the base weights, and are saved as an adapter
    of the unchanged base model, of twice the rank."""
    lora_modules: Annotated[Modules | None, Field(exclude_if=lambda value: value is None)] = None
    """`trl`: the linear layers and embeddings that get an adapter, in place of the three keys below: `all-linear` (all
    but the head), a list of the model's own names, or `{regex: PATTERN}`, which matches whole names. `null`: the keys
    below."""
    modules_to_save: Annotated[list[Text], Field(exclude_if=lambda value: not value)] = []
    """`trl`: modules that are trained as a whole and kept in the adapter, such as `lm_head`."""
    lora_attn_modules: Annotated[list[AttentionModule], Field(min_length=1)] = ["q_proj", "v_proj"]
    """Attention projections that get an adapter (`output_proj` is Hugging Face's `o_proj`)."""
    apply_lora_to_mlp: bool = False
    """Whether the three MLP projections also get an adapter."""
    apply_lora_to_output: bool = False
    """Whether the language model head also gets an adapter; an error if the head is tied to the embeddings."""
    max_seq_len: PositiveInt | None = None
    """The most tokens of a sample; `data.too_long` says what happens to longer ones. `null`: no limit."""
    packed: bool = False
    """Whether several samples are packed into one sequence of `max_seq_len` tokens."""
    seed: Seed = 0
    """Seed of the adapter's initial weights and of dropout. The order of the data does not depend on it (torchtune)."""
    compile: bool = False
    """Whether to use torch.compile."""
    enable_activation_checkpointing: bool = False
    """Whether to recompute activations in the backward pass, which saves memory and takes more time."""
    override: dict[str, Any] = Field(default={}, alias="_override")
    """Keys merged into the torchtune recipe last; those that other keys of the experiment set are refused. `${...}`
    refers to any key of the recipe or of `controls`. `null` removes a key of a section, such as `fused` of `optimizer`.
    `trl`: keys of the recipe's section `trl`."""

    @property
    def alpha(self) -> float:
        """LoRA's alpha as a number."""
        words: dict[Any, float] = {"r": self.lora_rank, "2r": 2 * self.lora_rank, None: 2 * self.lora_rank}
        alpha = float(words.get(self.lora_alpha, self.lora_alpha))  # type: ignore[arg-type]
        return int(alpha) if alpha.is_integer() else alpha

    @property
    def llama_modules(self) -> list[str]:
        """The names, in Hugging Face's Llama, of the linear layers that torchtune's words mean, but the head's."""
        names = ["o_proj" if name == "output_proj" else name for name in self.lora_attn_modules]
        return [*names, *(MLP_MODULES if self.apply_lora_to_mlp else ())]

    @property
    def changes_base(self) -> bool:
        """Whether training changes the base model too (PiSSA, OLoRA), so that a saved adapter is converted."""
        return self.init_lora_weights.startswith(("pissa", "olora"))


Bounds = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False), BeforeValidator(read_number)]], Field(min_length=2, max_length=2)
]
PositiveBounds = Annotated[list[PositiveNumber], Field(min_length=2, max_length=2)]
WholeBounds = Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]
PositiveWholeBounds = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


class Dimension(Section):
    """How the values of a key are drawn. Set exactly one key. Bounds are inclusive. A list is short for `choices`."""

    choices: Annotated[list[Any], Field(min_length=1)] | None = None
    """A value from this list, all equally likely."""
    uniform: Bounds | None = None
    """A number between two bounds, uniformly distributed, rounded to 3 significant digits."""
    log_uniform: PositiveBounds | None = None
    """A number between two bounds, log-uniformly distributed, rounded to 3 significant digits."""
    int_uniform: WholeBounds | None = None
    """An integer between two bounds, uniformly distributed."""
    int_log_uniform: PositiveWholeBounds | None = None
    """An integer between two bounds, log-uniformly distributed."""

    @model_validator(mode="after")
    def _check(self) -> "Dimension":
        bounds_by_key = {key: value for key, value in self if value is not None}
        if len(bounds_by_key) != 1:
            raise ValueError(f"exactly one of {', '.join(type(self).model_fields)}")
        for key, bounds in bounds_by_key.items():
            if key != "choices" and bounds[0] >= bounds[1]:
                raise ValueError(f"two bounds for {key}, the smaller first")
        return self


class Sample(Section):
    """Points drawn at random. A value depends on the seed, its key and the number of the draw only, and is the same in
    every version of Python. Raising `points` keeps the points drawn so far and their names. Key order does not matter.
    Adding or removing a key in `space`, or changing a range, draws different points."""

    points: PositiveInt
    """Number of distinct points to draw. Points removed by `exclude` are not replaced."""
    seed: NonNegativeInt = 0
    """Seed of the draws; another seed draws different points."""
    space: Annotated[
        dict[str, Annotated[Dimension, BeforeValidator(lambda v: {"choices": v} if isinstance(v, list) else v)]],
        Field(min_length=1),
    ]
    """How the values of each key that can be a variable are drawn."""


Dtype = Literal["bf16", "fp16", "fp32"]
Quantization = Literal["nf4", "int8"]


class ModelSection(Section):
    """The base model; or what the models under `models` share."""

    path: ModelPath | None = None
    """A local Hugging Face checkpoint directory (config.json, safetensors, tokenizer), or a model on the hub, which is
    downloaded once: `org/name[@revision]`, with or without `hf://` in front; see docs/how-to/hub.md. Needed by points
    without a model of `models`."""
    dtype: Dtype = "bf16"
    """Precision of training, merging and evaluation. In `bf16`, torchtune trains the adapter in bf16 too, and trl in
    fp32; see docs/how-to/trainers.md. Neither trains in `fp16`, which is for adapters that exist."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where training and evaluation run. `cuda` requests one GPU per job, or `controls.gpus` and
    `evaluation.gpus`."""
    quantize: Annotated[Quantization | None, Field(exclude_if=lambda value: value is None)] = None
    """`trl`: train on the base model in 4 bits (`nf4`, doubly quantized, QLoRA) or in 8 (`int8`), by bitsandbytes.
    Adapters are merged into, and evaluated on, the model in `dtype`; see docs/how-to/trainers.md."""
    chat_template: Annotated[PathText | None, Field(exclude_if=lambda value: value is None)] = None
    """A local Jinja file with a chat template that replaces the model's own: in training, in evaluation of all points
    and of the base model, and in what is kept; see docs/how-to/prompts.md. `null`: the model's own. Without effect with
    `data.format: completion`."""


class Model(ModelSection):
    """The base model of a point."""

    path: ModelPath


class NamedModel(Section):
    """One of `models`."""

    path: ModelPath
    """As `model.path`."""
    dtype: Annotated[Dtype | None, Field(exclude_if=lambda value: value is None)] = None
    """As `model.dtype`; `null`: that one."""
    quantize: Annotated[Quantization | None, Field(exclude_if=lambda value: value is None)] = None
    """As `model.quantize`; `null`: that one."""
    chat_template: Annotated[PathText | None, Field(exclude_if=lambda value: value is None)] = None
    """As `model.chat_template`; `null`: that one."""
    trainer: Annotated[Text | None, Field(exclude_if=lambda value: value is None)] = None
    """What trains the points of this model, as `trainer` of the experiment; `null`: that one."""


DataKey = Literal["train", "validation"]

DATA_KEYS: tuple[DataKey, ...] = get_args(DataKey)
"""The keys of `data` that name files."""


class Data(Section):
    """The data of a point, or the keys that a set of `data.sets` has."""

    train: DataFiles | None = None
    """The file of training samples, or a list of files, which are read in order. Each is local, or
    `hf://datasets/org/name[@revision]/FILE` on the hub. Not needed if every point is an existing adapter."""
    validation: DataFiles | None = None
    """The validation samples, like `train`. Their loss is measured after each epoch; `null`: no validation."""
    format: Literal["instruct", "alpaca", "chat", "sharegpt", "completion"] = "instruct"
    """`instruct`: an input and an output column; `alpaca`: the same, with an instruction column: the user's turn is the
    instruction, a blank line and the input, if there is one; `chat`: a column of messages with `role` and `content`;
    `sharegpt`: the same with `from` (`human`, `gpt`, `system`) and `value`; `completion`: a column of plain text,
    trained on as a whole. With `completion`, evaluation uses no chat template."""
    text_column: Annotated[Text, Field(exclude_if=lambda value: value == "text")] = "text"
    """`completion`: the column of the text."""
    instruction_column: Annotated[Text, Field(exclude_if=lambda value: value == "instruction")] = "instruction"
    """`alpaca`: the column of the instruction."""
    input_column: Text = "input"
    """`instruct`: the column of the user's turn; `alpaca`: the column of the input, which may be empty or missing."""
    output_column: Text = "output"
    """`instruct`, `alpaca`: the column of the answer to learn."""
    messages_column: Text = "messages"
    """`chat`: the column of the list of messages."""
    conversations_column: Annotated[Text, Field(exclude_if=lambda value: value == "conversations")] = "conversations"
    """`sharegpt`: the column of the list of messages."""
    system_prompt: Annotated[str | None, AfterValidator(_or_none)] = None
    """A system message for every sample, in training and evaluation; `chat` and `sharegpt` samples must not contain
    their own then. `null` or `""`: no system message."""
    prompt: Annotated[Prompt | None, AfterValidator(_or_none), Field(exclude_if=lambda value: value is None)] = None
    """`instruct`, `alpaca`: a template of the user's turn, in training and evaluation, such as `"Capitalise: {input}"`;
    write braces as `{{` and `}}`. `null`, `""` or `"{input}"`: the input alone."""
    template_date: Annotated[Day, Field(exclude_if=lambda value: value == TEMPLATE_DATE)] = TEMPLATE_DATE
    """The date that a chat template writes where it asks for the date of the day (`strftime_now`: Llama 3.2, Granite,
    SmolLM3), in training and evaluation, as YYYY-MM-DD. Without effect on other templates."""
    max_samples: Annotated[PositiveInt | None, Field(exclude_if=lambda value: value is None)] = None
    """Number of samples to train on, from the start of the first file; `null`: all."""
    too_long: Annotated[Literal["error", "drop", "truncate"], Field(exclude_if=lambda value: value == "error")] = (
        "error"
    )
    """What happens to samples of more than `max_seq_len` tokens. `error`: the run is refused, with their lines; `drop`:
    they are left out; `truncate`: they are cut. A cut answer has no end token, so that stopping there is not learnt; a
    sample whose answer is cut off as a whole is left out."""
    train_on_input: bool = False
    """Whether the loss includes the prompt's tokens."""

    def get_files(self, key: DataKey) -> tuple[str, ...]:
        """Return the files of training or validation samples."""
        value: str | tuple[str, ...] | None = getattr(self, key)
        return value if isinstance(value, tuple) else (value,) if value else ()

    @property
    def columns(self) -> dict[str, str]:
        """The columns that samples of this format are made of, by part: `data.<part>_column` names each."""
        return {part: getattr(self, f"{part}_column") for part in PARTS[self.format]}

    @property
    def given(self) -> dict[str, Any]:
        """The keys that the file gives, with their values."""
        return {key: getattr(self, key) for key in Data.model_fields if key in self.model_fields_set}

    @property
    def asked(self) -> "Data":
        """What evaluations depend on: the prompts, and whether these are plain text. The rest has its default."""
        is_plain = self.format == "completion"
        values = {key: getattr(self, key) for key in PROMPT_KEYS} | ({"format": self.format} if is_plain else {})
        return Data.model_construct(**(vars(_DATA_DEFAULTS) | values))


_DATA_DEFAULTS = Data()

PROMPT_KEYS = ("system_prompt", "prompt", "template_date")
"""Keys of `data` that define prompts, in training and evaluation."""


class DataSection(Data):
    """The training data: files of JSON lines, one JSON array, CSV (`.csv`) or Parquet (`.parquet`), in UTF-8. Values
    are read as they are written. A number where text is expected is an error with its line, before any job. Each key
    but `sets` can be a variable, or be set by a run."""

    sets: Annotated[dict[Name, Data], Field(exclude_if=lambda value: not value)] = {}
    """Data by names, each with any of the keys above: `{short: {train: short.jsonl, max_samples: 100}}`. The variable
    `data`, or `data` of a run, chooses one. Its keys replace those above; a variable replaces the set's."""

    @field_serializer("sets")
    def _write_sets(self, sets: dict[str, Data]) -> dict[str, Any]:
        return {name: chosen.given for name, chosen in sets.items()}

    def choose(self, name: str | None, own: Mapping[str, Any]) -> Data:
        """Return the data of a point: this section's keys, over them those of a set, over them its `own` values."""
        values = {key: value for key, value in vars(self).items() if key != "sets"}
        if name is not None:
            values |= self.sets[name].given
        return Data.model_construct(**{**values, **own})


PARTS = {
    "instruct": ("input", "output"),
    "alpaca": ("instruction", "input", "output"),
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("text",),
}
"""The parts of a sample by `data.format`. A part is also the default name of its column."""


def _metric_logger(value: Any) -> Any:
    if value == "trackio":
        raise ValueError(
            "'disk', 'tensorboard', 'wandb' or 'mlflow'; no release of trackio goes with the packages of the trainers"
        )
    return value


MetricLogger = Annotated[Literal["disk", "tensorboard", "wandb", "mlflow"], BeforeValidator(_metric_logger)]


class Training(Section):
    """How trainings are logged and saved. Changing these keys reruns nothing."""

    metric_loggers: list[MetricLogger] = ["disk"]
    """Where each step's loss is logged: `adapter/training_log.csv` (`disk`, always), TensorBoard, Weights & Biases, or
    MLflow, which has to be installed; see docs/how-to/watching.md."""
    save_minutes: PositiveInt = 10
    """Minutes between saves of a training's state. A training that is killed resumes from the last save."""


class AnyTask(Section):
    """An Inspect task, whatever its scores are for."""

    task: PathText
    """`file.py@task`, relative to the working directory, or a name that an installed package registers."""
    name: Name | None = None
    """Name of the task in log files and in the table; `null`: the task's own name."""
    args: dict[str, Any] = {}
    """Arguments of the task. Inspect runs a task in the folder of its file: relative paths start there. A number
    with an exponent needs a dot here, as in `1.0e-4`: YAML has text in `1e-4`."""
    files: list[PathText] = []
    """Other files that the task reads (data sets, modules). Changing one repeats the evaluation, as for `file.py`."""
    limit: PositiveInt | None = None
    """Number of samples to evaluate, from the first; `null`: all."""
    epochs: PositiveInt | None = None
    """Answers per sample; the task's reducer, by default the mean, combines their scores. `null`: the task's number."""
    max_tokens: PositiveInt | None = None
    """Maximum tokens per answer; `null`: the task's own limit, else `evaluation.max_tokens`."""
    temperature: NonNegativeNumber | None = None
    """Temperature for this task: 0 for greedy decoding, above 0 for sampling; `null`: `evaluation.temperature`."""
    system_prompt: str | None = None
    """System prompt for this task; `null`: `data.system_prompt`, as in training; `""`: none but the task's own. A task
    with a system message of its own is refused with `null`; a text replaces it."""
    prompt: Prompt | None = None
    """Template of the last user message, applied before any solver runs; `null`: `data.prompt`; `""`: no template."""
    assistant_prefix: Annotated[str | None, AfterValidator(_or_none), Field(exclude_if=lambda value: value is None)] = (
        None
    )
    """Text with which every answer begins. The model continues from it; scorers see the continuation alone. `null` or
    `""`: none."""
    solver: PathText | None = None
    """Replaces the task's solver: a registered `@solver` or `@agent`, or `file.py@solver`; `null`: the task's own."""
    solver_args: dict[str, Any] = {}
    """Arguments of `solver`."""
    scorer: PathText | None = None
    """Replaces the task's scorers: a registered `@scorer`, or `file.py@scorer`; `null`: the task's own."""
    scorer_args: dict[str, Any] = {}
    """Arguments of `scorer`."""


class Task(AnyTask):
    """One Inspect task. Plain text is short for `{task: text}`."""

    when: Annotated[Text | None, Field(exclude_if=lambda value: value is None)] = None
    """A condition on the points that are evaluated on the task, such as `lora_rank > 8`, written as in `exclude`; it
    may also use `name` and `epoch`. `null`: all points. See docs/how-to/tasks.md."""


class ValidationTask(AnyTask):
    """An Inspect task that chooses the best epoch of each training. Plain text is short for `{task: text}`."""

    metric: Text | None = None
    """Metric of the task that decides, written `<score>/<metric>` as in the table; `null`: the first that Inspect
    lists. It is checked before the first job, if the scorer tells its metrics."""
    higher_is_better: bool = True
    """Whether a higher value of the metric is better."""


def _named_task(value: Any) -> Any:
    return {"task": value} if isinstance(value, str) else value


class Baseline(Section):
    """An existing full model, evaluated without training."""

    name: Name
    """Name of the baseline's folder and of its row in the table, which has the mode `base`."""
    model: ModelPath
    """A local Hugging Face checkpoint directory, or `org/name[@revision]` on the hub."""


class ModelRole(Section):
    """The model of one of Inspect's roles. Plain text is short for `{model: text}`."""

    model: Text
    """Inspect's name: `hf/FOLDER` is a local checkpoint, `lorasweep/NAME` one with an adapter (`args: {base: FOLDER,
    adapter: FOLDER}`), `openai/...` and other providers are asked over the network (`allow_network`)."""
    config: dict[str, Any] = {}
    """Inspect's generation options: `temperature`, `max_tokens` and so on. A local model is greedy by default."""
    base_url: Text | None = None
    """URL of the provider's server; `null`: the provider's own. Keys are read from the environment only."""
    args: dict[str, Any] = {}
    """Arguments of the provider."""


class Evaluation(Section):
    """How each point is evaluated, and how its checkpoint is kept."""

    enabled: bool = True
    """Whether to evaluate the points; `false`: train and keep them only."""
    baseline: bool = True
    """Whether to evaluate the unchanged base model on the same tasks."""
    baselines: list[Baseline] = []
    """Other models to evaluate on the same tasks: other base models, checkpoints of other trainings."""
    model_format: ModelFormat = "adapter"
    """What is kept. `hf`: the full model (mode A); `adapter`: only the adapter (mode B). Can be a variable."""
    merge_adapters: bool = True
    """With `adapter`: evaluate a temporary merged model (`true`, B1), or merge each adapter in memory (`false`, B2).
    Can be a variable."""
    epochs: Annotated[Epochs, Field(exclude_if=lambda value: value == "last")] = "last"
    """Epochs after which a point is kept and evaluated: `last`, `all`, a list of numbers from 1, or `best`, the one
    with the lowest loss on `data.validation` or the best score on `validation_task`; see docs/how-to/epochs.md. With
    `all` or a list, each epoch but the last has its own folder and rows, `<point>__epoch=<epoch>`. Adding epochs later
    retrains the points."""
    validation_task: Annotated[
        Annotated[ValidationTask, BeforeValidator(_named_task)] | None, Field(exclude_if=lambda value: value is None)
    ] = None
    """With `epochs: best`: the task that chooses the epoch, in place of the validation loss; none of those under
    `tasks`, whose scores would be too good. Changing anything that its scores depend on retrains the points."""
    base: Annotated[Base, Field(exclude_if=lambda value: value == "full")] = "full"
    """With `model.quantize`: what adapters are evaluated on. `full`: the model in `model.dtype`; `quantized`: the model
    that they were trained on, in B2 alone, with the updates beside its weights. Can be a variable."""
    max_merged_models: PositiveInt | None = None
    """Maximum number of merged models (B1) that exist at the same time; `null`: as many as evaluations can run at a
    time (see docs/plan.md), and one that is merged meanwhile."""
    merged_models_in: Annotated[PathText, AfterValidator(_absolute)] | None = None
    """Absolute path of an existing directory for merged models (B1), such as one on a scratch file system that all
    nodes see; `null`: under `results/`."""
    base_model: ModelPath | None = None
    """Model that adapters are evaluated on, local or on the hub; `null`: `model.path`. Must be the same model."""
    tasks: list[Annotated[Task, BeforeValidator(_named_task)]] = []
    """The Inspect tasks to evaluate."""
    model_roles: Annotated[
        dict[Name, Annotated[ModelRole, BeforeValidator(lambda v: {"model": v} if isinstance(v, str) else v)]],
        Field(exclude_if=lambda value: not value),
    ] = {}
    """Models that tasks ask for by role, such as `grader`, the judge of Inspect's model-graded scorers; see
    docs/how-to/judges.md."""
    allow_network: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether evaluations may ask models over the network: `model_roles` that are not local."""
    adapters_per_job: Annotated[int, Field(ge=1, le=MOST_ADAPTERS)] | Literal["auto"] = "auto"
    """Points (B2) per job, which loads the base once; `auto`: enough that start-up is a tenth of the job's time."""
    job_minutes: PositiveInt = 240
    """With `adapters_per_job: auto`: maximum expected duration of a job, in minutes."""
    backend: Literal["hf", "vllm"] = "hf"
    """What generates answers: transformers (`hf`), or a vLLM server (B2 and the baseline only); see
    docs/how-to/direct.md."""
    gpus: Annotated[PositiveInt | Literal["auto"], Field(exclude_if=lambda value: value == 1)] = 1
    """GPUs of one node that hold the model of an evaluation: its layers are spread over them (`hf`), or each tensor is
    (`vllm`). `auto`: as few as the weights fit into; see docs/resources.md. Changing it evaluates nothing again."""
    max_connections: PositiveInt = 32
    """Samples generated in one batch (Inspect's name for it)."""
    max_tokens: PositiveInt | None = None
    """Maximum tokens per answer; `null`: Inspect's default."""
    temperature: NonNegativeNumber = 0.0
    """0: greedy decoding; above 0: sampling."""
    seed: Seed = 0
    """Seed of sampling."""

    @property
    def keeps_best_by_loss(self) -> bool:
        """Whether each training itself keeps its best epoch, by the validation loss."""
        return self.epochs == "best" and self.validation_task is None

    def for_validation(self) -> "Evaluation":
        """Return the section with the validation task alone."""
        return self.model_copy(update={"tasks": [self.validation_task]})


class Prune(Section):
    """Which trainings stop before their last epoch, to spend no time on settings that are behind."""

    after: Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(_increasing)]
    """Epochs after whose end settings are compared, such as `[1, 2]`; before the last epoch of every training."""
    keep: Annotated[float, Field(gt=0, le=1), BeforeValidator(read_number)] = 0.5
    """Share of the settings that go on at each of them, rounded up; `1.0`: all. Settings that differ only in `seed` are
    one, with the mean of their numbers; a tie at the border goes on."""
    by: Literal["validation_loss"] | ValidationTask = "validation_loss"
    """What is compared: the loss on `data.validation`, or a score on a task: `{task: ..., metric: ...}`, with the keys
    of `evaluation.validation_task`; none of those under `evaluation.tasks`."""

    @property
    def task(self) -> ValidationTask | None:
        """The task whose scores are compared, if they are."""
        return None if self.by == "validation_loss" else self.by

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher number is better."""
        return self.task is not None and self.task.higher_is_better


class Device(Section):
    """Peak performance and memory of a device, for the plan."""

    bf16_flops: PositiveNumber
    """Peak dense FLOP/s in bf16 and fp16."""
    fp32_flops: PositiveNumber
    """Peak dense fp32 FLOP/s."""
    bandwidth: PositiveNumber
    """Memory bandwidth in bytes per second."""
    memory: Annotated[PositiveNumber | None, Field(exclude_if=lambda value: value is None)] = None
    """Memory in bytes; needed by `evaluation.gpus: auto` only."""


class Planning(Section):
    """Assumptions of the sweep's plan. Changing these keys reruns nothing."""

    device: Name | None = None
    """Device to plan for: a name from docs/plan.md or `plan.devices`; `null`: `a100`, or `cpu` on a CPU."""
    devices: dict[str, Device] = {}
    """Additional devices, by name."""
    efficiency: Annotated[float, Field(gt=0, le=1), BeforeValidator(read_number)] = 0.35
    """Fraction of the device's peak FLOP/s that training reaches."""
    parallel_jobs: PositiveInt | None = None
    """Number of trainings or evaluations that run at the same time; `null`: as many as `--jobs` or `--cores`, and the
    GPUs, have room for; see docs/plan.md."""
    count: bool = True
    """Whether a run first loads its tasks, builds what its recipes name, and counts tokens and samples, unless
    `lorasweep plan` did; takes some 20 seconds, once. `false`: errors in them appear only when the jobs run."""
    storage_limit_gb: PositiveNumber | None = None
    """Maximum size of the experiment's folder in GB (1e9 bytes); `null`: limited by the file system and quotas only."""


class Slurm(Section):
    """How a run deals with SLURM. Changing these keys reruns nothing."""

    wait_hours: Annotated[float, Field(gt=0), BeforeValidator(read_number)] = 24
    """Hours for which a SLURM that does not answer is asked again, before a job counts as failed."""
    mem_per_cpu: bool = False
    """Whether jobs ask for their memory per core (`--mem-per-cpu`), as some sites want, and not per node (`--mem`)."""


class Report(Section):
    """How the report finds the best setting. Changing these keys retrains and reevaluates nothing."""

    task: Name | None = None
    """Task that decides which setting is best; `null`: the first of `evaluation.tasks`."""
    metric: Text | None = None
    """Metric of that task, written `<score>/<metric>` as in the table; `null`: the first that Inspect lists. It is
    checked before the first job, if the scorer tells its metrics."""
    higher_is_better: bool = True
    """Whether a higher value of the metric is better."""
    confidence: Annotated[float, Field(gt=0.5, lt=1), BeforeValidator(read_number)] = 0.95
    """Confidence level of intervals; tests use the significance level 1 - `confidence`."""
    cluster: Annotated[Text | None, Field(exclude_if=lambda value: value is None)] = None
    """Key of the samples' metadata that tells which samples belong together, such as the text that several questions
    are about: standard errors, intervals and tests are then by cluster. `null`: samples are independent."""


class Experiment(Section):
    """A whole experiment file."""

    experiment: About
    """The experiment's name and question."""
    variables: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Values to sweep, by key; every combination is a point. Keys are those of `controls` and `data`, `data` itself
    (names under `data.sets`), `model` (names under `models`), `trainer`, `base` of `evaluation`, and `mode` (A, B1 or
    B2: how a checkpoint is kept) or its parts `model_format` and `merge_adapters`."""
    zip: list[Annotated[list[str], Field(min_length=2)]] = []
    """Variables that vary together: `[[lora_rank, lora_alpha]]` takes the first values of both, then the second, ..."""
    sample: Sample | None = None
    """Points drawn at random. With `variables`, each is combined with every combination of the variables."""
    exclude: list[Text | Annotated[dict[str, Any], Field(min_length=1)]] = []
    """Combinations to leave out. An entry is a mapping, which matches combinations that have all its values, or a
    condition such as `lora_rank > 32 and lr >= 1e-3`."""
    runs: list[dict[str, Any]] = []
    """Points outside the grid. A run has a `name`, and its own values for any key that can be a variable; or a `name`
    and an `adapter`: the path of an existing adapter, which is evaluated without training. `tasks` lists
    the names of the tasks on which it is evaluated, whatever the `when` of a task says."""
    controls: Controls = Controls()
    """Settings shared by all points, with torchtune's names. `${lora_rank}` is the point's own value of a key of
    `controls` or `data`, also in a run."""
    trainer: Annotated[Text, Field(exclude_if=lambda value: value == DEFAULT_TRAINER)] = DEFAULT_TRAINER
    """What trains: `torchtune`, `trl` (any causal language model that transformers loads), or the dotted path of a
    module on Python's path (`PYTHONPATH`) that implements `lorasweep.trainers.Trainer`. Changing it retrains every
    point. Can be a variable, or be set by a run."""
    model: ModelSection = ModelSection()
    """The base model; or what the models under `models` share."""
    models: Annotated[dict[Name, NamedModel], Field(exclude_if=lambda value: not value)] = {}
    """Base models by names: `{llama8b: {path: meta-llama/Llama-3.1-8B}}`. The variable `model`, or `model` of a run,
    chooses one; its keys replace those of `model`. Each has its own baseline; see docs/how-to/models.md."""
    data: DataSection = DataSection()
    """The training data."""
    training: Training = Training()
    """How trainings are logged and saved."""
    evaluation: Evaluation = Evaluation()
    """How each point is evaluated, and how its checkpoint is kept."""
    prune: Annotated[Prune | None, Field(exclude_if=lambda value: value is None)] = None
    """Stops the trainings of settings that are behind: `{after: [1, 2], keep: 0.5}`; see docs/how-to/pruning.md. It is
    no part of a training's identity: adding it trains nothing again, and stops nothing that is finished."""
    plan: Planning = Planning()
    """Assumptions of the sweep's plan."""
    slurm: Slurm = Slurm()
    """How a run deals with SLURM."""
    report: Report = Report()
    """How the report finds the best setting."""

    _derived: dict[str, str] = PrivateAttr(default={})

    @property
    def names(self) -> Mapping[str, Collection[str]]:
        """The names that a variable can choose from, by the variable's key."""
        return {SET_KEY: self.data.sets, MODEL_KEY: self.models}

    @property
    def rungs(self) -> Sequence[int]:
        """The epochs after which `prune` compares settings."""
        return self.prune.after if self.prune else ()

    def choose_model(self, name: str | None) -> Model:
        """Return the base model of this name, or that of the section `model`, which then must have a path."""
        values = dict(self.model)
        if name is not None:
            values |= {key: value for key, value in self.models[name] if value is not None and key != "trainer"}
        return Model.model_construct(**values)

    def choose_trainer(self, values: Mapping[str, Any]) -> str:
        """Return the trainer of a point with these values: its own, its model's, or the experiment's."""
        model = self.models.get(values.get(MODEL_KEY, ""))
        trainer: str = values.get(TRAINER_KEY) or (model and model.trainer) or self.trainer
        return trainer

    @property
    def derived(self) -> Mapping[str, str]:
        """The controls whose values are made of a point's other settings, as written. In `controls` they are unset."""
        return self._derived

    def with_derived(self, derived: Mapping[str, str]) -> "Experiment":
        """Return the experiment with these derived controls."""
        experiment = self.model_copy()
        experiment._derived = dict(derived)
        return experiment

    @model_serializer(mode="wrap")
    def _write(self, write: Any) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        if "controls" in written:
            written["controls"] |= self._derived
        return written


OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "learning_rates"), "controls.lr"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "n_epochs"), "controls.epochs"),
    "early_stopping_patience": "controls.patience",
    "load_best_model_at_end": "evaluation.epochs",
    "metric_for_best_model": "evaluation.validation_task",
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "train_batch_size"), "controls.batch_size"),
    **dict.fromkeys(("gradient_accumulation", "grad_accum"), "controls.gradient_accumulation_steps"),
    **dict.fromkeys(("r", "rank", "lora_r"), "controls.lora_rank"),
    "alpha": "controls.lora_alpha",
    "dropout": "controls.lora_dropout",
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target"), "controls.lora_modules"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "output_proj"), "controls.lora_attn_modules"),
    **dict.fromkeys(("max_length", "max_seq_length", "sequence_len", "cutoff_len"), "controls.max_seq_len"),
    **dict.fromkeys(("warmup_steps", "num_warmup"), "controls.num_warmup_steps"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), "controls.schedule"),
    "optim": "controls.optimizer",
    **dict.fromkeys(("max_grad_norm", "grad_clip"), "controls.clip_grad_norm"),
    "gradient_checkpointing": "controls.enable_activation_checkpointing",
    "packing": "controls.packed",
    **dict.fromkeys(("base_model", "model_name_or_path", "model_name", "model_id"), "model.path"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization"), "model.quantize"),
    **dict.fromkeys(("dataset", "datasets", "train_file", "train_data"), "data.train"),
    **dict.fromkeys(("val_file", "eval_dataset", "validation_file"), "data.validation"),
    **dict.fromkeys(("evaluations", "benchmarks"), "evaluation.tasks"),
}
"""Names in transformers, PEFT, TRL, Axolotl and LLaMA-Factory of what is a key here."""

CHECKPOINT_KEYS = ("model_format", "merge_adapters")
"""Keys of `evaluation` that can be variables. They define how a point's checkpoint is kept."""

MODE_KEY = "mode"
"""Replaces both `CHECKPOINT_KEYS` in variables and runs. In names of points, replaces whichever of them varies."""

Mode = Literal["A", "B1", "B2"]
"""How a checkpoint is kept: the full model (`A`), or the adapter, merged for its evaluation (`B1`) or not (`B2`)."""


def get_mode(model_format: str, merge_adapters: bool) -> Mode:
    """Return the mode for the values of `evaluation.model_format` and `evaluation.merge_adapters`."""
    return "A" if model_format == "hf" else "B1" if merge_adapters else "B2"


def split_mode(mode: Mode) -> dict[str, Any]:
    """Return the values of `CHECKPOINT_KEYS` that a mode stands for."""
    return {"model_format": "hf" if mode == "A" else "adapter", "merge_adapters": mode != "B2"}


BASE_KEY = "base"
"""Key of `evaluation` that can be a variable."""

SET_KEY = "data"
"""Chooses one of `data.sets` in variables and runs."""

MODEL_KEY = "model"
"""Chooses one of `models` in variables and runs."""

TRAINER_KEY = "trainer"
"""Key of the experiment that can be a variable."""

SETTING_KEYS = (
    *(key for key in Controls.model_fields if key != "override"),
    TRAINER_KEY,
    MODEL_KEY,
    SET_KEY,
    *Data.model_fields,
    *CHECKPOINT_KEYS,
    BASE_KEY,
    MODE_KEY,
)
"""Every key that can be a variable, or be set by a run."""
