"""The losses of both stages against the equations by hand."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from brainldm.engineering.configs import AEConfig, DataConfig, LDMConfig
from brainldm.engineering.covariates import Covariate
from brainldm.vqgan import PatchDiscriminator, discriminator_loss, generator_loss
from brainldm.scheduler import NoiseSchedule, flow_weight, min_snr_weight, targets
from brainldm.engineering.loop import seeded
from brainldm.engineering.stage1 import autoencoder_args, build_autoencoder
from brainldm.training import (
    autoencoder_loss,
    condition_dropout_mask,
    discriminator_step,
    generator_step,
    ldm_loss,
    loss_weight,
    make_discriminator,
    prediction_error,
    reconstruction_loss,
)

COVARIATES = (
    Covariate('slice', 'continuous', range=(0, 15)),
    Covariate('diagnosis', 'categorical', values=('AD', 'NC')),
)
SMALL = AEConfig(
    data=DataConfig(size=64),
    latent_channels=4,
    channels=(16, 24),
    patch=4,
    kl_weight=0.5,
    kl_period=100,
)
HIRED = replace(
    SMALL,
    adversarial=True,
    discriminator_channels=(8, 16),
    total_images=400,
    warmup_images=8,
    adversarial_start=32,
    discriminator_warmup=16,
    batch_size=8,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def batch():
    return dict(
        image=rand(8, 1, 64, 64).tanh(),
        slice=torch.linspace(0, 1, 8),
        diagnosis=torch.arange(8) % 2,
    )


@pytest.fixture(scope='module')
def model():
    return seeded(0, lambda: build_autoencoder('kl', autoencoder_args(SMALL)))


def test_discriminator_step_is_the_loss_by_hand(batch):
    "Each slice is evaluated with its own covariates, whether once or twice as many are fake."
    network = seeded(0, lambda: PatchDiscriminator(COVARIATES, (8, 16, 16)))
    real, fake = batch['image'], torch.cat([batch['image'] * 0.5, batch['image'] * 0.2])
    cond = {k: v for k, v in batch.items() if k != 'image'}
    loss, logs = discriminator_step(network, dict(cond, real=real, fake=fake), None, 0, SMALL)
    logits = [network(x, batch)[0] for x in (real, fake[:8], fake[8:])]
    want = discriminator_loss(logits[0], torch.cat(logits[1:]), SMALL.adversarial_loss)
    assert_close(loss, want, rtol=1e-4, atol=1e-5)
    assert 0 <= logs['discriminator_accuracy'] <= 1


def test_a_discriminator_learns_contrast_at_its_own_rate(batch):
    assert make_discriminator(SMALL, ()) is None
    learner = make_discriminator(HIRED, COVARIATES)
    assert (learner.config.learning_rate, HIRED.learning_rate) == (5e-4, 2e-3)
    cond = {k: v for k, v in batch.items() if k != 'image'}
    pair = dict(cond, real=batch['image'], fake=batch['image'] * 0.2)
    losses = [learner.step(pair)['discriminator_loss'].item() for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]


def test_the_generator_step_teaches_the_autoencoder_alone(batch):
    learner = make_discriminator(HIRED, COVARIATES)
    recon = (batch['image'] * 0.5).requires_grad_()
    both = generator_step(learner, batch, [recon], replace(HIRED, feature_weight=1.0))
    sum(both).backward()
    assert recon.grad.abs().max() > 0
    assert all(p.grad is None or not p.grad.any() for p in learner.raw.parameters())
    want = generator_loss(learner.raw(recon, batch)[0], HIRED.adversarial_loss)
    assert_close(both[0], want, rtol=1e-4, atol=1e-4)
    assert generator_step(learner, batch, [recon], HIRED)[1] == 0
    twice = generator_step(learner, batch, [recon, recon], replace(HIRED, random_weight=0.5))[0]
    assert_close(twice, 1.5 * both[0], rtol=1e-5, atol=1e-5)


def test_what_the_loss_of_stage_1_computes_and_when(model, batch):
    learner = make_discriminator(HIRED, COVARIATES)

    def at(seen, config=HIRED):
        gen = torch.Generator().manual_seed(0)
        return autoencoder_loss(model, batch, gen, seen, config, learner)

    in_evaluator = ['discriminator_accuracy', 'discriminator_loss', 'grad_norm', 'kl', 'l1']
    found = [sorted(at(seen)[1]) for seen in (0, 15, 16, 31, 32)]
    assert found[:4] == [['kl', 'l1']] * 2 + [in_evaluator] * 2
    assert set(found[4]) - set(in_evaluator) == {'gan', 'gan_weight'}
    plain = reconstruction_loss(model, batch, torch.Generator().manual_seed(0), 32, HIRED)[1]
    assert_close(at(32, replace(HIRED, adversarial_weight=0.0))[0], plain)
    model.zero_grad()
    at(32, replace(HIRED, random_weight=0.5))[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_noise_of_the_latent_comes_from_the_generator(model, batch):
    def at(seed):
        gen = torch.Generator().manual_seed(seed)
        return reconstruction_loss(model, batch, gen, 0, SMALL)[1]

    assert torch.equal(at(0), at(0)) and not torch.equal(at(0), at(1))


def test_conditions_are_hidden_one_by_one_and_together():
    gen = torch.Generator().manual_seed(0)
    hidden = condition_dropout_mask(40_000, 3, 0.1, 0.2, gen)
    se = (0.28 * 0.72 / 40_000) ** 0.5  # standard error of a fraction near 0.28
    assert ((hidden.float().mean(0) - (1 - 0.9 * 0.8)).abs() < 5 * se).all()
    assert abs(hidden.all(1).float().mean() - (0.2 + 0.8 * 0.1**3)) < 5 * se
    for one, everything, want in ((0, 0, 0), (1, 0, 1), (0, 1, 1)):
        assert condition_dropout_mask(9, 3, one, everything, gen).float().mean() == want


def test_a_network_that_knows_the_target_makes_no_error():
    rows, t = dict(latent=rand(3, 2, 3, 5)), torch.tensor([0, 400, 999])
    eps, schedule = rand(3, 2, 3, 5, seed=1), NoiseSchedule()
    goal = targets(rows['latent'], eps, t, schedule.abar, 'v_prediction')
    for answer, want in ((goal, torch.zeros(3)), (0 * goal, goal.square().mean((1, 2, 3)))):
        error = prediction_error(lambda *_: answer, rows, t, eps, None, schedule, ())
        assert_close(error, want)


def test_the_weight_of_each_step():
    t, flow = torch.tensor([0, 400, 999]), NoiseSchedule(beta_schedule='flow')
    plain = NoiseSchedule()
    assert_close(loss_weight(t, plain), torch.ones(3))
    want = min_snr_weight(t, plain.abar, 'v_prediction', 5.0, 1.0)
    assert_close(loss_weight(t, plain, 5.0, 1.0), want)
    assert_close(loss_weight(t, flow), flow_weight(t, flow.abar))


def test_predicting_zero_costs_one():
    rows = dict(latent=rand(4_000, 2, 3, 5))
    gen = torch.Generator().manual_seed(0)
    loss, logs = ldm_loss(lambda x, *_: torch.zeros_like(x), rows, gen, 0, LDMConfig(), ())
    assert abs(loss - 1) < 5 * (2 / rows['latent'].numel()) ** 0.5  # a mean of squares
    assert_close(loss, logs['mse'])
