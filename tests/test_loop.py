"The loop for maintainers: accumulation, average, rates, brakes, processes."

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from brainldm.engineering.configs import AEConfig, LDMConfig, TrainConfig, check_config
from brainldm.engineering.loop import (
    Learner,
    ema_decay,
    fit,
    in_chunks,
    lr_at,
    seeded,
    train_batches,
)
from brainldm.engineering import loop


@dataclass
class AveragedConfig(TrainConfig):
    "A training with an average of its weights."

    ema_images: int = 20


def line():
    return seeded(0, lambda: nn.Linear(3, 1))


def line_loss(model, batch, generator, seen):
    return (model(batch['x']) - batch['y']).square().mean(), {}


def line_data(n=96):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return x, x @ torch.tensor([[1.0], [-2.0], [3.0]])


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('batch,accumulate', [(4, 2), (2, 4), (1, 8)])
def test_accumulated_batches_are_one_batch(batch, accumulate, precision):
    x, y = line_data()

    def trained(b, k):
        config = AveragedConfig(
            total_images=96,
            batch_size=b,
            accumulate=k,
            log_every=k * 2,
            warmup_images=24,
            learning_rate=0.1,
            ema_images=8,
            precision=precision,
        )
        learner = Learner(line(), line_loss, config)
        for i in range(0, 96, b):
            learner.step(dict(x=x[i : i + b], y=y[i : i + b]))
        return learner

    one, many = trained(8, 1), trained(batch, accumulate)
    # bf16 has 8 bits
    tol = dict(rtol=1e-4, atol=1e-5) if precision == 'no' else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(one.raw.weight, many.raw.weight, **tol)
    torch.testing.assert_close(one.ema.module.weight, many.ema.module.weight, **tol)


