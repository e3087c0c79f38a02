"""The architecture: imports run downwards, rooms keep to themselves, importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import probdefense

PACKAGE = Path(__file__).parent.parent / "probdefense"
HEAVY = ("arviz", "numpyro", "jax", "matplotlib", "torchvision", "sklearn", "rich", "typer", "jinja2")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Everything that a file imports at its top level, as full names."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
GRAPH = {
    name: {target for target in imports(path) if target in FILES and target != name}
    for name, path in FILES.items()
    if path.name != "__init__.py"
}


def test_imports_form_no_circle():
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import circle: {' -> '.join((*trail, name))}"
        if name in done:
            return
        for target in GRAPH.get(name, ()):
            visit(target, (*trail, name))
        done.add(name)

    for name in GRAPH:
        visit(name, ())


GROUND = ("types", "validation", "rng", "ops", "progress", "tables", "files", "processes")
ROOMS = (
    *GROUND,
    "logits",
    "nn",
    "core",
    "defenses",
    "objectives",
    "training",
    "prediction",
    "attacks",
    "evaluation",
    "checks",
    "adaptation",
    "numpyro",
    "analysis",
    "data",
    "models",
    "study",
)
"""The pipeline: a room imports only rooms before it."""

STRANGERS = {
    "logits": ("pyro", "probdefense.nn"),
    "attacks": ("pyro", *(f"probdefense.{room}" for room in ROOMS[ROOMS.index("nn") :] if room != "attacks")),
    "objectives": ("probdefense.core", "probdefense.defenses"),
    "training": ("probdefense.core", "probdefense.defenses"),
    "prediction": ("probdefense.core", "probdefense.objectives"),
    "evaluation": ("probdefense.core", "probdefense.objectives", "probdefense.attacks"),
    "evaluation.report": ("torch",),
}
"""What a room may not import although it comes before it."""


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name and name != "probdefense.__main__" else ""


def every_import(path: Path) -> set[str]:
    """Everything of ours that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("probdefense.")}


def test_every_file_stands_in_a_room():
    assert {room_of(name) for name in FILES} - {""} == set(ROOMS)


@pytest.mark.parametrize("name", [name for name in FILES if room_of(name)])
def test_a_room_imports_only_rooms_before_it(name):
    here = ROOMS.index(room_of(name))
    for target in every_import(FILES[name]):
        if room_of(target) in ROOMS:
            assert ROOMS.index(room_of(target)) <= here, f"{name} imports {target}"


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_keep_to_themselves(room):
    for name, path in FILES.items():
        if f"{name}.".startswith(f"probdefense.{room}."):
            for target in imports(path) | every_import(path):
                bad = [ban for ban in STRANGERS[room] if f"{target}.".startswith(f"{ban}.")]
                assert not bad, f"{name} imports {target}"


def test_a_climb_is_found(tmp_path):
    climbing = tmp_path / "pgd.py"
    climbing.write_text("def pgd():\n    from probdefense.core import Defense\n")
    (target,) = every_import(climbing)
    assert ROOMS.index(room_of(target)) < ROOMS.index("attacks")
    assert any(f"{target}.".startswith(f"{ban}.") for ban in STRANGERS["attacks"])


@pytest.mark.parametrize("name", FILES)
def test_heavy_libraries_wait_inside_functions(name):
    if name.startswith(("probdefense.numpyro", "probdefense.study.cli")):  # imported on request only
        return
    top = {target.partition(".")[0] for target in imports(FILES[name])}
    assert not top & set(HEAVY)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, probdefense; probdefense.evaluate; print([m for m in sys.argv[1:] if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_public_name_has_one_home():
    assert {*probdefense.__all__} == {*probdefense.HOMES} | {*probdefense.ROOMS} & {*probdefense.__all__}
    assert {*probdefense.ROOMS} == {*ROOMS} - {*GROUND}
    for name in probdefense.__all__:
        assert getattr(probdefense, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        probdefense.absent  # noqa: B018


def test_load_alone_knows_the_builders():
    code = (
        "import sys, probdefense as pd; pd.load; from probdefense.core.registry import BUILDERS; "
        "assert 'rse' in BUILDERS"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_small(name):
    text = FILES[name].read_text()
    assert text.count("\n") <= 400, "the file holds two things"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert length <= 50, f"{node.name} has {length} lines"
