"""Find the modules that get an adapter, the tensors that PEFT saves of it, and the number of its parameters.

Names are those of modules in memory, as in PEFT. Torchtune's words for Llama's modules are translated to suffixes.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from math import prod

from lorasweep.checkpoints.architecture import Architecture, get_architecture
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.experiment.sections import MLP_MODULES, Controls
from lorasweep.util.errors import InputError

_KEYS = {
    *("lora_rank", "use_dora", "init_lora_weights", "modules_to_save"),
    *("lora_modules", "lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"),
}
"""Controls that decide the shapes of an adapter."""


def find_modules(checkpoint: Checkpoint, controls: Controls) -> list[str]:
    """Return the names of the modules that get an adapter, in the model's order.

    A name in `lora_modules` means modules with this name or with its end, after a dot, as in PEFT.

    Raises:
        InputError: a name or a pattern matches no linear layer or embedding; `all-linear` or a name means experts that
            are no layers; the head is tied, or there is none; a name in `modules_to_save` matches no module.
    """
    architecture = get_architecture(checkpoint)
    _find_saved(architecture, controls.modules_to_save)
    if controls.lora_modules is not None:
        return _find(architecture, controls)
    for name in controls.llama_modules:
        if not _match(architecture.layers, name):
            key = "apply_lora_to_mlp" if name in MLP_MODULES else "lora_attn_modules"
            raise InputError(
                f"controls.{key}: {name!r} is no linear layer of this model",
                f"lora_modules with the model's own names: {_list_names(architecture)}",
            )
    if controls.apply_lora_to_output and (architecture.tied or not architecture.head):
        problem = "tied to the embeddings" if architecture.tied else "not there"
        raise InputError(f"controls.apply_lora_to_output: the head of this model is {problem}", "false")
    return _find(architecture, controls)


def list_adapter_tensors(checkpoint: Checkpoint, controls: Controls) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the tensors of an adapter by their names in PEFT's `adapter_model.safetensors`.

    A is [r, in] and B [out, r], of an embedding [r, rows] and [width, r]; DoRA adds a magnitude [out] or [width]. PiSSA
    and OLoRA are saved with 2 r. Modules to save are saved as they are. Torchtune's words that match nothing are left
    out: another trainer may read them in its own way.

    Raises:
        InputError: `lora_modules` or `modules_to_save` is wrong; see `find_modules`.
    """
    return _make_tensors(get_architecture(checkpoint), controls, get_saved_rank(controls))


def get_saved_rank(controls: Controls) -> int:
    """Return the rank of a saved adapter: twice `lora_rank` for PiSSA and OLoRA, converted to the unchanged base."""
    return controls.lora_rank * (2 if controls.changes_base else 1)


def get_shape_settings(controls: Controls) -> str:
    """Return the controls that decide the shapes of an adapter, as JSON, as a key for caches."""
    return controls.model_dump_json(include=_KEYS)


def count_lora_parameters(checkpoint: Checkpoint, controls: Controls) -> int:
    """Return the number of trained parameters: r · (in + out) for each linear layer, and as in `list_adapter_tensors`.

    Raises:
        InputError: `lora_modules` or `modules_to_save` is wrong; see `find_modules`.
    """
    return _count_values(checkpoint, get_shape_settings(controls), controls.lora_rank)


def count_saved_values(checkpoint: Checkpoint, controls: Controls) -> int:
    """Return the number of values in a saved adapter; errors are those of `count_lora_parameters`."""
    return _count_values(checkpoint, get_shape_settings(controls), get_saved_rank(controls))


@lru_cache
def _count_values(checkpoint: Checkpoint, settings: str, rank: int) -> int:
    tensors = _make_tensors(get_architecture(checkpoint), Controls.model_validate_json(settings), rank)
    return sum(map(prod, tensors.values()))


def _make_tensors(architecture: Architecture, controls: Controls, rank: int) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {}
    for module in _find(architecture, controls):
        name = f"base_model.model.{module}"
        if module in architecture.layers:
            out, into = architecture.layers[module]
            tensors |= {f"{name}.lora_A.weight": (rank, into), f"{name}.lora_B.weight": (out, rank)}
        else:
            into, out = architecture.embeddings[module]
            tensors |= {f"{name}.lora_embedding_A": (rank, into), f"{name}.lora_embedding_B": (out, rank)}
        if controls.use_dora:
            tensors[f"{name}.lora_magnitude_vector"] = (out,)
    for parameter, shape in _find_saved(architecture, controls.modules_to_save).items():
        tensors[f"base_model.model.{parameter}"] = shape
    return tensors


