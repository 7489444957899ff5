"""The commands and snippets of docs/walkthrough.md and docs/extending.md: run where they can run here, parsed by the real parser
elsewhere. Links of every page lead somewhere, its lines fit a screen, and its drawings and lists of files are those of the program.

Fenced blocks: `sh run` is run in order in an empty folder, `sh cluster` and `sh setup` are not; `python` is executed; `text` after
a command
is what that command prints, up to hashes, speeds and decimals.
"""

import contextlib
import json
import re
import runpy
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from one_rank import one_rank
from settings_page import page as settings_page

import cli
from presets import PRESETS

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ("walkthrough.md", "extending.md")
MARKDOWN = sorted({*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *(ROOT / "docs").rglob("*.md")})
"""Every page; not those inside of stores and runs."""


def blocks(page: str) -> list[tuple[str, str, str]]:
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", "").splitlines()  # as a shell joins them
    return [shlex.split(line)[2:] for line in lines if line.startswith("python cli.py ")]


def normal(line: str) -> str:
    """Without hashes, speeds and decimals, which differ between machines; whole numbers count."""
    return re.sub(r"\b[0-9a-f]{12}\b|[\d,]+(?= tokens/s)|[\d,]*\.\d+", "#", line.strip())


@pytest.fixture(scope="module")
def folder(demo_model, tmp_path_factory):
    """An empty working folder with the demo's model."""
    folder = tmp_path_factory.mktemp("walkthrough")
    model = folder / "demo" / "model"
    model.parent.mkdir()
    model.symlink_to(demo_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("REFDPO_CACHE", str(folder / "cache"))
        patch.setitem(PRESETS, "demo", replace(PRESETS["demo"], model=str(model)))
        yield folder


def run(argv: list[str], folder: Path) -> str:
    argv = [word.replace("$PWD", str(folder)) for word in argv]
    with one_rank() if argv[0] == "train" else contextlib.nullcontext():
        result = CliRunner().invoke(cli.main, argv, catch_exceptions=False)
    assert result.exit_code == 0, f"python cli.py {shlex.join(argv)}\n{result.output}"
    return result.output


def test_walkthrough_runs_as_written(folder):
    output, ran = "", 0
    for kind, tag, text in blocks("walkthrough.md"):
        if (kind, tag) == ("sh", "run"):
            for argv in commands(text):
                output = run(argv, folder)
                ran += 1
        elif kind == "text":
            printed = {normal(line) for line in output.splitlines()}
            assert {normal(line) for line in text.splitlines()} <= printed, f"{text}\nis not in\n{output}"
    assert ran >= 13
    for made in (
        "runs/analyze/demo.png",
        "runs/report/demo/index.html",
        "runs/rehearsal/run.json",
        "store/copy/_manifest.json",
        "runs/export/demo-trl/dataset/state.json",
    ):
        assert (folder / made).exists(), made


def test_messages_that_the_walkthrough_explains_are_those_of_the_code():
    """Of `the policy … is not the reference of this store` each part between dots and numbers stands in the code."""
    table = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8").partition("| what you see |")[2]
    code = (
        "".join(
            file.read_text() for file in ROOT.glob("**/*.py") if file.relative_to(ROOT).parts[0] in ("precompute", "store", "train")
        )
        + (ROOT / "launch.py").read_text()
    )
    shown = re.findall(r"^\| `([^`]*)`", table, re.MULTILINE)
    parts = [part.strip() for message in shown for part in re.split(r"…|\d+", message) if len(part.strip()) > 1]
    assert len(shown) == 9 and not [part for part in parts if part not in code]


def test_snippets_run(folder):
    if not (folder / "store" / "demo" / "_manifest.json").exists():
        run(["precompute", "--dataset", "demo"], folder)
    ran = [runpy.run_path(_saved(text, folder)) for page in PAGES for kind, _, text in blocks(page) if kind == "python"]
    assert len(ran) == 2


def test_the_query_of_the_readme(folder):
    if not (folder / "store" / "demo" / "_manifest.json").exists():
        run(["precompute", "--dataset", "demo"], folder)
    typed, shown = re.search(
        r"^\$ python cli\.py (inspect .*?\")\n(┌.*?┘)$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    ).groups()
    assert [normal(line) for line in run(shlex.split(typed), folder).splitlines()] == [normal(line) for line in shown.splitlines()]


def test_what_a_store_records_of_its_making_is_in_the_store_format(folder):
    """The sample stores of the tests bring a provenance of their own; this one is precompute's."""
    if not (folder / "store" / "demo" / "_manifest.json").exists():
        run(["precompute", "--dataset", "demo"], folder)
    text = (ROOT / "docs" / "store-format.md").read_text(encoding="utf-8").partition("\n## Provenance\n")[2].partition("\n## ")[0]
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)))
    recorded = json.loads((folder / "store" / "demo" / "_manifest.json").read_text())["provenance"]
    assert {*recorded, "reused", "reuse_checked"} == {*listed}  # these two with --reuse alone


