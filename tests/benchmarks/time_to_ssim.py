"""Seconds of training until held-out images come back with SSIM 0.90: ours beside MONAI's
AutoencoderKL.

python tests/benchmarks/time_to_ssim.py                  # phantom cohort, made on the spot
python tests/benchmarks/time_to_ssim.py --data DATA      # anybody's own images (only numbers
leave them)

Both see the same images, in turn, a lap each, until they are there or out of time; looking at
held-out images is not counted. MONAI's recipe is that of Project-MONAI/tutorials,
generation/2d_ldm (train_autoencoder.py, config_train_16g.json): Adam at 2.5e-5, batches of 13,
L1 + 1e-6 KL summed over an image's latents, float32 weights, no clipping, no schedule. Changed,
each in its favour or for equality: the network has our number of parameters and our latents; it
computes in our precision; its perceptual term and the discriminator that starts in epoch 6 are
left out, which costs it no time and no SSIM. A second MONAI runs the same at a rate of our own
choice."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import pandas as pd
import torch
import tyro
from peers import monai_autoencoder, our_autoencoder
from timing import Job, autocast, count, device_and_precision, machine, publish, seconds
from torch import nn

from brainldm.engineering.configs import PRESETS, PhantomConfig
from brainldm.engineering.phantom import make_cohort
from brainldm.data import open_dataset
from brainldm.vae import image_scores
from brainldm.engineering.loop import Learner, to_device, train_batches
from brainldm.engineering.stage1 import evenly_spaced_rows
from brainldm.training import autoencoder_loss

BATCH = 13  # of the recipe


@dataclass
class Race(Job):
    "Time to SSIM."

    repeats: int = 1  # Races, each with another seed
    # Folder of images; None: 48 phantom subjects, 6 slices each, seed 0
    data: Path | None = None
    preset: Literal['tiny', 'laptop', 'gpu'] = 'laptop'  # Our training
    ssim: float = 0.90  # The line, mean over held-out images
    limit: float = 900.0  # Seconds of training after which a contestant is out
    lap: float = 20.0  # Seconds of training between two looks
    held_out: int = 64  # Images of validation subjects to look at
    # Learning rates of MONAI: the recipe's, and ours to choose
    rates: tuple[float, ...] = (2.5e-5, 5e-4)


@dataclass
class Runner:
    "A contestant: how it takes a step, how it reconstructs, and how far it has come."

    step: Callable[[], int]  # Trains on one batch, gives its size
    answer: Callable  # Images to reconstructions
    net: nn.Module  # Its network
    curve: list  # (seconds, images, ssim) at each look

    def is_done(self, job):
        return bool(self.curve) and (
            self.curve[-1][2] >= job.ssim or self.curve[-1][0] >= job.limit
        )


def ours(side, train, job, seed, precision) -> Runner:
    "The preset's training as `train_autoencoder` runs it."
    config = replace(PRESETS[job.preset][0], seed=seed, precision=precision, num_workers=0)
    learner = Learner(side.net, partial(autoencoder_loss, config=config), config)
    batches = iter(train_batches(train, config))

    def step():
        learner.model.train()
        learner.step(next(batches))
        return config.batch_size

    return Runner(step, lambda x: side.answer(side.net, dict(image=x)), side.net, [])


def monai(side, train, job, seed, precision, device, rate) -> Runner:
    "The tutorial's training; see the top of this file."
    config = replace(PRESETS[job.preset][0], seed=seed, batch_size=BATCH, num_workers=0)
    net, batches = side.net.to(device), iter(train_batches(train, config))
    optimizer = torch.optim.Adam(net.parameters(), rate, fused=device.type in ('cpu', 'cuda'))

    def step():
        net.train()
        batch = to_device(next(batches), device)
        with autocast(device, precision):
            loss = side.loss(net, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return BATCH

    return Runner(step, lambda x: side.answer(net, dict(image=x)), net, [])


def run_lap(runner: Runner, x, job, device, precision):
    "Train for one lap, then look."
    spent, seen, _ = runner.curve[-1] if runner.curve else (0.0, 0, 0.0)
    until = min(spent + job.lap, job.limit)

    def one():
        nonlocal seen
        seen += runner.step()

    while spent < until:
        spent += seconds(one, job.clock, device)
    runner.net.eval()
    with torch.no_grad(), autocast(device, precision):
        recon = torch.cat([runner.answer(o) for o in x.split(16)])
    ssim = image_scores(recon.float().clamp(-1, 1), x)['ssim'].mean().item()
    runner.curve.append((spent, seen, ssim))


def race(dataset, job: Race, seed: int, device, precision) -> dict[str, Runner]:
    "One race to its end."
    train, x = (
        dataset.subset('train'),
        to_device(evenly_spaced_rows(dataset.subset('validate'), job.held_out), device)['image'],
    )
    # its weights are those of seed 0 in every race
    side = our_autoencoder(job.preset, x.shape[-1], device)
    runners = {'brainldm': ours(side, train, job, seed, precision)}
    runners |= {
        f'MONAI, rate {rate:g}': monai(
            monai_autoencoder(job.preset, count(side.net)),
            train,
            job,
            seed,
            precision,
            device,
            rate,
        )
        for rate in job.rates
    }
    while not all(o.is_done(job) for o in runners.values()):
        for name, o in runners.items():
            if o.is_done(job):
                continue
            run_lap(o, x, job, device, precision)
            print(
                f'seed {seed}  {name:20} {o.curve[-1][0]:6.0f} s {o.curve[-1][1]:8,} images  SSIM'
                f' {o.curve[-1][2]:.3f}',
                flush=True,
            )
    return runners


def summarise(races: list[dict[str, Runner]], job: Race) -> pd.DataFrame:
    """A row a contestant: medians over the races.

    Who did not arrive is counted at the limit, so its ratio is a bound."""
    rows = []
    for name in races[0]:
        ends = pd.DataFrame(
            [(*o[name].curve[-1], races[i]['brainldm'].curve[-1][0]) for i, o in enumerate(races)],
            columns=['s', 'n', 'ssim', 'ours'],
        )
        share = (ends.ours / ends.s).quantile([0.25, 0.5, 0.75])
        rows.append(
            dict(
                what=name if name == 'brainldm' else f'brainldm / {name}',
                ratio=share[0.5],
                q1=share[0.25],
                q3=share[0.75],
                target='' if name == 'brainldm' else '<= 0.3',
                seconds=ends.s.median(),
                images=int(ends.n.median()),
                ssim=ends.ssim.median(),
                arrived=f'{(ends.ssim>=job.ssim).sum()} of {len(ends)}',
                parameters=count(races[0][name].net),
            )
        )
    return pd.DataFrame(rows)


def open_data(job: Race, folder: str):
    "The images to race on."
    config = PRESETS[job.preset][0].data
    if job.data:
        return open_dataset(job.data, config, progress=False)
    root = make_cohort(
        Path(folder) / 'phantom',
        PhantomConfig(num_subjects=48, num_slices=6, size=config.size, seed=0),
        progress=False,
    )
    return open_dataset(root, config, progress=False, cache_dir=Path(folder) / 'cache')


def main(job: Race):
    device, precision = device_and_precision(job)
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_data(job, folder)
        races = [race(dataset, job, seed, device, precision) for seed in range(job.repeats)]
    curves = [{k: o.curve for k, o in r.items()} for r in races]

    def draw(_):
        fig, ax = plt.subplots(figsize=(7.5, 3), layout='constrained')
        for r in curves:
            for i, (name, c) in enumerate(r.items()):
                ax.plot(
                    [o[0] for o in c],
                    [o[2] for o in c],
                    '.-',
                    color=f'C{i}',
                    label=name if r is curves[0] else None,
                )
        ax.axhline(job.ssim, color='k', lw=0.7, ls=':')
        ax.set(
            xlabel='seconds of training',
            ylabel='SSIM on held-out subjects',
            title='Time to a good reconstruction',
        )
        ax.legend(frameon=False)
        return fig

    where = dict(
        machine(job, device, precision),
        preset=job.preset,
        data=job.data.name if job.data else 'phantom, 48 subjects, 6 slices, seed 0',
        limit=job.limit,
    )
    return publish('time_to_ssim', summarise(races, job), job, where, draw, curves=curves)


if __name__ == '__main__':
    main(tyro.cli(Race))
