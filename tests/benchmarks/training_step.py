"""What `fit` costs beside the bare network: loading, noise, average of the weights, log, one
column a part.

python tests/benchmarks/training_step.py                 # autoencoder, latent diffusion and
prior of the laptop preset python tests/benchmarks/training_step.py --stages ldm --preset gpu

The bare step is forward, backward, clip and optimizer of the same network on one batch that
never changes."""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from peers import COVARIATES
from timing import (
    Job,
    autocast,
    count,
    device_and_precision,
    draw_ratios,
    interleave,
    machine,
    publish,
    quartiles,
    ratio,
)
from torch import nn
from torch.optim import AdamW
from tqdm import tqdm

from brainldm.engineering.configs import CODE_PRESETS, PRESETS, PRIOR_PRESETS, TrainConfig
from brainldm.data import SliceDataset
from brainldm.vae import kl_loss
from brainldm.unet import UNet
from brainldm.engineering.loop import Learner, fit, seeded, step_seed, to_device, train_batches
from brainldm.engineering.runs import StopRequest, stage_callbacks
from brainldm.engineering.stage1 import autoencoder_args, build_autoencoder
from brainldm.engineering.stage2 import LatentDataset, unet_args
from brainldm.training import autoencoder_loss, condition_dropout_mask, ldm_loss
from brainldm.advanced.prior import CodeTransformer, prior_loss

TARGET = '<= 1.10'
NEVER = 10**12  # images: no validation, no checkpoint, no end


@dataclass
class Steps(Job):
    "`fit` against forward, backward, clip and optimizer step."

    preset: Literal['tiny', 'laptop', 'gpu'] = 'laptop'  # Whose networks, batch sizes and rates
    # Which trainings
    stages: tuple[Literal['autoencoder', 'ldm', 'prior'], ...] = ('autoencoder', 'ldm', 'prior')
    # Steps a measurement; None: as many as lie between two lines of the log
    steps: int | None = None


@dataclass
class Stage:
    "One training: its network, its loss, its data, and the same loss with nothing left to chance."

    config: TrainConfig  # Rates, lengths, precision
    make: Callable[[], nn.Module]  # Builds the network
    loss: Callable  # As `Learner` takes it
    dataset: torch.utils.data.Dataset  # Gives batches by index
    # fixed(batch) -> error(net): the loss of a batch whose chance was generated before
    fixed: Callable


