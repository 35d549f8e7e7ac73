"brainldm.engineering.alignment: brains that lie elsewhere, skulls, one subject under two names."

import importlib
import os
import re
import shutil
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from brainldm.data import check_dataset, open_dataset
from brainldm.engineering import alignment as a
from brainldm.engineering.configs import DataConfig, PhantomConfig
from brainldm.engineering.phantom import make_subject

OASIS = Path(__file__).parents[1] / '../shared/data/oasis1'
CONFIG = PhantomConfig(num_subjects=10, num_slices=6, size=64, seed=5)
DATA = DataConfig(size=32, validate_fraction=0.2, test_fraction=0.2)


@pytest.fixture(scope='module')
def bench():
    "The benchmark: it knows how to damage a brain."
    sys.path.insert(0, str(Path(__file__).parent / 'benchmarks'))
    try:
        return importlib.import_module('alignment')
    finally:
        sys.path.pop(0)


@pytest.fixture(scope='module')
def cohort():
    "Ten synthetic subjects (n, k, h, w)."
    return np.stack([make_subject(CONFIG, i).vol for i in range(10)])


def write_images(root, volumes, names=None, splits=None):
    "A manifest of PNG slices."
    rows = []
    for i, vol in enumerate(volumes):
        name = names[i] if names else f'sub-{i:02d}'
        for k, image in enumerate(vol):
            path = root / f'images/{i}_{k}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(image)).save(path)
            row = dict(path=f'images/{i}_{k}.png', subject=name, slice=k)
            if names and names.count(name) > 1:
                row['session'] = f'ses-{i}'
            rows.append(row | (dict(split=splits[i]) if splits else {}))
    pd.DataFrame(rows).to_csv(root / 'manifest.csv', index=False)
    return root


def write_volumes(root, volumes, affine=None):
    "NIfTI volumes, on the grid of the phantom's slices."
    from brainldm.engineering.phantom import volume_affine

    affine = volume_affine(CONFIG) if affine is None else affine
    root.mkdir(parents=True, exist_ok=True)
    for i, vol in enumerate(volumes):
        data = np.ascontiguousarray(np.moveaxis(vol[:, ::-1], (0, 1, 2), (2, 1, 0)))
        image = nib.Nifti1Image(data, affine)
        image.set_sform(affine, 'mni')
        nib.save(image, root / f'sub-{i:02d}.nii.gz')
    return root


def check(root):
    return check_dataset(root, DATA, progress=False)


def other_kinds(report):
    "Faults by kind, and notes about alignment, stripping and heads."
    said = [o for o in report.notes if 'brain' in o or 'head' in o]
    return sorted(report.faults.fault), said


@pytest.mark.parametrize('write', [write_images, write_volumes])
def test_aligned_subjects_are_fine(write, cohort, tmp_path):
    report = check(write(tmp_path / 'data', cohort))
    assert other_kinds(report) == ([], [])
    assert '_copy' not in report.manifest


KINDS = [
    'half the size',
    'three quarters of the size',
    '3 cm forward',
    '2 cm to the side',
    'front to back',
    'upside down',
    'slices reversed',
    'another axis order (x, y)',
    'turned by 40 degrees',
]


@pytest.mark.parametrize('write', [write_images, write_volumes])
@pytest.mark.parametrize('kind', KINDS)
def test_one_wrong_brain_is_named(kind, write, bench, cohort, tmp_path):
    volumes = cohort.copy()
    volumes[3] = bench.kinds(64 / 208)[kind](cohort[3])
    report = check(write(tmp_path / 'data', volumes))
    kinds, _ = other_kinds(report)
    assert kinds == ['alignment']
    assert report.faults.detail[0].startswith('the brain of sub-03 (6 slices)')
    assert report.manifest.subject.nunique() == 9  # its slices are left out
    assert 'sub-03' not in set(report.manifest.subject)


