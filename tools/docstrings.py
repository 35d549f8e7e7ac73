"""Write numpy-style docstrings into brainldm/ from the comments of arguments, so that
`help(BrainLDM.sample)` shows them.

python tools/docstrings.py             brainldm/ of this project, after nbdev_export
python tools/docstrings.py FOLDER      the package in another folder

Notebooks keep a docstring of one line, with a comment after (or above) each argument. What is
written here: the sentence, then Parameters (of a class: those of its constructor), Attributes
(of a dataclass), Returns or Yields, Raises and References (from `Source:`). A docstring that
has such sections is left alone: running it twice changes nothing."""

import ast
import io
import re
import sys
import textwrap
import tokenize
from pathlib import Path

WIDTH = 100  # columns of a line, as everywhere in the project
HEADINGS = ("Parameters", "Attributes", "Returns", "Yields", "Raises", "References")
EXCEPTION = r"\b(?:[a-z]+\.)?[A-Z]\w*(?:Error|Exception|Fault|Interrupt|Exit)\b"


# Reading


def parts(doc):
    "A docstring as {section: text}; the key '' holds what stands before the first section."
    pattern = rf"^({'|'.join(HEADINGS)})\n-{{3,}}\n"
    first, *rest = re.split(pattern, doc, flags=re.M)
    return {"": first.strip(), **{k: v.strip("\n") for k, v in zip(rest[::2], rest[1::2])}}


def labelled(doc):
    "A docstring of one line (or a few) as (text, what `Source:` names, what `Raises` says)."
    text, found = [], {"Source:": [], "Raises": []}
    for paragraph in re.split(r"\n\s*\n", doc):
        first, *rest = re.split(r"(?:(?<=[.?!])\s+|^\s*)(Source:|Raises)(?=\s)", paragraph)
        text.append(first.strip())
        for label, said in zip(rest[::2], rest[1::2]):
            found[label].append(" ".join(said.split()))
    # "Raises as `pack_run` does."
    unnamed = [said for said in found["Raises"] if not re.match(EXCEPTION, said)]
    paragraphs = [t for t in text if t] + [f"Raises {said}" for said in unnamed]
    return (
        "\n\n".join(paragraphs),
        found["Source:"],
        [said for said in found["Raises"] if said not in unnamed],
    )


def exceptions(said):
    """'ValueError for a name, TypeError or OSError for more.' as [(exception, when)]; a joint
    condition goes to both."""
    names = list(re.finditer(EXCEPTION, said))
    ends = [m.start() for m in names[1:]] + [len(said)]
    when = [
        re.sub(
            r"(^[,;\s]+)|([,;.\s]+(and|or)?\s*$)|(\s+(and|or)\s*$)", "", said[m.end() : end]
        ).strip()
        for m, end in zip(names, ends)
    ]
    when = [w if w not in ("or", "and") else "" for w in when]
    joint = [
        re.fullmatch(r"\s+or\s+", said[m.end() : end]) is not None for m, end in zip(names, ends)
    ]
    for i in reversed(range(len(names) - 1)):
        when[i] = when[i + 1] if joint[i] else when[i]
    return [(m[0], w) for m, w in zip(names, when)]


class Comments:
    "The comments of a module by line: those after code, and those that fill a line."

    def __init__(self, text):
        self.after, self.alone, self.ends = {}, {}, []
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NEWLINE:
                self.ends.append(token.start[0])
            if token.type == tokenize.COMMENT and not token.string.startswith(("# %%", "#|")):
                place = self.alone if not token.line[: token.start[1]].strip() else self.after
                place[token.start[0]] = token.string.lstrip("#").strip()

    def of(self, first, last):
        "What is said of code from one line to another: on the lines above it, then after it."
        above = first - 1
        while above in self.alone:
            above -= 1
        said = [self.alone[i] for i in range(above + 1, first)]
        said += [self.after[i] for i in range(first, last + 1) if i in self.after][-1:]
        return " ".join(said)

    def signature_end(self, node):
        "The line with the colon of a function."
        return next(line for line in self.ends if line >= node.lineno)


