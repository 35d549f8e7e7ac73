"""The public face: what `import brainldm` offers, that it is cheap, and what `help` shows."""

import ast
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import brainldm

ROOT = Path(__file__).parents[1]
FACE = ast.parse((ROOT / "brainldm" / "__init__.py").read_text(encoding="utf-8"))


def run(code):
    "What a new process prints."
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_importing_it_loads_nothing_else():
    code = (
        "import sys, brainldm; dir(brainldm); print(*(n for n in sys.modules"
        " if n.split('.')[0] in ('torch', 'numpy', 'pandas', 'matplotlib', 'brainldm')))"
    )
    assert run(code).split() == ["brainldm"]


@pytest.mark.parametrize("name", brainldm.__all__)
def test_each_name_comes_from_the_module_that_makes_it(name):
    thing = getattr(brainldm, name)
    module = importlib.import_module(f"brainldm.{brainldm._HOME[name]}")
    assert getattr(module, name) is thing and name in module.__all__
    assert vars(brainldm)[name] is thing  # the next use costs nothing


def test_type_checkers_read_the_same_table():
    block = next(n for n in FACE.body if isinstance(n, ast.If))
    imports = [(a.name, n.module) for n in block.body for a in n.names]
    assert all(a.asname == a.name for n in block.body for a in n.names)  # a re-export
    assert dict(imports) == brainldm._HOME and len(imports) == len(brainldm._HOME)


def test_all_of_it_by_star_and_in_dir():
    names = {}
    exec("from brainldm import *", names)
    assert set(brainldm.__all__) <= set(names)
    assert {"__version__", *brainldm.__all__} <= set(dir(brainldm))
    assert len(brainldm.__all__) <= 25


@pytest.mark.parametrize(
    "wrong, near", [("BrainLMD", "brainldm.BrainLDM"), ("unet_", "UNet"), ("qqq", "dir(brainldm)")]
)
def test_an_unknown_name_suggests_the_nearest(wrong, near):
    with pytest.raises(AttributeError) as e:
        getattr(brainldm, wrong)
    assert repr(wrong) in str(e.value) and str(e.value).endswith(f"{near}.")
    assert not hasattr(brainldm, wrong)


def test_submodules_are_reached_as_ever():
    assert run("import brainldm.scheduler as s; print(s.__name__)") == "brainldm.scheduler\n"
    assert importlib.import_module("brainldm.unet") is not brainldm.UNet


def arguments(thing):
    "Names of the arguments of a function, or of the constructor of a class."
    return [n for n in inspect.signature(thing).parameters if n not in ("self", "cls")]


@pytest.mark.parametrize("name", brainldm.__all__)
def test_help_shows_every_argument_with_its_meaning(name):
    thing = getattr(brainldm, name)
    if not callable(thing):
        return
    shown = pydoc.plain(pydoc.render_doc(thing))
    given = [n for n in arguments(thing) if n not in ("args", "kwargs")]
    for argument in given:
        found = re.search(rf"^[ |]*\**{argument}(?: : .*)?\n[ |]+(\S.*)", shown, re.M)
        assert found, f"{name}({argument})"


def test_help_of_sample():
    "The example of the brief: every argument, its type, its default and what it means."
    shown = pydoc.plain(pydoc.render_doc(brainldm.BrainLDM.sample))
    for argument in arguments(brainldm.BrainLDM.sample):
        assert re.search(rf"^ +\**{argument} : .*\n +\S", shown, re.M), argument
    assert "n : int, default 1" in shown and "Returns\n" in shown and "Raises\n" in shown
