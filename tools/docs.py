"""Write the documentation site: lessons with their stored outputs, API pages, a map of the
modules. Needs no network.

python tools/docs.py             _site/src, then Sphinx: _site/html/index.html
python tools/docs.py FOLDER      the same in another folder

The sources of the site are README.md, docs/, nbs/ and brainldm/; nothing is kept twice.
Everything but the last step, Sphinx, is this file and the standard library, so that a test can
look at it without Sphinx."""

import ast
import html
import io
import json
import re
import shutil
import sys
import tokenize
from pathlib import Path

import docstrings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "brainldm"
# folder in nbs and brainldm, and caption, in the order of reading
TRACKS = {"": "Core", "advanced": "Advanced", "engineering": "Engineering"}
# copied to where their links expect each other
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/benchmarks/README.md")


# Lessons


def plain(text):
    "Markdown as a voice would read it: no marks, links, formulas or code fences."
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<[^>]*>", " ", text, flags=re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[*`$]|^[#>|\s]+|\\(?=[a-z])", "", text, flags=re.M).split())


def written(node):
    "The text of a string in code; of an f-string the part that does not depend on numbers."
    if isinstance(node, ast.JoinedStr):
        start = node.values[0].value if isinstance(node.values[0], ast.Constant) else ""
        return re.split(r"[:(,]", start)[0].strip() if len(start) > 12 else ""
    return (
        node.value.strip() if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    )


def titles(code):
    """Titles that a cell gives to its figures, where they are written out: of whole figures, else
    of single panels."""
    try:
        tree = ast.parse(re.sub(r"^\s*[!%].*$", "pass", code, flags=re.M))
    except SyntaxError:
        return []
    figures, panels = [], []
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name, named = getattr(call.func, "attr", getattr(call.func, "id", "")), [
            k.value for k in call.keywords if k.arg == "title"
        ]
        # show_planes(brains, names, 2., 'The claim')
        if name == "suptitle" or re.match("(show|plot)_", name):
            figures += named + [o for o in call.args if name == "suptitle" or " " in written(o)]
        elif name in ("set_title", "set"):
            panels += named + call.args[:1]
        elif name != "dict":
            figures += named
    return [t for t in map(written, figures) if t] or [t for t in map(written, panels) if t]


def claim(markdown):
    """The sentence of a prose cell that says something about the figure below it: the last bold
    one, else the last one."""
    paragraphs = [p for p in re.split(r"\n\s*\n", markdown) if plain(p)]
    bold = [plain(b) for p in paragraphs for b in re.findall(r"\*\*([^*]+)\*\*", p)]
    last = plain(paragraphs[-1]) if paragraphs else ""
    return ([b for b in bold if len(b) > 20] or [re.split(r"(?<=[.?!])\s+", last)[-1].rstrip(":")])[
        -1
    ]


def alt_text(code, before):
    """What a figure shows, for whoever cannot see it: its title, else the claim that stands before
    it."""
    return "; ".join(titles(code)) or claim(before) or "Figure drawn by the code above"


def shown_output(output):
    """An output without what needs a kernel, and without the passed states of a progress bar; None
    if nothing is left."""
    data = {k: v for k, v in output.get("data", {}).items() if "widget" not in k}
    if "data" in output:
        return dict(output, data=data) if data else None
    text = (
        "".join(output.get("text", ""))
        if isinstance(output.get("text"), list)
        else output.get("text", "")
    )
    lines = [line.split("\r")[-1] for line in re.sub(r"\r+\n", "\n", text).split("\n")]
    kept = [line for line in lines if not re.search(r"\d+%\|.*\||\d+it \[", line)]
    return dict(output, text="\n".join(kept)) if "".join(kept).strip() else None


def streams_joined(outputs):
    "One stream after the other as one: a cell that printed twenty lines printed one text."
    joined = []
    for o in outputs:
        if (
            joined
            and o["output_type"] == joined[-1]["output_type"] == "stream"
            and o["name"] == joined[-1]["name"]
        ):
            joined[-1] = dict(joined[-1], text=joined[-1]["text"].rstrip("\n") + "\n" + o["text"])
        else:
            joined.append(o)
    return joined