def test_what_is_wrong_is_said_in_words(bench, cohort, tmp_path):
    damage = bench.kinds(64 / 208)
    said = {}
    for kind in ('half the size', '2 cm to the side', 'upside down'):
        volumes = cohort.copy()
        volumes[3] = damage[kind](cohort[3])
        said[kind] = check(write_volumes(tmp_path / kind, volumes)).faults.detail[0]
    assert re.search('size is 5.% of theirs', said['half the size'])
    assert 'center is' in said['2 cm to the side'] and 'cm' in said['2 cm to the side']
    assert 'fits better upside down' in said['upside down']
    assert all('brainldm prepare' in o for o in said.values())


def test_left_for_right_cannot_be_seen(cohort, tmp_path):
    volumes = cohort.copy()
    volumes[3] = cohort[3][:, :, ::-1]
    assert check(write_images(tmp_path, volumes)).ok


def test_images_without_a_front_are_not_turned_around(tmp_path):
    "Ellipses with waves in them: nothing says which end is the front, so no flip is claimed."
    x, y = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))
    shell = np.clip(1 - (x / 0.7) ** 2 - (y / 0.85) ** 2, 0, None) ** 0.5
    waves = [1 + 0.2 * np.sin(9 * x + i) + 0.2 * np.cos(7 * y + i) for i in range(6)]
    volumes = [np.stack([(180 * shell * o).astype(np.uint8)] * 3) for o in waves]
    for volume, noise in zip(volumes, np.random.default_rng(0).integers(0, 9, (6, 3, 64, 64))):
        volume[:] = np.where(volume > 0, volume + noise, 0)
    assert 'alignment' not in set(check(write_images(tmp_path, volumes)).faults.fault)


@pytest.mark.parametrize('way', ['scattered', 'half front to back', 'sizes', 'turned'])
def test_a_cohort_without_alignment_is_one_fault(way, bench, cohort, tmp_path):
    rng = np.random.default_rng(1)
    volumes = []
    for i, vol in enumerate(cohort):
        change = {
            'scattered': lambda v: bench.move(v, shift=rng.normal(0, 6, 2)),
            'half front to back': lambda v: v[:, ::-1] if i % 2 else v,
            'sizes': lambda v: bench.move(v, np.eye(2) * np.exp(rng.normal(0, 0.25))),
            'turned': lambda v: bench.move(v, bench.turn(9 * i - 40)),
        }[way]
        volumes.append(change(vol))
    report = check(write_images(tmp_path, volumes))
    assert report.faults.fault.tolist() == ['alignment']
    assert report.faults.path[0] == '10 brains' and 'aligned brains' in report.faults.detail[0]
    assert any('was not looked for' in o for o in report.notes)  # and it does not pass in silence
    assert report.manifest.subject.nunique() == 10
    with pytest.raises(ValueError, match='alignment: 10 brains'):
        open_dataset(tmp_path, DATA, progress=False)


@pytest.mark.parametrize('write', [write_images, write_volumes])
def test_heads_with_skull_are_a_fault(write, bench, cohort, tmp_path):
    report = check(write(tmp_path / 'all', [bench.add_skull(o) for o in cohort]))
    assert report.faults.fault.tolist() == ['skull']
    assert '10 of them look unstripped' in report.faults.detail[0]
    assert 'no fault found' not in str(report)
    volumes = cohort.copy()
    volumes[2] = bench.add_skull(cohort[2])
    report = check(write(tmp_path / 'one', volumes))
    assert report.faults.fault.tolist() == ['skull']
    assert report.faults.detail[0].startswith('sub-02 looks unstripped: a bright rim')
    assert report.manifest.subject.nunique() == 9


def test_foreground_outside_of_the_template_needs_no_rim(cohort, tmp_path):
    "A head whose scalp is as bright as what lies under it: no dark band, but too large."
    from scipy import ndimage

    volumes = np.stack(
        [
            [
                np.where(
                    im > 20, im, ndimage.grey_dilation(im, 13) * (ndimage.grey_dilation(im, 13) > 0)
                )
                for im in vol
            ]
            for vol in cohort
        ]
    ).astype(np.uint8)
    report = check(write_volumes(tmp_path, volumes))
    assert report.faults.fault.tolist() == ['skull']
    assert 'outside of the brain of MNI152' in report.faults.detail[0]


def test_brains_far_from_the_template_are_not_measured_against_it(cohort, tmp_path):
    affine = np.diag([3.25, 3.25, 6.2, 1])
    affine[:3, 3] = (500, 0, 0)
    assert check(write_volumes(tmp_path, cohort, affine)).ok


