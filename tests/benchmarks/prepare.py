"""What the preparation of raw heads costs, and what its gate lets through.

python tests/benchmarks/prepare.py [--subjects 5] [--damaged 3] [--heads FOLDER] [--voxel-scale 1]

Good heads (synthetic, in five axis orders and voxel sizes, and those of --heads, in any layout)
should pass; each kind of damage should be refused, for each head. Prints seconds a head on one
thread, peak memory, and hits and misses by kind; the command for the numbers in this folder's
README."""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch

from brainldm.engineering.checks import DataFault
from brainldm.engineering.heads import ORIENTATIONS, VOXELS, head_around_template, synthetic_head
from brainldm.engineering.prepare import LIMITS, load_template, prepare_head
from brainldm.engineering.sources import find_heads, read_head


def moved(stored, place, **change):
    "A head with other voxels or another affine."
    return nib.Nifti1Image(
        np.ascontiguousarray(change.get("voxels", stored)), change.get("affine", place)
    )


def scaled(affine, factors):
    "The affine of voxels that are larger by a factor for each axis."
    return affine @ np.diag([*factors, 1.0])


def brain_top(voxels, affine):
    "First plane above the brain, from the bright side of the scalp: the head's top less 20 mm."
    bright = np.argwhere(voxels > 0.3 * voxels.max())[:, 2].max()
    return int(bright - 20 / np.linalg.norm(affine[:3, 2]))


def hounsfield(voxels):
    "A head as a CT shows it: bone bright, brain of one gray, air at -1000."
    light = voxels / np.percentile(voxels[voxels > 0], 99)
    units = np.where(light < 0.03, -1000, np.where(light < 0.3, 900, 35))
    return (units + np.random.default_rng(0).normal(0, 15, voxels.shape)).astype(np.float32)


def label_map(voxels):
    "Tissue classes in place of intensities."
    return np.digitize(voxels, np.percentile(voxels[voxels > 50], (20, 50, 80))).astype(np.float32)


DAMAGE = {
    "upside down": lambda v, a: moved(v, a, voxels=v[:, :, ::-1]),
    "back to front": lambda v, a: moved(v, a, voxels=v[:, ::-1]),
    "axes y and z exchanged": lambda v, a: moved(v, a, voxels=v.transpose(0, 2, 1)),
    "axes x and y exchanged": lambda v, a: moved(v, a, voxels=v.transpose(1, 0, 2)),
    "voxels said to be 1.4 times larger": lambda v, a: moved(v, a, affine=scaled(a, [1.4] * 3)),
    "voxels said to be 0.7 times larger": lambda v, a: moved(v, a, affine=scaled(a, [0.7] * 3)),
    "one axis said to be 1.6 times longer": lambda v, a: moved(v, a, affine=scaled(a, [1, 1, 1.6])),
    "vertex cut off": lambda v, a: moved(v, a, voxels=v[:, :, : brain_top(v, a)]),
    "contrast inverted": lambda v, a: moved(v, a, voxels=np.where(v > 60, v.max() - v, v)),
    "CT": lambda v, a: moved(v, a, voxels=hounsfield(v)),
    "CT shifted to 0": lambda v, a: moved(v, a, voxels=hounsfield(v) + 1000),
    "label map": lambda v, a: moved(v, a, voxels=label_map(v)),
    "half the size (a monkey's)": lambda v, a: moved(v, a, affine=scaled(a, [0.45] * 3)),
    "noise": lambda v, a: moved(v, a, voxels=np.random.default_rng(0).permuted(v)),
}


def try_head(image):
    "CPU seconds, measures and the reasons why a head was refused."
    start = time.process_time()
    try:
        found = prepare_head(image)
        return time.process_time() - start, found.measures, found.reasons
    except DataFault as e:
        return time.process_time() - start, {}, [f"{e.kind}: {e}"]


def good_heads(config):
    "Name and image of each head that should pass."
    rng = np.random.default_rng(config.seed)
    for i in range(config.subjects):
        axes, voxel_mm = ORIENTATIONS[i % 5], np.multiply(VOXELS[i % 5], config.voxel_scale)
        tilt, shift = tuple(rng.normal(0, 8, 3)), tuple(rng.normal(0, 8, 3))
        ventricle_mm = float(rng.uniform(0, 6))
        image = synthetic_head(
            config.seed + i, tuple(voxel_mm), axes, tilt, shift, ventricle_mm=ventricle_mm
        )
        yield f"synthetic {axes}, {' x '.join(f'{o:.2g}' for o in voxel_mm)} mm", image
    if config.heads is None:
        return
    for row in find_heads(config.heads).table.to_dict("records"):
        with tempfile.TemporaryDirectory() as work:
            yield row["subject"], read_head(config.heads, row, Path(work))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=5, help="synthetic heads")
    parser.add_argument("--damaged", type=int, default=3, help="heads that are damaged, each kind")
    parser.add_argument("--heads", type=Path, help="folder of real heads, in any layout")
    parser.add_argument("--voxel-scale", type=float, default=1.0, help="2: coarse and fast")
    parser.add_argument("--seed", type=int, default=0, help="other subjects")
    parser.add_argument("--kinds", nargs="*", default=list(DAMAGE), help="kinds of damage")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="for prepare.json"
    )
    config = parser.parse_args()
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    load_template()
    head_around_template()
    names = list(LIMITS)
    print(f"| head | CPU seconds | {' | '.join(names)} | verdict |\n|{'---|' * (len(names) + 3)}")
    rows, images = [], []
    for name, image in good_heads(config):
        seconds, measures, reasons = try_head(image)
        rows.append(dict(head=name, seconds=seconds, measures=measures, reasons=reasons))
        numbers = " | ".join(f"{measures[o]:.3g}" if measures else "–" for o in names)
        verdict = "; ".join(reasons) or "passed"
        print(f"| {name} | {seconds:.1f} | {numbers} | {verdict} |", flush=True)
        images.append(image)
    taken = [o["seconds"] for o in rows]
    passed = sum(not o["reasons"] for o in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{passed} of {len(rows)} good heads pass; {statistics.median(taken):.1f} CPU seconds a"
        " head"
    )
    print(f"(median of {len(rows)}, one thread); peak memory {peak:.1f} GiB\n")
    print("| damage | refused | by |\n|---|---|---|")
    misses = []
    for kind in config.kinds:
        broken = []
        for image in images[: config.damaged]:
            turned = nib.as_closest_canonical(image)
            voxels = np.asarray(turned.dataobj).reshape(turned.shape[:3]).astype(np.float32)
            broken.append(try_head(DAMAGE[kind](voxels, turned.affine))[2])
        hits = sum(bool(o) for o in broken)
        by = sorted({reason.split(";")[0].split(":")[0] for o in broken for reason in o})
        shown = ", ".join(
            dict.fromkeys(o.split(" ")[0] if o.split(" ")[0] in LIMITS else o for o in by)
        )
        print(f"| {kind} | {hits} of {len(broken)} | {shown} |", flush=True)
        rows.append(dict(damage=kind, refused=hits, of=len(broken), by=shown))
        misses += [kind] * (hits < len(broken))
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "prepare.json").write_text(json.dumps(rows, indent=1))
    return 1 if misses or passed < len(images) else 0


if __name__ == "__main__":
    sys.exit(main())
