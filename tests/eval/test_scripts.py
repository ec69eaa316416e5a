"""The two scripts that evaluate an adapter without the workflow: one number, with a merged model and without."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_ai.log import EvalLog, list_eval_logs, read_eval_log
from peft import LoraConfig, get_peft_model

import forked_evaluation
from recipes import GIVEN_TEMPLATE
from sweep import ROOT, wait_until
from tiny_model import CHAT_TEMPLATE, make_model, make_tokenizer

TASKS = '''
import os
from pathlib import Path

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, mean, scorer
from inspect_ai.solver import generate, solver


@scorer(metrics=[mean()])
def checksum():
    """Every character of an answer counts."""
    async def score(state, target):
        return Score(value=sum(place * ord(letter) for place, letter in enumerate(state.output.completion, 1)))
    return score


@task
def sums():
    return Task(dataset=[Sample(input=f"How much is {n * 37}?") for n in range(6)], scorer=checksum())


@task
def failing():
    @solver
    def fail():
        async def solve(state, generate):
            raise RuntimeError("told to fail")
        return solve
    return Task(dataset=[Sample(input="?")], solver=fail(), scorer=checksum())


@task
def waiting():
    @solver
    def wait():
        async def solve(state, generate):
            Path("begun").touch()
            await anyio.sleep_forever()
        return solve
    return Task(dataset=[Sample(input="?")], solver=wait(), scorer=checksum())
'''

MERGE, DIRECT = "eval_adapter_merge.py", "eval_adapter_direct.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    tokenizer = make_tokenizer(has_chat_template=True)
    tokenizer.save_pretrained(folder / "base")
    base = make_model("llama3", tokenizer, seed=1)
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "adapter")
    (folder / "tasks.py").write_text(TASKS)
    return folder


def prepare(folder: Path, task: str, tmp_path: Path) -> tuple[list[str], dict[str, Any]]:
    (tmp_path / "tmp").mkdir(parents=True, exist_ok=True)
    arguments = ["--base", "base", "--adapter", "adapter", "--task", f"tasks.py@{task}", "--max-tokens", "8"]
    places = {"TMPDIR": str(tmp_path / "tmp"), "XDG_DATA_HOME": str(tmp_path / "data")}
    environment = {**os.environ, **places, "HF_HUB_OFFLINE": "1"}
    return [*arguments, "--log-dir", str(tmp_path / "logs")], {"environment": environment, "cwd": folder}


def call(script: str, folder: Path, task: str, tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], EvalLog]:
    """Call a script on the fixture's model; return what it said, and its log."""
    arguments, settings = prepare(folder, task, tmp_path)
    done = forked_evaluation.call(ROOT / "scripts" / script, arguments, **settings)
    logs = list_eval_logs(str(tmp_path / "logs"))
    assert len(logs) == 1, done.stderr
    [log] = logs
    return done, read_eval_log(log)


def list_merged(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "tmp").glob("merged-*"))


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(CHAT_TEMPLATE, marks=pytest.mark.long, id="the base's"),
        pytest.param(GIVEN_TEMPLATE, id="the adapter's"),
    ],
)
def test_both_scripts_give_the_same_answers_and_scores_to_the_prompts_of_training(
    folder: Path, tmp_path: Path, template: str
) -> None:
    if template != CHAT_TEMPLATE:
        folder = shutil.copytree(folder, tmp_path / "folder")
        (folder / "adapter/chat_template.jinja").write_text(template)
    logs = {}
    for script in (MERGE, DIRECT):
        done, logs[script] = call(script, folder, "sums", tmp_path / script)
        assert done.returncode == 0, done.stderr
        assert list_merged(tmp_path / script) == []
    scores = [log.results.scores[0].metrics["mean"].value for log in logs.values()]
    assert scores[0] == scores[1] > 0
    answers = [[sample.output.completion for sample in log.samples or []] for log in logs.values()]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 6
    render = make_tokenizer(has_chat_template=True).apply_chat_template
    chats = [[{"role": "user", "content": sample.input}] for sample in logs[MERGE].samples or []]
    longest = max(len(render(c, chat_template=template, add_generation_prompt=True)["input_ids"]) for c in chats)
    # A batch is padded to its longest prompt.
    assert {log.samples[0].output.usage.input_tokens for log in logs.values() if log.samples} == {longest}


@pytest.mark.parametrize("script", [MERGE, DIRECT])
def test_a_failed_evaluation_is_told_and_leaves_no_merged_model(script: str, folder: Path, tmp_path: Path) -> None:
    done, log = call(script, folder, "failing", tmp_path)
    assert log.status == "error"
    assert done.returncode == 1
    assert "told to fail" in done.stdout
    assert list_merged(tmp_path) == []


def test_a_job_that_is_cancelled_leaves_no_merged_model(folder: Path, tmp_path: Path) -> None:
    arguments, settings = prepare(folder, "waiting", tmp_path)
    process = forked_evaluation.start(ROOT / "scripts" / MERGE, arguments, **settings)
    wait_until(lambda: (folder / "begun").exists() or not process.is_alive())
    assert list_merged(tmp_path) != []
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert list_merged(tmp_path) == []
