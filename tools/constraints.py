"""Print the pip flag for constraints.txt where it was made for this Python and platform, else
nothing."""

import platform
import sys
from pathlib import Path

file = Path(__file__).parents[1] / "constraints.txt"
made_for = file.read_text().splitlines()[0]
here = (
    f"Python {sys.version_info.major}.{sys.version_info.minor}, {platform.system()}"
    f" {platform.machine()}"
)
print(f"-c {file.name}" if here in made_for else "")
