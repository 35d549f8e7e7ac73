"""What the check of alignment sees: false alarms on aligned brains, hits on each kind of damage,
pairs of one subject under two names, and its cost.

python tests/benchmarks/alignment.py [--data FOLDER] [--phantoms 40] [--subjects 2000]

FOLDER holds `images/case_CCC_slice_S.jpg`: real aligned subjects. Without it, phantoms alone."""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from brainldm.engineering import alignment as a
from brainldm.engineering.configs import DataConfig, PhantomConfig
from brainldm.engineering.phantom import make_cohort, make_subject

POSITIONS = (2, 6, 10, 14, 17, 21, 25, 29)  # of 32 slices, 1 mm apart
ROUNDS = 8  # A kind of damage is done to every eighth subject, eight times


def read_real(folder):
    "Slices of every subject (n, k, h, w)."
    images = Path(folder) / "images"
    cases = sorted({p.name.split("_")[1] for p in images.glob("case_*_slice_*.jpg")})
    names = [[images / f"case_{c}_slice_{k}.jpg" for k in POSITIONS] for c in cases]
    return np.stack([[np.asarray(Image.open(p).convert("L")) for p in row] for row in names])


def make_phantoms(n, size):
    "The same of synthetic subjects."
    config = PhantomConfig(num_subjects=n, num_slices=len(POSITIONS), size=size)
    return np.stack([make_subject(config, i).vol for i in range(n)])


def move(vol, matrix=None, shift=(0, 0)):
    "Turn or scale about the middle, and shift, in pixels; what leaves the image is lost."
    matrix = np.eye(2) if matrix is None else matrix
    center = (np.array(vol.shape[1:]) - 1) / 2
    offset = center - matrix @ (center + shift)
    out = [ndimage.affine_transform(o.astype(float), matrix, offset, order=1) for o in vol]
    return np.stack(out).round().astype(np.uint8)


def turn(degrees):
    "A rotation (2, 2)."
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s], [s, c]])


def to_square(vol):
    "Pad to a square, as other axis orders need."
    h, w = vol.shape[1:]
    side = max(h, w)
    sides = [((side - n) // 2, side - n - (side - n) // 2) for n in (h, w)]
    return np.pad(vol, ((0, 0), *sides))


def add_skull(vol, scalp=190):
    "A dark ring of bone, 8 mm, and a bright one of scalp, 6 mm."
    out = []
    for image in vol:
        brain = ndimage.binary_fill_holes(image > 25)
        mm = ndimage.distance_transform_edt(~brain) * 208 / max(image.shape)
        head = np.where(brain, image, np.where(mm <= 8, 12, np.where(mm <= 14, scalp, 0)))
        out.append(head.astype(np.uint8))
    return np.stack(out)


def visit_again(vol, rng):
    "The same head again: 2 pixels of 1 mm, 3 degrees, 15 % gain, 10 % bias, noise of 6."
    mm = max(vol.shape[1:]) / 208
    out = move(vol, turn(rng.uniform(-3, 3)), rng.uniform(-2, 2, 2) * mm).astype(float)
    y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in vol.shape[1:]], indexing="ij")
    out *= (1 + rng.uniform(-0.15, 0.15)) * (
        1 + 0.1 * (rng.uniform(-1, 1) * y + rng.uniform(-1, 1) * x)
    )
    noisy = np.where(out > 12, out + rng.normal(0, 6, out.shape), out)
    return noisy.clip(0, 255).round().astype(np.uint8)


def kinds(mm):
    "Damage by name; `mm` is pixels per millimeter."
    return {
        "half the size": lambda v: move(v, np.eye(2) / 0.5),
        "three quarters of the size": lambda v: move(v, np.eye(2) / 0.75),
        "3 cm forward": lambda v: move(v, shift=(30 * mm, 0)),
        "3 cm back": lambda v: move(v, shift=(-30 * mm, 0)),
        "2 cm to the side": lambda v: move(v, shift=(0, 20 * mm)),
        "front to back": lambda v: v[:, ::-1],
        "turned by 180 degrees": lambda v: v[:, ::-1, ::-1],
        "slices reversed": lambda v: v[::-1],
        "upside down": lambda v: v[::-1, ::-1],
        "another axis order (x, y)": lambda v: v.transpose(0, 2, 1),
        "turned by 90 degrees": lambda v: np.rot90(v, 1, (1, 2)),
        "turned by 40 degrees": lambda v: move(v, turn(40)),
        "skull left": add_skull,
        "skull left, dim scalp": lambda v: add_skull(v, 110),
        "8 mm too low": lambda v: np.concatenate([v[2:], v[-1:], v[-1:]]),
        "8 mm too high": lambda v: np.concatenate([v[:1], v[:1], v[:-2]]),
        "left to right (cannot be seen)": lambda v: v[:, :, ::-1],
    }


def shrink(volumes):
    "Small copies (n, k, 48, 48)."
    texts = [a.describe_slice(o) for vol in volumes for o in np.ascontiguousarray(vol)]
    shape = (len(volumes), -1, a.SIDE, a.SIDE)
    return a.read_descriptions(texts).astype(np.float32).reshape(shape)


