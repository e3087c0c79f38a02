"""The architecture: imports run downwards, rooms keep to themselves, importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


FORBIDDEN = {
    "probdefense.attacks": (
        "pyro",
        "probdefense.defense",
        "probdefense.defenses",
        "probdefense.programs",
        "probdefense.sites",
        "probdefense.evaluation",
    ),
    "probdefense.defenses": (
        "probdefense.attacks",
        "probdefense.losses",
        "probdefense.objectives",
        "probdefense.training",
        "probdefense.data",
    ),
    "probdefense.nn": (
        "probdefense.sites",
        "probdefense.defense",
        "probdefense.attacks",
        "probdefense.losses",
    ),
    "probdefense.types": ("probdefense.",),
    "probdefense.objectives": ("probdefense.attacks", "probdefense.defense"),
    "probdefense.training": ("probdefense.attacks", "probdefense.defense"),
    "probdefense.prediction": ("probdefense.attacks", "probdefense.defense", "probdefense.objectives"),
    "probdefense.evaluation": ("probdefense.attacks", "probdefense.defense", "probdefense.objectives"),
    "probdefense.certification": ("probdefense.attacks", "probdefense.objectives"),
    "probdefense.report": ("torch", "probdefense.attacks"),
}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_keep_to_themselves(room):
    for name, path in FILES.items():
        if name == room or name.startswith(room + "."):
            for target in imports(path):
                bad = [
                    ban
                    for ban in FORBIDDEN[room]
                    if target == ban or target.startswith(ban.rstrip(".") + ".")
                ]
                assert not bad, f"{name} imports {target}"


@pytest.mark.parametrize("name", FILES)
def test_heavy_libraries_wait_inside_functions(name):
    if name.startswith(("probdefense.numpyro", "probdefense.cli")):  # imported on request only
        return
    top = {target.partition(".")[0] for target in imports(FILES[name])}
    assert not top & set(HEAVY)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, probdefense; print([m for m in sys.argv[1:] if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_small(name):
    text = FILES[name].read_text()
    assert text.count("\n") <= 400, "the file holds two things"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert length <= 50, f"{node.name} has {length} lines"
