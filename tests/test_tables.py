"""Names of the field's studies, visits and contrasts of one subject, tables of subjects and of
images, class folders."""

import io
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_data import (
    CONFIG,
    faults,
    look,
    make_adni,
    make_oasis,
    make_volume,
    other_head,
    image,
    save,
)

from brainldm.engineering.tables import (
    find_modality,
    match_names,
    read_name,
    read_subjects,
    read_table,
    same_level,
    suspect_names,
)
from brainldm.engineering.layouts import find_layout, parse_image_path
from brainldm.data import open_dataset, read_manifest

# ---- names


@pytest.mark.parametrize(
    'path, subject, session, run',
    [
        (
            'ADNI_002_S_0295_MR_MPR__GradWarp__B1_Correction__N3__Scaled_Br_20061130_S13408_I45112.nii',
            '002_S_0295',
            'S13408',
            None,
        ),
        (
            '002_S_0295/MPR__GradWarp/2006-04-18_08_20_30.0/I45112/ADNI_002_S_0295_MR_MPR_Br_2006_S13408_I45112.nii.gz',
            '002_S_0295',
            '2006-04-18',
            None,
        ),
        ('ADNI/941_S_10013/x/2012-01-02/I9/brain.nii', '941_S_10013', '2012-01-02', None),
        ('OAS1_0028_MR1_mpr-1_anon_sbj_111.nii', 'OAS1_0028', 'MR1', '1'),
        (
            'OAS1_0028_MR2/PROCESSED/OAS1_0028_MR2_mpr_n4_anon_111_t88_masked_gfc.nii.gz',
            'OAS1_0028',
            'MR2',
            None,
        ),
        ('Mild Dementia/OAS1_0028_MR1_mpr-3', 'OAS1_0028', 'MR1', '3'),
        ('OAS2_0001_MR1/RAW/mpr-2.nifti.nii', 'OAS2_0001', 'MR1', '2'),
        ('OAS30001_MR_d0129/anat1/x.nii.gz', 'OAS30001', 'MR_d0129', None),
        (
            'BraTS20_Training_001/BraTS20_Training_001_t1ce.nii.gz',
            'BraTS20_Training_001',
            None,
            None,
        ),
        ('BraTS-GLI-00005-101/BraTS-GLI-00005-101-t1n.nii.gz', 'BraTS-GLI-00005', '101', None),
        ('BraTS2021_00495_flair.nii.gz', 'BraTS2021_00495', None, None),
        ('Brats18_CBICA_AAB_1_t2.nii.gz', 'Brats18_CBICA_AAB_1', None, None),
        ('IXI002-Guys-0828-T1.nii.gz', 'IXI002', None, None),
        ('miriad_188_AD_F_02_MR_1.nii', 'miriad_188', '02', '1'),
        ('sub-01/ses-pre/anat/sub-01_ses-pre_acq-hi_run-2_T1w.nii.gz', 'sub-01', 'ses-pre', '2'),
        ('derivatives/sub-01/mri/brain.nii.gz', 'sub-01', None, None),
    ],
)
def test_names_of_the_field(path, subject, session, run):
    said = read_name(path)
    assert (said['subject'], said['session'], said['run']) == (subject, session, run)
    assert said['kind'] is None or subject not in said['kind'] and not said['kind'].startswith('S_')


@pytest.mark.parametrize(
    'path',
    [
        'P07-z031.png',
        '218391',
        'patient_1_S_2.nii',
        'subject-01.nii',
        'a/b/c.nii',
        'IXI.nii',
        'OAS1_28.nii',
    ],
)
def test_no_study_is_claimed(path):
    assert read_name(path) is None


@pytest.mark.parametrize(
    'text, contrast',
    [
        ('T1w', 'T1'),
        ('t1ce', 'T1 with contrast agent'),
        ('t2f', 'FLAIR'),
        ('T2', 'T2'),
        ('MR_MP-RAGE', 'T1'),
        ('MR_MPR__GradWarp__N3', 'T1'),
        ('anon_111_t88', None),
        (None, None),
        (np.nan, None),
    ],
)
def test_contrasts(text, contrast):
    assert find_modality(text) == contrast


def volumes(root, *names, same=False):
    for i, name in enumerate(names):
        make_volume(root / f'{name}.nii.gz', other_head(0 if same else i + 1))
    return root


ADNI = 'adni/{0:03d}_S_0295/2006-04-1{1}/I{2}/ADNI_{0:03d}_S_0295_MR_MPR__GradWarp__N3_Br_2007{1}_S13408_I{2}'
VISITS = {
    'ADNI': [ADNI.format(i, v, 45112 + 100 * i + v) for i in range(5) for v in (0, 1)],
    'ADNI, repeated scans': [
        ADNI.format(i, 0, 45112 + 100 * i + v).replace('MPR__', 'MPR-R__' if v else 'MPR__')
        for i in range(5)
        for v in (0, 1)
    ],
    'OASIS-1': [
        f'OAS1_{i:04d}_MR{v}_mpr_n4_anon_111_t88_masked_gfc' for i in range(5) for v in (1, 2)
    ],
    'OASIS-3': [f'OAS3{i:04d}_MR_d{v:04d}/x' for i in range(5) for v in (129, 730)],
    'BIDS': [f'sub-{i:02d}/ses-{v}/sub-{i:02d}_ses-{v}_T1w' for i in range(5) for v in (1, 2)],
    'BIDS runs': [f'sub-{i:02d}_run-{v}_T1w' for i in range(5) for v in (1, 2)],
    'BraTS': [f'BraTS-GLI-{i:05d}-{v:03d}-t1n' for i in range(5) for v in (0, 1)],
    'MIRIAD': [f'miriad_{i:03d}_AD_F_0{v}_MR_1' for i in range(5) for v in (1, 2)],
}


