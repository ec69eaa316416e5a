"""Adapters that are trained on a quantized base: evaluated on the full one, merged or not, and on the quantized one."""

import json
from collections.abc import Callable

import pandas as pd
import pytest

from sweep import Sweep

SETTINGS = {"lora_modules": "all-linear", "epochs": 2}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_all_modes_agree_on_the_full_base_and_the_quantized_one_has_rows_of_its_own(
    make: Callable[..., Sweep], kind: str
) -> None:
    variables = {"mode": ["A", "B1", "B2"], "base": ["full", "quantized"]}
    sweep = make("quantized", variables=variables, trainer="trl", exclude=["base == 'quantized' and mode != 'B2'"])
    sweep.edit(controls=SETTINGS, model={"quantize": kind})
    sweep.run()
    table = pd.read_csv(sweep.results / "results.csv")
    assert list(zip(table["mode"], table["base"], strict=True)) == [
        ("base", "full"),
        ("A", "full"),
        ("B1", "full"),
        ("B2", "full"),
        ("B2", "quantized"),
    ]
    trained = table[table["mode"] != "base"].set_index(["mode", "base"])
    assert trained["adapter_sha256"].nunique() == 1
    full = trained.xs("full", level="base")
    for metric in [column for column in table.columns if column.endswith(("/accuracy", "probe_distance"))]:
        assert full[metric].nunique() == 1, metric
    assert (trained["probe_distance"] > 0).all()
    assert trained.loc[("B2", "quantized"), "probe_distance"] != full.loc["B2", "probe_distance"]
    manifests = {
        base: json.loads((sweep.results / f"base={base}__mode=B2/manifest.json").read_text())
        for base in ("full", "quantized")
    }
    assert manifests["full"]["training"]["quantize"] == kind
    assert [manifests[base]["evaluation"].get("quantize") for base in manifests] == [None, kind]
    assert sweep.plan() == {}
