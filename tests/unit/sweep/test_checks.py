"""Training data and tasks: what is accepted, and where messages point."""

from pathlib import Path

import pytest

from lorasweep.experiment.sections import Data, Task
from lorasweep.experiment.tasks import get_tasks
from lorasweep.experiment.training_data import check_data
from lorasweep.planning.counting import guess_lengths
from lorasweep.util.errors import InputError

GOOD = '{"input": "a", "output": "b"}\n'


def check(path: Path, text: str | bytes, **keys: str | int) -> int:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return check_data(Data.model_validate({"train": str(path), **keys}))


@pytest.mark.parametrize("text", [GOOD * 3, "\n" + GOOD * 3 + "\n", "[\n" + ",\n".join([GOOD] * 3) + "]\n"])
def test_json_lines_and_one_array_are_read(tmp_path: Path, text: str) -> None:
    assert check(tmp_path / "data", text) == 3


BAD = [
    ("", "has no samples"),
    ("[]", "has no samples"),
    ("\n \n", "has no samples"),
    (GOOD + '{"input": "a"}\n', "data:2: no column 'output' (data.output_column)"),
    (GOOD + '{"input": "a", "ouput": "b"}\n', "did you mean 'ouput'"),
    (GOOD + '{"input": "a", "output": 3}\n', "data:2: output: 3"),
    (GOOD + '{"input": "", "output": "b"}\n', "data:2: input: ''"),
    (GOOD + "{oops}\n", "data:2: not JSON"),
    ("input,output\na,b\n", "data:1: not JSON"),
    (GOOD + '["a", "b"]\n', "data:2: "),
    ('[\n{"input": "a", "output": "b"},\n\n{"input": "a"}\n]', "data: sample 2: no column 'output'"),
    ('[\n{"input": "a", "output": "b"}\n{"input": "a"}\n]', "data:3: not JSON"),
    ('[\n{"input": "a", "output": "b"},\n', "not JSON"),
    (b"\xff\xfe\x00", "not UTF-8 text"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[str(text)[:30] for text, _ in BAD])
def test_bad_data_is_refused_with_its_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(InputError) as error:
        check(tmp_path / "data", text)
    assert said in str(error.value)
    assert str(tmp_path / "data") in str(error.value)


def test_missing_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.train: no such file"):
        check_data(Data.model_validate({"train": str(tmp_path / "none")}))


TEXT = '{"text": "a and b"}\n'


def test_plain_text_is_read_and_counted_up_to_the_limit(tmp_path: Path) -> None:
    assert check(tmp_path / "data", TEXT * 3, format="completion") == 3
    assert check(tmp_path / "data", GOOD * 3, max_samples=2) == 2
    assert check(tmp_path / "data", GOOD * 3, max_samples=5) == 3
    assert check(tmp_path / "data", GOOD, format="completion", text_column="input") == 1
    with pytest.raises(InputError, match=r"data:2: no text in the column 'txt' \(data\.text_column\)"):
        check(tmp_path / "data", '{"txt": "a"}\n' + TEXT, format="completion", text_column="txt")


def test_a_guess_of_lengths_is_of_the_samples_that_are_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_text(TEXT * 2 + '{"text": "' + "long " * 1000 + '"}\n')
    data = Data(train=str(file), format="completion", max_samples=2)
    assert guess_lengths(data, 2).get_mean(None) == len(TEXT) / 4
    assert guess_lengths(data.model_copy(update={"max_samples": None}), 3).get_mean(None) > 100


CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def test_chat_samples_are_read(tmp_path: Path) -> None:
    assert check(tmp_path / "data", CHAT, format="chat") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD, "data:1: no list of messages in the column 'messages'"),
        (CHAT.replace("assistant", "robot"), "data:1: messages.1"),
        (CHAT.replace('"assistant"', '"user"'), "the roles user, user are invalid"),
        (CHAT.replace('"user"', '"system"'), "the roles system, assistant are invalid"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "the roles assistant are invalid"),
    ],
)
def test_bad_chat_samples_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        check(tmp_path / "data", text, format="chat")
    assert said in str(error.value)


