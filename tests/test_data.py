"brainldm.data: every layout, every fault, leaks, splits."

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from brainldm import data
from brainldm.engineering.configs import DataConfig
from brainldm.engineering.layouts import find_layout
from brainldm.data import check_dataset, open_dataset, read_manifest, split_by_subject

OASIS = Path(__file__).parents[1] / '../shared/data/oasis1'
CONFIG = DataConfig(size=32, validate_fraction=0.25, test_fraction=0.25)


def image(seed, h=40, w=32):
    "A smooth blob with a black border, another for every seed."
    gen = np.random.default_rng(seed)
    out = np.zeros((h, w), np.uint8)
    out[6:-6, 5:-5] = np.repeat(np.repeat(gen.integers(40, 255, (10, 9)), 4, 0), 4, 1)[
        : h - 12, : w - 10
    ]
    return out


def save(path, array, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kw)


def make_oasis(root, splits=dict(train=6, validate=2, test=2), slices=3):
    case = 0
    for split, n in splits.items():
        for _ in range(n):
            case += 1
            for k in range(slices):
                save(
                    root / f'keras_png_slices_{split}/case_{case:03d}_slice_{k}.nii.png',
                    image(100 * case + k),
                )
    return root


def make_adni(root, splits=dict(train=4, test=1), slices=2):
    case = 0
    for split, n in splits.items():
        for diagnosis in ('AD', 'NC'):
            for _ in range(n):
                case += 1
                for k in range(slices):
                    save(
                        root / 'AD_NC' / split / diagnosis / f'{218000+case}_{70+k}.jpeg',
                        image(100 * case + k),
                        quality=95,
                    )
    return root


def make_manifest(root, n=8, slices=2, **columns):
    rows = [
        dict(path=f'pictures/{i}-{k}.png', subject=f'{i:03d}', slice=k)
        for i in range(n)
        for k in range(slices)
    ]
    for r in rows:
        save(root / r['path'], image(100 * int(r['subject']) + r['slice']))
    table = pd.DataFrame(rows).assign(**columns)
    table.to_csv(root / 'manifest.csv', index=False)
    return root


