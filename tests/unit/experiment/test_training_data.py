"""Training data: samples are read as they are written, of each kind of file and format, or refused with their line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lorasweep.experiment.sections import Data
from lorasweep.experiment.training_data import Sample, check_data, read_samples
from lorasweep.util.errors import InputError

GOOD = '{"input": "a", "output": "b"}\n'
PAIR = ("user", "a"), ("assistant", "b")
ROWS = [{"input": "a", "output": "b"}, {"input": "é, \n", "output": '"2024-01-01"'}, {"input": "007", "output": "1e5"}]


def read(path: Path, content: str | bytes, **keys: Any) -> list[Sample]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    data = Data.model_validate({"train": str(path), **keys})
    samples = list(read_samples(data.get_files("train"), data.format, data.columns, None, data.system_prompt))
    assert check_data(data).samples == min(len(samples), data.max_samples or len(samples))
    return samples


def refuse(path: Path, content: str | bytes, **keys: Any) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        check_data(Data.model_validate({"train": str(path), **keys}))
    return str(error.value)


def read_pairs(path: Path, content: str | bytes, **keys: Any) -> list[tuple[str, ...]]:
    return [tuple(message.content for message in sample.messages) for sample in read(path, content, **keys)]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "lines"),
        [
            (GOOD * 3, [1, 2, 3]),
            (f"\n{GOOD}\n{GOOD}{GOOD}\n", [2, 4, 5]),
            (f"[\n{GOOD},\n{GOOD},{GOOD}]\n", [2, 4, 5]),
            (f" \n[{GOOD}]", [2]),
            ("\ufeff" + GOOD * 2, [1, 2]),
            (f"\ufeff[{GOOD}]", [1]),
            (GOOD.replace("\n", "\r\n") * 2, [1, 2]),
            ('[{"input":\n"a",\n"output":"b"},\n\n{"input": "a", "output": "b"}]', [1, 5]),
        ],
    )
    def test_json_lines_and_one_array_are_read_with_each_samples_line(
        self, tmp_path: Path, content: str, lines: list[int]
    ) -> None:
        samples = read(tmp_path / "data", content)
        assert [sample.place for sample in samples] == [f"{tmp_path}/data:{line}" for line in lines]
        assert {sample.messages for sample in samples} == {PAIR}

    def test_csv_is_read_as_text_with_each_samples_first_line(self, tmp_path: Path) -> None:
        content = '\ufeffinput,output,more\na,b,\n"é, \n","""2024-01-01""",3\n\n007,1e5,\n'
        samples = read(tmp_path / "data.csv", content)
        assert [tuple(m.content for m in s.messages) for s in samples] == [tuple(row.values()) for row in ROWS]
        assert [sample.place for sample in samples] == [f"{tmp_path}/data.csv:{line}" for line in (2, 3, 6)]

    def test_a_cell_of_a_megabyte_is_read(self, tmp_path: Path) -> None:
        assert read_pairs(tmp_path / "data.csv", f"input,output\n{'a' * 10**6},b\n") == [("a" * 10**6, "b")]

    def test_parquet_is_read_with_each_samples_row(self, tmp_path: Path) -> None:
        samples = read(tmp_path / "data.parquet", write_parquet(tmp_path / "p", ROWS).read_bytes())
        assert [tuple(m.content for m in s.messages) for s in samples] == [tuple(row.values()) for row in ROWS]
        assert samples[2].place == f"{tmp_path}/data.parquet: row 3"

    def test_several_files_are_read_in_order_and_cut_at_max_samples(self, tmp_path: Path) -> None:
        files = [tmp_path / "z.jsonl", tmp_path / "a.csv", write_parquet(tmp_path / "m.parquet", ROWS)]
        files[0].write_text('{"input": "1", "output": "one"}\n')
        files[1].write_text("output,input\ntwo,2\nthree,3\n")
        data = Data.model_validate({"train": list(map(str, files)), "max_samples": 4})
        samples = list(read_samples(data.get_files("train"), "instruct", data.columns, 4))
        assert [sample.messages[0].content for sample in samples] == ["1", "2", "3", "a"]
        assert check_data(data) == (4, len("1one2two3threeab"))
        # Sections are keys of tables.
        assert len({data, data.model_copy()}) == 1
        files[1].write_text("output,input\n")
        with pytest.raises(InputError, match=r"^data\.train: .*a\.csv has no samples"):
            check_data(data)

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("data", "", "has no samples"),
            ("data", "[]", "has no samples"),
            ("data", "\n \n", "has no samples"),
            ("data.csv", "input,output\n", "has no samples"),
            ("data", GOOD + "{oops}\n", "data:2: not JSON"),
            ("data", GOOD + GOOD.strip() + GOOD, "data:2: not JSON (Extra data, column 30)"),
            ("data", '{\n  "input": "a",\n  "output": "b"\n}\n', "data:1: not JSON"),
            ("data", "input,output\na,b\n", "data:1: not JSON (Expecting value, column 1). Expected: one JSON"),
            ("data", GOOD + '["a", "b"]\n', "data:2: ['a', 'b'] is invalid. Expected: a JSON object"),
            ("data", f'[\n{GOOD},\n\n{{"input": "a"}}\n]', "data:5: no column 'output'"),
            ("data", f'[\n{GOOD}{{"input": "a"}}\n]', "data:3: not JSON (Expecting ',' delimiter, column 1)"),
            ("data", f"[\n{GOOD},\n", "data:4: not JSON"),
            ("data", f"[{GOOD},]", "data:2: not JSON"),
            ("data", f"[{GOOD}] {GOOD}", "data:2: not JSON (Extra data, column 3)"),
            ("data", GOOD + '{"input": "a", "output": "b", "output": "c"}', "data:2: the key 'output' is there twice"),
            ("data", f'[{GOOD},\n{{"input": {{"a": 1, "a": 1}}}}]', "data:3: the key 'a' is there twice"),
            ("data", GOOD.encode() + b'{"input": "\xff"}', "data:2: not UTF-8 text (invalid start byte at byte 12 of"),
            ("data", GOOD.encode("utf-16"), "data:1: not UTF-8 text"),
            ("data", GOOD + f'{{"n": {"1" * 5000}}}', "data:2: JSON that cannot be read"),
            ("data", GOOD + "[" * 10**5, "data:2: JSON that cannot be read"),
            ("data.csv", "input;output\na;b\n", "data.csv:2: no column 'input' (data.input_column)"),
            ("data.csv", "input,output\na,b\na,b,c\n", "data.csv:3: the row has 3 cells, but the header has 2 columns"),
            ("data.csv", 'input,output\n"a\nb",c\nd\n', "data.csv:4: the row has 1 cells"),
            ("data.csv", 'input,output\n"a"b,c\n', "data.csv:2: not CSV"),
            ("data.csv", 'input,output\na,"b\n\n', "data.csv:2: not CSV"),
            ("data.csv", "input,input\na,b\n", "data.csv:1: the column 'input' is there twice"),
            ("data.csv", b"input,output\na,b\n\xe9,b\n", "data.csv:3: not UTF-8 text"),
            ("data.parquet", GOOD, "data.parquet: not Parquet"),
        ],
    )
    def test_what_cannot_be_read_is_refused_with_its_line(
        self, tmp_path: Path, name: str, content: str | bytes, said: str
    ) -> None:
        message = refuse(tmp_path / name, content)
        assert said in message
        assert str(tmp_path / name) in message

    def test_missing_data_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"^data\.train: no such file: .*JSON lines, one JSON array, CSV"):
            check_data(Data.model_validate({"train": str(tmp_path / "none")}))
        with pytest.raises(InputError, match=r"^data\.train: is missing"):
            check_data(Data())

    def test_a_file_that_has_changed_is_read_again(self, tmp_path: Path) -> None:
        assert len(read(tmp_path / "data", GOOD)) == 1
        assert len(read(tmp_path / "data", GOOD * 2)) == 2


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.booleans())
def test_any_text_is_read_as_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], ascii: bool
) -> None:
    rows = [{"input": question, "output": answer} for question, answer in pairs]
    folder = tmp_path_factory.mktemp("data")
    lines = "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows)
    assert read_pairs(folder / "lines", lines) == pairs
    assert read_pairs(folder / "array", json.dumps(rows, ensure_ascii=ascii, indent=1)) == pairs


class TestValues:
    def test_what_other_readers_would_convert_is_left_alone(self, tmp_path: Path) -> None:
        answers = ["2024-01-01", "2024-01-01T00:00:00Z", "12:30", "007", "1e5", "null", "true", "NaN"]
        for answer in answers:
            line = json.dumps({"input": "a", "output": answer}) + "\n"
            assert read_pairs(tmp_path / "data", line * 3) == [("a", answer)] * 3

    def test_columns_that_are_not_used_may_hold_anything_and_begin_anywhere(self, tmp_path: Path) -> None:
        more = ["1", '"one"', '["one", 1]', '{"a": 1}', "null"]
        lines = GOOD * 1000 + "".join(GOOD.replace("}", f', "more": {value}}}') for value in more)
        assert read_pairs(tmp_path / "data", lines) == [("a", "b")] * 1005

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ('{"input": "a"}', "data:2: no column 'output' (data.output_column)"),
            ('{"input": "a", "ouput": "b"}', "did you mean 'ouput'"),
            ('{"input": "a", "output": 3}', "data:2: output: 3 is invalid. Expected: text"),
            ('{"input": "a", "output": null}', "data:2: output: None is invalid. Expected: text that is not empty"),
            ('{"input": "", "output": "b"}', "data:2: input: '' is invalid. Expected: text that is not empty"),
            ('{"input": ["a"], "output": "b"}', "data:2: input: ['a'] is invalid. Expected: text"),
            (r'{"input": "a", "output": "b\ud83d"}', r"data:2: output: character 2 is a lone surrogate ('\ud83d')"),
        ],
    )
    def test_a_value_that_is_no_text_is_refused_with_its_line(self, tmp_path: Path, line: str, said: str) -> None:
        assert said in refuse(tmp_path / "data", f"{GOOD}{line}\n")

    def test_a_pair_of_surrogates_is_one_character(self, tmp_path: Path) -> None:
        assert read_pairs(tmp_path / "data", r'{"input": "a", "output": "\ud83d\ude00"}') == [("a", "😀")]

    def test_a_time_in_parquet_is_no_text(self, tmp_path: Path) -> None:
        rows = [{"input": "a", "output": pa.scalar(0, pa.timestamp("s")).as_py()}]
        said = refuse(tmp_path / "data.parquet", write_parquet(tmp_path / "p", rows).read_bytes())
        assert "data.parquet: row 1: output: datetime.datetime(1970, 1, 1, 0, 0) is invalid. Expected: text" in said


class TestFormats:
    def test_plain_text_is_a_sample_without_messages(self, tmp_path: Path) -> None:
        line = '{"text": "a and b"}\n'
        assert [sample.text for sample in read(tmp_path / "data", line, format="completion")] == ["a and b"]
        renamed = line.replace("text", "body")
        assert read(tmp_path / "data", renamed, format="completion", text_column="body")[0].text == "a and b"
        assert "data:1: no column 'text' (data.text_column)" in refuse(tmp_path / "data", renamed, format="completion")

    @pytest.mark.parametrize("context", ['"c"', '""', "null", None])
    def test_alpacas_question_is_the_instruction_and_the_input_if_there_is_one(
        self, tmp_path: Path, context: str | None
    ) -> None:
        line = '{"instruction": "a", "output": "b"' + (f', "input": {context}}}' if context else "}")
        question = "a\n\nc" if context == '"c"' else "a"
        assert read_pairs(tmp_path / "data", line, format="alpaca") == [(question, "b")]

    def test_alpacas_columns_may_have_other_names_and_come_from_csv(self, tmp_path: Path) -> None:
        columns = {"instruction_column": "task", "input_column": "context", "output_column": "answer"}
        content = "task,context,answer\na,,b\na,c,b\n"
        pairs = read_pairs(tmp_path / "data.csv", content, format="alpaca", **columns)
        assert pairs == [("a", "b"), ("a\n\nc", "b")]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ('{"output": "b"}', "data:1: no column 'instruction' (data.instruction_column)"),
            ('{"instruction": "a"}', "data:1: no column 'output'"),
            ('{"instruction": "a", "input": 3, "output": "b"}', "data:1: input: 3 is invalid. Expected: text"),
        ],
    )
    def test_bad_alpaca_samples_are_refused(self, tmp_path: Path, line: str, said: str) -> None:
        assert said in refuse(tmp_path / "data", line, format="alpaca")

    def test_chat_and_sharegpt_samples_are_the_same_messages(self, tmp_path: Path) -> None:
        chat = [("system", "s"), *PAIR, *PAIR]
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        rows: dict[str, Any] = {
            "chat": {"messages": [{"role": role, "content": text} for role, text in chat]},
            "sharegpt": {"conversations": [{"from": names[role], "value": text} for role, text in chat]},
        }
        for format, row in rows.items():
            [sample] = read(tmp_path / "data", json.dumps(row), format=format)
            assert sample.messages == tuple(chat)
            [sample] = read(tmp_path / "d.parquet", write_parquet(tmp_path / "p", [row]).read_bytes(), format=format)
            assert sample.messages == tuple(chat)
        renamed = json.dumps({"turns": rows["sharegpt"]["conversations"]})
        assert len(read(tmp_path / "data", renamed, format="sharegpt", conversations_column="turns")) == 1

    @pytest.mark.parametrize(
        ("messages", "said"),
        [
            ('"a"', "data:1: messages: 'a' is invalid. Expected: a list of messages"),
            ("[]", "data:1: messages: [] is invalid"),
            ('[{"role": "robot", "content": "a"}]', "data:1: messages.0: "),
            ('[{"role": "user", "content": 1}]', "data:1: messages.0: "),
            (r'[{"role": "user", "content": "\udc00"}]', "data:1: messages.0.content: character 1 is a lone surrogate"),
            ('[{"role": "user", "content": "a"}]', "data:1: messages: the roles user are invalid"),
            ('[{"role": "assistant", "content": "a"}]', "the roles assistant are invalid"),
            ('[{"role": "system", "content": "a"}]', "the roles system are invalid"),
            (
                '[{"role": "assistant", "content": "a", "weight": 0}]',
                "data:1: messages.0.weight: 0 is invalid: every answer is learnt. Expected: 1, or no weight",
            ),
            (
                '[{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]',
                "data:1: messages.0.tool_calls: [{'id': '1'}] is invalid: only the text of a message is learnt",
            ),
            (
                '[{"role": "assistant", "content": "a", "function_call": {"name": "f"}}]',
                "data:1: messages.0.function_call: {'name': 'f'} is invalid",
            ),
        ],
    )
    def test_bad_conversations_are_refused(self, tmp_path: Path, messages: str, said: str) -> None:
        assert said in refuse(tmp_path / "data", f'{{"messages": {messages}}}', format="chat")
        sharegpt = messages.replace("role", "from").replace("content", "value")
        changed = said.replace("messages", "conversations").replace("content", "value").replace("of conv", "of mess")
        assert changed.split(". Expected")[0] in refuse(
            tmp_path / "data", f'{{"conversations": {sharegpt}}}', format="sharegpt"
        )

    def test_keys_of_a_message_that_say_nothing_else_are_accepted(self, tmp_path: Path) -> None:
        asked = {"role": "user", "content": "a", "weight": 0}
        answer = {"role": "assistant", "content": "b", "weight": 1.0, "tool_calls": [], "function_call": None}
        for turns in ([asked, answer], [{**asked, "weight": None}, {**answer, "weight": None}]):
            [sample] = read(tmp_path / "data", json.dumps({"messages": turns}), format="chat")
            assert sample.messages == (("user", "a"), ("assistant", "b"))

    def test_a_turn_of_a_tool_is_refused_with_the_roles_that_would_do(self, tmp_path: Path) -> None:
        line = '{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]}'
        said = refuse(tmp_path / "data", line, format="sharegpt")
        assert "data:1: conversations.1: {'from': 'function_call'" in said
        assert "'from' (system, human, user, gpt, assistant)" in said

    @pytest.mark.parametrize("format", ["chat", "sharegpt"])
    def test_a_system_message_beside_the_system_prompt_is_refused(self, tmp_path: Path, format: str) -> None:
        key, role, text = ("messages", "role", "content") if format == "chat" else ("conversations", "from", "value")
        turns = [{role: who, text: who} for who in ("system", "user", "assistant")]
        line = json.dumps({key: turns})
        assert len(read(tmp_path / "data", line, format=format)) == 1
        said = refuse(tmp_path / "data", line, format=format, system_prompt="another")
        assert f"{key}.0: a system message is invalid beside data.system_prompt" in said

    @pytest.mark.parametrize(
        ("format", "line", "said"),
        [
            ("chat", '{"conversations": []}', "it has: conversations. Expected: this column, or data.format: sharegpt"),
            ("alpaca", GOOD, "it has: input, output. Expected: this column, or data.format: instruct"),
            ("instruct", '{"a": "b"}', "data:1: no column 'input' (data.input_column); it has: a"),
            ("instruct", "{}", "it has: none"),
        ],
    )
    def test_the_format_that_the_columns_fit_is_named(self, tmp_path: Path, format: str, line: str, said: str) -> None:
        assert refuse(tmp_path / "data", line, format=format).endswith(said)

    def test_conversations_are_not_in_csv(self, tmp_path: Path) -> None:
        said = refuse(tmp_path / "data.csv", "messages\na\n", format="chat")
        assert "data.csv:2: messages: 'a' is invalid. Expected: a list of messages" in said


@pytest.mark.parametrize("value", [[], [""], [1], "", 1, ["a*"], ["hf://datasets/org/name/file.txt"], "hf://org/name"])
def test_what_is_no_file_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="train"):
        Data.model_validate({"train": value})
