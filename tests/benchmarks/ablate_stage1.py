"""What each part of stage 1 buys: one table, one command, seeds and data named.

python tests/benchmarks/ablate_stage1.py                 # phantom cohort, made on the spot
python tests/benchmarks/ablate_stage1.py --data DATA     # anybody's own images (nothing of them
leaves OUT)

Every variant is trained with the same seeds, sees the same images in the same order, and is
scored on the same held-out subjects. A difference counts where it is larger than seed noise
(`seeds.py`). Stopped, it goes on where it was."""

import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import pandas as pd
import torch
import tyro

from brainldm.engineering.configs import AUGMENTED, CODE_PRESETS, AEConfig, PhantomConfig
from brainldm.engineering.plotting import save_figure, show_grid
from brainldm.engineering.phantom import make_cohort
from brainldm.data import open_dataset
from brainldm.engineering.runs import read_log
from brainldm.engineering.stage1 import evenly_spaced_rows
from brainldm.training import train_autoencoder
from brainldm.sampling import BrainLDM
from brainldm.advanced.evaluation import reconstruction_scores

import seeds

MEASURES = ("ssim", "ssim_brain", "sharpness")  # compared with the first variant of the same kind


@dataclass
class Ablation:
    "Train and score every variant of stage 1."

    # Folder of images; None: 48 phantom subjects, 6 slices each, 128 x 128, seed 0
    data: Path | None = None
    out: Path = Path("runs/ablation")  # Runs, table.json, table.md and two figures
    images: int = 6_000  # Images that each variant sees
    seed: int = 0  # The first seed, of the weights and the order of the images
    seeds: int = 3  # How many seeds each variant is trained with: seed, seed + 1, …
    split: str = "validate"  # Whose images are scored
    preset: str = "laptop"  # From which the ladder starts


def variants(images: int, seed: int, preset: str) -> dict[str, AEConfig]:
    "The ladder: each row adds one thing to the row named in its label."
    base = replace(
        CODE_PRESETS[preset],
        kind="kl",
        total_images=images,
        validate_every=images // 3,
        checkpoint_every=images // 3,
        seed=seed,
    )
    discriminator = dict(
        adversarial=True, adversarial_start=images // 2, discriminator_warmup=images // 6
    )
    codes = replace(
        base,
        kind="vq",
        latent_channels=8,
        codebook_ema=False,
        codebook_start="uniform",
        restart_below=0.0,
    )
    fine = replace(
        base,
        channels=base.channels[:1],
        attention_levels=(False,),
        num_res_blocks=2,
        latent_channels=4,
        unet_levels=3,
    )
    noised = replace(fine, latent_noise=0.1)
    return {
        "KL, L1 only": base,
        "KL, 16 channels": replace(base, latent_channels=16),
        "KL, 4 channels, a quarter of the side": fine,
        "KL, a quarter + noise": noised,
        "KL, a quarter + noise + augmented": replace(noised, augment=AUGMENTED),
        "KL, a quarter + noise + discriminator": replace(
            noised, **discriminator, adversarial_max_weight=0.003
        ),
        "KL + discriminator": replace(base, **discriminator),
        "KL + discriminator + features": replace(base, **discriminator, feature_weight=0.05),
        "KL + discriminator + random latents": replace(base, **discriminator, random_weight=0.1),
        "VQ, plain": codes,
        "VQ + k-means": replace(codes, codebook_start="kmeans"),
        "VQ + k-means + EMA": replace(codes, codebook_start="kmeans", codebook_ema=True),
        "VQ + k-means + EMA + restart": replace(
            codes, codebook_start="kmeans", codebook_ema=True, restart_below=0.1
        ),
        "VQ, all of it + discriminator": replace(
            codes, codebook_start="kmeans", codebook_ema=True, restart_below=0.1, **discriminator
        ),
        "FSQ (8, 5, 5, 5)": replace(base, kind="fsq"),
    }