def lesson_cells(cells, stem):
    """The cells of a notebook that a reader sees, each figure with alt text, each exported cell
    with a place to link to."""
    before = ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            before = source
            yield dict(cell, source=source, metadata={})
            continue
        directives = re.findall(r"^#\|\s*(\w+)", source, re.M)
        source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
        if "hide" in directives or not source.strip():
            continue
        if {"export", "exports"} & set(directives):
            yield dict(
                cell_type="markdown",
                id=f"to-{cell['id']}",
                metadata={},
                source=f"({stem}-{cell['id']})=",
            )
        outputs = streams_joined([o for o in map(shown_output, cell["outputs"]) if o])
        look = dict(mystnb=dict(image=dict(alt=alt_text(source, before))))
        yield dict(cell, source=source, outputs=outputs, execution_count=None, metadata=look)


def lesson(path):
    "A notebook as the site shows it."
    doc = json.loads(path.read_text(encoding="utf-8"))
    language = dict(name="python", pygments_lexer="ipython3")
    return dict(
        doc,
        cells=list(lesson_cells(doc["cells"], path.stem)),
        metadata=dict(kernelspec=doc["metadata"].get("kernelspec", {}), language_info=language),
    )


def notebooks(track=None):
    "Core, advanced, engineering, each in the order of its numbers; or one track of them."
    tracks = list(TRACKS) if track is None else [track]
    return [p for t in tracks for p in sorted((ROOT / "nbs" / t).glob("[0-9]*.ipynb"))]


def page_of(path):
    "A lesson as the site names it: nbs/engineering/23_files."
    return path.relative_to(ROOT).with_suffix("").as_posix()


def lesson_file(stem):
    "Where a lesson lies, as seen from the root: nbs/engineering/23_files.ipynb."
    found = next((page_of(p) for p in notebooks() if p.stem == stem), f"nbs/{stem}")
    return f"{found}.ipynb"


# API pages


def prose(text):
    "A docstring or comment as Markdown: marks outside of `code` mean themselves."
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        p if i % 2 else re.sub(r"([\\*_$<\[\]{}|~^])", r"\\\1", p) for i, p in enumerate(parts)
    )


def code(node):
    "A type or default as code that may stand in a table."
    return "`" + ast.unparse(node).replace("|", r"\|") + "`" if node is not None else ""


class Module:
    """A module of the package, read without importing it: its public names in order, with comments
    and places."""

    def __init__(self, path):
        self.text = path.read_text(encoding="utf-8")
        inside = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else Path(path.name)
        self.name = ".".join(inside.with_suffix("").parts)
        self.track = self.name.rpartition(".")[0]
        self.tree = ast.parse(self.text)
        self.comments = docstrings.Comments(self.text)
        self.doc = ast.get_docstring(self.tree) or ""
        listed = next(
            (
                n.value
                for n in self.tree.body
                if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
            ),
            None,
        )
        self.public = ast.literal_eval(listed) if listed is not None else []
        self.cells = [
            (i, *m.groups())
            for i, line in enumerate(self.text.splitlines(), 1)
            if (m := re.match(r"# %% .*?([\w.]+)\.ipynb #(\S+)", line))
        ]

    def named(self):
        "(name, node) of each public name."
        for node in self.tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [
                getattr(node, "name", ""),
                *(
                    n.id
                    for t in targets
                    for n in getattr(t, "elts", [t])
                    if isinstance(n, ast.Name)
                ),
            ]
            yield from ((n, node) for n in names if n in self.public)

    def lent(self, cls):
        """(method, function) of functions that a class is given as methods, as in
        `Sampler.interpolate = interpolate`."""
        given = [
            (n.targets[0], n.value)
            for n in self.tree.body
            if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Attribute)
        ]
        return [
            (t.attr, ast.unparse(value)) for t, value in given if ast.unparse(t.value) == cls.name
        ]

    def source(self, node):
        "Link to the cell of the lesson that a name comes from."
        stem, cell = [(stem, cell) for line, stem, cell in self.cells if line <= node.lineno][-1]
        return f"[Source: lesson {stem.split('_')[0]}](#{stem}-{cell})"

    def lessons(self):
        return list(dict.fromkeys(stem for _, stem, _ in self.cells))

    def comment(self, node, default=None):
        "What is said of an argument, a field, an answer or a constant: above its line or after it."
        if node is None:
            return ""
        last = max(node.end_lineno, default.end_lineno if default is not None else 0)
        return self.comments.of(node.lineno, last)

    def arguments(self, fn):
        """(name, annotation, default, comment) of each argument of a function; a bare * as a name
        alone."""
        a = fn.args
        required = [None] * (len(a.posonlyargs) + len(a.args) - len(a.defaults))
        named = list(zip(a.posonlyargs + a.args, required + a.defaults))
        rows = [(n.arg, n.annotation, d, self.comment(n, d)) for n, d in named]
        rows += (
            [
                (
                    "*" + (a.vararg.arg if a.vararg else ""),
                    a.vararg and a.vararg.annotation,
                    None,
                    self.comment(a.vararg),
                )
            ]
            if a.vararg or a.kwonlyargs
            else []
        )
        rows += [
            (n.arg, n.annotation, d, self.comment(n, d))
            for n, d in zip(a.kwonlyargs, a.kw_defaults)
        ]
        return rows + (
            [("**" + a.kwarg.arg, a.kwarg.annotation, None, self.comment(a.kwarg))]
            if a.kwarg
            else []
        )

    def fields(self, cls):
        "The same of the fields of a dataclass."
        return [
            (n.target.id, n.annotation, n.value, self.comment(n))
            for n in cls.body
            if isinstance(n, ast.AnnAssign)
        ]


