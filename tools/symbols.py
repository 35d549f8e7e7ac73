"""One table of all symbols, gathered from the tables with which the lessons begin: docs/symbols.md.

python tools/symbols.py             write it
python tools/symbols.py --check     exit status 1 if it is not what the lessons say"""

import json
import re
import sys
from pathlib import Path

from docs import TRACKS, notebooks, page_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "symbols.md"
HEAD = """# Symbols

Every symbol of the course, track by track, in the order in which the lessons bring them. Each
lesson begins with its own part of this table; this page is gathered from there by
`python tools/symbols.py`. Alphabets are short: where a letter serves twice, the column on the right
says which lesson means what.

Shape letters are the same everywhere: `b` batch, `c` channels, `h w` rows and columns of a slice,
`x y z` axes of a scan (to the right, to the front, up), `n` how many.

"""
TABLE = ["| symbol | in code | meaning | lesson |", "|---|---|---|---|"]


def cells_of(line):
    "The cells of a row; a bar inside of code or maths is written with a backslash."
    return [o.strip() for o in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def rows(path):
    "Symbol, code and meaning of each row of a lesson's table."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"][:8]:
        lines = "".join(cell["source"]).splitlines()
        start = next(
            (i for i, line in enumerate(lines) if re.match(r"\|\s*symbol\s*\|", line)), None
        )
        if cell["cell_type"] != "markdown" or start is None:
            continue
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            symbol, *code, meaning = cells_of(line)
            yield symbol, " ".join(o for o in code if o not in ("", "–", "any")), meaning


def page():
    "The whole page, track by track: a symbol stands where it is explained first."
    lines = []
    for track, caption in TRACKS.items():
        lines += ["", f"## {caption}", "", *TABLE]
        for path in notebooks(track):
            lesson = f"[{path.stem.split('_')[0]}](../{page_of(path)}.ipynb)"
            lines += [f"| {' | '.join(row)} | {lesson} |" for row in rows(path)]
    return HEAD + "\n".join(lines).lstrip("\n") + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            None
            if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
            else "symbols: docs/symbols.md is stale. Run `make export`."
        )
    PAGE.write_text(page(), encoding="utf-8")
