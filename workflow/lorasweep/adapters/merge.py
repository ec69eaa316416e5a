"""Merge a LoRA adapter into its base model, and write an ordinary Hugging Face checkpoint tensor by tensor.

The model is never built. Shards of the base model are mapped into memory, and each weight is updated and written a few
rows at a time. So a merge needs memory for a few blocks, however large the model is. The result is bit for bit that of
PEFT's `merge_and_unload` for the same base model in the same precision on a CPU: W + scale · (B·A) in float32, rounded
once.
"""

import fcntl
import json
import mmap
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle
from math import ceil, frexp, prod
from pathlib import Path
from typing import Any

import torch

from lorasweep.adapters.adapter import Adapter, AdapterError, Update, read_adapter
from lorasweep.adapters.architecture import Architecture, can_untie, read_architecture
from lorasweep.adapters.identity import digest_config
from lorasweep.checkpoints.chat_template import read_kept_template
from lorasweep.checkpoints.checkpoint import INDEX, Checkpoint, Tensor, read_checkpoint, read_header
from lorasweep.checkpoints.dtypes import PRECISIONS
from lorasweep.checkpoints.tensors import DTYPES, read_tensor
from lorasweep.layout import RECORD
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.files import write_record
from lorasweep.util.formats import format_bytes
from lorasweep.util.versions import get_versions

_BLOCK = 2 * 1024 * 1024
"""Number of values that are processed at once, which fit into a CPU's caches."""

_FICLONE = 0x40049409
"""The ioctl that makes a file share the blocks of another, copy-on-write (man 2 ioctl_ficlone)."""

_VERIFIED = 8
"""Number of tensors that are recomputed for verification: up to so many copied and so many changed ones."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the merged model, and its sources."""

    name: str
    dtype: str
    folder: Path
    source: Tensor
    """The base model's tensor, or the adapter's tensor that replaces it; stored in a file of `folder`."""
    update: Update | None = None
    bias: tuple[str, float] | None = None
    replaced: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def size(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize if self.dtype in DTYPES else self.source.size

    @property
    def is_copy(self) -> bool:
        return self.update is None and self.bias is None and not self.replaced and self.dtype == self.source.dtype


@dataclass(frozen=True)
class Plan:
    base: Checkpoint
    adapter: Adapter
    shards: dict[str, list[Planned]]
    unties: bool
    """Whether the head, which is tied to the embedding in the base model, becomes a separate tensor."""

    def is_linked(self, shard: str) -> bool:
        """Whether the merged model contains a shard of the base model unchanged."""
        ours = self.shards[shard]
        return all(t.is_copy for t in ours) and len(ours) == sum(t.shard == shard for t in self.base.tensors.values())


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    dtype: str | None = None,
    *,
    temporary: bool = False,
    threads: int = 1,
    verify: bool = False,
    digest: bool = True,
) -> dict[str, Any]:
    """Write the base model with the adapter merged into it to `output`; return the record that is written there.

    The directory appears complete or not at all. It has the same shards as the base model, the configuration, the
    generation configuration, the tokenizer and the chat template, and a record of its sources with a sha256 of each
    file. If the adapter's record says that the chat template beside it replaces the base model's, it has that one. It
    has no adapter file: transformers would apply the adapter again to the merged weights.

    If the head is tied to the embedding and the adapter changes one of the two, the head becomes a separate tensor and
    the configuration is changed accordingly.

    Args:
        dtype: `bf16`, `fp16` or `fp32`; `None`: each tensor keeps its dtype.
        temporary: whether the base model outlives the merged model. If so, unchanged shards are symbolic links to the
            base model's, and files are not synced to disk. Otherwise the merged model shares no file with its base
            model, so that editing one does not change the other. Copy-on-write clones are used if the file system
            has them.
        threads: number of shards that are written at once.
        verify: whether to read the result again, and compare all headers and some recomputed tensors.
        digest: whether to compute the sha256 of the files.

    Raises:
        AdapterError: the adapter cannot be applied to this base model.
        InputError: the base model is incomplete or quantized, the output is the base model or the adapter, the result
            has values that are not finite, or verification failed.
        OSError: there is not enough disk space, which is checked before the first write, or the system failed.
    """
    checkpoint = read_checkpoint(base, read_kept_template(adapter))
    output = Path(os.path.abspath(output))
    _check_output(output, base, adapter)
    plan = make_plan(checkpoint, read_adapter(adapter, checkpoint), dtype)
    _check_room(plan, output, temporary)
    aside = output.with_name(f".{output.name}.partial")
    missing = [folder for folder in output.parents if not folder.exists()]
    with _claim(aside, output):
        try:
            record = _write(plan, aside, temporary, threads, digest) | {"precision": dtype}
            if verify:
                record["verified_tensors"] = verify_merged(plan, aside)
            write_record(aside / RECORD, record)
            # Last, since a directory without a configuration is never mistaken for a model.
            (aside / "config.json").write_text(_make_config(plan, dtype), encoding="utf-8")
            _publish(aside, output, temporary)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            for folder in missing:
                with suppress(OSError):  # another process may have put files there
                    folder.rmdir()
            raise
    return record


