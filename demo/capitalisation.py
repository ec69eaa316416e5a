"""The demo's task: answer a word with the same word, capitalised."""

from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def capitalisation(file: str = str(Path(__file__).parent / "test.jsonl")) -> Task:
    """Words that training did not see; the answer must be the capitalised word and nothing else."""
    return Task(
        dataset=json_dataset(file, FieldSpec(input="input", target="output")),
        solver=generate(),
        scorer=match(location="exact", ignore_case=False),
    )
