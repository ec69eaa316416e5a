"""The dataset of a training: torchtune's own tokens where torchtune reads data right, and the text as it is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from torchtune import datasets

from lorasweep.experiment.sections import Data
from lorasweep.experiment.training_data import read_samples
from lorasweep.trainers import TrainingError
from lorasweep.trainers.torchtune.dataset import training_data
from lorasweep.trainers.torchtune.run import measure_lengths
from lorasweep.trainers.torchtune.tokenizer import ChatTokenizer

END = "<|im_end|>\n"


def load(model: Path, *, max_seq_len: int | None = None, packed: bool = False, **keys: Any) -> Any:
    data = Data.model_validate(keys)
    return training_data(
        ChatTokenizer(str(model), max_seq_len),
        data_files=data.get_files("train"),
        format=data.format,
        column_map=data.columns,
        new_system_prompt=data.system_prompt,
        train_on_input=data.train_on_input,
        max_samples=data.max_samples,
        too_long=data.too_long,
        packed=packed,
    )


def list_samples(dataset: Any) -> list[dict[str, list[int]]]:
    samples = [dataset[index] for index in range(len(dataset))]
    return [{key: [int(token) for token in sample[key]] for key in ("tokens", "labels")} for sample in samples]


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_answers(model: Path, dataset: Any) -> list[str]:
    tokenizer = ChatTokenizer(str(model)).tokenizer
    labels = [[label for label in sample["labels"] if label != -100] for sample in list_samples(dataset)]
    return [tokenizer.decode(answer) for answer in labels]


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "instruct": [{"input": f"after {letter * n}", "output": letter} for n, letter in enumerate("abcdefgh", 1)],
    "completion": [{"text": f"after {letter * n}"} for n, letter in enumerate("abcdefgh", 1)],
    "chat": [{"messages": CHAT}, {"messages": CHAT[1:]}, {"messages": CHAT + CHAT[1:]}, {"messages": CHAT[1:] * 3}],
}
COMPONENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "instruct": (datasets.instruct_dataset, {"column_map": {"input": "input", "output": "output"}}),
    "completion": (datasets.text_completion_dataset, {"column": "text"}),
    "chat": (datasets.chat_dataset, {"conversation_column": "messages", "conversation_style": "openai"}),
}
CASES = [
    ("instruct", {}),
    ("instruct", {"train_on_input": True}),
    ("instruct", {"system_prompt": "Answer."}),
    ("instruct", {"max_samples": 3}),
    ("instruct", {"packed": True}),
    ("completion", {}),
    ("completion", {"packed": True}),
    ("chat", {}),
    ("chat", {"train_on_input": True}),
    ("chat", {"packed": True, "max_samples": 3}),
]


@pytest.mark.parametrize(("format", "keys"), CASES)
def test_tokens_and_labels_are_those_of_torchtunes_own_components(
    model: Path, tmp_path: Path, format: str, keys: dict[str, Any]
) -> None:
    file = write(tmp_path / "train.jsonl", *ROWS[format])
    limit = 150 if keys.get("packed") else None
    component, columns = COMPONENTS[format]
    theirs = {"train_on_input": False, "system_prompt": None, **keys}
    renamed = {"new_system_prompt": theirs["system_prompt"], "train_on_input": theirs["train_on_input"]}
    expected = component(
        ChatTokenizer(str(model), limit),
        source="json",
        data_files=str(file),
        split=f"train[:{keys['max_samples']}]" if "max_samples" in keys else "train",
        packed=keys.get("packed", False),
        cache_dir=str(tmp_path / "cache"),
        **columns,
        **({} if format == "completion" else renamed),
    )
    ours = load(model, train=str(file), format=format, max_seq_len=limit, **keys)
    assert list_samples(ours) == list_samples(expected)
    assert type(ours) is type(expected) or not keys.get("packed")


@pytest.mark.parametrize("answer", ["2024-01-01", "2024-01-01T00:00:00Z", "007", "1e5", "null"])
def test_answers_that_look_like_something_else_are_learnt_as_they_are_written(
    model: Path, tmp_path: Path, answer: str
) -> None:
    rows = [{"input": "when?", "output": answer} for _ in range(3)]
    jsonl = write(tmp_path / "train.jsonl", *rows)
    (tmp_path / "train.csv").write_text("".join(f"{row}\n" for row in ("input,output", *[f"when?,{answer}"] * 3)))
    for file in (jsonl, tmp_path / "train.csv"):
        assert read_answers(model, load(model, train=str(file))) == [answer + END] * 3


def test_a_column_that_appears_late_is_no_matter(model: Path, tmp_path: Path) -> None:
    rows = [{"input": "a" * 1000, "output": "b"}] * 12_000
    file = write(tmp_path / "train.jsonl", *rows, {"input": "a", "output": "c", "note": 1})
    assert file.stat().st_size > 10 * 2**20
    samples = list(read_samples([str(file)], "instruct", {"input": "input", "output": "output"}))
    assert (len(samples), samples[-1].messages[1].content) == (12_001, "c")


def test_alpaca_and_sharegpt_are_tokenized_as_the_same_in_our_formats(model: Path, tmp_path: Path) -> None:
    same = {
        "instruct": {"input": "a\n\nc", "output": "b"},
        "alpaca": {"instruction": "a", "input": "c", "output": "b"},
        "chat": {"messages": [{"role": "user", "content": "a\n\nc"}, {"role": "assistant", "content": "b"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "a\n\nc"}, {"from": "gpt", "value": "b"}]},
    }
    found = [
        list_samples(load(model, train=str(write(tmp_path / format, row)), format=format))
        for format, row in same.items()
    ]
    assert found[0]
    assert found == [found[0]] * 4


class TestTooLong:
    """A question of 30 tokens with an answer of 3 or 10 tokens, and one that is too long without an answer."""

    LIMIT = 35

    def load(self, model: Path, tmp_path: Path, too_long: str, **keys: Any) -> Any:
        question = "a" * (30 - len("user\n\nassistant\n") - 3)
        rows = [{"input": question, "output": "b"}, {"input": question, "output": "b" * 8}]
        rows.append({"input": "a" * 100, "output": "b"})
        file = write(tmp_path / "train.jsonl", *rows)
        return load(model, train=str(file), too_long=too_long, max_seq_len=self.LIMIT, **keys)

    def test_it_ends_the_training_before_its_first_step_with_the_line(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"train\.jsonl:2: has 40 tokens, more than max_seq_len = 35"):
            self.load(model, tmp_path, "error")

    def test_dropped_it_is_in_no_batch(self, model: Path, tmp_path: Path) -> None:
        assert read_answers(model, self.load(model, tmp_path, "drop")) == ["b" + END]

    def test_cut_it_has_no_end_and_without_an_answer_it_is_left_out(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dataset = self.load(model, tmp_path, "truncate")
        assert capsys.readouterr().out == "Samples longer than max_seq_len: 1 left out, 1 cut\n"
        assert read_answers(model, dataset) == ["b" + END, "b" * 5]
        assert [len(sample["tokens"]) for sample in list_samples(dataset)] == [33, 35]

    def test_a_prompt_that_is_learnt_too_is_cut(self, model: Path, tmp_path: Path) -> None:
        dataset = self.load(model, tmp_path, "truncate", train_on_input=True)
        assert [len(sample["tokens"]) for sample in list_samples(dataset)] == [33, 35, 35]

    def test_text_of_exactly_the_limit_keeps_its_end(self, model: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "train.jsonl", {"text": "a" * 10}, {"text": "a" * 11})
        tokenizer = ChatTokenizer(str(model))
        whole = tokenizer.encode("a" * 10)
        dataset = load(model, train=str(file), format="completion", too_long="truncate", max_seq_len=len(whole))
        first, second = [sample["tokens"] for sample in list_samples(dataset)]
        assert first == whole
        assert second == tokenizer.encode("a" * 11)[: len(whole)]

    def test_of_none_that_is_left_it_is_said(self, model: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "train.jsonl", {"input": "a" * 100, "output": "b"})
        with pytest.raises(TrainingError, match=r"train\.jsonl: all samples are longer than max_seq_len, and left out"):
            load(model, train=str(file), too_long="truncate", max_seq_len=50)


class TestLengths:
    def test_they_are_of_every_sample_whole_by_parts(self, make: Any, tmp_path: Path) -> None:
        validation = write(tmp_path / "validation.jsonl", {"input": "a" * 100, "output": "bc"})
        data = {"validation": str(validation), "too_long": "drop"}
        recipe = make(data=data, max_seq_len=40, packed=True)
        measured = measure_lengths(recipe)
        samples = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
        frame = len("user\n\nassistant\n") + 3
        expected = [[frame + len(s["input"]), len(s["output"]) + 2] for s in samples]
        assert measured == {"train": expected, "validation": [[frame + 100, 4]]}

    def test_of_a_conversation_they_alternate_and_of_text_they_are_learnt(self, make: Any, tmp_path: Path) -> None:
        chat = write(tmp_path / "chat", {"messages": CHAT + CHAT[1:]})
        frame = len("user\n\nassistant\n") + 3
        [parts] = measure_lengths(make("chat", data={"train": str(chat), "format": "chat"}))["train"]
        assert parts == [len("system\ns\n") + 2 + frame + 1, 3, frame + 1, 3]
        text = write(tmp_path / "text", {"text": "abc"})
        [parts] = measure_lengths(make("text", data={"train": str(text), "format": "completion"}))["train"]
        assert (parts[0], len(parts)) == (0, 2)

    def test_a_sample_that_cannot_be_tokenized_is_named_with_its_line(
        self, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        recipe = make()
        whole = ChatTokenizer.tokenize_conversation

        def fail(self: Any, messages: Any) -> Any:
            if "ccc" in messages[0].content:
                raise ValueError("this template fails")
            return whole(self, messages)

        monkeypatch.setattr(ChatTokenizer, "tokenize_conversation", fail)
        with pytest.raises(
            TrainingError, match=r"train\.jsonl:3: cannot be tokenized: ValueError: this template fails"
        ):
            measure_lengths(recipe)
