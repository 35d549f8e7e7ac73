"""The source distribution builds, and the wheel made from it alone works: version, shipped
weights, command."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    "Run a command; a failure shows what it printed."
    out = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, **options
    )
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel made from it), built from the files that git tracks, so that nothing untracked
    helps."""
    source, to = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    # wheel from the sdist
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", to, source)
    return next(to.glob("*.tar.gz")), next(to.glob("*.whl"))


def test_sdist_holds_what_it_is_built_from(built):
    with tarfile.open(built[0]) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE", "constraints.txt"} <= names


def test_wheel_holds_every_module_and_weight(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    tracked = run("git", "ls-files", "brainldm", cwd=ROOT).splitlines()
    assert {n for n in tracked} <= names


def test_installed_wheel_generates_an_image(built, tmp_path):
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        tmp_path / "site",
        built[1],
    )
    code = (
        "import brainldm, sys; assert brainldm.__file__.startswith(sys.argv[1]),"
        " brainldm.__file__\nfrom brainldm.sampling import BrainLDM\nimage ="
        " BrainLDM.load_pretrained('phantom-128').sample(1, steps=2,"
        " seed=0)\nprint(brainldm.__version__, tuple(image.shape), bool(image.isfinite().all()))"
    )
    env = dict(os.environ, PYTHONPATH=str(tmp_path / "site"), OMP_NUM_THREADS="1")
    out = run(sys.executable, "-c", code, tmp_path / "site", env=env, cwd=tmp_path)
    assert out.split()[-5:] == ["(1,", "1,", "128,", "128)", "True"]
    assert "usage" in run(
        sys.executable, "-m", "brainldm.engineering.cli", "--help", env=env, cwd=tmp_path
    )


COURSE = ("IPython", "ipywidgets", "jupyterlab", "umap", "voila")  # modules of the extra `course`
WITHOUT_COURSE = f"""
import sys
sys.modules.update(dict.fromkeys({COURSE!r}))                          # as if not installed
from brainldm.engineering.cli import main
assert main(['phantom', 'cohort', '--num-subjects', '3', '--num-slices', '1', '--size', '16']) == 0
assert main(['check', 'cohort', '--size', '16']) == 0
import brainldm.sampling, brainldm.training, brainldm.engineering.report
from brainldm.analysis import embed
try:
    embed([[0, 1]] * 20)
except ImportError as e:
    print(e)
sys.exit(main(['explore', 'nowhere']))
"""


def test_library_works_without_the_course(tmp_path):
    env = dict(os.environ, BRAINLDM_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, "-c", WITHOUT_COURSE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1, done.stdout + done.stderr
    hint = (
        "is not installed. Expected the packages of the extra 'course'. Try pip install"
        " 'brainldm[course]'."
    )
    assert f"embed: umap {hint}" in done.stdout
    assert f"explore: ipywidgets {hint}" in done.stderr


def test_course_packages_are_an_extra(built):
    with zipfile.ZipFile(built[1]) as archive:
        name = next(n for n in archive.namelist() if n.endswith("METADATA"))
        lines = [
            n for n in archive.read(name).decode().splitlines() if n.startswith("Requires-Dist")
        ]
    for package in ("ipywidgets", "jupyterlab", "umap-learn", "voila"):
        wanted = [line for line in lines if line.split()[1].startswith(package)]
        assert len(wanted) == 1 and 'extra == "course"' in wanted[0]
