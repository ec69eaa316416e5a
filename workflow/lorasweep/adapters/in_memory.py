"""Merge LoRA adapters into a base model in memory, one at a time, and restore it.

The values are those of the merged checkpoint, bit for bit: the merge's own arithmetic computes them, block by block and
on the CPU, from the base model's files. The files are also what the base model is restored from, so that no copy of it
is kept.
"""

import threading
import warnings
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from lorasweep.adapters.adapter import Adapter, AdapterError, ChangedBaseError
from lorasweep.adapters.architecture import make_parameter_finder
from lorasweep.adapters.merge import Planned, Source, make_plan
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.dtypes import PRECISIONS
from lorasweep.checkpoints.tensors import DTYPES
from lorasweep.util.errors import InputError
from lorasweep.util.files import get_state

_PRECISIONS = {DTYPES[dtype]: precision for precision, dtype in PRECISIONS.items()}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ARITHMETIC = threading.Lock()
"""Held while torch's number of threads is changed."""


class ModelInMemory:
    """A transformers model that was loaded from a checkpoint, with at most one adapter merged into it.

    The model's parameters are changed in place. Their names may differ from those in the files, as transformers' own
    rules say.
    """

    def __init__(self, model: Any, base: Checkpoint) -> None:
        if getattr(model, "hf_quantizer", None) is not None:
            raise InputError(
                f"'{base.path}': the loaded model is quantized, so that no adapter can be merged into it",
                "merged=false",
            )
        for name, parameter in model.named_parameters():  # which a merge on disk refuses, changed or not
            if parameter.dtype == torch.float16 and not parameter.detach().isfinite().all():
                raise InputError(f"'{base.path}': {name} has values that are not finite in {parameter.dtype}")
        self._model = model
        self._base = base
        self._names = _Names(model)
        self._sources = {self._names.find(name): name for name in base.tensors}
        self._files = [base.path / shard for shard in base.shards]
        self._state = [get_state(file) for file in self._files]
        self._compared: set[str] = set()
        self._changed: set[str] = set()
        self._untied: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []

    def merge(self, adapter: Adapter) -> int:
        """Have the model be the base model merged with this adapter alone; return the number of the adapter's tensors.

        The model is the base model if this fails.

        Raises:
            AdapterError: the adapter cannot be applied, does not change the weights, or was not applied completely.
            InputError: the base model's files are not what was loaded, or a merged value is not finite.
        """
        self._check_files()
        plan = make_plan(self._base, adapter, _PRECISIONS.get(self._model.dtype))
        planned = {tensor.name: tensor for tensors in plan.shards.values() for tensor in tensors}
        targets = self._find_changed(planned)
        self._retie()
        self._restore(self._changed - targets.keys())
        self._compare(targets.keys() - self._compared)
        self._untie(targets)
        self._changed |= targets.keys()
        try:
            used, unchanged = self._write(adapter, targets)
            unused = [name for name, tensor in adapter.tensors.items() if tensor not in used]
            if unused:
                raise AdapterError(f"{adapter.path}: {len(unused)} tensors were not applied (first: {min(unused)})")
            if len(unchanged) == len(adapter.updates) and not adapter.biases and not adapter.replaced:
                raise AdapterError(
                    f"{adapter.path}: the adapter has no effect: its updates are smaller than the weights' precision"
                )
        except BaseException:
            self.restore()
            raise
        if unchanged:
            print(
                f"{len(unchanged)} of {len(adapter.updates)} weights are unchanged: their updates are smaller than the "
                f"precision (first: {min(unchanged)})",
                flush=True,
            )
        return len(used)

    def restore(self) -> None:
        """Have the model be the base model again.

        Raises:
            ChangedBaseError: a restored parameter differs from the base model's files.
        """
        self._retie()
        if self._changed:
            self._check_files()
            self._restore(set(self._changed))

    def _check_files(self) -> None:
        if [get_state(file) for file in self._files] != self._state:
            raise InputError(f"'{self._base.path}': the base model has changed since it was loaded")

    def _find_changed(self, planned: dict[str, Planned]) -> dict[str, Planned]:
        """Return the parameters that the merged model has other values of, each with its tensor."""
        tensors = {self._names.find(name): tensor for name, tensor in planned.items()}
        changed: set[str] = set()
        for tensor in planned.values():
            target = self._names.find(tensor.name)
            parameter = self._names.get(target)
            is_changed = tensor.update is not None or tensor.bias is not None or tensor.replaced
            # A parameter that is loaded in a higher precision than the merge writes is rounded by the merge.
            is_rounded = tensor.dtype != tensor.source.dtype and parameter is not None
            is_rounded = is_rounded and DTYPES[tensor.dtype] != parameter.dtype  # type: ignore[union-attr]
            if not is_changed and not is_rounded:
                continue
            if parameter is None or self._names.is_computed(tensor.name):
                raise AdapterError(
                    f"{self._base.path}: the adapter changes {tensor.name}, which is no parameter of the loaded "
                    f"{type(self._model).__name__}"
                )
            changed |= set(self._names.get_tied(target)) & tensors.keys()
        return {target: tensors[target] for target in sorted(changed)}

    def _untie(self, targets: Collection[str]) -> None:
        """Give tied parameters that the merged model stores separately each a tensor of its own."""
        for tied in self._names.tied:
            for name in [name for name in tied if name in targets][1:]:
                module, attribute = self._names.locate(name)
                parameter = getattr(module, attribute)
                self._untied.append((module, attribute, parameter))
                own = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
                setattr(module, attribute, own)

    def _retie(self) -> None:
        for module, attribute, parameter in self._untied:
            setattr(module, attribute, parameter)
        self._untied.clear()

    def _restore(self, names: set[str]) -> None:
        # A tied name without a tensor in the files is restored with the parameter that it is tied to.

        def write(name: str, source: Source) -> None:
            self._put(name, self._get_loaded(name), source)

        self._run(names & self._sources.keys(), write)
        self._compare(names)
        self._changed -= names

    def _compare(self, names: Iterable[str]) -> None:
        """Compare parameters with the base model's files, bit for bit."""
        names = set(names) & self._sources.keys()

        def compare(name: str, source: Source) -> None:
            self._put(name, self._get_loaded(name), source, is_comparison=True)

        self._run(names, compare)
        self._compared |= names

    def _get_loaded(self, name: str) -> Planned:
        source = self._sources[name]
        tensor = self._base.tensors[source]
        return Planned(source, tensor.dtype, self._base.path, tensor)

    def _write(self, adapter: Adapter, targets: dict[str, Planned]) -> tuple[set[Any], list[str]]:
        """Write merged values; return the adapter's tensors that were used, and the weights that did not move."""
        unchanged: list[str] = []

        def write(name: str, source: Source) -> None:
            if not self._put(name, targets[name], source):
                unchanged.append(targets[name].name)

        return self._run(targets, write, adapter), unchanged

    def _run(
        self, names: Iterable[str], function: Callable[[str, Source], None], adapter: Adapter | None = None
    ) -> set[Any]:
        """Call a function for each parameter, in parallel; return the adapter's tensors that were used.

        Each tensor is computed by one thread, as in the merge, since the number of threads may change the last bits.
        """
        largest_first = sorted(names, key=lambda name: (-self._names.get(name).numel(), name))  # type: ignore[union-attr]

        def work(part: list[str]) -> set[Any]:
            source = Source(adapter)
            with torch.no_grad():
                for name in part:
                    function(name, source)
            return source.used

        with _ARITHMETIC, warnings.catch_warnings():
            # The mapped memory is only read.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                with ThreadPoolExecutor(threads) as pool:
                    parts = pool.map(work, [largest_first[index::threads] for index in range(threads)])
                    return set().union(*parts)
            finally:
                torch.set_num_threads(threads)

    def _put(self, name: str, tensor: Planned, source: Source, *, is_comparison: bool = False) -> bool:
        """Write a tensor to a parameter, or compare them; return whether an update moved a value."""
        parameter = self._names.get(name)
        assert parameter is not None
        if parameter.shape != tensor.shape:
            raise InputError(
                f"'{self._base.path}': {tensor.name} is {list(tensor.shape)}, but {list(parameter.shape)} in memory"
            )
        values, dtype = parameter.detach().view(-1), DTYPES[tensor.dtype]
        is_direct = not is_comparison and values.device.type == "cpu" and values.dtype == dtype
        begin, has_moved = 0, tensor.update is None
        for block, differs in source.compute(tensor, values if is_direct else None):
            flat = block.reshape(-1).view(dtype)
            part = values[begin : begin + flat.numel()]
            if is_comparison:
                self._check_equal(name, part, flat)
            elif not is_direct:
                part.copy_(flat)
            begin += flat.numel()
            has_moved |= differs
        return has_moved

    def _check_equal(self, name: str, held: torch.Tensor, stored: torch.Tensor) -> None:
        as_bits = _INTEGERS[held.element_size()]
        expected = stored.to(held.dtype).contiguous()
        if not torch.equal(held.cpu().contiguous().view(as_bits), expected.view(as_bits)):
            raise ChangedBaseError(f"'{self._base.path}': {name} in memory differs from the base model's files")


