"""What `check` reads directly: names of any kind by a pattern, TIFF and 16 bits, class folders,
manifests of volumes, pointers, and the remedy for what it cannot read."""

import json
import os
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_data import CONFIG, faults, image, look, make_volume, other_head, save

from brainldm.data import check_dataset, open_dataset
from brainldm.engineering.cache import CachedInspection, fingerprint
from brainldm.engineering.checks import DataFault
from brainldm.engineering.cli import main
from brainldm.engineering.configs import DataConfig
from brainldm.engineering.files import as_faults, read_gray_image
from brainldm.engineering.layouts import (
    Findings,
    describe_faults,
    find_layout,
    refuse_faults,
    suggest_pattern,
)


def by_pattern(pattern, **changes):
    return replace(CONFIG, pattern=pattern, **changes)


def make_stacks(root, name, n=5, slices=3, scale=1, kind=np.uint8):
    "Images of n subjects under names that a pattern describes; subject i is darker than the last."
    for i in range(n):
        for k in range(slices):
            pixels = image(100 * i + k).astype(float) * scale * (1 - i / 10)
            save(root / name.format(i=i, k=k, group='AD' if i % 2 else 'NC'), pixels.astype(kind))
    return root


# ---- names of any kind


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'jpeg', 'tif', 'TIFF', 'PNG'])
def test_a_pattern_reads_names_of_any_kind(tmp_path, suffix):
    make_stacks(tmp_path, 'P0{i}-z{k:03d}.' + suffix)
    report = look(tmp_path, by_pattern('{subject}-z{slice}.' + suffix.lower()))
    assert report.ok, str(report)
    m = report.manifest
    assert m.attrs['layout'] == 'pattern' and m.subject.nunique() == 5 and len(m) == 15
    assert set(m.slice) == {0, 1, 2} and (m.plane == -1).all()


def test_folders_belong_to_the_pattern(tmp_path):
    make_stacks(tmp_path / 'data', '{group}/S{i}/v1/{k}.tif')
    report = look(tmp_path, by_pattern('{diagnosis}/{subject}/{session}/{slice}.tif'))
    assert report.ok, str(report)
    m = report.manifest
    assert set(m.diagnosis) == {'AD', 'NC'} and set(m.session) == {'v1'}
    assert set(m.subject) == {f'S{i}' for i in range(5)}


def test_splits_and_stars_of_a_pattern(tmp_path):
    for split, i in (('Train', 0), ('Train', 1), ('valid', 2), ('TEST', 3)):
        for k in range(2):
            save(tmp_path / f'{split}/S{i}_x{k * 7}_{k:03d}.png', image(100 * i + k))
    report = look(tmp_path, by_pattern('{split}/{subject}_x*_{slice}.png'))
    assert report.ok and set(report.manifest.split) == {'train', 'validate', 'test'}, str(report)
    save(tmp_path / 'more/S4_x0_000.png', image(400))
    assert faults(look(tmp_path, by_pattern('{split}/{subject}_x*_{slice}.png'))) == ['name']


def test_what_does_not_fit_is_counted_and_what_fits_twice_is_a_fault(tmp_path):
    make_stacks(tmp_path, 'P0{i}-z{k}.png')
    for i in range(5):
        save(tmp_path / f'overview {i}.png', image(900 + i))
    report = look(tmp_path, by_pattern('{subject}-z{slice}.png'))
    note = next(o for o in report.notes if 'do not fit' in o)
    assert report.ok and note.startswith('5 of 20 files') and 'overview 0.png' in note
    with pytest.raises(ValueError, match='fits none of 20'):
        look(tmp_path, by_pattern('{subject}_{slice}.png'))
    make_stacks(tmp_path / 'two', 'sub-{i}-ses-1-{k}.png')
    report = look(tmp_path / 'two', by_pattern('{subject}-{session}-{slice}.png'))
    assert faults(report) == ['name'] and 'fits in two ways' in str(report)
    report = look(tmp_path / 'two', by_pattern('sub-{subject}-ses-{session}-{slice}.png'))
    assert report.ok and report.manifest.subject.nunique() == 5


