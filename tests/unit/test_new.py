"""`lorasweep new`: what it writes plans as it stands, it says what it chose, and it overwrites nothing."""

import argparse
import builtins
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasweep.checkpoints.architecture import ARCHITECTURES
from lorasweep.cli import new
from lorasweep.sweep import first_experiment
from lorasweep.sweep.sweep import Sweep
from lorasweep.util.errors import InputError
from plain_checkpoint import write_checkpoint
from sweep import ROOT

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, samples and a task, on a machine without a GPU and without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(new, "find_device", lambda: "cpu")
    monkeypatch.setattr("shutil.which", lambda name: None)
    (tmp_path / ".snakemake/lorasweep").mkdir(parents=True)
    (ROOT / ARCHITECTURES).mkdir(parents=True, exist_ok=True)
    (tmp_path / ARCHITECTURES).symlink_to(ROOT / ARCHITECTURES)
    write_checkpoint(tmp_path / "models/base")
    write_rows([{"input": f"after {i}", "output": "b"} for i in range(20)])
    (tmp_path / "tasks.py").write_text("@task\ndef mine():\n    pass\n\n@task\ndef other(size):\n    pass\n")
    return tmp_path


def write_rows(rows: Rows, file: str = "train.jsonl") -> str:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def call(*words: str) -> None:
    parser = argparse.ArgumentParser()
    new.add_arguments(parser)
    new.run(parser.parse_args(words))


def call_with(**changes: str) -> dict[str, Any]:
    """Call it with the options that are enough, and `changes` to them; return what is written."""
    options = {"model": "models/base", "data": "train.jsonl"} | changes
    call("my.yaml", *(word for key, value in options.items() for word in (f"--{key}", value)))
    written: dict[str, Any] = yaml.safe_load(Path("my.yaml").read_text())
    return written


