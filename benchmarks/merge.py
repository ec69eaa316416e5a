"""Merging as lorasweep does it, as PEFT does it, and copying the same files: time, processor time, peak memory.

    make install-test && .venv/driver/bin/python benchmarks/merge.py --picture docs/merge.svg

A random checkpoint of each size (bf16, several shards) and an adapter of rank 16 on all linear layers. The ways take
turns, each in a process of its own, with nothing left to be written from the run before; times are those of the work,
after the imports. `kept` is a merged model that is forced to the disk, as in mode A, and is compared with such a copy.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EVAL = ROOT / ".venv/eval/bin/python"
WAYS = ("cp", "merge", "merge + sha256", "cp, synced", "merge + sha256, kept", "PEFT bf16", "PEFT fp32")
GROWTH = ("cp", "merge + sha256", "PEFT bf16")
"""What is measured at every size; the rest at the first one alone, and there with a cold page cache too."""

PAUSE = 2
"""Seconds before each work: memory that was just freed is handed out faster, on virtual machines by far."""

RANK = 16
HIDDEN, INNER, KEYS, VOCABULARY = 2048, 8192, 512, 32768
SHARD = 3e8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 2, 4], help="GB of the checkpoints")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks", help="where to make the checkpoints")
    parser.add_argument("--picture", type=Path, help="SVG file to draw the medians to")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a way and a folder: one run, in its own process
    arguments = parser.parse_args()
    if arguments.one:
        way, folder = arguments.one[0], Path(arguments.one[1])
        print(json.dumps(run(way, folder)))
        return
    medians = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            subprocess.run([EVAL, __file__, "--one", f"make {size}", folder], check=True, stdout=subprocess.DEVNULL)
            for cache in ("warm", "cold") if size == arguments.sizes[0] else ("warm",):
                if cache == "cold" and not drop_caches():
                    print("cold: the page cache cannot be dropped here")
                    continue
                whole = size == arguments.sizes[0] and cache == "warm"
                less = (*GROWTH, "cp, synced", "merge + sha256, kept") if cache == "cold" else GROWTH
                ways = [way for way in arguments.ways if whole or way in less]
                medians += measure(size, cache, Path(folder), ways, arguments.repeats)
    if arguments.picture:
        draw(medians, arguments.picture)


def measure(size: float, cache: str, folder: Path, ways: list[str], repeats: int) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            shutil.rmtree(folder / "output", ignore_errors=True)
            os.sync()
            if cache == "cold":
                drop_caches()
            else:
                for file in (folder / "base").iterdir():
                    file.read_bytes()
            command = [EVAL, __file__, "--one", way, folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    medians = []
    for way in ways:
        median = {key: statistics.median(run[key] for run in runs[way]) for key in runs[way][0]}
        medians.append({"size": size, "cache": cache, "way": way, **median})
    print_table(size, cache, medians)
    return medians


def print_table(size: float, cache: str, medians: list[dict[str, Any]]) -> None:
    by_way = {row["way"]: row for row in medians}
    print(f"\n{size:g} GB, page cache {cache}")
    print(f"{'':22}{'wall s':>8}{'cpu s':>8}{'peak MB':>9}{'/ cp':>7}{'/ PEFT':>8}{'memory / PEFT':>15}")
    for way, row in by_way.items():
        copy = by_way.get("cp, synced" if way.endswith(("kept", "synced")) else "cp")
        peft = by_way.get("PEFT bf16")
        ratios = [
            f"{row['wall'] / copy['wall']:7.2f}" if copy else "",
            f"{row['wall'] / peft['wall']:8.2f}" if peft else "",
            f"{row['peak'] / peft['peak']:15.2f}" if peft and not way.startswith("cp") else "",
        ]
        print(f"{way:22}{row['wall']:8.2f}{row['cpu']:8.2f}{row['peak'] / 1e6:9.0f}" + "".join(ratios), flush=True)


def draw(medians: list[dict[str, Any]], file: Path) -> None:
    """Draw the times at the first size, and the memory by size."""
    import matplotlib as mpl
    import matplotlib.figure

    mpl.rcParams["svg.hashsalt"] = "lorasweep"
    figure = mpl.figure.Figure(figsize=(9, 3), layout="constrained")
    times, memory = figure.subplots(1, 2, width_ratios=(3, 2))
    size = medians[0]["size"]
    first = [row for row in medians if row["size"] == size]
    ways = list(dict.fromkeys(row["way"] for row in first))
    for offset, cache, colour in ((-0.2, "warm", "#1f77b4"), (0.2, "cold", "#aec7e8")):
        rows = [row for row in first if row["cache"] == cache]
        places = [ways.index(row["way"]) + offset for row in rows]
        bars = times.barh(places, [row["wall"] for row in rows], 0.38, color=colour, label=f"page cache {cache}")
        times.bar_label(bars, fmt=" %.1f s", fontsize=7)
    times.set_yticks(range(len(ways)), ways)
    times.invert_yaxis()
    times.set_xlabel(f"wall time, {size:g} GB, median")
    times.legend(fontsize=7, frameon=False)
    for way, colour in (("PEFT bf16", "#d62728"), ("merge + sha256", "#1f77b4")):
        rows = [row for row in medians if row["way"] == way and row["cache"] == "warm"]
        memory.plot([row["size"] for row in rows], [row["peak"] / 1e9 for row in rows], "o-", color=colour, label=way)
    memory.set_ylim(bottom=0)
    memory.set_xlabel("model, GB")
    memory.set_ylabel("peak memory, GB")
    memory.legend(fontsize=7, frameon=False)
    for axes in (times, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


def drop_caches() -> bool:
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def run(way: str, folder: Path) -> dict[str, float]:
    """Do one thing in this process; return its wall and processor time in seconds, and the peak memory in bytes."""
    base, adapter, output = folder / "base", folder / "adapter", folder / "output"
    if way.startswith("make"):
        make_checkpoint(base, adapter, float(way.split()[1]) * 1e9)
        return {}
    copying = way.startswith("cp")
    if copying:

        def work() -> None:
            subprocess.run(["cp", "-r", base, output], check=True)
            if way == "cp, synced":
                subprocess.run(["sync", *output.iterdir()], check=True)
    elif way.startswith("PEFT"):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        def work() -> None:
            dtype = torch.bfloat16 if way == "PEFT bf16" else torch.float32
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
            PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(output)
    else:
        from lorasweep.adapters.merge import merge

        def work() -> None:
            kept = way.endswith("kept")
            merge(base, adapter, output, temporary=not kept, threads=os.cpu_count() or 1, digest="sha256" in way)

    who = resource.RUSAGE_CHILDREN if copying else resource.RUSAGE_SELF
    time.sleep(PAUSE)
    before, begin = resource.getrusage(who), time.perf_counter()
    work()
    wall, after = time.perf_counter() - begin, resource.getrusage(who)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "peak": after.ru_maxrss * 1024}


def make_checkpoint(base: Path, adapter: Path, size: float) -> None:
    """Write a random Llama of about `size` bytes in bf16, and an adapter for it."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layer = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN)}
    layer |= {"self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    layer |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    layers = max(1, round((size / 2 - 2 * VOCABULARY * HIDDEN) / sum(a * b for a, b in layer.values())))
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"model.layers.{index}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    base.mkdir(parents=True)
    torch.manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    files: dict[str, str] = {}
    for name, shape in shapes.items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD:
            save_file(shards[-1], base / f"model-{len(shards):05}.safetensors", {"format": "pt"})
            shards[-1:] = [{}, {}]
        shards[-1][name] = (torch.randn(shape) * 0.02).bfloat16()
        files[name] = f"model-{len(shards):05}.safetensors"
    save_file(shards[-1], base / f"model-{len(shards):05}.safetensors", {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    adapter.mkdir()
    weights = {}
    for name, shape in shapes.items():
        if "_proj" in name:
            module = "base_model.model." + name.removesuffix(".weight")
            weights[f"{module}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            weights[f"{module}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.02
    save_file(weights, adapter / "adapter_model.safetensors")
    targets = [name.rpartition(".")[2] for name in layer]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(main())
