"""Ready for a GPU, as far as a CPU can tell: no wait for the device inside a step, no graph
breaks, every network follows its device."""

import ast
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brainldm.engineering.configs import AEConfig, LDMConfig, PriorConfig, TrainConfig, VolumeConfig
from brainldm.engineering.covariates import Covariate
from brainldm.vqgan import FP16_SCALE, PatchDiscriminator
from brainldm.scheduler import NoiseSchedule
from brainldm.unet import UNet
from brainldm.engineering.loop import Learner, train_batches
from brainldm.engineering.runs import pack_state, unpack_state
from brainldm.engineering.stage1 import autoencoder_args, build_autoencoder
from brainldm.engineering.stage2 import unet_args
from brainldm.training import autoencoder_loss, ldm_loss, make_discriminator
from brainldm.advanced.volume import NeighborUNet, volume_loss
from brainldm.advanced.prior import CodeTransformer, prior_loss
from brainldm.advanced.fidelity import FeatureNet
from brainldm.engineering import loop
from brainldm import training
from test_loop import AveragedConfig, line, line_data, line_loss

ROOT, SLOW = Path(__file__).parents[1], bool(os.environ.get('BRAINLDM_SLOW'))
COVARIATES = (
    Covariate('slice', 'continuous', range=(0, 4)),
    Covariate('diagnosis', 'categorical', values=('AD', 'NC')),
)
KIND = dict(batch_size=4, warmup_images=16, log_every=2)
AE = AEConfig(
    channels=(8, 16),
    latent_channels=2,
    attention_levels=(False, True),
    patch=2,
    num_embeddings=12,
    discriminator_channels=(8, 16),
    **KIND,
)
CRITIC = dict(
    adversarial=True,
    adversarial_start=0,
    discriminator_warmup=0,
    random_weight=0.1,
    feature_weight=0.1,
)
LDM = LDMConfig(
    channels=(8, 16),
    num_res_blocks=1,
    attention_levels=(False, True),
    num_heads=2,
    cond_channels=8,
    ema_images=20,
    **KIND,
)
PRIOR = PriorConfig(
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    dropout=0.1,
    replace_codes=0.1,
    label_smoothing=0.1,
    ema_images=20,
    **KIND,
)
VOLUME = VolumeConfig(ema_images=20, **KIND)


def told(n=4):
    return dict(slice=torch.linspace(0, 1, n), diagnosis=torch.arange(n) % 3 - 1)


def autoencoder(precision='no', **change):
    config = replace(AE, data=replace(AE.data, size=32), precision=precision, **change)
    model = build_autoencoder(config.kind, autoencoder_args(config, COVARIATES))
    discriminator = make_discriminator(config, COVARIATES)
    return (
        model,
        partial(autoencoder_loss, config=config, discriminator=discriminator),
        config,
        dict(image=torch.rand(4, 1, 32, 32) * 2 - 1, **told()),
        discriminator,
    )


def ldm(precision='no', **change):
    config = replace(LDM, precision=precision, schedule=NoiseSchedule(), **change)
    return (
        UNet(**unet_args(config, 2, COVARIATES)),
        partial(ldm_loss, config=config, covariates=COVARIATES),
        config,
        dict(latent=torch.randn(4, 2, 8, 8), **told()),
        None,
    )


def prior(precision='no'):
    config = replace(PRIOR, precision=precision)
    model = CodeTransformer(
        12, 8, COVARIATES, embed_dim=16, num_layers=2, num_heads=2, code_dim=2, dropout=0.1
    )
    loss = partial(prior_loss, config=config, covariates=COVARIATES, num_embeddings=12)
    return model, loss, config, dict(latent=torch.randint(12, (4, 8, 8)), **told()), None


def volume(precision='no'):
    config = replace(VOLUME, precision=precision)
    model, loss = NeighborUNet(ldm()[0]), partial(
        volume_loss, config=config, schedule=NoiseSchedule(), covariates=COVARIATES
    )
    known = dict(
        below=torch.randn(4, 2, 8, 8),
        above=torch.randn(4, 2, 8, 8),
        known=torch.tensor([[True, False]] * 4),
    )
    return model, loss, config, dict(latent=torch.randn(4, 2, 8, 8), **known, **told()), None


