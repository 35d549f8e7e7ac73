"""The house rules: order of imports, docments, size of functions, clean notebooks without scans or
paths."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
docstrings = importlib.import_module("docstrings")
LAYERS = """
    engineering.checks engineering.extending
    engineering.configs
    engineering.devices
    engineering.augmentation engineering.files engineering.plotting engineering.phantom
    engineering.tables
    engineering.alignment
    engineering.layouts
    engineering.sources engineering.prepare
    engineering.heads engineering.cohort
    engineering.covariates engineering.cache
    data
    engineering.layers vae vqgan scheduler advanced.solvers unet
    engineering.loop engineering.runs engineering.sharing
    engineering.stage1 engineering.stage2 training
    engineering.codec sampling analysis
    advanced.volume advanced.latents advanced.factors engineering.explore advanced.prior
    advanced.evaluation advanced.fidelity advanced.audit engineering.report
    engineering.cli
"""  # lowest first; a module imports from those before it
ORDER = LAYERS.split()

MODULES = sorted(p for p in (ROOT / "brainldm").rglob("*.py") if p.stem[0] != "_")
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
CORE = [p for p in NOTEBOOKS if p.parent.name == "nbs"]


def dotted(path):
    "The name of a module inside of the package: engineering.files."
    return ".".join(path.relative_to(ROOT / "brainldm").with_suffix("").parts)


def imported(path):
    "Modules of the package that a module imports, anywhere in it."
    here = ("brainldm", *path.relative_to(ROOT / "brainldm").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (
                a.name.split(".", 1)[1] for a in node.names if a.name.startswith("brainldm.")
            )
        if isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            parts = base + (node.module.split(".") if node.module else [])
            if parts[0] == "brainldm":
                inside = ".".join(parts[1:])
                yield from (
                    [inside]
                    if inside in ORDER
                    else [".".join([*parts[1:], a.name]) for a in node.names]
                )


def test_every_module_has_its_place():
    assert sorted(map(dotted, MODULES)) == sorted(ORDER)


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_imports_point_down(module):
    assert set(imported(module)) <= set(ORDER[: ORDER.index(dotted(module))])


def test_public_names_are_where_the_face_says():
    "A name that moves to another module moves in brainldm/__init__.py too, in both of its lists."
    face = ast.parse((ROOT / "brainldm" / "__init__.py").read_text())
    table = next(n.value for n in face.body if ast.unparse(n).startswith("_MODULES ="))
    for module, names in ast.literal_eval(table).items():
        text = (ROOT / "brainldm" / (module.replace(".", "/") + ".py")).read_text()
        made = {getattr(n, "name", None) for n in ast.parse(text).body}
        made |= {ast.unparse(t) for n in ast.parse(text).body for t in getattr(n, "targets", [])}
        assert set(names.split()) <= made, f"{module}: edit brainldm/__init__.py"


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_no_tool_is_imported(module):
    text = module.read_text()
    assert not re.search(r"^\s*(from|import) (fastcore|nbdev|diffusers|monai|pytest)", text, re.M)
    assert "import *" not in text and ".cuda(" not in text and "pickle.load" not in text


def functions(module):
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def statements(function):
    "Statements inside of a function, its docstring not counted."
    inside = sum(isinstance(n, ast.stmt) for n in ast.walk(function)) - 1
    return inside - (ast.get_docstring(function) is not None)


@pytest.mark.parametrize("module", MODULES, ids=dotted)
def test_functions_are_short_and_documented(module):
    text = module.read_text()
    top = ast.parse(text).body
    public = [n for n in top if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    assert not [n.name for n in public if not ast.get_docstring(n)]
    methods = [
        (c.name, n)
        for c in public
        if isinstance(c, ast.ClassDef)
        for n in c.body
        if isinstance(n, ast.FunctionDef)
    ]
    silent = [
        f"{c}.{n.name}"
        for c, n in methods
        if n.name[:2] != "__" and n.name not in ("forward", "run") and not ast.get_docstring(n)
    ]
    assert not silent  # an empty place on an API page
    for node in functions(module):
        size = statements(node)
        assert size <= 40, f"{node.name}: {size} statements"
    comments = docstrings.Comments(text)
    for node in (n for n in public if isinstance(n, ast.FunctionDef)):
        for name, _, _, comment in docstrings.arguments(node, comments):
            assert comment, f"{node.name}({name}) has no comment"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_publish(notebook):
    doc = json.loads(notebook.read_text())
    code = [c for c in doc["cells"] if c["cell_type"] == "code"]
    words = sum(
        len("".join(c["source"]).split()) for c in doc["cells"] if c["cell_type"] == "markdown"
    )
    assert notebook.stat().st_size < 1_500_000
    assert words >= 300
    assert any(c["outputs"] for c in code)
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    text = notebook.read_text()
    assert not re.search(
        r"(?<![\w.])/(home|root|tmp|Users|work)/", text
    ), "a path of somebody's machine"


@pytest.mark.parametrize("notebook", CORE, ids=lambda p: p.stem)
def test_a_core_lesson_is_one_sitting(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    prose = sum(c["cell_type"] == "markdown" for c in cells)
    assert len(cells) <= 60 and 3 * prose >= len(cells)
