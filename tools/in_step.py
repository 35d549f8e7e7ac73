"""Exit 1 unless every notebook is clean and brainldm/ is what nbdev writes from the notebooks.

Changes nothing."""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import docstrings

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def rebuild(to):
    "Clean and export a copy of the project."
    for name in ("nbs", "brainldm", "settings.ini"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, to / name)
    for module in (to / "brainldm").rglob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([BIN / command], cwd=to, check=True)
    docstrings.write(to / "brainldm")


def differences(to):
    "Files that a clean export would change."
    names = {
        str(p.relative_to(base))
        for base in (ROOT, to)
        for kind in ("nbs/**/*.ipynb", "brainldm/**/*.py")
        for p in base.glob(kind)
    }
    same = (
        lambda n: (ROOT / n).is_file()
        and (to / n).is_file()
        and filecmp.cmp(ROOT / n, to / n, shallow=False)
    )
    return sorted(n for n in names if not same(n))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rebuild(Path(folder))
        stale = differences(Path(folder))
    sys.exit(
        "out of step: " + ", ".join(stale) + ". Edit the notebooks, then run `make export`."
        if stale
        else 0
    )
