"""What type checkers say: of the examples that readers copy, of the public names, and of the
package itself.

The checker is basedpyright in pyright's own mode (pyrightconfig.json): pyright as a wheel that
needs no download."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import brainldm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOL = shutil.which("basedpyright", path=str(Path(sys.executable).parent)) or shutil.which(
    "basedpyright"
)
pytestmark = pytest.mark.skipif(
    TOOL is None, reason="basedpyright is not installed; it comes with the extra dev"
)


def checked(*command, cwd=ROOT):
    "What the checker says, as it says it to programs."
    command = [TOOL, "--pythonpath", sys.executable, "--outputjson", *map(str, command)]
    out = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert out.stdout.startswith("{"), out.stdout + out.stderr
    return json.loads(out.stdout)


def errors(said):
    "The errors as lines: file, line, message."
    found = [d for d in said["generalDiagnostics"] if d["severity"] == "error"]
    return [
        f"{Path(d['file']).name}:{d['range']['start']['line'] + 1} {d['message'].splitlines()[0]}"
        for d in found
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the settings of this project, which finds the package as an installed one is
    found."""
    folder = tmp_path_factory.mktemp("types")
    settings = json.loads((ROOT / "pyrightconfig.json").read_text())
    (folder / "pyrightconfig.json").write_text(
        json.dumps(settings | dict(include=["."], extraPaths=[str(ROOT)]))
    )
    return folder


def test_examples_of_the_pages_have_no_type_error(project):
    for page in PAGES:
        for i, code in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        ):
            (project / f"{page.stem}_{i}.py").write_text(code, encoding="utf-8")
    assert list(project.glob("README_*.py"))
    assert errors(checked("-p", project)) == []


USES = """
import brainldm
from brainldm import BrainLDM, NoiseSchedule, open_dataset, train_ldm
from typing_extensions import assert_type
from torch import Tensor

brain = BrainLDM.load_pretrained('phantom-128')
assert_type(brain, BrainLDM)
assert_type(BrainLDM.load('run'), BrainLDM)
assert_type(BrainLDM.from_pretrained('user/name'), BrainLDM)
assert_type(brain.sample(4, diagnosis='AD', slice=20, age=75, seed=1), Tensor)
"""


def test_package_has_no_type_error():
    assert errors(checked()) == []


def test_types_of_public_names_are_known():
    said = checked("--verifytypes", "brainldm", "--ignoreexternal")["typeCompleteness"]["symbols"]
    named = {getattr(getattr(brainldm, n), "__module__", "") + "." + n for n in brainldm.__all__}
    unknown = [
        s["name"]
        for s in said
        if not s["isTypeKnown"] and any(f"{s['name']}.".startswith(f"{n}.") for n in named)
    ]
    assert unknown == []