@pytest.mark.parametrize('study', VISITS)
def test_two_visits_are_one_subject(study, tmp_path):
    report = look(volumes(tmp_path, *VISITS[study]))
    m = report.manifest
    assert report.ok, str(report)
    assert (
        m.subject.nunique() == 5
        and m.groupby('subject').session.nunique().eq(2).all()
        and not m.session.eq('').any()
    )
    assert m.groupby('subject').split.nunique().max() == 1 and set(m.split) == {
        'train',
        'validate',
        'test',
    }
    assert not m.duplicated(
        ['subject', 'session', 'slice']
    ).any() and '5 subjects in 10 sessions' in str(report)


def test_one_visit_each_needs_no_column_of_sessions(tmp_path):
    report = look(volumes(tmp_path, *VISITS['BIDS'][::2]))
    assert report.ok and 'session' not in report.manifest and 'sessions' not in str(report)


@pytest.mark.parametrize(
    'names, said',
    [
        (
            [
                f'BraTS20_Training_{i:03d}/BraTS20_Training_{i:03d}_{m}'
                for i in range(3)
                for m in ('flair', 't1', 't2', 'seg')
            ],
            'contrasts FLAIR, T1, T2',
        ),
        ([f'sub-{i:02d}_{m}' for i in range(3) for m in ('T1w', 'FLAIR')], 'contrasts'),
        ([f'IXI{i:03d}-Guys-0828-{m}' for i in range(3) for m in ('T1', 'PD')], 'contrasts'),
        (
            [
                f'OAS1_{i:04d}_MR1_{m}'
                for i in range(3)
                for m in ('mpr-1_anon', 'mpr_n4_anon_111_t88_gfc')
            ],
            'of one visit',
        ),
        (
            [f'sub-{i:02d}_space-{m}_T1w' for i in range(3) for m in ('MNI', 'native')],
            'no visit or run',
        ),
        ([f'sub-{i:02d}{m}' for i in range(3) for m in ('', '_ses-2')], 'no visit or run'),
    ],
)
def test_two_meanings_of_one_subject_are_refused_side_by_side(names, said, tmp_path):
    report = look(volumes(tmp_path, *names))
    assert faults(report) == ['two volumes'] and len(report.faults) == len(
        [o for o in names if 'seg' not in o]
    ), str(report)
    assert said in str(report) and '--only' in str(report)


def test_only_chooses_a_contrast(tmp_path):
    volumes(
        tmp_path,
        *[f'BraTS20_Training_{i:03d}_{m}' for i in range(4) for m in ('flair', 't1', 'seg')],
    )
    report = look(tmp_path, replace(CONFIG, only='*_t1.nii.gz'))
    assert (
        report.ok
        and report.manifest.subject.nunique() == 4
        and report.manifest.path.str.endswith('_t1.nii.gz').all()
    )
    assert any('4 label maps ignored' in o for o in report.notes) and any(
        '4 files unlike *_t1.nii.gz ignored' in o for o in report.notes
    )


def test_label_maps_are_no_image(tmp_path):
    volumes(
        tmp_path,
        'sub-01_T1w',
        'sub-02_T1w',
        'sub-03_T1w',
        'sub-01_seg',
        'sub-02_desc-brain_mask',
        'sub-03_label-GM_probseg',
        'aseg',
        'labelsTr/sub-01',
    )
    report = look(tmp_path)
    assert (
        report.ok
        and report.manifest.subject.nunique() == 3
        and any('5 label maps' in o for o in report.notes)
    )


def test_another_contrast_than_most_is_a_fault(tmp_path):
    report = look(volumes(tmp_path, 'sub-01_T1w', 'sub-02_T1w', 'sub-03_T1w', 'sub-04_FLAIR'))
    assert report.faults[['path', 'fault']].values.tolist() == [
        ['sub-04_FLAIR.nii.gz', 'contrast']
    ] and 'T1 3, FLAIR 1' in str(report)


@pytest.mark.parametrize(
    'names',
    [
        ['P01_v1', 'P01_v2'],
        ['P01_ses1', 'P01_ses2'],
        ['P01_T1', 'P01_FLAIR'],
        ['P01_baseline', 'P01_m12'],
        ['s01-2006-04-18', 's01-2007-04-18'],
        ['P01_run1', 'P01_run2'],
        ['P01_I45112', 'P01_I64025'],
        ['P01/v1/brain', 'P01/v2/brain'],
        ['P01', 'P01_v2'],
    ],
)
def test_an_unknown_name_that_seems_a_visit_is_refused(names, tmp_path):
    report = look(
        volumes(
            tmp_path,
            *names,
            *[n.replace('01', '02') for n in names[:1]],
            *[n.replace('01', '03') for n in names[:1]],
        )
    )
    assert faults(report) == ['subject'] and len(report.faults) == 2, str(report)
    assert 'seem to be one subject, distinguished by' in str(
        report
    ) and 'columns image and subject' in str(report)


@pytest.mark.parametrize(
    'names, noted',
    [
        ([f'control_{i}' for i in range(12)], False),
        ([f'AD{i}' for i in range(4)], False),
        ([f'P{i:02d}_T1' for i in range(4)], False),
        (['P01_1', 'P01_2', 'P02_1', 'P02_2'], True),
        (['P01a', 'P01b', 'P02a', 'P02b'], True),
    ],
)
def test_a_bare_number_is_noted_at_most(names, noted):
    refused, note = suspect_names(names)
    assert not refused and bool(note) == noted


