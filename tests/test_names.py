"""Every name that a reader can meet in code is a word of the field (the glossary of the project):
modules, exported names, methods, settings, arguments, flags."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "brainldm"
OFF = set(  # words that the glossary replaces
    "picture pictures person persons people somebody nobody whoever draw draws drawn drawer drawing"
    " drawings paint painted sentence sentences height heights told knows hears heard listen"
    " listens asked asker critic fool floor floors road roads walk walks guess price prices priced"
    " tax pay spread alike likeness chance chances unseen judge judged crowd cloud spoil lean crew"
    " everyone beside adversary recall alone who ours theirs how own grey greys colour colours"
    " neighbour neighbours centre centres normalise standardise generalise memorise".split()
)
# fine as part of a longer name: learning_rate, held_out, num_heads
ALONE = {
    "plain",
    "every",
    "where",
    "look",
    "looks",
    "rate",
    "held",
    "share",
    "word",
    "words",
    "request",
    "head",
    "o",
}
KEPT = {  # said on purpose
    "recall": "a score of fidelity, beside precision",
    "share": "the command that passes a run on",
    "Share": "the command that passes a run on",
}


def parts(name):
    "The words of an identifier: SliceDataset, slice_dataset and SLICE_DATASET alike."
    return [o.lower() for o in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def off(name):
    return name not in KEPT and (bool(OFF & set(parts(name))) or name.strip("_").lower() in ALONE)


def exported(tree):
    for n in tree.body:
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(n.value))
    return set()


def arguments(function):
    a = function.args
    return [
        o.arg for o in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if o is not None
    ]


def public(path):
    "Pairs of place and name: all that a module offers."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = exported(tree)
    for name in sorted(names):
        yield path.stem, name
    for n in tree.body:
        if getattr(n, "name", None) not in names:
            continue
        if isinstance(n, ast.FunctionDef):
            yield from ((n.name, o) for o in arguments(n))
        if isinstance(n, ast.ClassDef):
            for o in n.body:
                if isinstance(o, ast.AnnAssign):
                    yield n.name, o.target.id
                if isinstance(o, ast.FunctionDef) and (
                    o.name[0] != "_" or o.name in ("__init__", "__call__")
                ):
                    yield n.name, o.name
                    yield from ((f"{n.name}.{o.name}", k) for k in arguments(o))


def modules():
    return sorted(o for o in PACKAGE.rglob("*.py") if o.name[0] != "_")


@pytest.mark.parametrize(
    "path", modules(), ids=lambda o: str(o.relative_to(PACKAGE).with_suffix(""))
)
def test_names_are_words_of_the_field(path):
    found = [f"{place}: {name}" for place, name in public(path) if off(name)]
    assert not found, f"names off the glossary: {', '.join(found)}"


def test_there_is_something_to_read():
    assert sum(1 for path in modules() for _ in public(path)) > 1500


@pytest.mark.parametrize(
    "name",
    [
        "draw_person",
        "DrawPerson",
        "shared_picture",
        "critic_rate",
        "rate",
        "held",
        "hide_neighbour",
        "PICTURE",
        "toGrey",
    ],
)
def test_a_name_off_the_glossary_is_found(name):
    assert off(name)


@pytest.mark.parametrize(
    "name",
    [
        "held_out",
        "num_heads",
        "learning_rate",
        "image_scores",
        "StopRequest",
        "share_run",
        "drawdown",
        "somewhere",
    ],
)
def test_a_longer_name_is_no_false_alarm(name):
    assert not off(name)
