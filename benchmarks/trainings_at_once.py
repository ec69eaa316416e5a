"""Several adapters of one base in one training step, against a step for each: is there something to gain?

    make install-test && scripts/run eval benchmarks/trainings_at_once.py
    scripts/run eval benchmarks/trainings_at_once.py --arithmetic h100

A Llama of random weights with LoRA of rank 16 on all linear layers. A step is the forward pass, the backward pass and
AdamW. *Together*, the batches of k adapters are stacked, and each LoRA layer applies each adapter to its own rows by
batched products. *Alone*, k steps follow each other. Both sides take turns on the same batches; printed are medians of
the seconds for all k adapters, and the ratio alone / together. That both sides train the same is checked: in fp32, the
losses of every step differ by less than 1e-5.

The optimizer has the stacked tensors of all adapters, gradients are not clipped, and nothing is padded: what one would
build can gain less than this. `--device cuda --dtype bf16 --models 1b 8b` is for a GPU. `--arithmetic` measures
nothing: it prints for which micro-batches a step on that device leaves it idle.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))

RANK, SCALE, LR = 16, 2.0, 1e-4
CHUNK = 2048
"""Tokens whose logits exist at a time."""

TOLERANCE = 1e-5
PAIRS = ((1, 16), (1, 128), (4, 128), (16, 128), (32, 128), (1, 512), (4, 512), (16, 512), (32, 512))
"""Rows of a micro-batch, and tokens of a row. The first is there to see a gain if there is one anywhere."""

SHAPES = {
    "0.13b": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}
"""The shapes of SmolLM2 135M, Llama 3.2 1B and Llama 3.1 8B."""

MEASURED_ON_H100 = {"layers": 16, "seconds": 0.12, "eager": 0.22, "compiled": 0.37}
"""docs/plan.md, Llama 3.2 1B: seconds of a step of few tokens, and shares of the peak with many."""


class LoraLinear(nn.Module):
    """A frozen linear layer with k adapters, of which one acts on all rows, or each on its part of the rows."""

    def __init__(self, base: nn.Linear, adapters: int) -> None:
        super().__init__()
        self.base = base
        inner, outer, like = base.in_features, base.out_features, base.weight
        self.a = nn.Parameter(torch.randn(adapters, inner, RANK, device=like.device, dtype=like.dtype) * inner**-0.5)
        # Not zero, so that the gradients of A are not zero either.
        self.b = nn.Parameter(torch.randn(adapters, RANK, outer, device=like.device, dtype=like.dtype) * 0.01)
        self.alone = nn.ParameterList(
            nn.Parameter(tensor.detach()[index].clone()) for index in range(adapters) for tensor in (self.a, self.b)
        )
        self.active: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.active is None:
            rows = x.reshape(self.a.shape[0], -1, x.shape[-1])
            change = torch.bmm(torch.bmm(rows, self.a), self.b).reshape(*x.shape[:-1], -1)
        else:
            change = x @ self.alone[2 * self.active] @ self.alone[2 * self.active + 1]
        return self.base(x) + SCALE * change


class Sides:
    """A model with k adapters, and the step of both sides."""

    def __init__(self, shape: dict[str, int], adapters: int, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
        self.model.requires_grad_(False)
        self.device, self.vocabulary = device, shape["vocab_size"]
        self.give_adapters(adapters)

    def give_adapters(self, adapters: int) -> None:
        """Put new adapters in place of those that are there."""
        torch.manual_seed(1)
        self.adapters, self.layers = adapters, list[LoraLinear]()
        for layer in self.model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, module in list(part.named_children()):
                    base = module.base if isinstance(module, LoraLinear) else module
                    if isinstance(base, nn.Linear):
                        setattr(part, name, lora := LoraLinear(base, adapters))
                        self.layers.append(lora)
        fused = self.device == "cuda"
        self.together = torch.optim.AdamW([p for lora in self.layers for p in (lora.a, lora.b)], lr=LR, fused=fused)
        self.alone = [
            torch.optim.AdamW(
                [p for lora in self.layers for p in (lora.alone[2 * index], lora.alone[2 * index + 1])],
                lr=LR,
                fused=fused,
            )
            for index in range(adapters)
        ]

    def step_together(self, batches: Sequence[torch.Tensor]) -> list[float]:
        """Make a step of all adapters at once; return the loss of each."""
        self._activate(None)
        losses = self._step(torch.cat(list(batches)), self.adapters)
        self.together.step()
        self.together.zero_grad()
        return losses

    def step_alone(self, batches: Sequence[torch.Tensor]) -> list[float]:
        """Make a step of each adapter, one after the other; return the loss of each."""
        losses = []
        for index, batch in enumerate(batches):
            self._activate(index)
            losses += self._step(batch, 1)
            self.alone[index].step()
            self.alone[index].zero_grad()
        return losses

    def _activate(self, index: int | None) -> None:
        for lora in self.layers:
            lora.active = index

    def _step(self, batch: torch.Tensor, adapters: int) -> list[float]:
        hidden = self.model.model(batch, use_cache=False).last_hidden_state
        # The gradients of the logits one part after the other: all logits at once would be most of the memory.
        rows, tokens = batch.shape[0] // adapters, batch.shape[1]
        size = max(1, min(rows, CHUNK // tokens))
        gradients, losses = [], [torch.zeros((), device=batch.device) for _ in range(adapters)]
        for adapter in range(adapters):
            for first in range(adapter * rows, (adapter + 1) * rows, size):
                part = slice(first, min(first + size, (adapter + 1) * rows))
                states = hidden[part].detach().requires_grad_()
                logits = self.model.lm_head(states)[:, :-1].flatten(0, 1)
                loss = cross_entropy(logits.float(), batch[part, 1:].flatten(), reduction="sum") / (rows * (tokens - 1))
                loss.backward()
                gradients.append(states.grad)
                losses[adapter] += loss.detach()
        hidden.backward(torch.cat(gradients))
        return [float(loss) for loss in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["0.13b"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, help="of the model, if not all: the ratio needs fewer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=8192, help="most tokens of a step together: for time and memory")
    parser.add_argument("--arithmetic", metavar="DEVICE", help="of docs/plan.md: print what is to be expected there")
    arguments = parser.parse_args()
    if arguments.arithmetic:
        reckon(arguments.arithmetic)
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    print("| model | rows | tokens | adapters | alone, s | together, s | ratio | of processors |\n" + "|---" * 8 + "|")
    for name in arguments.models:
        shape = SHAPES[name] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
        for adapters in arguments.adapters:
            check(shape, adapters, arguments.device)
        sides = Sides(shape, 1, arguments.device, dtype)
        cases = [(rows, tokens, adapters) for rows, tokens in PAIRS for adapters in arguments.adapters]
        for rows, tokens, adapters in sorted(cases, key=lambda case: case[0] * case[1] * case[2]):
            if rows * tokens * adapters <= arguments.limit:
                line = measure(sides, adapters, rows, tokens, arguments.repeats)
                print(f"| {name} | {rows} | {tokens} | {adapters} | {line} |", flush=True)


def check(shape: dict[str, int], adapters: int, device: str) -> None:
    """Check in fp32, with two layers of the shape, that both sides train the same.

    Raises:
        SystemExit: losses differ.
    """
    sides = Sides({**shape, "num_hidden_layers": 2}, adapters, device, torch.float32)
    for _ in range(5):
        batches = draw(sides, adapters, 3, 32)
        compare(sides.step_alone(batches), sides.step_together(batches))


def compare(alone: Sequence[float], together: Sequence[float]) -> None:
    worst = max(abs(a - b) for a, b in zip(alone, together, strict=True))
    if not worst <= TOLERANCE:
        sys.exit(f"losses differ by {worst:.1e}: alone {alone}, together {together}")


def measure(sides: Sides, adapters: int, rows: int, tokens: int, repeats: int) -> str:
    """Return the cells of a line: seconds of both sides and their ratio, or that the memory is not enough."""
    try:
        sides.give_adapters(adapters)
        spent: dict[str, list[tuple[float, float]]] = {"alone": [], "together": []}
        for repeat in range(repeats + 1):
            batches = draw(sides, adapters, rows, tokens)
            now, losses = {}, {}
            ways = {"alone": sides.step_alone, "together": sides.step_together}
            # In turns, and not always the same one first.
            for name in sorted(ways, reverse=bool(repeat % 2)):
                now[name], losses[name] = take_time(ways[name], batches, sides.device)
            if sides.model.dtype == torch.float32:
                compare(losses["alone"], losses["together"])
            for name in spent if repeat else ():  # the first one warms up
                spent[name].append(now[name])
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory | | |"
    (alone, worked), (together, worked_together) = (
        (statistics.median(part) for part in zip(*times, strict=True)) for times in spent.values()
    )
    return f"{alone:.3f} | {together:.3f} | {alone / together:.2f} | {worked / worked_together:.2f}"


def take_time(
    step: Callable[[Sequence[torch.Tensor]], list[float]], batches: Sequence[torch.Tensor], device: str
) -> tuple[tuple[float, float], list[float]]:
    """Return the seconds of a step, those of the processors, and its losses."""
    began, worked = time.perf_counter(), time.process_time()
    losses = step(batches)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began, time.process_time() - worked), losses


def draw(sides: Sides, adapters: int, rows: int, tokens: int) -> list[torch.Tensor]:
    return [torch.randint(sides.vocabulary, (rows, tokens), device=sides.device) for _ in range(adapters)]


def reckon(device_name: str) -> None:
    """Print up to how many tokens a step leaves a device idle, and what stacking could gain at most, by arithmetic."""
    from lorasweep.experiment.devices import DEVICES

    device = DEVICES[device_name]
    flops, bandwidth = float(device.bf16_flops), float(device.bandwidth)
    print(f"{device_name}: weights are read faster than they are used from {flops / bandwidth:.0f} tokens a step on.\n")
    sizes = (512, 1024, 2048, 4096, 8192, 16384)
    print("| model | share of the peak | busy from | " + " | ".join(f"{size}" for size in sizes) + " |")
    print("|---|---|---|" + "---|" * len(sizes))
    for name, shape in SHAPES.items():
        parameters = count_parameters(shape)
        least = MEASURED_ON_H100["seconds"] * shape["num_hidden_layers"] / MEASURED_ON_H100["layers"]
        for words in ("eager", "compiled"):
            a_token = 4 * parameters / (flops * MEASURED_ON_H100[words])
            # The step of few tokens was measured without `compile`, which launches fewer kernels: no row of it.
            if words == "eager":
                gains = [8 * max(least, size * a_token) / max(least, 8 * size * a_token) for size in sizes]
                cells = " | ".join(f"{gain:.1f}" for gain in gains)
                print(f"| {name} | {MEASURED_ON_H100[words]} | {least / a_token:,.0f} tokens | {cells} |")


def count_parameters(shape: dict[str, int]) -> int:
    """Return the number of parameters that each token is multiplied with."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    return shape["num_hidden_layers"] * layer + shape["vocab_size"] * hidden


if __name__ == "__main__":
    main()