def _check_output(output: Path, base: Path, adapter: Path) -> None:
    for source in (base.resolve(), adapter.resolve()):
        if output.resolve() in (source, *source.parents):
            raise InputError(f"{output}: is or contains the base model or the adapter", "another directory")
    # A record alone is not enough: adapters have one too.
    is_ours = all((output / name).is_file() for name in (RECORD, "config.json"))
    is_empty = output.is_dir() and not any(output.iterdir())
    if output.is_symlink() or (output.exists() and not is_ours and not is_empty):
        raise InputError(f"{output}: exists and is not a merged model", "a new directory, or a merged model to replace")


@contextmanager
def _claim(aside: Path, output: Path) -> Iterator[None]:
    """Lock and empty the folder in which the model is made, so that two merges to one output cannot interfere.

    The lock ends with the process, however it ends. On a file system without locks, no lock is taken.
    """
    aside.mkdir(parents=True, exist_ok=True)
    handle = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = aside.stat().st_ino == os.fstat(handle).st_ino
        except (BlockingIOError, FileNotFoundError):
            is_free = False
        except OSError:
            is_free = True
        if not is_free:
            raise InputError(f"{output}: another process is merging to it", "one merge at a time")
        for leftover in aside.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        yield
    finally:
        os.close(handle)


def make_plan(base: Checkpoint, adapter: Adapter, dtype: str | None) -> Plan:
    quantized = base.config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InputError(
            f"'{base.path}' is quantized ({method})",
            "weights in bf16, fp16 or fp32",
        )
    architecture = read_architecture(base)
    changed = {*adapter.updates, *adapter.biases, *adapter.replaced}
    for name in sorted(changed):
        source = base.tensors[architecture.stored[name]]
        if source.dtype not in PRECISIONS.values():
            raise InputError(f"'{base.path}' has {name} as {source.dtype}", "F32, F16, BF16")
    unties = any(len(tied) > 1 and changed & {*tied} for tied in architecture.parameters.values())
    _check_ties(adapter, base, architecture, changed, unties)
    main = _find_main_dtype(base)
    shards: dict[str, list[Planned]] = {shard: [] for shard in base.shards}
    for name, source in base.tensors.items():
        tied = architecture.parameters.get(name, [name])
        # If PEFT saved an embedding together with its update, it replaces all tied parameters.
        saved = [adapter.replaced[other] for other in tied if ".base_layer." in adapter.replaced.get(other, "")]
        for index, parameter in enumerate(tied if unties else tied[:1]):
            replacement = adapter.replaced.get(parameter) or (saved[0] if saved else None)
            planned = Planned(
                parameter if index else name,
                PRECISIONS[dtype] if dtype and source.dtype == main else source.dtype,
                adapter.path if replacement else base.path,
                adapter.tensors[replacement] if replacement else source,
                adapter.updates.get(parameter),
                adapter.biases.get(parameter),
                replacement is not None,
            )
            shards[source.shard].append(planned)
    return Plan(base, adapter, shards, unties)