def uncomment(text: str) -> str:
    """Remove the first # of each line that is a comment after its indentation."""
    return re.sub("^( +)#", r"\1", text, flags=re.MULTILINE)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make this a terminal at which these answers are given; what is asked is in the list that is returned."""

    def answer(*answers: str) -> list[str]:
        left, asked = iter(answers), list[str]()

        def ask(question: str) -> str:
            asked.append(question)
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", ask)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        return asked

    return answer


def test_options_are_enough_and_the_last_lines_are_the_next_commands(capsys: pytest.CaptureFixture[str]) -> None:
    written = call_with(task="tasks.py@mine", name="ranks")
    assert written["experiment"]["name"] == "ranks"
    assert written["variables"] == {"lora_rank": [8, 16, 32]}
    assert written["model"] == {"path": "models/base", "dtype": "fp32", "device": "cpu"}
    assert written["trainer"] == "torchtune"
    columns = {"input_column": "input", "output_column": "output"}
    assert written["data"] == {"train": "train.jsonl", "format": "instruct", **columns}
    assert written["evaluation"]["tasks"] == ["tasks.py@mine"]
    sweep = Sweep.load(written, "my.yaml")
    sweep.check(asks_inspect=False)
    assert [*sweep.points] == ["lora_rank=8", "lora_rank=16", "lora_rank=32"]
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    snakemake = f"snakemake --snakefile {ROOT}/Snakefile --configfile my.yaml"
    assert lines[-3:] == [f"{snakemake} -n", f"{snakemake} --cores {os.cpu_count()}", "lorasweep show my.yaml"]
    assert "No NVIDIA GPU on this machine: device: cpu, dtype: fp32." in lines


def test_each_key_has_a_comment_and_the_file_is_a_page() -> None:
    call_with(task="tasks.py@mine")
    lines = Path("my.yaml").read_text().splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 120
    keys = [line for line in lines if ":" in line and not line.startswith(("experiment:", "#", "    -"))]
    assert all("  # " in line for line in keys)


def test_a_key_that_is_a_comment_is_a_key_without_its_first_sign() -> None:
    call_with(task="tasks.py@mine")
    written = yaml.safe_load(uncomment(Path("my.yaml").read_text()))
    assert written["variables"] == {"lora_rank": [8, 16, 32], "lr": ["1e-4", "3e-4", "1e-3"]}
    assert written["evaluation"]["max_tokens"] == 256


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"prompt": "a", "completion": "b"}, {"format": "instruct", "input_column": "prompt"}),
        ({"id": "1", "question": "a", "answer": "b"}, {"format": "instruct", "output_column": "answer"}),
        ({"wort": "a", "plural": "b", "n": 1}, {"format": "instruct", "input_column": "wort"}),
        ({"instruction": "a", "input": "", "output": "b"}, {"format": "alpaca"}),
        ({"instruction": "a", "output": "b"}, {"format": "alpaca"}),
        ({"text": "a", "source": "b"}, {"format": "completion", "text_column": "text"}),
        ({"story": "a", "n": 1}, {"format": "completion", "text_column": "story"}),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"format": "chat", "messages_column": "messages"},
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"format": "sharegpt", "conversations_column": "conversations"},
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"format": "chat", "messages_column": "conversations"},
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_format_and_the_columns_are_those_of_the_file(
    row: dict[str, Any], keys: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows([row] * 3)
    written = call_with()
    assert keys.items() <= written["data"].items()
    assert written["controls"]["batch_size"] == 3  # else an epoch had no step
    assert f"train.jsonl: 3 samples; format: {keys['format']}" in capsys.readouterr().out


def test_csv_and_a_json_array_are_read(folder: Path) -> None:
    (folder / "train.csv").write_text("question,answer\n" + "a,b\n" * 9)
    assert call_with(data="train.csv")["data"]["input_column"] == "question"
    (folder / "my.yaml").unlink()
    (folder / "train.json").write_text(json.dumps([{"text": "a"}] * 9))
    assert call_with(data="train.json")["data"]["format"] == "completion"


def test_columns_of_other_names_are_named_by_an_option() -> None:
    write_rows([{"a": "x", "b": "y", "c": "z"}] * 9)
    with pytest.raises(InputError, match=r"train.jsonl: the columns of text are a, b, c; .* --columns QUESTION ANSWER"):
        call_with()
    call("my.yaml", "--model", "models/base", "--data", "train.jsonl", "--columns", "c", "a")
    data = yaml.safe_load(Path("my.yaml").read_text())["data"]
    assert (data["input_column"], data["output_column"]) == ("c", "a")


def test_without_a_task_points_are_trained_only_and_the_file_says_how_to_add_one() -> None:
    assert call_with()["evaluation"] == {"enabled": False}
    lines = [line for line in Path("my.yaml").read_text().splitlines() if "enabled:" not in line]
    assert yaml.safe_load(uncomment("\n".join(lines)))["evaluation"] == {"tasks": ["tasks/mine.py@mine"]}


def test_several_tasks_a_registered_one_and_the_only_one_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.py").write_text("@task(name='shown')\ndef single():\n    pass\n")
    options = ["--model", "models/base", "--data", "train.jsonl"]
    call("my.yaml", *options, "--task", "one.py", "--task", "tasks.py@mine", "--task", "inspect_evals/gsm8k")
    tasks = yaml.safe_load(Path("my.yaml").read_text())["evaluation"]["tasks"]
    assert tasks == ["one.py@shown", "tasks.py@mine", "inspect_evals/gsm8k"]
    assert "inspect_evals/gsm8k: the name of a registered task, which a dry run looks up." in capsys.readouterr().out


def test_a_model_that_torchtune_does_not_know_is_for_trl(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("models/odd"), chat_template=False, attention_bias=True)
    written = call_with(model="models/odd/")
    assert (written["trainer"], written["controls"]["lora_modules"]) == ("trl", "all-linear")
    assert not {"lora_attn_modules", "apply_lora_to_mlp"} & written["controls"].keys()
    said = capsys.readouterr().out
    assert "models/odd: trainer: trl, as torchtune cannot train it (attention_bias true)." in said
    assert "models/odd: has no chat template: a prompt is 'user: ' with the text and a line break, unless" in said


def test_of_a_mixture_with_fused_experts_the_attention_gets_adapters() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "mixtral", "num_key_value_heads": 2, "vocab_size": 300, **sizes}
    Path("models/mixture").mkdir()
    Path("models/mixture/config.json").write_text(json.dumps(config))
    written = call_with(model="models/mixture")
    assert written["controls"]["lora_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_with_a_gpu_the_model_is_in_bf16_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call_with(device="cuda")["model"] == {"path": "models/base", "dtype": "bf16", "device": "cuda"}
    Path("my.yaml").unlink()
    monkeypatch.setattr(new, "find_device", lambda: "cuda")
    assert call_with()["model"]["device"] == "cuda"


def test_a_machine_with_nvidia_tools_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/nvidia0").exists():
        assert first_experiment.find_device() == "cpu"
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    assert first_experiment.find_device() == "cuda"


def test_for_slurm_the_run_is_with_its_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/sbatch" if name == "sbatch" else None)
    call_with(device="cuda")
    assert "my.yaml --profile slurm\n" in capsys.readouterr().out
    Path("my.yaml").unlink()
    call_with()
    assert "; for SLURM's nodes with GPUs: --device cuda.\n" in capsys.readouterr().out


def test_what_is_on_the_hub_is_accepted_unread_and_downloaded_first(capsys: pytest.CaptureFixture[str]) -> None:
    data = "hf://datasets/org/set/train.parquet"
    written = call_with(model="org/name", data=data)
    assert (written["model"]["path"], written["data"]["train"]) == ("org/name", data)
    said = capsys.readouterr().out
    assert "org/name: no such directory here, so hf://org/name@main on the hub is meant" in said
    assert "  lorasweep download my.yaml\n" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "models"}, "--model: models: has no config.json. Expected: a Hugging Face checkpoint directory"),
        ({"model": "/none"}, "--model: /none: no such directory. Expected: a Hugging Face checkpoint directory"),
        ({"model": "hf:none"}, "--model: path: 'hf:none' is invalid. Expected: a local Hugging Face checkpoint"),
        ({"data": "none.jsonl"}, "--data: none.jsonl: no such file. Expected: a file of JSON lines"),
        ({"data": "tasks.py"}, "--data: tasks.py:1: not JSON"),
        ({"data": "hf://none"}, "--data: train: 'hf://none' is invalid"),
        ({"task": "none.py@mine"}, "--task: no such file: none.py"),
        ({"task": "tasks.py@min"}, "has no task 'min' (did you mean 'mine'?)"),
        ({"task": "tasks.py@other"}, "tasks.py@other needs size, which have no default"),
        ({"name": "a/b"}, "--name: name: 'a/b' is invalid"),
    ],
)
def test_what_is_wrong_is_said_before_a_file_is_written(changes: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        call_with(**changes)
    assert said in str(refused.value)
    assert not Path("my.yaml").exists()


def test_a_wrong_sample_and_an_empty_file_are_named() -> None:
    write_rows([{"input": "a", "output": "b"}, {"input": "a", "output": 3}])
    with pytest.raises(InputError, match=r"train.jsonl:2: output: 3 is invalid. Expected: text"):
        call_with()
    write_rows([])
    with pytest.raises(InputError, match=r"train.jsonl: no samples. Expected: at least one"):
        call_with()


def test_what_only_the_whole_shows_is_said_and_the_file_stays() -> None:
    write_checkpoint(Path("models/plain"), chat_template=False)
    write_rows([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 9)
    with pytest.raises(InputError, match=r"my.yaml is written, but does not plan yet:\nmy.yaml: model.path: the token"):
        call_with(model="models/plain")
    assert Path("my.yaml").exists()


def test_no_file_is_overwritten() -> None:
    Path("my.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"my.yaml: is there already, and is not overwritten"):
        call_with()
    assert Path("my.yaml").read_text() == "mine"
    for file, said in (("none/my.yaml", "no such directory: none"), ("my.txt", "is no name of a YAML file")):
        with pytest.raises(InputError, match=said):
            call(file, "--model", "models/base", "--data", "train.jsonl")


def test_without_a_terminal_the_missing_options_are_named() -> None:
    with pytest.raises(
        InputError, match=r"--model and --data: not given, and there is no terminal to ask on. Expected"
    ):
        call("my.yaml")
    with pytest.raises(InputError, match=r"^--data: not given"):
        call("my.yaml", "--model", "models/base")
    assert not Path("my.yaml").exists()


def test_an_empty_answer_is_the_default_in_brackets(answer: Callable[..., list[str]]) -> None:
    asked = answer("", "", "", "")
    call("my.yaml")
    assert [question.rpartition(" [")[2] for question in asked] == [
        *("models/base]: ", "train.jsonl]: ", "none]: ", "my]: ")
    ]
    written = yaml.safe_load(Path("my.yaml").read_text())
    assert written["model"]["path"] == "models/base"
    assert written["evaluation"] == {"enabled": False}


def test_a_wrong_answer_is_asked_for_again(
    answer: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answer("/none", "models/base", "none.csv", "train.jsonl", "tasks.py", "tasks.py@mine", "", "ranks")
    call("my.yaml")
    assert len(asked) == 8
    said = capsys.readouterr().out
    assert "/none: no such directory" in said
    assert "none.csv: no such file" in said
    assert "tasks.py has no single task" in said
    written = yaml.safe_load(Path("my.yaml").read_text())
    assert written["evaluation"]["tasks"] == ["tasks.py@mine"]
    assert written["experiment"]["name"] == "ranks"


def test_on_a_terminal_unclear_columns_are_asked_for(answer: Callable[..., list[str]]) -> None:
    write_rows([{"a": "x", "b": "y", "c": "z"}] * 9)
    asked = answer("c", "none", "", "", "")
    call("my.yaml", "--model", "models/base", "--data", "train.jsonl")
    assert asked[:3] == [
        *(
            "Column of the user's turn [a]: ",
            "Column of the answer to learn [a]: ",
            "Column of the answer to learn [a]: ",
        )
    ]
    data = yaml.safe_load(Path("my.yaml").read_text())["data"]
    assert (data["input_column"], data["output_column"]) == ("c", "a")


def test_who_ends_the_questions_has_no_file(answer: Callable[..., list[str]]) -> None:
    answer("models/base")
    with pytest.raises(InputError, match=r"my.yaml: not written, since not all was answered"):
        call("my.yaml")
    assert not Path("my.yaml").exists()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal: a person's, and the program's."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_on_a_real_terminal_it_asks(terminal: tuple[int, int], folder: Path) -> None:
    ours, theirs = terminal
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    command = [sys.executable, "-m", "lorasweep", "new", "my.yaml", "--device", "cpu"]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, env=environment, encoding="utf-8")
    os.close(theirs)
    os.write(ours, b"\n\ntasks.py@mine\n\n\n")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "Model: a checkpoint directory, or org/name on the hub [models/base]: " in said
    assert yaml.safe_load((folder / "my.yaml").read_text())["evaluation"]["tasks"] == ["tasks.py@mine"]