@pytest.mark.parametrize(
    'pattern, said',
    [
        ('z{slice}.png', 'no {subject}'),
        ('{subject}.png', 'no {slice}'),
        ('image.png', 'no {subject} and no {slice}'),
        ('{subject}_{slice}_{age}.png', 'holds {age}'),
        ('{subject_{slice}.png', 'holds {'),
        ('{subject}{slice}.png', 'nothing between'),
        ('{subject}_{slice}.nii.gz', 'of volumes'),
    ],
)
def test_a_pattern_that_cannot_work(pattern, said, capsys):
    with pytest.raises(ValueError, match='DataConfig: pattern=') as e:
        DataConfig(pattern=pattern)
    assert said in str(e.value)


def test_subjects_counted_anew_in_every_class_are_refused(tmp_path):
    for group in ('AD', 'NC'):
        make_stacks(tmp_path, group + '/{i}/{k}.png')
    with pytest.raises(ValueError, match='has the diagnoses AD, NC'):
        look(tmp_path, by_pattern('{diagnosis}/{subject}/{slice}.png'))


def test_visits_are_not_subjects_of_a_pattern(tmp_path):
    for visit in (1, 2):
        make_stacks(tmp_path, f'OAS1_000{{i}}_MR{visit}-z{{k}}.png', slices=visit)
    assert 'subject' in faults(look(tmp_path, by_pattern('{subject}-z{slice}.png')))


def test_a_pattern_of_volumes(tmp_path):
    for i in range(4):
        make_volume(tmp_path / f'{"xy"[i % 2]}/S{i}_brain.nii.gz', other_head(i))
    config = by_pattern('{diagnosis}/{subject}_brain.nii.gz', planes=(1, 4))
    report = look(tmp_path, config)
    assert report.ok and set(report.manifest.diagnosis) == {'x', 'y'}, str(report)
    assert set(report.manifest.slice) == {1, 2, 3} and report.voxel_mm == (2, 2)


def test_any_table_that_names_subjects_of_a_pattern_is_read(tmp_path):
    make_stacks(tmp_path, 'P0{i}-z{k}.png')
    table = pd.DataFrame(dict(ID=[f'P0{i}' for i in range(5)], Group='AD', Age=range(60, 65)))
    table.to_csv(tmp_path / 'demographics.csv', index=False)
    report = look(tmp_path, by_pattern('{subject}-z{slice}.png'))
    assert report.ok and set(report.manifest.diagnosis) == {'AD'}, str(report)
    assert report.manifest.drop_duplicates('subject').age.sum() == 310


def test_a_manifest_and_a_pattern_are_refused_together(tmp_path):
    make_stacks(tmp_path, 'P0{i}-z{k}.png')
    (tmp_path / 'manifest.csv').write_text('path,subject,slice\nP00-z0.png,1,0\n')
    with pytest.raises(ValueError, match='move the manifest away'):
        look(tmp_path, by_pattern('{subject}-z{slice}.png'))


def test_the_command_takes_a_pattern_and_proposes_one(tmp_path, capsys):
    make_stacks(tmp_path / 'in', 'P0{i}-z{k:03d}.png')
    assert main(['check', str(tmp_path / 'in'), '--size', '32']) == 1
    assert "--pattern '{subject}-z{slice}.png'" in capsys.readouterr().err
    args = ['check', str(tmp_path / 'in'), '--size', '32', '--preset', 'tiny']
    main([*args, '--pattern', '{subject}-z{slice}.png'])
    assert 'layout pattern: 5 subjects, 15 slices' in capsys.readouterr().out


@pytest.mark.parametrize(
    'path, pattern',
    [
        ('P07-z031.png', '{subject}-z{slice}.png'),
        ('a/P07_031.jpg', '{subject}_{slice}.jpg'),
        ('P07/031.png', '{subject}/{slice}.png'),
        ('x/AD/P07/031.tif', '{diagnosis}/{subject}/{slice}.tif'),
        ('Train/MCI/P07-031.tif', '{split}/{diagnosis}/{subject}-{slice}.tif'),
        ('P07/axial031.png', '{subject}/axial{slice}.png'),
        ('scan.png', '{subject}-z{slice}.png'),
    ],
)
def test_proposed_patterns(path, pattern):
    assert suggest_pattern(path) == pattern
    DataConfig(pattern=pattern)