def test_folders_name_the_subject_where_files_are_called_alike(tmp_path):
    report = look(volumes(tmp_path, 'P01/brain', 'P02/brain', 'P03/brain'))
    assert report.ok and set(report.manifest.subject) == {'P01', 'P02', 'P03'}


def test_a_manifest_with_visits_as_subjects(tmp_path):
    rows = [
        dict(path=f'{v}-{i}.png', subject=f'OAS1_{i:04d}_MR{v}', slice=3)
        for i in range(3)
        for v in (1, 2)
    ]
    for k, r in enumerate(rows):
        save(tmp_path / r['path'], image(k))
    pd.DataFrame(rows).to_csv(tmp_path / 'manifest.csv', index=False)
    report = look(tmp_path)
    assert (
        faults(report) == ['subject']
        and len(report.faults) == 6
        and 'visit of OAS1_0000' in str(report)
    )
    pd.DataFrame(rows).assign(
        session=lambda o: o.subject.str[-3:], subject=lambda o: o.subject.str[:9]
    ).to_csv(tmp_path / 'manifest.csv', index=False)
    assert '3 subjects in 6 sessions' in str(look(tmp_path)) and look(tmp_path).ok


# ---- tables of images


def images_of(root, pairs):
    "A table that says that pairs of images belong to one subject."
    pd.DataFrame(pairs, columns=['Image Data ID', 'Subject', 'Age']).to_csv(
        root / 'subjects.csv', index=False
    )


def test_what_a_bare_number_is_is_said(tmp_path):
    report = look(make_adni(tmp_path))
    assert report.ok and any(
        'what 218009 is in AD_NC/test' in o and 'a subject or one of several images' in o
        for o in report.notes
    ), report.notes


def test_a_table_of_subjects_settles_what_a_number_is(tmp_path):
    make_adni(tmp_path)
    (tmp_path / 'subjects.csv').write_text(
        'subject,age\n' + ''.join(f'{218000+i},70\n' for i in range(1, 11))
    )
    assert not any('one of several images' in o for o in look(tmp_path).notes)


def test_a_table_of_images_reveals_a_leak(tmp_path):
    make_adni(tmp_path)  # 218001-218008 in train, 218009 and 218010 in test
    images_of(tmp_path, [(f'I{218000+i}', f'S{min(i, 9)}', 60 + i) for i in range(1, 11)])
    assert look(tmp_path).ok and look(tmp_path).manifest.subject.nunique() == 9
    images_of(tmp_path, [(f'I{218000+i}', f'S{1 if i==9 else i}', 60 + i) for i in range(1, 11)])
    report = look(tmp_path)
    assert (
        faults(report) == ['leak']
        and 'subject S1 is in test and train' in str(report)
        and 'is not known' not in str(report)
    )
    with pytest.raises(ValueError, match='leak'):
        read_manifest(tmp_path, replace(CONFIG, skip_faulty=True))


def test_a_table_of_images_gives_sessions_and_their_ages(tmp_path):
    make_adni(tmp_path)
    images_of(
        tmp_path, [(f'I{218000+i}', f'S{i}' if i > 2 else 'S1', 60 + i) for i in range(1, 11)]
    )
    m = look(tmp_path).manifest
    mine = m[m.subject == 'S1'].drop_duplicates('session')
    assert (
        mine.age.tolist() == [61, 62]
        and mine.session.tolist() == ['I218001', 'I218002']
        and mine.split.nunique() == 1
    )
    images_of(tmp_path, [(f'I{218000+i}', f'S{i}', 60 + i) for i in range(1, 10)])
    report = look(tmp_path)
    assert faults(report) == ['subject'] and 'not in the table of images' in str(report)


def test_a_table_of_images_settles_unknown_names(tmp_path):
    volumes(tmp_path, 'P01_v1', 'P01_v2', 'P02_v1', 'P03_v1')
    assert not look(tmp_path).ok
    (tmp_path / 'whose.csv').write_text(
        'image,subject\nP01_v1,P01\nP01_v2.nii.gz,P01\nP02_v1,P02\nP03_v1,P03\n'
    )
    report = look(tmp_path, replace(CONFIG, subjects=tmp_path / 'whose.csv'))
    assert (
        report.ok
        and set(report.manifest.subject) == {'P01', 'P02', 'P03'}
        and report.manifest.session.nunique() >= 2
    )


def test_a_table_with_a_row_a_visit(tmp_path):
    volumes(tmp_path, *VISITS['OASIS-1'])
    lines = [
        f'OAS1_{i:04d}_MR{v},F,{60+i+v},{"AD" if v==2 else "NC"}' for i in range(5) for v in (1, 2)
    ]
    (tmp_path / 'subjects.csv').write_text('\n'.join(['ID,M/F,Age,Group', *lines]))
    report = look(tmp_path)
    m = report.manifest.drop_duplicates(['subject', 'session'])
    assert (
        report.ok
        and m.age.notna().all()
        and (m.age - 60 - m.subject.str[-1:].astype(int) == m.session.str[-1:].astype(int)).all()
    )
    assert ((m.diagnosis == 'AD') == (m.session == 'MR2')).all()
    (tmp_path / 'subjects.csv').write_text(
        'subject,session,age\nOAS1_0000,MR1,60\nOAS1_0000,MR1,61\n'
    )
    with pytest.raises(ValueError, match='several rows for one session'):
        look(tmp_path)


# ---- columns


