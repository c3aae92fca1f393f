"""The doctor: its list of packages is the project's, and it finds what is planted."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from pocketsize.measurement import doctor
from pocketsize.measurement.doctor import CORE, EXTRAS, diagnose, import_faults
from pocketsize.models import device

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_packages_and_extras_are_those_of_the_project() -> None:
    assert sorted(CORE) == sorted(PROJECT["dependencies"])
    assert sorted(EXTRAS) == sorted(PROJECT["optional-dependencies"])
    for name, wanted in PROJECT["optional-dependencies"].items():
        names = {line.split(">=")[0].split("[")[0] for line in wanted}
        assert EXTRAS[name].modules.keys() & names, name


def test_every_import_at_the_top_of_a_file_is_in_the_base_install() -> None:
    brought = {*CORE.values(), *sys.stdlib_module_names, "pocketsize", "markupsafe"}
    apart = ROOT / "src" / "pocketsize" / "quantization" / "gpu.py"  # imported where a matrix is on a GPU
    for path in {*(ROOT / "src").rglob("*.py")} - {apart}:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= brought, path


def test_faults_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sound_m.py").write_text("print('noise')\n")
    (tmp_path / "raises_m.py").write_text("raise OSError('no libfoo')\n")
    (tmp_path / "dies_m.py").write_text("import os\nos.kill(os.getpid(), 4)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    faults = import_faults(["raises_m", "dies_m", "absent_m", "sound_m"])
    assert faults["sound_m"] is None and faults["absent_m"] == "not installed"
    assert faults["raises_m"] == "OSError: no libfoo"
    assert "importing it ends Python (exit code -4)" in str(faults["dies_m"])


def sound(modules: list[str]) -> dict[str, str | None]:
    return dict.fromkeys(modules)


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packages that import, memory enough, a cache that can be written."""
    monkeypatch.setattr(doctor, "import_faults", sound)
    monkeypatch.setattr(doctor, "available_bytes", lambda: 10**10)
    monkeypatch.setattr(doctor, "DISK_BYTES", 1)
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("healthy")
def test_a_healthy_machine_is_ready(tmp_path: Path) -> None:
    found = diagnose(tmp_path / "not" / "there" / "yet")
    assert not found.missing and all(part.mend == "" for part in found.parts if part.ok)
    assert set(found.instruction_sets) == {"avx2", "avx512", "bf16", "vnni", "amx"}
    assert found.facts["cores"] and found.facts["torch"] and found.facts["memory_available_bytes"] == 10**10


@pytest.mark.usefixtures("healthy")
def test_what_multiplies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketsize.models.products.is_quicker", lambda: True)
    monkeypatch.setattr("pocketsize.models.dtype.forward_dtype", lambda: torch.bfloat16)
    assert (
        diagnose(tmp_path).facts["products"] == "bfloat16 in blocks; float32 by oneDNN, quicker here than MKL"
    )
    monkeypatch.setattr("pocketsize.models.products.is_quicker", lambda: False)
    assert diagnose(tmp_path).facts["products"] == "bfloat16 in blocks"


@pytest.mark.usefixtures("healthy")
def test_a_device_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETSIZE_DEVICE", "cuda:99")
    found = diagnose(tmp_path)
    assert [(one.name, one.mend) for one in found.missing] == [("device", "unset POCKETSIZE_DEVICE")]
    assert found.missing[0].found.startswith("POCKETSIZE_DEVICE: cuda:99 is not there")
    assert found.facts["products"] is None and doctor.VARIABLE == device.VARIABLE


@pytest.mark.usefixtures("healthy")
def test_a_package_that_is_there_but_broken_is_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {"xllamacpp": "ImportError: no libfoo", "llama_cpp": doctor.ABSENT}
    monkeypatch.setattr(doctor, "import_faults", lambda names: dict.fromkeys(names) | faults)
    (part,) = (one for one in diagnose(tmp_path).parts if one.name == "extra llamacpp")
    assert not part.ok and part.mend == "python -m pip install --force-reinstall xllamacpp"


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(
    ("module", "part", "mend"),
    [
        ("torch", "torch", "python -m pip install --upgrade 'torch>=2.9'"),
        ("yaml", "pyyaml", "python -m pip install --upgrade 'pyyaml>=6.0'"),
    ],
)
def test_a_missing_package_is_needed_and_can_be_mended(
    module: str, part: str, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "import_faults", lambda names: sound(names) | {module: "not installed"})
    (missing,) = diagnose(tmp_path).missing
    assert (missing.name, missing.found, missing.mend) == (part, "not installed", mend)


@pytest.mark.usefixtures("healthy")
def test_a_missing_extra_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"xllamacpp": "not installed", "llama_cpp": "not installed", "beartype": "broken"}
    monkeypatch.setattr(doctor, "import_faults", lambda names: sound(names) | lacking)
    found = diagnose(tmp_path)
    absent = {part.name: part.mend for part in found.parts if not part.ok}
    assert not found.missing and absent == {
        "extra llamacpp": "python -m pip install 'pocketsize[llamacpp]'",
        "extra dev": "python -m pip install --force-reinstall beartype",
    }


@pytest.mark.usefixtures("healthy")
def test_either_package_of_an_extra_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "import_faults", lambda names: sound(names) | {"xllamacpp": "broken"})
    assert all(part.ok for part in diagnose(tmp_path).parts)


@pytest.mark.usefixtures("healthy")
def test_little_memory_little_disk_and_an_old_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "available_bytes", lambda: 10**8)
    monkeypatch.setattr(doctor, "DISK_BYTES", 10**18)
    monkeypatch.setattr(doctor, "_version", lambda name: "2.8.1+cpu" if name == "torch" else "99.0rc1")
    missing = {part.name: part for part in diagnose(tmp_path).missing}
    assert list(missing) == ["torch", "memory", "disk for output", "disk for cache"]
    assert missing["torch"].found == "2.8.1+cpu is older than 2.9"
    assert "0.1 GB available" in missing["memory"].found
    assert "-o" in missing["disk for output"].mend and "POCKETSIZE_CACHE" in missing["disk for cache"].mend


@pytest.mark.usefixtures("healthy")
def test_an_output_that_is_a_file_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (missing,) = diagnose(tmp_path / "file" / "out").missing
    assert missing.name == "disk for output" and f"{tmp_path / 'file'} cannot be written to" in missing.found