TRAININGS = {
    'kl': autoencoder,
    'kl and discriminator': partial(autoencoder, **CRITIC),
    'vq with restarts': partial(autoencoder, kind='vq', restart_below=0.5),
    'vq by gradient': partial(autoencoder, kind='vq', codebook_ema=False),
    'vq and discriminator': partial(autoencoder, kind='vq', **CRITIC),
    'fsq': partial(autoencoder, kind='fsq', fsq_levels=(4, 3)),
    'ldm': ldm,
    'ldm, min-snr': partial(ldm, snr_gamma=5.0),
    'ldm, dropout': partial(ldm, dropout=0.2),
    'prior': prior,
    'volume': volume,
}


def learner_of(make, precision='no'):
    torch.manual_seed(0)
    model, loss, config, batch, discriminator = make(precision)
    return Learner(model, loss, config, discriminator=discriminator), batch


# ------------------------------------------------------------------ the source


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'brainldm').rglob('[a-z]*.py')), ids=lambda p: p.stem
)
def test_no_device_is_named_but_to_ask_for_it(path):
    "No .cuda(), and 'cuda' only in a comparison or as the answer to torch.cuda.is_available()."
    tree = ast.parse(path.read_text())
    requested = {
        id(c)
        for n in ast.walk(tree)
        if isinstance(n, (ast.Compare, ast.IfExp))
        for c in ast.walk(n)
    }
    named = [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and n.value == 'cuda' and id(n) not in requested
    ]
    called = [
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute)
        and n.attr == 'cuda'
        and not (isinstance(n.value, ast.Name) and n.value.id == 'torch')
    ]
    assert not named and not called


# ------------------------------------------------------------------ no wait for the device


class Waited(RuntimeError):
    "The processor would have waited for the device."