@pytest.mark.parametrize(
    'head',
    [
        'subject,diagnosis,age,sex',
        'Subject,Diagnosis,Age,Sex',
        'participant_id,Group,AGE,Gender',
        'ID,DX,Age,M/F',
        'PTID,dx_bl,age,PTGENDER',
        'SUBJECT,Research Group,Age at scan,SEX',
    ],
)
@pytest.mark.parametrize('sep', [',', ';', '\t'])
def test_columns_by_their_usual_names(head, sep, tmp_path):
    text = '\n'.join([head, *[f'sub-{i:02d},{"AD" if i%2 else "None"},{60+i},F' for i in range(4)]])
    (tmp_path / 't.csv').write_text(text.replace(',', sep))
    table = read_subjects(tmp_path / 't.csv')
    assert table.columns.tolist() == ['diagnosis', 'age', 'sex'] and table.age.tolist() == [
        60,
        61,
        62,
        63,
    ]
    assert table.diagnosis.tolist() == ['None', 'AD'] * 2 and table.diagnosis.notna().all()


@pytest.mark.parametrize(
    'head, said',
    [
        ('subject,Group,DX', "'Group' and 'DX', may be the diagnosis"),
        ('Subject,subject,age', 'may be the subject'),
        ('subject,Age,age', 'may be the age'),
        ('PTID,participant_id,age', 'may be the subject'),
    ],
)
def test_two_columns_that_claim_one_name(head, said, tmp_path):
    (tmp_path / 't.csv').write_text(head + '\n1,2,3\n')
    with pytest.raises(ValueError, match='two columns') as e:
        read_subjects(tmp_path / 't.csv')
    assert said in str(e.value)


@pytest.mark.parametrize(
    'cell, age',
    [
        ('60Y', 60),
        ('060Y', 60),
        ('60 years', 60),
        ('60', 60),
        ('', None),
        ('n/a', None),
        ('N/A', None),
        ('None', None),
        ('89+', ValueError),
        ('36M', ValueError),
        ('>89', ValueError),
        ('old', ValueError),
    ],
)
def test_ages(cell, age, tmp_path):
    (tmp_path / 't.csv').write_text(f'subject,age\n1,50\n2,{cell}\n')
    if age is ValueError:
        with pytest.raises(ValueError, match='of subject .2., line 3'):
            read_table(tmp_path / 't.csv', ('subject',))
    else:
        got = read_table(tmp_path / 't.csv', ('subject',)).age[1]
        assert got == age or age is None and np.isnan(got)


def test_blank_rows_and_decimal_commas(tmp_path):
    (tmp_path / 't.csv').write_text('subject;age\n1;60,5\n;\n\n2;71\n;\n')
    table = read_table(tmp_path / 't.csv', ('subject',))
    assert table.age.tolist() == [60.5, 71] and '3 blank rows' in table.attrs['notes'][0]
    (tmp_path / 't.csv').write_text('subject,age\n1,60\n,\n2,x\n')
    with pytest.raises(ValueError, match='line 4'):
        read_table(tmp_path / 't.csv', ('subject',))


def test_columns_that_are_not_used_are_named(tmp_path):
    make_oasis(tmp_path)
    (tmp_path / 'subjects.csv').write_text(
        'subject,Diagnose,MMSE\n' + ''.join(f'{i:03d},AD,29\n' for i in range(1, 11))
    )
    said = str(look(tmp_path))
    assert (
        'columns not used: Diagnose, MMSE' in said
        and 'column Diagnose is not used, and resembles diagnosis' in said
    )
    assert 'MMSE' not in str(look(tmp_path, replace(CONFIG, columns=('MMSE', 'Diagnose'))))


def test_participants_of_bids_are_read(tmp_path):
    volumes(tmp_path, *[f'sub-{i:02d}/anat/sub-{i:02d}_T1w' for i in range(6)])
    (tmp_path / 'participants.tsv').write_text(
        'participant_id\tage\tsex\tgroup\n'
        + ''.join(
            f'sub-{i:02d}\t{"n/a" if i==2 else 70+i}\tF\t{"AD" if i%2 else "CN"}\n'
            for i in range(6)
        )
    )
    (tmp_path / 'participants.json').write_text(
        '{"group": {"Levels": {"AD": "probable dementia", "CN": "control"}}, "sex": {"x": 1}}'
    )
    report = look(tmp_path)
    assert 'participants.json: diagnosis AD is probable dementia, CN is control' in str(report)
    for broken in ('{}', '[1]', '{"group": 3}', 'no json'):
        (tmp_path / 'participants.json').write_text(broken)
        assert look(tmp_path).ok
    assert (
        report.ok
        and set(report.manifest.diagnosis) == {'AD', 'CN'}
        and report.manifest.age.isna().sum() == 5
    )
    assert any('participants.tsv is read' in o for o in report.notes) and not any(
        'other files' in o for o in report.notes
    )
    (tmp_path / 'subjects.csv').write_text('subject,age\nsub-00,50\n')
    assert any('participants.tsv is not read' in o for o in look(tmp_path).notes)


def test_a_table_that_matches_nobody_is_a_fault(tmp_path):
    make_oasis(tmp_path)
    (tmp_path / 'subjects.csv').write_text(
        'subject,age\n' + ''.join(f'P{i},{60+i}\n' for i in range(1, 9))
    )
    report = look(tmp_path)
    assert (
        faults(report) == ['table']
        and 'none of the 10 subjects' in str(report)
        and '(subjects.csv)' in str(report)
        and 'names like P1' in str(report)
    )
    (tmp_path / 'subjects.csv').write_text('subject,age\n001,60\n')
    report = look(tmp_path)
    assert report.ok and any(
        'look here: only 1 of 10 subjects' in o and 'is it the right one?' in o
        for o in report.notes
    )


