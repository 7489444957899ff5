"""pyproject.toml names every package, module and data file that the code needs: an installed refdpo is a whole one."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import versions
from store.errors import InputError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_SHIPPED = {"benchmarks", "tests"}


def test_every_package_and_module_is_listed():
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in [*ROOT.glob("*/__init__.py"), *ROOT.glob("*/*/__init__.py")]
        if path.relative_to(ROOT).parts[0] not in NOT_SHIPPED and not path.relative_to(ROOT).parts[0].startswith(".")
    }
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages)
    assert sorted(SETUPTOOLS["py-modules"]) == sorted(modules)


def test_data_files_exist():
    for package, names in SETUPTOOLS["package-data"].items():
        for name in names:
            assert (ROOT / package.replace(".", "/") / name).is_file(), f"{package}/{name}"


def test_constraints_pin_every_requirement_above_its_lower_bound():
    def version(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name.lower(): version(pin) for name, pin in (line.split("==") for line in lines)}
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in wanted:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
        assert pins[name] >= version(bound), requirement


def test_make_installs_the_pinned_versions_with_pip_or_uv(tmp_path):
    def commands(*words: str) -> str:
        make = ["make", "-n", f"VENV={tmp_path}/venv", f"{tmp_path}/venv", *words]
        return subprocess.run(make, check=True, cwd=ROOT, capture_output=True, text=True).stdout

    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    with_pip, with_uv = commands(), commands("UV=1", "TORCH=torch==2.11.*")
    pip, uv = f"pip install --disable-pip-version-check -c {tmp_path}/venv/constraints.txt", "uv pip install --python"
    assert with_pip.count(pip) == 2 and f"'{pinned}'" in with_pip and "uv " not in with_pip
    assert with_uv.count(uv) == 2 and with_uv.count("'torch==2.11.*'") == 2 and pip not in with_uv and pinned not in with_uv


def test_newest_versions_are_those_that_nothing_pins(tmp_path):
    make = ["make", "-n", "test-newest", f"NEWEST={tmp_path}/venv"]
    install, run = subprocess.run(make, check=True, cwd=ROOT, capture_output=True, text=True).stdout.split("/.installed")
    for name in ("torch", "transformers"):
        assert install.count(f" '{name}'") == 2 and f"^{name}==" in install and f"'{name}==" not in install
    for name in ("scoring", "attention_cuda", "kernels", "self_test", "packing", "train_packed", "train_gate", "store_reader"):
        assert f"tests/test_{name}.py" in run


@pytest.mark.parametrize(
    ("name", "found", "required"), [("trl", "1.15.0", "trl>=1.16"), ("transformers", "5.22.2", "transformers>=5.23")]
)
def test_an_older_package_is_refused_before_it_is_imported(tmp_path, name, found, required):
    metadata = tmp_path / f"{name}-{found}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
    words = [sys.executable, "cli.py", "analyze", "--dataset", "demo"]
    done = subprocess.run(words, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": tmp_path}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(each in done.stderr for each in (f"Error: {name}: the package is too old", found, f'uv pip install "{required}"'))


def test_a_missing_package_is_refused_and_a_containers_build_is_not(monkeypatch):
    installed = dict.fromkeys((Requirement(each).name for each in PROJECT["project"]["dependencies"]), "9999.1")
    monkeypatch.setattr(versions, "version", lambda name: installed[name])
    for build in ("2.11.0a0+1a2b3c.nv26.1", "2.11.0+cu128", "2.13.0.dev20261126", "2.11.0-custom-build"):
        installed["torch"] = build
        versions.refuse_old_packages()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    with pytest.raises(InputError, match="the package is missing"):
        versions.refuse_old_packages()
