"""Stage 1 of every kind, through training, files and the command line: codes, the discriminator,
resume, stage 2 on top."""

import json
import re
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from brainldm import training
from brainldm.engineering import stage1
from brainldm.engineering.configs import check_config
from brainldm.engineering.plotting import plot_history
from brainldm.engineering.runs import Checkpoint, load_weights, read_config, read_log, save_weights
from brainldm.engineering.stage1 import load_autoencoder
from brainldm.training import autoencoder_loss, make_discriminator, train_autoencoder, train_ldm
from brainldm.sampling import BrainLDM
from brainldm.advanced.evaluation import codebook_scores, reconstruction_scores
from brainldm.engineering.cli import main
from test_training import AE, LDM, Crash, make_dataset, strike

VQ = replace(AE, kind='vq', num_embeddings=16)
KINDS = {
    'kl + discriminator': replace(
        AE,
        adversarial=True,
        adversarial_start=40,
        discriminator_warmup=16,
        discriminator_channels=(8, 16),
        random_weight=0.1,
        feature_weight=0.1,
    ),
    'vq': VQ,
    'vq by gradient': replace(VQ, codebook_ema=False, codebook_start='uniform'),
    'vq + discriminator, told': replace(
        VQ,
        adversarial=True,
        adversarial_start=40,
        discriminator_warmup=16,
        discriminator_channels=(8, 16),
        random_weight=0.1,
        adversarial_loss='hinge',
        covariates=('slice', 'diagnosis'),
    ),
    'fsq': replace(AE, kind='fsq', fsq_levels=(4, 3, 3)),
}


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(stage1, 'show_grid', lambda *args, **kwargs: plt.figure(figsize=(1, 1)))


@pytest.fixture(scope='module')
def dataset():
    return make_dataset()


@pytest.fixture(scope='module')
def straight(dataset, tmp_path_factory):
    "One run of each kind, never stopped."
    folder = tmp_path_factory.mktemp('stage1')
    for name, config in KINDS.items():
        train_autoencoder(dataset, folder / name, config, progress=False)
    return folder


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('what,at', [('ctrl-c', 36), ('crash', 68)])
def test_resumed_is_the_same_as_never_stopped(
    name, what, at, dataset, straight, tmp_path, monkeypatch
):
    """Codebook, its statistics, the histogram, the discriminator and its optimizer: all of it, bit
    for bit."""
    with monkeypatch.context() as patch:
        strike(patch, 'autoencoder_loss', at, what)
        with pytest.raises((Crash, KeyboardInterrupt)):
            train_autoencoder(dataset, tmp_path / 'run', KINDS[name], progress=False)
    train_autoencoder(dataset, tmp_path / 'run', KINDS[name], resume=True, progress=False)
    for a, b in (
        (
            load_weights(straight / name / 'autoencoder.safetensors'),
            load_weights(tmp_path / 'run' / 'autoencoder.safetensors'),
        ),
        (
            Checkpoint(straight / name / 'state' / 'autoencoder').load(),
            Checkpoint(tmp_path / 'run' / 'state' / 'autoencoder').load(),
        ),
    ):
        assert (
            set(a[0]) == set(b[0])
            and all(torch.equal(a[0][k], b[0][k]) for k in a[0])
            and a[1] == b[1]
        )
    assert read_log(straight / name / 'log.jsonl') == read_log(tmp_path / 'run' / 'log.jsonl')


@pytest.mark.parametrize('name', KINDS)
def test_file_holds_the_trained_network_and_no_critic(name, dataset, straight):
    model, about = load_autoencoder(straight / name)
    again = train_autoencoder(dataset, straight / name, KINDS[name], resume=True, progress=False)
    batch = dataset.__getitems__([0, 7, 29])
    with torch.no_grad():
        assert torch.equal(model(batch['image'], batch)[0], again(batch['image'], batch)[0])
    assert about['kind'] == KINDS[name].kind and not any(
        'discriminator' in k for k in load_weights(straight / name / 'autoencoder.safetensors')[0]
    )