# ---- TIFF and more than 8 bits


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_a_deep_stack_has_one_scale(tmp_path, suffix):
    make_stacks(tmp_path, 'P0{i}-z{k}.' + suffix, scale=200, kind=np.uint16)
    for i in range(5):  # each highest slice much darker than the others
        path = tmp_path / f'P0{i}-z2.{suffix}'
        Image.fromarray(np.asarray(Image.open(path)) // 4).save(path)
    config = by_pattern('{subject}-z{slice}.' + suffix)
    report = look(tmp_path, config)
    assert report.ok, str(report)
    assert any(o.startswith('15 images of more than 8 bits') for o in report.notes)
    data = open_dataset(tmp_path, config, progress=False, cache_dir=tmp_path / 'cache')
    by = {k: [] for k in range(3)}
    for row, one in zip(data.manifest.itertuples(), data.images):
        by[row.slice].append(int(one.max()))
    # every subject reaches white, its highest slice stays dark
    assert all(max(o) > 240 for o in zip(by[0], by[1])) and max(by[2]) < 80
    stack = [np.asarray(Image.open(tmp_path / f'P03-z{k}.{suffix}')) for k in range(3)]
    top = np.percentile(np.stack(stack)[np.stack(stack) > 0], 99.9)
    assert np.allclose(data.manifest._white[data.manifest.subject == 'P03'], top)
    assert fingerprint(data.manifest)['left_known'] is False


def test_a_scale_is_found_again_by_the_next_process(tmp_path):
    make_stacks(tmp_path / 'in', 'P0{i}-z{k}.png', scale=200, kind=np.uint16)
    for path in (tmp_path / 'in').iterdir():
        os.utime(path, (1e9, 1e9))
    config = by_pattern('{subject}-z{slice}.png')
    first, second = (
        check_dataset(tmp_path / 'in', config, False, CachedInspection(tmp_path / 'cache'))
        for _ in range(2)
    )
    pd.testing.assert_frame_equal(first.manifest, second.manifest)
    # other stacks of the same files, another scale
    all_one = look(tmp_path / 'in', by_pattern('{subject}0{session}-z{slice}.png'))
    assert all_one.manifest._white.nunique() == 5 and all_one.manifest.subject.nunique() == 1


def test_a_stack_of_two_depths_has_no_scale(tmp_path):
    make_stacks(tmp_path, 'P0{i}-z{k}.png')
    Image.fromarray(image(1).astype(np.uint16) * 200).save(tmp_path / 'P00-z1.png')
    report = look(tmp_path, by_pattern('{subject}-z{slice}.png'))
    assert report.faults.path.tolist() == ['P00-z1.png'] and 'whole stack' in str(report)


@pytest.mark.parametrize(
    'change, kind',
    [
        (lambda o: o.astype(np.float32), None),
        (lambda o: o.astype(np.int32) * 200, None),
        (lambda o: np.where(o > 99, np.nan, o).astype(np.float32), 'nan'),
        (lambda o: (o.astype(np.float32) - o.mean()) / o.std(), 'negative'),
        (lambda o: np.zeros_like(o, np.uint16), 'negative'),
    ],
)
def test_other_depths(tmp_path, change, kind):
    for i in range(3):
        for k in range(2):
            save(tmp_path / f'P{i}-{k}.tif', change(image(10 * i + k)))
    report = look(tmp_path, by_pattern('{subject}-{slice}.tif'))
    assert faults(report) == ([kind] if kind else []), str(report)


def test_one_deep_image_alone_is_refused(tmp_path):
    save(tmp_path / 'a.tif', image(1).astype(np.uint16) * 200)
    with pytest.raises(DataFault, match='one scale') as e:
        read_gray_image(tmp_path / 'a.tif')
    assert e.value.kind == '16-bit'
    got, _ = read_gray_image(tmp_path / 'a.tif', white=200 * 255)
    assert (got == image(1)).all()


def test_a_tag_that_turns_a_tiff_is_refused(tmp_path):
    "Pillow 13.0 turns an uncompressed one twice."
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / 'a.tif', np.rot90(image(1)), exif=exif)
    with pytest.raises(DataFault, match='Save it upright'):
        read_gray_image(tmp_path / 'a.tif')