def make_volume(path, vol=None, affine=np.diag([2.0, 2.0, 2.0, 1.0]), dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    vol = np.stack([image(7 + k).T for k in range(5)], -1) if vol is None else vol
    nib.save(nib.Nifti1Image(vol.astype(dtype), affine), path)
    return path


def look(root, config=CONFIG):
    return check_dataset(root, config, progress=False)


def faults(report):
    return sorted(set(report.faults.fault))


# ---- layouts


def test_oasis(tmp_path):
    report = look(make_oasis(tmp_path))
    assert report.ok and find_layout(tmp_path) == 'oasis'
    m = report.manifest
    assert list(m.columns[:6]) == ['path', 'plane', 'subject', 'slice', 'diagnosis', 'split']
    assert m.groupby('split').subject.nunique().to_dict() == dict(train=6, validate=2, test=2)
    assert m.subject[0] == '001' and (m.plane == -1).all() and m.diagnosis.isna().all()
    assert 'oasis: 10 subjects, 30 slices' in str(report) and '40 x 32 (30)' in str(report)


@pytest.mark.parametrize(
    'make, old, new, split',
    [
        (make_oasis, 'keras_png_slices_test', 'keras_png_slices_Test', 'test'),
        (make_adni, 'AD_NC/test', 'AD_NC/TEST', 'test'),
    ],
)
def test_case_of_a_split_folder_does_not_matter(make, old, new, split, tmp_path):
    (make(tmp_path) / old).rename(tmp_path / new)
    report = look(tmp_path)
    assert report.ok and set(report.manifest.split) == {'train', 'validate', split}


def test_case_of_a_volumes_name_does_not_matter(tmp_path):
    for i in range(4):
        make_volume(
            tmp_path / f'{i}.nii.gz', np.stack([image(10 * i + k).T for k in range(5)], -1)
        ).rename(tmp_path / f'{i}.NII.GZ')
    report = look(tmp_path)
    assert report.ok and find_layout(tmp_path) == 'nifti' and report.manifest.subject.nunique() == 4


def test_a_folder_may_begin_with_dots(tmp_path):
    make_manifest(tmp_path)
    (tmp_path / 'pictures').rename(tmp_path / '..pictures')
    text = (tmp_path / 'manifest.csv').read_text()
    (tmp_path / 'manifest.csv').write_text(text.replace('pictures/', '..pictures/'))
    assert look(tmp_path).ok
    (tmp_path / 'manifest.csv').write_text(text.replace('pictures/', 'a/../../pictures/'))
    with pytest.raises(ValueError, match='leads out of its folder'):
        look(tmp_path)


def test_oasis_label_maps_ignored_and_said(tmp_path):
    make_oasis(tmp_path)
    save(tmp_path / 'keras_png_slices_seg_train/seg_001_slice_0.nii.png', image(0))
    (tmp_path / 'readme.txt').write_text('x')
    report = look(tmp_path)
    assert (
        report.ok
        and any('1 label maps' in o for o in report.notes)
        and any('readme.txt' in o for o in report.notes)
    )


@pytest.mark.parametrize('split', data.SPLITS)
def test_one_split_only(tmp_path, split):
    make_oasis(tmp_path, {split: 6})
    ds = open_dataset(tmp_path, CONFIG, progress=False, cache_dir=tmp_path / 'cache')
    assert set(ds.manifest.split) == ({'train', 'validate'} if split == 'train' else {split})


def test_oasis_one_folder_down(tmp_path):
    make_oasis(tmp_path / 'keras_png_slices_data')
    assert len(look(tmp_path).manifest) == 30


def test_adni_carves_validate_from_train(tmp_path):
    make_adni(tmp_path)
    m = look(tmp_path).manifest
    assert m.groupby('split').subject.nunique().to_dict() == dict(train=6, validate=2, test=2)
    assert m[m.split == 'validate'].groupby('diagnosis').subject.nunique().to_dict() == dict(
        AD=1, NC=1
    )
    assert (m.path.str.contains('/test/') == (m.split == 'test')).all()
    first = m.iloc[0]
    assert first.path.endswith(f'{first.subject}_{first.slice}.jpeg') and first.slice >= 70
    assert len(look(tmp_path / 'AD_NC').manifest) == len(m)


def test_manifest_file_or_folder(tmp_path):
    make_manifest(tmp_path, diagnosis='MCI', split='train', weight=3)
    a, b = look(tmp_path).manifest, look(tmp_path / 'manifest.csv').manifest
    pd.testing.assert_frame_equal(a, b)
    assert set(a.diagnosis) == {'MCI'} and (a.weight == 3).all() and a.attrs['layout'] == 'manifest'
    ds = open_dataset(
        tmp_path / 'manifest.csv', CONFIG, progress=False, cache_dir=tmp_path / 'cache'
    )
    assert set(ds.manifest.split) == {'train', 'validate'}


def test_manifest_of_volume_planes(tmp_path):
    make_volume(tmp_path / 'a.nii.gz')
    make_volume(tmp_path / 'b.nii', np.stack([image(90 + k).T for k in range(5)], -1))
    pd.DataFrame(
        dict(path=['a.nii.gz', 'b.nii', 'a.nii.gz'], subject=['1', '1', '1'], slice=[3, 3, 1])
    ).to_csv(tmp_path / 'manifest.csv')
    report = look(tmp_path)
    assert report.ok and report.manifest.plane.tolist() == [1, 3, 3]


def test_phantom_layout(tmp_path):
    (tmp_path / 'phantom.json').write_text('{}')
    make_manifest(tmp_path)
    (tmp_path / 'manifest.csv').rename(tmp_path / 'slices.csv')
    pd.DataFrame(
        dict(subject=[f'{i:03d}' for i in range(8)], diagnosis=['AD', 'NC'] * 4, age=range(60, 68))
    ).to_csv(tmp_path / 'subjects.csv', index=False)
    m = look(tmp_path).manifest
    assert m.attrs['layout'] == 'phantom'
    assert m[m.split == 'test'].drop_duplicates('subject').diagnosis.tolist() in (
        ['AD', 'NC'],
        ['NC', 'AD'],
    )


def test_phantom_cohort(tmp_path):
    phantom = pytest.importorskip('brainldm.engineering.phantom')
    for form in ('png', 'nifti'):
        phantom.make_cohort(
            tmp_path / form,
            phantom.PhantomConfig(num_subjects=6, num_slices=2, size=64, format=form),
            progress=False,
        )
    reports = [look(tmp_path / form) for form in ('png', 'nifti')]
    assert all(o.ok for o in reports), str(reports)
    a, b = (o.manifest.sort_values(['subject', 'slice']) for o in reports)
    assert a.hash.tolist() == b.hash.tolist()  # the two formats hold the same images
    assert a.age.notna().all() and set(a.diagnosis) == {'AD', 'NC'}


@pytest.mark.skipif(not OASIS.exists(), reason='shared/data/oasis1 is not beside the repository')
@pytest.mark.parametrize('layout', ['keras', 'adni'])
def test_real_layouts(tmp_path, layout):
    subprocess.run(
        [sys.executable, OASIS / 'make_layout.py', layout, tmp_path / 'in', '--limit', '4'],
        check=True,
        capture_output=True,
    )
    config = DataConfig(size=64)
    report = look(tmp_path / 'in', config)
    assert report.ok and report.manifest.attrs['layout'] == dict(keras='oasis', adni='adni')[layout]
    assert report.manifest.subject.nunique() == 4 and len(report.manifest) == 128
    assert report.manifest.age.notna().all() and report.manifest.diagnosis.notna().all()
    ds = open_dataset(tmp_path / 'in', config, progress=False, cache_dir=tmp_path / 'cache')
    assert [o.name for o in ds.covariates] == ['slice', 'diagnosis', 'age', 'sex']
    assert ds.subset('train')[0]['image'].shape == (1, 64, 64)


# ---- subjects.csv


def with_table(root, text):
    make_oasis(root)
    (root / 'subjects.csv').write_text(text)
    return root


def test_covariates_joined_by_subject(tmp_path):
    report = look(
        with_table(tmp_path, 'subject,diagnosis,age,sex\n001,AD,70,F\n002,NC,,M\n3,NC,55,F\n')
    )
    m = report.manifest.drop_duplicates('subject').set_index('subject')
    assert m.age['001'] == 70 and np.isnan(m.age['002']) and m.sex['002'] == 'M'
    assert pd.isna(m.diagnosis['003'])  # '3' is not '003'
    note = next(o for o in report.notes if 'without a row' in o)
    assert note.startswith('8 subjects') and '003' in note and 'names like 001' in note


def test_subjects_option_wins(tmp_path):
    with_table(tmp_path / 'in', 'subject,age\n001,70\n')
    (tmp_path / 'other.csv').write_text('\ufeffsubject, age\n001, 71\n')
    m = look(tmp_path / 'in', DataConfig(size=32, subjects=tmp_path / 'other.csv')).manifest
    assert m.age[m.subject == '001'].iloc[0] == 71


@pytest.mark.parametrize(
    'text,contains',
    [
        ('subject,age\n001,old\n', "age 'old' of subject '001', line 2"),
        ('subject,age\n001,60\n002,-3\n', "age '-3' of subject '002', line 3"),
        ('subject,age\n001,inf\n', "age 'inf'"),
        ('subject,age\n001,60\n001,61\n', "'001' has several rows"),
        ('name,age\n001,60\n', 'Expected also subject'),
        ('subject;age,x\n001;60,1\n', 'commas'),
        ('subject,age\n,60\n', 'line 2 of'),
        ('', 'does not read as a table'),
        ('subject,slice\n001,3\n', 'column slice'),
    ],
)
def test_bad_table(tmp_path, text, contains):
    with pytest.raises(ValueError, match='.') as e:
        look(with_table(tmp_path, text))
    assert contains in str(e.value)


def test_missing_table(tmp_path):
    with pytest.raises(FileNotFoundError):
        look(make_oasis(tmp_path), DataConfig(subjects=tmp_path / 'no.csv'))


def test_diagnosis_disagrees(tmp_path):
    make_adni(tmp_path)
    (tmp_path / 'subjects.csv').write_text('subject,diagnosis\n218001,NC\n')
    with pytest.raises(ValueError, match="'218001' has diagnosis AD .* and NC"):
        look(tmp_path)


def test_split_column_of_table(tmp_path):
    make_manifest(tmp_path)
    table = pd.DataFrame(
        dict(
            subject=[f'{i:03d}' for i in range(8)],
            split=['train'] * 5 + ['validate'] * 2 + ['test'],
        )
    )
    table.to_csv(tmp_path / 'subjects.csv', index=False)
    m = look(tmp_path).manifest
    assert m.groupby('split').subject.nunique().to_dict() == dict(train=5, validate=2, test=1)
    table.assign(split='valid').to_csv(tmp_path / 'subjects.csv', index=False)
    with pytest.raises(ValueError, match="split 'valid'"):
        look(tmp_path)
    table.iloc[:4].to_csv(tmp_path / 'subjects.csv', index=False)
    with pytest.raises(ValueError, match='has no split'):
        look(tmp_path)
    make_oasis(tmp_path / 'oasis')
    table.assign(subject=[f'{i+1:03d}' for i in range(8)], split='test').to_csv(
        tmp_path / 'oasis/subjects.csv', index=False
    )
    report = look(tmp_path / 'oasis')
    assert (report.manifest.split == 'train').sum() == 18 and any(
        'not used' in o for o in report.notes
    )


# ---- faults


def test_missing_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        look(tmp_path / 'no')
    with pytest.raises(ValueError, match='holds nothing'):
        look(tmp_path)
    (tmp_path / 'AD_NC/train/AD').mkdir(parents=True)
    with pytest.raises(ValueError, match='holds no scan'):
        look(tmp_path)
    (tmp_path / 'x.txt').write_text('x')
    with pytest.raises(ValueError, match='is one file'):
        look(tmp_path / 'x.txt')


def break_file(path, options):
    if options == 'unreadable':
        path.write_text('this is text')
    if options == 'empty file':
        path.write_bytes(b'')
    if options == 'blank':
        save(path, np.full((40, 32), 9, np.uint8))
    if options == 'truncated':
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
    if options == 'color':
        save(path, np.stack([image(1), image(2), image(3)], -1))
    if options == '16-bit':
        Image.fromarray(image(1).astype(np.uint16) * 200).save(path, format='PNG')
    if options == 'size':
        save(path, image(1, 44, 36))
    if options == 'name':
        path.rename(path.with_name('scan.png'))
    if options == 'duplicate':
        shutil.copy(path.with_name('case_002_slice_0.nii.png'), path)


@pytest.mark.parametrize(
    'options,kind',
    [
        ('unreadable',) * 2,
        ('empty file', 'empty'),
        ('blank', 'empty'),
        ('truncated',) * 2,
        ('color',) * 2,
        ('16-bit',) * 2,
        ('size',) * 2,
        ('name',) * 2,
        ('duplicate',) * 2,
    ],
)
def test_fault(tmp_path, options, kind, capsys):
    root = make_oasis(tmp_path / 'in')
    bad = root / 'keras_png_slices_train/case_001_slice_0.nii.png'
    break_file(bad, options)
    before = {o: o.read_bytes() for o in root.rglob('*.png')}
    report = look(root)
    assert faults(report) == [kind] and not report.ok, str(report)
    assert f'fault: {kind}' in str(report)
    with pytest.raises(ValueError, match='--skip-faulty'):
        open_dataset(root, CONFIG, progress=False, cache_dir=tmp_path / 'cache')
    assert not list((tmp_path / 'cache').rglob('*'))  # nothing is prepared of data that are refused
    capsys.readouterr()
    ds = open_dataset(
        root, DataConfig(size=32, skip_faulty=True), progress=False, cache_dir=tmp_path / 'cache'
    )
    assert (
        f'{len(report.faults)} faults; faulty files are left out' in capsys.readouterr().out
        and len(ds) == 30 - len(report.faults)
    )
    assert before == {o: o.read_bytes() for o in root.rglob('*.png')}


def test_truncated_jpeg(tmp_path):
    make_adni(tmp_path)
    path = next(tmp_path.rglob('*.jpeg'))
    path.write_bytes(path.read_bytes()[:-300])
    report = look(tmp_path)
    assert (
        faults(report) == ['truncated']
        and report.faults.path[0] == path.relative_to(tmp_path).as_posix()
    )


def test_colour_made_grey_on_request(tmp_path):
    root = make_oasis(tmp_path)
    path = root / 'keras_png_slices_train/case_001_slice_0.nii.png'
    same = look(root).manifest.hash
    gray = image(100)
    save(path, np.stack([gray] * 3, -1))
    assert look(root, DataConfig(to_gray=True)).manifest.hash.equals(same)


def test_all_faults_at_once_and_nothing_left(tmp_path):
    root = make_oasis(tmp_path, dict(train=3), slices=1)
    for i, options in enumerate(('unreadable', 'color', 'blank')):
        break_file(root / f'keras_png_slices_train/case_{i+1:03d}_slice_0.nii.png', options)
    report = look(root)
    assert (
        faults(report) == ['color', 'empty', 'unreadable']
        and len(report.manifest) == 0
        and '3 faults found' in str(report)
    )
    with pytest.raises(ValueError, match='no slice left'):
        open_dataset(root, DataConfig(skip_faulty=True), progress=False)


def test_missing_file_of_manifest(tmp_path):
    make_manifest(tmp_path)
    (tmp_path / 'pictures/0-0.png').unlink()
    assert faults(look(tmp_path)) == ['missing']


@pytest.mark.parametrize(
    'column,value', [('slice', 'x'), ('slice', 1.5), ('slice', -2), ('subject', '')]
)
def test_bad_manifest(tmp_path, column, value):
    make_manifest(tmp_path, **{column: value})
    with pytest.raises(ValueError):
        look(tmp_path)


# ---- leaks


def test_leak_by_name(tmp_path):
    root = make_oasis(tmp_path)
    save(root / 'keras_png_slices_test/case_001_slice_9.nii.png', image(991))
    report = look(root)
    assert (
        faults(report) == ['leak']
        and len(report.faults) == 4
        and '001' not in set(report.manifest.subject)
    )
    assert 'subject 001 is in test and train' in str(report)
    for skip in (False, True):
        config = DataConfig(size=32, skip_faulty=skip)
        with pytest.raises(ValueError, match='a leak'):
            open_dataset(root, config, progress=False)
        with pytest.raises(ValueError, match='a leak'):
            read_manifest(root, config)


def test_leak_by_identical_pictures(tmp_path):
    root = make_oasis(tmp_path)
    # other bytes, same pixels as case 001
    save(root / 'keras_png_slices_test/case_077_slice_5.nii.png', image(100), compress_level=0)
    report = look(root)
    assert faults(report) == ['leak'] and len(report.faults) == 2
    assert set(report.faults.path.str.extract(r'case_(\d+)')[0]) == {'001', '077'}
    with pytest.raises(ValueError, match='a leak'):
        open_dataset(root, DataConfig(skip_faulty=True), progress=False)


def test_leak_in_manifest(tmp_path):
    make_manifest(tmp_path, n=2, slices=2, split=['train', 'test', 'train', 'train'])
    with pytest.raises(ValueError, match='subject 000 is in test and train'):
        read_manifest(tmp_path)


def test_copies_within_a_subject_keep_the_first(tmp_path):
    root = make_oasis(tmp_path)
    save(root / 'keras_png_slices_train/case_001_slice_1.nii.png', image(100))
    report = look(root)
    assert report.faults.path.tolist() == [
        'keras_png_slices_train/case_001_slice_1.nii.png'
    ] and faults(report) == ['duplicate']


# ---- splits


def people(n, ad=0.5):
    return pd.DataFrame(
        dict(
            subject=[f'{i:04d}' for i in range(n)],
            diagnosis=['AD' if i < ad * n else 'NC' for i in range(n)],
        )
    )


def test_split_is_stratified_seeded_and_blind_to_order():
    m = people(200, ad=0.2)
    s = split_by_subject(m, dict(validate=0.1, test=0.2), seed=3)
    assert s.split.value_counts().to_dict() == dict(train=140, test=40, validate=20)
    assert pd.crosstab(s.split, s.diagnosis).AD.to_dict() == dict(train=28, test=8, validate=4)
    again = split_by_subject(
        m.sample(frac=1, random_state=0), dict(validate=0.1, test=0.2), seed=3
    ).sort_index()
    assert again.split.equals(s.split)
    assert not split_by_subject(m, dict(validate=0.1, test=0.2), seed=4).split.equals(s.split)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7])
