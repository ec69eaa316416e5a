"""A training by torchtune's recipe: the same as without this workflow, and what it leaves to be read."""

import importlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import forked_training
from interrupted_training import train_and_end
from lorasweep.trainers import Diverged, TrainingError
from lorasweep.trainers.torchtune.run import train
from lorasweep.trainers.torchtune.tokenizer import ChatTokenizer
from lorasweep.trainers.training_log import COLUMNS, Row, TrainingLog, read_log
from lorasweep.util.digest import digest_file
from lorasweep.util.versions import get_git_revision
from recipes import GIVEN_TEMPLATE, count_tokens_as_given

ROOT = Path(__file__).parents[2]

Writer = Callable[[Path, str], Path]


def run(recipe: Path, *metric_loggers: str) -> dict[str, Any]:
    """Train, and return the record of the adapter."""
    train(recipe, recipe.parent / "adapter", metric_loggers)
    return dict(json.loads((recipe.parent / "adapter/lorasweep.json").read_text()))


def weights(recipe: Path) -> bytes:
    return (recipe.parent / "adapter/adapter_model.safetensors").read_bytes()


def log(recipe: Path) -> list[Row]:
    return read_log(recipe.parent / "adapter/training_log.csv")


def train_by_torchtune(recipe: Path) -> None:
    """Run a recipe by torchtune's own command."""
    done = forked_training.call(
        "torchtune._cli.tune", ["run", "lora_finetune_single_device", "--config", recipe], os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("controls", [{}, {"max_steps_per_epoch": 1, "clip_grad_norm": 0.5}])
def test_it_is_bit_for_bit_torchtunes_own(make: Callable[..., Path], controls: dict[str, Any]) -> None:
    ours = make(**controls)
    assert run(ours)["git_revision"] == get_git_revision()
    plain = make("plain", **controls)
    train_by_torchtune(plain)
    theirs = plain.parent / "state/train"
    assert weights(ours) == (theirs / "epoch_1/adapter_model.safetensors").read_bytes()
    [said] = theirs.glob("logs/log_*.txt")
    losses = [float(line.split("loss:")[1].split()[0]) for line in said.read_text().splitlines() if "loss:" in line]
    assert [row.loss for row in log(ours)] == pytest.approx(losses, rel=1e-5)


@pytest.mark.long  # compiles for a minute
def test_an_8_bit_optimizer_trains_and_goes_on_where_null_removes_what_it_does_not_take(
    make: Callable[..., Path],
) -> None:
    optimizer = {"_component_": "torchao.optim.AdamW8bit", "fused": None}
    whole, killed = (make(point, lora_rank=64, _override={"optimizer": optimizer}) for point in ("whole", "killed"))
    run(whole)
    losses = [row.loss for row in log(whole)]
    assert losses[-1] < losses[0]
    assert train_and_end(killed, 1, "killed in a step", 3) < 0
    assert train_and_end(killed) == 0
    assert "Resuming after step 3," in (killed.parent / "train.log").read_text()
    assert weights(killed) == weights(whole)


class TestEarlierEpochs:
    def test_each_is_what_torchtune_has_after_it_with_its_part_of_the_log(self, make: Callable[..., Path]) -> None:
        file = make(epochs=3)
        first, second = (file.parent.with_name(f"point__epoch={epoch}") / "adapter" for epoch in (1, 2))
        train(file, file.parent / "adapter", earlier={1: first, 2: second})
        plain = make("plain", epochs=3)
        train_by_torchtune(plain)
        for epoch, adapter in enumerate((first, second, file.parent / "adapter")):
            theirs = plain.parent / f"state/train/epoch_{epoch}/adapter_model.safetensors"
            assert (adapter / "adapter_model.safetensors").read_bytes() == theirs.read_bytes()
            rows, record = log(file)[: 2 * (epoch + 1)], json.loads((adapter / "lorasweep.json").read_text())
            assert read_log(adapter / "training_log.csv") == rows
            assert (record["epochs"], record["steps"]) == (epoch + 1, 2 * (epoch + 1))
            assert (record["tokens"], record["final_train_loss"]) == (rows[-1].tokens, rows[-1].loss)
            assert record["recipe_sha256"] == digest_file(file)

    def test_one_that_the_training_does_not_have_is_refused_before_it(self, make: Callable[..., Path]) -> None:
        file = make()
        with pytest.raises(TrainingError, match="has 2 epochs, but the adapter of epoch 3 is wanted"):
            train(file, file.parent / "adapter", earlier={3: file.parent / "third"})
        assert [entry.name for entry in file.parent.iterdir()] == ["recipe.yaml"]

    def test_one_more_than_an_earlier_attempt_kept_trains_anew(self, make: Callable[..., Path]) -> None:
        file = make()
        run(file)
        first = file.parent / "first"
        train(file, file.parent / "adapter", earlier={1: first})
        assert json.loads((first / "lorasweep.json").read_text())["epochs"] == 1


class TestLog:
    def test_there_is_a_row_for_each_step_and_the_record_sums_them_up(self, make: Callable[..., Path]) -> None:
        file = make(num_warmup_steps=2)
        record = run(file)
        text = (file.parent / "adapter/training_log.csv").read_text()
        assert text.startswith("step,epoch,loss,lr,tokens,seconds,validation_loss\n")
        rows = log(file)
        assert [(row.step, row.epoch) for row in rows] == [(1, 1), (2, 1), (3, 2), (4, 2)]
        assert [row.lr for row in rows] == pytest.approx([0, 2e-3, 4e-3, 2e-3])
        assert all(earlier.seconds < later.seconds for earlier, later in pairwise(rows))
        assert {key: record[key] for key in ("steps", "epochs", "tokens", "final_train_loss")} == {
            "steps": 4,
            "epochs": 2,
            "tokens": rows[-1].tokens,
            "final_train_loss": rows[-1].loss,
        }
        assert record["final_validation_loss"] is None
        assert record["peak_memory_bytes"] is None
        assert not (file.parent / "state/train").exists()

    @pytest.mark.parametrize("packing", [{}, {"packed": True, "max_seq_len": 100, "gradient_accumulation_steps": 1}])
    def test_tokens_are_counted_without_padding(
        self, make: Callable[..., Path], model: Path, packing: dict[str, Any]
    ) -> None:
        file = make(epochs=1, batch_size=1, **{"gradient_accumulation_steps": 5, **packing})
        record = run(file)
        tokenizer = ChatTokenizer(str(model))
        config = OmegaConf.load(file)
        samples = [json.loads(line) for line in Path(config.dataset.data_files).read_text().splitlines()]
        lengths = [
            len(
                tokenizer.tokenizer.apply_chat_template(
                    [{"role": "user", "content": s["input"]}, {"role": "assistant", "content": s["output"]}]
                )["input_ids"]
            )
            for s in samples
        ]
        assert record["tokens"] == sum(lengths)
        assert max(lengths) > min(lengths)

    def test_a_given_chat_template_writes_the_samples_and_stays_with_the_adapter(
        self, make: Callable[..., Path]
    ) -> None:
        file = make(epochs=1, batch_size=1, gradient_accumulation_steps=5, chat_template=GIVEN_TEMPLATE)
        record = run(file)
        assert record["tokens"] == count_tokens_as_given(Path(OmegaConf.load(file).dataset.data_files))
        adapter = file.parent / "adapter"
        assert AutoTokenizer.from_pretrained(adapter).chat_template == GIVEN_TEMPLATE
        assert record["chat_template_sha256"] == digest_file(adapter / "chat_template.jinja")

    def test_a_row_is_on_disk_before_the_next_step(self, tmp_path: Path) -> None:
        written = TrainingLog(tmp_path / "log.csv")
        written.add(Row(1, 1, 2.5, 1e-3, 10, 0.5))
        assert [row.step for row in read_log(tmp_path / "log.csv")] == [1]
        (tmp_path / "log.csv").write_text((tmp_path / "log.csv").read_text() + "2,1,2.4")
        assert [row.step for row in read_log(tmp_path / "log.csv")] == [1]

    def test_data_that_is_not_what_the_recipe_names_is_refused(self, make: Callable[..., Path]) -> None:
        file = make()
        file.write_text(f"# training data sha256: {'0' * 64}\n{file.read_text()}")
        with pytest.raises(TrainingError, match=r"train\.jsonl: has changed since .*recipe\.yaml was written"):
            run(file)


def test_a_loss_that_is_not_finite_ends_it_at_that_step(make: Callable[..., Path]) -> None:
    file = make(lr=1e30)
    with pytest.raises(TrainingError, match=r"the training diverged: the loss of step 2 is (nan|inf)"):
        run(file)
    assert not (file.parent / "adapter").exists()
    assert [row.step for row in read_log(file.parent / "state/train/training_log.csv")] == [1]


def test_what_diverged_is_not_trained_again_until_something_else_is_asked_for(make: Callable[..., Path]) -> None:
    file = make(lr=1e30)
    for _ in range(2):
        with pytest.raises(Diverged, match=r"the training diverged: the loss of step 2 is") as first:
            run(file)
    note, log_file = (file.parent / "state" / name for name in ("train.diverged.json", "train/training_log.csv"))
    assert str(first.value).endswith(f"(in an earlier attempt; to try again, remove {note})")
    log_file.unlink()
    with pytest.raises(Diverged):
        run(file)
    assert not log_file.exists()
    note.unlink()
    with pytest.raises(Diverged, match=r"a smaller lr may help$"):
        run(file)
    assert log_file.exists()
    file.write_text(file.read_text().replace("lr: 1.0e+30", "lr: 0.001"))
    assert run(file)["steps"] == 4
    assert not note.exists()


class TestValidation:
    def test_its_loss_is_transformers_mean_over_the_answers_tokens(
        self, make: Callable[..., Path], write_samples: Writer, model: Path, tmp_path: Path
    ) -> None:
        held_out = write_samples(tmp_path / "validation.jsonl", "acegikmoqsu")
        file = make(data={"validation": str(held_out)})
        record = run(file)
        rows = log(file)
        assert [row.validation_loss is not None for row in rows] == [False, True, False, True]
        assert rows[1].validation_loss != rows[3].validation_loss
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        adapter = load_file(file.parent / "adapter/adapter_model.safetensors")
        for name in [name for name in adapter if "lora_A" in name]:
            update = 2 * adapter[name.replace("lora_A", "lora_B")] @ adapter[name]  # alpha is twice the rank
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            network.get_submodule(module).weight.data += update
        tokenizer = ChatTokenizer(str(model))
        total, count = 0.0, 0
        for line in held_out.read_text().splitlines():
            sample = json.loads(line)
            messages = [{"role": "user", "content": sample["input"]}]
            prompt = tokenizer.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            messages.append({"role": "assistant", "content": sample["output"]})
            tokens = torch.tensor([tokenizer.tokenizer.apply_chat_template(messages)["input_ids"]])
            with torch.inference_mode():
                logits = network(tokens).logits[0, len(prompt) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, tokens[0, len(prompt) :], reduction="sum"))
            count += tokens.shape[1] - len(prompt)
        assert record["final_validation_loss"] == rows[3].validation_loss == pytest.approx(total / count, rel=1e-4)

    def test_it_does_not_change_what_is_trained(
        self, make: Callable[..., Path], write_samples: Writer, tmp_path: Path
    ) -> None:
        with_it = make("with", data={"validation": str(write_samples(tmp_path / "validation.jsonl", "aceg"))})
        without = make("without")
        run(with_it)
        run(without)
        assert weights(with_it) == weights(without)


