"""Who imports whom, read from the code: data flows one way, and a room within a room is entered through its face."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]

BASE = {path.stem for path in ROOT.glob("*.py")} - {"cli"}
"""The files at the top that both phases use."""

MAY_IMPORT = {
    "store": set(),
    "base": {"store"},
    "scorer": {"store"},
    "rows": {"store", "base"},
    "demo": {"store", "base"},
    "precompute": {"store", "base", "scorer", "rows", "demo"},
    "desk": {"store", "base", "scorer", "rows", "precompute"},
    "train": {"store", "base", "scorer"},
    "slurm": {"store", "base", "precompute", "train"},
    "cli": {"store", "base", "scorer", "desk", "precompute", "train", "slurm"},
}
"""Room -> the rooms below it. Nobody looks up: train and precompute do not know each other, the store knows nobody."""

FACES = {
    "scorer": {f"precompute.scorer{module}" for module in ("", ".api", ".packing", ".adapter", ".decoder")},
    "rows": {f"precompute.rows.{module}" for module in ("options", "columns", "dataset", "source_columns")},
}
"""Room -> what the others import of it. Of the scorer: names of its choices, what needs torch, what needs numpy alone, what loads torch when
it is asked. Of the rows: all but how files are found and read."""


WITHIN = ("scorer", "rows", "desk")
"""The rooms within precompute/."""


def files() -> list[Path]:
    rooms = (".", "store", "precompute", *(f"precompute/{room}" for room in WITHIN), "train", "slurm", "demo")
    return [path for room in rooms for path in (ROOT / room).glob("*.py")]


def module_of(path: Path) -> str:
    words = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


OURS = {module_of(path) for path in files()}


def room_of(module: str) -> str:
    first, second, *_ = (*module.split("."), "")
    if first == "precompute" and second in WITHIN:
        return second
    return "base" if first in BASE else first


def imports(path: Path, late: bool = True) -> set[tuple[str, str]]:
    """(module of the project, name or ''), of each import in a file; `late`: those within functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add((inner, "") if inner in OURS else (node.module, alias.name))
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
    return {(module, name) for module, name in found if module in OURS}


def test_no_room_imports_from_one_above():
    arrows, wrong = defaultdict(int), []
    for path in files():
        room = room_of(module_of(path))
        for module, _ in imports(path):
            other = room_of(module)
            if other != room:
                arrows[room, other] += 1
                if other not in MAY_IMPORT[room]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)
    drawn = "\n".join(f"{room} -> {other}: {count}" for (room, other), count in sorted(arrows.items()))
    assert arrows["train", "scorer"] and arrows["precompute", "store"] and len(arrows) > 10, drawn


def test_a_room_is_entered_through_its_face():
    inside = [
        f"{path.relative_to(ROOT)} imports {module}: import it from {', '.join(sorted(face))}"
        for room, face in FACES.items()
        for path in files()
        if room_of(module_of(path)) != room
        for module, _ in imports(path)
        if room_of(module) == room and module not in face
    ]
    assert not inside, "\n".join(inside)


def test_private_names_stay_in_their_file():
    taken = [
        f"{path.relative_to(ROOT)}: {module}.{name}" for path in files() for module, name in imports(path) if name.startswith("_")
    ]
    assert not taken, "\n".join(taken)


def test_no_two_files_import_each_other():
    """Nor longer rings, of imports at the top of files or within functions."""
    below = {module_of(path): {module for module, _ in imports(path)} for path in files()}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(below[module]):
                walk(other, (*way, module))
            done.add(module)

    for module in sorted(below):
        walk(module, ())


def test_what_is_said_of_these_tests_is_seen(tmp_path):
    """An arrow upwards and one into the inside are found, at the top of a file and in a function."""
    file = tmp_path / "seal.py"
    file.write_text("import json\nfrom train import plan\ndef f():\n    from precompute.scorer.attention import NAME as name\n")
    assert imports(file) == {("train.plan", ""), ("precompute.scorer.attention", "NAME")}
    assert imports(file, late=False) == {("train.plan", "")}
