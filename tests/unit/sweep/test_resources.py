"""What jobs ask for: figures that can be checked by hand, and that grow with what they stand for."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.checkpoints.shapes import read_shape
from lorasweep.experiment.sections import Controls, Data, Evaluation, Experiment, Model
from lorasweep.sweep import resources
from plain_checkpoint import write_checkpoint

GPU = Model(path="x", dtype="bf16", device="cuda")
NONE = Data()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Llama-3.1-8B by its configuration alone."""
    folder = tmp_path_factory.mktemp("llama")
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 131072}))
    return read_shape(folder)


ADAPTERS = [
    (["q_proj", "v_proj"], False, 8, 6.8),
    (["q_proj", "v_proj"], False, 64, 54.5),
    (["q_proj", "k_proj", "v_proj", "output_proj"], False, 8, 13.6),
    (["q_proj", "k_proj", "v_proj", "output_proj"], True, 16, 83.9),
]


@pytest.mark.parametrize(("modules", "mlp", "rank", "megabytes"), ADAPTERS)
def test_an_adapter_of_llama_has_the_size_that_the_readme_says(
    llama: Checkpoint, modules: Any, mlp: bool, rank: int, megabytes: float
) -> None:
    controls = Controls(lora_attn_modules=modules, apply_lora_to_mlp=mlp, lora_rank=rank)
    assert resources.count_lora_parameters(llama, controls) * 2 / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_a_full_llama_has_16_gb(llama: Checkpoint) -> None:
    assert llama.num_parameters * 2 / 1e9 == pytest.approx(16.06, abs=0.005)
    assert resources.model_disk_mb(llama, GPU) == 16061 + 50


def test_training_llama_asks_for_its_weights_twice_and_no_activations_on_a_gpu(llama: Checkpoint) -> None:
    asked = resources.train_mem_mb(llama, Controls(batch_size=64), GPU, NONE)
    assert asked == pytest.approx(3000 + 2 * 16061, abs=2)
    assert asked == resources.train_mem_mb(llama, Controls(batch_size=1), GPU, NONE)


@pytest.mark.parametrize(("quantize", "gigabytes"), [("nf4", 0.55 * 8.03), ("int8", 1.05 * 8.03)])
def test_training_on_a_quantized_model_asks_for_its_checkpoint_and_for_the_quantized_weights(
    llama: Checkpoint, quantize: Any, gigabytes: float
) -> None:
    asked = resources.train_mem_mb(llama, Controls(), GPU.model_copy(update={"quantize": quantize}), NONE)
    assert asked == pytest.approx(3000 + 16061 + 1000 * gigabytes, abs=2)


def test_states_have_the_rank_and_precision_of_the_training_and_adapters_those_saved(llama: Checkpoint) -> None:
    plain, converted = (Controls(lora_modules="all-linear", init_lora_weights=name) for name in ("kaiming", "pissa"))
    adapter = resources.count_lora_parameters(llama, plain) * 2 / 1e6
    assert resources.train_disk_mb(llama, plain, GPU, "torchtune") == ceil(100 + 9 * adapter)
    assert resources.train_disk_mb(llama, plain, GPU, "trl") == ceil(100 + 3 * adapter + 6 * 2 * adapter)
    assert resources.train_disk_mb(llama, converted, GPU, "trl") == ceil(100 + 6 * adapter + 6 * 2 * adapter)


def test_a_training_holds_its_samples_in_memory(llama: Checkpoint, tmp_path: Path) -> None:
    for name in ("train", "more", "validation"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1_000_000_000)
    data = Data(train=(str(tmp_path / "train"), str(tmp_path / "more")), validation=str(tmp_path / "validation"))
    asked, without = (resources.train_mem_mb(llama, Controls(), GPU, each) for each in (data, NONE))
    assert asked == without + 12_000


def test_requests_grow_with_what_they_stand_for(tmp_path: Path) -> None:
    model = Model(path="x", dtype="fp32", device="cpu")
    base = read_checkpoint(write_checkpoint(tmp_path / "m", hidden_size=512, intermediate_size=2048, vocab_size=32000))
    one = Controls(batch_size=4, max_seq_len=512)
    more = [
        Controls(batch_size=8, max_seq_len=512),
        Controls(batch_size=4, max_seq_len=1024),
        Controls(batch_size=4, max_seq_len=512, lora_rank=512),
    ]
    for other in more:
        assert resources.train_mem_mb(base, other, model, NONE) > resources.train_mem_mb(base, one, model, NONE)
    hours = [resources.train_runtime(base, one, model, samples) for samples in (1000, 100_000, 1_000_000)]
    assert hours == sorted(set(hours))
    limited = Controls(batch_size=4, max_seq_len=512, max_steps_per_epoch=10)
    assert resources.train_runtime(base, limited, model, 1_000_000) < hours[-1]
    short, long = (Evaluation(tasks=["a.py"], max_tokens=n) for n in (100, 100_000))
    assert resources.evaluate_runtime(base, model, long) > resources.evaluate_runtime(base, model, short)