def signature(name, rows):
    shown = [n if d is None else f"{n}={ast.unparse(d)}" for n, _, d, _ in rows]
    return f"{name}({', '.join(shown)})"


def table(rows):
    rows = [r for r in rows if r[0] != "*"]
    lines = [f"| `{n}` | {prose(c)} | {code(t)} | {code(d)} |" for n, t, d, c in rows]
    return (
        ["| argument | meaning | type | default |", "|---|---|---|---|", *lines, ""] if rows else []
    )


def decorated(node, *names):
    return any(set(names) & set(re.findall(r"\w+", ast.unparse(d))) for d in node.decorator_list)


def about(node):
    "What a docstring says beside the arguments and the answer, which have a table of their own."
    said = docstrings.parts(ast.get_docstring(node) or "")
    raised = re.split(r"^(?=\S)", said.get("Raises", ""), flags=re.M)[1:]
    pairs = (text.partition("\n") for text in raised)
    raised = [f"`{name}` {' '.join(when.split())}".strip() for name, _, when in pairs]
    lines = [prose(said[""]), ""]
    if raised:
        lines += [f"**Raises** {prose('; '.join(raised))}", ""]
    if "References" in said:
        lines += [f"**Source** {prose(' '.join(said['References'].split()))}", ""]
    return lines


def entry(module, kind, node, name, rows=None, more=(), flags=()):
    """One name on an API page: how it is called, its docstring, arguments and return, and what
    belongs inside of it."""
    doc = about(node) if hasattr(node, "body") else [prose(module.comment(node)), ""]
    returns = getattr(node, "returns", None)
    back = f"**Returns** {code(returns)}" + (
        f": {prose(module.comment(returns))}" if module.comment(returns) else ""
    )
    fence = ":" * (4 if kind in ("method", "property") else 5)
    return [
        f"{fence}{{py:{kind}}} {name if rows is None else signature(name, rows)}",
        *(f":{f}:" for f in flags),
        "",
        *doc,
        *table(rows or []),
        *([back, ""] if code(returns) not in ("", "`None`") else []),
        *more,
        fence,
        "",
    ]


def methods(module, cls):
    "Entries of the public methods of a class."
    for node in (
        n
        for n in cls.body
        if isinstance(n, ast.FunctionDef) and (n.name[0] != "_" or n.name == "__call__")
    ):
        if decorated(node, "property", "cached_property"):
            yield from entry(module, "property", node, node.name)
        else:
            rows = module.arguments(node)[0 if decorated(node, "staticmethod") else 1 :]
            yield from entry(
                module,
                "method",
                node,
                node.name,
                rows,
                flags=[k for k in ("classmethod", "staticmethod") if decorated(node, k)],
            )


