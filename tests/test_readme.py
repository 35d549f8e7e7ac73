"""What the README shows is there and runs."""
import re
import subprocess
import sys
from pathlib import Path

from brainldm.sampling import BrainLDM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tiny_run):
    "The python block, on the tests' tiny run: another folder, a slice and an age that its few people have."
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    age = next(c for c in BrainLDM.load(tiny_run[0]).covariates if c.name == "age").range[0]
    for old, new in (("runs/demo/run", str(tiny_run[0])), ("slice=20", "slice=3"), ("age=75", f"age={age}"), ("sample(4", "sample(2")):
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(code, names)
    assert names["ad"].shape == names["nc"].shape == (2, 1, 64, 64)


def test_links_and_targets_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"(?:^|`)make ([a-z]+)", README, re.M):
        assert target in targets


def test_the_commands_it_names_exist():
    helped = subprocess.run([sys.executable, "-m", "brainldm.cli", "--help"], capture_output=True, text=True, check=True).stdout
    for command in set(re.findall(r"\bbrainldm ([a-z]+)\b", README)):
        assert command in helped
