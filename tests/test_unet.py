"""The UNet over shapes, dtypes and devices; that it listens to everything it is told; that it
refuses what it cannot take."""

import os
import pytest, torch
from torch import nn
from torch.testing import assert_close
from brainldm.engineering.covariates import Covariate
from brainldm.unet import UNet, timestep_embedding

COVARIATES = (
    Covariate('diagnosis', 'categorical', values=('NC', 'AD')),
    Covariate('slice', 'continuous', range=(0, 31)),
    Covariate('age', 'continuous', range=(55, 90)),
    Covariate('sex', 'categorical', values=('F', 'M')),
    Covariate('education', 'continuous', range=(0, 25)),
)


def build(in_channels=4, channels=(16, 24), **kwargs):
    """A small network in which no layer is silent any more: those that start at 0 get random
    weights."""
    torch.manual_seed(0)
    model = UNet(
        in_channels,
        channels,
        **dict(
            dict(
                num_res_blocks=1,
                attention_levels=(True,) * len(channels),
                covariates=COVARIATES,
                cond_channels=24,
            ),
            **kwargs
        )
    )
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def batch(b=3, c=4, h=8, w=12, dtype=torch.float32):
    gen = torch.Generator().manual_seed(1)
    cond = dict(
        diagnosis=torch.arange(b) % 2,
        slice=torch.linspace(0.1, 0.8, b),
        age=torch.linspace(0.8, 0.3, b),
        sex=(torch.arange(b) + 1) % 2,
        education=torch.linspace(0.3, 0.45, b),
    )
    return (
        torch.randn(b, c, h, w, generator=gen).to(dtype),
        torch.arange(b) * 300,
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()},
    )


@pytest.mark.parametrize('in_channels', [1, 4, 8])
@pytest.mark.parametrize('size', [(8, 8), (16, 8), (24, 40)])
@pytest.mark.parametrize(
    'channels,attention',
    [
        ((16,), (True,)),
        ((16, 24), (False, True)),
        ((8, 16, 24), (False, False, False)),
        ((16, 16, 32, 8), (True, False, True, False)),
    ],
)
@pytest.mark.parametrize('blocks', [1, 3])
def test_shapes(in_channels, size, channels, attention, blocks):
    x, t, cond = batch(2, in_channels, *size)
    model = build(in_channels, channels, attention_levels=attention, num_res_blocks=blocks)
    y = model(x, t, cond)
    assert y.shape == x.shape and y.isfinite().all() and y.std() > 1e-3
    f = 2 ** (len(channels) - 1)
    assert (
        model.bottleneck(x, t, cond).shape == (2, channels[-1], size[0] // f, size[1] // f)
        and model.factor == f
    )


def test_fresh_network_answers_zero():
    x, t, cond = batch()
    assert torch.equal(UNet(4, (16, 24), 1, covariates=COVARIATES)(x, t, cond), torch.zeros_like(x))


@pytest.mark.parametrize('attention', [(True, True), (False, False)])
@pytest.mark.parametrize('name', [c.name for c in COVARIATES])
def test_every_covariate_matters(name, attention):
    x, t, cond = batch()
    model = build(attention_levels=attention)
    other = 1 - cond[name]
    # in every row
    assert (model(x, t, cond | {name: other}) - model(x, t, cond)).abs().amax(
        (1, 2, 3)
    ).min() > 1e-4
    if not cond[name].is_floating_point():
        return
    value = cond[name].clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x, t, cond | {name: value}).sum(), value)
    assert (grad.abs() > 0).all()


def test_time_and_latents_matter_and_rows_do_not_mix():
    x, t, cond = batch()
    model = build()
    base = model(x, t, cond)
    assert (model(x, t + 1, cond) - base).abs().amax((1, 2, 3)).min() > 1e-4
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x, t, cond)[0].sum(), x)
    # each pixel of the own row, none of the others
    assert (grad[0].abs() > 0).all() and (grad[1:] == 0).all()
    for i in range(3):
        assert_close(
            model(x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()}),
            base[i : i + 1],
        )


def test_every_parameter_gets_a_gradient():
    x, t, cond = batch()
    model = build()
    drop = torch.zeros(3, 5, dtype=torch.bool)
    drop[0] = True
    model(x, t, cond, drop).square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize('name', [c.name for c in COVARIATES])
