"""Read Hugging Face checkpoint directories by their headers, without loading weights and without torch.

A safetensors file consists of 8 bytes with the length of the header (little-endian), the header as JSON
(`{name: {dtype, shape, data_offsets}}`), and the data (https://github.com/huggingface/safetensors).
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.chat_template import CHAT_TEMPLATE, TOKENIZER_CONFIG, read_chat_template
from lorasweep.checkpoints.dtypes import BITS
from lorasweep.checkpoints.json_files import find_json, read_json
from lorasweep.layout import ADAPTER_CONFIG, TEMPLATE_DIGEST
from lorasweep.util.digest import digest_file, digest_text
from lorasweep.util.errors import InputError

_VOCABULARIES = (
    *("tokenizer.json", "tekken.json", "vocab*.json", "vocab*.txt", "dict.txt"),
    *("*.model", "tokenizer.model.*", "*.spm", "*.tiktoken"),  # of sentencepiece and tiktoken
)

TEMPLATES = (CHAT_TEMPLATE, "chat_template.json", "additional_chat_templates/*.jinja")
"""Patterns of the files of chat templates. `tokenizer_config.json` can have some too."""

TOKENIZER_FILES = (
    *_VOCABULARIES,
    *(TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "normalizer.json"),
    *("merges.txt", "bpe.codes", "emoji.json"),
    *TEMPLATES,
)
"""Patterns of the files that transformers' tokenizers read and write."""

GENERATION_CONFIG = "generation_config.json"

CODE = ("*.py", "custom_generate/*")
"""Patterns of code that a model may bring along (`auto_map`, `custom_generate`)."""

COMPANIONS = (GENERATION_CONFIG, "preprocessor_config.json", "processor_config.json")
"""Files besides weights, configuration and tokenizer that a model may need."""

SINGLE = "model.safetensors"
"""Name of the weights file of a checkpoint that is not sharded."""

INDEX = "model.safetensors.index.json"
"""Name of the file that lists the shard of each tensor."""

