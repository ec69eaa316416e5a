"""A point's label has what differs among the points that are shown, and no two have the same."""

from typing import Any

import pandas as pd
import pytest

from lorasweep.experiment.points import SEPARATOR, format_value
from lorasweep.layout import BASELINE
from lorasweep.results.labels import LONGEST, get_differing, label_points, label_settings, shorten


def make_table(points: dict[str, dict[str, Any]]) -> pd.DataFrame:
    rows = [
        {"point": name, "setting": name, "trained_setting": leave_out_mode(name), "mode": "B1", **settings}
        | {"lora_scale": None if settings.get("mode") == "base" else 2.0}
        for name, settings in points.items()
    ]
    return pd.DataFrame(rows).convert_dtypes()


def leave_out_mode(name: str) -> str:
    return SEPARATOR.join(part for part in name.split(SEPARATOR) if not part.startswith("mode="))


def make_points(*settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {SEPARATOR.join(f"{k}={format_value(v, k)}" for k, v in sorted(s.items())): s for s in settings}


def test_a_label_names_only_the_variables_that_differ() -> None:
    points = make_points({"lora_rank": 4, "lr": 1e-4, "epochs": 2}, {"lora_rank": 4, "lr": 1e-3, "epochs": 2})
    table = make_table({BASELINE: {"mode": "base"}, **points})
    assert list(label_points(table, ["epochs", "lora_rank", "lr"]).values()) == [BASELINE, "lr=1e-4", "lr=1e-3"]


def test_runs_and_their_epochs_keep_the_names_they_were_given() -> None:
    table = make_table({"dora": {"lora_rank": 4}, "dora__epoch=1": {"lora_rank": 4}, **make_points({"lora_rank": 8})})
    assert list(label_points(table, ["lora_rank"]).values()) == ["dora", "dora, epoch=1", "lora_rank=8"]


def test_modes_are_shown_by_their_letters_and_seeds_are_no_part_of_a_setting() -> None:
    points = make_points(*({"lora_rank": r, "mode": m, "seed": 0} for r in (4, 8) for m in ("A", "B2")))
    labels = label_settings(make_table(points), ["lora_rank", "mode", "seed"])
    modes = [f"lora_rank={rank}, mode={mode}" for rank in (4, 8) for mode in ("A", "B2")]
    assert [labels[name] for name in points] == modes
    shared = dict.fromkeys(map(leave_out_mode, points))
    assert [labels[name] for name in shared] == ["lora_rank=4", "lora_rank=8"]


def test_points_that_the_variables_do_not_tell_apart_keep_their_names() -> None:
    table = make_table({"lr=1e-3__note=a": {"lr": 1e-3}, "lr=1e-3__note=b": {"lr": 1e-3}, "lr=1e-4": {"lr": 1e-4}})
    assert list(label_points(table, ["lr"]).values()) == ["lr=1e-3, note=a", "lr=1e-3, note=b", "lr=1e-4"]


def test_null_is_a_value_but_not_of_a_model_that_is_not_trained() -> None:
    table = pd.DataFrame({"prompt": ["a", None, None], "lora_rank": [8, 8, None], "lora_scale": [2.0, 2.0, None]})
    assert get_differing(table, ["prompt", "lora_rank"]) == ["prompt"]
    assert get_differing(table, ["prompt"]) == ["prompt"]
    assert get_differing(table.iloc[1:], ["prompt"]) == []


def test_existing_adapters_by_themselves_differ_by_their_models() -> None:
    table = pd.DataFrame({"model": ["a", "b"], "lora_rank": [None, None], "lora_scale": [None, None]})
    assert get_differing(table, ["model", "lora_rank"]) == ["model"]


@pytest.mark.parametrize("begin", ["", "You are a careful assistant. "])
@pytest.mark.parametrize("end", ["", " Say nothing else, whatever the question may be."])
def test_long_texts_lose_what_all_have_in_common(begin: str, end: str) -> None:
    texts = [f"{begin}{middle}{end}" for middle in ("Answer in one word.", "Think, step by step, and then answer it.")]
    short = shorten([*texts, None, "brief"], "prompt")
    assert (short["null"], short["brief"]) == ("null", "brief")
    assert len(set(short.values())) == 4
    for text in texts:
        assert len(short[text]) <= LONGEST + 2
        assert short[text].strip("…").strip() in text
        assert short[text].startswith("…") == bool(begin)