def public_entry(module, name, node):
    "The entry of a function, class or constant, with the link to its source."
    link = [module.source(node), ""]
    if isinstance(node, ast.FunctionDef):
        return entry(module, "function", node, name, module.arguments(node), link)
    if isinstance(node, ast.ClassDef):
        init = next(
            (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
        )
        rows = (
            module.arguments(init)[1:]
            if init
            else module.fields(node) if decorated(node, "dataclass") else []
        )
        bases = (
            [f"Extends {', '.join(f'{{py:obj}}`.{ast.unparse(b)}`' for b in node.bases)}.", ""]
            if node.bases
            else []
        )
        lent = [
            f"Its method `{method}` is {{py:func}}`{name}`." for method, name in module.lent(node)
        ] + [""]
        return entry(
            module, "class", node, node.name, rows, [*bases, *lent, *link, *methods(module, node)]
        )
    return entry(module, "data", node, name, more=link)


def first_sentence(node):
    return (
        prose(re.split(r"(?<=\.)\s", ast.get_docstring(node) or "")[0])
        if hasattr(node, "body")
        else ""
    )


def api_page(module):
    "One module as a page."
    named = list(module.named())
    lessons = " and ".join(
        f"[{s.replace('_', ' ')}](../{lesson_file(s)})" for s in module.lessons()
    )
    rows = [
        f"| {{py:obj}}`{n} <brainldm.{module.name}.{n}>` |"
        f" {first_sentence(node) or prose(module.comment(node))} |"
        for n, node in named
    ]
    body = [line for n, node in named for line in public_entry(module, n, node)]
    return "\n".join(
        [
            f"# {module.name}",
            "",
            prose(module.doc),
            "",
            f"Made in lesson {lessons}.",
            "",
            f"```{{py:module}} brainldm.{module.name}",
            "```",
            "",
            "| name | what it is |",
            "|---|---|",
            *rows,
            "",
            *body,
        ]
    )


def modules():
    return [Module(p) for p in sorted((ROOT / "brainldm").rglob("*.py")) if p.stem[0] != "_"]


def by_lesson(found):
    "Modules in the order of the lessons that write them: track by track."
    place = {p.stem: i for i, p in enumerate(notebooks())}
    return sorted(found, key=lambda m: min(place[stem] for stem in m.lessons()))


# The map of the modules


def imports(module, known):
    "Modules of the package that a module imports."
    found = set()
    for n in (n for n in ast.walk(module.tree) if isinstance(n, ast.ImportFrom)):
        if n.level or (n.module or "").split(".")[0] == "brainldm":
            here = ["brainldm", *module.name.split(".")[:-1]]
            base = here[: len(here) - n.level + 1] if n.level else []
            parts = [*base, *(n.module or "").split(".")]
            inside = ".".join(p for p in parts[1:] if p)
            found |= (
                {inside}
                if inside in known
                else {".".join(filter(None, (inside, a.name))) for a in n.names}
            )
    return (found & known) - {module.name}


def reachable(graph, start):
    "Everything below a module."
    return set().union(*({d} | reachable(graph, d) for d in graph[start]))


def reduced(graph):
    "The same order with as few arrows as possible: none where a detour leads to the same place."
    return {
        a: {b for b in to if not any(b in reachable(graph, c) for c in to - {b})}
        for a, to in graph.items()
    }


def layers(graph):
    "Layer by module: 0 for those that import nothing, else one above the highest that they import."
    height = {}

    def of(a):
        height[a] = height.get(a, max((of(b) + 1 for b in graph[a]), default=0))
        return height[a]

    return {a: of(a) for a in sorted(graph)}


def ordered(graph):
    """Rows of places, top row first, and the links between neighbouring rows.

    A link over several rows gets a place in each, so that it bends around boxes; places are
    sorted by the mean of their neighbours."""
    height, links, rows = layers(graph), [], {}
    for a in graph:
        rows.setdefault(height[a], []).append(a)
    for a, to in graph.items():
        for b in sorted(to):
            way = [a, *((a, b, h) for h in range(height[a] - 1, height[b], -1)), b]
            for place in way[1:-1]:
                rows[place[2]].append(place)
            links += zip(way, way[1:])
    rows = [rows[h] for h in sorted(rows, reverse=True)]
    for sweep in range(24):
        at = {p: i - (len(row) - 1) / 2 for row in rows for i, p in enumerate(row)}
        for row in rows if sweep % 2 else rows[::-1]:
            near = {
                p: [at[b if a == p else a] for a, b in links if p in (a, b)] or [at[p]] for p in row
            }
            row.sort(key=lambda p: sum(near[p]) / len(near[p]))
            at |= {p: i - (len(row) - 1) / 2 for i, p in enumerate(row)}
    return rows, links


BOX, GAP, STEP = (100, 36), 10, 80  # size of a box, room around it, distance of rows


def places(rows, links):
    """Middle (x, y) of each place: as straight below its neighbours as the order and the width of
    the boxes allow."""
    room = lambda p: (BOX[0] if isinstance(p, str) else BOX[0] / 8) + GAP
    x = {p: 0.0 for row in rows for p in row}
    for sweep in range(40):
        for row in rows if sweep % 2 else rows[::-1]:
            near = [[x[b if a == p else a] for a, b in links if p in (a, b)] for p in row]
            want = [sum(n) / len(n) if n else x[p] for n, p in zip(near, row)]
            got = want[:1]
            for w, left, p in zip(want[1:], row, row[1:]):
                got.append(max(w, got[-1] + (room(left) + room(p)) / 2))
            shift = sum(w - g for w, g in zip(want, got)) / len(row)
            x |= {p: g + shift for p, g in zip(row, got)}
    left = min(x.values()) - BOX[0] / 2 - 4
    return {
        p: (round(x[p] - left), i * STEP + BOX[1] // 2 + 4)
        for i, row in enumerate(rows)
        for p in row
    }


def map_svg(graph, about):
    """The drawing: who imports whom, imports below.

    Boxes link to API pages; colours follow the page."""
    rows, links = ordered(graph)
    at, half, lines = places(rows, links), BOX[1] // 2, []
    for a, b in links:
        (xa, ya), (xb, yb) = at[a], at[b]
        start, end = ya + half, yb - half - (5 if isinstance(b, str) else 0)
        # an arrow head, or straight past the boxes
        on = '" marker-end="url(#tip)' if isinstance(b, str) else f" V{yb + half}"
        lines.append(
            f'<path d="M{xa},{start} C{xa},{(start + end) // 2} {xb},{(start + end) // 2}'
            f' {xb},{end}{on}"/>'
        )
    boxes = [
        f'<a class="{p.rpartition(".")[0] or "core"}" href="api/{p}.html"><rect'
        f' x="{x - BOX[0] // 2}" y="{y - half}" width="{BOX[0]}" height="{BOX[1]}" rx="6"/><text'
        f' x="{x}" y="{y + 5}">{p.split(".")[-1]}</text></a>'
        for p, (x, y) in at.items()
        if isinstance(p, str)
    ]
    width, height = (
        max(x for x, _ in at.values()) + BOX[0] // 2 + 4,
        (len(rows) - 1) * STEP + BOX[1] + 8,
    )
    return (
        f'<svg class="modules" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{html.escape(about)}" xmlns="http://www.w3.org/2000/svg"><defs><marker'
        ' id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7"'
        ' orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs><g'
        f' class="links">{"".join(lines)}</g>{"".join(boxes)}</svg>'
    )


def map_page(found):
    "The map, and the same in words."
    known = {m.name for m in found}
    full = {m.name: imports(m, known) for m in found}
    graph, first = reduced(full), {m.name: m.lessons()[0] for m in found}
    order = [m.name for m in by_lesson(found)]
    about = "Map of the modules. " + " ".join(
        f"{a} imports {', '.join(sorted(graph[a])) or 'none of the others'}." for a in order
    )
    rows = [
        f"| [{a}](api/{a}.md) | [{first[a].split('_')[0]}]({lesson_file(first[a])}) |"
        f" {', '.join(f'`{b}`' for b in order if b in full[a]) or 'none'} |"
        for a in order
    ]
    return "\n".join(
        [
            "# Map of the modules",
            "",
            (
                "Drawn from the imports themselves. An arrow points to what a module imports; a"
                " module that is reached by way of another has no arrow of its own. Nothing points"
                " upwards: a module uses lower layers only, whatever the number of its lesson."
                " Filled: the core; plain: advanced; dashed: engineering."
            ),
            "",
            "```{raw} html",
            f'<div class="modules-frame">{map_svg(graph, about)}</div>',
            "```",
            "",
            "| module | lesson | imports |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def course_page():
    "How long each lesson takes with its long cells, as the last `make course` measured it."
    known = json.loads((ROOT / "docs" / "course.json").read_text(encoding="utf-8"))
    parts = []
    for track, caption in TRACKS.items():
        took = [(p, known[n]) for p in notebooks(track) if (n := p.stem.split("_")[0]) in known]
        minutes = sum(o["seconds"] for _, o in took) / 60
        parts += [f"## {caption}", "", f"{minutes:.0f} minutes in all.", ""]
        parts += ["| lesson | minutes | on |", "|---|---|---|"]
        parts += [
            f"| [{p.stem.replace('_', ' ')}]({page_of(p)}.ipynb) | {o['seconds'] / 60:.1f} |"
            f" {o['where']} |"
            for p, o in took
        ]
        parts += [""]
    about = "Minutes for a whole lesson, the long cells (`#| slow`) included; from `make course`."
    return "\n".join(["# How long the lessons take", "", about, "", *parts])


# The site


def contents(caption, *entries):
    return ["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""]


def write_sources(src):
    "Everything that Sphinx reads, in a folder of its own."
    shutil.rmtree(src, ignore_errors=True)
    shutil.copytree(ROOT / "docs", src, ignore=shutil.ignore_patterns("*.md", "__pycache__"))
    shutil.copytree(ROOT / "nbs" / "images", src / "nbs" / "images")
    (src / "api").mkdir()
    found = modules()
    for path in notebooks():
        page = src / path.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(json.dumps(lesson(path)), encoding="utf-8")
    for module in found:
        (src / "api" / f"{module.name}.md").write_text(api_page(module), encoding="utf-8")
    (src / "modules.md").write_text(map_page(found), encoding="utf-8")
    (src / "course.md").write_text(course_page(), encoding="utf-8")
    pages = sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))
    for page in (*PAGES, *pages):
        text = (ROOT / page).read_text(encoding="utf-8")
        (src / page).parent.mkdir(parents=True, exist_ok=True)
        (src / page).write_text(
            re.sub(r"(\]\((?:\.\./)*)README\.md", r"\1index.md", text), encoding="utf-8"
        )
    (src / "README.md").rename(src / "index.md")
    toc = [
        *(
            line
            for track, caption in TRACKS.items()
            for line in contents(caption, *map(page_of, notebooks(track)))
        ),
        *contents("Use it", *(p.removesuffix(".md") for p in pages), "modules", "course"),
        *(
            line
            for track, caption in TRACKS.items()
            for line in contents(
                f"Modules: {caption.lower()}",
                *(f"api/{m.name}" for m in by_lesson(found) if m.track == track),
            )
        ),
        *contents("Project", "tests/benchmarks/README", "CONTRIBUTING", "CHANGELOG"),
    ]
    with (src / "index.md").open("a", encoding="utf-8") as front:
        front.write("\n\n" + "\n".join(toc))


def main(to):
    "Write the sources and build the pages; a warning is a failure. Gives an exit status."
    try:
        from sphinx.cmd.build import build_main
    except ImportError:
        sys.exit(
            "docs: Sphinx is not installed. Expected the docs extra. Try pip install -e"
            " '.[course,dev,docs]'."
        )
    shutil.rmtree(to / "html", ignore_errors=True)
    write_sources(to / "src")
    status = build_main(
        [
            "-W",
            "--keep-going",
            "-q",
            "-b",
            "html",
            "-d",
            str(to / "doctrees"),
            str(to / "src"),
            str(to / "html"),
        ]
    )
    print(to / "html" / "index.html" if status == 0 else "docs: not built")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_site").resolve()))