def test_pages_of_a_tiff_are_slices(tmp_path):
    for i in range(4):
        pages = [Image.fromarray(image(10 * i + k).astype(np.uint16) * 99) for k in range(3)]
        pages[0].save(tmp_path / f'P{i}.tif', save_all=True, append_images=pages[1:])
    report = look(tmp_path, by_pattern('{subject}.tif'))
    assert report.ok and len(report.manifest) == 12, str(report)
    assert set(report.manifest.slice) == {0, 1, 2} and report.voxel_mm is None
    assert fingerprint(report.manifest)['left_known'] is False
    assert len(look(tmp_path, by_pattern('{subject}.tif', planes=(1, 3))).manifest) == 8
    open_dataset(tmp_path, by_pattern('{subject}.tif'), progress=False, cache_dir=tmp_path / 'c')
    with pytest.raises(DataFault, match="--pattern '{subject}.tif'"):
        read_gray_image(tmp_path / 'P0.tif')
    save(tmp_path / 'P9.tif', image(99))
    assert faults(look(tmp_path, by_pattern('{subject}.tif'))) == ['pages']


# ---- class folders


@pytest.mark.parametrize('top', ['', 'data/'])
def test_volumes_in_class_folders_have_their_diagnosis(tmp_path, top):
    for i, group in enumerate(('AD', 'NC', 'MCI') * 3):
        make_volume(tmp_path / f'{top}{group}/P{i}.nii.gz', other_head(i))
    report = look(tmp_path)
    assert report.ok and report.manifest.subject.tolist()[0].startswith('P'), str(report)
    assert report.manifest.drop_duplicates('subject').diagnosis.value_counts().to_dict() == dict(
        AD=3, NC=3, MCI=3
    )
    assert any('AD (3), MCI (3), NC (3)' in o for o in report.notes) or 'AD (3)' in str(report)


@pytest.mark.parametrize('names', [('train', 'val', 'test'), ('Train', 'VALID', 'Testing')])
def test_volumes_in_split_and_class_folders(tmp_path, names):
    for i in range(12):
        split, group = names[i % 3], 'nc' if i == 7 else ('AD', 'NC')[i % 2]
        make_volume(tmp_path / f'{split}/{group}/P{i}/brain.nii.gz', other_head(i))
    report = look(tmp_path)
    assert report.ok and set(report.manifest.split) == {'train', 'validate', 'test'}, str(report)
    assert set(report.manifest.subject) == {f'P{i}' for i in range(12)}
    assert set(report.manifest.diagnosis) == {'AD', 'NC'}
    assert any('nc taken for NC' in o for o in report.notes)
    # one subject in two folders of splits is not two subjects
    make_volume(tmp_path / f'{names[1]}/AD/P0/brain.nii.gz', other_head(50))
    assert not look(tmp_path).ok


def test_other_folders_are_no_classes(tmp_path):
    for i in range(4):
        path = f'ADNI/00{i}_S_0295/MPR/2006-04-1{i}/S13408/I{45112 + i}.nii'
        make_volume(tmp_path / path, other_head(i))
    report = look(tmp_path)
    assert report.ok and report.manifest.diagnosis.isna().all(), str(report)


def test_folders_that_may_be_classes_are_named(tmp_path):
    for i in range(6):
        make_volume(tmp_path / f'Group{i % 2}/P{i}.nii.gz', other_head(i))
    report = look(tmp_path)
    assert report.manifest.diagnosis.isna().all()
    assert any('Group0, Group1 are not taken for a diagnosis' in o for o in report.notes)
    config = by_pattern('{diagnosis}/{subject}.nii.gz')
    assert set(look(tmp_path, config).manifest.diagnosis) == {'Group0', 'Group1'}