# ---- names of subjects, written in two ways


@pytest.mark.parametrize(
    'mine, its, word',
    [
        ('sub-{:04d}', '{}', 'without sub- before them, without leading zeros'),
        ('{:03d}', '{}', 'without leading zeros'),
        ('P{:02d}', 'p{:02d}', 'in any case'),
        # one character on the left, a letter and its dots on the right
        ('M\u00fcller{:d}', 'Mu\u0308ller{:d}', 'with accents written as one character'),
        ('P{:02d}', 'P{:02d}.nii.gz', 'without a suffix'),
        ('sub-ADNI{0:03d}S02{0:02d}', '{0:03d}_S_02{0:02d}', 'without the name of the study'),
        ('sub-OASIS1{:04d}', 'OAS1_{:04d}_MR1', 'without separators'),
        ('{0:03d}_S_02{0:02d}', '2{:02d}', 'roster ID'),
        ('IXI{:03d}-Guys-0828-T1', '{}', 'without leading zeros'),
        ('sub-{:02d}_ses-1_T1w', '{}', 'without sub-'),
    ],
)
def test_names_that_a_rule_joins(mine, its, word, tmp_path):
    volumes(tmp_path, *[mine.format(i) for i in range(1, 7)])
    lines = [f'{its.format(i)},{60+i}' for i in range(1, 9)]
    (tmp_path / 'subjects.csv').write_text('\n'.join(['subject,age', *lines]))
    report = look(tmp_path)
    people = report.manifest.drop_duplicates('path').sort_values('path')
    assert report.ok and people.age.tolist() == [61, 62, 63, 64, 65, 66], str(report)
    said = [o for o in report.notes if 'names are compared' in o]
    assert len(said) == 1 and word in said[0] and '(6 of 6 subjects)' in said[0]


def test_the_step_that_finds_most_is_taken():
    "Without sub- alone, 10 to 40 of 40 match: nine would be left out."
    names = [f'sub-{i:02d}' for i in range(1, 41)]
    found, _ = match_names(names, [str(i) for i in range(1, 401)])
    assert found == {o: str(int(o[4:])) for o in names}


@pytest.mark.parametrize(
    'names, others, why',
    [
        (['01', '1', '2'], ['1', '2', '03'], ''),
        (['01', '1', '3'], ['1', '2', '03'], 'without leading zeros'),  # two of the folder
        (['001', '002'], ['1', '01', '2'], 'for two would become one'),  # two of the table
        (['sub-1', 'x', 'y'], ['1', '2'], '(1 of 3 subjects): so few may be chance'),
        (['P1', 'P2'], ['Q1', 'Q2'], ''),
    ],
)
def test_names_that_no_rule_joins(names, others, why):
    found, note = match_names(names, others)
    assert all(k == v for k, v in found.items()) and why in note
    assert note == '' or note.startswith('names are not compared')


# ---- tables by any name, and of the studies

OASIS1 = 'ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay'


def oasis1(path, n=12, sheet=None):
    "OASIS-1's own table: no diagnosis, and subjects called by their visit."
    lines = [
        f'OAS1_{i:04d}_MR1,{"FM"[i%2]},R,{60+i},2,3,29,{["0", "0.5", "", "1"][i%4]},1344,0.7,1.3,N/A'
        for i in range(1, n + 1)
    ]
    text = '\n'.join([OASIS1, *lines])
    if path.suffix == '.csv':
        path.write_text(text)
    else:
        pytest.importorskip('openpyxl')
        pd.read_csv(io.StringIO(text)).to_excel(path, index=False, sheet_name=sheet or 'Sheet1')
    return path


NAMES_OASIS1 = ['OAS1_{:04d}_MR1_mpr_n4_anon_111_t88_masked_gfc', 'OAS1_{:04d}_MR1_mpr-1_anon']


@pytest.mark.parametrize('name', NAMES_OASIS1)
@pytest.mark.parametrize('table', ['oasis_cross-sectional.csv', 'oasis_cross-sectional.xlsx'])
def test_the_table_of_oasis_gives_a_diagnosis(name, table, tmp_path):
    volumes(tmp_path, *[name.format(i) for i in range(1, 9)])
    oasis1(tmp_path / table)
    report = look(tmp_path)
    people = report.manifest.drop_duplicates('subject').sort_values('subject')
    assert report.ok and people.diagnosis.fillna('?').tolist() == list(
        ('AD', '?', 'AD', 'NC', 'AD', '?', 'AD', 'NC')
    )
    said = str(report)
    assert f'{table} is read' in said and 'looks like the OASIS table' in said
    assert 'subject = ID without _MRn' in said and 'other files' not in said
    assert 'diagnosis from CDR (0: NC, above 0: AD, blank: not known): NC 3, AD 6' in said
    assert people.sex.notna().all() and people.age.tolist() == [61, 62, 63, 64, 65, 66, 67, 68]


def test_an_own_diagnosis_goes_before_the_rating(tmp_path):
    (tmp_path / 't.csv').write_text('ID,Group,CDR\nOAS1_0001_MR1,Converted,0.5\n')
    table = read_subjects(tmp_path / 't.csv')
    assert table.diagnosis.tolist() == ['Converted']
    assert 'diagnosis is Group, and CDR is not used' in ' '.join(table.attrs['notes'])
    (tmp_path / 't.csv').write_text('ID,CDR\nP1,0.5\n')  # of no study that says how
    table = read_subjects(tmp_path / 't.csv')
    assert 'diagnosis' not in table and 'No diagnosis is made of it' in table.attrs['notes'][0]