def test_few_subjects(n):
    got = set(split_by_subject(people(n), dict(validate=0.1, test=0.1)).split)
    assert got == (set(data.SPLITS) if n >= 3 else {'train'})


def test_fraction_zero_and_huge():
    assert set(split_by_subject(people(5), dict(validate=0.2, test=0)).split) == {
        'train',
        'validate',
    }
    assert set(split_by_subject(people(4), dict(validate=0.49, test=0.5)).split) == set(data.SPLITS)


def test_million_rows_are_quick():
    rows = pd.DataFrame(
        dict(
            path=[f'{i}.png' for i in range(1_000_000)],
            subject=np.repeat([f's{i}' for i in range(20_000)], 50),
            diagnosis='NC',
        )
    )
    start = time.time()
    s = split_by_subject(rows, dict(validate=0.1, test=0.1))
    assert not len(data.find_leaks(s)) and time.time() - start < 20


@pytest.mark.parametrize(
    'kw',
    [
        dict(size=0),
        dict(crop=1),
        dict(planes=(5, 5)),
        dict(planes=(-1, 5)),
        dict(validate_fraction=-0.1),
        dict(validate_fraction=0.5, test_fraction=0.5),
    ],
)
def test_bad_config(kw):
    with pytest.raises(ValueError):
        DataConfig(**kw)