def units_of(n, split="train"):
    "Names of n brains."
    return pd.DataFrame(
        dict(subject=[f"{i:03d}" for i in range(n)], split=split, path="", slices=8)
    )


def judge(slices):
    "(faulty, noted) brains and the comparison."
    n = len(slices)
    pose = a.measure_pose(slices)
    compared = a.compare_brains(a.straighten(slices, pose), pose, np.array(POSITIONS))
    side_cm = a.LENGTH_CM / pose.length.median()
    brains = a.Brains(units_of(n), slices, np.array(POSITIONS), -np.ones(slices.shape[1]), [])
    rim = a.measure_rim(slices)
    faults, _, bad = a.find_unaligned(brains.units, compared, side_cm)
    cohort = len(faults) > 0 and not bad.any()
    shown = compared.assign(shift_cm=compared["shift"] * side_cm, rim=rim, length=pose.length)
    better = compared[["gain", "rise"]].max(axis=1).clip(lower=0)
    usual = (compared.similarity + better).median()
    noted = [bool(a.explain_pose(o, usual, 0)) for o in shown.itertuples()]
    return bad | (rim < a.RIM[1]), np.array(noted) | (rim < a.RIM[0]), cohort, shown, faults


def report_damage(name, volumes):
    "A table of hits for one data set."
    volumes = np.stack([to_square(v) for v in volumes])
    base, n = shrink(volumes), len(volumes)
    bad, noted, cohort, shown, _ = judge(base)
    print(
        f"\n**{name}**, {n} subjects, aligned: {bad.sum()} faults, {noted.sum()} noted, cohort"
        f" fault {cohort}"
    )
    ratio = np.maximum(shown.ratio, 1 / shown.ratio)
    print(
        f"length {shown.length.median():.3f} of the side; center within {shown.shift_cm.max():.2f}"
        f" cm (median {shown.shift_cm.median():.2f}), size within {ratio.max() - 1:.1%} (median"
        f" {ratio.median() - 1:.1%}), direction within {shown.turn.max():.1f} degrees, similarity"
        f" {shown.similarity.min():.2f} (median {shown.similarity.median():.2f}), gain"
        f" {shown.gain.max():.2f}, rise {shown.rise.max():.2f}, rim {shown.rim.min():.2f}"
    )
    print(
        "\n| damage | faults | noted | of | others blamed | shift cm | ratio | turn | similarity |"
        " gain | rise | rim |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for kind, change in kinds(volumes.shape[-1] / 208).items():
        other = shrink([change(v) for v in volumes])
        hit, note, blamed, rows = 0, 0, 0, []
        for i in range(ROUNDS):
            at = np.arange(n) % ROUNDS == i
            bad, noted, cohort, shown, _ = judge(np.where(at[:, None, None, None], other, base))
            hit, note = hit + bad[at].sum(), note + (noted & ~bad)[at].sum()
            blamed += bad[~at].sum() + n * cohort
            rows.append(shown[at])
        o = pd.concat(rows)
        print(
            f"| {kind} | {hit} | {note} | {n} | {blamed} | {o.shift_cm.min():.1f}+ |"
            f" {o.ratio.median():.2f} | {o.turn.min():.0f}+ | {o.similarity.max():.2f}- |"
            f" {o.gain.min():.2f}+ | {o.rise.min():.2f}+ | {o.rim.max():.2f}- |"
        )
    return volumes, base


def report_cohorts(volumes, rng):
    "Cohorts in which nobody is aligned."
    mm = volumes.shape[-1] / 208
    ways = {
        "as it is": lambda v: v,
        "centers scatter by 1 cm (SD)": lambda v: move(v, shift=rng.normal(0, 10 * mm, 2)),
        "centers scatter by 2 cm": lambda v: move(v, shift=rng.normal(0, 20 * mm, 2)),
        "turned by 20 degrees (SD)": lambda v: move(v, turn(rng.normal(0, 20))),
        "sizes scatter by 20 %": lambda v: move(v, np.eye(2) * np.exp(rng.normal(0, 0.2))),
        "half of them front to back": lambda v: v[:, ::-1] if rng.random() < 0.5 else v,
        "half of them half the size": lambda v: (
            move(v, np.eye(2) / 0.5) if rng.random() < 0.5 else v
        ),
        "levels scatter by up to 8 mm": lambda v: v[
            np.clip(np.arange(len(v)) + rng.integers(-2, 3), 0, len(v) - 1)
        ],
        "skull left in all": add_skull,
    }
    print("\n| cohort | faults | what |\n|---|---|---|")
    for name, change in ways.items():
        slices = shrink([change(v) for v in volumes])
        bad, noted, cohort, _, faults = judge(slices)
        skull = (a.measure_rim(slices) < a.RIM[1]).mean()
        text = faults.detail.iloc[0][:150] if cohort else f"{bad.sum()} brains, {noted.sum()} noted"
        print(f"| {name} | {'cohort' if cohort else bad.sum()} | {text}; skull {skull:.0%} |")


def report_pairs(name, volumes, base, rng):
    "The same head again, beside different heads."
    n = len(volumes)
    again = shrink([visit_again(v, rng) for v in volumes])
    both = np.concatenate([base, again])
    straight = a.straighten(both, a.measure_pose(both))
    middle = np.median(straight[:n], 0)
    inside = middle > a.FOREGROUND * np.percentile(middle, 99)
    brains = straight[:, inside]
    left = brains / brains.mean(1, keepdims=True)
    left = left - left[:n].mean(0)
    upper = np.triu_indices(n, 1)
    for what, o in (("correlation", brains), ("without the mean", left)):
        r = a.correlate(o, o)
        same, other = r[np.arange(n), n + np.arange(n)], r[:n, :n][upper]
        print(
            f"{name}, {what}: same head {same.min():.3f} to {same.max():.3f}; {len(other)} pairs of"
            f" different ones, median {np.median(other):.3f}, SD {other.std():.3f}, at most"
            f" {other.max():.3f}"
        )
    pairs = a.find_similar_pairs(straight, np.arange(2 * n))
    true = sum(j - i == n for i, j, _ in pairs)
    print(f"{name}: {true} of {n} repeats found, {len(pairs) - true} wrong pairs")
    alone = a.find_similar_pairs(straight[:n], np.arange(n))
    print(f"{name}: without repeats {len(alone)} pairs")


def write_sets(folder, volumes):
    "Data sets to check, by name."
    import nibabel as nib
    from nilearn.datasets import load_mni152_template

    config = PhantomConfig(num_subjects=10, num_slices=32, size=128)
    sets = {"10 x 32 PNG of 128 x 128": make_cohort(folder / "png", config, progress=False)}
    for i, vol in enumerate(volumes):
        for k, image in enumerate(vol):
            path = folder / f"jpeg/keras_png_slices_train/case_{i:03d}_slice_{k}.nii.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, "JPEG", quality=90)
    n, k, h, w = volumes.shape
    sets[f"{n} x {k} JPEG of {h} x {w}"] = folder / "jpeg"
    template = load_mni152_template(resolution=1)
    voxels = np.asarray(template.dataobj, np.float32)
    (folder / "nifti").mkdir()
    for i in range(6):
        noisy = voxels * (1 + 0.02 * np.random.default_rng(i).standard_normal(voxels.shape))
        image = nib.Nifti1Image((1000 * noisy).astype(np.int16), template.affine)
        nib.save(image, folder / f"nifti/sub-{i}.nii.gz")
    sets["6 volumes of 1 mm"] = folder / "nifti"
    return sets


def report_cost(volumes, subjects, rng):
    "Seconds of the comparison in a large cohort, and of a check with and without."
    from tempfile import TemporaryDirectory

    from brainldm import data
    from brainldm.engineering import layouts

    base = shrink(volumes)
    at = rng.integers(0, len(base), subjects)
    many = (base[at] + rng.normal(0, 4, (subjects, *base.shape[1:]))).clip(0, 255).astype(np.uint8)
    rows = pd.DataFrame(
        dict(
            subject=f"{i}",
            slice=k,
            plane=-1,
            split="train",
            path=f"{i}_{k}",
            _copy=a.describe_slice(o),
        )
        for i, brain in enumerate(many)
        for k, o in enumerate(brain)
    )
    start = time.process_time()
    a.check_alignment(rows, 208)
    print(
        f"\n{subjects} subjects, {len(rows)} described slices: {time.process_time() - start:.1f} s"
    )
    with TemporaryDirectory() as tmp:
        for name, root in write_sets(Path(tmp), volumes).items():
            find, check, taken = layouts.find_described, data.check_alignment, {True: [], False: []}
            for i in range(6):
                for on in (True, False):
                    layouts.find_described = find if on else lambda rows: np.zeros(len(rows), bool)
                    data.check_alignment = (
                        check if on else lambda rows, *o: (rows, a.as_faults([]), [])
                    )
                    start = time.process_time()
                    data.check_dataset(root, DataConfig(), progress=False)
                    taken[on] += [time.process_time() - start] * (i > 0)
            layouts.find_described, data.check_alignment = find, check
            on, off = (np.median(taken[o]) for o in (True, False))
            print(f"check of {name}: {on:.2f} s with, {off:.2f} s without, {on / off:.2f} times")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of real aligned subjects")
    parser.add_argument("--phantoms", type=int, default=40, help="synthetic subjects")
    parser.add_argument("--size", type=int, default=128, help="their pixels a side")
    parser.add_argument(
        "--subjects", type=int, default=2000, help="size of the cohort that is timed"
    )
    o = parser.parse_args()
    rng = np.random.default_rng(0)
    sets = {"phantom": make_phantoms(o.phantoms, o.size)}
    if o.data:
        sets["real"] = read_real(o.data)
    for name, volumes in sets.items():
        volumes, base = report_damage(name, volumes)
        report_cohorts(volumes, rng)
        report_pairs(name, volumes, base, rng)
    report_cost(volumes, o.subjects, rng)


if __name__ == "__main__":
    main()
