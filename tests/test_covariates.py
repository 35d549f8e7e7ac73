"""Kinds and levels of covariates, one reader for conditions, and what training asks of the data:
said before it begins."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from brainldm.engineering.configs import PRESETS, AEConfig, DataConfig
from brainldm.engineering.covariates import (
    Covariate,
    covariate_kind,
    covariate_notes,
    describe_manifest,
    describe_unlearned,
    encode_column,
    encode_covariates,
    explain_unlearned,
    find_covariates,
    level_text,
    mask_levels_not_in_train,
    read_conditions,
    write_levels,
)
from brainldm.data import SliceDataset, check_dataset, open_dataset
from brainldm.engineering.stage1 import (
    EVALUATOR_PATCH,
    covariates_from_dict,
    covariates_to_dict,
    size_multiple,
)
from brainldm.engineering.codec import check_conditions
from brainldm.advanced.fidelity import FeatureNet
from brainldm.engineering.runs import read_config
from brainldm.engineering.sharing import strip_settings
from brainldm.sampling import BrainLDM
from brainldm.engineering.cli import (
    add_training_findings,
    conditions_of_rows,
    main,
    read_condition_flags,
)

SITES = (
    Covariate('site', 'categorical', values=('1', '2', '10')),
    Covariate('age', 'continuous', range=(50.0, 90.0)),
)


def cohort(folder, n=20, size=24, **columns):
    "A manifest of n subjects with two images each; `columns` holds a value a subject."
    noise, rows = np.random.default_rng(0), []
    for i in range(n):
        for k in range(2):
            path = folder / f'images/s{i:03d}_{k}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 255, (size, size), dtype=np.uint8)).save(path)
            rows.append(
                dict(
                    path=f'images/{path.name}',
                    subject=f's{i:03d}',
                    slice=k,
                    diagnosis='AD' if i % 2 else 'NC',
                    **{name: values[i] for name, values in columns.items()},
                )
            )
    pd.DataFrame(rows).to_csv(folder / 'manifest.csv', index=False)
    return folder


# ---- levels and kinds


@pytest.mark.parametrize(
    'value', [1, 1.0, '1', '1.0', ' 1', '01', np.int64(1), np.float32(1), '+1']
)
def test_one_level_has_one_form(value):
    assert level_text(value) == '1' and encode_column([value], SITES[0]).tolist() == [0]
    assert read_conditions(dict(site=value), SITES) == dict(site='1')


@pytest.mark.parametrize('value', ['1e0', '1_0', 'AD', 'None', '-', '1.', '0x1', '１'])
def test_other_texts_are_not_turned_into_numbers(value):
    assert level_text(value) == value.rstrip('.')


def test_levels_of_former_runs_load():
    "Runs made before hold numbers where texts are now: their order decides the index, and stays."
    old = json.loads(
        json.dumps([dict(name='site', kind='categorical', values=[2.0, 1.0], range=None)])
    )
    assert covariates_from_dict(old)[0].values == ('2', '1') and encode_column(
        [1, '2'], covariates_from_dict(old)[0]
    ).tolist() == [1, 0]
    assert covariates_from_dict(
        covariates_to_dict(covariates_from_dict(old))
    ) == covariates_from_dict(old)
    with pytest.raises(ValueError, match='different values'):
        Covariate('site', 'categorical', values=(1, '1.0'))


@pytest.mark.parametrize(
    'name,values,kind',
    [
        ('diagnosis', [0, 1, 1], 'categorical'),
        ('sex', ['0', '1', '1'], 'categorical'),
        ('age', ['60', '70', '80'], 'continuous'),
        ('slice', [1, 2, 3], 'continuous'),
        ('site', [1.0, 2.0, 3.0], 'continuous'),
        ('scanner', ['a', 'b', '3'], None),
        ('sex', ['F', 'M', '3'], 'categorical'),
        ('smoker', [True, False, True], 'categorical'),
        ('scanner', ['a', 'b', 'b'], 'categorical'),
    ],
)
def test_rule_of_kinds(name, values, kind):
    column = pd.Series(values, name=name)
    if kind:
        assert covariate_kind(column) == kind
    else:
        with pytest.raises(ValueError, match='numbers, and'):
            covariate_kind(column)


def test_declared_kinds_win_and_are_learned():
    rows = pd.DataFrame(
        dict(
            slice=[0, 1, 2],
            subject=['a', 'b', 'c'],
            split='train',
            site=[1, 2, 3],
            apoe=[33.0, 34.0, None],
            years=[8, 9, 9],
        )
    )
    found = {
        c.name: c
        for c in find_covariates(
            rows, DataConfig(categorical=('site', 'apoe'), continuous=('years',))
        )
    }
    assert (
        found['site'].values == ('1', '2', '3')
        and found['apoe'].values == ('33', '34')
        and found['years'].range == (8, 9)
    )
    assert 'site' not in [c.name for c in find_covariates(rows)]
    assert encode_covariates(rows, list(found.values()))['apoe'].tolist() == [0, 1, -1]
    with pytest.raises(ValueError, match='mixed'):
        covariate_kind(pd.Series(['1', 'mixed'], name='years'), DataConfig(continuous=('years',)))


@pytest.mark.parametrize(
    'wrong',
    [
        dict(categorical=('age',)),
        dict(continuous=('sex',)),
        dict(categorical=('site',), continuous=('site',)),
        dict(categorical=('slice',)),
    ],
)
def test_kinds_that_cannot_be_declared(wrong):
    with pytest.raises(ValueError, match='Expected one kind'):
        DataConfig(**wrong)
    with pytest.raises(TypeError, match='categorical'):
        DataConfig(categorical='site')


def test_tables_of_two_origins_meet():
    covariates = [Covariate('sex', 'categorical', values=('0', '1'))]
    rows = pd.DataFrame(
        dict(subject=['a', 'b', 'c'], slice=0, split='train', sex=['1.0', '0.0', None])
    )
    dataset = SliceDataset(np.zeros((3, 8, 8), np.uint8), rows, covariates)
    assert dataset.manifest.sex.tolist()[:2] == ['1', '0'] and dataset.conditions[
        'sex'
    ].tolist() == [1, 0, -1]
    assert write_levels(dataset.manifest, covariates) is dataset.manifest


# ---- one reader for conditions


def test_every_way_to_ask_reads_alike():
    requested = [
        read_condition_flags(dict(age=70.0), ('site=1',), SITES),
        read_condition_flags({}, ('site=1.0', 'age=70'), SITES, '--to'),
        read_conditions(dict(site=1, age='70'), SITES),
        read_conditions(dict(site=np.float64(1), age=np.int64(70)), SITES),
    ]
    assert all(o == dict(site='1', age=70.0) for o in requested)
    assert check_conditions(dict(site=[1, '2'], age=70), SITES, 2)['site'].tolist() == [0, 1]
    assert check_conditions(dict(site=torch.tensor([10, 1])), SITES, 2)['site'].tolist() == [2, 0]


@pytest.mark.parametrize(
    'requested,said',
    [
        (dict(site=3), 'Expected one of 1, 2, 10'),
        (dict(site='nan'), 'Expected one of 1'),
        (dict(age=91), 'Expected 50 to 90'),
        (dict(age='nan'), 'Expected a number, 50 to 90'),
        (dict(age='old'), 'Expected a number, 50 to 90'),
        (dict(weight=3), 'unknown condition'),
    ],
)
def test_what_cannot_be_asked_for(requested, said):
    with pytest.raises(ValueError, match=said):
        read_conditions(requested, SITES)


def test_another_case_is_named_not_taken():
    sex = (Covariate('sex', 'categorical', values=('F', 'M')),)
    with pytest.raises(ValueError, match='Try sex=M'):
        read_conditions(dict(sex='m'), sex)


def test_what_a_run_has_never_seen_is_left_open(capsys):
    rows = pd.DataFrame(dict(site=[1.0, 7.0, None], age=[60, 95, 70]))
    assert conditions_of_rows(rows, SITES) == dict(site=['1', None, None], age=[60.0, None, 70.0])
    assert 'site of 1 row(s), such as 7.0' in capsys.readouterr().out


# ---- levels outside train


def test_a_level_outside_train_is_unknown_there(tmp_path):
    data = cohort(tmp_path, sex=['X' if i == 3 else 'FM'[i % 2] for i in range(20)])
    rows = pd.read_csv(data / 'manifest.csv')
    rows['split'] = [
        'test' if o == 's003' else 'validate' if o == 's004' else 'train' for o in rows.subject
    ]
    rows.to_csv(data / 'manifest.csv', index=False)
    with pytest.warns(UserWarning, match=r"sex 'X' occurs outside train only \(s003 in test\)"):
        dataset = open_dataset(
            data, DataConfig(size=24), progress=False, cache_dir=tmp_path / 'cache'
        )
    sex = next(c for c in dataset.covariates if c.name == 'sex')
    assert (
        sex.values == ('F', 'M')
        and dataset.manifest.sex[dataset.manifest.subject == 's003'].isna().all()
    )
    # both of that subject's slices, and no other
    assert (dataset.conditions['sex'] == -1).sum() == 2
    assert len(dataset.subset('test')) == 2


def test_check_names_rare_levels_and_numbers_that_may_be_groups(tmp_path, capsys):
    data = cohort(
        tmp_path,
        sex=['X' if i == 3 else 'FM'[i % 2] for i in range(20)],
        site=[i % 3 + 1 for i in range(20)],
    )
    assert main(['check', str(data), '--preset', 'tiny', '--size', '32', '--columns', 'site']) == 0
    said = capsys.readouterr().out
    assert (
        's003' in said
        and 'site holds 3 whole values (1, 2, 3)' in said
        and '--categorical site' in said
    )
    assert (
        main(['check', str(data), '--preset', 'tiny', '--size', '32', '--categorical', 'site']) == 0
    )
    said = capsys.readouterr().out
    assert 'whole values' not in said and any(
        o.split()[:2] == ['site', 'category'] for o in said.splitlines()
    )
    assert (
        main(['check', str(data), '--preset', 'tiny', '--size', '32', '--continuous', 'site']) == 0
    )
    assert 'whole values' not in capsys.readouterr().out


def test_lines_of_the_covariates():
    rows = pd.DataFrame(
        dict(
            subject=['a', 'b', 'c', 'd'],
            slice=[0, 1, 2, 9],
            split=['train'] * 3 + ['test'],
            age=[60, 70, None, 99],
            sex=['1.0', '0', '1', '2'],
        )
    )
    covariates = find_covariates(rows)
    lines = describe_manifest(rows, covariates)
    assert [o.split() for o in lines] == [
        ['slice', 'number', '0', 'to', '2'],
        ['age', 'number', '60', 'to', '70;', 'unknown', 'for', '1', 'of', '4', 'subjects'],
        ['sex', 'category', '0', '(1),', '1', '(2)'],
    ]
    settled, notes = mask_levels_not_in_train(write_levels(rows, covariates), covariates)
    assert settled.sex.tolist()[:3] == ['1', '0', '1'] and settled.sex.isna().tolist() == [
        False
    ] * 3 + [True]
    assert len(covariate_notes(rows, covariates)) == 2 and 'd in test' in notes[0]


# ---- sizes and subjects that every stage needs


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_say_which_unet_follows(preset):
    auto, ldm = PRESETS[preset]
    factor = auto.patch * 2 ** (len(auto.channels) - 1)
    assert (
        auto.unet_levels == len(ldm.channels)
        and size_multiple(auto) % (factor * 2 ** (len(ldm.channels) - 1)) == 0
    )
    assert auto.data.size % size_multiple(auto) == 0


def test_the_evaluator_is_asked():
    known = (Covariate('slice', 'continuous', range=(0, 1)),)
    size = size_multiple(AEConfig(patch=1, channels=(8,), unet_levels=1))
    assert size == EVALUATOR_PATCH
    FeatureNet(known)(torch.zeros(1, 1, size, size))
    with pytest.raises(RuntimeError):
        FeatureNet(known)(torch.zeros(1, 1, size + 2, size + 2))


@pytest.mark.parametrize(
    'n,word',
    [(1, 'no subject in validate, 1 in all'), (2, 'no subject in validate, 2 in all'), (3, None)],
)
def test_check_says_when_subjects_are_too_few(n, word, tmp_path, capsys):
    data = cohort(tmp_path, n=n)
    status, said = main(['check', str(data), '--preset', 'tiny', '--size', '32']), None
    said = capsys.readouterr().out
    assert status == bool(word) and (word or 'no fault found') in said and 'no interval' in said


def test_check_and_stage_1_ask_for_all_stages(tmp_path, capsys):
    "104 fits the autoencoder of this preset and not the UNet: 112 is the next that fits both."
    data = cohort(tmp_path, n=5, size=40)
    assert main(['check', str(data), '--preset', 'tiny', '--size', '104']) == 1
    assert 'Try --size 112' in capsys.readouterr().out
    assert (
        main(
            [
                'train',
                'autoencoder',
                str(data),
                '--run',
                str(tmp_path / 'run'),
                '--preset',
                'tiny',
                '--size',
                '104',
            ]
        )
        == 1
    )
    assert 'Try size=112' in capsys.readouterr().err and not (tmp_path / 'run').exists()
    found = add_training_findings(
        check_dataset(data, DataConfig(crop=48), progress=False),
        DataConfig(crop=48),
        PRESETS['tiny'][0],
    )
    assert found.faults.path.tolist() == ['--crop 48']


def test_check_names_a_column_that_cannot_be_learned(tmp_path, capsys):
    data = cohort(tmp_path, n=5)
    assert main(['check', str(data), '--preset', 'tiny', '--size', '32', '--columns', 'apoe']) == 1
    assert "'apoe' is not known for any train row" in capsys.readouterr().out


# ---- what a run never learned


@pytest.mark.parametrize(
    'name, table, said',
    [
        ('diagnosis', None, 'no table of subjects was read'),
        (
            'diagnosis',
            dict(file='adni.csv', matched=0, subjects=2, columns=['age']),
            'no row of the table of subjects adni.csv matched one of the 2 subjects',
        ),
        (
            'diagnosis',
            dict(file='adni.csv', matched=2, subjects=2, columns=['age']),
            'adni.csv, which has a row for 2 of 2 subjects, has no such column, but age',
        ),
        (
            'diagnosis',
            dict(file=None, matched=2, subjects=2, columns=['diagnosis']),
            'leaves its column blank',
        ),
        ('mmse', None, 'training was not told to learn it: --columns mmse'),
        ('apoe', None, 'no subject of the train split has a value of it'),
    ],
)
def test_why_a_condition_was_never_learned(name, table, said):
    rows = pd.DataFrame(
        dict(
            subject=['a', 'b'],
            split=['train', 'test'],
            slice=[0, 1],
            mmse=[29, 21],
            apoe=[None, 'e4'],
            diagnosis=[None, None],
        )
    )
    rows.attrs['table'] = table
    learned = find_covariates(rows)
    unlearned = json.loads(json.dumps(describe_unlearned(rows, learned)))
    with pytest.raises(ValueError, match=f"unknown condition '{name}'. This run never") as e:
        read_conditions({name: 'AD'}, learned, unlearned)
    assert said in str(e.value) and 'Expected one of slice' in str(e.value)
    with pytest.raises(ValueError, match='This run never learned') as e:
        read_condition_flags({}, (f'{name}=AD',), learned, unlearned=unlearned)
    assert said in str(e.value)
    assert explain_unlearned(name, {}) == ''  # a run of an earlier version


def test_a_run_says_why_it_never_learned_a_condition(tmp_path, capsys):
    "Both stages say what check says, and the question is answered without the data."
    data = cohort(tmp_path / 'data', n=8, mmse=list(range(20, 28)))
    rows = pd.read_csv(data / 'manifest.csv').drop(columns='diagnosis')
    rows.to_csv(data / 'manifest.csv', index=False)
    lines = ''.join(f's{i:03d},{60+i}\n' for i in range(8))
    (data / 'subjects.csv').write_text('subject,age\n' + lines)
    run, flags = str(tmp_path / 'run'), ['--total-images', '8', '--warmup-images', '4']
    flags += ['--preset', 'tiny', '--validate-every', '8', '--checkpoint-every', '8']
    assert main(['train', 'autoencoder', str(data), '--run', run, '--size', '32', *flags]) == 0
    first = capsys.readouterr().out
    assert main(['train', 'ldm', str(data), '--run', run, *flags]) == 0
    for said in (first, capsys.readouterr().out):
        assert 'note: columns not used: mmse' in said and 'age         number' in said
        assert 'diagnosis, sex not known of any subject: the table of subjects' in said
    for words, why in (
        (['--diagnosis', 'AD'], 'subjects.csv, which has a row for 8 of 8 subjects, has no such'),
        (['--condition', 'mmse=25'], '--columns mmse'),
    ):
        assert main(['sample', run, '--n', '1', '--steps', '2', *words]) == 1
        said = capsys.readouterr().err
        assert 'This run never learned' in said and why in said and 'slice, age' in said
    with pytest.raises(ValueError, match='subjects.csv, which has a row for 8 of 8'):
        BrainLDM.load(run).sample(1, diagnosis='AD', steps=2)
    shared = strip_settings(read_config(run))
    assert 'subjects.csv' not in json.dumps(shared) and shared['ldm']['unlearned']['known']