class NoWait(TorchDispatchMode):
    """Raises at whatever needs a number of the device on the host: .item(), bool(), sizes that
    depend on values."""

    WAITS = (
        '_local_scalar_dense',
        'nonzero',
        'masked_select',
        '_unique2',
        'unique_consecutive',
        'unique_dim',
        'equal',
        'is_nonzero',
        'bincount',
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ('index', 'index_put', 'index_put_', '_index_put_impl_') and any(
            o is not None and o.dtype in (torch.bool, torch.uint8) for o in args[1]
        )
        if name in self.WAITS or masks:
            raise Waited(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_wait(monkeypatch):
    "The same for copies to the host, which on a CPU are no operation at all."
    with monkeypatch.context() as patch, NoWait():
        for name in (
            'item',
            'cpu',
            'tolist',
            'numpy',
            '__bool__',
            '__float__',
            '__int__',
            '__index__',
            '__array__',
        ):

            def waits(*args, name=name, **kwargs):
                raise Waited(name)

            patch.setattr(torch.Tensor, name, waits)
        yield


@pytest.mark.parametrize(
    'wait',
    [
        lambda x: x.item(),
        lambda x: float(x),
        lambda x: bool(x > 0),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: np.asarray(x),
        lambda x: x.numpy(),
        lambda x: torch.bincount(x.long()),
        lambda x: int(x),
    ],
)
def test_the_trap_catches(wait, monkeypatch):
    with pytest.raises(Waited), no_wait(monkeypatch):
        wait(torch.ones(1))


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('name', TRAININGS)
def test_a_step_never_waits(name, precision, monkeypatch):
    """Between two records the processor only sends work: batch in, loss, gradient, clipping,
    weights, average, codebook, discriminator."""
    learner, batch = learner_of(TRAININGS[name], precision)
    learner.step(batch)  # the optimizer makes its slots
    with no_wait(monkeypatch):
        for _ in range(3):
            logs = learner.step(batch)
    assert all(v.isfinite() and not v.requires_grad for v in logs.values()) and learner.seen == 16


class NoBlockingCopy(TorchDispatchMode):
    """Raises at copies between host and device, unless they go to the device and are sent off with
    non_blocking=True."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        named = lambda *o: {x.device.type for x in tree_leaves(o) if isinstance(x, torch.Tensor)}
        if (
            func.overloadpacket.__name__ in ('_to_copy', 'copy_')
            and len(named(args, out)) > 1
            and not (kwargs.get('non_blocking') and named(out) == {'cuda'})
        ):
            raise Waited(f'{func} from {named(args)} to {named(out)}')
        return out


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'name', [o for o in TRAININGS if 'discriminator' not in o and o != 'volume']
)
def test_no_copy_waits(name, monkeypatch):
    """Losses of fake tensors that say 'cuda': tables of the schedule are sent off, and nothing
    comes back.

    Fake tensors have no backward without a GPU, so the discriminator is missing; nor can they
    be copied, as the volume's network copies one."""

    # no generator of that device here
    def free(call, **given):
        return lambda *args, generator=None, **kwargs: call(*args, **{**kwargs, **given})

    with FakeTensorMode():
        with torch.device('cuda'):
            model, loss, _, batch, _ = TRAININGS[name]()
        with monkeypatch.context() as patch, NoBlockingCopy():
            for o in ('rand', 'randn', 'randint'):
                patch.setattr(torch, o, free(getattr(torch, o), device='cuda'))
            patch.setattr(torch.Tensor, 'bernoulli_', free(torch.Tensor.bernoulli_))
            value, _ = loss(model, batch, SimpleNamespace(device=torch.device('cuda')), 0)
            with pytest.raises(Waited):
                torch.ones(3).to('cuda')  # the trap is set
    assert value.device.type == 'cuda'


def test_only_a_record_waits(monkeypatch):
    "`fit` reads numbers back once in `log_every` steps, in mean_logs."
    learner, batch = learner_of(ldm)
    learner.step(batch)
    waits = []

    def counting(logs):
        waits.append(len(logs))
        return dict(loss=1.0)

    monkeypatch.setattr(loop, 'mean_logs', counting)
    with no_wait(monkeypatch):
        loop.fit(learner.step, [batch] * 12, 48, log_every=5)
    assert waits == [5, 5, 2]


# ------------------------------------------------------------------ loading and optimizer


class Rows(list):
    def __getitems__(self, at):
        return dict(x=torch.tensor(at))


@pytest.mark.parametrize('gpu', [True, False])
def test_batches_are_pinned_for_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    assert train_batches(Rows(range(8)), TrainConfig(num_workers=2)).pin_memory == gpu


def test_batches_are_sent_without_waiting():
    learner, said = Learner(line(), line_loss, TrainConfig(batch_size=8, precision='no')), []

    class Sent:
        def __init__(self, x):
            self.x = x

        def to(self, device, **kwargs):
            said.append((device, kwargs))
            return self.x

    x, y = line_data(8)
    learner.step(dict(x=Sent(x), y=Sent(y)))
    assert said == [(learner.accelerator.device, dict(non_blocking=True))] * 2


@pytest.mark.parametrize(
    'kind,fused', [('cuda', True), ('cpu', True), ('mps', False), ('xpu', False)]
)
def test_fused_optimizer(kind, fused, monkeypatch):
    "One kernel for all weights where torch has it."
    made = SimpleNamespace(
        device=torch.device(kind),
        mixed_precision='no',
        num_processes=1,
        prepare=lambda *args: args,
        state=SimpleNamespace(),
        gradient_state=SimpleNamespace(),
    )
    monkeypatch.setattr(loop, 'make_accelerator', lambda *args: made)
    monkeypatch.setattr(nn.Module, 'to', lambda self, device: self)
    requested = {}
    monkeypatch.setattr(torch.optim, 'AdamW', lambda *args, **kwargs: requested.update(kwargs))
    Learner(line(), line_loss, TrainConfig())
    assert requested['fused'] == fused


# ------------------------------------------------------------------ compiled without graph breaks


def forwards():
    "Each network as training calls it: name -> network, arguments."
    x, z, cond = torch.rand(4, 1, 32, 32), torch.randn(4, 2, 8, 8), told()
    drop, t = torch.tensor([[True, False]] * 4), torch.tensor([0, 10, 500, 999])
    out = {
        'kl': (autoencoder()[0], (x, cond, torch.randn(4, 2, 8, 8))),
        'vq': (autoencoder(kind='vq')[0], (x, cond, torch.rand(12))),
        'vq by gradient': (
            autoencoder(kind='vq', codebook_ema=False)[0],
            (x, cond, torch.rand(12)),
        ),
        'fsq': (autoencoder(kind='fsq', fsq_levels=(4, 3))[0], (x, cond, None)),
        'unet': (ldm(dropout=0.2)[0], (z, t, cond, drop)),
        'volume': (volume()[0], (z, t, cond, drop, torch.randn(4, 6, 8, 8))),
        'prior': (prior()[0], (torch.randint(12, (4, 63)), cond, drop)),
        'discriminator': (PatchDiscriminator(COVARIATES, (8, 16)), (x, cond)),
        'features': (FeatureNet(COVARIATES, (8, 16), norm_num_groups=4), (x,)),
    }
    return out


def first(out):
    "One tensor of an answer."
    return (
        first(next(iter(out.values())))
        if isinstance(out, dict)
        else first(out[0]) if isinstance(out, (tuple, list)) else out
    )


NETWORKS = (
    'kl',
    'vq',
    'vq by gradient',
    'fsq',
    'unet',
    'volume',
    'prior',
    'discriminator',
    'features',
)


@pytest.mark.parametrize('precision', ['no', 'bf16'] if SLOW else ['bf16'])
@pytest.mark.parametrize('name', NETWORKS)
def test_one_graph(name, precision):
    """`fullgraph=True` raises at a graph break; the answer is that of the plain network, and so is
    its gradient. (Slow: the graph of the gradient as well.)"""
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, args = forwards()[name]
    net.train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    answers = []
    for call in (net, torch.compile(net, fullgraph=True, backend='aot_eager' if SLOW else 'eager')):
        net.load_state_dict(state)
        net.zero_grad()  # codebooks learn in forward
        torch.manual_seed(1)  # dropout
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            out = first(call(*args))
        out.float().square().mean().backward()
        answers.append(
            (out.detach().float(), [p.grad for p in net.parameters() if p.grad is not None])
        )
    tol = dict(rtol=1e-4, atol=1e-5) if precision == 'no' else dict(rtol=0.05, atol=0.05)
    torch.testing.assert_close(answers[0][0], answers[1][0], **tol)
    assert len(answers[0][1]) == len(answers[1][1])
    for a, b in zip(*(o[1] for o in answers)):
        torch.testing.assert_close(a, b, **tol)


@pytest.mark.skipif(not SLOW, reason='compiles C++; set BRAINLDM_SLOW=1')
def test_compiled_training_by_inductor():
    "`compile=True`, as a user has it: the loss goes the same way."
    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        learner, batch = learner_of(
            partial(
                autoencoder, channels=(8,), attention_levels=(False,), patch=4, compile=compiled
            )
        )
        losses[compiled] = [learner.step(batch)['loss'].item() for _ in range(5)]
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ precisions


@pytest.mark.parametrize('name', TRAININGS)
def test_bf16_learns_as_float32_does(name):
    losses = {}
    for precision in ('no', 'bf16'):
        learner, batch = learner_of(TRAININGS[name], precision)
        losses[precision] = [learner.step(batch)['loss'].item() for _ in range(4)]
        # weights stay whole
        assert all(p.dtype == torch.float32 for p in learner.raw.parameters())
    # 8 bits a number
    np.testing.assert_allclose(losses['bf16'], losses['no'], rtol=0.1, atol=0.02)


def fp16(learner, scale):
    """What accelerate prepares for precision='fp16' on a GPU: a scaler around loss and optimizer.

    (Autocast is left out: a CPU rounds otherwise.)"""
    acc = learner.accelerator
    acc.scaler, acc.native_amp, acc.state._mixed_precision = (
        torch.amp.GradScaler('cpu', init_scale=scale, growth_interval=10**6),
        True,
        'fp16',
    )
    with loop.isolated_state(acc):
        learner.optimizer = AcceleratedOptimizer(
            learner.optimizer.optimizer, device_placement=False, scaler=acc.scaler
        )
    acc._optimizers = [learner.optimizer]
    return learner


def test_a_scaled_loss_moves_the_weights_alike():
    x, y = line_data()
    config = AveragedConfig(
        total_images=96,
        batch_size=8,
        warmup_images=0,
        learning_rate=0.1,
        clip_norm=0.5,
        precision='no',
    )
    plain, scaled = Learner(line(), line_loss, config), fp16(
        Learner(line(), line_loss, config), 1024.0
    )
    for i in range(0, 96, 8):
        logs = [o.step(dict(x=x[i : i + 8], y=y[i : i + 8])) for o in (plain, scaled)]
    # clipped after unscaling
    torch.testing.assert_close(plain.raw.weight, scaled.raw.weight, rtol=1e-5, atol=1e-6)
    # it may be infinite when a step is skipped
    assert 'grad_norm' in logs[0] and 'grad_norm' not in logs[1]


def test_a_scaled_critic_moves_both_networks_alike(monkeypatch):
    """Autoencoder and discriminator each have a scaler of their own.

    What one network learns from the other, and how loud, is measured on losses that no
    scaler has touched."""
    scales, weigh = [], training.adaptive_weight
    monkeypatch.setattr(
        training, 'adaptive_weight', lambda *args: scales.append(args[-1]) or weigh(*args)
    )
    logs, ends = [], []
    for scaled in (False, True):
        learner, batch = learner_of(TRAININGS['kl and discriminator'])
        if scaled:
            fp16(learner, 2.0**12)
            fp16(learner.discriminator, 2.0**7)
        logs.append([learner.step(batch) for _ in range(3)])
        ends.append([*learner.raw.parameters(), *learner.discriminator.raw.parameters()])
    assert scales == [1.0] * 3 + [FP16_SCALE] * 3
    for a, b in zip(*logs):
        torch.testing.assert_close(a['gan_weight'], b['gan_weight'], rtol=1e-3, atol=0)
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_an_overflow_skips_the_step_and_lowers_the_scale(tmp_path):
    x, y = line_data(8)
    batch = dict(x=x, y=y)
    config = AveragedConfig(batch_size=8, learning_rate=0.1, precision='no')
    learner = fp16(Learner(line(), lambda *args: (line_loss(*args)[0] * 1e30, {}), config), 2.0**40)
    before = learner.raw.weight.clone()
    logs = learner.step(batch)
    assert torch.equal(learner.raw.weight, before) and logs['loss'].isfinite()
    assert learner.accelerator.scaler.get_scale() == 2.0**39
    fresh = fp16(Learner(line(), line_loss, config), 7.0)
    unpack_state(fresh, *pack_state(learner))
    assert fresh.accelerator.scaler.get_scale() == 2.0**39  # a resumed run goes on with it


# ------------------------------------------------------------------ placement


# torch.autocast knows no 'meta'
@pytest.mark.parametrize('name', [o for o in NETWORKS if o[:2] != 'vq'])
def test_everything_follows_its_device(name):
    """On 'meta' every operation refuses tensors of another device: a constant left behind on the
    CPU would raise."""
    net, args = forwards()[name]
    shape = first(net(*args)).shape
    send = lambda o: (
        o.to('meta')
        if isinstance(o, torch.Tensor)
        else {k: v.to('meta') for k, v in o.items()} if isinstance(o, dict) else o
    )
    out = first(net.to('meta')(*map(send, args)))
    assert out.device.type == 'meta' and out.shape == shape
    assert {o.device.type for o in (*net.parameters(), *net.buffers())} == {'meta'}


@pytest.mark.filterwarnings('ignore')
# it copies a network, which fake tensors cannot
@pytest.mark.parametrize('name', [o for o in NETWORKS if o != 'volume'])
def test_traced_on_a_gpu_that_is_not_there(name):
    """Fake tensors say 'cuda' and have no numbers: made there, computed there, and nothing comes
    back."""
    shape = first(forwards()[name][0](*forwards()[name][1])).shape
    with FakeTensorMode():
        with torch.device('cuda'):
            net, args = forwards()[name]
        out = first(net(*args))
    assert out.device.type == 'cuda' and out.shape == shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', TRAININGS)
def test_a_step_never_waits_on_a_real_gpu(name):
    learner, batch = learner_of(TRAININGS[name], 'auto')
    learner.step(batch)
    torch.cuda.set_sync_debug_mode('error')
    try:
        learner.step({k: v.pin_memory() for k, v in batch.items()})
    finally:
        torch.cuda.set_sync_debug_mode('default')