class TestMetricLoggers:
    def test_tensorboard_is_told_what_stands_in_the_log(
        self, make: Callable[..., Path], write_samples: Writer, tmp_path: Path
    ) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        file = make(data={"validation": str(write_samples(tmp_path / "validation.jsonl", "aceg"))})
        folder = tmp_path / "sweep/tensorboard/point"
        folder.mkdir(parents=True)
        (folder / "events.out.tfevents.0.old").write_text("of an earlier training")
        run(file, "disk", "tensorboard")
        assert len(list(folder.iterdir())) == 1
        events = EventAccumulator(str(folder)).Reload()
        assert set(events.Tags()["tensors"]) == set(COLUMNS) - {"step"}
        for name in events.Tags()["tensors"]:
            seen = {event.step: float(event.tensor_proto.float_val[0]) for event in events.Tensors(name)}
            logged = {row.step: getattr(row, name) for row in log(file) if getattr(row, name) is not None}
            assert seen == pytest.approx(logged, rel=1e-6)

    def test_mlflow_runs_offline_in_the_results_alone(
        self, make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tracking = importlib.import_module("mlflow.tracking")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        file, home, folder = make(), tmp_path / "home", tmp_path / "sweep/mlflow/point"
        home.mkdir()
        folder.mkdir(parents=True)
        (folder / "of an earlier training").write_text("")
        command = [sys.executable, "-m", "lorasweep", "job", "train", "--recipe", file, "--metric-loggers", "mlflow"]
        environment = {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([*command, "--adapter", file.parent / "adapter"], check=True, env=environment, cwd=home)
        client = tracking.MlflowClient(tracking_uri=folder.as_uri())
        [experiment] = client.search_experiments(filter_string="name = 'sweep'")
        [made] = client.search_runs([experiment.experiment_id])
        assert (made.info.run_name, made.info.status, made.data.params["model.lora_rank"]) == ("point", "FINISHED", "8")
        for name in ("loss", "lr", "tokens", "seconds", "epoch"):
            told = [(metric.step, metric.value) for metric in client.get_metric_history(made.info.run_id, name)]
            assert told == [(row.step, getattr(row, name)) for row in log(file)]
        assert not (folder / "of an earlier training").exists()
        assert not list(home.rglob("*"))

    def test_wandb_runs_offline_in_the_results_alone(
        self, make: Callable[..., Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        file = make()
        home = tmp_path_factory.mktemp("home")
        command = [sys.executable, "-m", "lorasweep", "job", "train", "--recipe", file]
        command += ["--adapter", file.parent / "adapter"]
        environment = {"HOME": str(home), "PYTHONPATH": str(ROOT / "workflow")}
        old = tmp_path / "sweep/wandb/point/of an earlier training"
        old.mkdir(parents=True)
        working = tmp_path_factory.mktemp("working")
        subprocess.run([*command, "--metric-loggers", "wandb"], check=True, env=environment, cwd=working, umask=0o022)
        folder = tmp_path / "sweep/wandb/point"
        assert not old.exists()
        [run] = (folder / "wandb").glob("offline-run-*")
        [history] = run.glob("run-*.wandb")
        assert read_history(history) == [row.get_metrics() | {"global_step": row.step} for row in log(file)]
        assert not [path for path in (*home.rglob("*"), *working.rglob("*")) if path.is_file()]
        assert not [path for path in folder.rglob("*") if path.is_file() and not path.stat().st_mode & stat.S_IROTH]


def read_history(file: Path) -> list[dict[str, float]]:
    """What an offline run of W&B was told, by its own reader."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(file))
    told = []
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            told.append({key: value for key, value in values.items() if not key.startswith("_")})
    return told