def test_average_follows_its_formula():
    x, y = line_data()
    config = AveragedConfig(
        total_images=96,
        batch_size=8,
        warmup_images=0,
        learning_rate=0.1,
        ema_images=30,
        precision='no',
    )
    learner, want = Learner(line(), line_loss, config), None
    for i in range(0, 96, 8):
        learner.step(dict(x=x[i : i + 8], y=y[i : i + 8]))
        w, beta = learner.raw.weight.detach().double(), ema_decay(i + 8, 8, 30)
        want = w if want is None else beta * want + (1 - beta) * w
    torch.testing.assert_close(
        learner.ema.module.weight.detach().double(), want, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    'total,warm,batch',
    [(1000, 100, 8), (1000, 0, 8), (100, 1000, 8), (7, 3, 8), (10**7, 10**5, 128)],
)
def test_learning_rate_is_positive_and_ends_low(total, warm, batch):
    config = TrainConfig(
        total_images=total, warmup_images=warm, batch_size=batch, learning_rate=1.0
    )
    rates = [lr_at(n, config) for n in range(0, total, max(batch, total // 500))]
    assert (
        all(0 < o <= 1 for o in rates)
        and lr_at(total, config) == 0
        and lr_at(total + batch, config) == 0
    )
    top = int(np.argmax(rates))
    assert np.all(np.diff(rates[: top + 1]) >= 0) and np.all(np.diff(rates[top:]) <= 0)


@pytest.mark.parametrize('world', [1, 2, 3])
def test_processes_share_the_line_of_batches(world):
    class Rows(list):
        def __getitems__(self, at):
            return dict(x=torch.tensor(at))

    take = lambda k, *args: [
        o['x']
        for _, o in zip(range(k), train_batches(Rows(range(30)), TrainConfig(batch_size=4), *args))
    ]
    line = take(12)
    for rank in range(world):
        for a, b in zip(take(12 // world, 0, rank, world), line[rank::world]):
            assert torch.equal(a, b)
        # resumed after two steps
        for a, b in zip(take(2, 4 * world * 2, rank, world), line[world * 2 + rank :: world]):
            assert torch.equal(a, b)


def test_a_gradient_that_is_not_finite_is_seen_before_the_loss_is():
    """The loss is finite, its gradient is not: the weights are lost, and no checkpoint may keep
    them."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self):
            return self.w.sqrt().sum()

    learner = Learner(
        Root(),
        lambda model, batch, generator, seen: (model(), {}),
        TrainConfig(batch_size=1, precision='no', warmup_images=0),
    )
    saved = []
    with pytest.raises(RuntimeError, match='grad_norm=(inf|nan)'):
        fit(
            learner.step,
            [dict(x=torch.zeros(1))] * 10,
            10,
            log_every=1,
            callbacks=(lambda seen, means: saved.append(seen),),
        )
    assert not saved


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'nonsense'])
def test_a_tracker_that_is_not_installed(name, monkeypatch):
    monkeypatch.setattr('accelerate.tracking.get_available_trackers', lambda: [])
    with pytest.raises(ValueError, match=f"log_with='{name}' is not installed"):
        check_config(TrainConfig(log_with=name))


# ------------------------------------------------------------------ a program around the training


@pytest.fixture
def no_accelerator():
    "As in a program that has not used accelerate yet."
    before = AcceleratorState._shared_state, GradientState._shared_state
    AcceleratorState._shared_state, GradientState._shared_state = {}, {}
    yield
    AcceleratorState._shared_state, GradientState._shared_state = before


def train_line(precision, **change):
    x, y = line_data()
    learner = Learner(
        line(),
        line_loss,
        AveragedConfig(total_images=96, batch_size=8, precision=precision, **change),
    )
    for i in range(0, 96, 8):
        learner.step(dict(x=x[i : i + 8], y=y[i : i + 8]))
    return learner


@pytest.mark.parametrize("host,own", [("no", "bf16"), ("bf16", "no")])
def test_the_host_program_keeps_its_accelerator(host, own, no_accelerator):
    """A training in another precision and accumulation: the host's accelerator is what it was,
    before, between and after."""
    acc = Accelerator(mixed_precision=host, gradient_accumulation_steps=3)
    net = acc.prepare(nn.Linear(3, 1))
    want = net(torch.ones(1, 3)).dtype
    learner = train_line(own, accumulate=2, log_every=2)
    assert (
        learner.accelerator.mixed_precision,
        acc.mixed_precision,
        AcceleratorState().mixed_precision,
    ) == (own, host, host)
    assert (acc.gradient_accumulation_steps, GradientState().num_steps) == (3, 3)
    assert learner.accelerator.gradient_accumulation_steps == 2
    later = acc.prepare(nn.Linear(3, 1))  # prepared after the training
    assert net(torch.ones(1, 3)).dtype == later(torch.ones(1, 3)).dtype == want
    optimizer = acc.prepare(torch.optim.SGD(later.parameters(), 0.1))
    acc.backward(later(torch.ones(1, 3)).sum())
    optimizer.step()
    assert Accelerator().mixed_precision == host  # and one that asks for nothing


def test_a_host_program_may_come_after_the_training(no_accelerator):
    train_line("bf16")
    assert Accelerator(mixed_precision="no").mixed_precision == "no"


def test_trainings_of_one_program_do_not_mix(no_accelerator):
    """Two learners in turn, as an autoencoder and its discriminator: each computes as it would
    alone."""

    def learners():
        return [
            Learner(
                line(),
                line_loss,
                AveragedConfig(
                    total_images=96, batch_size=8, log_every=k, accumulate=k, precision=p
                ),
            )
            for k, p in ((2, "bf16"), (1, "no"))
        ]

    x, y = line_data()
    batches = [dict(x=x[i : i + 8], y=y[i : i + 8]) for i in range(0, 96, 8)]
    alone, mixed = learners(), learners()
    for one in alone:
        for o in batches:
            one.step(o)
    for o in batches:
        for one in mixed:
            one.step(o)
    for a, b in zip(alone, mixed):
        assert torch.equal(a.raw.weight, b.raw.weight) and torch.equal(
            a.ema.module.weight, b.ema.module.weight
        )


# ------------------------------------------------------------------ settings without effect


@pytest.mark.parametrize(
    "config,name",
    [
        (LDMConfig(snr_offset=1.0), "snr_offset"),
        (AEConfig(random_weight=0.1), "random_weight"),
        (AEConfig(feature_weight=0.1), "feature_weight"),
        (AEConfig(kind="vq", kl_period=100), "kl_period"),
        (AEConfig(kind="vq", latent_noise=0.1), "latent_noise"),
        (AEConfig(adversarial=True, total_images=10_000), "adversarial"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(config, name):
    with pytest.raises(
        ValueError, match=f"check_config: {name}=.* would change nothing. Expected .* Try "
    ):
        check_config(config)


# ------------------------------------------------------------------ answers in chunks


def test_chunks_are_the_whole():
    "Tensors, dicts of tensors, nothing, keywords and several answers; and an odd rest."
    x, cond = torch.randn(7, 3), dict(age=torch.randn(7), sex=torch.arange(7))

    def answer(x, cond, drop=None, scale=1.0):
        return x * scale + cond["age"][:, None], cond["sex"] + 0

    for size in (1, 2, 7, 100):
        for a, b in zip(
            in_chunks(answer, size)(x, cond, None, scale=2.0), answer(x, cond, scale=2.0)
        ):
            assert torch.equal(a, b)
    # a network without conditions
    assert torch.equal(in_chunks(lambda x, cond: 2 * x, 2)(x, {}), 2 * x)


def test_an_error_that_is_no_lack_of_memory_is_not_tried_again():
    calls = []

    def broken(x):
        calls.append(len(x))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        in_chunks(broken, 4)(torch.zeros(8, 3))
    assert calls == [4]


def test_one_row_that_does_not_fit_is_an_error():
    def hungry(x):
        return torch.empty(1 << 50, dtype=torch.uint8)

    with pytest.warns(UserWarning, match="out of memory outside of a training step"), pytest.raises(
        RuntimeError
    ):
        in_chunks(hungry, 4)(torch.zeros(8, 3))