def _check_ties(
    adapter: Adapter, base: Checkpoint, architecture: Architecture, changed: set[str], unties: bool
) -> None:
    """Check that it is known which parameters are tied to the changed ones, and that they can be untied."""
    if changed & architecture.ambiguous:
        raise AdapterError(
            f"{adapter.path}: the adapter changes {min(changed & architecture.ambiguous)}, but '{base.path}' both sets "
            f"tie_word_embeddings and has {' and '.join(sorted(architecture.ambiguous))}: which of them the training "
            "used is unknown"
        )
    if not architecture.is_known:
        sides = {name for name, update in adapter.updates.items() if "lora_embedding" in update.a}
        sides |= changed & architecture.embeddings
        if "vocab_size" not in base.config:
            sides |= {name for name in adapter.replaced if len(base.tensors[name].shape) == 2}
        shapes = [tensor.shape for tensor in base.tensors.values()]
        is_untied = base.config.get("tie_word_embeddings") is False
        unknown = [name for name in sorted(sides) if not is_untied or shapes.count(base.tensors[name].shape) < 2]
        if unknown:
            raise AdapterError(
                f"{adapter.path}: the adapter changes {unknown[0]}, but transformers does not know the model class of "
                f"'{base.path}' (model_type {base.config.get('model_type')!r}), so that its tied weights are unknown"
            )
    if unties and adapter.config.get("ensure_weight_tying"):
        raise AdapterError(
            f"{adapter.path / 'adapter_config.json'}: ensure_weight_tying is set for an embedding that is the head of "
            "the base model, which is not supported"
        )
    if unties and not can_untie(base):
        raise AdapterError(
            f"{adapter.path}: the adapter changes one of several tied weights of '{base.path}', which stay tied "
            "without tie_word_embeddings"
        )


def _find_main_dtype(base: Checkpoint) -> str | None:
    """Return the dtype of most values. A few tensors may differ on purpose, such as routers in float32."""
    sizes: dict[str, int] = {}
    for tensor in base.tensors.values():
        if tensor.dtype in DTYPES:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + prod(tensor.shape)
    return max(sizes, key=sizes.__getitem__, default=None)


def _check_room(plan: Plan, output: Path, temporary: bool) -> None:
    need = sum(
        tensor.size
        for shard, tensors in plan.shards.items()
        if not (temporary and plan.is_linked(shard))
        for tensor in tensors
    )
    folder = output.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(
            f"No space left on device: the merged model needs {format_bytes(need)}, but "
            f"{format_bytes(free)} are free in {folder}"
        )