@pytest.mark.parametrize('name', KINDS)
def test_log_says_what_happened(name, straight):
    rows, config = read_log(straight / name / 'log.jsonl'), KINDS[name]
    judged, paid = [
        [o['images'] for o in rows if k in o] for k in ('discriminator_accuracy', 'gan_weight')
    ]
    assert judged == ([32, 40, 48, 56, 64, 72, 80] if config.adversarial else []) and paid == (
        [48, 56, 64, 72, 80] if config.adversarial else []
    )
    checked = [o for o in rows if 'val_ssim' in o]
    assert all(
        ('val_codebook_usage' in o) == (config.kind != 'kl') and 'val_sharpness' in o
        for o in checked
    )
    assert len(plot_history(rows, 'autoencoder').axes) == (3 if config.adversarial else 2)


def test_nothing_of_the_adversary_is_computed_before_its_time(dataset):
    config = KINDS['kl + discriminator']
    discriminator, batch = make_discriminator(config, ()), dataset.__getitems__([0, 1, 2, 3])

    def never(*args):
        raise AssertionError('called')

    discriminator.step = discriminator.raw.forward = never
    model, gen = (
        stage1.build_autoencoder('kl', stage1.autoencoder_args(config)),
        torch.Generator(),
    )
    for seen in (0, 20):
        autoencoder_loss(model, batch, gen, seen, config, discriminator)
    with pytest.raises(AssertionError, match='called'):
        autoencoder_loss(model, batch, gen, 24, config, discriminator)


def test_gradient_of_codes_from_the_first_step(dataset):
    """The predecessor's codebook had no gradient for 10,000 steps: its loss hung on the
    discriminator's gate."""
    config = KINDS['vq by gradient']
    model = stage1.build_autoencoder('vq', stage1.autoencoder_args(config))
    discriminator = make_discriminator(
        replace(
            config,
            adversarial=True,
            adversarial_start=config.total_images - 1,
            discriminator_warmup=0,
        ),
        (),
    )
    loss, _ = autoencoder_loss(
        model, dataset.__getitems__([0, 1, 2, 3]), torch.Generator(), 0, config, discriminator
    )
    loss.backward()
    assert (
        model.quantizer.codebook.grad.abs().max() > 0
        and model.encoder.stem.weight.grad.abs().max() > 0
    )