# ---- volumes


def test_planes_and_foreground(tmp_path):
    vol = np.stack([image(7 + k).T for k in range(6)], -1)
    vol[..., [0, 5]] = 0
    make_volume(tmp_path / 'a.nii.gz', vol)
    report = look(tmp_path)
    assert (
        report.ok
        and report.manifest.slice.tolist() == [1, 2, 3, 4]
        and any('2 planes without' in o for o in report.notes)
    )
    assert look(tmp_path, DataConfig(planes=(2, 4))).manifest.plane.tolist() == [2, 3]
    assert faults(look(tmp_path, DataConfig(planes=(0, 2)))) == ['empty']
    assert faults(look(tmp_path, DataConfig(planes=(2, 40)))) == ['planes']


def turned(degrees):
    a = np.deg2rad(degrees)
    out = np.diag([2.0, 2.0, 2.0, 1.0])
    out[:3, :3] = out[:3, :3] @ [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    return out


def float_head():
    return np.stack([image(7 + k).T for k in range(5)], -1).astype(np.float32)


@pytest.mark.parametrize(
    'kind,vol,affine',
    [
        ('nan', np.where(np.arange(5) == 2, np.nan, float_head()), turned(0)),
        ('nan', np.where(np.arange(5) == 2, np.inf, float_head()), turned(0)),
        ('negative', float_head() - 100, turned(0)),
        ('empty', 0 * float_head(), turned(0)),
        ('shape', np.stack([float_head()] * 2, -1), turned(0)),
        ('voxels', float_head(), np.diag([1.0, 2.0, 2.0, 1.0])),
        ('oblique', float_head(), turned(30)),
    ],
)
def test_faulty_volume(tmp_path, kind, vol, affine):
    make_volume(tmp_path / 'sub-02.nii.gz', vol, affine, np.float32)
    report = look(tmp_path)
    assert faults(report) == [kind] and len(report.faults) == 1, str(report)


# ---- grids


def other_head(i):
    return np.stack([image(10 * i + k).T for k in range(5)], -1)


def shifted(z):
    out = np.diag([2.0, 2.0, 2.0, 1.0])
    out[2, 3] = z
    return out


@pytest.mark.parametrize(
    'affine, shape, said',
    [
        (
            np.diag([1.0, 1.0, 1.0, 1.0]),
            None,
            'voxels 1 x 1 x 1 mm, and 4 of 5 volumes have voxels 2 x 2 x 2 mm',
        ),
        (np.diag([2.0, 2.0, 5.0, 1.0]), None, 'voxels 2 x 2 x 5 mm'),
        (
            shifted(60),
            None,
            'origin (0.0, 0.0, 60.0) mm, and 4 of 5 volumes have origin (0.0, 0.0, 0.0) mm',
        ),
        (turned(6), None, 'axes leaning by 0.0, 6.0, 6.0 degrees'),
        (
            np.diag([2.0, 2.0, 2.0, 1.0]),
            4,
            'matrix 32 x 40 x 4, and 4 of 5 volumes have matrix 32 x 40 x 5',
        ),
    ],
)
def test_another_grid_is_a_fault(tmp_path, affine, shape, said):
    for i in range(4):
        make_volume(tmp_path / f'sub-{i:02d}.nii.gz', other_head(i))
    make_volume(tmp_path / 'sub-09.nii.gz', other_head(9)[..., :shape], affine)
    report = look(tmp_path)
    assert faults(report) == ['grid'] and report.faults.path.tolist() == ['sub-09.nii.gz'], str(
        report
    )
    assert said in report.faults.detail[0] and report.voxel_mm == (2, 2)
    with pytest.raises(ValueError, match='grid'):
        read_manifest(tmp_path)


def test_no_majority_of_grids_blames_everybody(tmp_path):
    for i in range(4):
        make_volume(tmp_path / f'sub-{i:02d}.nii.gz', other_head(i), shifted(60 * (i % 2)))
    report = look(tmp_path)
    assert faults(report) == ['grid'] and len(report.faults) == 4 and report.voxel_mm is None
    assert 'No grid has a majority' in str(report)


def test_grids_of_a_manifest_are_compared(tmp_path):
    for i in range(3):
        make_volume(tmp_path / f'{i}.nii', other_head(i), shifted(20 * (i == 2)))
    rows = pd.DataFrame(
        dict(
            path=[f'{i}.nii' for i in range(3) for _ in range(2)],
            subject=list('001122'),
            slice=[0, 1] * 3,
            plane=[1, 3] * 3,
        )
    )
    rows.to_csv(tmp_path / 'manifest.csv', index=False)
    report = look(tmp_path)
    # every second plane
    assert report.faults.path.tolist() == ['2.nii'] and report.voxel_mm == (2, 4)


def test_stored_otherwise_and_rounded_is_one_grid(tmp_path):
    affine = shifted(10)
    make_volume(tmp_path / 'sub-01.nii.gz', other_head(1), affine)
    turn = nib.orientations.axcodes2ornt('LPS')
    flip = nib.orientations.ornt_transform(nib.io_orientation(affine), turn)
    other = affine @ nib.orientations.inv_ornt_aff(flip, (32, 40, 5))
    make_volume(
        tmp_path / 'sub-02.nii.gz', nib.orientations.apply_orientation(other_head(2), flip), other
    )
    make_volume(tmp_path / 'sub-03.nii.gz', other_head(3), affine + np.diag([1e-4, 0, 0, 0]))
    report = look(tmp_path)
    assert report.ok and report.voxel_mm == (2, 2), str(report)


def test_pictures_have_no_voxel_size(tmp_path):
    assert look(make_oasis(tmp_path)).voxel_mm is None


@pytest.mark.parametrize('more', [(1,), (1, 1)])
def test_4d_with_one_frame_is_one_volume(tmp_path, more):
    for i in range(3):
        make_volume(tmp_path / f'a{i}.nii.gz', other_head(i))
        make_volume(tmp_path / f'b{i}.nii.gz', other_head(i).reshape(32, 40, 5, *more))
    report = look(tmp_path)
    # the same voxels
    assert set(report.faults.fault) <= {'duplicate', 'leak'} and report.sizes.to_dict() == {
        '40 x 32': 30
    }


def test_volume_without_orientation_and_broken_files(tmp_path):
    img = nib.Nifti1Image(float_head(), None)
    img.header['sform_code'] = img.header['qform_code'] = 0
    nib.save(img, tmp_path / 'sub-01.nii')
    raw = make_volume(tmp_path / 'sub-02.nii.gz').read_bytes()
    (tmp_path / 'sub-02.nii.gz').write_bytes(raw[: len(raw) // 2])
    (tmp_path / 'sub-03.nii.gz').write_text('text')
    got = look(tmp_path).faults.set_index('path').fault.to_dict()
    assert got == {
        'sub-01.nii': 'orientation',
        'sub-02.nii.gz': 'truncated',
        'sub-03.nii.gz': 'unreadable',
    }


def test_two_volumes_of_a_subject(tmp_path):
    for i, name in enumerate(('sub-01_T1w.nii.gz', 'sub-01_acq-2_T1w.nii.gz', 'sub-02_T1w.nii.gz')):
        make_volume(tmp_path / name, other_head(i))
    report = look(tmp_path)
    assert (report.faults.fault == 'two volumes').sum() == 2 and set(report.manifest.subject) == {
        'sub-02'
    }
    assert '--only' in str(report) and 'sub-01_T1w, sub-01_acq-2_T1w' in str(report)
    assert set(look(tmp_path, replace(CONFIG, only='sub-??_T1w.nii*')).manifest.subject) == {
        'sub-01',
        'sub-02',
    }
    with pytest.raises(ValueError, match='matches none of 3 files'):
        look(tmp_path, replace(CONFIG, only='*FLAIR*'))


def test_enlarging_is_noted(tmp_path):
    root = make_oasis(tmp_path)
    assert any('enlarged to 64' in o for o in look(root, DataConfig(size=64)).notes)
    assert not any('enlarged' in o for o in look(root).notes)


# ---- intensities, said by the check


def test_what_was_changed_is_said(tmp_path):
    for i in range(4):
        vol = other_head(i).astype(np.float32)
        if i == 1:
            vol[vol == 0] = np.nan
        if i == 2:
            vol[vol == 0] = -0.5
        make_volume(tmp_path / f'sub-{i:02d}.nii.gz', vol, dtype=np.float32)
    report = look(tmp_path)
    assert report.ok, str(report)
    for text in (
        '1 volumes with NaN outside the brain, taken as 0, such as sub-01',
        '1 volumes with values below 0, set to 0: at most 0.2%',
    ):
        assert text in str(report), str(report)


def test_turned_pictures_are_said(tmp_path):
    root = make_oasis(tmp_path)
    path = root / 'keras_png_slices_train/case_001_slice_0.nii.png'
    exif = Image.Exif()
    exif[0x0112] = 6
    save(path, np.rot90(image(100)), exif=exif)
    report = look(root)
    assert report.ok and any('1 images turned upright' in o for o in report.notes), str(report)


@pytest.mark.parametrize('kind', ['bytes', 'an artefact'])
def test_a_dark_volume_is_named(tmp_path, kind):
    for i in range(6):
        vol = other_head(i)
        if i == 3 and kind == 'bytes':
            vol = vol // 4
        if i == 3 and kind == 'an artefact':
            vol = vol.astype(np.float32)
            vol[5:9, 6:9, :2] = 5000
        make_volume(tmp_path / f'sub-{i:02d}.nii.gz', vol, dtype=vol.dtype)
    notes = [o for o in look(tmp_path).notes if 'darker' in o]
    assert len(notes) == 1 and '1 of 6 subjects' in notes[0] and 'sub-03' in notes[0]
    make_volume(tmp_path / 'sub-03.nii.gz', other_head(3))
    assert not any('darker' in o for o in look(tmp_path).notes)