def test_a_system_message_beside_the_system_prompt_is_refused(tmp_path: Path) -> None:
    own = CHAT.replace('[{"role"', '[{"role": "system", "content": "s"}, {"role"', 1)
    assert check(tmp_path / "data", own, format="chat") == 1
    with pytest.raises(InputError, match=r"is invalid beside data\.system_prompt"):
        check(tmp_path / "data", own, format="chat", system_prompt="another")


TASKS = """
from inspect_ai import Task, task

@task
def words(size: int = 3): ...

@task(name="other")
def letters(**options): ...

@task
def needs(a, b, *, c, d=1): ...

@solver
def think(steps: int = 1): ...

def helper(): ...
"""


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    file = tmp_path / "tasks.py"
    file.write_text(TASKS)
    return file


def named(task: str, **keys: object) -> Task:
    return Task.model_validate({"task": task, **keys})


def test_tasks_are_called_as_inspect_calls_them(tasks_file: Path) -> None:
    entries = get_tasks([named(f"{tasks_file}@words", args={"size": 4}), named(f"{tasks_file}@other", args={"any": 1})])
    assert [entry.name for entry in entries] == ["words", "other"]


def test_a_registered_task_is_called_after_its_last_part() -> None:
    [entry] = get_tasks([named("inspect_evals/arc_easy")])
    assert (entry.name, entry.file) == ("arc_easy", None)


@pytest.mark.parametrize(
    ("task", "keys", "said"),
    [
        ("none.py@words", {}, "no such file: none.py"),
        ("{file}@word", {}, "did you mean 'words'"),
        ("{file}@helper", {}, "no task 'helper'"),
        ("{file}", {}, "no single task"),
        ("{file}@letters", {}, "no task 'letters'"),
        ("{file}@words", {"args": {"sise": 1}}, "did you mean 'size'"),
        ("{file}@needs", {"args": {"a": 1}}, "needs b, c, which have no default"),
        ("{file}@words", {"files": ["none.jsonl"]}, "no such file: none.jsonl"),
        (
            "{file}@words",
            {"solver": "none.py@think"},
            "solver: no such file: none.py. Expected: file.py@solver",
        ),
        ("{file}@words", {"solver": "{file}@thin"}, "no solver 'thin' (did you mean 'think'"),
        ("{file}@words", {"solver": "{file}@words"}, "no solver 'words'"),
        ("{file}@words", {"solver": "{file}@think", "solver_args": {"step": 2}}, "'step' is not an argument"),
        ("{file}@words", {"solver_args": {"steps": 2}}, "solver_args: {'steps': 2} is invalid without 'solver'"),
        ("{file}@words", {"scorer": "{file}@think"}, "no scorer 'think'"),
        ("inspect_evals/arc_easy", {"scorer_args": {"a": 2}}, "is invalid without 'scorer'"),
    ],
)
def test_a_task_that_does_not_exist_is_refused(tasks_file: Path, task: str, keys: dict[str, object], said: str) -> None:
    values = {k: v.format(file=tasks_file) if isinstance(v, str) else v for k, v in keys.items()}
    with pytest.raises(InputError) as error:
        get_tasks([named(task.format(file=tasks_file), **values)])
    assert str(error.value).startswith("evaluation.tasks.0")
    assert said in str(error.value)


def test_a_solver_and_a_scorer_are_found_where_they_are(tasks_file: Path) -> None:
    [entry] = get_tasks(
        [named("pkg/t", solver=f"{tasks_file}@think", solver_args={"steps": 2}, scorer="match", files=["data.csv"])]
    )
    assert entry.files == [str(tasks_file), "data.csv"]
    assert entry.registered == [("task", "pkg/t"), ("scorer", "match")]


def test_a_task_file_that_is_no_python_is_refused(tasks_file: Path) -> None:
    tasks_file.write_text("def (")
    with pytest.raises(InputError, match=r"tasks\.py:1: not Python"):
        get_tasks([named(f"{tasks_file}@words")])


def test_two_tasks_of_one_name_are_refused(tasks_file: Path) -> None:
    with pytest.raises(InputError, match="two tasks are named 'words'"):
        get_tasks([named(f"{tasks_file}@words"), named(f"{tasks_file}@words", args={"size": 1})])