def manifest(n):
    "Rows of an invented cohort: 32 slices a subject."
    i = np.arange(n)
    return pd.DataFrame(
        dict(
            path='',
            plane=0,
            subject=[f's{k}' for k in i // 32],
            slice=i % 32,
            diagnosis=np.where(i // 32 % 2, 'AD', 'NC'),
            split='train',
        )
    )


def conditions(n):
    "Slice and diagnosis of `manifest`, encoded."
    return dict(slice=torch.arange(n).remainder(32) / 31.0, diagnosis=torch.arange(n) // 32 % 2)


def autoencoder_stage(preset: str, folder: Path, n: int = 2048) -> Stage:
    "Stage 1 on a memmap of noise, as `open_dataset` hands one over."
    config = PRESETS[preset][0]
    side, f = config.data.size, config.patch * 2 ** (len(config.channels) - 1)
    images = np.lib.format.open_memmap(folder / 'images.npy', 'w+', np.uint8, (n, side, side))
    images[:] = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    images.flush()

    def fixed(batch):
        eps = torch.randn(
            len(batch['image']),
            config.latent_channels,
            side // f,
            side // f,
            device=batch['image'].device,
        )

        def error(net):
            recon, mu, logvar = net(batch['image'], batch, eps)
            return lambda: F.l1_loss(recon.float(), batch['image']) + config.kl_weight * kl_loss(
                mu.float(), logvar.float()
            )

        return error

    return Stage(
        config,
        lambda: build_autoencoder('kl', autoencoder_args(config)),
        partial(autoencoder_loss, config=config),
        SliceDataset(np.load(folder / 'images.npy', mmap_mode='r'), manifest(n)),
        fixed,
    )


def ldm_stage(preset: str, folder: Path, n: int = 4096) -> Stage:
    "Stage 2 on cached latents."
    ae, config = PRESETS[preset]
    z, side = ae.latent_channels, ae.data.size // (ae.patch * 2 ** (len(ae.channels) - 1))

    def fixed(batch):
        x, b, device = batch['latent'], len(batch['latent']), batch['latent'].device
        t, target, gen = (
            torch.randint(1000, (b,), device=device),
            torch.randn_like(x),
            torch.Generator(device),
        )
        drop, cond = condition_dropout_mask(
            b, len(COVARIATES), config.covariate_dropout, config.condition_dropout, gen
        ), {c.name: batch[c.name] for c in COVARIATES}

        def error(net):
            pred = net(x, t, cond, drop)
            return lambda: F.mse_loss(pred.float(), target)

        return error

    return Stage(
        config,
        lambda: UNet(**unet_args(config, z, COVARIATES)),
        partial(ldm_loss, config=config, covariates=COVARIATES),
        LatentDataset(torch.randn(n, z, side, side), conditions(n)),
        fixed,
    )


def prior_stage(preset: str, folder: Path, n: int = 4096) -> Stage:
    "The transformer on code maps."
    ae, config = CODE_PRESETS[preset], PRIOR_PRESETS[preset]
    side, k = ae.data.size // (ae.patch * 2 ** (len(ae.channels) - 1)), ae.num_embeddings

    def make():
        return CodeTransformer(
            k,
            side,
            COVARIATES,
            config.embed_dim,
            config.num_layers,
            config.num_heads,
            code_dim=8,
            dropout=config.dropout,
        )

    def fixed(batch):
        codes, device = batch['latent'].flatten(1), batch['latent'].device
        drop = condition_dropout_mask(
            len(codes),
            len(COVARIATES),
            config.covariate_dropout,
            config.condition_dropout,
            torch.Generator(device),
        )
        cond = {c.name: batch[c.name] for c in COVARIATES}

        def error(net):
            logits = net(codes[:, :-1], cond, drop)
            return lambda: F.cross_entropy(logits.float().transpose(1, 2), codes)

        return error

    return Stage(
        config,
        make,
        partial(prior_loss, config=config, covariates=COVARIATES, num_embeddings=k),
        LatentDataset(torch.randint(k, (n, side, side)), conditions(n)),
        fixed,
    )


STAGES = dict(autoencoder=autoencoder_stage, ldm=ldm_stage, prior=prior_stage)


def bare_step(net: nn.Module, error: Callable, config: TrainConfig, device, precision):
    "A function that does one step and nothing else."
    net = net.to(device).train()
    optimizer = AdamW(
        net.parameters(),
        config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=device.type in ('cpu', 'cuda'),
    )

    def step():
        # the network in low precision, its error not
        with autocast(device, precision):
            loss = error(net)
        loss().backward()
        nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Answer(nn.Module):
    "Says what another network said last time: what is left of a loss is chance and error."

    def __init__(self, net, loss, batch):
        super().__init__()
        self.sizes = {
            k: getattr(net, k, None) for k in ('factor', 'latent_channels', 'in_channels')
        }

        def listen(_, __, answer):
            self.answer = answer

        hook = net.register_forward_hook(listen)
        with torch.no_grad():
            loss(net, batch, torch.Generator(next(iter(batch.values())).device), 0)
        hook.remove()

    def __getattr__(self, name):
        "The loss asks for sizes of the network."
        sizes = self.__dict__.get('sizes', {})
        return sizes[name] if name in sizes else super().__getattr__(name)

    def forward(self, *_):
        return self.answer


def parts(stage: Stage, learner: Learner, batch: dict, batches) -> dict[str, Callable]:
    "What `fit` does beside the network, each by itself."
    config, device = stage.config, learner.accelerator.device
    silent = Answer(learner.raw, stage.loss, batch)

    def chance():
        return torch.Generator(device).manual_seed(step_seed(config.seed, 1000))

    gen = chance()
    named = {
        'load a batch': lambda: next(batches),
        'seed of the step': chance,
        'sample noise, and the error': lambda: stage.loss(silent, batch, gen, 0),
        'average of the weights': lambda: learner.ema.update_parameters(learner.raw),
    }
    return (
        named
        if learner.ema is not None
        else {k: v for k, v in named.items() if k != 'average of the weights'}
    )


def measure(name: str, job: Steps, folder: Path, device, precision):
    "One training: rows of the table."
    stage = STAGES[name](job.preset, folder)
    config = replace(
        stage.config,
        total_images=NEVER,
        validate_every=NEVER,
        checkpoint_every=NEVER,
        precision=precision,
        num_workers=0,
    )
    config = replace(
        config, log_every=job.steps or config.log_every, warmup_images=1, learning_rate=1e-6
    )
    learner = Learner(seeded(0, stage.make), stage.loss, config, folder)
    learner.model.train()
    batches = iter(train_batches(stage.dataset, config))
    batch = to_device(next(batches), device)
    bare = bare_step(seeded(0, stage.make), stage.fixed(batch), config, device, precision)
    bar = tqdm(total=NEVER, file=io.StringIO())
    callbacks = stage_callbacks(learner, folder, name, None, None, bar, StopRequest())

    def times(call):
        return lambda: [call() for _ in range(config.log_every)]

    def whole():
        fit(
            learner.step,
            batches,
            learner.seen + config.log_every * config.batch_size,
            learner.seen,
            log_every=config.log_every,
            callbacks=callbacks,
        )

    contestants = {'bare': times(bare), 'step': times(lambda: learner.step(batch)), 'fit': whole}
    contestants |= {k: times(v) for k, v in parts(stage, learner, batch, batches).items()}
    t = interleave(contestants, job, device) / config.log_every

    def row(what, over, target=''):
        return dict(
            what=f'{name}: {what}',
            **ratio(over, t.bare, target),
            milliseconds=1e3 * over.median(),
            bare=1e3 * t.bare.median(),
            batch_size=config.batch_size,
        )

    rows = [
        row('fit / bare', t.fit, TARGET),
        row('Learner.step / bare', t.step),
        *(row(k, t[k]) for k in t.columns[3:]),
    ]
    return rows, count(learner.raw), {k: quartiles(v) for k, v in t.items()}


def main(job: Steps):
    device, precision = device_and_precision(job)
    rows, sizes, seconds = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in job.stages:
            (Path(folder) / name).mkdir()
            more, sizes[name], seconds[name] = measure(
                name, job, Path(folder) / name, device, precision
            )
            rows += more
    where = dict(machine(job, device, precision), preset=job.preset, parameters=sizes)
    return publish(
        'training_step',
        pd.DataFrame(rows),
        job,
        where,
        draw_ratios('What training costs beside the bare step', 'fraction of the bare step'),
        seconds=seconds,
    )


if __name__ == '__main__':
    main(tyro.cli(Steps))