def test_dropped_is_missing_is_absent(name):
    x, t, cond = batch()
    model = build()
    i = [c.name for c in COVARIATES].index(name)
    drop = torch.zeros(3, 5, dtype=torch.bool)
    drop[:, i] = True
    unknown = torch.full_like(cond[name], float('nan') if cond[name].is_floating_point() else -1)
    dropped = model(x, t, cond, drop)
    assert_close(model(x, t, cond | {name: unknown}), dropped)
    assert_close(model(x, t, {k: v for k, v in cond.items() if k != name}), dropped)
    assert (dropped - model(x, t, cond)).abs().max() > 1e-4


def test_drop_works_row_by_row_and_nothing_told_is_all_dropped():
    x, t, cond = batch()
    model = build()
    drop = torch.tensor([[False] * 5, [True] * 5, [False, True, False, True, False]])
    got, all_dropped = model(x, t, cond, drop), model(
        x, t, cond, torch.ones(3, 5, dtype=torch.bool)
    )
    assert_close(got[0], model(x, t, cond)[0])
    assert_close(got[1], all_dropped[1])
    assert_close(model(x, t), all_dropped)
    assert_close(model(x, t, {}), all_dropped)


def test_missing_values_leave_finite_gradients():
    x, t, cond = batch()
    model = build()
    model(
        x, t, cond | dict(age=torch.tensor([0.1, float('nan'), 0.2]), sex=torch.tensor([-1, 0, 1]))
    ).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_unconditional():
    x, t, _ = batch()
    model = build(covariates=())
    assert model(x, t).shape == x.shape and not any(
        'cross_attn' in n for n, _ in model.named_parameters()
    )
    with pytest.raises(ValueError, match='Expected some of'):
        model(x, t, dict(slice=torch.zeros(3)))


def expected_parameters(c_in, channels, blocks, attention, n_values, num_cov, cond_channels):
    "Counted by hand: res blocks, attention, resampling, embeddings."
    e = 4 * channels[0]
    conv = lambda a, b, k=3: k * k * a * b + b

    def block(a, b, attend):
        n = (
            2 * a
            + 2 * b
            + conv(a, b)
            + conv(b, b)
            + (e + 1) * 2 * b
            + (conv(a, b, 1) if a != b else 0)
        )
        return n + (
            2 * b
            + conv(b, 3 * b, 1)
            + conv(b, b, 1)
            + 2 * b
            + conv(b, b, 1)
            + (cond_channels + 1) * 2 * b
            + conv(b, b, 1)
            if attend
            else 0
        )

    n = (
        conv(c_in, channels[0])
        + 2 * channels[0]
        + conv(channels[0], c_in)
        + (channels[0] + 1) * e
        + (e + 1) * e
        + (cond_channels + 1) * e
    )
    for c, attend in zip(channels, attention):
        n += blocks * (block(c, c, attend) + block(2 * c, c, attend))
    n += block(channels[-1], channels[-1], attention[-1]) + block(channels[-1], channels[-1], False)
    n += sum(conv(a, b) + conv(b, a) for a, b in zip(channels, channels[1:]))
    scalar = (9 + 1) * cond_channels + (cond_channels + 1) * cond_channels
    return (
        n
        + n_values * cond_channels
        + sum(not c.values for c in COVARIATES[:num_cov]) * scalar
        + num_cov * cond_channels
    )


@pytest.mark.parametrize(
    'channels,blocks,attention',
    [
        ((96, 160), 2, (True, True)),
        ((64, 96), 2, (True, True)),
        ((16, 24, 32), 1, (False, True, True)),
    ],
)
def test_number_of_parameters(channels, blocks, attention):
    model = UNet(8, channels, blocks, attention, covariates=COVARIATES[:2])
    got = sum(p.numel() for p in model.parameters())
    assert got == expected_parameters(8, channels, blocks, attention, 2, 2, 128)
    if channels == (96, 160):
        assert 4e6 < got < 10e6


def test_bfloat16_autocast_stays_close():
    x, t, cond = batch()
    model = build()
    want = model(x, t, cond)
    with torch.autocast('cpu', torch.bfloat16):
        got = model(x, t, cond)
    # bfloat16 keeps 8 bits: 0.4 % a rounding, some tens of them
    assert (got.float() - want).abs().mean() < 0.03 * want.abs().mean()
    got.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_in_float64_against_differences():
    x, t, cond = batch(2, 4, 4, 4, torch.float64)
    model = build().double()
    t = t[:2]
    gen = torch.Generator().manual_seed(0)
    d = torch.randn(x.shape, generator=gen, dtype=torch.float64)
    f = lambda s: model(x + s * d, t, cond).sin().sum()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(f(0.0), x)
    h = 1e-5
    assert_close((grad * d).sum(), ((f(h) - f(-h)) / (2 * h)).detach(), rtol=1e-6, atol=1e-8)


