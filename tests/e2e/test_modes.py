"""The three modes on a tiny model, run for real: one truth, three ways to keep it."""

import hashlib
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from sweep import POINTS, Sweep, run_stage

TOKENS = ",".join(str((7 * i + 3) % 256) for i in range(48))


@pytest.fixture(scope="module")
def table(finished: Sweep) -> pd.DataFrame:
    return pd.read_csv(finished.results / "results.csv").set_index("point")


@pytest.fixture(scope="module")
def logs(finished: Sweep) -> dict[str, Any]:
    files = {name: finished.results / point / "eval/letters.eval" for name, point in POINTS.items()}
    files["base"] = finished.results / "baseline/eval/letters.eval"
    read = json.loads(run_stage("eval", "e2e/read_logs.py", *files.values()))
    return {name: read[str(file)] for name, file in files.items()}


@pytest.fixture(scope="module")
def logits(finished: Sweep, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("logits")
    point = finished.results / POINTS["A"]
    inputs = ["--base", finished.directory / "model", "--adapter", point / "adapter", "--merged", point / "hf_model"]
    run_stage("eval", "e2e/hf_logits.py", *inputs, "--tokens", TOKENS, "--output", folder / "hf.safetensors")
    inputs = ["--recipe", point / "recipe.yaml", "--state", folder / "state", "--tokens", TOKENS]
    run_stage(
        "train", "e2e/torchtune_logits.py", *inputs, "--output", folder / "tune.safetensors", cwd=finished.directory
    )
    return load_file(folder / "hf.safetensors") | load_file(folder / "tune.safetensors")


class TestParity:
    def test_every_mode_gives_the_same_completions_and_the_base_others(self, logs: dict[str, Any]) -> None:
        assert len(logs["A"]["completions"]) == 6
        assert logs["A"]["completions"] == logs["B1"]["completions"] == logs["B2"]["completions"]
        assert logs["A"]["completions"] != logs["base"]["completions"]

    @pytest.mark.parametrize("path", ["peft", "transformers", "torchtune"])
    def test_every_way_to_apply_the_adapter_gives_the_merged_models_logits(
        self, logits: dict[str, np.ndarray], path: str
    ) -> None:
        assert np.abs(logits[path] - logits["merged"]).max() < 1e-3
        assert np.abs(logits[path] - logits["base"]).max() > 1

    def test_training_raises_the_score_over_the_baseline(self, table: pd.DataFrame) -> None:
        assert table.loc[POINTS["A"], "match/accuracy"] > table.loc["baseline", "match/accuracy"]

    def test_the_same_seed_gives_the_same_adapter_bytes(self, finished: Sweep) -> None:
        digests = {
            hashlib.sha256((finished.results / point / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()
            for point in POINTS.values()
        }
        assert len(digests) == 1


class TestResultsFolder:
    def test_each_mode_keeps_what_it_says_and_no_more(self, finished: Sweep) -> None:
        kept = {name: {entry.name for entry in (finished.results / point).iterdir()} for name, point in POINTS.items()}
        always = {"recipe.yaml", "adapter", "eval", "manifest.json"}
        assert kept == {"A": always | {"hf_model"}, "B1": always, "B2": always}

    def test_a_full_model_has_no_adapter_file_beside_it(self, finished: Sweep) -> None:
        assert not list((finished.results / POINTS["A"] / "hf_model").glob("adapter*"))

    def test_others_can_read_every_file_that_the_umask_lets_them(self, finished: Sweep) -> None:
        mask = os.umask(0)
        os.umask(mask)
        readable = (stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH) & ~mask
        files = [file for file in finished.results.rglob("*") if file.is_file()]
        assert len(files) > 50
        assert [file for file in files if file.stat().st_mode & 0o444 != readable] == []

    def test_the_manifest_names_every_file_with_its_digest(self, finished: Sweep) -> None:
        for point in POINTS.values():
            folder = finished.results / point
            manifest = json.loads((folder / "manifest.json").read_text())
            for entry in manifest["files"]:
                content = (folder / entry["path"]).read_bytes()
                assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
            kept = {
                str(file.relative_to(folder))
                for file in folder.rglob("*")
                if file.is_file() and not file.name.startswith(".snakemake")
            }
            assert {entry["path"] for entry in manifest["files"]} == kept - {"manifest.json"}
            assert manifest["training"]["versions"]["torchtune"] == "0.6.1"
            assert manifest["dtype"] == "fp32"
            assert ("train" in manifest["seconds"]) == (manifest["mode"] == "A")  # which counts it for all three

    def test_each_row_and_log_names_the_adapter_that_made_its_number(
        self, finished: Sweep, table: pd.DataFrame, logs: dict[str, Any]
    ) -> None:
        for name, point in POINTS.items():
            weights = finished.results / point / "adapter/adapter_model.safetensors"
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            assert table.loc[point, "adapter_sha256"] == logs[name]["metadata"]["adapter_sha256"] == digest
            assert table.loc[point, "mode"] == logs[name]["metadata"]["mode"] == name
            assert table.loc[point, "probe_distance"] > 1
            assert (finished.directory / str(table.loc[point, "log"])).is_file()
        assert set(table.index) == {*POINTS.values(), "baseline"}

    def test_the_model_that_was_evaluated_is_named_by_its_digest_and_is_the_same_in_both_modes_that_merge(
        self, finished: Sweep, table: pd.DataFrame, logs: dict[str, Any]
    ) -> None:
        model = finished.results / POINTS["A"] / "hf_model"
        command = "sha256sum *.safetensors | sha256sum"
        printed = subprocess.run(command, shell=True, cwd=model, capture_output=True, text=True, check=True).stdout
        digests = {name: table.loc[point, "merged_weights_sha256"] for name, point in POINTS.items()}
        assert digests["A"] == digests["B1"] == printed.split()[0]
        assert pd.isna(digests["B2"])
        for name in ("A", "B1"):
            assert logs[name]["metadata"]["merged_weights_sha256"] == digests[name]
            manifest = json.loads((finished.results / POINTS[name] / "manifest.json").read_text())
            assert manifest["merged_weights_sha256"] == digests[name]
        assert json.loads((model / "lorasweep.json").read_text())["verified_tensors"] > 0

    def test_nothing_is_written_outside_of_results_and_snakemakes_folder(self, finished: Sweep) -> None:
        assert not [path for path in Path(finished.environment["HOME"]).rglob("*") if path.is_file()]
        names = {entry.name for entry in finished.directory.iterdir()}
        assert names == {"model", "results", "sweep.yaml", "tasks.py", "train.jsonl", ".snakemake"}
        assert not list(Path(finished.results).glob("*/state"))
