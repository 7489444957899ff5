"""docs/store-format.md is a promise to other tools: what it lists is what there is, and its queries run."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from store_samples import make_store, memory_folder

import store
from store import shard
from store.manifest import MANIFEST, Identity, ShardFile, ShardReport, Unscorable
from store.reader import open_store
from store.schema import SCHEMA
from store.sql import connect, run

ROOT = Path(store.__file__).parents[1]
TEXT = (ROOT / "docs" / "store-format.md").read_text()


@pytest.fixture
def path():
    for folder in memory_folder():
        make_store(folder / "think", num_rows=30, unscorable=(4,))
        yield folder / "think"


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows_of_table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]


def names(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def test_columns():
    documented = [(names(row[0])[0], row[1].strip("`")) for row in rows_of_table(section("Columns"))]
    assert documented == [(field.name, str(field.type).replace("item: ", "")) for field in SCHEMA]


def test_identity():
    documented = [name for row in rows_of_table(section("Identity")) for name in names(row[0])]
    assert sorted(documented) == sorted(field.name for field in dataclasses.fields(Identity))


def test_manifest(path):
    rows = [row for row in rows_of_table(section("_manifest.json")) if "or absent" not in row[1]]
    assert sorted(name for row in rows for name in names(row[0])) == sorted(json.loads((path / MANIFEST).read_text()))
    documented = {row[0].strip("`"): names(row[1]) for row in rows}
    assert documented["shards"] == [field.name for field in dataclasses.fields(ShardFile)]
    assert documented["unscorable"] == [field.name for field in dataclasses.fields(Unscorable)]


def test_footer_keys():
    rows = rows_of_table(section("Footer keys"))
    keys = [shard.FORMAT_KEY, shard.IDENTITY_KEY, shard.REPORT_KEY]
    assert [row[0].strip("`") for row in rows] == [key.decode() for key in keys]
    assert sorted(names(rows[2][1])) == sorted(field.name for field in dataclasses.fields(ShardReport))


def test_views(path):
    for view in ("completions", "tokens", "texts"):
        line = re.search(rf"- `{view}`: (.*?)\n(?=- |\n)", section("SQL"), re.DOTALL)[1]
        columns = [row[0] for row in connect(path, decode=str).execute(f"describe {view}").fetchall()]
        assert names(line) == columns


def test_queries_run(path):
    queries = re.search(r"```sql\n(.*?)```", section("SQL"), re.DOTALL)[1]
    statements = [query for query in queries.split(";") if query.strip()]
    assert len(statements) == 5
    for query in statements:
        assert json.loads(run(connect(path, decode=str), query, "json"))


def test_other_tools_read_it(path):
    """The lines of code shown, for those of the tools that are installed here."""
    block = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1].replace("store/think", str(path))
    ran = 0
    for line in block.splitlines():
        setup, expression = (part.strip() for part in line.split(";"))
        scope: dict = {}
        try:
            exec(setup, scope)  # noqa: S102 (the documentation's own line)
        except ImportError:
            continue
        if "datasets" in setup:
            continue  # writes a cache into the home folder
        found = eval(expression, scope)
        assert found is not None and (not hasattr(found, "count_rows") or found.count_rows() == 29)
        ran += 1
    assert ran


def test_a_store_is_read_as_a_folder(path):
    """As the README's table promises: no file in it is taken for a Parquet file that is none."""
    import pandas
    import pyarrow.parquet as pq

    expected = open_store(path).read(range(29)).to_pylist()
    assert pq.read_table(path).to_pylist() == expected
    frame = pandas.read_parquet(path)
    assert frame["row"].tolist() == [pair["row"] for pair in expected]
    assert [values.tolist() for values in frame["chosen_token_logps"]] == [pair["chosen_token_logps"] for pair in expected]


def test_sha256sum_reads_the_manifest(path):
    program = re.search(r'python -c "(.*?)" \| sha256sum', TEXT.replace("\\\n", ""))[1]
    listed = subprocess.run([sys.executable, "-c", program], cwd=path, capture_output=True, text=True, check=True).stdout
    checked = subprocess.run(["sha256sum", "--check"], cwd=path, input=listed, capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == 8


def test_readme_lists_every_file():
    readme = (ROOT / "store" / "README.md").read_text()
    listed = {f"{name}.py" for name in re.findall(r"^\| `(\w+)\.py`", readme, re.MULTILINE)}
    assert listed == {file.name for file in (ROOT / "store").glob("*.py")} - {"__init__.py"}


DOES_MORE = {"sql", "summary", "report", "report_page", "report_pictures", "export", "remote"}
"""May import duckdb, jinja2, matplotlib, numpy, fsspec and huggingface_hub, and more inside a function."""


def test_store_imports_nothing_of_ours_and_nothing_heavy():
    """The core needs the standard library and pyarrow, wherever the import stands; nothing needs a model to be imported."""
    core = {*sys.stdlib_module_names, "store", "pyarrow"}
    for file in (ROOT / "store").glob("*.py"):
        tree = ast.parse(file.read_text())
        nodes = tree.body if file.stem in DOES_MORE else list(ast.walk(tree))
        modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        imported = {module.partition(".")[0] for module in modules}
        more = {"duckdb", "jinja2", "matplotlib", "numpy", "fsspec", "huggingface_hub"}
        assert imported <= core | (more if file.stem in DOES_MORE else set()), file.name
