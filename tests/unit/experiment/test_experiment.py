"""The experiment file: what is accepted, and what messages say of the rest."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasweep.experiment.loading import load_experiment, read_overrides
from lorasweep.util.errors import InputError

ROOT = Path(__file__).parents[3]

MINIMAL = """
experiment: {name: sweep}
variables: {lora_rank: [4, 8]}
model: {path: base}
data: {train: train.jsonl}
evaluation: {tasks: [task.py@words]}
"""


def load(text: str = "", **sections: Any) -> Any:
    config = yaml.safe_load(MINIMAL) | (yaml.safe_load(text) or {}) | sections
    return load_experiment(config, "my.yaml")


@pytest.mark.parametrize("file", sorted(ROOT.glob("config/*.yaml")), ids=lambda file: file.name)
def test_shipped_experiments_are_valid(file: Path) -> None:
    assert load_experiment(yaml.safe_load(file.read_text()), str(file)).experiment.name


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001"])
def test_a_number_without_a_dot_is_a_number_although_yaml_says_text(written: str) -> None:
    assert load(f"controls: {{lr: {written}}}").controls.lr == 0.001


def test_interpolation_reaches_other_sections_and_leaves_the_override_to_the_recipe() -> None:
    experiment = load(
        "evaluation: {base_model: '${model.path}', tasks: [a.py]}\ncontrols: {_override: {optimizer: {lr: '${lr}'}}}"
    )
    assert experiment.evaluation.base_model == "base"
    assert experiment.controls.override == {"optimizer": {"lr": "${lr}"}}


BAD = [
    ("controls: {lora_rnk: 8}", ["controls.lora_rnk", "did you mean 'lora_rank'", "lora_alpha"]),
    ("evaluaton: {}", ["'evaluaton'", "did you mean 'evaluation'"]),
    ("evaluation: {merge_adapters: yes please}", ["evaluation.merge_adapters", "'yes please'", "boolean"]),
    ("evaluation: {tasks: [{task: a.py, nam: b}]}", ["evaluation.tasks.0.nam", "did you mean 'name'"]),
    ("evaluation: {model_format: full}", ["evaluation.model_format", "'full'", "'hf' or 'adapter'"]),
    ("controls: {lora_rank: 0}", ["controls.lora_rank", "0", "greater than or equal to 1"]),
    ("controls: {lora_rank: '8'}", ["controls.lora_rank", "'8'", "integer"]),
    ("controls: {lora_rank: eight}", ["controls.lora_rank", "'eight'", "integer"]),
    ("controls: {lr: fast}", ["controls.lr", "'fast'", "number"]),
    ("controls: {lr: 0}", ["controls.lr", "0", "greater than 0"]),
    ("controls: {lora_dropout: 1.5}", ["controls.lora_dropout", "1.5", "less than 1"]),
    ("controls: {lora_attn_modules: [q_proj, o_proj]}", ["controls.lora_attn_modules.1", "'o_proj'", "output_proj"]),
    ("variables: {lora_rank: []}", ["variables.lora_rank", "[]", "at least 1 item"]),
    ("model: {dtype: bf16}", ["'model.path'", "missing"]),
    ("model: {path: base, dtype: fp8}", ["model.dtype", "'fp8'", "'bf16', 'fp16' or 'fp32'"]),
    ("model: {path: '${no.such}'}", ["no.such", "model.path"]),
    ("experiment: {name: ../elsewhere}", ["experiment.name", "'../elsewhere'", "letters, digits"]),
    ("experiment: {name: 'a b'}", ["experiment.name", "'a b'"]),
    ("experiment: {name: a..b}", ["experiment.name", "'a..b'"]),
    *(
        (f"model: {{path: '{path}'}}", ["model.path", repr(path), "or hf://org/name[@revision]"])
        for path in ("hf://name", "hf:org/name", "hf://org/name/file", "hf://datasets/org/name", "hf://org/name@../x")
    ),
    *(
        (f"data: {{train: '{path}'}}", ["data.train", repr(path), "hf://datasets/org/name[@revision]/FILE"])
        for path in (
            "hf://org/name/a.jsonl",
            "hf://datasets/org/name",
            "hf://datasets/o/n/a.csv",
            "hf://datasets/o/n/../a.json",
        )
    ),
    *(
        (f"{before}prompt: '{prompt}'{after}", [f"{where}.prompt", repr(prompt), "text with {input}", "{{ and }}"])
        for where, before, after in (
            ("data", "data: {", "}"),
            ("evaluation.tasks.0", "evaluation: {tasks: [{task: a.py, ", "}]}"),
        )
        for prompt in ("Capitalise:", "{input} {", "{input} {}", "{inptu}", "{input!r}", "{input:>9}", "{{input}}")
    ),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[text for text, _ in BAD])
def test_bad_input_is_refused_with_file_key_value_and_what_is_accepted(text: str, said: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load(text)
    for part in ["my.yaml", *said]:
        assert part in str(error.value)


def test_values_given_on_the_command_line_are_read_as_yaml() -> None:
    config = {"a": {"b": "false", "c": "8"}, "d": ["1", "x"], "e": 3, "f": "file"}
    given = {"a": {"b": "false"}, "d": ["1", "x"], "e": 3}
    assert read_overrides(config, given) == {"a": {"b": False, "c": "8"}, "d": [1, "x"], "e": 3, "f": "file"}


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(InputError) as error:
        load("controls: {lora_rank: 0, lr: fast, epoch: 1}")
    assert len(str(error.value).splitlines()) == 3


def test_schema_and_readme_are_what_the_models_say() -> None:
    subprocess.run([sys.executable, ROOT / "scripts/make_docs.py", "--check"], check=True)
