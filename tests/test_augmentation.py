"""Augmentation: told to the network, the same after a resume, and never in what is generated."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from brainldm.data import open_dataset
from brainldm.engineering.augmentation import (
    AUGMENTATIONS,
    AugmentedCopies,
    augment_images,
    sample_parameters,
)
from brainldm.engineering.configs import (
    AUGMENTED,
    AEConfig,
    AugmentConfig,
    DataConfig,
    LDMConfig,
    PhantomConfig,
    check_config,
)
from brainldm.engineering.covariates import Covariate
from brainldm.engineering.extending import DENOISERS
from brainldm.engineering.loop import Learner, fit, train_batches
from brainldm.engineering.phantom import make_cohort
from brainldm.engineering.stage2 import LatentDataset, unet_args
from brainldm.sampling import BrainLDM
from brainldm.scheduler import denoise, noise_schedule
from brainldm.training import ldm_loss, train_autoencoder, train_ldm
from brainldm.unet import UNet

K = len(AUGMENTATIONS)
AE = AEConfig(
    data=DataConfig(size=32),
    total_images=80,
    batch_size=4,
    log_every=2,
    warmup_images=16,
    validate_every=10**6,
    checkpoint_every=24,
    channels=(8, 16),
    latent_channels=2,
    attention_levels=(False, False),
    patch=2,
    augment=AUGMENTED,
)
LDM = LDMConfig(
    total_images=80,
    batch_size=4,
    log_every=2,
    warmup_images=16,
    validate_every=10**6,
    checkpoint_every=24,
    channels=(8, 16),
    num_res_blocks=1,
    attention_levels=(False, True),
    num_heads=2,
    cond_channels=16,
    ema_images=16,
    preview_steps=2,
    augment=AUGMENTED,
    copies=2,
)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('augmented') / 'cohort'
    config = PhantomConfig(num_subjects=8, num_slices=4, size=32)
    return open_dataset(make_cohort(folder, config, progress=False), AE.data, progress=False)


@pytest.fixture(scope='module')
def run(dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp('augmented_run') / 'run'
    train_autoencoder(dataset, run, AE, progress=False)
    train_ldm(dataset, run, LDM, progress=False)
    return run


def test_a_resumed_training_sees_the_same_versions(dataset, run, tmp_path):
    "Both stages are stopped halfway; weights end in the same bits."
    stop = lambda learner, seen, means: seen < 40
    train_autoencoder(dataset, tmp_path, AE, progress=False, callback=stop)
    train_autoencoder(dataset, tmp_path, AE, resume=True, progress=False)
    train_ldm(dataset, tmp_path, LDM, progress=False, callback=stop)
    train_ldm(dataset, tmp_path, LDM, resume=True, progress=False)
    for name in ('autoencoder', 'ldm'):
        ours, theirs = (load_file(o / f'{name}.safetensors') for o in (run, tmp_path))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_stage_1_learns_from_other_images(dataset, run, tmp_path):
    plain = replace(AE, augment=AugmentConfig())
    train_autoencoder(dataset, tmp_path, plain, progress=False)
    ours, theirs = (load_file(o / 'autoencoder.safetensors') for o in (run, tmp_path))
    assert not any(torch.equal(ours[k], theirs[k]) for k in ours if 'conv' in k)


def test_the_network_of_a_run_is_told_and_sampling_tells_it_nothing(run):
    model = BrainLDM.load(run)
    assert model.unet.told.augment.weight.abs().max() > 0  # it has learned
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([10, 500])
    how = torch.zeros(2, K)
    plain = model.unet(x, t, {})
    assert torch.equal(model.unet(x, t, dict(augmentation=how)), plain)
    assert not torch.equal(model.unet(x, t, dict(augmentation=how + 1)), plain)
    with pytest.raises(
        ValueError, match=r"cond\['augmentation'\] of shape \(2,\). Expected \(2, 7\)"
    ):
        model.unet(x, t, dict(augmentation=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"cond holds \['augmentation'\]"):
        UNet(2, (8,), 1, (False,), 2)(x, t, dict(augmentation=how))


def test_statistics_are_those_of_the_slices_as_they_are(dataset, run, tmp_path):
    "Augmented copies change neither the mean nor the deviation that standardize latents."
    (tmp_path / 'autoencoder.safetensors').write_bytes(
        (run / 'autoencoder.safetensors').read_bytes()
    )
    (tmp_path / 'config.json').write_bytes((run / 'config.json').read_bytes())
    settings = json.loads((tmp_path / 'config.json').read_text())
    settings.pop('ldm')
    (tmp_path / 'config.json').write_text(json.dumps(settings))
    train_ldm(dataset, tmp_path, replace(LDM, copies=0, augment=AugmentConfig()), progress=False)
    ours, theirs = (load_file(o / 'ldm.safetensors') for o in (run, tmp_path))
    for k in ('latent_mean', 'latent_std'):
        assert_close(ours[k], theirs[k])


def test_copies_without_an_augmentation_are_refused():
    with pytest.raises(ValueError, match='copies=2 would change nothing'):
        check_config(LDMConfig(copies=2))
    for odd in (dict(turn=90.0), dict(mirror=2.0), dict(warp=0.5), dict(shift=-0.1)):
        with pytest.raises(ValueError, match=f'AugmentConfig: {next(iter(odd))}='):
            AugmentConfig(**odd)


def test_a_denoiser_that_cannot_be_told_is_refused(monkeypatch):
    monkeypatch.setattr(DENOISERS, 'kinds', dict(DENOISERS.kinds))
    DENOISERS.register('deaf', lambda in_channels, covariates: None)
    with pytest.raises(ValueError, match='no argument `augmentations`.*tilted and mirrored'):
        unet_args(replace(LDM, denoiser='deaf'), 2, ())
    assert 'augmentations' not in unet_args(replace(LDM, denoiser='deaf', copies=0), 2, ())


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_one_number_changes_one_thing(name, dataset):
    image = dataset.subset('train').__getitems__([1])['image']
    a = torch.zeros(1, K)
    a[0, AUGMENTATIONS.index(name)] = 1.0
    alone = AugmentConfig(**{name.split('_')[0]: getattr(AUGMENTED, name.split('_')[0])})
    both = [
        augment_images(image, a, o, torch.Generator().manual_seed(0)) for o in (AUGMENTED, alone)
    ]
    assert_close(*both, atol=1e-5, rtol=0)
    assert (both[0] - image).abs().max() > 0.05
    found = sample_parameters(9, alone, torch.Generator().manual_seed(0))
    others = [i for i, o in enumerate(AUGMENTATIONS) if o.split('_')[0] != name.split('_')[0]]
    assert not found[:, others].any()


def one_sided(n):
    "Latents with a bright spot at the left, never at the right."
    z = 0.3 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    z[:, :, 2:6, 1:3] += 2
    return z


def share_on_the_right(told):
    "Train on latents and on mirrored ones; which side have the samples?"
    z, how = one_sided(64), torch.zeros(64, K)
    mirrored = how.clone()
    mirrored[:, 0] = 1
    conditions = dict(augmentation=torch.cat([how, mirrored])) if told else {}
    data = LatentDataset(torch.cat([z, z.flip(-1)]), conditions)
    config = replace(
        LDM,
        total_images=4_000,
        batch_size=16,
        learning_rate=3e-3,
        warmup_images=160,
        ema_images=100,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet(1, (16, 32), 1, (False, True), 2, augmentations=K if told else 0)
    learner = Learner(net, partial(ldm_loss, config=config, covariates=()), config)
    fit(learner.step, train_batches(data, config), config.total_images)
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    average = learner.ema.module.eval()
    with torch.no_grad():
        samples = denoise(
            lambda xt, t: average(xt, t, {}), noise, noise_schedule(config.schedule), 10
        )
    left, right = samples[..., 2:6, 1:3].mean((1, 2, 3)), samples[..., 2:6, 5:7].mean((1, 2, 3))
    return (right > left).float().mean().item()


def test_nothing_leaks():
    "A network that is told generates the side of the data alone; one that is not, both."
    assert share_on_the_right(told=True) <= 0.03
    assert 0.2 < share_on_the_right(told=False) < 0.8


def test_a_covariate_that_is_not_in_the_batch_is_no_silent_nothing():
    "The augmentation may be absent, a covariate may not."
    covariate = Covariate('age', 'continuous', range=(50, 90))
    net = UNet(1, (8,), 1, (False,), 2, covariates=(covariate,))
    chance = torch.Generator().manual_seed(0)
    batch = dict(latent=torch.zeros(2, 1, 8, 8))
    with pytest.raises(KeyError, match='age'):
        ldm_loss(net, batch, chance, 0, LDM, (covariate,))
    ldm_loss(net, batch | dict(age=torch.zeros(2)), chance, 0, LDM, (covariate,))


def test_arguments_of_ones_own_are_asked_for_nothing_new(monkeypatch):
    "A function that was written for a denoiser before there were copies still works."
    monkeypatch.setattr(DENOISERS, 'kinds', dict(DENOISERS.kinds))
    arguments = lambda config, in_channels, covariates: dict(in_channels=in_channels)
    DENOISERS.register('older', lambda in_channels: None, arguments=arguments)
    older = replace(LDM, denoiser='older', copies=0)
    assert unet_args(older, 2, ()) == dict(in_channels=2)