class _Names:
    """The names of a loaded model's parameters, by transformers' rules for loading a checkpoint."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._state = model.state_dict(keep_vars=True)
        self._find_parameter = make_parameter_finder(model, self._state)
        self._found: dict[str, tuple[str, str | None]] = {}
        self._located: dict[str, tuple[torch.nn.Module, str]] = {}
        tied: dict[int, list[str]] = {}
        for name, parameter in self._state.items():
            tied.setdefault(id(parameter), []).append(name)
        self._tied = {name: names for names in tied.values() for name in names}
        self.tied = [names for names in tied.values() if len(names) > 1]
        """The names of parameters that are one tensor in the loaded model."""

    def find(self, name: str) -> str:
        """Return the parameter of a tensor in the files."""
        return self._rename(name)[0]

    def is_computed(self, name: str) -> bool:
        """Whether transformers computes the parameter of a tensor in the files, such as that of all experts."""
        return self._rename(name)[1] is not None

    def _rename(self, name: str) -> tuple[str, str | None]:
        if name not in self._found:
            self._found[name] = self._find_parameter(name)
        return self._found[name]

    def get(self, name: str) -> torch.Tensor | None:
        """Return the present parameter or buffer of this name; `None` if there is none."""
        if name not in self._state:
            return None
        module, attribute = self.locate(name)
        tensor: torch.Tensor = getattr(module, attribute)
        return tensor

    def get_tied(self, name: str) -> list[str]:
        """Return the names of the parameters that are one tensor in the loaded model, this one included."""
        return self._tied[name]

    def locate(self, name: str) -> tuple[torch.nn.Module, str]:
        """Return the module and the attribute of a parameter."""
        if name not in self._located:
            module, _, attribute = name.rpartition(".")
            self._located[name] = self._model.get_submodule(module), attribute
        return self._located[name]
