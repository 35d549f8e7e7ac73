"""The docstrings that tools/docstrings.py writes: every argument is there, nothing else changes,
twice is once."""

import ast
import importlib
import inspect
import pydoc
import re
import sys
import textwrap
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
docstrings = importlib.import_module("docstrings")
MODULES = sorted(p for p in (ROOT / "brainldm").rglob("*.py") if p.name[0] != "_")

SOURCE = '''
"A module."
from dataclasses import dataclass, field

# %% ../nbs/01_x.ipynb #ab
def add(
    a:int|None, # First, in [0, 1]
    # Second, of which
    # there is much to say
    b:str='x',
    *rest:int, # More
    c:tuple=(1,
             2), # Over two lines
    d:'Later'=None, # Of a class below
    **others, # Any other
)->float: # A number, i.e. `a`
    """Add what is there. It says # nothing.

    More of it. Source: Ho et al. 2020, eq. 4. Raises ValueError if `a` is None, TypeError or OSError for a name."""
    # a comment
    return a

def short(x): return x

def plain(x:int)->int: # The same
    "As it was."
    return x

def steps(
    n:int, # How many
)->Iterator[int]: # Each
    "Count; \\"quoted\\" and \\\\ back. Raises as `add` does."
    yield n

@dataclass
class First:
    "Settings."
    size:int=3 # Pixels
    names:list=field(default_factory=lambda: ['a']) # Names

@dataclass
class Second(First):
    "More settings. Raises ValueError."
    size:int=5 # Pixels, more of them
    kept:dict=field(default_factory=dict) # Nothing

class Net:
    "A network."
    def __init__(self,
        channels:int, # Channels
    ):
        self.channels = channels

    def forward(self,
        x:float, # Features
    )->float: # features, larger
        return x*self.channels

    def _private(self,
        x:float, # Features
    ):
        return x
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The module above as the tool writes it."
    folder = tmp_path_factory.mktemp("made") / "sub"
    folder.mkdir()
    (folder / "module.py").write_text(SOURCE, encoding="utf-8")
    docstrings.write(folder.parent)
    return (folder / "module.py").read_text(encoding="utf-8")


def doc(text, name):
    "The docstring of a name, or of a method."
    node = ast.parse(text)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    return ast.get_docstring(node)


def test_a_function_shows_each_argument(made):
    assert doc(made, "add") == textwrap.dedent('''\
        Add what is there. It says # nothing.

        More of it.

        Parameters
        ----------
        a : int | None
            First, in [0, 1].
        b : str, default 'x'
            Second, of which there is much to say.
        *rest : int
            More.
        c : tuple, default (1, 2)
            Over two lines.
        d : Later, default None
            Of a class below.
        **others
            Any other.

        Returns
        -------
        float
            A number, i.e. `a`.

        Raises
        ------
        ValueError
            If `a` is None.
        TypeError
            For a name.
        OSError
            For a name.

        References
        ----------
        Ho et al. 2020, eq. 4.''')


def test_what_has_no_comments_stays_short(made):
    assert doc(made, "short") is None and doc(made, "Net._private") is None
    assert doc(made, "plain") == "As it was.\n\nReturns\n-------\nint\n    The same."


def test_other_forms(made):
    assert doc(made, "steps").startswith(
        'Count; "quoted" and \\ back.\n\nRaises as `add` does.\n\nParameters\n'
    )
    assert doc(made, "steps").endswith("Yields\n------\nint\n    Each.")
    assert doc(made, "First").endswith(
        "Attributes\n----------\nsize : int, default 3\n    Pixels.\nnames : list, default ['a']\n "
        "   Names."
    )
    assert (
        doc(made, "Second")
        == "More settings.\n\nAttributes\n----------\nsize : int, default 5\n    Pixels, more of"
        " them.\nnames : list, default ['a']\n    Names.\nkept : dict, default dict()\n   "
        " Nothing.\n\nRaises\n------\nValueError"
    )
    assert doc(made, "Net").endswith("Parameters\n----------\nchannels : int\n    Channels.")
    assert doc(made, "Net.forward").startswith(
        "Features, larger.\n\nParameters\n----------\nx : float\n    Features."
    )


def test_twice_is_once_and_the_code_is_the_same(made, tmp_path):
    (tmp_path / "module.py").write_text(made, encoding="utf-8")
    assert docstrings.write(tmp_path) == 0
    assert (tmp_path / "module.py").read_text(encoding="utf-8") == made
    assert bare(made) == bare(SOURCE)


def bare(text):
    "The code of a module without its docstrings."
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def public(path):
    "(name, object) of the public functions, classes and methods of a module that have a docstring."
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in module.__all__:
        thing = getattr(module, name)
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            yield from (
                (f"{name}.{k}", v)
                for k, v in vars(thing).items()
                if k[0] != "_" and inspect.isfunction(v)
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_help_shows_every_argument_that_has_a_comment(path):
    for name, thing in public(path):
        shown = pydoc.render_doc(thing)
        for line in inspect.getsource(thing).splitlines():
            if found := re.match(r"\s+(\**\w+)(?::[^#]*)?(?:=[^#]*)?,\s+# (.*)", line):
                assert re.search(
                    rf"^\s+{re.escape(found[1])}( :|$)", shown, re.M
                ), f"{name}({found[1]})"
            if '"""' in line or re.match(r"\s+[\"']", line):
                break


def test_no_docstring_is_cut_in_two():
    "A string on the line below a docstring is a statement of its own, which nobody sees."
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            body = node.body[1:] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            lost = [
                n
                for n in body
                if isinstance(n, ast.Expr) and isinstance(getattr(n.value, "value", None), str)
            ]
            assert not lost, f"{path.stem}:{node.lineno}"
