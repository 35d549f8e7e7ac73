"""The diffusion model's training for maintainers: refusals, presets, latents, several processes.

What both trainings share: test_training.py."""

import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from brainldm.engineering.configs import PRESETS, LDMConfig, ScheduleConfig, bare_type, check_config
from brainldm.data import SliceDataset
from brainldm.vae import AutoencoderKL
from brainldm.scheduler import NoiseSchedule, check_terminal_signal
from brainldm.unet import UNet
from brainldm.engineering.loop import infer
from brainldm.engineering.runs import read_config, read_log
from brainldm.engineering.stage1 import autoencoder_args, load_autoencoder
from brainldm.engineering.stage2 import cache_latents, unet_args
from brainldm.training import train_autoencoder, train_ldm
from brainldm.engineering import devices
from test_training import (
    AE,
    LDM,
    STAGES,
    begin,
    dataset,
    make_dataset,
    quick_figures,
    refuses,
    same,
    straight,
    strike,
    weights,
)

# ------------------------------------------------------------------ refusals


def test_other_data_than_the_autoencoders_is_refused(straight, tmp_path):
    begin('ldm', straight, tmp_path / 'run')
    with pytest.raises(ValueError, match='not what the autoencoder was trained on'):
        train_ldm(make_dataset(1), tmp_path / 'run', LDM, progress=False)
    assert not (tmp_path / 'run' / 'state').exists() and 'ldm' not in read_config(tmp_path / 'run')


@pytest.mark.parametrize(
    'change,match',
    [
        (dict(crop=24), 'crop=24, not None'),
        (dict(columns=('apoe',)), r"columns=\('apoe',\), not \(\)"),
    ],
)
def test_other_cuts_and_columns_than_the_autoencoders_are_refused(
    change, match, dataset, straight, tmp_path
):
    "The fingerprint sums up the files; what was made of them is compared setting by setting."
    other = SliceDataset(dataset.images, dataset.manifest)
    other.config = replace(AE.data, **change)
    begin('ldm', straight, tmp_path / 'run')
    with pytest.raises(ValueError, match=f'refuse_leak: .*{match}'):
        train_ldm(other, tmp_path / 'run', LDM, progress=False)
    with pytest.raises(ValueError, match=f'resolve_crop: .*{match}'):
        train_autoencoder(other, tmp_path / 'new', AE, progress=False)
    assert 'ldm' not in read_config(tmp_path / 'run') and not (tmp_path / 'new').exists()


def test_without_an_autoencoder_nothing_is_left(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match='autoencoder.safetensors'):
        train_ldm(dataset, tmp_path / 'run', LDM, progress=False)
    assert not (tmp_path / 'run').exists()


def test_half_trained_autoencoder_is_refused(dataset, tmp_path, monkeypatch):
    strike(monkeypatch, 'autoencoder_loss', 60, 'ctrl-c')
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(dataset, tmp_path / 'run', AE, progress=False)
    with pytest.raises(ValueError, match='has seen 64 of 80 images'):
        train_ldm(dataset, tmp_path / 'run', LDM, progress=False)


@pytest.mark.parametrize(
    'name', [f.name for f in fields(LDMConfig) if bare_type(f) in (int, float)]
)
def test_no_number_goes_unchecked(name):
    refuses(LDMConfig, name)


def test_a_weight_that_is_a_text():
    with pytest.raises(TypeError, match="snr_gamma='5'. Expected float . None"):
        check_config(replace(LDM, snr_gamma='5'))
    check_config(replace(LDM, snr_gamma=5))


@pytest.mark.parametrize(
    'kind,fits', [('linear', True), ('scaled_linear', True), ('cosine', False), ('flow', False)]
)
def test_noise_is_asked_for_only_where_a_picture_can_be_made_of_it(kind, fits, tmp_path):
    schedule = ScheduleConfig(
        beta_schedule=kind, prediction_type='epsilon', zero_terminal_snr=False
    )
    if fits:
        return check_terminal_signal(schedule)
    with pytest.raises(ValueError, match="prediction_type='epsilon', and .e-05 of the signal"):
        train_ldm(None, tmp_path, LDMConfig(schedule=schedule))  # refused before anything is read


