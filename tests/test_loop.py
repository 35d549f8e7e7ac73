"The loop for maintainers: accumulation, average, rates, brakes, processes."
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from brainldm import loop
from brainldm.loop import Learner, TrainConfig, check_config, ema_decay, fit, lr_at, seeded, train_batches


@dataclass
class AveragedConfig(TrainConfig):
    "A training with an average of its weights."
    ema_images:int=20


def line(): return seeded(0, lambda: nn.Linear(3, 1))
def line_loss(model, batch, generator, seen): return (model(batch['x'])-batch['y']).square().mean(),{}
def line_data(n=96):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return x,x@torch.tensor([[1.], [-2.], [3.]])


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('batch,accumulate', [(4, 2), (2, 4), (1, 8)])
def test_accumulated_batches_are_one_batch(batch, accumulate, precision):
    x,y = line_data()
    def trained(b, k):
        config = AveragedConfig(total_images=96, batch_size=b, accumulate=k, log_every=k*2, warmup_images=24, learning_rate=.1, ema_images=8, precision=precision)
        learner = Learner(line(), line_loss, config)
        for i in range(0, 96, b): learner.step(dict(x=x[i:i+b], y=y[i:i+b]))
        return learner
    one,many = trained(8, 1),trained(batch, accumulate)
    tol = dict(rtol=1e-4, atol=1e-5) if precision=='no' else dict(rtol=.02, atol=.02)      # bf16 has 8 bits
    torch.testing.assert_close(one.raw.weight, many.raw.weight, **tol)
    torch.testing.assert_close(one.ema.module.weight, many.ema.module.weight, **tol)


def test_average_follows_its_formula():
    x,y = line_data()
    config = AveragedConfig(total_images=96, batch_size=8, warmup_images=0, learning_rate=.1, ema_images=30, precision='no')
    learner,want = Learner(line(), line_loss, config),None
    for i in range(0, 96, 8):
        learner.step(dict(x=x[i:i+8], y=y[i:i+8]))
        w,beta = learner.raw.weight.detach().double(),ema_decay(i+8, 8, 30)
        want = w if want is None else beta*want+(1-beta)*w
    torch.testing.assert_close(learner.ema.module.weight.detach().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('total,warm,batch', [(1000, 100, 8), (1000, 0, 8), (100, 1000, 8), (7, 3, 8), (10**7, 10**5, 128)])
def test_learning_rate_is_positive_and_ends_low(total, warm, batch):
    config = TrainConfig(total_images=total, warmup_images=warm, batch_size=batch, learning_rate=1.)
    rates = [lr_at(n, config) for n in range(0, total, max(batch, total//500))]
    assert all(0<o<=1 for o in rates) and lr_at(total, config)==0 and lr_at(total+batch, config)==0
    top = int(np.argmax(rates)); assert np.all(np.diff(rates[:top+1])>=0) and np.all(np.diff(rates[top:])<=0)


@pytest.mark.parametrize('world', [1, 2, 3])
def test_processes_share_the_line_of_batches(world):
    class Rows(list):
        def __getitems__(self, at): return dict(x=torch.tensor(at))
    take = lambda k,*args: [o['x'] for _,o in zip(range(k), train_batches(Rows(range(30)), TrainConfig(batch_size=4), *args))]
    line = take(12)
    for rank in range(world):
        for a,b in zip(take(12//world, 0, rank, world), line[rank::world]): assert torch.equal(a, b)
        for a,b in zip(take(2, 4*world*2, rank, world), line[world*2+rank::world]): assert torch.equal(a, b)      # resumed after two steps


def test_a_gradient_that_is_not_finite_is_seen_before_the_loss_is():
    "The loss is finite, its gradient is not: the weights are lost, and no checkpoint may keep them."
    class Root(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(1))
        def forward(self): return self.w.sqrt().sum()
    learner = Learner(Root(), lambda model,batch,generator,seen: (model(), {}), TrainConfig(batch_size=1, precision='no', warmup_images=0))
    saved = []
    with pytest.raises(RuntimeError, match='grad_norm=(inf|nan)'):
        fit(learner.step, [dict(x=torch.zeros(1))]*10, 10, log_every=1, callbacks=(lambda seen,means: saved.append(seen),))
    assert not saved


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'nonsense'])
def test_a_tracker_that_is_not_installed(name, monkeypatch):
    monkeypatch.setattr(loop, 'get_available_trackers', lambda: [])
    with pytest.raises(ValueError, match=f"log_with='{name}' is not installed"): check_config(TrainConfig(log_with=name))