def _find(architecture: Architecture, controls: Controls) -> list[str]:
    """Return the modules that get an adapter; as in PEFT, none of those in `modules_to_save`, which change anyway."""
    chosen = controls.lora_modules
    found = _find_translated(architecture, controls) if chosen is None else _find_chosen(architecture, chosen)
    left = [name for name in found if not any(f".{word}." in f".{name}." for word in controls.modules_to_save)]
    if chosen is not None and not left:
        raise InputError(f"controls.lora_modules: {chosen!r} means modules in modules_to_save only", "other modules")
    return left


def _find_translated(architecture: Architecture, controls: Controls) -> list[str]:
    """Return the linear layers that torchtune's words mean."""
    found = {name for word in controls.llama_modules for name in _match(architecture.layers, word)}
    found |= {architecture.head or ""} if controls.apply_lora_to_output and not architecture.tied else set()
    return [name for name in architecture.layers if name in found]


def _find_chosen(architecture: Architecture, chosen: str | list[str] | dict[str, str]) -> list[str]:
    """Return the modules that `lora_modules` means."""
    known = [*architecture.layers, *architecture.embeddings]
    if isinstance(chosen, str):
        if architecture.fused:
            raise _refuse_fused(architecture, chosen, architecture.fused)
        return [name for name in architecture.layers if name != architecture.head]
    if isinstance(chosen, dict):
        pattern = chosen["regex"]
        fused = [name for name in architecture.fused if re.fullmatch(pattern, name)]
        found = {name for name in known if re.fullmatch(pattern, name)}
        parts = [(pattern, found, fused)]
    else:
        parts = [(word, set(_match(known, word)), _match_fused(architecture.fused, word)) for word in chosen]
    for word, found, fused in parts:
        if fused:
            raise _refuse_fused(architecture, word, fused)
        if not found:
            raise InputError(
                f"controls.lora_modules: {word!r} matches no linear layer or embedding of this model",
                f"all-linear, a list of {_list_names(architecture)}, or a regex that matches whole names such as "
                f"{known[0] if known else ''}",
            )
    matched = set().union(*(found for _, found, _ in parts))
    return [name for name in known if name in matched]


def _find_saved(architecture: Architecture, words: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the parameters of the modules that end with one of the words, as PEFT finds `modules_to_save`."""
    shapes: dict[str, tuple[int, ...]] = dict(architecture.parameters)
    if architecture.head and architecture.tied:
        # Saved beside the embedding, it is not tied any more.
        shapes[f"{architecture.head}.weight"] = architecture.layers[architecture.head]
    found: dict[str, tuple[int, ...]] = {}
    for word in words:
        saved = {name: shape for name, shape in shapes.items() if any(p.endswith(word) for p in _list_parents(name))}
        if not saved:
            raise InputError(
                f"controls.modules_to_save: {word!r} matches no module of this model",
                ", ".join(_find_last_parts(name.rpartition(".")[0] for name in shapes)),
            )
        found |= saved
    return found


def _list_parents(parameter: str) -> list[str]:
    """Return the names of the modules that have a parameter, from the outermost."""
    parts = parameter.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _match(names: Iterable[str], word: str) -> list[str]:
    return [name for name in names if name == word or name.endswith(f".{word}")]


def _match_fused(names: Iterable[str], word: str) -> list[str]:
    """Return the fused parameters that a word names, or whose module it names."""
    return [name for name in names if _match([name, name.rpartition(".")[0]], word)]


def _refuse_fused(architecture: Architecture, chosen: str, fused: Collection[str]) -> InputError:
    parameters = ", ".join(_find_last_parts(fused))
    return InputError(
        f"controls.lora_modules: {chosen!r} means parameters of experts that are no linear layers, and cannot get an "
        f"adapter: {parameters} ({next(iter(fused))}, {len(fused)} in all)",
        f"a list of {_list_names(architecture)}",
    )


def _list_names(architecture: Architecture) -> str:
    """Return the last parts of the names of linear layers and embeddings, as text."""
    return ", ".join(_find_last_parts([*architecture.layers, *architecture.embeddings]))


def _find_last_parts(names: Iterable[str]) -> list[str]:
    """Return the distinct last parts of names, without numbers."""
    return list(dict.fromkeys(part for name in names if not (part := name.rpartition(".")[2]).isdigit()))