def test_folders_go_before_a_derived_diagnosis(tmp_path):
    for kind, numbers in (('Mild Dementia', (1, 2, 3)), ('Non Demented', (4, 5, 6))):
        for i in numbers:
            save(tmp_path / kind / f'OAS1_{i:04d}_MR1_mpr-1_100.png', image(i))
    oasis1(tmp_path / 'oasis_cross-sectional.csv')
    report = look(tmp_path)
    assert report.ok and set(report.manifest.diagnosis) == {'Mild Dementia', 'Non Demented'}
    assert 'diagnosis is that of the folders' in str(report)


def test_a_folder_and_a_table_may_write_one_diagnosis_otherwise(tmp_path):
    make_adni(tmp_path)  # folders AD and NC
    rows = [(f'I{218000+i}', f'S{i}', 60 + i) for i in range(1, 11)]
    report = look(tmp_path)
    folder = report.manifest.drop_duplicates('subject').set_index('subject').diagnosis
    table = pd.DataFrame(rows, columns=['Image Data ID', 'Subject', 'Age'])
    table['Group'] = [dict(AD='Dementia', NC='CN')[folder[o[1:]]] for o in table['Image Data ID']]
    table.to_csv(tmp_path / 'ADNI1_Complete_1Yr_1.5T_4_18_2024.csv', index=False)
    report = look(tmp_path)
    assert (
        report.ok
        and set(report.manifest.diagnosis) == {'AD', 'NC'}
        and '4_18_2024.csv is read' in (str(report))
    )
    assert 'AD (Dementia in the table), NC (CN in the table)' in str(report)


def test_a_folder_may_say_a_wider_word():
    folder, table = pd.Series(['MCI', 'MCI', 'NC', 'LMCI']), pd.Series(['LMCI', 'AD', 'nl', 'EMCI'])
    assert same_level(folder, table).tolist() == [True, False, True, False]


def test_a_table_of_images_whose_names_the_files_have_lost(tmp_path):
    volumes(tmp_path / 'a', *[f'{i:03d}_S_0295' for i in range(6)])
    volumes(tmp_path / 'b', *[f'{i:03d}_S_0295_S1340{v}' for i in range(6) for v in (1, 2)])
    lines = [
        f'I{45112+10*i+v},{i:03d}_S_0295,{"CN" if i%2 else "AD"},M,{70+i+v},m{12*v}'
        for i in range(6)
        for v in (0, 1)
    ]
    for folder in 'ab':
        (tmp_path / folder / 'ida.csv').write_text(
            '\n'.join(['Image Data ID,Subject,Group,Sex,Age,Visit', *lines])
        )
        report = look(tmp_path / folder)
        people = report.manifest.drop_duplicates('subject').sort_values('subject')
        assert report.ok and people.diagnosis.tolist() == ['AD', 'CN'] * 3, str(report)
        assert report.manifest.age.isna().all() and 'no image of the table is in the data' in (
            str(report)
        )
        assert 'only what all its rows agree on' in str(report)


def test_adnimerge_says_what_all_its_rows_agree_on(tmp_path):
    volumes(tmp_path, *[ADNI.format(i, 0, 45112 + 100 * i) for i in range(6)])
    head = 'RID,PTID,VISCODE,SITE,EXAMDATE,DX_bl,AGE,PTGENDER,DX,IMAGEUID'
    lines = [
        f'{295+i},{i:03d}_S_0295,{v},2,2006-04-18,CN,{70+i},Male,{"MCI" if i==1 and v=="m12" else "CN"},'
        f'{"" if v=="bl" else 900+i}'
        for i in range(6)
        for v in ('bl', 'm12')
    ]
    (tmp_path / 'ADNIMERGE.csv').write_text('\n'.join([head, *lines]))
    report = look(tmp_path)
    people = report.manifest.drop_duplicates('subject').sort_values('subject')
    assert report.ok and people.diagnosis.fillna('?').tolist() == [
        'CN',
        '?',
        'CN',
        'CN',
        'CN',
        'CN',
    ]
    assert people.age.tolist() == [70, 71, 72, 73, 74, 75] and set(people.sex) == {'Male'}
    said = str(report)
    assert 'looks like the ADNI table' in said and 'AGE is the age at the first visit' in said
    assert 'visits have other names in the table (bl, m12) than in the data (2006-04-10)' in said


def test_visits_that_two_tables_name_alike(tmp_path):
    volumes(tmp_path, *[f'sub-{i:02d}_ses-M{v:02d}_T1w' for i in range(1, 5) for v in (0, 12)])
    lines = [f'sub-{i:02d},{v},{60+k}' for i in range(1, 5) for k, v in enumerate(('bl', 'm12'))]
    (tmp_path / 'visits.csv').write_text('\n'.join(['participant_id,VISCODE,age', *lines]))
    people = look(tmp_path).manifest.drop_duplicates(['subject', 'session'])
    assert (people.age == people.session.map({'ses-M00': 60, 'ses-M12': 61})).all()