def test_save_and_load():
    x, t, cond = batch()
    model = build()
    again = UNet(4, (16, 24), 1, covariates=COVARIATES, cond_channels=24)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, t, cond), model(x, t, cond))


def test_meta_device():
    with torch.device('meta'):
        x, t, cond = (
            torch.randn(2, 8, 16, 16),
            torch.zeros(2, dtype=torch.int64),
            dict(slice=torch.rand(2)),
        )
        assert UNet(8, covariates=COVARIATES)(x, t, cond).shape == (2, 8, 16, 16)


def test_no_host_sync_in_one_graph():
    "The whole forward is one graph: no data-dependent branch, no .item()."
    x, t, cond = batch()
    model = build()
    drop = torch.rand(3, 5) < 0.5
    torch._dynamo.reset()
    assert_close(
        torch.compile(model, fullgraph=True, backend='eager')(x, t, cond, drop),
        model(x, t, cond, drop),
    )


@pytest.mark.skipif(
    not os.environ.get('BRAINLDM_SLOW'), reason='compiles C++ for a minute; set BRAINLDM_SLOW=1'
)
def test_compiled():
    x, t, cond = batch()
    model = build(channels=(8,), covariates=COVARIATES[:2])
    drop = torch.rand(3, 2) < 0.5
    cond = {k: cond[k] for k in ('diagnosis', 'slice')}
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(fast(x, t, cond, drop), model(x, t, cond, drop), atol=1e-4, rtol=1e-4)


def test_timestep_embedding_is_that_of_diffusers():
    other = pytest.importorskip('diffusers.models.embeddings')
    t = torch.tensor([0, 1, 17, 500, 999])
    assert_close(
        timestep_embedding(t, 64),
        other.get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0),
    )
    s = timestep_embedding(t + 0.5, 64)
    assert s.dtype == torch.float32 and s.shape == (5, 64)


x, t, cond = batch()


@pytest.mark.parametrize(
    'call,says',
    [
        (lambda: UNet(4, (16, 32), attention_levels=(True,)), 'equally long'),
        (lambda: UNet(4, (), attention_levels=()), 'one level or more'),
        (lambda: UNet(4, (12, 32)), 'Try channels=16'),
        (lambda: UNet(4, (16, 24), num_heads=16), 'channels=24'),
        (lambda: UNet(4, (15,), attention_levels=(False,), norm_num_groups=5), 'channels=15'),
        (lambda: UNet(4, (16,), 0, (True,)), 'num_res_blocks=0'),
        (lambda: build()(x[:, :3], t, cond), 'Expected (b, 4, h, w)'),
        (lambda: build()(x[:, :, :7], t, cond), 'multiples of 2'),
        (lambda: build().bottleneck(x[..., :9], t, cond), 'multiples of 2'),
        (lambda: build()(x[0], t, cond), 'Expected (b, 4, h, w)'),
        (lambda: build()(x, t[:1], cond), 'Expected (3,)'),
        (lambda: build()(x, torch.tensor(5), cond), 'Expected (3,)'),
        (lambda: build()(x, t, dict(weight=t)), "['weight']"),
        (lambda: build()(x, t, dict(age=torch.rand(1))), "cond['age'] of shape (1,)"),
        (lambda: build()(x, t, cond, torch.zeros(3, 4, dtype=torch.bool)), 'Expected (3, 5)'),
        (lambda: build()(x, t, cond, torch.zeros(3, 5)), 'torch.bool'),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(ValueError) as e:
        call()
    assert says in str(e.value) and 'Expected' in str(e.value)


def test_dropout_acts_in_training_only():
    x, t, cond = batch()
    plain = build()
    dropping = UNet(
        4, (16, 24), 1, (True, True), covariates=COVARIATES, cond_channels=24, dropout=0.2
    )
    dropping.load_state_dict(plain.state_dict())
    assert (dropping(x, t, cond) - plain(x, t, cond)).abs().max() > 1e-3
    assert_close(dropping.eval()(x, t, cond), plain(x, t, cond))
