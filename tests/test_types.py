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
    assert out.stdout.lstrip().startswith("{"), out.stdout + out.stderr
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
from pathlib import Path

from torch import Tensor
from typing_extensions import assert_type

import brainldm
from brainldm import AEConfig, BrainLDM, BrainVolumes, CodeSampler, DataConfig, LDMConfig
from brainldm import AutoencoderKL, NoiseSchedule, PhantomConfig, UNet, add_noise, denoise
from brainldm import evaluate, make_cohort, open_dataset, report, train_autoencoder, train_ldm

brain = BrainLDM.load_pretrained('phantom-128')
assert_type(brain, BrainLDM)
assert_type(BrainLDM.load('run'), BrainLDM)
assert_type(BrainLDM.from_pretrained('user/name'), BrainLDM)
assert_type(BrainVolumes.load('run'), BrainVolumes)
assert_type(CodeSampler.load('run'), CodeSampler)
assert_type(brain.save_pretrained('folder'), Path)

image = brain.sample(4, diagnosis='AD', slice=20, age=75, seed=1)
assert_type(image, Tensor)
assert_type(brain.image_to_image(image, 0.5, diagnosis='NC'), Tensor)
assert_type(brain.counterfactual(image, dict(diagnosis='NC')), Tensor)
assert_type(brain.interpolate(image[:1], image[1:2], 5), Tensor)
assert_type(brain.reconstruct(image), Tensor)
assert_type(brain.sample_stage1(2), Tensor)

schedule = NoiseSchedule()
assert_type(add_noise(image, image, image.long(), schedule.abar), Tensor)
assert_type(denoise(lambda x, t: x, image, schedule, 20), Tensor)
print(UNet(8), AutoencoderKL(8), PhantomConfig(), LDMConfig(), brainldm.__version__)

data = open_dataset('folder', DataConfig(size=64))
autoencoder = train_autoencoder(data, 'run', AEConfig())
autoencoder.eval()
train_ldm(data, 'run', LDMConfig()).eval()
evaluate('run', data)
report('run')
make_cohort('out', PhantomConfig())
"""


def test_public_names_have_the_types_that_they_promise(project):
    for old in project.glob("*.py"):
        old.unlink()
    (project / "uses.py").write_text(USES, encoding="utf-8")
    assert errors(checked("-p", project)) == []


def test_package_has_no_type_error_outside_of_the_modules_that_still_have_some():
    "pyrightconfig.json names those; a module that is clean leaves its list and stays clean."
    assert errors(checked()) == []