def shown(node):
    "A default as it is called: of `field(default_factory=dict)` the dict."
    if isinstance(node, ast.Call):
        given = {k.arg: k.value for k in node.keywords}
        if "default_factory" in given:
            factory = given["default_factory"]
            return ast.unparse(
                factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])
            )
        if "default" in given:
            return ast.unparse(given["default"])
        if getattr(node.func, "id", getattr(node.func, "attr", "")) == "field":
            return None
    return ast.unparse(node) if node is not None else None


def kind(annotation):
    "A type as it is called; a name in quotes (of a class that stands below) without them."
    if annotation is None:
        return ""
    quoted = isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)
    return annotation.value if quoted else ast.unparse(annotation)


def arguments(fn, comments):
    "(name, type, default, comment) of each argument, without self and cls."
    a = fn.args
    plain = a.posonlyargs + a.args
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    rows = [("", n, d) for n, d in zip(plain, defaults)] + (
        [("*", a.vararg, None)] if a.vararg else []
    )
    rows += [("", n, d) for n, d in zip(a.kwonlyargs, a.kw_defaults)] + (
        [("**", a.kwarg, None)] if a.kwarg else []
    )
    for stars, n, d in rows:
        if n.arg not in ("self", "cls"):
            last = max(n.end_lineno, d.end_lineno if d is not None else 0)
            # else it is the answer's
            said = comments.of(n.lineno, last) if last < comments.signature_end(fn) else ""
            yield stars + n.arg, kind(n.annotation), shown(d), said


def fields(cls, comments, known):
    "The same of the fields of a class, after those that it inherits from classes of the package."
    rows = {}
    for base in cls.bases:
        name = getattr(base, "id", getattr(base, "attr", ""))
        if name in known and known[name][0] is not cls:
            rows |= {row[0]: row for row in fields(*known[name], known)}
    for n in cls.body:
        if (
            isinstance(n, ast.AnnAssign)
            and isinstance(n.target, ast.Name)
            and "ClassVar" not in ast.unparse(n.annotation)
        ):
            name = n.target.id
            if name[0] != "_":
                rows[name] = (
                    name,
                    kind(n.annotation),
                    shown(n.value),
                    comments.of(n.lineno, n.end_lineno),
                )
    return list(rows.values())


def constructor(cls, comments, known):
    "The same of the arguments that make an instance, also where a class of the package says them."
    for n in cls.body:
        if isinstance(n, ast.FunctionDef) and n.name == "__init__":
            return list(arguments(n, comments))
    names = [getattr(base, "id", getattr(base, "attr", "")) for base in cls.bases]
    above = [known[n] for n in names if n in known and known[n][0] is not cls]
    return next((rows for rows in (constructor(*a, known) for a in above) if rows), [])


# Writing


