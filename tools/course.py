"""Run the lessons in order with their long cells and store what they print and sample; say how
long each took.

python tools/course.py                    every lesson
python tools/course.py 07 16              these lessons, by number
python tools/course.py core               a track: core, advanced or engineering
python tools/course.py --short 07 16      without their long cells, whose stored outputs stay

Cells marked `#| gpu` run where there is one; elsewhere their stored outputs stay. What progress
bars drew is not stored. A lesson that fails is left as it was, and the exit status is 1. Times
of whole lessons go to docs/course.json, from which the site tells them."""

import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import torch
from docs import TRACKS, notebooks, shown_output, streams_joined
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
TIMES = ROOT / "docs" / "course.json"


def number(path):
    "The number of a lesson: 13 of advanced/13_factors.ipynb."
    return path.stem.split("_")[0]


def chosen(names):
    "Notebooks to run, in the order of reading, by number or track."
    found = {p: {number(p), t.lower()} for k, t in TRACKS.items() for p in notebooks(k)}
    unknown = sorted(set(names) - set().union(*found.values()))
    if unknown:
        raise SystemExit(
            f"course: no lesson {', '.join(unknown)}. Expected some of"
            f" {' '.join(map(number, found))}, or {', '.join(TRACKS.values()).lower()}."
        )
    return [p for p, known in found.items() if not names or known & set(names)]


def set_aside(cells, marks):
    "Empty the cells that shall not run; what they held, by id."
    found = {
        c["id"]: (c.source, c.outputs)
        for c in cells
        if c.cell_type == "code" and re.match(rf"#\|\s*({'|'.join(marks)})\b", c.source)
    }
    for cell in cells:
        if cell["id"] in found:
            cell.source = "pass"
    return found


def stored(outputs):
    """Outputs as a reader shall find them: no widgets, no passed states of progress bars, one text
    where there were several."""
    kept = [
        shown_output(o)
        for o in outputs
        if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
    ]
    return [nbformat.from_dict(o) for o in streams_joined([o for o in kept if o is not None])]


def run(path, marks):
    "Execute a notebook, write it back with its outputs, clean. Seconds that it took."
    doc, start = nbformat.read(path, 4), time.time()
    aside = set_aside(doc.cells, marks)
    NotebookClient(
        doc, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell in (c for c in doc.cells if c.cell_type == "code"):
        cell.source, cell.outputs = aside.get(cell["id"], (cell.source, cell.outputs))
        cell.outputs = stored(cell.outputs)
    doc.metadata.pop("widgets", None)
    took = time.time() - start
    nbformat.write(doc, path)
    subprocess.run(
        [Path(sys.executable).parent / "nbdev_clean", "--fname", path], cwd=ROOT, check=True
    )
    return took


def main(numbers):
    "Run what was asked for. Exit status."
    short = "--short" in numbers
    numbers, marks = [n for n in numbers if n != "--short"], ["slow"] * short + ["gpu"] * (
        not torch.cuda.is_available()
    )
    known = json.loads(TIMES.read_text()) if TIMES.is_file() else {}
    where = (
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()},"
        f" {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    )
    paths, times = chosen(numbers), {}
    for path in (bar := tqdm(paths, unit="lesson")):
        bar.set_description(path.stem)
        try:
            times[path.stem] = run(path, marks or ["none"])
            if not short:
                known[number(path)] = dict(seconds=round(times[path.stem]), where=where)
        except CellExecutionError as e:
            bar.write(f"{path.stem}: {e}")
        TIMES.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    for path in paths:
        print(
            f"{path.stem:20}"
            f" {'%5.1f min' % (times[path.stem] / 60) if path.stem in times else 'failed'}"
        )
    print(f"together {sum(times.values()) / 60:.0f} minutes on {where}")
    return len(times) < len(paths)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