def measure(name: str, config: AEConfig, dataset, job: Ablation) -> dict:
    "Train one variant and score it."
    stem = (
        name.lower()
        .replace(" ", "_")
        .replace(",", "")
        .replace("(", "")
        .replace(")", "")
        .replace("+", "and")
    )
    run = job.out / f"{stem}_seed_{config.seed}"
    train_autoencoder(dataset, run, config, resume=(run / "config.json").is_file())
    model = BrainLDM.load(run)
    scores = reconstruction_scores(model, dataset.subset(job.split), run)
    discriminator = [
        o["discriminator_accuracy"]
        for o in read_log(run / "log.jsonl")
        if "discriminator_accuracy" in o
    ]
    row = {
        k: scores.get(k)
        for k in ("ssim", "ssim_brain", "psnr", "sharpness", "codebook_usage", "perplexity")
    }
    row["discriminator_accuracy"] = (
        sum(discriminator[-10:]) / len(discriminator[-10:]) if discriminator else None
    )
    batch = evenly_spaced_rows(dataset.subset(job.split), 5)
    return dict(
        row=row,
        baseline=scores["baseline_mean_slice"],
        recon=model.reconstruct(batch["image"], batch)[2, 0],
    )


def draw(rows: dict[str, dict], original: torch.Tensor, title: str, path: Path) -> None:
    "Images above their errors."
    shown = torch.stack([original, *(o["recon"] for o in rows.values())])
    names = [
        "original",
        *(
            f"{k.replace(' + ', chr(10) + '+ ')}\n{o['row']['ssim_brain']:.3f}"
            for k, o in rows.items()
        ),
    ]
    save_figure(
        show_grid(
            torch.stack([shown, (shown - original) * 2]),
            titles=names,
            row_labels=["picture", "error x 2"],
            title=title,
            size=1.3,
        ),
        path,
    )


def main(job: Ablation) -> pd.DataFrame:
    matplotlib.use("Agg")
    configs = variants(job.images, job.seed, job.preset)
    data, settings = job.data, next(iter(configs.values())).data
    if data is None:
        data = job.out / "phantom"
        if not (data / "phantom.json").is_file():
            make_cohort(
                data, PhantomConfig(num_subjects=48, num_slices=6, size=settings.size, seed=0)
            )
    dataset = open_dataset(data, settings)
    every = [variants(job.images, job.seed + i, job.preset) for i in range(job.seeds)]
    found = {k: [measure(k, o[k], dataset, job) for o in every] for k in configs}
    rows, numbers = {k: v[0] for k, v in found.items()}, {
        k: [o["row"] for o in v] for k, v in found.items()
    }
    original = evenly_spaced_rows(dataset.subset(job.split), 5)["image"][2, 0]
    for name, title in (
        ("KL", "The discriminator brings back edges that the absolute error gave away"),
        ("codes", "The same bits, better and better used"),
    ):
        draw(
            {k: o for k, o in rows.items() if k.startswith("KL") == (name == "KL")},
            original,
            title,
            job.out / f"{name.lower()}.png",
        )
    table = seeds.mean_over_seeds(numbers).round(3)
    groups = {
        base: {k: v for k, v in numbers.items() if k.startswith("KL") == base.startswith("KL")}
        for base in ("KL, L1 only", "VQ, plain")
    }
    said = "\n".join(seeds.describe(group, base, MEASURES) for base, group in groups.items())
    floor = next(iter(rows.values()))["baseline"]
    where = dict(
        data=str(job.data.name) if job.data else "phantom, 48 subjects, 6 slices, seed 0",
        split=job.split,
        images=job.images,
        seed=job.seed,
        seeds=job.seeds,
        torch=torch.__version__.split("+")[0],
        threads=torch.get_num_threads(),
        machine=platform.machine(),
    )
    print(table.to_string(na_rep=""), said, sep="\n")
    print("baseline, the mean slice:", {k: round(v, 3) for k, v in floor.items()})
    print(where)
    (job.out / "table.json").write_text(
        json.dumps(
            dict(where=where, baseline=floor, rows=json.loads(table.T.to_json()), said=said),
            indent=1,
        )
    )
    return table


if __name__ == "__main__":
    main(tyro.cli(Ablation))
