"""Do the slices of a generated brain belong together? Beside scans, and beside slices generated
alone or from shared noise.

python tests/benchmarks/volumes.py DATA RUN        # RUN: a folder with ldm.safetensors and
volume.safetensors

Every way is asked for the same subjects as the scans it stands beside, all slices of each. The
network that reads slice positions is the run's own evaluate, trained if `brainldm evaluate` has
not done so."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import tyro

from brainldm.engineering.plotting import save_figure, show_planes
from brainldm.data import open_dataset
from brainldm.vae import image_scores
from brainldm.sampling import BrainLDM
from brainldm.advanced.volume import BrainVolumes, neighbor_scores, sample_shared_noise
from brainldm.advanced.evaluation import json_safe, subject_interval
from brainldm.advanced.fidelity import feature_net, predict_covariates
from brainldm.engineering.cli import data_config


@dataclass
class Volumes:
    "Generate whole brains in every way and measure them beside scans."

    data: tyro.conf.Positional[Path]  # The data that the run was trained on
    run: tyro.conf.Positional[Path]  # Run folder with both networks
    out: Path = Path("runs/benchmarks/volumes")  # table.json, and a figure of each way
    brains: int = 8  # Held-out subjects whose brains are asked for
    steps: int = 20  # Denoising steps a slice
    seed: int = 0  # Of the noise
    # Of shared noise: 0 samples each slice alone, 1 shares one field
    correlations: tuple[float, ...] = (0.0, 0.9, 1.0)


def stacks(held_out, brains: int) -> tuple[torch.Tensor, pd.DataFrame]:
    "Scans of so many subjects (n, s, h, w), evenly over the diagnoses, and a row for each."
    people = held_out.manifest.drop_duplicates("subject")
    if "diagnosis" in people:
        people = people.assign(turn=people.groupby("diagnosis").cumcount()).sort_values(
            ["turn", "diagnosis"], kind="stable"
        )
    table = held_out.manifest.assign(row=range(len(held_out)))
    rows = [
        table[table.subject == o].sort_values("slice").row.tolist() for o in people.subject[:brains]
    ]
    return torch.stack([held_out.__getitems__(o)["image"][:, 0] for o in rows]), people[
        :brains
    ].reset_index(drop=True)


def score(volumes: torch.Tensor, net, slices: np.ndarray) -> dict:
    "Numbers of some brains (n, s, h, w)."
    near = neighbor_scores(volumes)
    apart = min(4, volumes.shape[1] - 1)
    far = (
        image_scores(
            *(o.flatten(0, 1)[:, None] for o in (volumes[:, :-apart], volumes[:, apart:]))
        )["ssim"]
        .mean()
        .item()
    )
    read = predict_covariates(net, volumes.flatten(0, 1)[:, None])["slice"]
    who = np.arange(len(volumes)).astype(str)
    return {
        "SSIM of neighbors": near["ssim"].mean().item(),
        "interval": subject_interval(pd.Series(near["ssim"].numpy()), pd.Series(who)),
        "roughness": near["roughness"].mean().item(),
        f"SSIM {apart} apart": far,
        "slice error": float(np.nanmean(np.abs(np.asarray(read) - np.tile(slices, len(volumes))))),
    }


def main(job: Volumes) -> pd.DataFrame:
    matplotlib.use("Agg")
    model, alone = BrainVolumes.load(job.run), BrainLDM.load(job.run)
    dataset = open_dataset(job.data, data_config(job.run, None))
    real, people = stacks(dataset.subset("validate"), job.brains)
    slices = np.sort(dataset.manifest["slice"].unique())
    requested = {c.name: people[c.name].tolist() for c in model.covariates if c.name != "slice"}
    options = dict(slices=slices, steps=job.steps, seed=job.seed, sampler="dpmpp", **requested)
    net = feature_net(job.run, dataset)
    ways = {"neighbours": lambda: model.sample_volume(len(people), **options)}
    for rho in job.correlations:
        ways[f"noise correlated {rho:g}"] = partial(
            sample_shared_noise, alone, len(people), noise_correlation=rho, **options
        )
    rows = {"scans": score(real, net, slices)}
    for name, draw in ways.items():
        volumes = draw()
        rows[name] = score(volumes, net, slices)
        save_figure(
            show_planes(volumes[:4], [str(o) for o in range(min(4, len(volumes)))], 1.0, name),
            job.out / f"{name.replace(' ', '_')}.png",
        )
    table = pd.DataFrame(rows).T
    print(table.map(lambda o: np.round(o, 3)).to_string())
    where = dict(
        data=job.data.name,
        brains=len(people),
        steps=job.steps,
        seed=job.seed,
        torch=torch.__version__.split("+")[0],
    )
    (job.out / "table.json").write_text(
        json.dumps(json_safe(dict(where=where, rows=rows)), indent=1)
    )
    return table


if __name__ == "__main__":
    main(tyro.cli(Volumes))
