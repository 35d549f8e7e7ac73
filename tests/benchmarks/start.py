"""How long each light path takes, beside `import torch`: median and quartiles of runs side by
side.

python tests/benchmarks/start.py [--rounds 9]

Every round starts each path once in a fresh process, in another order, so a busy machine slows
all of them alike. Aims: every `--help` at most 0.3 of `import torch`, `import
brainldm.sampling` at most 1.25."""

import argparse
import random
import statistics
import subprocess
import sys
import time

PATHS = {
    "import torch": ["-c", "import torch"],
    "import brainldm": ["-c", "import brainldm"],
    "import brainldm.engineering.configs": ["-c", "import brainldm.engineering.configs"],
    "brainldm --help": ["-m", "brainldm.engineering.cli", "--help"],
    "brainldm train autoencoder --help": [
        "-m",
        "brainldm.engineering.cli",
        "train",
        "autoencoder",
        "--help",
    ],
    "brainldm evaluate --help": ["-m", "brainldm.engineering.cli", "evaluate", "--help"],
    "import brainldm.engineering.layers": ["-c", "import brainldm.engineering.layers"],
    "import brainldm.vae": ["-c", "import brainldm.vae"],
    "import brainldm.sampling": ["-c", "import brainldm.sampling"],
}


def seconds(arguments):
    "Wall-clock seconds of one fresh process."
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes of each path")
    rounds = parser.parse_args().rounds
    taken = {path: [] for path in PATHS}
    for i in range(rounds + 1):
        for path in random.sample(list(PATHS), len(PATHS)):
            once = seconds(PATHS[path])
            if i:  # the first round fills the disk cache
                taken[path].append(once)
    ratios = {
        path: [t / torch for t, torch in zip(taken[path], taken["import torch"])] for path in PATHS
    }
    print(
        f"| path, {rounds} runs each | seconds | quartiles | of `import torch` | quartiles"
        " |\n|---|---|---|---|---|"
    )
    for path in PATHS:
        low, middle, high = statistics.quantiles(taken[path], n=4)
        less, ratio, more = statistics.quantiles(ratios[path], n=4)
        print(
            f"| `{path}` | {middle:.2f} | {low:.2f} to {high:.2f} | {ratio:.2f} | {less:.2f} to"
            f" {more:.2f} |"
        )


if __name__ == "__main__":
    main()
