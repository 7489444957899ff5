"""pyproject.toml names every package, module and data file that the code needs: an installed refdpo is a whole one."""

import re
import subprocess
import tomllib
from pathlib import Path

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
