"""What cannot be right stops the run before a job starts, and leaves nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasweep.util.errors import FAULT, ending_with_a_message
from sweep import ROOT, Sweep

SPOILT_SHELL = ["a/b", "..", "a b", "a'b", 'a"b', "a;touch x", "$(touch x)", "{point}", "a\nb"]


def edit(**sections: Any) -> Callable[[Sweep], None]:
    return lambda sweep: sweep.edit(**sections)


def remove(name: str) -> Callable[[Sweep], None]:
    return lambda sweep: (sweep.directory / name).unlink()


def write(name: str, text: str) -> Callable[[Sweep], None]:
    def change(sweep: Sweep) -> None:
        (sweep.directory / name).write_text(text)

    return change


def append(name: str, text: str) -> Callable[[Sweep], None]:
    def change(sweep: Sweep) -> None:
        with (sweep.directory / name).open("a") as file:
            file.write(text)

    return change


def write_bytes(name: str) -> Callable[[Sweep], None]:
    return lambda sweep: (sweep.directory / name).write_bytes(b"\xff\xfe\x00\x80")


def with_plain_trainer(**sections: Any) -> Callable[[Sweep], None]:
    def change(sweep: Sweep) -> None:
        sweep.environment["PYTHONPATH"] = str(ROOT / "tests")
        sweep.edit(trainer="plain_trainer", **sections)

    return change


def without_chat_template(sweep: Sweep) -> None:
    sweep.edit(data={"format": "chat"}, controls={"batch_size": 1})
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (sweep.directory / "train.jsonl").write_text(json.dumps(chat))
    (sweep.directory / "model/tokenizer_config.json").write_text("{}")


def with_a_token_too_many(sweep: Sweep) -> None:
    tokens = {"added_tokens": [{"id": 32, "content": "<|im_end|>", "special": True}]}
    (sweep.directory / "model/tokenizer.json").write_text(json.dumps(tokens))
    settings = {"chat_template": "{{ messages }}", "eos_token": "<|im_end|>"}
    (sweep.directory / "model/tokenizer_config.json").write_text(json.dumps(settings))


def with_template(text: str, system_prompt: str | None = None) -> Callable[[Sweep], None]:
    def change(sweep: Sweep) -> None:
        (sweep.directory / "model/chat_template.jinja").write_text(text)
        sweep.edit(data={"system_prompt": system_prompt})

    return change


def with_chat_template(text: str, change: Callable[[Sweep], None] = Sweep.write) -> Callable[[Sweep], None]:
    def change_too(sweep: Sweep) -> None:
        (sweep.directory / "own.jinja").write_text(text)
        sweep.edit(model={"chat_template": "own.jinja"})
        change(sweep)

    return change_too


def own_adapter(sweep: Sweep) -> None:
    adapter = sweep.results / "lora_rank=4/adapter"
    adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).touch()
    sweep.edit(runs=[{"name": "again", "adapter": str(adapter.relative_to(sweep.directory))}])


def adapter_only(said: bool) -> dict[str, Any]:
    return {"_override": {"checkpointer": {"save_adapter_weights_only": said}}}


CLOCK = "{{ strftime_now(messages[0].form) }}"
FORBIDS = "{% if messages[0].role == 'system' %}{{ raise_exception('Nobody.') }}{% endif %}"

BAD: dict[str, tuple[Callable[[Sweep], None], list[str]]] = {
    "an unknown key": (edit(evalution={}), ["sweep.yaml", "'evalution'", "did you mean 'evaluation'"]),
    "an unknown control": (edit(controls={"lora_rnk": 4}), ["controls.lora_rnk", "did you mean 'lora_rank'"]),
    "no truth value": (
        edit(evaluation={"merge_adapters": "yes please"}),
        ["evaluation.merge_adapters", "'yes please'", "boolean"],
    ),
    "rank 0": (edit(controls={"lora_rank": 0}), ["controls.lora_rank", "0", "greater than or equal to 1"]),
    "a rank as text": (edit(variables={"lora_rank": ["8"]}), ["variables.lora_rank.0", "'8'", "integer"]),
    "an empty variable": (edit(variables={"lora_rank": []}), ["variables.lora_rank", "at least 1 item"]),
    "a value twice": (edit(variables={"lora_rank": [4, 4]}), ["variables.lora_rank", "4", "listed twice"]),
    "a point twice": (edit(runs=[{"name": "again", "lora_rank": 4}]), ["'lora_rank=4'", "'again'", "the same"]),
    "a section twice": (
        append("sweep.yaml", "variables: {lora_rank: [16]}\ncontrols: {lr: 1.0e-3}\n"),
        [
            "sweep.yaml:29: the key 'variables' is there twice, first",
            "sweep.yaml:30: the key 'controls' is there twice",
        ],
    ),
    "no such model": (edit(model={"path": "none"}), ["model.path", "'none'", "a local Hugging Face checkpoint"]),
    "no weights": (remove("model/model.safetensors.index.json"), ["model.path", "has no weights"]),
    "a shard missing": (remove("model/model-00001.safetensors"), ["model.path", "lacks model-00001.safetensors"]),
    "an unknown model": (
        write("model/config.json", json.dumps({"model_type": "mamba"})),
        ["model_type 'mamba'", "Llama 2, 3, 3.1 and 3.2"],
    ),
    "no chat template": (without_chat_template, ["model.path", "no chat template", "data.format: instruct"]),
    "a chat template that is none": (
        with_chat_template("{% if %}"),
        ["sweep.yaml: model.chat_template: 'own.jinja' is no template: line 1: Expected an expression"],
    ),
    "no such chat template": (
        edit(model={"chat_template": "none.jinja"}),
        ["sweep.yaml: model.chat_template: 'none.jinja' cannot be read: No such file or directory"],
    ),
    "a chat template that the trainer does not take": (
        with_chat_template("{{ messages }}", with_plain_trainer()),
        ["model.chat_template: 'own.jinja' is invalid with trainer: plain_trainer, which has no TAKES_CHAT_TEMPLATE"],
    ),
    "hf and adapters alone": (
        edit(controls=adapter_only(True), evaluation={"model_format": "hf"}),
        ["mode A", "model_format: adapter", "save_adapter_weights_only: True"],
    ),
    "adapter and full models": (
        edit(controls=adapter_only(False)),
        ["mode B1", "model_format: hf", "save_adapter_weights_only: False"],
    ),
    "no data": (remove("train.jsonl"), ["data.train", "no such file: train.jsonl"]),
    "empty data": (write("train.jsonl", ""), ["data.train", "has no samples"]),
    "data that is no JSON": (
        write("train.jsonl", '{"input": "a", "output": "b"}\noops\n'),
        ["train.jsonl:2", "not JSON"],
    ),
    "data without a column": (
        write("train.jsonl", '{"input": "a", "output": "b"}\n{"input": "a"}\n'),
        ["train.jsonl:2", "no column 'output'"],
    ),
    "a number in place of text": (
        append("train.jsonl", '{"input": "a", "output": 7}\n'),
        ["train.jsonl:26: output: 7 is invalid. Expected: text"],
    ),
    "half a character": (
        append("train.jsonl", r'{"input": "a", "output": "\ud83d"}'),
        ["train.jsonl:26: output: character 1 is a lone surrogate"],
    ),
    "a sample with a key twice": (
        append("train.jsonl", '{"input": "a", "output": "b", "output": "c"}'),
        ["train.jsonl:26: the key 'output' is there twice"],
    ),
    "data that is no text": (write_bytes("train.jsonl"), ["train.jsonl", "UTF-8"]),
    "a task file that is no text": (write_bytes("tasks.py"), ["tasks.py"]),
    "a model's configuration that is no JSON": (write("model/config.json", "{"), ["model/config.json"]),
    "no such task file": (edit(evaluation={"tasks": ["none.py@x"]}), ["evaluation.tasks.0", "no such file: none.py"]),
    "no such task": (edit(evaluation={"tasks": ["tasks.py@leters"]}), ["tasks.py", "did you mean 'letters'"]),
    "no such registered task": (
        edit(evaluation={"tasks": ["no_such_package/task"]}),
        ["evaluation.tasks", "no_such_package/task", "registers"],
    ),
    "no such registered solver": (
        edit(evaluation={"tasks": [{"task": "tasks.py@letters", "solver": "no_such", "scorer": "match"}]}),
        ["evaluation.tasks", "registers no_such. Expected"],
    ),
    "a batch of more than there is": (edit(controls={"batch_size": 30}), ["batch_size: 30", "25 samples"]),
    "a batch of more than there is for each": (
        edit(controls={"batch_size": 10, "gpus": 3}),
        ["batch_size: 10", "on 3 gpus", "25 samples", "a product of the three"],
    ),
    "a pattern for a path": (edit(data={"train": "train[1].jsonl"}), ["data.train", "'train[1].jsonl'", "patterns"]),
    "an override that is none": (edit(controls={"_override": {"a": "${"}}), ["controls._override"]),
    "an adapter of its own": (own_adapter, ["adapter:", "lora_rank=4/adapter", "'again'", "outside of results/"]),
    "a system prompt in plain text": (
        edit(data={"format": "completion", "input_column": "text", "system_prompt": "Answer."}),
        ["data.system_prompt", "'Answer.'", "plain text"],
    ),
    "a prompt in plain text": (
        edit(data={"format": "completion", "input_column": "text", "prompt": "Answer {input}"}),
        ["data.prompt", "'Answer {input}'", "data.format: completion"],
    ),
    "a run's prompt in plain text": (
        edit(data={"format": "completion"}, runs=[{"name": "asked", "prompt": "Answer {input}"}]),
        ["data.prompt", "'Answer {input}' (point 'asked')", "data.format: completion"],
    ),
    "no text": (edit(data={"format": "completion"}), ["train.jsonl:1: no column 'text' (data.text_column)"]),
    "no such baseline": (
        edit(evaluation={"baselines": [{"name": "other", "model": "none"}]}),
        ["evaluation.baselines.0.model", "no such directory: 'none'"],
    ),
    "a baseline called as a point": (
        edit(evaluation={"baselines": [{"name": "lora_rank=4", "model": "model"}]}),
        ["evaluation.baselines.0.name", "'lora_rank=4'", "differs from those of points"],
    ),
    "a model of its own": (
        edit(evaluation={"baselines": [{"name": "other", "model": "results/planned/lora_rank=4/hf_model"}]}),
        ["evaluation.baselines.0.model", "is in this experiment", "outside of results/"],
    ),
    "no such task to report on": (edit(report={"task": "leters"}), ["report.task", "'leters'", "Expected: letters"]),
    "too many adapters a job": (edit(evaluation={"adapters_per_job": 1000}), ["adapters_per_job", "1000", "200"]),
    "no such trainer": (
        edit(trainer="torchtun"),
        ["sweep.yaml: trainer: 'torchtun' is not known (did you mean 'torchtune'?). Expected: torchtune, trl, or the"],
    ),
    "a trainer that is none": (
        edit(trainer="lorasweep.trainers.training_log"),
        ["sweep.yaml: trainer: 'lorasweep.trainers.training_log' is not a trainer: it has no STAGE, recipe"],
    ),
    "a trainer that cannot keep the best epoch": (
        with_plain_trainer(data={"validation": "train.jsonl"}, evaluation={"epochs": "best"}),
        [
            "sweep.yaml: evaluation.epochs: 'best' is invalid with trainer: plain_trainer, which has no "
            "KEEPS_BEST_EPOCH = True. Expected: trainer: torchtune or trl; or an evaluation.validation_task; or last, "
            "all, or a list of epochs"
        ],
    ),
    "the best epoch without validation": (
        edit(evaluation={"epochs": "best"}),
        ["sweep.yaml: evaluation.epochs: 'best' is invalid without data.validation (point 'lora_rank=4')"],
    ),
    "an epoch chosen by a task": (
        edit(data={"validation": "train.jsonl"}, evaluation={"epochs": {"best": "letters"}}),
        [
            "sweep.yaml: evaluation.epochs: {'best': 'letters'} is invalid",
            "'best' without more; a task that chooses the epoch is evaluation.validation_task",
        ],
    ),
    "an epoch chosen by what is reported": (
        edit(evaluation={"epochs": "best", "validation_task": {"task": "tasks.py@letters", "name": "dev"}}),
        [
            "sweep.yaml: evaluation.validation_task: 'tasks.py@letters' has the samples of evaluation.tasks.0 "
            "('letters'), whose scores would be too good",
            "Expected: other samples, by other args or another task",
        ],
    ),
    "a task to choose that is called as another": (
        edit(evaluation={"epochs": "best", "validation_task": {"task": "tasks.py@letters", "args": {"size": 9}}}),
        [
            "sweep.yaml: evaluation.validation_task: evaluation.tasks.0 is named 'letters' too. Expected: a 'name' of "
            "its own, such as dev_letters"
        ],
    ),
    "no such task to choose": (
        edit(evaluation={"epochs": "best", "validation_task": "no_such_package/task"}),
        ["sweep.yaml: evaluation.validation_task: no installed package registers no_such_package/task"],
    ),
    "a task to choose for some points": (
        edit(evaluation={"epochs": "best", "validation_task": {"task": "tasks.py@letters", "when": "lr > 1"}}),
        ["sweep.yaml: unknown key 'evaluation.validation_task.when'", "Expected: task, name, args"],
    ),
    "patience without a best epoch": (
        edit(data={"validation": "train.jsonl"}, controls={"patience": 2}),
        ["sweep.yaml: controls.patience: 2 is invalid without evaluation.epochs: best"],
    ),
    "an override of the best epoch": (
        edit(
            data={"validation": "train.jsonl"},
            evaluation={"epochs": "best"},
            controls={"_override": {"best_epoch": {"patience": 9}}},
        ),
        ["controls._override.best_epoch", "this is set by evaluation.epochs"],
    ),
    "a trainer that needs more than there is": (
        edit(trainer="lorasweep.trainers.torchtune.tokenizer"),
        ["trainer: 'lorasweep.trainers.torchtune.tokenizer' cannot be imported where Snakemake runs: No module named"],
    ),
    "a judge on a server without the network": (
        edit(evaluation={"model_roles": {"grader": "openai/gpt-4o"}}),
        ["sweep.yaml: evaluation.model_roles.grader: 'openai/gpt-4o' is asked over the network", "allow_network: true"],
    ),
    "a judge with a key": (
        edit(evaluation={"model_roles": {"grader": {"model": "openai/gpt-4o", "args": {"api_key": "sk-1"}}}}),
        ["evaluation.model_roles.grader.args.api_key: a secret does not belong in the file", "environment variable"],
    ),
    "judges that Inspect refuses": (
        edit(
            evaluation={
                "allow_network": True,
                "model_roles": {
                    "grader": "opnai/gpt-4o",
                    "critic": {"model": "mockllm/model", "config": {"temprature": 1}},
                },
            }
        ),
        [
            "evaluation.model_roles.grader: opnai/gpt-4o: Model API opnai of model 'opnai/gpt-4o' not recognized",
            "evaluation.model_roles.critic: mockllm/model: ",
            "Unknown GenerateConfig field(s): temprature",
        ],
    ),
    "a judge whose key is not in the environment": (
        edit(evaluation={"allow_network": True, "model_roles": {"grader": "openai/gpt-4o"}}),
        ["evaluation.model_roles.grader: openai/gpt-4o: Unable to initialise OpenAI client No OPENAI_API_KEY, "],
    ),
    "a token without a row": (
        with_a_token_too_many,
        ["sweep.yaml: model.path: 'model': the tokenizer has the token '<|im_end|>' with the id 32", "has 32 rows"],
    ),
    "a tokenizer that is no JSON": (write("model/tokenizer.json", "{"), ["model/tokenizer.json' is not JSON"]),
    "a system prompt that the template refuses": (
        with_template(FORBIDS, "Be brief."),
        ["sweep.yaml: data.system_prompt: the chat template of 'model' refuses a system message: Nobody."],
    ),
    "a date that cannot be fixed": (
        with_template(CLOCK),
        ["model.path: data.template_date cannot fix the date"],
    ),
    "a date that is none": (edit(data={"template_date": "26 Jul 2024"}), ["data.template_date", "YYYY-MM-DD"]),
    "no task": (edit(evaluation={"tasks": []}), ["evaluation.tasks", "at least one"]),
    **{
        f"a run called {name!r}": (edit(runs=[{"name": name, "lora_rank": 2}]), ["runs.0.name", "letters, digits"])
        for name in SPOILT_SHELL
    },
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_input_costs_no_job_and_leaves_nothing(make: Callable[..., Sweep], problem: str) -> None:
    spoil, said = BAD[problem]
    sweep = make()
    spoil(sweep)
    before = {path for path in sweep.directory.rglob("*") if ".snakemake" not in path.parts}
    done = sweep.snakemake()
    text = done.stdout + done.stderr
    assert done.returncode == 1
    for part in said:
        assert part in text
    # What was wrong, and neither a place in the code nor a word of whose fault it is.
    for word in ("Traceback", 'File "', "Error in file", "Error:", FAULT):
        assert word not in text
    assert {path for path in sweep.directory.rglob("*") if ".snakemake" not in path.parts} == before


def test_a_fault_of_ours_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=FAULT), ending_with_a_message():
        {}["a key"]
    assert "KeyError: 'a key'" in capsys.readouterr().err


def test_a_number_that_yaml_takes_for_text_is_a_number(make: Callable[..., Sweep]) -> None:
    sweep = make()
    text = (sweep.directory / "sweep.yaml").read_text()
    (sweep.directory / "sweep.yaml").write_text(text.replace("lr: 0.004", "lr: 1e-3"))
    sweep.run("configure_all")
    assert "lr: 0.001\n" in (sweep.find_training("lora_rank=4") / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    "value", ["a;touch pwned", "$(touch pwned)", "`touch pwned`", "a'b", 'a"b', "{point}", "a\nb", "a b"]
)
def test_free_text_in_the_file_reaches_no_shell(make: Callable[..., Sweep], value: str) -> None:
    sweep = make(data={"train": "train.jsonl", "system_prompt": value}, controls={"_override": {"note": value}})
    sweep.run("configure_all")
    recipe = (sweep.find_training("lora_rank=4") / "recipe.yaml").read_text()
    assert yaml.safe_load(recipe)["note"] == value
    assert yaml.safe_load(recipe)["dataset"]["new_system_prompt"] == value
    assert not list(sweep.directory.rglob("pwned"))


def test_a_missing_model_stops_a_run_and_not_a_dry_run(make: Callable[..., Sweep]) -> None:
    sweep = make()
    sweep.edit(model={"path": "none"})
    assert sweep.plan()["train"] == 2
    assert "no such directory: 'none'" in sweep.run("--dry-run")
    assert Path(sweep.directory / "results").exists() is False