def test_sessions_of_bids_have_their_own_age(tmp_path):
    volumes(tmp_path, *VISITS['BIDS'])
    people = ''.join(f'sub-{i:02d}\t{60+i}\tF\n' for i in range(5))
    (tmp_path / 'participants.tsv').write_text('participant_id\tage\tsex\n' + people)
    for i in range(4):  # of the last one nothing is said, and of the fourth one session
        lines = [f'ses-{v}\t{60+i+10*v}' for v in ((1, 2) if i < 3 else (2,))]
        (tmp_path / f'sub-{i:02d}/sub-{i:02d}_sessions.tsv').write_text(
            '\n'.join(['session_id\tage', *lines])
        )
    report = look(tmp_path)
    ages = report.manifest.drop_duplicates(['subject', 'session'])
    ages = ages.set_index(['subject', 'session']).age.sort_index().tolist()
    assert report.ok and ages == [70, 80, 71, 81, 72, 82, 63, 83, 64, 64], ages
    assert set(report.manifest.sex) == {'F'}
    assert '4 sessions.tsv are read, which give age of 7 sessions' in str(report)


def test_oasis_2_and_3(tmp_path):
    pytest.importorskip('openpyxl')
    volumes(tmp_path / '2', *[f'OAS2_{i:04d}_MR{v}/RAW/mpr-1' for i in range(4) for v in (1, 2)])
    head = 'Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR,eTIV,nWBV,ASF'
    lines = [
        f'OAS2_{i:04d},OAS2_{i:04d}_MR{v},Converted,{v},0,M,R,{80+v},14,2,27,{0.5*(v-1)},1987,0.7,0.9'
        for i in range(4)
        for v in (1, 2)
    ]
    text = '\n'.join([head, *lines])
    pd.read_csv(io.StringIO(text)).to_excel(
        tmp_path / '2/oasis_longitudinal_demographics.xlsx', index=False
    )
    report = look(tmp_path / '2')
    assert report.ok and set(report.manifest.diagnosis) == {'Converted'}, str(report)
    assert (report.manifest.age - 80).isin([1, 2]).all() and report.manifest.age.nunique() == 2
    volumes(tmp_path / '3', *[f'OAS3{i:04d}_MR_d0129/x' for i in range(4)])
    lines = [
        f'OAS3{i:04d}_ClinicalData_d{d:04d},OAS3{i:04d},{60+d},.,{c},65.2,{x}'
        for i in range(4)
        for d, c, x in ((0, 0, 'Cognitively normal'), (339, 0, 'Cognitively normal'))
    ]
    (tmp_path / '3/ADRC_Clinical_Data.csv').write_text(
        '\n'.join(['ADRC_ADRCCLINICALDATA ID,Subject,Age,Date,cdr,ageAtEntry,dx1', *lines])
    )
    report = look(tmp_path / '3')
    assert report.ok and set(report.manifest.diagnosis) == {'Cognitively normal'}, str(report)


