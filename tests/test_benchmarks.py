"""Every benchmark runs with tiny settings and prints the rows it must have.

No time is evaluated here."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip('diffusers')
pytest.importorskip('monai')
TINY = dict(repeats=1, preset='tiny', precision='no')


@pytest.fixture
def load(monkeypatch):
    "Import a benchmark as its command line would."
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'benchmarks'))
    torch.set_num_threads(1)
    return importlib.import_module


def written(out, name):
    "What a benchmark left: its rows and its circumstances, beside a plot."
    assert (out / f'{name}.png').stat().st_size > 5_000
    found = json.loads((out / f'{name}.json').read_text())
    assert {
        'date',
        'machine',
        'threads',
        'torch',
        'precision',
        'clock',
        'repeats',
        'preset',
    } <= set(found['where'])
    assert '/' not in found['where']['machine']
    return found


def names(found):
    return [o['what'] for o in found['rows']]


def test_sampling(load, tmp_path):
    from brainldm.advanced.solvers import SOLVERS

    o = load('sampling')
    o.main(o.Sampling(**TINY, out=tmp_path, batch_sizes=(2, 3), steps=2))
    found = written(tmp_path, 'sampling')
    for n in (2, 3):
        for sampler in SOLVERS:
            assert (
                sum(k.startswith(sampler) and k.endswith(f'batch {n}') for k in names(found)) == 2
            )
        assert (
            sum(k.startswith('images a second') and k.endswith(f'batch {n}') for k in names(found))
            == 2
        )
    assert {k['target'] for k in found['rows']} == {'', '<= 1.05', '>= 1.0'}
    a, b = (found['where']['parameters'][k] for k in ('brainldm', 'diffusers'))
    assert abs(a / b - 1) <= 0.03


def test_training_step(load, tmp_path):
    o = load('training_step')
    table = o.main(o.Steps(**TINY, out=tmp_path, steps=2))
    found = written(tmp_path, 'training_step')
    for stage in ('autoencoder', 'ldm', 'prior'):
        assert f'{stage}: fit / bare' in names(found) and f'{stage}: load a batch' in names(found)
        assert (f'{stage}: average of the weights' in names(found)) == (stage != 'autoencoder')
    assert (table.ratio > 0).all() and set(table.target) == {'', '<= 1.10'}


@pytest.mark.slow
def test_networks(load, tmp_path):
    o = load('networks')
    table = o.main(
        o.Networks(
            repeats=1,
            preset='tiny',
            out=tmp_path,
            size=64,
            batch_size=2,
            unet_batch_size=2,
            precisions=('no',),
            memory=False,
        )
    )
    found = written(tmp_path, 'networks')
    for kind, peers in dict(autoencoder=2, codes=1, unet=2).items():
        for what in ('training', 'inference'):
            assert sum(k.startswith(f'{kind} {what}') for k in names(found)) == peers + 1
        sizes = table.parameters[table.what.str.startswith(kind)]
        assert sizes.max() / sizes.min() < 1.05  # each within 3 % of ours
    assert (table.gflop_an_image > 0).all() and (table.share_of_peak > 0).all()
    job = o.Networks(preset='tiny', size=64, batch_size=2, unet_batch_size=2)
    assert o.in_fresh_process(o.memory_of, 'autoencoder', 'brainldm', job, 'no') > 0


def test_scaling(load, tmp_path, monkeypatch):
    o = load('scaling')
    # a process takes seconds to start
    monkeypatch.setattr(o, 'in_fresh_process', lambda call, *args: call(*args))
    table = o.main(
        o.Scaling(
            **TINY,
            out=tmp_path,
            sizes=(32, 64),
            batch_size=2,
            counts=(64, 256),
            files=(8,),
            batches=4,
        )
    )
    found = written(tmp_path, 'scaling')
    assert {
        'autoencoder, 64 pixels / 32',
        'unet, 64 pixels / 32',
        'open_dataset, 8 files',
        'loader / training, 256 images',
    } <= set(names(found))
    rows = table[table.what.str.startswith('loader')]
    assert list(rows.data_mb) == [64 * 64 * 64 / 1e6, 256 * 64 * 64 / 1e6] and rows[
        ['own_mb', 'latents_mb']
    ].notna().all(axis=None)


def test_time_to_ssim(load, tmp_path, tiny_run):
    o = load('time_to_ssim')
    table = o.main(
        o.Race(
            **TINY, out=tmp_path, data=tiny_run[1], limit=0.3, lap=0.1, held_out=2, rates=(1e-3,)
        )
    )
    found = written(tmp_path, 'time_to_ssim')
    assert (
        names(found) == ['brainldm', 'brainldm / MONAI, rate 0.001']
        and found['where']['data'] == 'phantom'
    )
    assert set(table.arrived) == {'0 of 1'} and (table.seconds >= 0.3).all()
    assert all(0 < k[0] and 0 < k[1] and k[2] < 1 for c in found['curves'][0].values() for k in c)


def test_volumes(load, tmp_path, tiny_run, monkeypatch):
    from brainldm.engineering.cli import data_config
    from brainldm.data import open_dataset
    from brainldm.advanced.fidelity import FEATURES
    from brainldm.engineering.configs import VOLUME_PRESETS
    from brainldm.advanced.volume import train_volume

    o, run = load('volumes'), tmp_path / 'run'
    shutil.copytree(tiny_run[0], run)
    config = dataclasses.replace(
        VOLUME_PRESETS['tiny'],
        total_images=32,
        warmup_images=8,
        validate_every=10**6,
        checkpoint_every=10**6,
    )
    train_volume(open_dataset(tiny_run[1], data_config(run)), run, config, progress=False)
    short = dataclasses.replace(FEATURES, total_images=64, warmup_images=8)
    judge = o.feature_net
    monkeypatch.setattr(
        o, 'feature_net', lambda run, data: judge(run, data, short, (16, 32), False)
    )
    table = o.main(
        o.Volumes(tiny_run[1], run, tmp_path / 'out', brains=1, steps=2, correlations=(0.0, 1.0))
    )
    assert list(table.index) == ['scans', 'neighbours', 'noise correlated 0', 'noise correlated 1']
    assert (
        table.loc['scans', 'SSIM of neighbors']
        > table.loc['noise correlated 0', 'SSIM of neighbors']
    )
    found = json.loads((tmp_path / 'out' / 'table.json').read_text())
    assert set(found['rows']) == set(table.index) and found['where']['brains'] == 1


@pytest.fixture
def quick_judge(load, monkeypatch):
    "Evaluates that learn for seconds."
    from brainldm.advanced.fidelity import FEATURES

    o = load('ablate_unet')
    short, judge = dataclasses.replace(FEATURES, total_images=64, warmup_images=8), o.feature_net
    monkeypatch.setattr(
        o, 'feature_net', lambda run, data: judge(run, data, short, (16, 32), False)
    )
    return o


@pytest.fixture(scope='module')
def with_crowd(own_cache, tmp_path_factory):
    """(run folder with an autoencoder, data folder): 24 phantom subjects, 10 of them held out,
    since fewer than 50 images cannot be evaluated."""
    from brainldm.data import open_dataset
    from brainldm.engineering.configs import DataConfig
    from brainldm.engineering.configs import PhantomConfig
    from brainldm.engineering.phantom import make_cohort
    from brainldm.engineering.configs import AEConfig
    from brainldm.training import train_autoencoder

    folder, config = tmp_path_factory.mktemp('crowd'), DataConfig(
        size=32, validate_fraction=0.42, test_fraction=0.1
    )
    data = make_cohort(
        folder / 'phantom', PhantomConfig(num_subjects=24, num_slices=6, size=32), progress=False
    )
    train_autoencoder(
        open_dataset(data, config, progress=False),
        folder / 'run',
        AEConfig(
            data=config,
            total_images=64,
            warmup_images=16,
            channels=(16,),
            attention_levels=(False,),
            patch=4,
            latent_channels=4,
        ),
        progress=False,
    )
    return folder / 'run', data


def test_ablate_unet(quick_judge, tmp_path, with_crowd, monkeypatch):
    from brainldm.engineering.stage2 import unet_args
    from brainldm.engineering.configs import check_config
    from brainldm.unet import UNet

    o = quick_judge
    job = o.Ablation(
        with_crowd[1],
        (with_crowd[0],),
        tmp_path,
        only='base,wide,skips added',
        images=32,
        steps=2,
        preset='tiny',
        seeds=1,
    )
    for preset in ('tiny', 'laptop'):
        every, size = o.variants(dataclasses.replace(job, preset=preset)), {}
        for name, config in every.items():
            check_config(config)
            with torch.device('meta'):
                size[name] = sum(p.numel() for p in UNet(**unet_args(config, 8, ())).parameters())
        assert (
            size['narrow'] < size['base'] < size['wide']
            and size['no attention'] < size['base'] < size['attention at every level']
        )
        assert 'attention at the deepest level' not in size  # that is the preset
        assert [k for k, v in every.items() if v == every['base']] == ['base', 'skips added']
        with torch.device('meta'):
            net = UNet(**unet_args(every['dropout 0.1'], 8, ()))
        assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
        # --only divides by commas
        assert size['base'] < min(size['a block more'], size['a level more']) and all(
            ',' not in k for k in every
        )
    table = o.main(job)
    assert list(table.index) == [
        f'run: {k}' for k in ('base', 'skips added', 'wide', 'scans, decoded')
    ]
    assert (
        table['parameters, M'].iloc[1]
        < table['parameters, M'].iloc[0]
        < table['parameters, M'].iloc[2]
    )
    assert json.loads((tmp_path / 'table.json').read_text())['where']['images'] == 32
    monkeypatch.setattr(o, 'train_ldm', None)  # whatever is finished is not trained again
    assert o.main(job).equals(table)
    with pytest.raises(SystemExit, match='unknown variant'):
        o.main(dataclasses.replace(job, only='taller'))


def test_ablate_latent(quick_judge, load, tmp_path, with_crowd):
    o = load('ablate_latent')
    job = o.Ablation(
        with_crowd[1],
        with_crowd[0],
        tmp_path,
        only='scale',
        tune_images=32,
        images=32,
        steps=2,
        preset='tiny',
        seeds=2,
    )
    table = o.main(job)
    found = json.loads((tmp_path / 'table.json').read_text())
    first, second = (o['excess KID'] for o in found['rows']['as before'])
    assert first != second and 'over 2 seeds' in found['said']  # another seed is another training
    assert list(table.index) == ['as before', 'scale']
    assert found['rows']['as before'][0]['brain SSIM'] != found['rows']['scale'][0]['brain SSIM']
    with pytest.raises(SystemExit, match='unknown variant'):
        o.main(dataclasses.replace(job, only='taller'))
    config = json.loads((with_crowd[0] / 'config.json').read_text())
    config['autoencoder']['config']['adversarial'] = True
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'config.json').write_text(json.dumps(config))
    with pytest.raises(SystemExit, match='other has codes or a discriminator'):
        o.variants(other)


def test_half_a_latent_costs_what_its_picture_misses(load, tiny_run):
    from brainldm.engineering.stage1 import load_autoencoder

    o, (model, _) = load('ablate_latent'), load_autoencoder(tiny_run[0])
    batch = dict(image=torch.rand(2, 1, 64, 64) * 2 - 1)

    def cost(weight):
        return o.priced_loss(model, batch, torch.Generator().manual_seed(0), 0, 0.0, weight)

    plain, _ = cost(0.0)
    loss, logs = cost(0.25)
    torch.testing.assert_close(loss, plain + 0.25 * logs['half'])
    flat = dict(image=torch.zeros(2, 1, 64, 64))
    model.encode = lambda x, cond: (torch.zeros(2, 4, 8, 8), torch.full((2, 4, 8, 8), -60.0))
    model.decode = lambda z, cond: z.new_full((2, 1, 8 * z.shape[-2], 8 * z.shape[-1]), 0.5)
    torch.testing.assert_close(
        o.priced_loss(model, flat, torch.Generator().manual_seed(0), 0, 0.0, 1.0)[1]['half'],
        torch.tensor(0.5),
    )


def test_ablate_stage1(load, tmp_path, tiny_run):
    o = load('ablate_stage1')
    table = o.main(o.Ablation(tiny_run[1], tmp_path, images=24, preset='tiny', seeds=1))
    assert list(table.index) == list(o.variants(24, 0, 'tiny')) and (table.ssim > 0).all()
    assert (
        table['codebook_usage'].notna().sum() == 6
        and table['discriminator_accuracy'].notna().sum() == 5
    )
    assert {'KL.png', 'kl.png'} & {k.name for k in tmp_path.iterdir()} and (
        tmp_path / 'codes.png'
    ).is_file()


def test_ablate_prior(load, tmp_path, tiny_run, monkeypatch):
    from brainldm.engineering.configs import DataConfig
    from brainldm.data import open_dataset
    from brainldm.engineering.configs import AEConfig
    from brainldm.training import train_autoencoder

    o, config = load('ablate_prior'), DataConfig(size=64, validate_fraction=0.2, test_fraction=0.2)
    train_autoencoder(
        open_dataset(tiny_run[1], config, progress=False),
        tmp_path / 'run',
        AEConfig(
            data=config,
            total_images=16,
            warmup_images=8,
            kind='vq',
            num_embeddings=12,
            channels=(8,),
            attention_levels=(False,),
            patch=8,
            latent_channels=4,
        ),
        progress=False,
    )
    job = o.Ablation(
        tiny_run[1], tmp_path / 'run', tmp_path / 'out', maps=64, preset='tiny', seeds=2
    )
    before = sorted(k.name for k in (tmp_path / 'run').rglob('*'))
    table = o.main(job)
    assert (
        list(table.index) == list(o.variants(job))
        and sorted(k.name for k in (tmp_path / 'run').rglob('*')) == before
    )
    size = (1e6 * table['parameters, M']).round().astype(int)
    assert (
        size['base'] - size['rotary'] == 2 * 8 * 32
        and size['rotary and learned'] == size['base']
        and size['base'] - size['tied'] == 12 * 32
    )
    assert (
        size['no vectors'] < size['base'] < size['half as deep again'] < size['half as wide again']
    )
    assert (table['held-out bits'] > 0).all() and (
        table.drop('base')['held-out bits'] != table.loc['base', 'held-out bits']
    ).all()
    found = json.loads((tmp_path / 'out' / 'table.json').read_text())
    assert (
        set(found['rows']) == set(table.index)
        and set(found['floors']) == {'uniform', 'histogram', 'place', 'place_slice'}
        and found['where']['maps'] == 64
    )
    monkeypatch.setattr(o, 'Learner', None)  # whatever is finished is not trained again
    assert o.main(job).equals(table)
    with pytest.raises(SystemExit, match='Give another --out'):
        o.main(dataclasses.replace(job, maps=80))
    with pytest.raises(SystemExit, match='unknown variant'):
        o.main(dataclasses.replace(job, only='base,taller'))


def test_rotary_attention_knows_distances_alone(load, monkeypatch):
    o = load('ablate_prior')
    o.check_relative()
    angles = o.place_angles
    # places bent; places forgotten
    for fault in (lambda *a, **k: angles(*a, **k) ** 2, lambda *a, **k: angles(*a, **k) * 0):
        monkeypatch.setattr(o, 'place_angles', fault)
        with pytest.raises(AssertionError):
            o.check_relative()


def test_a_peer_of_another_size_is_refused(load, monkeypatch):
    o = load('peers')
    monkeypatch.setitem(o.WIDTHS['MONAI DiffusionModelUNet'], 'tiny', (64, 64))
    with pytest.raises(ValueError, match='Change its entry in WIDTHS'):
        o.unets('tiny')


def test_own_seconds_need_one_thread(load):
    o = load('timing')
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match='OMP_NUM_THREADS=1'):
            o.device_and_precision(o.Job(clock='cpu'))
    finally:
        torch.set_num_threads(1)


def test_interleave_takes_turns(load):
    o, calls = load('timing'), []
    table = o.interleave(
        dict(a=lambda: calls.append('a'), b=lambda: calls.append('b')),
        o.Job(repeats=3),
        torch.device('cpu'),
    )
    assert ''.join(calls) == 'ab' * 4 and table.shape == (3, 2)  # one round is not counted
    assert o.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]
