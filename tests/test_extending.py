"""Parts of other libraries in the places of ours: protocols, kinds, noise, gradients, callbacks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from brainldm.advanced.audit import MEASURES, Measure, csf_fraction, default_measures
from brainldm.data import SliceDataset, open_dataset
from brainldm.engineering.configs import AEConfig, DataConfig, LDMConfig, PhantomConfig
from brainldm.engineering.codec import save_images
from brainldm.engineering.covariates import Covariate
from brainldm.engineering.extending import (
    AUTOENCODERS,
    DENOISERS,
    Autoencoder,
    Denoiser,
    Registry,
    SliceSource,
    check_protocol,
)
from brainldm.engineering.phantom import make_subject
from brainldm.sampling import BrainLDM, Sampler, sample_noise
from brainldm.scheduler import NoiseSchedule, denoise
from brainldm.training import train_autoencoder, train_ldm
from brainldm.unet import UNet
from brainldm.vae import AutoencoderKL, image_scores
from brainldm.vqgan import PatchDiscriminator

SLICE = Covariate('slice', 'continuous', range=(0, 5))


@pytest.fixture(scope='module')
def model():
    "A sampler whose networks nobody trained; the last layers are not 0."
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(2, (8, 16), 1, (False, False), 2)
    unet = UNet(2, (16, 16), 1, (False, True), 2, (SLICE,), 16)
    torch.nn.init.normal_(unet.up.head[-1].weight, std=0.1)
    stats = torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    return Sampler(autoencoder.eval(), 32, unet.eval(), NoiseSchedule(), *stats)


class Slices:
    "Twelve slices of six subjects in memory."

    def __init__(self, **more):
        config = PhantomConfig(num_subjects=6, num_slices=2, size=32)
        self.subjects, self.more = [make_subject(config, i) for i in range(6)], more

    def __len__(self):
        return 12

    def read(self, i):
        subject = self.subjects[i // 2]
        about = dict(subject=subject.subject, slice=i % 2, diagnosis=subject.diagnosis)
        return subject.vol[i % 2], about | self.more


@pytest.fixture(scope='module')
def data():
    return open_dataset(Slices(), DataConfig(size=32, validate_fraction=0.2), progress=False)


def test_protocols_fit_the_networks_of_the_house(model):
    assert isinstance(model.autoencoder, Autoencoder) and isinstance(model.unet, Denoiser)
    assert isinstance(Slices(), SliceSource) and not isinstance([], SliceSource)
    with pytest.raises(TypeError, match='Linear has no in_channels, latent_channels'):
        check_protocol('here', torch.nn.Linear(1, 1), Autoencoder)


def test_kinds():
    shelf = Registry('toy')
    shelf.register('a', Slices)
    shelf.register('a', Slices)  # the same class once more: a cell run again
    with pytest.raises(ValueError, match="the toy 'a' is Slices. Expected a new name"):
        shelf.register('a', Measure)
    with pytest.raises(ValueError, match="toy: kind='b'. Expected one of a. Check"):
        shelf['b']
    assert list(AUTOENCODERS.kinds)[:3] == ['kl', 'vq', 'fsq'] and 'unet' in DENOISERS.kinds


def test_a_source_is_as_strict_as_a_folder(data):
    assert data.manifest.groupby('subject').split.nunique().max() == 1
    assert np.array_equal(data.images[3], Slices().read(3)[0])
    with pytest.raises(ValueError, match='slice 0 has no subject'):
        open_dataset(Slices(subject=None))
    same = Slices()
    same.subjects[5] = replace(same.subjects[0], subject='another')
    with pytest.raises(ValueError, match='faults, such as'):
        open_dataset(same)
    wrong = Slices()
    wrong.subjects[0] = replace(wrong.subjects[0], vol=wrong.subjects[0].vol / 255)
    with pytest.raises(TypeError, match='Expected uint8'):
        open_dataset(wrong)


def test_noise_of_a_seed_gives_the_images_of_that_seed(model):
    noise = sample_noise(5, (2, 8, 8), seed=3)
    images = model.sample(5, seed=3, steps=3, slice=2, batch_size=2)
    assert torch.equal(model.sample(5, noise=noise, steps=3, slice=2, batch_size=2), images)
    latents = model.sample(5, noise=noise, steps=3, slice=2, batch_size=2, output='latent')
    decoded = torch.cat([model.decode(z) for z in latents.split(2)])
    assert torch.equal(decoded, images)
    half = model.sample(1, steps=1, device=None, dtype=torch.float16)
    assert half.dtype == torch.float16 and half.device == model.device


def test_default_is_the_plain_loop_bit_for_bit(model):
    "What `sample` gave before it could do more."
    noise, cond = sample_noise(3, (2, 8, 8), seed=0), dict(slice=torch.full((3,), 0.4))
    with torch.no_grad():
        z = denoise(lambda xt, t: model.unet(xt, t, cond).float(), noise, model.schedule, 4)
        plain = model.autoencoder.decode(z).clamp(-1, 1)
    assert torch.equal(model.sample(3, slice=2, steps=4), plain)


def test_gradient_reaches_the_noise(model):
    noise = sample_noise(1, (2, 8, 8), seed=1).requires_grad_()

    def loss(noise, **more):
        return model.sample(1, noise=noise, steps=3, output='latent', **more).double().sum()

    assert not loss(noise).requires_grad
    (slope,) = torch.autograd.grad(loss(noise, gradient=True), noise)
    step = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
    far = [loss(noise.detach() + h * step) for h in (1e-2, -1e-2)]
    # central difference; float32 through three steps leaves about 1e-3 of it
    assert ((far[0] - far[1]) / 2e-2).item() == pytest.approx((slope * step).sum().item(), rel=0.02)


def test_a_step_can_be_seen_replaced_and_stopped(model):
    seen, goal = [], torch.full((2, 2, 8, 8), 0.3)
    last = model.sample(
        2, steps=4, output='latent', on_step=lambda i, t, xt, x0: seen.append((i, t))
    )
    assert seen == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert torch.equal(last, model.sample(2, steps=4, output='latent'))
    led = model.sample(2, steps=4, output='latent', on_step=lambda i, t, xt, x0: goal)
    torch.testing.assert_close(led, goal, rtol=0, atol=1e-5)
    kept = []
    model.sample(2, steps=4, on_step=lambda i, t, xt, x0: kept.append(x0))
    stopped = model.sample(2, steps=4, output='latent', on_step=lambda i, t, xt, x0: i < 1)
    assert torch.equal(stopped, kept[1])
    assert model.sample(2, steps=4, callback=lambda i, t, images: False).shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    'options, error, words',
    [
        (dict(noise=torch.zeros(2, 2, 8, 8)), ValueError, r'Expected \(1, 2, 8, 8\)'),
        (dict(noise=[0.0]), TypeError, 'noise of type list'),
        (dict(output='png'), ValueError, "output='png'. Expected one of image, latent"),
        (dict(sampler=7), TypeError, 'int has no timesteps'),
    ],
)
def test_what_sample_refuses(model, options, error, words):
    with pytest.raises(error, match=words):
        model.sample(1, steps=2, **options)


def test_schedulers_of_diffusers(model):
    diffusers = pytest.importorskip('diffusers')
    chain = dict(
        trained_betas=model.schedule.betas.numpy(),
        prediction_type='v_prediction',
        timestep_spacing='trailing',
    )
    ours = model.sample(3, slice=2, steps=5, batch_size=2)
    ddim = diffusers.DDIMScheduler(**chain, clip_sample=False)
    theirs = model.sample(3, slice=2, steps=5, batch_size=2, sampler=ddim)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    euler = diffusers.EulerDiscreteScheduler(**chain, rescale_betas_zero_snr=True)
    theirs = model.sample(3, slice=2, steps=5, batch_size=2, sampler=euler)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match='made for another chain'):
        model.sample(sampler=diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match='Expected neither'):
        model.image_to_image(ours, sampler=ddim)


def test_several_channels_and_a_callback_of_training(data, tmp_path):
    images = np.stack([data.images, 255 - data.images], 1)
    pair = SliceDataset(images, data.manifest, data.covariates)
    few = dict(warmup_images=4, validate_every=10**6, checkpoint_every=10**6, batch_size=4)
    config = AEConfig(
        in_channels=2,
        channels=(8,),
        attention_levels=(False,),
        latent_channels=2,
        patch=4,
        data=data.config,
        total_images=16,
        log_every=1,
        **few,
    )
    seen = []

    def twice(learner, images, means):
        seen.append(images)
        return images < 8

    train_autoencoder(pair, tmp_path / 'run', config, progress=False, callback=twice)
    assert seen == [4, 8]  # False at 8: saved, and ended
    model = train_autoencoder(pair, tmp_path / 'run', config, resume=True, progress=False)
    assert model(pair.__getitems__([0])['image'])[0].shape == (1, 2, 32, 32)
    with pytest.raises(ValueError, match='images of 1 channels, and in_channels=2'):
        train_autoencoder(data, tmp_path / 'other', config, progress=False)
    assert PatchDiscriminator(in_channels=2)(torch.zeros(1, 2, 32, 32))[0].shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match="kind='gan'. Expected one of kl, vq, fsq"):
        train_autoencoder(data, tmp_path / 'gan', replace(config, kind='gan'), progress=False)


def test_own_denoiser_is_trained_and_loaded(data, tmp_path):
    class Plain(torch.nn.Module):
        covariates, factor = (), 1

        def __init__(self, in_channels, cond_channels=8):
            super().__init__()
            self.net = torch.nn.Conv2d(in_channels, in_channels, 3, padding=1)

        def forward(self, x, t, cond=None, drop=None):
            return self.net(x)

    DENOISERS.register('plain', Plain)
    few = dict(warmup_images=4, validate_every=10**6, checkpoint_every=10**6, batch_size=4)
    shape = dict(channels=(8,), attention_levels=(False,), total_images=4)
    ae = AEConfig(latent_channels=2, patch=4, data=data.config, **shape, **few)
    train_autoencoder(data, tmp_path, ae, progress=False)
    ldm = LDMConfig(denoiser='plain', preview_steps=2, ema_images=4, **shape, **few)
    train_ldm(data, tmp_path, ldm, progress=False)
    model = BrainLDM.load(tmp_path, device='cpu', precision='no')
    assert isinstance(model.unet, Plain) and model.sample(2, steps=2).shape == (2, 1, 32, 32)
    del DENOISERS.kinds['plain']
    with pytest.raises(ValueError, match="denoiser: kind='plain'. Expected one of unet"):
        BrainLDM.load(tmp_path)


def test_measures():
    table = pd.DataFrame(
        dict(slice=[0, 0, 0, 0], diagnosis=['MCI', 'HC', 'MCI', 'HC'], age=[60.0, 60, 80, 80])
    )
    values = np.array([3.0, 1, 4, 2])
    bright = Measure(
        'gray', lambda x: x.mean((1, 2, 3)).numpy(), 'gray', ('diagnosis', 'MCI', 'HC')
    )
    assert bright(torch.ones(5, 1, 4, 4)).tolist() == [1.0] * 5
    # difference 2 over a standard deviation of sqrt(1/2) within
    assert bright.effect(values, table) == pytest.approx(2 * 2**0.5)
    assert bright.label == 'gray, MCI minus HC (Cohen d)'
    slope = replace(bright, contrast=('age',), per=10)
    assert slope.effect(values, table) == pytest.approx(0.5)  # 1 in twenty years
    adni = Covariate('diagnosis', 'categorical', values=('AD', 'NC'))
    assert default_measures((adni,)) == MEASURES
    three = Covariate('diagnosis', 'categorical', values=('AD', 'CN', 'MCI'))
    assert [m.contrast for m in default_measures((three,))][:2] == [
        ('diagnosis', 'AD', 'CN'),
        ('diagnosis', 'MCI', 'CN'),
    ]
    assert [m.name for m in default_measures(())] == ['age_slope']


def test_scores_and_files_refuse_several_channels(tmp_path):
    "What is defined for one channel does not take the first of two in silence."
    two = torch.zeros(3, 2, 16, 16)
    with pytest.raises(ValueError, match=r'save_images: .*\(3, 2, 16, 16\).*one channel'):
        save_images(two, tmp_path / 'two', {}, {})
    assert not (tmp_path / 'two').exists()
    with pytest.raises(ValueError, match=r'image_batches: .*one channel'):
        csf_fraction(two)
    with pytest.raises(ValueError, match='image_scores'):
        image_scores(two, two)
