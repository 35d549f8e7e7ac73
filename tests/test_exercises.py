"""Every lesson asks its readers to do something, and its own answers pass its own checks
(`nbdev_test` runs the hidden cells that do it)."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted(
    p
    for p in (Path(__file__).parents[1] / "nbs").rglob("[0-9]*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)


def parts(notebook):
    "Prose of a lesson, its open code cells and its hidden ones."
    cells = json.loads(notebook.read_text())["cells"]
    text = ["".join(c["source"]) for c in cells]
    code = [t for c, t in zip(cells, text) if c["cell_type"] == "code"]
    hidden = [t for t in code if re.match(r"#\|\s*hide", t)]
    return (
        "\n".join(t for c, t in zip(cells, text) if c["cell_type"] == "markdown"),
        [t for t in code if t not in hidden],
        hidden,
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_exercises(notebook):
    prose, shown, hidden = parts(notebook)
    numbers = re.findall(r"\*\*Exercise (\d)\.", prose)
    assert numbers == [str(i + 1) for i in range(len(numbers))] and 3 <= len(numbers) <= 5
    assert (
        prose.count("<details>") == prose.count("</details>") >= len(numbers)
    ), "an answer folded away for each"
    for n in numbers:
        assert sum(f"def check_{n}(" in t for t in shown) == 1, f"check_{n} tells right from wrong"
        requested = [
            line for t in shown for line in t.splitlines() if re.match(rf"check_{n}\(", line)
        ]
        assert requested and all(
            "None" in line for line in requested
        ), f"check_{n} waits for the reader's answer"
        assert any(
            re.search(rf"\bcheck_{n}\((?!None)", t) for t in hidden
        ), f"the answer to exercise {n} is run"
        assert any(re.search(r"expect_fail|raises", t) for t in hidden), "a wrong answer is refused"
