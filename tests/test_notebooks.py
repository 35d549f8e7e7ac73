"""One test a notebook, each in its own process, so that no notebook sees another's state."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook):
    flags = os.environ.get("NB_FLAGS", "")
    env = dict(os.environ, OMP_NUM_THREADS="1" if not flags else "2", NUMBA_NUM_THREADS="1")
    command = [
        Path(sys.executable).parent / "nbdev_test",
        "--path",
        notebook,
        "--n_workers",
        "0",
        "--flags",
        flags,
    ]
    out = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600 if not flags else 5400,
    )
    assert out.returncode == 0 and "Success." in out.stdout, out.stdout + out.stderr
