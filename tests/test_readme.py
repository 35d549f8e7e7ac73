"""What the README shows is there and runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs():
    "The python block, word for word: it needs nothing but the package."
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    names = {}
    exec(code, names)
    assert names["ad"].shape == names["nc"].shape == (4, 1, 128, 128)
    assert (names["ad"] - names["nc"]).abs().mean() > 0.005


def test_links_and_targets_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"(?:^|`)make ([a-z]+)", README, re.M):
        assert target in targets


def test_the_commands_it_names_exist():
    helped = subprocess.run(
        [sys.executable, "-m", "brainldm.engineering.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for command in set(re.findall(r"(?<!from )\bbrainldm ([a-z]+)\b", README)):
        assert command in helped


def test_the_tables_hold_every_lesson_and_names_that_exist():
    rows = re.findall(r"^\| \[.*?\]\((nbs/.*?\.ipynb)\) \| .*? \| (.*?) \| .*? \|$", README, re.M)
    lessons = [
        p
        for t in ("", "advanced/", "engineering/")
        for p in sorted(ROOT.glob(f"nbs/{t}[0-9]*.ipynb"))
    ]
    assert [link for link, _ in rows] == [p.relative_to(ROOT).as_posix() for p in lessons]
    for link, cell in rows:
        module = ROOT / re.sub(r"\d\d_", "", link).replace("nbs/", "brainldm/").replace(
            ".ipynb", ".py"
        )
        names = [n for part in re.findall(r"`([^`]*)`", cell) for n in part.split()]
        for name in (n for n in names if n != "brainldm"):
            assert re.search(
                rf"^(?:def|class) {name}\b|^    def {name}\b|^{name}\b", module.read_text(), re.M
            ), name


def test_make_lab_opens_the_first_notebook():
    "As README says."
    first = sorted(o.name for o in (ROOT / "nbs").glob("[0-9]*.ipynb"))[0]
    recipe = (ROOT / "Makefile").read_text().split("\nlab:")[1].split("\n\n")[0]
    assert f"jupyter lab nbs/{first}" in recipe