def test_accumulated_critic_moves_once_an_update(dataset, tmp_path):
    config = replace(KINDS['kl + discriminator'], accumulate=2, batch_size=2, total_images=64)
    train_autoencoder(dataset, tmp_path / 'run', config, progress=False)
    tensors, info = Checkpoint(tmp_path / 'run' / 'state' / 'autoencoder').load()
    steps = {
        v.item()
        for k, v in tensors.items()
        if k.startswith('discriminator.optimizer') and k.endswith('.step')
    }
    assert steps == {(64 - 24) // 4}  # from 24 images on, four an update


@pytest.mark.parametrize('name', ['vq', 'fsq', 'vq + discriminator, told'])
def test_stage_2_works_on_codes(name, dataset, straight, tmp_path):
    shutil.copytree(straight / name, tmp_path / 'run')
    train_ldm(
        dataset, tmp_path / 'run', replace(LDM, total_images=16, early_images=0), progress=False
    )
    model = BrainLDM.load(tmp_path / 'run', device='cpu')
    seen, quantizer = [], model.autoencoder.quantizer
    quantizer.register_forward_pre_hook(lambda *_: None)
    lookup = quantizer.lookup
    # generated latents pass through the quantiser
    quantizer.lookup = lambda codes: seen.append(codes) or lookup(codes)
    images = model.sample(3, slice=2, diagnosis='AD', steps=2)
    assert images.shape == (3, 1, 32, 32) and images.isfinite().all() and seen[0].shape == (3, 8, 8)


@pytest.mark.parametrize('name', KINDS)
def test_stage_1_draws_by_itself(name, dataset, straight):
    model = BrainLDM.load(straight / name, device='cpu', precision='no')
    told = (
        dict(slice=3, diagnosis='AD')
        if 'told' in name
        else dict(slice=3) if 'vq' in name or 'fsq' in name else {}
    )
    five, two = model.sample_stage1(5, seed=1, **told), model.sample_stage1(
        2, seed=1, batch_size=1, **told
    )
    torch.testing.assert_close(two, five[:2], rtol=0, atol=1e-4)
    assert five.shape == (5, 1, 32, 32) and not torch.equal(
        five, model.sample_stage1(5, seed=2, **told)
    )
    for wrong, error in (
        (dict(apoe='e4'), ValueError),
        (dict(slice=99), ValueError),
        (dict(n=0), ValueError),
        (dict(n=1.5), TypeError),
        (dict(seed=-1), ValueError),
    ):
        with pytest.raises(error, match='Expected'):
            model.sample_stage1(**{**told, **wrong})
    if 'told' in name:
        with pytest.raises(ValueError, match='no value of slice'):
            model.sample_stage1(1)


def test_codes_of_another_height_are_drawn_from_another_histogram(dataset, straight):
    model = BrainLDM.load(straight / 'vq', device='cpu', precision='no')
    counts = model.autoencoder.histogram.counts
    # the lowest stretch, the highest
    counts.zero_()
    counts[0, ..., 3] = 1
    counts[7, ..., 5] = 1
    low, high = (
        model.decode(model.autoencoder.quantizer.lookup(torch.full((1, 8, 8), k))) for k in (3, 5)
    )
    torch.testing.assert_close(model.sample_stage1(1, slice=0), low, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.sample_stage1(1, slice=4), high, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', KINDS)
def test_scores(name, dataset, straight):
    model, held_out = BrainLDM.load(straight / name, device='cpu'), dataset.subset('validate')
    scores = reconstruction_scores(model, held_out, straight / name)
    assert 0 <= scores['sharpness'] and scores['baseline_mean_slice']['sharpness'] < 1
    assert ('perplexity' in scores) == (KINDS[name].kind != 'kl') and codebook_scores(
        model, held_out
    ).items() <= scores.items()


@pytest.mark.parametrize(
    'change,message',
    [
        (dict(kind='gan'), "kind='gan'. Expected one of kl, vq, fsq"),
        (dict(num_embeddings=0), 'num_embeddings=0'),
        (dict(fsq_levels=(8, 2)), 'three levels or more'),
        (dict(fsq_levels=()), 'three levels or more'),
        (dict(restart_below=1.0), 'less than 1'),
        (dict(restart_below=-0.1), 'less than 1'),
        (dict(commitment_cost=-1.0), '0 or more'),
        (dict(adversarial_loss='wgan'), 'Expected one of nonsaturating, hinge'),
        (dict(adversarial_weight=-1.0), '0 or more'),
        (dict(discriminator_warmup=-1), '0 or more'),
        (dict(discriminator_learning_rate=0.0), 'above 0'),
        (dict(discriminator_channels=()), 'one number above 0 a level'),
        (dict(codebook_start='zeros'), 'Expected one of kmeans, uniform'),
    ],
)
def test_settings_that_cannot_work(change, message):
    with pytest.raises(ValueError, match='check_config: ' + next(iter(change))) as e:
        check_config(replace(AE, **change))
    assert message in str(e.value)


@pytest.mark.parametrize(
    'change',
    [
        dict(adversarial='no'),
        dict(codebook_ema=1),
        dict(compile='yes'),
        dict(auto_find_batch_size=0),
        dict(channels=(8, '8')),
        dict(attention_levels=(0, 1)),
        dict(discriminator_channels=8),
        dict(covariates='slice'),
        dict(log_with=3),
        dict(data={}),
    ],
)
def test_settings_of_another_type(change):
    with pytest.raises(TypeError, match='check_config: ' + next(iter(change))):
        check_config(replace(AE, **change))


def test_k_means_needs_pictures(tmp_path, dataset):
    with pytest.raises(ValueError, match='Encode more images, or use fewer codes'):
        train_autoencoder(
            dataset, tmp_path / 'run', replace(VQ, num_embeddings=4096), progress=False
        )
    assert not (tmp_path / 'run').exists()


def test_a_file_of_an_unknown_kind(straight, tmp_path):
    shutil.copytree(straight / 'vq', tmp_path / 'run')
    tensors, about = load_weights(tmp_path / 'run' / 'autoencoder.safetensors')
    for change, message in (
        (dict(kind='vqgan'), "kind='vqgan'"),
        (dict(kind='kl'), 'of this version'),
        (dict(args={}), 'of this version'),
    ):
        save_weights(tmp_path / 'run' / 'autoencoder.safetensors', tensors, dict(about, **change))
        with pytest.raises(ValueError, match=message):
            load_autoencoder(tmp_path / 'run')


def test_resume_of_a_run_from_before_these_settings(straight, dataset, tmp_path):
    """A config.json that knows nothing of codes is read as what it was: a KL-VAE without a
    discriminator."""
    train_autoencoder(dataset, tmp_path / 'run', replace(AE, total_images=40), progress=False)
    path = tmp_path / 'run' / 'config.json'
    settings = json.loads(path.read_text())
    new = [
        k
        for k in settings['autoencoder']['config']
        if k.startswith(
            (
                'kind',
                'num_emb',
                'commit',
                'codebook',
                'restart',
                'fsq',
                'advers',
                'discriminator',
                'random',
                'feature',
            )
        )
    ]
    for k in new:
        del settings['autoencoder']['config'][k]
    path.write_text(json.dumps(settings))
    assert len(new) == 17
    train_autoencoder(
        dataset, tmp_path / 'run', replace(AE, total_images=40), resume=True, progress=False
    )
    with pytest.raises(ValueError, match="kind='vq', was 'kl'"):
        train_autoencoder(
            dataset,
            tmp_path / 'run',
            replace(AE, total_images=40, kind='vq'),
            resume=True,
            progress=False,
        )


@pytest.fixture
def phantom(tiny_run):
    return tiny_run[1]


@pytest.mark.parametrize(
    'flags',
    [
        (
            '--kind vq --num-embeddings 32 --adversarial --adversarial-start 40'
            ' --discriminator-warmup 16'
        ),
        '--kind fsq --no-adversarial',
        '--kind kl --adversarial --adversarial-start 40',
    ],
)
def test_the_command(flags, phantom, tmp_path, capsys):
    run = str(tmp_path / 'run')
    short = (
        '--preset tiny --total-images 80 --log-every 5 --validate-every 80 --checkpoint-every 80'
        .split()
    )
    assert main(['train', 'autoencoder', str(phantom), '--run', run, *short, *flags.split()]) == 0
    config = read_config(run)['autoencoder']['config']
    assert (
        config['adversarial'] == ('--adversarial' in flags.split())
        and config['kind'] == flags.split()[1]
    )
    assert main(['reconstruct', run, str(phantom), '--split', 'test']) == 0
    out = capsys.readouterr().out
    assert 'sharpness' in out and ('codes used' in out) == (config['kind'] != 'kl')
    assert main(['reconstruct', run, str(phantom), '--split', 'test', '--json']) == 0
    scores = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert ({'codebook_usage', 'perplexity'} <= set(scores)) == (config['kind'] != 'kl')
    ask = ['--slice', '3'] if config['kind'] != 'kl' else []
    assert main(['sample', run, '--generator', 'stage1', '--n', '3', *ask]) == 0
    assert '3 synthetic images in' in capsys.readouterr().out
    main(['check', str(tmp_path / 'run' / 'samples' / 'generated_000')])
    # a model that was trained for seconds generates no brains, and check may say so
    faults = re.findall(r'(?m)^fault: (.*?) \(', capsys.readouterr().out)
    assert set(faults) <= {'alignment', 'skull'}
    assert len(list((Path(run) / 'samples' / 'generated_000').glob('image_*.png'))) == 3


def test_the_command_refuses(phantom, tmp_path, capsys):
    run = str(tmp_path / 'run')
    assert (
        main(
            [
                'train',
                'autoencoder',
                str(phantom),
                '--run',
                run,
                '--preset',
                'tiny',
                '--kind',
                'vq',
                '--restart-below',
                '3',
            ]
        )
        == 1
    )
    assert 'restart_below=3' in capsys.readouterr().err and not Path(run).exists()


LAUNCHED = '''
import os, sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_stage1 import *
stage1.show_grid = lambda *args, **kwargs: __import__('matplotlib.pyplot').pyplot.figure(figsize=(1, 1))
config = replace(KINDS['vq + discriminator, told'], batch_size=2, total_images=64)
model = train_autoencoder(make_dataset(), Path({run!r}), config, progress=False)
(Path({run!r}).parent/os.environ['RANK']).write_text(repr(sum(v.double().sum().item() for v in model.state_dict().values())))
'''


def test_two_processes_end_with_one_codebook_and_one_critic(tmp_path):
    """Codes, histogram and adaptive weight are reduced across processes, so that both end with the
    same network."""
    script = tmp_path / 'launched.py'
    script.write_text(LAUNCHED.format(tests=str(Path(__file__).parent), run=str(tmp_path / 'run')))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--nproc_per_node',
            '2',
            '--master_port',
            str(port),
            str(script),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / '0').read_text() == (tmp_path / '1').read_text()
    assert [
        o['images']
        for o in read_log(tmp_path / 'run' / 'log.jsonl')
        if 'discriminator_accuracy' in o
    ] == [32, 40, 48, 56, 64]


def test_the_prior_on_the_command_line(phantom, tmp_path, capsys):
    run, short = (
        str(tmp_path / 'run'),
        '--total-images 80 --log-every 5 --validate-every 80 --checkpoint-every 80'.split(),
    )
    assert (
        main(
            [
                'train',
                'autoencoder',
                str(phantom),
                '--run',
                run,
                '--preset',
                'tiny',
                '--kind',
                'vq',
                '--num-embeddings',
                '32',
                *short,
            ]
        )
        == 0
    )
    assert main(['train', 'prior', str(phantom), '--run', run, '--preset', 'tiny', *short]) == 0
    assert main(['bits', run, str(phantom), '--split', 'test', '--json']) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said['bits']['uniform'] == 5 and set(said['bits']) == {
        'prior',
        'uniform',
        'histogram',
        'place',
        'place_slice',
    }
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['bits test'] == said
    other = shutil.copytree(phantom, tmp_path / 'other')
    people = pd.read_csv(other / 'subjects.csv')
    people.assign(age=people.age + 1).to_csv(other / 'subjects.csv', index=False)
    with pytest.warns(UserWarning, match='prior of .* was trained with other covariates: age of'):
        assert main(['bits', run, str(other)]) == 0
    path = next(other.rglob('*.png'))
    # another image than stage 1 was given
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert (
        main(['bits', run, str(other)]) == 1
        and 'not what the autoencoder was trained on' in capsys.readouterr().err
    )
    assert (
        main(['sample', run, '--generator', 'prior', '--n', '2', '--slice', '3', '--top-k', '8'])
        == 0
    )
    assert 'Known covariates: slice' in capsys.readouterr().out
    assert (
        main(['report', run]) == 0
        and 'Sampled code by code' in (tmp_path / 'run' / 'report.html').read_text()
    )
    for wrong, message in (
        (['--generator', 'prior', '--steps', '5'], '--steps does nothing'),
        (['--generator', 'ldm', '--top-k', '5'], '--top-k does nothing'),
        (['--top-k', '0'], 'top_k=0'),
        (['--slice', '99'], 'slice=99'),
        (['--generator', 'ldm'], 'train ldm'),
    ):
        assert main(['sample', run, '--n', '1', *wrong]) == 1 and message in capsys.readouterr().err
    assert (
        main(['train', 'prior', str(phantom), '--run', run, '--preset', 'tiny', *short]) == 1
        and 'Add --resume' in capsys.readouterr().err
    )
