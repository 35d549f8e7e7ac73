"Runs and weights of version 0.1 are read with the names of today."

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from brainldm.engineering.configs import AEConfig, DataConfig, LDMConfig, PriorConfig, VolumeConfig
from brainldm.engineering.runs import (
    RENAMED,
    Checkpoint,
    load_weights,
    read_config,
    read_info,
    read_log,
    read_metrics,
    translate,
    weights_hash,
)
from brainldm.engineering.sharing import audit_verdicts, generator_hash, pretrained_run
from brainldm.engineering.codec import Codec
from brainldm.sampling import BrainLDM
from brainldm.advanced.prior import CodeSampler

HERE = Path(__file__).parent / 'runs_of_0_1'
RUNS = ['phantom-128', 'phantom-128-codes']


def old_names():
    return {old for table in RENAMED.values() for old in table}


def keys(values):
    if isinstance(values, list):
        return {k for o in values for k in keys(o)}
    if not isinstance(values, dict):
        return set()
    return set(values) | {k for o in values.values() for k in keys(o)}


@pytest.fixture
def run(tmp_path):
    for name in ('config.json', 'metrics.json', 'log.jsonl'):
        (tmp_path / name).write_text((HERE / name).read_text())
    return tmp_path


def test_settings_have_their_names_of_today(run):
    settings = read_config(run)
    kinds = dict(autoencoder=AEConfig, ldm=LDMConfig, prior=PriorConfig, volume=VolumeConfig)
    for stage, kind in kinds.items():
        config = dict(settings[stage]['config'])
        data = (
            DataConfig(
                **{k: tuple(v) if isinstance(v, list) else v for k, v in config.pop('data').items()}
            )
            if stage == 'autoencoder'
            else None
        )
        made = kind(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in config.items()
                if k != 'schedule'
            },
            **({'data': data} if data else {}),
        )
        assert all(
            json.loads(json.dumps(getattr(made, k))) == v
            for k, v in config.items()
            if k != 'schedule'
        )
    assert (
        settings['ldm']['config']['covariate_dropout'] == 0.2
        and settings['ldm']['config']['condition_dropout'] == 0.3
    )
    assert settings['autoencoder']['config']['discriminator_learning_rate'] == 0.0004
    assert settings['autoencoder']['config']['data']['to_gray'] is True
    assert settings['volume']['config']['neighbor_dropout'] == 0.6


def test_columns_of_a_table_keep_their_names(run):
    "A study may have a column that is called as a setting once was."
    data = read_config(run)['ldm']['data']
    assert set(data['columns']) == {'slice', 'floor', 'how'} and [
        o['name'] for o in data['covariates']
    ] == ['slice', 'floor', 'how']
    assert read_metrics(run)['samples ldm']['reading']['floor'] == dict(
        error=1.0, interval_95=None, baseline=8.0
    )


def test_numbers_have_their_names_of_today(run):
    metrics = read_metrics(run)
    assert metrics['reconstruction test']['baseline_mean_slice']['ssim'] == 0.68
    assert metrics['reconstruction test']['n_slices_new_position'] == 0
    assert set(metrics['samples ldm']['diversity']) == {'synthetic', 'train', 'held_out'}
    assert metrics['samples ldm']['options']['steps'] == 15
    records = read_log(run / 'log.jsonl')
    assert records[0]['discriminator_accuracy'] == 0.75 and records[0]['discriminator'] == 1.25
    assert records[1]['val_mse_without_neighbors'] == 0.5


def test_a_state_of_an_adversarial_training_is_read(tmp_path):
    info = dict(seen=8, scaler=None, critic=dict(seen=8, scaler=None))
    (tmp_path / 'states').mkdir()
    save_file(
        {'model.w': torch.ones(2), 'critic.model.w': torch.zeros(3)},
        tmp_path / 'states' / '000000000008.safetensors',
        dict(brainldm=json.dumps(info)),
    )
    tensors, about = Checkpoint(tmp_path / 'states').load()
    assert (
        sorted(tensors) == ['discriminator.model.w', 'model.w']
        and about['discriminator'] == info['critic']
    )


def test_translation_changes_nothing_that_is_new():
    for file, table in RENAMED.items():
        new = {o: 1 for o in table.values()}
        assert translate(new, file) == new == translate({o: 1 for o in table}, file)


@pytest.mark.parametrize('name', RUNS)
def test_shipped_runs_hold_no_old_name_once_read(name):
    run = pretrained_run(name)
    settings, metrics = read_config(run), read_metrics(run)
    assert not keys({k: o['config'] for k, o in settings.items()}) & set(RENAMED['config.json'])
    assert not keys(metrics) & set(RENAMED['metrics.json'])
    assert 'baseline_mean_slice' in metrics['reconstruction test']
    for path in run.glob('*.safetensors'):
        assert (
            not set(read_info(path)) & set(RENAMED['safetensors'])
            and read_info(path) == load_weights(path)[1]
        )


@pytest.mark.parametrize('name,kind', zip(RUNS, (BrainLDM, CodeSampler)))
def test_shipped_runs_generate(name, kind):
    model = kind.load_pretrained(name, device='cpu')
    assert isinstance(model, Codec) and model.slice_covariate.name == 'slice'
    assert not {k.split('.')[0] for k in model.autoencoder.state_dict()} & old_names()
    options = dict(steps=2) if kind is BrainLDM else {}
    image = model.sample(1, diagnosis='AD', slice=15, age=70, sex='F', seed=0, **options)
    assert image.shape == (1, 1, 128, 128) and bool(image.isfinite().all())


@pytest.mark.parametrize('name,generator', zip(RUNS, ('ldm', 'prior')))
def test_shipped_audits_belong_to_the_shipped_weights(name, generator):
    run = pretrained_run(name)
    assert read_metrics(run)[f'samples {generator}']['memorization']['weights'] == generator_hash(
        run, generator
    )
