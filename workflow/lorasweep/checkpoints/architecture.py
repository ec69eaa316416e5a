"""What a model is made of, by its `config.json`: linear layers, embeddings, parameters. There is no table of families.

transformers knows this, and lives in the evaluation environment. There the model is built on torch's meta device, once
per configuration; what is found is kept in `ARCHITECTURES`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record, write_aside
from lorasweep.util.jobs import ask
from lorasweep.util.versions import digest_packages

ARCHITECTURES = Path(".snakemake/lorasweep/architectures")
"""Folder in the working directory of what was found, by the digest of `config.json` and of the installed packages."""

_ROOT = Path(__file__).parents[3]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """The modules and parameters of a model in memory, and the sizes in its text model's configuration."""

    layers: Mapping[str, tuple[int, int]]
    """Shape [out, in] of each linear layer (`nn.Linear`, transformers' `Conv1D`), by the module's name."""
    embeddings: Mapping[str, tuple[int, int]]
    """Shape [rows, width] of each embedding, by the module's name."""
    head: str | None
    """The module of the output embedding."""
    tied: bool
    """Whether the head shares its weight with the input embedding."""
    fused: tuple[str, ...]
    """Parameters of experts that are no layers: [experts, ., .]."""
    parameters: Shapes
    """Shapes of all parameters; of tied ones, of the first."""
    stored: Shapes
    """Shapes of the tensors that transformers saves, by their names on disk."""
    num_layers: int = 0
    hidden_size: int = 0
    vocab_size: int = 0
    num_heads: int | None = None
    """Attention heads."""
    num_key_value_heads: int | None = None
    """Heads of keys and values; `None`: as many as attention heads."""
    max_positions: int | None = None
    """Longest sequence, in tokens."""
    experts_per_token: int | None = None
    """How many of a layer's experts each token passes."""

    @cached_property
    def matrix_values(self) -> int:
        """Number of parameters that each token is multiplied with.

        Those are all but embeddings that are not tied to the head, and of fused experts only the active ones.
        """
        values = sum(map(prod, self.parameters.values())) - sum(map(prod, self.embeddings.values()))
        if self.tied:
            values += prod(self.layers.get(self.head or "") or next(iter(self.embeddings.values())))
        for name in self.fused if self.experts_per_token else ():
            experts = self.parameters[name][0]
            idle = max(experts - (self.experts_per_token or 0), 0)
            values -= prod(self.parameters[name]) // experts * idle
        return values


@lru_cache
def describe(path: Path) -> Architecture:
    """Return the architecture of the model in a checkpoint directory, which may lack weights. The result is cached.

    Raises:
        InputError: `config.json` cannot be read, transformers does not know or cannot build the model, or the
            evaluation environment is not installed.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"'{file}' cannot be read ({error})", "the config.json of a checkpoint") from error
    if not has_environment():
        raise InputError(f"'{file}': sizes need the evaluation environment, which is not installed", "make install")
    described = _find_description(path)
    if described is None:
        raise InputError(f"'{file}' has model_type {model_type!r}", "a causal language model of transformers")
    return described


@lru_cache
def get_architecture(checkpoint: Checkpoint) -> Architecture:
    """Return the architecture of a checkpoint. The result is cached.

    It is guessed from names and shapes on disk if transformers does not know the model, or is not installed here
    (`--sdm conda`).

    Raises:
        InputError: transformers cannot build the model.
    """
    described = _find_description(checkpoint.path) if has_environment() else None
    return described or guess(checkpoint)


def guess(checkpoint: Checkpoint) -> Architecture:
    """Return what names and shapes on disk say: each matrix is the weight of a linear layer, or of an embedding.

    Matrices with a row per token are embeddings; of several, the one with the shortest path is the head.
    """
    config = checkpoint.config.get("text_config") or checkpoint.config
    rows = config.get("vocab_size")
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    matrices = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight")
    }
    vocabulary = [name for name, shape in matrices.items() if shape[0] == rows]
    head = min(vocabulary, key=lambda name: name.count(".")) if len(vocabulary) > 1 else None
    return Architecture(
        layers={name: shape for name, shape in matrices.items() if name not in vocabulary or name == head},
        embeddings={name: matrices[name] for name in vocabulary if name != head},
        head=head,
        tied=head is None and bool(vocabulary),
        fused=tuple(name for name, shape in shapes.items() if len(shape) == 3 and min(shape) > 1),
        parameters=shapes,
        stored=shapes,
        num_layers=config.get("num_hidden_layers") or 0,
        hidden_size=config.get("hidden_size") or 0,
        vocab_size=rows or 0,
        num_heads=config.get("num_attention_heads"),
        num_key_value_heads=config.get("num_key_value_heads"),
        max_positions=config.get("max_position_embeddings"),
        experts_per_token=config.get("num_experts_per_tok"),
    )


def has_environment() -> bool:
    """Whether the evaluation environment is in the clone. With `--sdm conda` it may not be."""
    return (_ROOT / ".venv/eval/bin/python").is_file()


@lru_cache
def _find_description(path: Path) -> Architecture | None:
    """Return what transformers makes of a `config.json`; `None` if it does not know the model."""
    digest = hashlib.sha256((path / "config.json").read_bytes() + digest_packages().encode()).hexdigest()
    file = ARCHITECTURES / f"{digest}.json"
    record = find_record(file)
    if "architecture" not in record:
        record = {"architecture": _build(path)}
        with suppress(OSError):  # a directory that is only looked at may be another person's
            ARCHITECTURES.mkdir(parents=True, exist_ok=True)
            write_aside(file, json.dumps(record) + "\n")  # in the model's order
    return None if record["architecture"] is None else _read(record["architecture"])


def _build(path: Path) -> Any:
    """Return what `lorasweep job describe_model` prints, from the evaluation environment."""
    command = [str(_ROOT / "scripts/run"), "eval", "-m", "lorasweep", "job", "describe_model", "--model", str(path)]
    # Also in a run with conda, the environment is that of the clone.
    environment = {**os.environ, "LORASWEEP_CONDA": ""}
    try:
        return ask(command, environment)
    except InputError as error:
        raise InputError(str(error).removeprefix("describe_model: ")) from error


def _read(record: Mapping[str, Any]) -> Architecture:
    """Return an architecture from a record. JSON has lists in place of tuples, and `null` for what is not known."""
    fields = {key: value for key, value in record.items() if value is not None}
    for key in ("layers", "embeddings", "parameters", "stored"):
        fields[key] = {name: tuple(shape) for name, shape in fields[key].items()}
    return Architecture(**{**fields, "head": record["head"], "fused": tuple(fields["fused"])})
