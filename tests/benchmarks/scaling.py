"""How cost grows: 64 -> 128 -> 256 pixels, and 1,000 -> 30,000 images.

python tests/benchmarks/scaling.py                       # needs 0.5 GB of disk for a moment
python tests/benchmarks/scaling.py --sizes 128 256 512 --counts 1000 100000

Prints what a training step costs at each size, what the loader gives beside what training
takes, what checking and caching cost, and how much memory holds 1,000 images or 30,000. Memory
is the process's own: pages of the memmap belong to the system, which takes them back."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import torch
import tyro
from networks import in_fresh_process, trainer
from peers import latents, our_autoencoder, our_unet, images
from PIL import Image
from timing import Job, device_and_precision, interleave, machine, publish, ratio, seconds
from torch import nn
from training_step import manifest

from brainldm.engineering.configs import PRESETS, DataConfig, TrainConfig
from brainldm.data import SliceDataset, open_dataset
from brainldm.engineering.loop import make_accelerator, train_batches
from brainldm.engineering.stage2 import latent_splits


@dataclass
class Scaling(Job):
    "Cost against size and number of images."

    preset: Literal['tiny', 'laptop', 'gpu'] = 'laptop'  # Whose networks
    sizes: tuple[int, ...] = (64, 128, 256)  # Sides of images
    batch_size: int = 4  # Images a step, at every size
    counts: tuple[int, ...] = (1_000, 10_000, 30_000)  # Images in a memmap
    files: tuple[int, ...] = (250, 1_000)  # Images to check and cache from PNG files
    batches: int = 500  # Batches a measurement of the loader


def brains(n: int, size: int):
    """Images that look a little like brains and are all different: an ellipse that turns, and a
    trace of noise."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    for i in range(n):
        a, b, rng = 0.8 + 0.1 * np.sin(i), 0.65 + 0.1 * np.cos(i), np.random.default_rng(i)
        yield (200 * (x**2 / b**2 + y**2 / a**2 < 1)).astype(np.uint8) + rng.integers(
            0, 24, (size, size), np.uint8
        )


def make_memmap(folder: Path, n: int, size: int) -> Path:
    "One file as `prepare_dataset` writes it."
    path, few = folder / f'{n}.npy', list(brains(16, size))
    images = np.lib.format.open_memmap(path, 'w+', np.uint8, (n, size, size))
    for i in range(n):
        images[i] = few[i % 16]
    images.flush()
    return path


def open_memmap(path: Path) -> SliceDataset:
    "The data set as training gets it."
    images = np.load(path, mmap_mode='r')
    return SliceDataset(images, manifest(len(images)))


def own_memory() -> float:
    "MB of this process that no file backs."
    info = psutil.Process().memory_info()
    return (info.rss - getattr(info, 'shared', 0)) / 1e6


def loader_memory(path: Path, config, batches: int) -> float:
    "MB that opening and reading costs; run it in a fresh process."
    before = own_memory()
    line = iter(train_batches(open_memmap(path), config))
    for _ in range(batches):
        next(line)
    return own_memory() - before


class Blind(nn.Module):
    "An autoencoder that looks at nothing: what is left is the memory of its latents."

    def __init__(self, shape):
        super().__init__()
        self.shape, self.weight = shape, nn.Parameter(torch.zeros(()))

    def encode(self, x, cond=None):
        return torch.randn(len(x), *self.shape), None


