"""A mirror of the course, not a gate: how much of it is prose, how long its functions are, what is
tested, documented and titled.

python tools/mirror.py"""

import ast
import json
import re
from statistics import median

import docstrings
from docs import TRACKS, notebooks


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


def line(name, notebooks):
    "One line of the table, of one notebook or of several together."
    total = lambda key: sum(o[key] for o in notebooks)
    cells, sizes = total("cells"), [n for o in notebooks for n in o["sizes"]] or [0]
    return (
        f"{name:24} {cells:5} {sum(o['cells'] * o['prose'] for o in notebooks) / cells:5.0%}"
        f" {total('words') / len(notebooks):10.1f} {median(sizes):14.0f} {max(sizes):7}"
        f" {total('tests') / len(notebooks):13.1f} {total('documented'):6}/{total('public'):<4}"
        f" {total('figures'):7} {total('titled'):6} {total('kb'):6.0f}"
    )


def main():
    "Print the table: track by track, each with its sum."
    print(
        f"{'lesson':24} cells prose words/line  body: median, longest  tests/export documented"
        " figures titled     kB"
    )
    seen = []
    for track, caption in TRACKS.items():
        rows = {p.stem: look(p) for p in notebooks(track)}
        for name, row in rows.items():
            print(line(f"  {name}", [row]))
        print(line(caption.lower(), [*rows.values()]))
        seen += rows.values()
    print(line("together", seen))


if __name__ == "__main__":
    main()
