"""The house rules: order of imports, docments, size of functions, clean notebooks without scans or paths."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = """phantom files tables data batches layers vae vqgan scheduler samplers unet loop runs sharing training diffusion
codec sampling volume analysis factors explore prior evaluation fidelity audit report cli""".split()
MODULES = sorted(p for p in (ROOT / "brainldm").glob("*.py") if p.stem[0] != "_")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if p.name[0] not in "._")


def test_every_module_has_its_place():
    assert {p.stem for p in MODULES} <= set(ORDER)


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_imports_point_down(module):
    tree = ast.parse(module.read_text())
    used = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("brainldm.")]
    used += [f".{n.module}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    names = {u.split(".")[-1] for u in used} - {""}
    assert names <= set(ORDER[: ORDER.index(module.stem)])


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_no_tool_is_imported(module):
    text = module.read_text()
    assert not re.search(r"^\s*(from|import) (fastcore|nbdev|diffusers|monai|pytest)", text, re.M)
    assert "import *" not in text and ".cuda(" not in text and "pickle.load" not in text


def functions(module):
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_functions_are_short_and_documented(module):
    lines = module.read_text().splitlines()
    top = ast.parse(module.read_text()).body
    public = [n for n in top if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    assert not [n.name for n in public if not ast.get_docstring(n)]
    methods = [(c.name, n) for c in public if isinstance(c, ast.ClassDef) for n in c.body if isinstance(n, ast.FunctionDef)]
    silent = [f"{c}.{n.name}" for c, n in methods if n.name[:2] != "__" and n.name not in ("forward", "run") and not ast.get_docstring(n)]
    assert not silent                                                          # an empty place on an API page
    for node in functions(module):
        body = node.end_lineno - node.body[0].lineno + 1
        assert body <= 40, f"{node.name}: {body} lines"
    for node in (n for n in public if isinstance(n, ast.FunctionDef)):
        for arg in node.args.args + node.args.kwonlyargs:
            assert "#" in lines[arg.end_lineno - 1] or "#" in lines[arg.lineno - 1], f"{node.name}({arg.arg}) has no comment"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_publish(notebook):
    doc = json.loads(notebook.read_text())
    code = [c for c in doc["cells"] if c["cell_type"] == "code"]
    words = sum(len("".join(c["source"]).split()) for c in doc["cells"] if c["cell_type"] == "markdown")
    assert notebook.stat().st_size < 1_500_000
    assert words >= 300
    assert any(c["outputs"] for c in code)
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    text = notebook.read_text()
    assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|work)/", text), "a path of somebody's machine"