def test_volumes_counted_anew_in_every_class(tmp_path):
    for i in range(6):
        make_volume(tmp_path / f'{("AD", "NC")[i % 2]}/{i // 2}.nii.gz', other_head(i))
    report = look(tmp_path)
    assert report.manifest.subject.nunique() == 6
    assert any('taken for different subjects' in o for o in report.notes)


@pytest.mark.parametrize('names', ['', 'train/', 'Valid/'])
@pytest.mark.parametrize('suffix', ['png', 'jpeg', 'tif'])
def test_images_in_class_folders(tmp_path, names, suffix):
    for i, group in enumerate(('AD', 'NC', 'MCI', 'mci')):
        for k in range(2):
            save(tmp_path / f'{names}{group}/{218000 + i}_{k}.{suffix}', image(10 * i + k))
    report = look(tmp_path)
    assert report.ok, str(report)
    assert set(report.manifest.diagnosis) == {'AD', 'NC', 'MCI'}
    assert any('mci taken for MCI' in o for o in report.notes)


FOUR_CLASSES = {
    'the first set': [
        'Alzheimer_s Dataset/train/MildDemented/mildDem0.jpg',
        'Alzheimer_s Dataset/train/VeryMildDemented/verymildDem1.jpg',
        'Alzheimer_s Dataset/train/NonDemented/nonDem2.jpg',
        'Alzheimer_s Dataset/test/ModerateDemented/moderateDem3.jpg',
        'Alzheimer_s Dataset/test/MildDemented/26 (19).jpg',
        'Alzheimer_s Dataset/test/MildDemented/26.jpg',
    ],
    'the preprocessed set': [
        'Dataset/Mild_Demented/mild.jpg',
        'Dataset/Mild_Demented/mild_10.jpg',
        'Dataset/Moderate_Demented/moderate_10.jpg',
        'Dataset/Non_Demented/non_1.jpg',
        'Dataset/Very_Mild_Demented/verymild_7.jpg',
    ],
    'the augmented set': [
        'AugmentedAlzheimerDataset/MildDemented/0a1b2c3d-12ab-34cd-56ef-0123456789ab.jpg',
        'OriginalDataset/NonDemented/26 (62).jpg',
    ],
    'the combined set': [
        'Combined Dataset/train/Mild Impairment/MildImpairment (1).jpg',
        'Combined Dataset/test/No Impairment/NoImpairment (100).jpg',
        'Combined Dataset/test/Very Mild Impairment/VeryMildImpairment (3).jpg',
    ],
}


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
@pytest.mark.parametrize('name', FOUR_CLASSES)
def test_the_four_class_sets_are_refused_by_name(tmp_path, name, suffix):
    for i, path in enumerate(FOUR_CLASSES[name]):
        save(tmp_path / path.replace('jpg', suffix), image(i))
    for config in (CONFIG, by_pattern('{subject}_{slice}.' + suffix)):
        with pytest.raises(ValueError, match='four-class .* do not say whose they are'):
            look(tmp_path, config)


def test_oasis_of_kaggle_stays(tmp_path):
    groups = ('Mild Dementia', 'Non Demented', 'Very mild Dementia', 'Moderate Dementia')
    for i, group in enumerate(groups * 2):
        for k in (100, 101):
            save(tmp_path / f'{group}/OAS1_00{10 + i}_MR1_mpr-1_{k}.jpg', image(10 * i + k))
    report = look(tmp_path)
    assert report.ok and set(report.manifest.diagnosis) == set(groups), str(report)


# ---- manifests of volumes, and what `brainldm prepare` leaves


def make_prepared(root, planes=(1, 4)):
    rows = []
    for i in range(6):
        make_volume(root / f'volumes/S{i}.nii.gz', other_head(i))
        rows.append((f'volumes/S{i}.nii.gz', f'S{i}', ('AD', 'NC')[i % 2]))
    table = pd.DataFrame(rows, columns=['path', 'subject', 'diagnosis'])
    table.to_csv(root / 'manifest.csv', index=False)
    table[['subject', 'diagnosis']].assign(age=70).to_csv(root / 'subjects.csv', index=False)
    if planes:
        (root / 'prepare.json').write_text(json.dumps(dict(planes=planes)))
    return root