def test_the_offset_is_for_questions_that_pure_noise_can_answer():
    config = LDMConfig(
        snr_gamma=5.0,
        snr_offset=1.0,
        schedule=NoiseSchedule(1000, 'linear', zero_terminal_snr=False, prediction_type='epsilon'),
    )
    with pytest.raises(ValueError, match='snr_offset=1.0 with prediction_type'):
        check_config(config)
    check_config(replace(config, schedule=NoiseSchedule()))
    check_config(replace(config, snr_offset=0.0))


@pytest.mark.parametrize('name', PRESETS)
def test_presets_can_be_built(name):
    auto, ldm = PRESETS[name]
    check_config(auto)
    check_config(ldm)
    with torch.device('meta'):
        net = AutoencoderKL(**autoencoder_args(auto))
        unet = UNet(**unet_args(ldm, auto.latent_channels, ()))
        z, _ = net.encode(torch.empty(1, 1, auto.data.size, auto.data.size))
        assert unet(z, torch.zeros(1, dtype=torch.int64)).shape == z.shape


# ------------------------------------------------------------------ what a run leaves behind


def test_latents_are_standard_means(dataset, straight):
    auto, _ = load_autoencoder(straight)
    file = weights(straight, 'ldm')
    precision = devices.pick_precision('auto', torch.device('cpu'))
    z = cache_latents(auto, dataset.subset('train'), precision, batch_size=7, progress=False)
    whole = infer(auto, precision, 'encode')(
        dataset.subset('train').__getitems__(range(20))['image']
    )[0].float()
    torch.testing.assert_close(z, whole, rtol=0.02, atol=0.02)
    z = (
        cache_latents(auto, dataset.subset('train'), precision, progress=False)
        - file['latent_mean']
    ) / file['latent_std']
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(2), atol=1e-4, rtol=0)


def test_no_covariates(dataset, straight, tmp_path):
    begin('ldm', straight, tmp_path / 'run')
    assert (
        train_ldm(
            dataset,
            tmp_path / 'run',
            replace(LDM, covariates=(), total_images=16, early_images=0),
            progress=False,
        ).covariates
        == ()
    )


# ------------------------------------------------------------------ several processes

LAUNCHED = '''
import os, signal, sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from brainldm import training
from test_diffusion import *
run,stop = Path({run!r}),signal.SIGTERM
loss = training.ldm_loss
def struck(model, batch, generator, seen, *args, **kwargs):
    if run.name=='b' and seen==36 and torch.is_grad_enabled() and os.environ['RANK']=='1': signal.raise_signal(stop)
    return loss(model, batch, generator, seen, *args, **kwargs)
training.ldm_loss = struck
train_autoencoder(make_dataset(), run, replace(AE, batch_size=2, total_images=40), progress=False)
try: unet = train_ldm(make_dataset(), run, replace(LDM, batch_size=2), progress=False)
except KeyboardInterrupt:
    print('stopped', os.environ['RANK'])
    unet = train_ldm(make_dataset(), run, replace(LDM, batch_size=2), resume=True, progress=False)
total = sum(v.double().sum().item() for v in unet.state_dict().values())
print('weights', os.environ['RANK'], repr(total))
'''


@pytest.mark.skipif(
    not os.environ.get('BRAINLDM_SLOW'), reason='half a minute; set BRAINLDM_SLOW=1'
)
def test_two_processes(tmp_path):
    """Both processes end with the same weights, one writes, and a stop that reaches only one of
    them stops both."""
    out = {}
    for name in 'ab':
        script = tmp_path / f'{name}.py'
        script.write_text(
            LAUNCHED.format(tests=str(Path(__file__).parent), run=str(tmp_path / name))
        )
        # what accelerate launch
        done = subprocess.run(
            [
                sys.executable,
                '-m',
                'torch.distributed.run',
                '--nproc_per_node',
                '2',
                '--master_port',
                '29511',
                str(script),
            ],
            # starts on GPUs
            capture_output=True,
            text=True,
            timeout=300,
            env=dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        out[name] = done.stdout
        assert (
            len(set(re.findall(r'weights \d (\S+)', done.stdout))) == 1
            and done.stdout.count('weights') == 2
        ), done.stdout
    assert 'stopped' not in out['a'] and out['b'].count('stopped') == 2
    for stage in STAGES:
        same(tmp_path / 'a', tmp_path / 'b', stage)
    assert [
        o['images']
        for o in read_log(tmp_path / 'b' / 'log.jsonl')
        if o['stage'] == 'ldm' and 'loss' in o
    ] == list(range(8, 81, 8))
