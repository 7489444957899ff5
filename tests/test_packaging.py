"""pyproject.toml names every package, module and data file that the code needs: an installed refdpo is a whole one."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_SHIPPED = {"benchmarks", "tests"}


def test_every_package_and_module_is_listed():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - NOT_SHIPPED
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages)
    assert sorted(SETUPTOOLS["py-modules"]) == sorted(modules)


def test_data_files_exist():
    for package, names in SETUPTOOLS["package-data"].items():
        for name in names:
            assert (ROOT / package / name).is_file(), f"{package}/{name}"


def test_constraints_pin_every_requirement_above_its_lower_bound():
    def version(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name.lower(): version(pin) for name, pin in (line.split("==") for line in lines)}
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in wanted:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
        assert pins[name] >= version(bound), requirement