def test_a_manifest_of_volumes(tmp_path):
    make_prepared(tmp_path, None)
    report = look(tmp_path)
    assert report.ok and len(report.manifest) == 30 and report.voxel_mm == (2, 2), str(report)
    assert set(look(tmp_path, replace(CONFIG, planes=(2, 4))).manifest.slice) == {2, 3}
    vol = other_head(0)
    vol[..., 0] = 0
    make_volume(tmp_path / 'volumes/S0.nii.gz', vol)
    report = look(tmp_path)  # planes without a brain are left out, as of any folder of volumes
    assert report.ok and len(report.manifest) == 29 and '1 planes without' in str(report)
    (tmp_path / 'volumes/S0.nii.gz').unlink()
    assert len(look(tmp_path).faults) == 1


def test_planes_that_prepare_recommends(tmp_path):
    make_prepared(tmp_path)
    for root in (tmp_path, tmp_path / 'manifest.csv'):
        report = look(root)
        assert report.ok and set(report.manifest.slice) == {1, 2, 3}, str(report)
        assert any('planes 1 to 3 of each volume, as prepare.json says' in o for o in report.notes)
    report = look(tmp_path, replace(CONFIG, planes=(0, 2)))
    assert set(report.manifest.slice) == {0, 1} and 'prepare.json' not in str(report)
    assert set(report.manifest.age) == {70}
    (tmp_path / 'prepare.json').write_text('{}')
    with pytest.raises(ValueError, match='has no planes'):
        look(tmp_path)


@pytest.mark.parametrize(
    'text, said',
    [
        ('path,subject\na.png,1\n', 'Expected also slice'),
        ('path,subject,plane\na.nii,1,3\n', 'Expected also slice'),
        ('path,subject,slice\na.nii,1,3\nb.nii,2,\n', '1 of 2 blank'),
    ],
)
def test_a_manifest_that_says_too_little(tmp_path, text, said):
    (tmp_path / 'manifest.csv').write_text(text)
    with pytest.raises(ValueError, match=said):
        look(tmp_path)


# ---- files that are not there, and files of other programs


LFS = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'


@pytest.mark.parametrize('name', ['sub-{i:02d}_T1w.nii.gz', 'AD/{i}_3.png', 'AD/{i}_3.tif'])
@pytest.mark.parametrize('kind', ['lfs', 'annex link', 'annex text'])
def test_pointers_are_named_in_one_line(tmp_path, name, kind):
    for i in range(30):
        path = tmp_path / name.format(i=i)
        path.parent.mkdir(exist_ok=True)
        if kind == 'annex link':
            os.symlink(f'../.git/annex/objects/f{i}/SHA256E-s9--4d7a.nii.gz', path)
        else:
            path.write_text(LFS if kind == 'lfs' else f'/annex/objects/SHA256E-s9--4d{i}.nii.gz\n')
    report = look(tmp_path)
    assert faults(report) == ['pointer'] and len(report.faults) == 30, str(report)
    remedy = 'git lfs pull' if kind == 'lfs' else 'datalad get'
    assert str(report).count(remedy) == 1 and '30 files, ' in str(report)


def test_a_table_that_is_a_pointer(tmp_path):
    make_prepared(tmp_path)
    for name in ('subjects.csv', 'manifest.csv'):
        (tmp_path / name).write_text(LFS)
        with pytest.raises(ValueError, match=f'{name}.*git lfs pull'):
            look(tmp_path)