def test_two_tables_of_one_data_set(tmp_path):
    volumes(tmp_path, *[f'P{i:02d}' for i in range(6)])
    body = 'ID,Age\n' + ''.join(f'P{i:02d},{60+i}\n' for i in range(6))
    for name in ('ages.csv', 'clinic/more.tsv'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(body.replace(',', '\t') if name[-3:] == 'tsv' else body)
    with pytest.raises(ValueError, match='several tables of its subjects') as e:
        look(tmp_path)
    assert 'ages.csv (6' in str(e.value) and 'clinic/more.tsv (6' in str(e.value)
    report = look(tmp_path, replace(CONFIG, subjects=tmp_path / 'ages.csv'))
    assert report.ok and report.manifest.age.notna().all()
    assert 'clinic/more.tsv is not read, for there is ages.csv' in str(report)
    (tmp_path / 'ages.csv').rename(tmp_path / 'subjects.csv')  # called so on purpose
    assert look(tmp_path).ok
    (tmp_path / 'subjects.csv').write_text('day,temperature\n1,20\n')
    with pytest.raises(ValueError, match='Expected also subject'):
        look(tmp_path)


def test_a_table_of_something_else_is_mentioned(tmp_path):
    volumes(tmp_path, *[f'P{i:02d}' for i in range(6)])
    (tmp_path / 'scanner.csv').write_text('day,temperature\n1,20\n')
    report = look(tmp_path)
    assert report.ok and 'no column of subjects that can be read: scanner.csv' in str(report)
    assert 'diagnosis, age, sex not known of any subject: no table of subjects is read' in (
        str(report)
    )
    (tmp_path / 'folder.csv').mkdir()
    (tmp_path / 'bytes.csv').write_bytes(b'\xff\xfe\x00subject')
    assert 'bytes.csv, scanner.csv' in str(look(tmp_path))
    (tmp_path / 'other.csv').write_text('subject,age\nQ1,60\n')
    assert faults(look(tmp_path)) == ['table'] and 'other.csv' in str(look(tmp_path))


def test_sheets_of_a_workbook(tmp_path):
    pytest.importorskip('openpyxl')
    with pd.ExcelWriter(tmp_path / 't.xlsx') as book:
        pd.DataFrame(dict(column=['ID'], meaning=['who'])).to_excel(book, sheet_name='legend')
        pd.DataFrame(dict(ID=[1, 2], Age=[60, 71.5], Sex=['F', None])).to_excel(
            book, sheet_name='people', index=False
        )
    table = read_subjects(tmp_path / 't.xlsx')
    assert table.index.tolist() == ['1', '2'] and table.age.tolist() == [60, 71.5]
    assert table.sex.isna().tolist() == [False, True]
    assert "of 2 sheets, 'people' is read" in ' '.join(table.attrs['notes'])
    with pd.ExcelWriter(tmp_path / 't.xlsx') as book:
        for name in ('legend', 'a', 'b'):
            pd.DataFrame(dict(ID=['1']) if name != 'legend' else dict(x=['1'])).to_excel(
                book, sheet_name=name, index=False
            )
    with pytest.raises(ValueError, match='in the sheets a, b'):
        read_subjects(tmp_path / 't.xlsx')
    (tmp_path / 't.xlsx').write_text('no workbook')
    with pytest.raises(ValueError, match='does not read as a workbook'):
        read_subjects(tmp_path / 't.xlsx')


def test_a_workbook_without_openpyxl(tmp_path, monkeypatch):
    oasis1(tmp_path / 'oasis.xlsx')
    monkeypatch.setitem(sys.modules, 'openpyxl', None)
    with pytest.raises(ImportError, match=r"pip install 'brainldm\[prepare\]'"):
        read_subjects(tmp_path / 'oasis.xlsx')
    volumes(tmp_path, *[NAMES_OASIS1[0].format(i) for i in range(1, 4)])
    assert any('openpyxl is not installed' in o for o in look(tmp_path).notes)


# ---- class folders


@pytest.mark.parametrize(
    'path, unit, split, diagnosis',
    [
        ('AD_NC/train/AD/218391_78.jpeg', '218391', 'train', 'AD'),
        ('Val/NC/218391_78.png', '218391', 'validate', 'NC'),
        ('AD/5_1.png', '5', None, 'AD'),
        (
            'Training/Mild Dementia/OAS1_0028_MR1_mpr-1_100.jpg',
            'OAS1_0028_MR1_mpr-1',
            'train',
            'Mild Dementia',
        ),
        ('AD/sub-01/sub-01_7.png', 'sub-01', None, 'AD'),
        ('test/P1/P1_7.png', 'P1', 'test', None),
    ],
)
def test_paths_of_pictures(path, unit, split, diagnosis):
    said = parse_image_path(path)
    assert (said['unit'], said['split'], said['diagnosis']) == (unit, split, diagnosis)


def classes(root, split=lambda i: '', names=('AD', 'NC'), unit='{:06d}', n=8):
    for i in range(n):
        for k in range(2):
            save(
                root / split(i) / names[i % 2] / f'{unit.format(100+i)}_{78+k}.png',
                image(10 * i + k),
            )
    return root


@pytest.mark.parametrize(
    'kind, kw, layout',
    [
        ('flat', {}, 'classes'),
        (
            'three words',
            dict(names=('Mild Dementia', 'Non Demented'), unit='OAS1_{:04d}_MR1_mpr-1'),
            'classes',
        ),
        (
            'val',
            dict(
                split=lambda i: 'train' if i < 6 else 'val' if i < 7 else 'test',
                names=('MCI', 'CN'),
            ),
            'adni',
        ),
        (
            'capitals',
            dict(split=lambda i: 'Train' if i < 6 else 'Validation' if i < 7 else 'TEST'),
            'adni',
        ),
    ],
)
def test_class_folders(kind, kw, layout, tmp_path):
    report = look(classes(tmp_path, **kw))
    assert report.ok and find_layout(tmp_path) == layout, str(report)
    assert report.manifest.subject.nunique() == 8 and set(report.manifest.diagnosis) == set(
        kw.get('names', ('AD', 'NC'))
    )
    assert (
        set(report.manifest.split) == {'train', 'validate', 'test'}
        and report.manifest.slice.min() == 78
    )


def test_runs_of_the_kaggle_oasis_set_are_one_subject(tmp_path):
    for i in range(4):
        for r in (1, 2):
            save(
                tmp_path / f'Data/Mild Dementia/OAS1_{i:04d}_MR1_mpr-{r}_100.jpg', image(10 * i + r)
            )
    report = look(tmp_path)
    assert (
        report.ok
        and report.manifest.subject.nunique() == 4
        and set(report.manifest.session) == {'MR1 run-1', 'MR1 run-2'}
    )


@pytest.mark.parametrize(
    'name',
    [
        'mildDem{}.jpg',
        'moderate_{}.jpg',
        'nonDem{}.jpg',
        'verymildDem{}.jpg',
        'very_mild_{}.jpg',
        '26 ({}).jpg',
        'non_{}.jpg',
        '0006f8d4-2b0a-4b8c-9d1e-0000000000{:02d}.jpg',
    ],
)
def test_a_set_without_subjects_is_refused_by_name(name, tmp_path):
    for i in range(12):
        save(tmp_path / 'train/Mild_Demented' / name.format(i), image(i))
    with pytest.raises(ValueError, match='four-class') as e:
        look(tmp_path)
    assert 'manifest.csv' in str(e.value)


def test_subject_folders_are_no_classes(tmp_path):
    for i in range(4):
        for k in range(3):
            save(tmp_path / f'P{i:02d}/scan_{k}.png', image(10 * i + k))
    with pytest.raises(ValueError, match="'scan' in the folders P00, P01"):
        look(tmp_path)


# ---- too few, and what training prints


def test_two_subjects_in_all_are_said(tmp_path):
    assert any(
        'no validation subject (2 subjects in all)' in o
        for o in look(volumes(tmp_path, 'sub-01', 'sub-02')).notes
    )
    assert not any('no validation subject' in o for o in look(volumes(tmp_path, 'sub-03')).notes)


def test_opening_for_training_prints_the_notes(tmp_path, capsys):
    volumes(tmp_path / 'in', *[f'sub-{i:02d}' for i in range(5)], 'aseg')
    for progress in (True, False):
        open_dataset(tmp_path / 'in', CONFIG, progress=progress, cache_dir=tmp_path / 'cache')
        assert ('note: 1 label maps ignored: aseg.nii.gz' in capsys.readouterr().out) == progress