def _saved(text: str, folder: Path) -> str:
    (folder / "snippet.py").write_text(text)
    return str(folder / "snippet.py")


@pytest.mark.parametrize("page", PAGES)
def test_commands_for_elsewhere_have_options_that_exist(page):
    """Each is given to the command's own parser, which refuses unknown options, wrong values and missing required ones."""
    for kind, tag, text in blocks(page):
        assert (kind, tag) in {("sh", "run"), ("sh", "cluster"), ("sh", "setup"), ("text", ""), ("python", "")}
        for argv in commands(text) if tag == "cluster" else []:
            command = cli.main.commands[argv[0]]
            parser = command.make_parser(click.Context(command))
            given, rest, order = parser.parse_args(argv[1:])
            assert not rest and order
            missing = [each.name for each in command.params if each.required and each.name not in given]
            assert not missing, (argv, missing)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_anywhere_have_options_that_exist(page):
    """Also in lines of code that no other test runs; `…` stands for what a reader adds."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    for line in lines:
        if not (typed := re.match(r"(?: {4,}|\$ )?(python cli\.py [a-z].*)", line)) or typed[1].count('"') % 2:
            continue
        argv = shlex.split(typed[1], comments=True)[2:]
        more = {"…", "..."} & set(argv)
        words = [word for before, word in pairwise(argv) if word not in more or before.startswith("--")]
        command = cli.main.commands[argv[0]]
        given, rest, _ = command.make_parser(click.Context(command)).parse_args(words)
        missing = [each.name for each in command.params if each.required and each.name not in given]
        assert not rest and (more or "config" in given or not missing), (argv, rest, missing)


def test_examples_in_help_have_options_that_exist():
    assert cli.EXAMPLES.keys() == cli.main.commands.keys()
    for name, text in cli.EXAMPLES.items():
        found = [shlex.split(line)[2:] for line in map(str.strip, text.splitlines()) if line.startswith("python cli.py")]
        assert found, name
        for argv in found:
            assert argv[0] == name
            command = cli.main.commands[name]
            given, rest, _ = command.make_parser(click.Context(command)).parse_args(argv[1:])
            missing = [each.name for each in command.params if each.required and each.name not in given]
            assert not rest and not missing, argv


def test_the_list_of_commands_says_each_in_a_whole_sentence():
    """Click cuts what is longer than its line and puts dots there."""
    listed = CliRunner().invoke(cli.main, ["--help"], terminal_width=80).output.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == sorted(cli.main.commands)
    assert all(line.endswith(".") and not line.endswith("..") for line in listed), listed


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|^ {4}.*?$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link may name behind `#`: each heading in lower case, words joined by hyphens, as GitHub does it."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        file, _, anchor = "".join(target).partition("#")
        if "://" in file:
            continue
        found = page.parent / file if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_of_the_code_that_a_page_names_exist(page):
    named = re.findall(
        r"(?<![\w/])((?:precompute|store|train|tests|slurm|docs|benchmarks|demo)/[\w/]+\.(?:py|cpp|sbatch|sh|jsonl|jinja))\b",
        page.read_text(encoding="utf-8"),
    )
    assert not [name for name in named if not (ROOT / name).exists()]


def test_drawings_are_what_the_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))["DRAWINGS"]
    found = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert found == {name: draw().svg() for name, draw in drawn.items()}, "run python docs/pictures/draw.py"


def test_settings_page_has_every_option():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page(), "run python tests/settings_page.py"


def test_architecture_lists_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room, title in (
        ("", "At the top"),
        ("precompute", "`precompute/`,"),
        ("precompute/rows", "`precompute/rows/`,"),
        ("precompute/scorer", "`precompute/scorer/`,"),
        ("precompute/desk", "`precompute/desk/`,"),
        ("train", "`train/`,"),
    ):
        table = text.partition(f"\n{title}")[2].partition("\n\n")[2].partition("\n\n")[0]
        listed = re.findall(r"`(\w+\.(?:py|cpp))`", "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)))
        files = {file.name for kind in ("*.py", "*.cpp") for file in (ROOT / room).glob(kind)} - {"__init__.py"}
        assert sorted(listed) == sorted(files), room
    named = re.findall(r"`((?:precompute|store|train|slurm)/[\w/]+\.\w+)`", text)
    assert len(named) > 15 and all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_fit_a_screen(page):
    """100 characters, but for rows of tables and for what a command prints."""
    text = re.sub(r"^```text\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 100 and not line.startswith("|") and " " in line.strip()]
    assert not long, long


def test_each_claim_of_the_benchmarks_has_its_command_date_and_machine():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text.partition("\n## Not measured\n")[0], flags=re.MULTILINE)[1:]
    assert len(sections) > 5
    for section in sections:
        title = section.partition("\n")[0]
        assert re.search(r"\b2026-\d\d-\d\d\b", section), title
        assert re.search(r"\bmachine\s+[A-Z]\b|the machine does not matter", section, re.IGNORECASE), title
        assert "\n    python " in section or "The same runs" in section, title


def test_the_scoring_ratios_of_the_readme_are_those_of_the_benchmarks():
    def ratios(page: str, line: str) -> list[float]:
        found = re.search(rf"^\| {re.escape(line)} \|(.*)\|$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)[1]
        return [float(re.search(r"[\d.]+", cell)[0]) for cell in found.split("|")][:4]

    for theirs, ours in {
        "scoring: TRL 1.16 precompute, batch size 8 (default)": "TRL, batch size 8 (its default)",
        "scoring: TRL 1.16 precompute, its best batch size (1)": "1 (its best)",
    }.items():
        assert ratios("README.md", theirs) == [round(ratio, 1) for ratio in ratios("docs/benchmarks.md", ours)]


@pytest.mark.parametrize("index", ["docs/README.md", "docs/notebook/README.md"])
def test_each_index_lists_every_page_of_its_folder(index):
    text = (ROOT / index).read_text(encoding="utf-8")
    listed = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)}
    assert {page.name for page in (ROOT / index).parent.glob("*.md")} - {"README.md"} <= listed


def test_targets_of_make_exist():
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()) | {".venv"}
    named = {
        name
        for page in MARKDOWN
        for name in re.findall(r"(?:`|^ {4}|^)make (?:\w+=[^\s`]+ )*([a-z.][\w-]*)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test", "gpu", ".venv"} <= named <= targets, named - targets


def test_links_and_files_named_exist():
    for page in PAGES:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / "docs" / target).exists(), target
        for name in re.findall(r"`((?:precompute|store|train|tests|slurm|docs)/\w+\.\w+)`", text):
            assert (ROOT / name).exists(), name
    for page, names in {
        "extending.md": (
            "sides_of",
            "traits",
            "column_kinds",
            "refuse_unpackable",
            "head_of",
            "packed_mask",
            "LENGTH_NAME",
            "UNUSUAL",
            "LOSS_TYPES",
            "OTHER_TOKENS",
        )
    }.items():
        source = "".join(
            path.read_text()
            for part in ("precompute", "store", "train", "tests")
            for path in (ROOT / part).rglob("*.py")
            if path.name != Path(__file__).name
        )
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name in names:
            assert f"`{name}`" in text and re.search(rf"(def {name}\(|^{name}\b)", source, re.MULTILINE), name