@pytest.mark.parametrize(
    'name, said',
    [
        ('1/IM001.dcm', 'brainldm prepare'),
        ('1/IM001.IMA', 'brainldm prepare'),
        ('1/IM001', 'brainldm prepare'),
        ('s1/mri/brain.mgz', 'FreeSurfer'),
        ('disc1/a.img', 'Analyze'),
        ('a.nrrd', 'SimpleITK'),
        ('a.mha', 'SimpleITK'),
        ('a.npy', 'Arrays say neither'),
        ('a.h5', 'Arrays say neither'),
        ('a.bmp', 'Save them as PNG'),
        ('a.zip', 'Unpack'),
        ('a.txt', 'holds 1 .txt'),
    ],
)
def test_hints_by_suffix(tmp_path, name, said):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b'DICM')
    with pytest.raises(ValueError, match='find_layout') as e:
        find_layout(tmp_path)
    assert said in str(e.value)
    # what the named command reads needs no manifest
    assert ('list the files in a manifest' in str(e.value)) == ('prepare' not in str(e.value))


def test_raw_bids_is_pointed_to_prepare(tmp_path):
    for i in range(3):
        make_volume(tmp_path / f'sub-0{i}/anat/sub-0{i}_T1w.nii.gz', other_head(i))
    assert not any('prepare' in o for o in look(tmp_path).notes)
    about = tmp_path / 'dataset_description.json'
    about.write_text('{"Name": "x", "DatasetType": "raw"}')
    assert any('`brainldm prepare FOLDER OUT`' in o for o in look(tmp_path).notes)
    about.write_text('{"Name": "x", "DatasetType": "derivative"}')
    assert not any('prepare' in o for o in look(tmp_path).notes)


# ---- what is printed


def test_a_thousand_faults_stay_readable(tmp_path):
    paths = [f'sub-{i:04d}.nii.gz' for i in range(1000)]
    rows = look(make_prepared(tmp_path)).manifest
    report = Findings(rows, as_faults(paths, 'truncated', 'voxels cannot be read'), [])
    assert '1000 files, sub-0000.nii.gz, sub-0001.nii.gz, sub-0002.nii.gz ...' in str(report)
    assert len(str(report).splitlines()) < 30
    each = Findings(rows, as_faults(paths, 'grid', [f'origin {i}' for i in range(1000)]), [])
    assert '... and 990 more files' in str(each) and len(str(each).splitlines()) < 40
    with pytest.raises(ValueError, match='1000 faults') as e:
        refuse_faults(report)
    assert len(str(e.value).splitlines()) < 6


def test_a_volume_is_one_fault_whatever_its_slices(tmp_path):
    for i in range(5):
        make_volume(tmp_path / f'sub-{i:02d}.nii.gz', other_head(i))
    make_volume(tmp_path / 'sub-09.nii.gz', other_head(1))  # a copy of five slices
    vol = other_head(7)
    vol[..., 1:4] = 0
    make_volume(tmp_path / 'sub-07.nii.gz', vol)
    report = look(tmp_path, replace(CONFIG, planes=(0, 5)))
    assert len(report.faults) == 3, str(report)
    assert 'every pixel is the same; planes 1, 2, 3' in str(report)
    assert str(report).count('(5 slices)') == 2
    assert describe_faults(report.faults[report.faults.fault == 'empty']) == [
        'sub-07.nii.gz: every pixel is the same; planes 1, 2, 3'
    ]


def test_all_faults_go_into_a_file(tmp_path, capsys):
    for i in range(4):
        make_volume(tmp_path / f'in/sub-{i:02d}.nii.gz', other_head(i))
    (tmp_path / 'in/sub-01.nii.gz').write_text('text')
    args = ['check', str(tmp_path / 'in'), '--size', '32', '--faults', str(tmp_path / 'f.csv')]
    assert main(args) == 1
    assert 'sub-01.nii.gz' in pd.read_csv(tmp_path / 'f.csv').path.tolist()
    assert main(args) == 1 and 'Expected a new or empty' in capsys.readouterr().err


def test_volumes_are_counted_by_their_planes_not_by_pages(tmp_path):
    make_volume(tmp_path / 'sub-01.nii.gz', other_head(1))
    assert fingerprint(look(tmp_path).manifest)['left_known'] is True
    assert nib.load(tmp_path / 'sub-01.nii.gz').shape[2] == len(look(tmp_path).manifest)