def _write(plan: Plan, folder: Path, temporary: bool, threads: int, digest: bool) -> dict[str, Any]:
    """Write everything except the configuration and the record; return the record."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # shards and digests have threads of their own
    try:
        with warnings.catch_warnings(), ThreadPoolExecutor(max(1, threads)) as pool:
            # The mapped memory is only read.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            parts = [pool.submit(_write_shard, plan, shard, folder, temporary, digest) for shard in plan.shards]
            try:
                written = [part.result() for part in parts]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)
    plan.base.copy_tokenizer(folder)
    for name in plan.base.companions:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(plan.base.path / name, folder / name)
    if (plan.base.path / INDEX).is_file():
        (folder / INDEX).write_text(_make_index(plan), encoding="utf-8")
    digests = {shard: part.sha256 for shard, part in zip(plan.shards, written, strict=True)}
    names = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    other_files = {name: file for name, file in names.items() if name not in digests}
    unchanged = [name for part in written for name in part.unchanged]
    if unchanged:
        print(
            f"{len(unchanged)} of {len(plan.adapter.updates)} weights are unchanged: their updates are smaller than "
            f"the precision (first: {unchanged[0]})",
            flush=True,
        )
    record: dict[str, Any] = {
        "base_model": str(plan.base.path),
        "base_model_fingerprint": plan.base.fingerprint,
        **plan.base.template_record,
        "adapter_sha256": plan.adapter.sha256,
        "adapter_config_sha256": digest_config(plan.adapter.path),
        "adapter_tensors": len(plan.adapter.tensors),
        "merged_weights": len(plan.adapter.updates),
        "replaced_tensors": len(plan.adapter.replaced),
        "weights_lost_to_rounding": unchanged,
        "unties_embedding": plan.unties,
        "dtype": sorted({tensor.dtype for tensors in plan.shards.values() for tensor in tensors}),
        "bytes_written": sum(part.bytes for part in written),
        "bytes_linked": sum(part.linked for part in written),
        "versions": get_versions("torch", "safetensors"),
    }
    if digest:
        record["sha256"] = digests | {name: digest_file(file) for name, file in other_files.items()}
        record["weights_sha256"] = digest_weights(digests)
    return record


def digest_weights(digests: dict[str, str]) -> str:
    """Return one sha256 for all shards: the sha256 of the output of `sha256sum *.safetensors` in their folder."""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return sha256(lines.encode()).hexdigest()


@dataclass
class _Written:
    bytes: int = 0
    linked: int = 0
    sha256: str = ""
    unchanged: tuple[str, ...] = ()


def _write_shard(plan: Plan, shard: str, folder: Path, temporary: bool, digest: bool) -> _Written:
    file, source = folder / shard, plan.base.path / shard
    if plan.is_linked(shard):
        if temporary:
            file.symlink_to(source.resolve())
        if temporary or _reflink(source, file):
            return _Written(0, source.stat().st_size, digest_file(file) if digest else "")
    header = _make_header(plan.shards[shard])
    sha = sha256(header)
    unchanged: list[str] = []
    # A block is hashed while the next one is computed, so there are two buffers.
    values = Source(plan.adapter)
    with ThreadPoolExecutor(1) as digester, file.open("xb") as stream:
        stream.write(header)
        pending: Future[None] | None = None
        for tensor in plan.shards[shard]:
            changed = tensor.update is None
            for block, moved in values.compute(tensor):
                changed |= moved
                content = block.reshape(-1).view(torch.uint8).numpy()
                stream.write(content.data)
                if digest:
                    if pending:
                        pending.result()
                    pending = digester.submit(sha.update, content)
            unchanged += [] if changed else [tensor.name]
        if pending:
            pending.result()
        stream.flush()
        if not temporary:
            os.fsync(stream.fileno())
        size = stream.tell()
    return _Written(size, 0, sha.hexdigest() if digest else "", tuple(unchanged))


class Source:
    """Computes the values of merged tensors from mapped shards of the base model and the adapter."""

    def __init__(self, adapter: Adapter | None = None) -> None:
        self._adapter = adapter
        self.used: set[Tensor] = set()
        """The adapter's tensors that were read."""
        self._maps: dict[Path, mmap.mmap] = {}  # unmapped when the last tensor that uses it is gone
        self._buffers: dict[int, torch.Tensor] = {}
        self._turn = cycle((0, 1))

    def compute(self, tensor: Planned, out: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, bool]]:
        """Yield the values of a merged tensor block by block, each with whether the base model differs up to here.

        Blocks are parts of `out`, a vector of the tensor's dtype, if it is given. Otherwise, a block is valid until the
        second block after it is requested.
        """
        if tensor.replaced:
            self.used.add(tensor.source)
        if not tensor.size:
            return
        if tensor.update is not None:
            yield from self._compute_updated(tensor, tensor.update, out)
        elif tensor.bias is not None:
            name, scale = tensor.bias
            start = read_tensor(tensor.folder, tensor.source).to(DTYPES[tensor.dtype])
            start += self._read(name) * scale
            _check_finite(start, tensor.name)
            yield start if out is None else out.copy_(start), True
        else:
            is_cast = tensor.dtype != tensor.source.dtype
            # Without a cast, values are copied as bytes, whatever their dtype.
            source, target = (
                (DTYPES[tensor.source.dtype], DTYPES[tensor.dtype]) if is_cast else (torch.uint8, torch.uint8)
            )
            values, step = tensor.source.size // source.itemsize, _BLOCK if is_cast else 2 * _BLOCK
            for begin in range(0, values, step):
                count = min(step, values - begin)
                block = self._take(count, target) if out is None else out.view(target)[begin : begin + count]
                block.copy_(self._map(tensor, source, begin * source.itemsize, count))
                self._release(tensor, begin * source.itemsize, count * source.itemsize)
                if is_cast:
                    _check_finite(block, tensor.name)
                yield block, True

    def _read(self, name: str) -> torch.Tensor:
        """Return a tensor of the adapter in float32."""
        assert self._adapter is not None
        tensor = self._adapter.tensors[name]
        self.used.add(tensor)
        planned = Planned(name, tensor.dtype, self._adapter.path, tensor)
        values = self._map(planned, DTYPES[tensor.dtype], 0, prod(tensor.shape)).view(tensor.shape)
        return values.to(torch.float32, copy=True)  # where torch aligns it: a product's last bits may depend on that

    def _compute_updated(
        self, tensor: Planned, update: Update, out: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, bool]]:
        a, b = self._read(update.a), self._read(update.b)
        magnitude = self._read(update.magnitude) if update.magnitude else None
        rows, width = tensor.shape
        source, target = DTYPES[tensor.source.dtype], DTYPES[tensor.dtype]
        # Blocks have nearly equal heights: a matrix product of only a few rows may sum in another order.
        # DoRA's norms of a transposed weight need all rows.
        count = 1 if magnitude is not None and update.transposed else ceil(rows / max(1, _BLOCK // width))
        scale, moved = update.scale, False
        if frexp(scale)[0] == 0.5:  # times a power of two, values are exact: the smaller matrix takes less time
            b, scale = b * scale, 1.0
        for index in range(count):
            begin, end = rows * index // count, rows * (index + 1) // count
            offset, size = begin * width * source.itemsize, (end - begin) * width * source.itemsize
            start = self._map(tensor, source, offset, (end - begin) * width).view(end - begin, width).to(target)
            result = self._take((end - begin) * width, target) if out is None else out[begin * width : end * width]
            result = result.view(end - begin, width)
            delta = (b @ a[:, begin:end]).T if update.transposed else self._multiply(b[begin:end], a)
            if scale != 1:
                delta *= scale
            if magnitude is not None:
                _add_with_dora(start, delta, magnitude if update.transposed else magnitude[begin:end], update, result)
            elif update.rounded_first:
                torch.add(start, delta.to(target), out=result)
            elif target == torch.float32:
                torch.add(delta, start, out=result)
            else:
                delta += self._widen(start)
                result.copy_(delta)
            _check_finite(result, tensor.name)
            moved = moved or not torch.equal(result, start)
            del start
            self._release(tensor, offset, size)
            yield result, moved

    def _multiply(self, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Return B·A in a reused buffer, since allocating memory takes longer than the product."""
        return torch.mm(b, a, out=self._buffer(2, b.shape[0] * a.shape[1], torch.float32).view(b.shape[0], a.shape[1]))

    def _widen(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values in float32. Adding two dtypes directly gives the same result, but is slower."""
        return self._buffer(3, values.numel(), torch.float32).view(values.shape).copy_(values)

    def _take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self._buffer(next(self._turn), count, dtype)

    def _buffer(self, key: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        size = count * dtype.itemsize
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[key][:size].view(dtype)

    def _map(self, tensor: Planned, dtype: torch.dtype, offset: int, count: int) -> torch.Tensor:
        file = tensor.folder / tensor.source.shard
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[file].madvise(mmap.MADV_SEQUENTIAL)
        if tensor.source.offset + tensor.source.size > len(self._maps[file]):
            raise InputError(f"'{file}' was truncated while it was read; fetch it again")
        return torch.frombuffer(self._maps[file], dtype=dtype, count=count, offset=tensor.source.offset + offset)

    def _release(self, tensor: Planned, offset: int, size: int) -> None:
        """Release mapped pages after use. They would otherwise count as this process's memory until it ends."""
        begin = -(-(tensor.source.offset + offset) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.source.offset + offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._maps[tensor.folder / tensor.source.shard].madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _add_with_dora(
    start: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor, update: Update, result: torch.Tensor
) -> None:
    """Write m / ||W + delta|| · (W + delta) to `result`, with the norm per output and in PEFT's order of operations."""
    weight = start.T + delta.T if update.transposed else start + delta
    factor = magnitude / torch.linalg.norm(weight, dim=1)
    factor = factor.view(1, -1) if update.transposed else factor.view(-1, 1)
    result.copy_(factor * (start + delta))


def _check_finite(values: torch.Tensor, name: str) -> None:
    # The sum is a fast check. It may also overflow when all values are finite.
    if not values.sum().isfinite() and not torch.isfinite(values).all():
        raise InputError(f"{name}: the merged tensor has values that are not finite in {values.dtype}")


def _make_header(tensors: list[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _make_index(plan: Plan) -> str:
    tensors = {tensor.name: (shard, tensor) for shard, tensors in plan.shards.items() for tensor in tensors}
    index = {
        "metadata": {
            "total_parameters": sum(prod(tensor.shape) for _, tensor in tensors.values()),
            "total_size": sum(tensor.size for _, tensor in tensors.values()),
        },
        "weight_map": {name: shard for name, (shard, _) in sorted(tensors.items())},
    }
    return json.dumps(index, indent=2) + "\n"


def _make_config(plan: Plan, dtype: str | None) -> str:
    config = dict(plan.base.config)
    if dtype:
        name = str(DTYPES[PRECISIONS[dtype]]).removeprefix("torch.")
        # Older versions of transformers read torch_dtype.
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config[key] = name
    if plan.unties or ("lm_head.weight" in plan.base.tensors and "tie_word_embeddings" not in config):
        config["tie_word_embeddings"] = False  # the default differs between model classes
    return json.dumps(config, indent=2) + "\n"


def _reflink(source: Path, target: Path) -> bool:
    """Make a copy-on-write clone of a file. Return whether the file system could."""
    try:
        with source.open("rb") as original, target.open("xb") as copy:
            fcntl.ioctl(copy, _FICLONE, original.fileno())
            os.fsync(copy.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def _publish(aside: Path, output: Path, temporary: bool) -> None:
    if not temporary:
        for path in (*aside.rglob("*"), aside):
            _sync(path)
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)  # an interrupted removal would leave half of the old model
    try:
        aside.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    if not temporary:
        _sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify_merged(plan: Plan, folder: Path) -> int:
    """Check all headers and some recomputed tensors of a merged model; return the number of recomputed tensors.

    Raises:
        InputError: a tensor is wrong. The message names it.
    """
    headers = {shard: read_header(folder / shard) for shard in plan.shards}
    for shard, planned in plan.shards.items():
        actual = {name: (tensor.dtype, tensor.shape) for name, tensor in headers[shard].items()}
        expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in planned}
        if actual != expected:
            names = sorted({name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name)})
            raise InputError(f"{folder / shard}: '{names[0]}' is missing, unexpected, or of the wrong dtype or shape")
    tensors = [(shard, tensor) for shard, planned in plan.shards.items() for tensor in planned]
    copied = [(shard, tensor) for shard, tensor in tensors if tensor.is_copy and tensor.dtype in DTYPES]
    changed = [(shard, tensor) for shard, tensor in tensors if not tensor.is_copy]
    sample = [pair for group in (changed, copied) for pair in group[:: ceil(len(group) / _VERIFIED) or 1]]
    for shard, tensor in sample:
        written = read_tensor(folder, headers[shard][tensor.name])
        if not torch.equal(written, _recompute(tensor, plan)):
            raise InputError(f"{folder / shard}: '{tensor.name}' differs from the base model merged with the adapter")
    return len(sample)


def _recompute(tensor: Planned, plan: Plan) -> torch.Tensor:
    """Return the values that `Source` computes in blocks, computed at once and without its buffers."""
    start = read_tensor(tensor.folder, tensor.source).to(DTYPES[tensor.dtype])
    if tensor.bias is not None:
        return (start + plan.adapter.read(tensor.bias[0]).float() * tensor.bias[1]).to(start.dtype)
    if tensor.update is None:
        return start
    update = tensor.update
    delta = plan.adapter.read(update.b).float() @ plan.adapter.read(update.a).float()
    delta = (delta.T if update.transposed else delta) * update.scale
    if update.magnitude:
        result = torch.empty_like(start)
        _add_with_dora(start, delta, plan.adapter.read(update.magnitude).float(), update, result)
        return result
    return (start + (delta.to(start.dtype) if update.rounded_first else delta)).to(start.dtype)