def latent_memory(path: Path, shape: tuple[int, ...]) -> float:
    "MB that the standardized latents of stage 2 hold; run it in a fresh process."
    data = open_memmap(path)
    data.manifest.loc[data.manifest.index[-len(data) // 20 :], 'split'] = 'validate'
    before = own_memory()
    kept = latent_splits(
        Blind(shape),
        data,
        path.parent / f'{path.stem}_latents',
        make_accelerator(TrainConfig(precision='no')),
        progress=False,
    )
    return own_memory() - before if kept else 0.0


def write_files(folder: Path, n: int, size: int) -> Path:
    "A data set of PNG files with its manifest."
    folder.mkdir()
    for i, image in enumerate(brains(n, size)):
        Image.fromarray(image).save(folder / f'{i}.png')
    manifest(n).drop(columns='plane').assign(path=[f'{i}.png' for i in range(n)]).to_csv(
        folder / 'manifest.csv', index=False
    )
    return folder / 'manifest.csv'


def by_size(job: Scaling, device, precision) -> list[dict]:
    "A training step of both networks at every size."
    rows = []
    kinds = dict(
        autoencoder=lambda s: (
            our_autoencoder(job.preset, s, device),
            images(job.batch_size, s, device),
        ),
        unet=lambda s: (our_unet(job.preset), latents(job.batch_size, job.preset, device, s)),
    )
    for kind, make in kinds.items():
        calls = {s: trainer(*make(s), device, precision) for s in job.sizes}
        t = interleave(calls, job, device) / job.batch_size
        rows += [
            dict(
                what=f'{kind}, {size} pixels / {before}',
                **ratio(t[size], t[before], '<= 4'),
                milliseconds_an_image=1e3 * t[size].median(),
            )
            for before, size in zip(job.sizes, job.sizes[1:])
        ]
        rows.append(
            dict(
                what=f'{kind}, {job.sizes[0]} pixels',
                milliseconds_an_image=1e3 * t[job.sizes[0]].median(),
            )
        )
    return rows


def by_count(job: Scaling, folder: Path, device, precision) -> list[dict]:
    "Loader and memory at every number of images, beside a training step of the autoencoder."
    config = PRESETS[job.preset][0]
    size, b, f = config.data.size, config.batch_size, config.patch * 2 ** (len(config.channels) - 1)
    paths = {n: make_memmap(folder, n, size) for n in job.counts}
    lines = {n: iter(train_batches(open_memmap(o), config)) for n, o in paths.items()}
    train = trainer(
        our_autoencoder(job.preset, size, device), images(b, size, device), device, precision
    )
    calls = {
        n: lambda line=line: [next(line) for _ in range(job.batches)] for n, line in lines.items()
    }
    t = interleave({**calls, 'training': train}, job, device)
    rows = [
        dict(
            what=f'loader / training, {n:,} images',
            **ratio(job.batches * t.training, t[n], '>= 20'),
            images_a_second=job.batches * b / t[n].median(),
            data_mb=n * size**2 / 1e6,
            own_mb=in_fresh_process(loader_memory, path, config, job.batches),
            latents_mb=in_fresh_process(
                latent_memory, path, (config.latent_channels, size // f, size // f)
            ),
        )
        for n, path in paths.items()
    ]
    return rows + [dict(what='training, autoencoder', images_a_second=b / t.training.median())]


def by_file(job: Scaling, folder: Path, device) -> list[dict]:
    "Checking and caching files, the first time and again."
    rows, size = [], PRESETS[job.preset][0].data.size
    for n in job.files:
        data = write_files(folder / f'png{n}', n, size)
        opened = lambda: open_dataset(
            data, DataConfig(size=size), progress=False, cache_dir=folder / 'cache'
        )
        cold, warm = (seconds(opened, job.clock, device) for _ in range(2))
        rows.append(
            dict(
                what=f'open_dataset, {n:,} files',
                milliseconds_an_image=1e3 * cold / n,
                again_ms_an_image=1e3 * warm / n,
            )
        )
    return rows


def draw(table: pd.DataFrame):
    "Three panels: cost by size, loader by count, memory by count."
    fig, axs = plt.subplots(1, 3, figsize=(7.5, 2.6), layout='constrained')
    for kind in ('autoencoder', 'unet'):
        part = table[table.what.str.startswith(f'{kind}, ')]
        sizes = part.what.str.extract(r', (\d+) pixels')[0].astype(int)
        order = sizes.argsort()
        axs[0].loglog(sizes.iloc[order], part.milliseconds_an_image.iloc[order], 'o-', label=kind)
    axs[0].set_xticks(sorted(sizes), sorted(sizes))
    axs[0].minorticks_off()
    axs[0].set(title='Training step', xlabel='pixels a side', ylabel='ms an image')
    axs[0].legend(frameon=False, fontsize=7)
    part = table[table.what.str.startswith('loader')]
    counts = part.what.str.extract(r', ([\d,]+) images')[0].str.replace(',', '').astype(int)
    axs[1].semilogx(counts, part.ratio, 'o-')
    axs[1].axhline(20, color='C3', lw=0.7)
    axs[1].set(title='Loader / training', xlabel='pictures', ylim=(0, None))
    for name, label in (
        ('data_mb', 'the data'),
        ('own_mb', 'held by training'),
        ('latents_mb', 'latents of stage 2'),
    ):
        axs[2].loglog(counts, part[name].clip(lower=1), 'o-', label=label)
    axs[2].set(
        title='Memory', xlabel='pictures', ylabel='MB', ylim=(0.8, 40 * part.latents_mb.max())
    )
    axs[2].legend(loc='upper left', frameon=False, fontsize=7)
    return fig


def main(job: Scaling):
    device, precision = device_and_precision(job)
    with tempfile.TemporaryDirectory() as folder:
        rows = (
            by_size(job, device, precision)
            + by_count(job, Path(folder), device, precision)
            + by_file(job, Path(folder), device)
        )
    table = pd.DataFrame(rows)
    table['target'] = table.target.fillna('')
    return publish(
        'scaling',
        table,
        job,
        dict(machine(job, device, precision), preset=job.preset, batch_size=job.batch_size),
        draw,
    )


if __name__ == '__main__':
    main(tyro.cli(Scaling))