def test_one_head_under_two_names_is_a_leak_across_splits(bench, cohort, tmp_path):
    rng = np.random.default_rng(0)
    volumes = [*cohort, bench.visit_again(cohort[0], rng)]
    splits = ['train'] * 8 + ['validate'] * 2
    report = check(write_images(tmp_path / 'across', volumes, splits=[*splits, 'validate']))
    assert report.faults.fault.tolist() == ['leak']
    detail = report.faults.detail[0]
    assert 'sub-10 (validate)' in detail and 'sub-00 (train)' in detail
    with pytest.raises(ValueError, match='a leak'):
        open_dataset(tmp_path / 'across', DataConfig(size=32, skip_faulty=True), progress=False)
    report = check(write_images(tmp_path / 'within', volumes, splits=[*splits, 'train']))
    assert report.ok
    assert any('sub-00 and sub-10' in o for o in report.notes)
    names = [f'sub-{i:02d}' for i in range(10)] + ['sub-00']
    report = check(write_images(tmp_path / 'one', volumes, names))
    assert other_kinds(report) == ([], [])  # two sessions under one name


def test_few_subjects(cohort, tmp_path):
    for n in (1, 2, 3):
        assert check(write_images(tmp_path / str(n), cohort[:n])).ok
    # no copy, but the same head
    twice = [cohort[0], cohort[0][:, ::-1][:, ::-1] // 2 * 2 + 1]
    twice[1][cohort[0] == 0] = 0
    report = check(write_images(tmp_path / 'twice', twice, splits=['train', 'validate']))
    assert report.faults.fault.tolist() == ['leak']


def test_brains_without_the_common_positions_are_named(cohort, tmp_path):
    root = write_images(tmp_path, cohort)
    rows = pd.read_csv(root / 'manifest.csv')
    rows = rows[(rows.subject != 'sub-04') | (rows.slice > 3)]
    rows.to_csv(root / 'manifest.csv', index=False)
    report = check(root)
    assert report.ok
    assert any(
        o.startswith('1 of 10 brains lack slice positions') and 'sub-04' in o for o in report.notes
    )


def test_a_cached_inspection_knows_the_copies(bench, cohort, tmp_path, monkeypatch):
    from brainldm.engineering import cache

    volumes = cohort.copy()
    volumes[3] = bench.kinds(64 / 208)['half the size'](cohort[3])
    root = write_images(tmp_path / 'data', volumes)
    stamp = 1_600_000_000
    for path in root.rglob('*'):
        os.utime(path, (stamp, stamp))
    config = DataConfig(size=32, skip_faulty=True)
    first = check_dataset(root, config, False, cache.CachedInspection(tmp_path / 'cache'))
    inspection = cache.CachedInspection(tmp_path / 'cache')
    monkeypatch.setattr(cache.time, 'time', lambda: stamp + 1e9)
    check_dataset(root, config, False, inspection)
    (tmp_path / 'cache').mkdir(exist_ok=True)
    inspection.keep()
    assert len(list((tmp_path / 'cache').rglob('*.json'))) == 1
    monkeypatch.setattr(cache, 'inspect_files', lambda *o: pytest.fail('inspected again'))
    monkeypatch.setattr(cache, 'inspection_key', lambda *o: (inspection.fresh[0], 0))
    again = check_dataset(root, config, False, cache.CachedInspection(tmp_path / 'cache'))
    assert again.faults.detail.tolist() == first.faults.detail.tolist()
    assert first.faults.fault.tolist() == ['alignment']


def test_described_positions_do_not_depend_on_the_order():
    rows = pd.DataFrame([dict(subject=str(i), slice=k) for i in range(5) for k in range(40)])
    mixed = rows.sample(frac=1, random_state=0)
    chosen = set(rows.slice[a.find_described(rows)])
    assert chosen == set(mixed.slice[a.find_described(mixed)]) and len(chosen) == a.DESCRIBED


def test_two_thousand_subjects_in_seconds(cohort):
    rng = np.random.default_rng(0)
    slices = rng.integers(0, 256, (2000, 8, 24, 24)).astype(np.float32)
    slices[1999] = slices[0] + rng.normal(0, 10, slices[0].shape)
    start = time.process_time()
    pairs = a.find_similar_pairs(slices, np.arange(2000))
    assert [o[:2] for o in pairs] == [(0, 1999)]
    assert time.process_time() - start < 10


def test_no_brain_at_all():
    rows = pd.DataFrame(
        dict(subject=[], slice=[], plane=[], split=[], path=[], _copy=[]), dtype=object
    )
    out, faults, notes = a.check_alignment(rows, 64)
    assert (len(out), len(faults), notes) == (0, 0, [])


@pytest.mark.skipif(not OASIS.is_dir(), reason='the 159 real subjects are not here')
def test_no_false_alarm_on_real_subjects(bench):
    "159 aligned subjects and 12,561 pairs: no fault, no note; repeats are found."
    volumes = bench.read_real(OASIS)
    base = bench.shrink(volumes)
    bad, noted, cohort, *_ = bench.judge(base)
    assert (bad.sum(), noted.sum(), cohort) == (0, 0, False)
    rng = np.random.default_rng(0)
    again = bench.shrink([bench.visit_again(o, rng) for o in volumes[:8]])
    both = np.concatenate([base, again])
    straight = a.straighten(both, a.measure_pose(both))
    pairs = a.find_similar_pairs(straight, np.arange(len(both)))
    assert sorted(o[:2] for o in pairs) == [(i, 159 + i) for i in range(8)]


@pytest.mark.skipif(not OASIS.is_dir(), reason='the 159 real subjects are not here')
def test_a_folder_of_real_subjects(tmp_path):
    "The whole way, from files: 24 subjects, one of them under a second name."
    images = OASIS / 'images'
    cases = sorted({p.name.split('_')[1] for p in images.glob('case_*_slice_*.jpg')})[:24]
    for i, case in enumerate([*cases, cases[0]]):
        part = 'validate' if i >= 20 else 'train'
        for k in range(4, 32, 5):
            to = tmp_path / f'keras_png_slices_{part}/case_{i:03d}_slice_{k}.nii.png'
            to.parent.mkdir(exist_ok=True)
            image = Image.open(images / f'case_{case}_slice_{k}.jpg')
            if i == 24:
                image = image.rotate(2, resample=Image.Resampling.BILINEAR)
            image.save(to)
    report = check(tmp_path)
    assert report.faults.fault.tolist() == ['leak']
    assert '024' in report.faults.detail[0] and '000' in report.faults.detail[0]
    assert not any('brain' in o for o in report.notes)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize('write', [write_images, write_volumes])
def test_a_brain_at_another_level_is_named(write, tmp_path):
    "Ten millimeters too high: a subject whose planes were counted from elsewhere."
    config = PhantomConfig(num_subjects=8, num_slices=16, size=64, seed=5)  # 2 mm apart
    tall = np.stack([make_subject(config, i).vol for i in range(8)])
    volumes = tall[:, 5:].copy()
    volumes[3] = tall[3, :-5]
    report = check(write(tmp_path, volumes))
    said = [*report.faults.detail, *report.notes]
    assert any('sub-03' in o and 'slices too high' in o for o in said)


def test_an_affine_that_claims_mni_and_is_wrong_is_noted(cohort, tmp_path):
    affine = np.diag([3.25, 3.25, 6.2, 1])
    affine[:3, 3] = (500, 0, 0)
    report = check(write_volumes(tmp_path, cohort, affine))
    assert any('headers say MNI152' in o and 'affine may be wrong' in o for o in report.notes)


def test_a_source_in_memory_is_compared_too(bench, cohort):
    rng = np.random.default_rng(0)
    volumes = np.concatenate([cohort, [bench.visit_again(cohort[0], rng)]])

    class Source:
        def __len__(self):
            return 6 * len(volumes)

        def read(self, i):
            return volumes[i // 6, i % 6], dict(
                subject=f'{i // 6}', slice=i % 6, split='train' if i < 60 else 'validate'
            )

    with pytest.raises(ValueError, match='leak.*looks like the same subject as 0'):
        open_dataset(Source(), DATA, progress=False)
