"""A mirror of the course, not a gate: how much of it is prose, how long its functions are, what is
tested, documented and titled.

python tools/mirror.py"""

import ast
import json
import re
from pathlib import Path
from statistics import median

import docstrings

ROOT = Path(__file__).parents[1]


def source(cell):
    return "".join(cell["source"])


def body_lines(node):
    "Lines of a function without signature and docstring."
    first = node.body[1:] or node.body if ast.get_docstring(node) is not None else node.body
    return node.end_lineno - first[0].lineno + 1


def is_documented(node, comments):
    "Whether a public function or class has a docstring, and each of its arguments a comment."
    if isinstance(node, ast.ClassDef):
        return bool(ast.get_docstring(node))
    said = [comment for _, _, _, comment in docstrings.arguments(node, comments)]
    return bool(ast.get_docstring(node)) and all(said)


def has_words(cells, at):
    "Whether a figure has a title of its own, or prose right before it that claims something."
    return (
        bool(re.search(r"title|suptitle|show_|plot_", source(cells[at])))
        or cells[max(at - 1, 0)]["cell_type"] == "markdown"
    )


def look(path):
    "The numbers of one notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    exports = [
        c
        for c in code
        if re.search(r"^#\|\s*exports?\b", source(c), re.M)
        and re.search(r"^(def|class) ", source(c), re.M)
    ]
    tests = [
        c
        for c in code
        if re.search(r"\b(assert\w*|test_\w+|expect_fail)\b", source(c)) and c not in exports
    ]
    words = sum(len(source(c).split()) for c in cells if c["cell_type"] == "markdown")
    figures = [
        i
        for i, c in enumerate(cells)
        for o in c.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    text = "\n".join(source(c) for c in exports)
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    public = [
        n
        for n in ast.parse(text).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"
    ]
    return dict(
        cells=len(cells),
        prose=1 - len(code) / len(cells),
        words=words / max(1, sum(source(c).count("\n") + 1 for c in code)),
        sizes=[body_lines(n) for n in nodes],
        tests=len(tests) / max(1, len(exports)),
        documented=sum(is_documented(n, docstrings.Comments(text)) for n in public),
        public=len(public),
        figures=len(figures),
        titled=sum(has_words(cells, i) for i in figures),
        kb=path.stat().st_size / 1000,
    )


def main():
    "Print the table."
    rows = {
        p.stem: look(p)
        for p in sorted(
            p for p in (ROOT / "nbs").rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts
        )
    }
    print(
        f"{'lesson':15} cells prose words/line  body: median, longest  tests/export documented"
        " figures titled    kB"
    )
    for name, o in rows.items():
        print(
            f"{name:15} {o['cells']:5} {o['prose']:5.0%} {o['words']:10.1f}"
            f" {median(o['sizes'] or [0]):14.0f} {max(o['sizes'] or [0]):7} {o['tests']:13.1f}"
            f" {o['documented']:6}/{o['public']:<3} {o['figures']:7} {o['titled']:6} {o['kb']:5.0f}"
        )
    sizes = [n for o in rows.values() for n in o["sizes"]]
    total = {
        k: sum(o[k] for o in rows.values())
        for k in ("cells", "documented", "public", "figures", "titled")
    }
    print(
        f"{'together':15} {total['cells']:5}"
        f" {sum(o['cells'] * o['prose'] for o in rows.values()) / total['cells']:5.0%} {'':10}"
        f" {median(sizes):14.0f} {max(sizes):7} {'':13}"
        f" {total['documented']:6}/{total['public']:<3} {total['figures']:7} {total['titled']:6}"
    )


if __name__ == "__main__":
    main()