def wrapped(text, room, indent=""):
    return textwrap.fill(
        text,
        room,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def ended(text):
    "With a full stop."
    return text if not text or text[-1] in ".!?:…" else text + "."


def sentence(text):
    "With a capital and a full stop."
    return ended(text[:1].upper() + text[1:])


def section(title, rows, room):
    "A section: a line for each row, what is said of it below."
    lines = [title, "-" * len(title)]
    for head, said in rows:
        lines += [head] + ([wrapped(ended(said), room, "    ")] if said else [])
    return "\n".join(lines)


def listed(rows):
    "Rows of arguments as numpy writes them: name, type, default."
    for name, what, default, said in rows:
        head = ", ".join(
            ([what] if what else []) + ([f"default {default}"] if default is not None else [])
        )
        yield (f"{name} : {head}" if head else name), said


def docstring(doc, room, parameters=(), attributes=(), returns=None):
    "The whole docstring from its sentence and its rows."
    text, sources, raises = labelled(doc)
    out = ["\n\n".join(wrapped(" ".join(p.split()), room) for p in re.split(r"\n\s*\n", text))]
    if parameters:
        out.append(section("Parameters", listed(parameters), room))
    if attributes:
        out.append(section("Attributes", listed(attributes), room))
    if returns:
        answer, said = returns
        given = re.fullmatch(r"(?:Iterator|Generator)\[(.*?)(?:, None, None)?\]", answer)
        out.append(
            section("Yields" if given else "Returns", [(given[1] if given else answer, said)], room)
        )
    if raises:
        out.append(
            section(
                "Raises",
                [(name, sentence(when)) for said in raises for name, when in exceptions(said)],
                room,
            )
        )
    if sources:
        out.append(
            "References\n----------\n" + "\n".join(wrapped(sentence(s), room) for s in sources)
        )
    return "\n\n".join(out)


def literal(doc, indent):
    "A docstring as source code."
    raw = "r" if "\\" in doc else ""
    body = doc.replace('"""', "'''")
    if "\n" not in body:
        return f'{raw}"""{body}"""'
    return f'{raw}"""' + textwrap.indent(body, indent).lstrip() + f'\n{indent}"""'


class Package:
    "All modules of a folder, so that a class can be told what it inherits."

    def __init__(self, folder):
        self.texts = {
            p: p.read_text(encoding="utf-8")
            for p in sorted(Path(folder).rglob("*.py"))
            if p.name[0] != "_"
        }
        self.trees = {p: ast.parse(text) for p, text in self.texts.items()}
        self.comments = {p: Comments(text) for p, text in self.texts.items()}
        self.classes = {
            n.name: (n, self.comments[p])
            for p, tree in self.trees.items()
            for n in tree.body
            if isinstance(n, ast.ClassDef)
        }

    def wanted(self, path):
        "(node, its new docstring or None) of every public class, function and method of a module."
        comments = self.comments[path]
        for node in (n for n in self.trees[path].body if getattr(n, "name", "_")[0] != "_"):
            if isinstance(node, ast.ClassDef):
                yield node, self.of_class(node, comments)
                for n in node.body:
                    if isinstance(n, ast.FunctionDef) and (
                        n.name[0] != "_" or n.name == "__call__"
                    ):
                        yield n, self.of_function(n, comments)
            elif isinstance(node, ast.FunctionDef):
                yield node, self.of_function(node, comments)

    def of_function(self, node, comments):
        room = WIDTH - node.col_offset - 4
        rows, doc = list(arguments(node, comments)), ast.get_docstring(node)
        end = comments.signature_end(node)
        said = comments.of(end, end) if node.returns is not None else ""
        if doc is None and not (said and any(row[3] for row in rows)):
            return None  # nothing is said of it
        answer = kind(node.returns)
        returns = (answer, said) if answer not in ("", "None") else None
        return docstring(
            doc or sentence(said), room, rows if any(row[3] for row in rows) else (), (), returns
        )

    def of_class(self, node, comments):
        doc, room = ast.get_docstring(node), WIDTH - node.col_offset - 4
        if doc is None:
            return None
        rows = constructor(node, comments, self.classes)
        own = fields(node, comments, self.classes)
        return docstring(
            doc, room, rows if any(row[3] for row in rows) else (), [row for row in own if row[3]]
        )

    def rewritten(self, path):
        "The text of a module with its new docstrings."
        lines = self.texts[path].splitlines(keepends=True)
        for node, new in sorted(self.wanted(path), key=lambda pair: -pair[0].lineno):
            first, old = node.body[0], ast.get_docstring(node)
            if (
                new is None
                or first.lineno == node.lineno
                or old is not None
                and len(parts(old)) > 1
            ):
                continue
            indent = " " * (node.col_offset + 4)
            if old is None:  # before comments and first statement
                lines.insert(
                    self.comments[path].signature_end(node), indent + literal(new, indent) + "\n"
                )
                continue
            value = first.value
            head = lines[value.lineno - 1].encode()[: value.col_offset].decode()
            tail = lines[value.end_lineno - 1].encode()[value.end_col_offset :].decode()
            lines[value.lineno - 1 : value.end_lineno] = [head + literal(new, indent) + tail]
        return "".join(lines)


def write(folder):
    "Rewrite the modules of a package; says how many changed."
    package, changed = Package(folder), 0
    for path, text in package.texts.items():
        new = package.rewritten(path)
        ast.parse(new)  # never write what Python cannot read
        if new != text:
            path.write_text(new, encoding="utf-8")
            changed += 1
    return changed


if __name__ == "__main__":
    write(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "brainldm")
