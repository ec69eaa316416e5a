"""What installs the environments: uv does what pip is told, in the clone; and the package is found wherever it lies."""

import importlib.util
import os
import sys
from email import message_from_string
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make_venv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / "scripts/make_venv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pip_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing but what a test says: the configuration file is returned."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    return tmp_path / "pip.conf"


def pair(options: list[str]) -> set[tuple[str, str]]:
    return {(option, value) for option, value in pairwise(options) if option.startswith("--")}


def test_uv_is_told_what_pip_is_told(make_venv: ModuleType, pip_is_told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_is_told.write_text(
        "[global]\nindex-url = https://index.example/simple\nextra-index-url = https://one.example\n  https://two.example\n"
        "find-links = /wheels\ncert = /ca.pem\nno-index = false\n[install]\nconstraint = /limits.txt\n"
    )
    options = pair(make_venv.list_uv_options(make_venv.read_pip_settings(sys.executable)))
    assert {
        ("--default-index", "https://index.example/simple"),
        ("--index", "https://one.example"),
        ("--index", "https://two.example"),
        ("--find-links", "/wheels"),
        ("--constraints", "/limits.txt"),
        ("--index-strategy", "unsafe-best-match"),
    } <= options
    assert make_venv.make_uv_environment(make_venv.read_pip_settings(sys.executable))["SSL_CERT_FILE"] == "/ca.pem"
    # A variable takes the place of what the file says.
    monkeypatch.setenv("PIP_FIND_LINKS", "/more /others")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    options = pair(make_venv.list_uv_options(make_venv.read_pip_settings(sys.executable)))
    assert {value for option, value in options if option == "--find-links"} == {"/more", "/others"}
    assert "--no-index" in make_venv.list_uv_options(make_venv.read_pip_settings(sys.executable))


def test_the_cache_lies_in_the_clone_unless_uv_is_told_otherwise(
    make_venv: ModuleType, pip_is_told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_venv.make_uv_environment(make_venv.read_pip_settings(sys.executable))["UV_CACHE_DIR"] == str(
        ROOT / ".venv/uv-cache"
    )
    monkeypatch.setenv("UV_CACHE_DIR", "/elsewhere")
    assert make_venv.make_uv_environment(make_venv.read_pip_settings(sys.executable))["UV_CACHE_DIR"] == "/elsewhere"


def test_the_package_is_found_by_a_path_without_the_clones(make_venv: ModuleType, tmp_path: Path) -> None:
    packages = tmp_path / "ä blank/.venv/driver/lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    file = packages / "__editable__.lorasweep-0.1.0.pth"
    file.write_text(str(tmp_path / "ä blank/workflow"), encoding="utf-8")
    for _ in range(2):
        make_venv.name_relatively(tmp_path / "ä blank/.venv/driver")
        assert file.read_text(encoding="ascii") == "../../../../../workflow"


@pytest.mark.parametrize("python", ["3.11.2", "3.12.3", "3.13.5"], ids=["Debian 12", "Ubuntu 24.04", "Debian 13"])
@pytest.mark.parametrize("stage", ["driver", "train", "eval"])
def test_every_pinned_package_is_for_the_pythons_of_the_systems_that_the_readme_names(stage: str, python: str) -> None:
    found = list((ROOT / f".venv/{stage}").glob("lib/python3.*/site-packages/*.dist-info/METADATA"))
    assert len(found) > 50
    asked = {file.parent.name: message_from_string(file.read_text("utf-8"))["Requires-Python"] for file in found}
    assert not {name: asks for name, asks in asked.items() if asks and not SpecifierSet(asks).contains(python)}