_FINGERPRINTED_BYTES = 4096
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """Location, type and shape of a tensor."""

    shard: str
    dtype: str
    """Type of the values, as safetensors writes it: `F32`, `BF16`, ..."""
    shape: tuple[int, ...]
    offset: int
    """Offset from the start of the file, in bytes."""
    size: int
    """Size in bytes."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A complete checkpoint directory. It is read once per process, and compared by identity."""

    path: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    tensors: dict[str, Tensor]
    tokenizer_files: tuple[str, ...]
    given_template: str | None = None
    """The text of a chat template that replaces the checkpoint's own; `None` if none does."""

    @cached_property
    def num_parameters(self) -> int:
        """Number of values in all tensors. Tied embeddings count once."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def tied(self) -> bool:
        """Whether the language model head shares the embedding matrix."""
        return "lm_head.weight" not in self.tensors

    @cached_property
    def companions(self) -> tuple[str, ...]:
        """Files that the model needs besides its weights, configuration and tokenizer, code included."""
        configs = [self.config, find_json(self.path / TOKENIZER_CONFIG)]
        code = [pattern for pattern in CODE if "/" in pattern or any("auto_map" in config for config in configs)]
        return find_files(self.path, (*COMPANIONS, *code))

    @cached_property
    def chat_template(self) -> str | None:
        """The text of the chat template; `None` if there is none."""
        return read_chat_template(self.path) if self.given_template is None else self.given_template

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    @property
    def template_record(self) -> dict[str, str]:
        """What a record says of the chat template: the sha256 of one that replaces the checkpoint's own."""
        given = self.given_template
        return {} if given is None else {TEMPLATE_DIGEST: digest_text(given)}

    def copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer to a folder. A template that replaces the checkpoint's own is the only one there."""
        replaced = () if self.given_template is None else choose_files(self.tokenizer_files, TEMPLATES)
        for name in self.tokenizer_files:
            if name not in replaced:
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.path / name, folder / name)
        if self.given_template is not None:
            settings = find_json(folder / TOKENIZER_CONFIG)
            if settings.pop("chat_template", None) is not None:
                (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            (folder / CHAT_TEMPLATE).write_text(self.given_template, encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of config.json, the tokenizer, the companions and the tensors, whatever replaces the chat template.

        Of each tensor, the name, dtype, shape and first 4 KiB are hashed. That is fast even for a model of 16 GB, and
        any training changes the first values of some tensor, so that different models have different fingerprints.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in (*self.tokenizer_files, *self.companions):
            digest.update(f"\0{name}\0{digest_file(self.path / name)}".encode())
        by_shard: dict[str, list[str]] = {}
        for name in sorted(self.tensors):
            by_shard.setdefault(self.tensors[name].shard, []).append(name)
        heads: dict[str, bytes] = {}
        for shard, names in by_shard.items():
            with (self.path / shard).open("rb") as file:
                for name in names:
                    file.seek(self.tensors[name].offset)
                    heads[name] = file.read(min(_FINGERPRINTED_BYTES, self.tensors[name].size))
        for name, head in sorted(heads.items()):
            tensor = self.tensors[name]
            digest.update(f"\0{name}\0{tensor.dtype}\0{tensor.shape}\0".encode() + head)
        return digest.hexdigest()


@lru_cache
def read_checkpoint(path: Path, chat_template: str | None = None) -> Checkpoint:
    """Read a checkpoint's configuration and headers. The result is cached.

    `chat_template` is the text of a template that replaces the checkpoint's own; `None`: none does.

    Raises:
        InputError: A file is missing or broken. The message names the directory and the file.
    """
    if chat_template is not None:
        return replace(read_checkpoint(path), given_template=chat_template)
    if not path.is_dir():
        raise InputError(f"no such directory: '{path}'", "a local Hugging Face checkpoint directory")
    if not (path / "config.json").is_file():
        raise InputError(f"'{path}' has no config.json", "a Hugging Face checkpoint directory")
    if (path / ADAPTER_CONFIG).exists():
        raise InputError(
            f"'{path}' has {ADAPTER_CONFIG}, so that transformers would apply that adapter to the base model",
            "the base model and the adapter in separate folders",
        )
    config = read_json(path / "config.json")
    weight_map = _read_index(path)
    shards = tuple(sorted(set(weight_map.values()))) if weight_map else (_find_single(path),)
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        header = read_header(path / shard)
        duplicates = header.keys() & tensors.keys()
        if duplicates:
            name = min(duplicates)
            raise InputError(
                f"'{path}' has {name} in {tensors[name].shard} and in {shard}",
                "one of them; fetch the checkpoint again",
            )
        tensors |= header
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise InputError(f"'{path / INDEX}' has {name} in {shard}, which lacks it; fetch the checkpoint again")
    if not find_files(path, _VOCABULARIES):
        raise InputError(f"'{path}' has no tokenizer", "a checkpoint with tokenizer.json or another vocabulary")
    return Checkpoint(path, config, shards, tensors, find_files(path, TOKENIZER_FILES))


def choose_files(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the names that match a pattern, sorted. As in a shell, `*` does not match `/`."""
    split = [pattern.split("/") for pattern in patterns]

    def matches(name: str) -> bool:
        parts = name.split("/")
        return any(len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in split)

    return tuple(sorted(filter(matches, names)))


def find_files(folder: Path, patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the files in a folder that match a pattern, as sorted names relative to the folder."""
    found = (file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return tuple(sorted({file.relative_to(folder).as_posix() for file in found}))


def _read_index(path: Path) -> dict[str, str]:
    """Return the shard of each tensor, by name. Empty if there is no index."""
    index = path / INDEX
    if not index.is_file():
        return {}
    if (path / SINGLE).is_file():
        raise InputError(f"'{path}' has {SINGLE} and {INDEX}", "one of them, since libraries differ in which they read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"'{index}' has no weight_map from tensors to shards; fetch the checkpoint again")
    missing = sorted(shard for shard in set(weight_map.values()) if not (path / shard).is_file())
    if missing or not weight_map:
        what = ", ".join(missing) or "every shard"
        raise InputError(f"'{path}' lacks {what}, which {index.name} lists; fetch the checkpoint again")
    return weight_map


def _find_single(path: Path) -> str:
    if (path / SINGLE).is_file():
        return SINGLE
    if list(path.glob("*.bin")):
        raise InputError(
            f"'{path}' has its weights as .bin files",
            'safetensors. Convert them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}', dtype='auto').save_pretrained('{path}')\"",
        )
    raise InputError(f"'{path}' has no weights", f"{SINGLE}, or shards and their index")


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, by name, in the order of their data.

    Raises:
        InputError: The file is not a safetensors file or is truncated, or its tensors overlap or leave gaps.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"header of {length} bytes in a file of {size} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length
        tensors: dict[str, Tensor] = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = (8 + length + offset for offset in entry["data_offsets"])
            tensor = Tensor(file.name, entry["dtype"], tuple(entry["shape"]), begin, stop - begin)
            if begin != end or tensor.size * 8 != prod(tensor.shape) * BITS[tensor.dtype]:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, its offsets {entry['data_offsets']}")
            tensors[name] = tensor
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{file}' is not a safetensors file ({error}); fetch it again") from error
    if end > size:
        raise InputError(f"'{file}' is truncated: {size} of {end} bytes; fetch it again")
    return tensors
