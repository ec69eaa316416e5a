"""Checkpoint directories: what their headers say, and what is said of broken ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from plain_checkpoint import LLAMA, write_checkpoint


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=2)


def test_parameters_and_ties_are_read_from_the_headers(tmp_path: Path) -> None:
    untied = read_checkpoint(write_checkpoint(tmp_path / "untied"))
    tied = read_checkpoint(write_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    assert untied.num_parameters - tied.num_parameters == LLAMA["vocab_size"] * LLAMA["hidden_size"]
    assert (untied.tied, tied.tied) == (False, True)


def test_shards_and_a_single_file_hold_the_same(tmp_path: Path, whole: Path) -> None:
    single = read_checkpoint(write_checkpoint(tmp_path / "single"))
    sharded = read_checkpoint(whole)
    assert len(sharded.shards) == 2
    assert sharded.tensors.keys() == single.tensors.keys()
    assert sharded.fingerprint == single.fingerprint


def test_a_copy_has_the_same_fingerprint_and_other_weights_another(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    shutil.copytree(whole, tmp_path / "other")
    first = next((tmp_path / "other").glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    assert read_checkpoint(tmp_path / "copy").fingerprint == read_checkpoint(whole).fingerprint
    assert read_checkpoint(tmp_path / "other").fingerprint != read_checkpoint(whole).fingerprint


@pytest.mark.parametrize(
    "name",
    [
        *("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model", "qwen.tiktoken"),
        *("additional_chat_templates/tool_use.jinja", "custom_generate/generate.py"),
    ],
)
def test_what_decides_prompts_and_answers_is_in_the_fingerprint(tmp_path: Path, whole: Path, name: str) -> None:
    shutil.copytree(whole, tmp_path / "other")
    (tmp_path / "other" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "other" / name).write_text('{"changed": true}')
    assert read_checkpoint(tmp_path / "other").fingerprint != read_checkpoint(whole).fingerprint


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
def test_code_is_in_the_fingerprint_if_a_configuration_names_it(tmp_path: Path, whole: Path, config: str) -> None:
    shutil.copytree(whole, tmp_path / "other")
    (tmp_path / "other/modeling_own.py").write_text("")
    assert read_checkpoint(tmp_path / "other").fingerprint == read_checkpoint(whole).fingerprint
    content = json.loads((whole / config).read_text()) | {"auto_map": {}}
    (tmp_path / "other" / config).write_text(json.dumps(content))
    shutil.copytree(tmp_path / "other", tmp_path / "changed")
    (tmp_path / "changed/modeling_own.py").write_text("changed = True")
    named, changed = (read_checkpoint.__wrapped__(tmp_path / name).fingerprint for name in ("other", "changed"))
    assert named != changed


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such directory: '.*none'. Expected: a local Hugging Face checkpoint"):
        read_checkpoint(tmp_path / "none")


def remove(name: str, model: Path) -> None:
    (model / name).unlink()


def truncate(name: str, model: Path) -> None:
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[:-40])


def add_adapter(name: str, model: Path) -> None:
    (model / name).write_text("{}")


def scribble(name: str, model: Path) -> None:
    (model / name).write_text("<html>not found</html>")


def keep_bin_only(name: str, model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / name).write_bytes(b"")


def empty_index(name: str, model: Path) -> None:
    (model / name).write_text(json.dumps({"weight_map": {}}))


def broken_index(name: str, model: Path) -> None:
    (model / name).write_text(json.dumps({"weight_map": []}))


def change_header(old: bytes, new: bytes) -> Callable[[str, Path], None]:
    def change(name: str, model: Path) -> None:
        content = (model / name).read_bytes()
        assert old in content
        (model / name).write_bytes(content.replace(old, new, 1))

    return change


def repeat_shard(name: str, model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["again"] = "again.safetensors"
    shutil.copyfile(model / name, model / "again.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def add_single(name: str, model: Path) -> None:
    shutil.copyfile(model / name, model / "model.safetensors")


change_dtype = change_header(b'"F32"', b'"F33"')
change_shape = change_header(b'"shape":[8,8]', b'"shape":[8,9]')
change_name = change_header(b"q_proj", b"z_proj")
change_place = change_header(b'"data_offsets":[0,', b'"data_offsets":[4,')

BROKEN = [
    (change_dtype, "model-00000.safetensors", "is not a safetensors file"),
    (
        change_shape,
        "model-00000.safetensors",
        r"is not a safetensors file .* is F32 \[8, 9\], its offsets",
    ),
    (change_place, "model-00000.safetensors", "is not a safetensors file"),
    (change_name, "model-00001.safetensors", "in model-00001.safetensors, which lacks it"),
    (add_single, "model-00000.safetensors", "Expected: one of them, since libraries differ"),
    (repeat_shard, "model-00000.safetensors", "in again.safetensors and in model-00000.safetensors. Expected: one"),
    (remove, "config.json", "has no config.json"),
    (remove, "tokenizer.json", "has no tokenizer"),
    (remove, "model-00001.safetensors", "lacks model-00001.safetensors"),
    (add_adapter, "adapter_config.json", "transformers would apply that adapter to the base model"),
    (truncate, "model-00000.safetensors", "is truncated"),
    (scribble, "model-00000.safetensors", "is not a safetensors file"),
    (scribble, "config.json", "is not JSON"),
    (scribble, "model.safetensors.index.json", "is not JSON"),
    (empty_index, "model.safetensors.index.json", "lacks every shard"),
    (broken_index, "model.safetensors.index.json", "has no weight_map"),
    (keep_bin_only, "pytorch_model.bin", "Expected: safetensors. Convert them"),
]


@pytest.mark.parametrize(("spoil", "name", "said"), BROKEN, ids=[f"{i}-{n}" for i, (_, n, _) in enumerate(BROKEN)])
def test_a_broken_checkpoint_is_refused_by_what_is_wrong_with_it(whole: Path, spoil, name: str, said: str) -> None:
    spoil(name, whole)
    with pytest.raises(InputError, match=said) as error:
        read_checkpoint(whole)
    assert str(whole) in str(error.value)


def test_a_directory_without_weights_is_refused(whole: Path) -> None:
    for file in whole.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(InputError, match=r"has no weights. Expected: model\.safetensors"):
        read_checkpoint(whole)


def test_a_given_chat_template_is_the_only_one_in_a_copy_of_the_tokenizer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"):
        (folder / name).write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "own", "eos_token": "</s>"}))
    own, given = read_checkpoint(folder), read_checkpoint(folder, "given")
    assert (own.chat_template, given.chat_template) == ("{}", "given")
    assert own.fingerprint == given.fingerprint
    assert own.template_record == {}
    for name, checkpoint in {"own": own, "given": given}.items():
        (tmp_path / name).mkdir()
        checkpoint.copy_tokenizer(tmp_path / name)
    copied = {file.relative_to(tmp_path / "own").as_posix() for file in (tmp_path / "own").rglob("*.j*")}
    assert copied == {*own.tokenizer_files}
    assert (tmp_path / "own/tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
    assert {file.name for file in (tmp_path / "given").iterdir()} == {
        *("chat_template.jinja", "tokenizer_config.json", "tokenizer.json")
    }
    assert json.loads((tmp_path / "given/tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
    assert (tmp_path / "given/chat_template.jinja").read_text() == "given"
    assert given.template_record == {"chat_template_sha256": digest_file(tmp_path / "given/chat_template.jinja")}
