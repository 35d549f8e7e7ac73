"""Whole brains: batches and seeds do not matter, a stopped training goes on bit for bit, what is
given comes back, and bad input is refused."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from test_covariates import cohort

from brainldm.engineering.configs import AEConfig, DataConfig, LDMConfig, VolumeConfig
from brainldm.data import check_dataset, open_dataset
from brainldm.engineering.runs import load_weights, open_run, read_log, save_weights
from brainldm.training import train_autoencoder, train_ldm
from brainldm.engineering.codec import SYNTHETIC
from brainldm.sampling import BrainLDM
from brainldm.advanced.volume import (
    BrainVolumes,
    NeighborUNet,
    correlate_noise,
    find_neighbors,
    generation_order,
    neighbors_of,
    resolve_spacing,
    sample_shared_noise,
    save_volumes,
    stack_neighbors,
    to_nifti,
    train_volume,
)
from brainldm.engineering.cli import data_config, describe_space, main
from brainldm.advanced import volume as module

SHORT = VolumeConfig(
    total_images=96,
    batch_size=8,
    warmup_images=16,
    validate_every=48,
    checkpoint_every=16,
    log_every=1,
    ema_images=32,
    preview_steps=2,
)


@pytest.fixture(scope='module')
def dataset(tiny_run):
    return open_dataset(tiny_run[1], data_config(tiny_run[0]), progress=False)


@pytest.fixture(scope='module')
def trained(tiny_run, dataset, tmp_path_factory):
    "A run whose slices have learned to follow their neighbors, a little."
    run = shutil.copytree(tiny_run[0], tmp_path_factory.mktemp('volume') / 'run')
    train_volume(dataset, run, SHORT, progress=False)
    return run


@pytest.fixture(scope='module')
def model(trained):
    "Weights shaken up, so that neighbors matter: after a hundred images they hardly do."
    model = BrainVolumes.load(trained, device='cpu', precision='no')
    torch.manual_seed(0)
    torch.nn.init.normal_(model.unet.unet.down.conv_in.neighbours.weight, std=0.3)
    return model


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_batches_do_not_matter(model, batch_size):
    requested = dict(n=3, diagnosis=['AD', 'NC', 'AD'], steps=3, seed=4, guidance_scale=2.0)
    same(model.sample_volume(batch_size=batch_size, **requested), model.sample_volume(**requested))


def test_a_brain_is_named_by_seed_and_number(model):
    three = model.sample_volume(3, steps=2, seed=1)
    same(model.sample_volume(1, steps=2, seed=1), three[:1])
    assert len({o.numpy().tobytes() for o in three}) == 3
    assert not torch.equal(model.sample_volume(1, steps=2, seed=2), three[:1])


@pytest.mark.parametrize('sampler', ['ddim', 'dpmpp'])
def test_a_brain_does_not_depend_on_its_batch(model, sampler):
    "Three at once, one at a time, or in two parts as two processes would make them."
    options = dict(steps=2, seed=1, sampler=sampler, diagnosis='AD')
    three = model.sample_volume(3, **options)
    same(model.sample_volume(3, batch_size=1, **options), three)
    same(
        torch.cat([model.sample_volume(2, **options), model.sample_volume(1, first=2, **options)]),
        three,
    )
    shared = sample_shared_noise(model, 3, 0.5, **options)
    same(
        torch.cat(
            [
                sample_shared_noise(model, 2, 0.5, **options),
                sample_shared_noise(model, 1, 0.5, first=2, **options),
            ]
        ),
        shared,
    )
    with pytest.raises(ValueError, match='first=-1'):
        model.sample_volume(1, first=-1, **options)


def test_every_slice_hears_its_neighbour_and_nobody_further(model):
    "Change one given slice: what follows it changes; without the chain nothing would."
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    a, b = (model.sample_volume(1, steps=2, slices=range(1, 6), given={3: o[None]}) for o in images)
    assert all((a[0, k] - b[0, k]).abs().max() > 1e-3 for k in (1, 2, 3))
    both = model.sample_volume(
        1, steps=2, slices=range(1, 6), given={3: images[:1], 2: images[1:], 4: images[1:]}
    )
    one = model.sample_volume(1, steps=2, slices=range(1, 6), given={2: images[1:], 4: images[1:]})
    # slice 3 is walled in: slices 1 and 5 cannot hear it
    same(both[0, [0, 1, 3, 4]], one[0, [0, 1, 3, 4]])


def test_what_is_given_comes_back(model):
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    brains = model.sample_volume(2, steps=2, given={2: images})
    same(brains[:, 2], model.reconstruct(images)[:, 0])


def test_before_training_it_is_the_plain_model(tiny_run):
    flat = BrainLDM.load(tiny_run[0], device='cpu', precision='no')
    fresh = BrainVolumes(
        flat.autoencoder,
        flat.size,
        NeighborUNet(flat.unet),
        flat.schedule,
        flat.latent_mean,
        flat.latent_std,
    )
    same(
        fresh.sample_volume(1, steps=3, diagnosis='AD', seed=2),
        sample_shared_noise(flat, 1, 0.0, steps=3, diagnosis='AD', seed=2),
    )


@pytest.mark.parametrize('sampler', ['ddim', 'dpmpp'])
def test_slices_can_be_chosen(model, sampler):
    assert model.sample_volume(1, slices=range(2, 5), steps=2, sampler=sampler).shape == (
        1,
        3,
        64,
        64,
    )


@pytest.mark.parametrize(
    'requested, message',
    [
        (dict(slices=[0, 2, 4]), 'rise by 1'),
        (dict(slices=[3]), '2 or more'),
        (dict(slices=range(4, 9)), 'slice=6'),
        (dict(sampler='ddpm'), 'no fresh noise'),
        (dict(n=0), 'n=0'),
        (dict(n=1.5), 'n=1.5'),
        (dict(n='a'), "n='a'"),
        (dict(slice=3), 'Expected slices=...'),
        (dict(steps=0), 'steps=0'),
        (dict(batch_size=0), 'batch_size=0'),
        (dict(seed=-1), 'seed=-1'),
        (dict(diagnosis='MCI'), 'AD, NC'),
        (dict(n=2, age=[70, 71, 72]), '3 values of age for n=2'),
        (dict(age=300), 'age=300'),
        (dict(weight=3), 'weight'),
        (dict(guidance_scale=-1), 'guidance_scale'),
        (dict(given={9: torch.zeros(1, 1, 64, 64)}), 'slice 9'),
        (dict(given={2: torch.zeros(2, 1, 64, 64)}), 'Expected 1'),
        (dict(given={2: torch.full((1, 1, 64, 64), 255.0)}), 'gray values'),
        (dict(given={2: torch.zeros(1, 1, 32, 32)}), 'shape'),
    ],
)
def test_bad_requests(model, requested, message):
    with pytest.raises((ValueError, TypeError)) as e:
        model.sample_volume(**{'n': 1, **requested})
    assert message in str(e.value) and 'Expected' in str(e.value)
    if not {'given', 'batch_size'} & set(requested):
        with pytest.raises((ValueError, TypeError)) as e:
            sample_shared_noise(model, **{'n': 1, **requested})
        assert message in str(e.value)


def test_needs_a_denoiser(model):
    bare = BrainVolumes(model.autoencoder, model.size)
    with pytest.raises(FileNotFoundError, match='train ldm'):
        sample_shared_noise(bare, 1, slices=range(3))


class Crash(Exception):
    pass


@pytest.mark.parametrize('at', [8, 40, 72])
def test_resumed_is_the_same_as_never_stopped(
    at, tiny_run, dataset, trained, tmp_path, monkeypatch
):
    run, loss = shutil.copytree(tiny_run[0], tmp_path / 'run'), module.volume_loss

    def struck(model, batch, generator, seen, *args, **kwargs):
        if seen >= at and getattr(model, 'training', False):
            raise Crash
        return loss(model, batch, generator, seen, *args, **kwargs)

    monkeypatch.setattr(module, 'volume_loss', struck)
    with pytest.raises(Crash):
        train_volume(dataset, run, SHORT, progress=False)
    monkeypatch.undo()
    train_volume(dataset, run, SHORT, resume=True, progress=False)
    a, b = (load_weights(o / 'volume.safetensors')[0] for o in (run, trained))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [
        o['images'] for o in read_log(run / 'log.jsonl') if o['stage'] == 'volume' and 'loss' in o
    ] == list(range(8, 97, 8))


def test_an_autoencoder_that_is_told_more_than_the_slice(dataset, tmp_path):
    "The brains generated on the way must tell it something."
    shared = dict(batch_size=8, warmup_images=8, validate_every=1_000, checkpoint_every=1_000)
    train_autoencoder(
        dataset,
        tmp_path / 'run',
        AEConfig(
            data=dataset.config,
            total_images=8,
            channels=(16,),
            attention_levels=(False,),
            patch=8,
            latent_channels=4,
            covariates=('slice', 'diagnosis', 'age'),
            **shared,
        ),
        progress=False,
    )
    train_ldm(
        dataset,
        tmp_path / 'run',
        LDMConfig(
            total_images=8,
            channels=(16,),
            attention_levels=(False,),
            num_res_blocks=1,
            cond_channels=16,
            preview_steps=2,
            **shared,
        ),
        progress=False,
    )
    train_volume(
        dataset, tmp_path / 'run', replace(SHORT, total_images=16, validate_every=8), progress=False
    )
    assert [
        o['images']
        for o in read_log(tmp_path / 'run' / 'log.jsonl')
        if o['stage'] == 'volume' and 'val_mse' in o
    ] == [8, 16]


def test_the_run_is_loaded_where_this_process_computes(tiny_run, dataset, monkeypatch):
    """Under `accelerate launch --cpu` on a machine with a GPU, or on the second of two GPUs, that
    is not the first GPU."""

    def load(run, device=None, *args):
        raise Crash(device)

    monkeypatch.setattr(
        module, 'process_state', lambda: SimpleNamespace(device=torch.device('cuda:1'))
    )
    monkeypatch.setattr(module.BrainLDM, 'load', load)
    with pytest.raises(Crash, match='cuda:1'):
        train_volume(dataset, tiny_run[0], SHORT, progress=False)


def test_finished_run_is_left_alone(trained, dataset):
    before = (trained / 'volume.safetensors').read_bytes()
    train_volume(dataset, trained, SHORT, resume=True, progress=False)
    assert (trained / 'volume.safetensors').read_bytes() == before


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(neighbor_dropout=1.0), 'neighbor_dropout'),
        (dict(neighbor_noise=-0.1), 'neighbor_noise'),
        (dict(batch_size=0), 'batch_size'),
    ],
)
def test_bad_settings(change, message, tiny_run, dataset, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / 'run')
    with pytest.raises(ValueError, match=message):
        train_volume(dataset, run, replace(SHORT, **change), progress=False)
    assert not (run / 'volume.safetensors').exists() and 'volume' not in json.loads(
        (run / 'config.json').read_text()
    )


def test_what_other_stages_refuse_is_refused(tiny_run, dataset, tmp_path):
    "Images of another size, and a diffusion model that is to go on."
    run = shutil.copytree(tiny_run[0], tmp_path / 'run')
    small = type(dataset)(dataset.images[:, ::2, ::2], dataset.manifest, dataset.covariates)
    with pytest.raises(ValueError, match='images of 32 x 32'):
        train_volume(small, run, SHORT, progress=False)
    settings = json.loads((run / 'config.json').read_text())
    settings['ldm']['config']['total_images'] = 96
    (run / 'config.json').write_text(json.dumps(settings))
    with pytest.raises(ValueError, match='the ldm has seen 64 of 96 images'):
        train_volume(dataset, run, SHORT, progress=False)
    assert not (run / 'state' / 'volume').exists()


def test_layers_of_another_network_are_refused(trained, tmp_path):
    "A newly trained ldm beside old neighbors would sample nonsense."
    run = shutil.copytree(trained, tmp_path / 'run')
    tensors, about = load_weights(run / 'ldm.safetensors')
    save_weights(run / 'ldm.safetensors', {k: v + 1e-3 for k, v in tensors.items()}, about)
    with pytest.raises(ValueError, match='not trained on the diffusion model beside it'):
        BrainVolumes.load(run)
    (run / 'ldm.safetensors').unlink()
    with pytest.raises(ValueError, match='two files of one run'):
        BrainVolumes.load(run)


def test_other_data_is_refused(trained, dataset, tmp_path):
    other = shutil.copytree(trained, tmp_path / 'run')
    moved = dataset.manifest.copy()
    moved.loc[moved.index[0], 'slice'] += 100
    part = type(dataset)(dataset.images, moved, dataset.covariates)
    part.config = dataset.config
    with pytest.raises(ValueError, match='not what the autoencoder was trained on'):
        train_volume(part, other, SHORT, resume=True, progress=False)


@pytest.mark.parametrize('depth', [2, 3, 8, 33])
@pytest.mark.parametrize('given', [(), (0,), (1, 0)])
def test_each_place_is_drawn_once_beside_a_known_one(depth, given):
    rounds, generated = generation_order(depth, given), [k in given for k in range(depth)]
    assert sorted([*sum(rounds, []), *given]) == list(range(depth))
    for i, places in enumerate(rounds):
        seen = neighbors_of(torch.zeros(1, depth, 1, 1, 1), generated, places)
        if i or given:
            assert (seen.sum((1, 2, 3)) > 0).all()  # somebody stands beside it
        for k in places:
            generated[k] = True


def test_neighbours_are_of_the_same_person():
    rows = pd.DataFrame(
        [(p, k) for p in 'abc' for k in range(7)], columns=['subject', 'slice']
    ).sample(frac=0.8, random_state=1)
    for (i, row), (low, high) in zip(rows.reset_index(drop=True).iterrows(), find_neighbors(rows)):
        for at, step in ((low, -1), (high, 1)):
            there = ((rows.subject == row.subject) & (rows.slice == row.slice + step)).any()
            assert (at >= 0) == there
            if there:
                assert (rows.iloc[at].subject, rows.iloc[at].slice) == (
                    row.subject,
                    row.slice + step,
                )


def test_hidden_neighbours_leave_no_trace():
    nan = torch.full((2, 3, 4, 4), 5.0)
    assert stack_neighbors(nan, nan, torch.zeros(2, 2, dtype=torch.bool)).abs().sum() == 0


def test_correlation_keeps_every_slice_standard_normal():
    noise = correlate_noise(
        torch.randn(40_000 * 4, generator=torch.Generator().manual_seed(0)), 4, 0.7
    ).view(-1, 4)
    torch.testing.assert_close(
        noise.T.cov().diag(), torch.ones(4), atol=5 * (2 / 40_000) ** 0.5, rtol=0
    )


def test_a_turned_head_is_found(tmp_path):
    "A mark in front on the left lands in front on the left, whatever the number of slices."
    for s, h, w in ((3, 5, 7), (4, 8, 6)):
        volume = -torch.ones(s, h, w)
        volume[0, 0, 0] = 1.0  # lowest, front, left
        image = to_nifti(volume, (2.0, 3.0), {})
        place = nib.affines.apply_affine(
            image.affine, np.argwhere(np.asanyarray(image.dataobj) == 255)[0]
        )
        assert place[0] < 0 < place[1] and place[2] < 0


def test_command_line(trained, tiny_run, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / 'run')
    assert (
        main(
            [
                'volume',
                str(run),
                '--n',
                '2',
                '--diagnosis',
                'AD',
                '--steps',
                '2',
                '--spacing-mm',
                '3',
                '4',
                '--out',
                str(tmp_path / 'out'),
            ]
        )
        == 0
    )
    image = nib.load(tmp_path / 'out' / 'brain_0001.nii.gz')
    assert (
        image.shape == (64, 64, 6)
        and image.header.get_zooms() == (3.0, 3.0, 4.0)
        and SYNTHETIC.encode() in image.header.extensions[0].get_content()
    )
    assert (
        check_dataset(
            tmp_path / 'out', data_config(run), progress=False
        ).manifest.diagnosis.tolist()
        == ['AD'] * 12
    )
    assert (
        main(['volume', str(run), '--steps', '2', '--shared-noise', '1', '--spacing-mm', '3', '4'])
        == 0
    )
    assert (
        main(
            [
                'edit',
                str(run),
                str(tiny_run[1]),
                '--to',
                'diagnosis=AD',
                '--n',
                '2',
                '--steps',
                '2',
                '--refine',
                '0',
                '--out',
                str(tmp_path / 'edited'),
            ]
        )
        == 0
    )
    table = pd.read_csv(tmp_path / 'edited' / 'manifest.csv')
    assert set(table.diagnosis) == {'AD'} and set(table.subject) <= set(
        pd.read_csv(tiny_run[1] / 'subjects.csv').subject.astype(str)
    )
    capsys.readouterr()
    for words, message in (
        (['volume', str(tiny_run[0]), '--voxel-mm', '0', '1'], 'sizes above 0'),
        (['volume', str(tiny_run[0]), '--spacing-mm', '1', '1'], 'volume.safetensors'),
        (
            ['volume', str(run), '--spacing-mm', '1', '1', '--condition', 'slice=5'],
            'a brain has all of them',
        ),
        (['edit', str(run), str(tiny_run[1]), '--to', 'diagnosis=AD', '--n', '0'], 'n=0'),
        (['edit', str(run), str(tiny_run[1]), '--to', 'AD'], 'name=value'),
    ):
        assert main(words) == 1 and message in capsys.readouterr().err


# ---- voxel sizes: from the training data to the generated volume


def opened(folder, tmp_path, **options):
    "Data and a run folder that was begun on them."
    config = DataConfig(size=64, **options)
    dataset = open_dataset(folder, config, progress=False, cache_dir=tmp_path / 'cache')
    open_run(tmp_path / 'run', 'autoencoder', AEConfig(data=dataset.config), dataset)
    return dataset, tmp_path / 'run'


@pytest.mark.parametrize(
    'options,spacing',
    [(dict(crop=72), (2.25, 3.0)), (dict(), (2.5, 3.0)), (dict(crop=32), (1.0, 3.0))],
)
def test_volumes_keep_the_voxel_size_of_the_training_data(tmp_path, options, spacing):
    "64 x 80 pixels of 2 mm and planes of 3 mm, cropped and resized to 64 pixels."
    noise = np.random.default_rng(0)
    for i in range(4):
        vol = np.zeros((64, 80, 4), np.float32)
        vol[20:44, 24:56] = noise.uniform(100, 900, (24, 32, 4))
        (tmp_path / 'in').mkdir(exist_ok=True)
        nib.save(
            nib.Nifti1Image(vol, np.diag([2.0, 2.0, 3.0, 1.0])), tmp_path / f'in/sub-{i}.nii.gz'
        )
    dataset, run = opened(tmp_path / 'in', tmp_path, **options)
    about = json.loads((run / 'config.json').read_text())['autoencoder']['data']
    assert (
        about['voxel_mm'] == [2.0, 3.0] and about['left_known'] and resolve_spacing(run) == spacing
    )
    folder = save_volumes(
        torch.zeros(1, 4, 64, 64),
        tmp_path / 'out',
        {},
        resolve_spacing(run),
        {},
        about['left_known'],
    )
    image = nib.load(folder / 'brain_0000.nii.gz')
    assert (
        np.allclose(image.header.get_zooms(), (spacing[0], *spacing))
        and image.header['sform_code'] == image.header['qform_code'] == 2
    )
    with pytest.raises(ValueError, match='Expected the same'):
        resolve_spacing(run, (1.0, 1.0))
    assert dataset.subset('train').manifest.attrs['voxel_mm'] == (2.0, 3.0)


def test_pictures_claim_neither_size_nor_side(tmp_path):
    _, run = opened(cohort(tmp_path / 'in', n=5, size=80), tmp_path)
    about = json.loads((run / 'config.json').read_text())['autoencoder']['data']
    assert about['voxel_mm'] is None and not about['left_known'] and resolve_spacing(run) is None
    assert resolve_spacing(run, (2.0, 3.0)) == (2.5, 3.0)  # 80 pixels become 64
    for spacing in (None, (2.5, 3.0)):
        image = to_nifti(torch.zeros(4, 64, 64), spacing, {}, left_known=False)
        assert (
            image.header['sform_code'] == image.header['qform_code'] == 0
            and b'left and right not known' in image.header['descrip'].item()
        )
        assert image.header.get_zooms() == (
            (2.5, 2.5, 3.0) if spacing else (1.0, 1.0, 1.0)
        ) and image.header.get_xyzt_units()[0] == ('mm' if spacing else 'unknown')
        assert json.loads(image.header.extensions[0].get_content())['not_known'] == [
            'voxel size'
        ] * (not spacing) + ['left and right']
    assert '--left-on-left' in describe_space((2.5, 3.0), False) and '--voxel-mm' in describe_space(
        None, True
    )


def test_what_is_not_known_is_said(tmp_path, tiny_run, capsys):
    words = [
        'volume',
        str(tiny_run[0]),
        '--shared-noise',
        '.5',
        '--n',
        '1',
        '--steps',
        '1',
        '--out',
    ]
    assert main([*words, str(tmp_path / 'a')]) == 0
    assert '--voxel-mm' in capsys.readouterr().out
    assert nib.load(tmp_path / 'a/brain_0000.nii.gz').header['sform_code'] == 0
    # the phantom's left is known
    assert main([*words, str(tmp_path / 'b'), '--voxel-mm', '2', '3']) == 0
    image = nib.load(tmp_path / 'b/brain_0000.nii.gz')
    assert (
        image.header.get_zooms() == (2.0, 2.0, 3.0)
        and image.header['sform_code'] == 2
        and 'mm' in capsys.readouterr().out
    )


def test_runs_of_former_versions_have_no_size(tmp_path):
    (tmp_path / 'config.json').write_text(
        json.dumps(
            dict(autoencoder=dict(config=dict(data=dict(crop=208, size=128)), data=dict(hash='x')))
        )
    )
    assert resolve_spacing(tmp_path) is None and resolve_spacing(tmp_path, (1.0, 1.0)) == (
        1.625,
        1.0,
    )