def test_a_tasks_own_options_count_in_what_its_evaluation_asks_for(llama: Checkpoint) -> None:
    def ask(**options: int) -> int:
        evaluation = Evaluation.model_validate({"tasks": [{"task": "a.py", **options}], "max_tokens": 200})
        return resources.evaluate_runtime(llama, GPU, evaluation)

    assert ask(epochs=4) > ask() > ask(max_tokens=10)


def test_the_memory_of_a_merge_is_that_of_its_largest_tensor_whatever_the_layers(llama: Checkpoint) -> None:
    less = {name: tensor for name, tensor in llama.tensors.items() if ".3" not in name}
    fewer = Checkpoint(llama.path, llama.config, llama.shards, less, llama.tokenizer_files)
    assert fewer.num_parameters < llama.num_parameters
    assert resources.merge_mem_mb(llama) == resources.merge_mem_mb(fewer) == 3000 + ceil(12 * 128256 * 4096 / 1e6)


def make_evaluation(**settings: Any) -> Evaluation:
    return Evaluation(tasks=["a.py"], **settings)


def test_a_job_gets_adapters_until_its_start_is_a_tenth_of_it(llama: Checkpoint) -> None:
    """Of the 8B model: 60 s of start and 80 s of load; 32 batches of 8 tokens take 8 s or, a second each, 32 s."""
    short = make_evaluation(max_tokens=8)
    assert resources.get_adapters_per_job(llama, GPU, short) == ceil(9 * (60 + 16061 / 200) / 32)
    assert resources.get_adapters_per_job(llama, GPU, make_evaluation()) == 1  # answers of 35 minutes
    assert resources.get_adapters_per_job(llama, GPU, make_evaluation(max_tokens=8, job_minutes=5)) == 4
    assert resources.get_adapters_per_job(llama, GPU, make_evaluation(max_tokens=8, job_minutes=1)) == 1
    assert resources.get_adapters_per_job(llama, GPU, make_evaluation(adapters_per_job=7)) == 7


def test_a_batch_asks_for_the_time_of_all_its_adapters_and_of_one_load(llama: Checkpoint) -> None:
    evaluation = make_evaluation()
    one, eight = (resources.evaluate_runtime(llama, GPU, evaluation, adapters=n) for n in (1, 8))
    assert eight - one == pytest.approx(7 * 32 * 2048 * 16.061e9 / 5e11 / 60, abs=1)


def test_of_several_gpus_each_process_has_the_model_and_all_share_the_time(llama: Checkpoint) -> None:
    one, four = Controls(batch_size=8, epochs=10), Controls(batch_size=2, epochs=10, gpus=4)
    assert resources.train_mem_mb(llama, four, GPU, NONE) == 4 * resources.train_mem_mb(llama, one, GPU, NONE)
    long, short = (resources.train_runtime(llama, controls, GPU, 8000) - 15 for controls in (one, four))
    assert short == pytest.approx(long / 4, abs=1)


@pytest.mark.parametrize(
    ("device", "changes", "gpus"),
    [
        ("a100", {}, 1),  # 16.06 GB of 56
        ("rtx4090", {}, 1),  # of 16.8
        ("rtx4090", {"dtype": "fp32"}, 2),
        ("small", {}, 12),  # 1.4 GB each
        ("small", {"backend": "vllm"}, 16),  # which divides 32 heads
        ("small", {"gpus": 3}, 3),
    ],
)
def test_auto_is_as_few_gpus_as_hold_the_weights_in_seven_tenths_of_their_memory(
    llama: Checkpoint, device: str, changes: dict[str, Any], gpus: int
) -> None:
    small = {"bf16_flops": 1e12, "fp32_flops": 1e12, "bandwidth": 1e12, "memory": 2e9}
    plain = {
        "experiment": {"name": "e"},
        "model": {"path": "x", "dtype": changes.pop("dtype", "bf16")},
        "evaluation": {"gpus": "auto", **changes},
        "plan": {"device": device, "devices": {"small": small}},
    }
    experiment = Experiment.model_validate(plain)
    assert resources.get_evaluation_gpus(llama, experiment.choose_model(None), experiment) == gpus
