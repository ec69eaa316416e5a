"""The experiment file: what is accepted, and what messages say of the rest."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasweep.experiment.loading import load_experiment, read_config, read_overrides
from lorasweep.experiment.points import get_points
from lorasweep.experiment.sections import OTHER_NAMES, Controls, Data, Evaluation, Experiment, Model
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


@pytest.mark.parametrize(
    "more", ["", "\nexperiment: {name: x, question: '${model.path}'}"], ids=["plain", "interpolated"]
)
def test_the_date_of_templates_needs_no_quotes(more: str) -> None:
    text = "data: {train: t, template_date: 2024-01-31}\nvariables: {template_date: [2024-02-01]}" + more
    experiment = load(text)
    assert experiment.data.template_date == "2024-01-31"
    assert experiment.variables == {"template_date": ["2024-02-01"]}


def test_interpolation_reaches_other_sections_and_leaves_the_override_to_the_recipe() -> None:
    experiment = load(
        "evaluation: {base_model: '${model.path}', tasks: [a.py]}\ncontrols: {_override: {optimizer: {lr: '${lr}'}}}"
    )
    assert experiment.evaluation.base_model == "base"
    assert experiment.controls.override == {"optimizer": {"lr": "${lr}"}}


BAD = [
    ("models: {a: some/path}", ["models.a: 'some/path' is invalid", "a section, with keys of its own"]),
    ("controls: {lora_rnk: 8}", ["controls.lora_rnk", "did you mean 'lora_rank'", "lora_alpha"]),
    ("evaluaton: {}", ["'evaluaton'", "did you mean 'evaluation'"]),
    ("evaluation: {merge_adapters: yes please}", ["evaluation.merge_adapters", "'yes please'", "boolean"]),
    ("evaluation: {tasks: [{task: a.py, nam: b}]}", ["evaluation.tasks.0.nam", "did you mean 'name'"]),
    ("evaluation: {model_format: full}", ["evaluation.model_format", "'full'", "'hf' or 'adapter'"]),
    ("controls: {lora_rank: 0}", ["controls.lora_rank", "0", "greater than or equal to 1"]),
    ("controls: {lora_rank: '8'}", ["controls.lora_rank", "'8'", "integer"]),
    ("controls: {lora_rank: eight}", ["controls.lora_rank", "'eight'", "integer"]),
    ("controls: {lr: fast}", ["controls.lr", "'fast'", "number"]),
    ("controls: {lr: .inf}", ["controls.lr", "inf", "finite number"]),
    ("controls: {lr: 1e999}", ["controls.lr", "inf", "finite number"]),
    ("controls: {weight_decay: .nan}", ["controls.weight_decay", "nan", "finite number"]),
    *(
        (f"controls: {{lora_alpha: {said}}}", ["controls.lora_alpha", "a finite number"])
        for said in (".inf", ".nan", 0)
    ),
    ("sample: {points: 1, space: {lr: {uniform: [0, .inf]}}}", ["sample.space.lr.uniform.1", "finite number"]),
    ("controls: {lr: 0}", ["controls.lr", "0", "greater than 0"]),
    ("controls: {lora_dropout: 1.5}", ["controls.lora_dropout", "1.5", "less than 1"]),
    ("controls: {lora_attn_modules: [q_proj, o_proj]}", ["controls.lora_attn_modules.1", "'o_proj'", "output_proj"]),
    ("variables: {lora_rank: []}", ["variables.lora_rank", "[]", "at least 1 item"]),
    ("model: {dtype: bf16}", ["'model.path'", "missing"]),
    ("model: {path: base, dtype: fp8}", ["model.dtype", "'fp8'", "'bf16', 'fp16' or 'fp32'"]),
    ("model: {path: '${no.such}'}", ["no.such", "model.path"]),
    (
        "evaluation: {tasks: [{task: a.py, args: {since: 2024-01-31}}]}",
        ["evaluation.tasks.0.args.since: 2024-01-31 is a date", "text in quotes: '2024-01-31'"],
    ),
    ("controls: {_override: {note: 2024-01-31 10:00:00}}", ["controls._override.note: 2024-01-31 10:00:00 is a date"]),
    (
        "evaluation: {tasks: [{task: a.py, args: {few: {1: a, two: b}}}]}",
        ["evaluation.tasks.0.args.few.1: the key 1 is not text", "the key in quotes"],
    ),
    ("2024-01-31: a", ["2024-01-31: the key datetime.date(2024, 1, 31) is not text"]),
    ("data: {sets: {2024: {train: a}}}", ["data.sets.2024: the key 2024 is not text"]),
    ("runs: [{name: a, _override: {note: !!set {a}}}]", ["runs.0._override.note: {'a'} is invalid", "a mapping"]),
    ("evaluation: {tasks: [{task: a, solver: b, solver_args: {a: [.inf]}}]}", ["solver_args.a.0: inf is invalid"]),
    ("evaluation: {model_roles: {grader: {model: openai/a, config: {top_p: .nan}}}}", ["config.top_p: nan is"]),
    ("experiment: {name: ../elsewhere}", ["experiment.name", "'../elsewhere'", "letters, digits"]),
    ("experiment: {name: 'a b'}", ["experiment.name", "'a b'"]),
    (f"evaluation: {{tasks: [{{task: a.py, name: {'a' * 201}}}]}}", ["evaluation.tasks.0.name", "at most 200"]),
    ("controls: {seed: 4294967296}", ["controls.seed", "less than or equal to 4294967295"]),
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
            "hf://datasets/o/n/a.tsv",
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
    numbers = {"a": "-1.5", "b": "~", "c": "null", "d": {"e": ["0.5"]}}
    assert read_overrides(numbers, numbers) == {"a": -1.5, "b": None, "c": None, "d": {"e": [0.5]}}


def test_text_given_on_the_command_line_is_taken_as_it_is() -> None:
    values = [{"text": text} for text in ("Use # for headings", "Say: {input}", "[a, b", "2024-01-31", "- a", "&")]
    assert read_overrides({"d": values}, {"d": values}) == {"d": values}
    quoted = {"name": "'2024'", "no": '"no"', "empty": "''", "null": "", "apostrophe": "'"}
    plain = {"name": "2024", "no": "no", "empty": "", "null": None, "apostrophe": "'"}
    assert read_overrides(quoted, quoted) == plain


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(InputError) as error:
        load("controls: {lora_rank: 0, lr: fast, epoch: 1}")
    assert len(str(error.value).splitlines()) == 3


def test_schema_and_readme_are_what_the_models_say() -> None:
    subprocess.run([sys.executable, ROOT / "scripts/make_docs.py", "--check"], check=True)


class TestFile:
    """What is said of a file that cannot be read as it is meant."""

    @staticmethod
    def refuse(path: Path, text: str | bytes) -> str:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError) as error:
            read_config(path)
        return str(error.value)

    def test_it_is_read_as_snakemake_reads_it(self, tmp_path: Path) -> None:
        (tmp_path / "my.yaml").write_text(MINIMAL)
        assert read_config(tmp_path / "my.yaml") == yaml.safe_load(MINIMAL)
        (tmp_path / "my.json").write_text('{"a": {"b": 1}, "c": {"b": 1}}')
        assert read_config(tmp_path / "my.json") == {"a": {"b": 1}, "c": {"b": 1}}

    @pytest.mark.parametrize("key", ["variables: {lr: [1]}", '"variables": {}'])
    def test_a_key_that_is_there_twice_is_named_with_both_lines(self, tmp_path: Path, key: str) -> None:
        said = self.refuse(tmp_path / "my.yaml", f"{MINIMAL}{key}\n")
        problem = "the key 'variables' is there twice, first in line 3"
        assert said == f"{tmp_path}/my.yaml:7: {problem}. Expected: each key once"

    @pytest.mark.parametrize(
        ("text", "places"),
        [
            ("a: {b: 1, b: 2}\n", ["1: the key 'b'"]),
            ("a:\n- b: 1\n  c: 2\n  b: 3\n", ["4: the key 'b'"]),
            ("a: 1\nb: 2\na: 3\nb: 4\n", ["3: the key 'a'", "4: the key 'b'"]),
        ],
    )
    def test_in_any_depth(self, tmp_path: Path, text: str, places: list[str]) -> None:
        lines = self.refuse(tmp_path / "my.yaml", text).splitlines()
        for line, place in zip(lines, places, strict=True):
            assert line.startswith(f"{tmp_path}/my.yaml:{place} is there twice")

    def test_an_anchor_and_a_merge_repeat_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "my.yaml").write_text("a: &x {b: 1}\nc: *x\nd: {<<: *x, b: 2}\n")
        assert read_config(tmp_path / "my.yaml")["d"] == {"b": 2}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a: 1\nb: [1, 2\nc: 3\n", "my.yaml:3:2: not YAML: "),
            ("a: 1\n\tb: 2\n", "my.yaml:2:1: not YAML: "),
            ("a: b: c\n", "my.yaml:1:5: not YAML: mapping values are not allowed in this context"),
            ("a: 2024-13-01\n", "my.yaml: not YAML: month must be in 1..12"),
            ("a: *x\n", "my.yaml:1:4: not YAML: found undefined alias"),
            (b"a: \xff\n", "my.yaml: not UTF-8 text (invalid start byte at byte 4)"),
            ("", "my.yaml: not an experiment"),
            ("- a\n", "my.yaml: not an experiment"),
        ],
    )
    def test_what_is_not_yaml_is_said_with_line_and_column(self, tmp_path: Path, text: str | bytes, said: str) -> None:
        assert said in self.refuse(tmp_path / "my.yaml", text)

    def test_one_that_is_not_there_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"none\.yaml: no such file"):
            read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"controls": {"learning_rate": 1e-4}}, "unknown key 'controls.learning_rate' (did you mean 'lr'?)"),
        ({"controls": {"target_modules": ["q_proj"]}}, "(did you mean 'lora_modules'?)"),
        ({"learning_rate": 1e-4}, "unknown key 'learning_rate' (here it is 'controls.lr')"),
        ({"controls": {"lora_attn_modules": ["o_proj"]}}, "'o_proj' is invalid. Expected: output_proj, which is"),
        ({"runs": [{"name": "a", "num_train_epochs": 3}]}, "(did you mean 'epochs'?)"),
        ({"variables": {"rank": [4]}}, "(did you mean 'lora_rank'?)"),
        (
            {"variables": {"base_model": ["a", "b"]}},
            "(did you mean 'model'?). Expected: model, with names under",
        ),
    ],
)
def test_names_of_other_tools_get_the_name_here(sections: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        get_points(load(**sections), tmp_path / "points.json")
    assert said in str(refused.value)


def test_every_name_here_is_a_key() -> None:
    for path in set(OTHER_NAMES.values()):
        section, key = path.split(".")
        assert key in Experiment.model_fields[section].annotation.model_fields, path
    keys = {key for section in (Controls, Model, Data, Evaluation) for key in section.model_fields}
    assert keys & OTHER_NAMES.keys() <= {"base_model"}  # evaluation.base_model is another thing than model.path
