"""What a latent should be like for the diffusion model that samples it: one table, one command,
seeds and data named.

python tests/benchmarks/ablate_latent.py DATA RUN        # RUN: a folder with a trained KL
autoencoder

The autoencoder is trained a little longer, each time with another price on its latents; then
the same diffusion model learns each of them, and its samples are evaluated as in
`ablate_unet.py`, with the same seeds. The first row trains longer at the old price: what the
others gain beyond it is due to their price. What is finished is not done again. Nothing of the
data leaves OUT."""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from tqdm.auto import tqdm

from brainldm.engineering.configs import PRESETS, AEConfig
from brainldm.data import open_dataset
from brainldm.vae import kl_loss, reparameterize
from brainldm.engineering.loop import Learner, fit, train_batches
from brainldm.engineering.runs import read_config, save_weights
from brainldm.engineering.stage1 import load_autoencoder
from brainldm.sampling import BrainLDM
from brainldm.advanced.evaluation import reconstruction_scores
from brainldm.engineering.cli import data_config

import ablate_unet


@dataclass
class Ablation:
    """Train an autoencoder a little longer at other prices of its latents, and evaluate what is
    generated from each."""

    data: tyro.conf.Positional[Path]  # The data that the autoencoder was trained on
    run: tyro.conf.Positional[Path]  # Run folder with a KL autoencoder
    out: Path = Path("runs/ablation_latent")  # Runs, table.json and figures
    only: str = ""  # Names of variants, with commas between; none: all
    tune_images: int = 8_000  # Images that each autoencoder sees in addition
    images: int = 12_000  # Latents that each diffusion model sees
    steps: int = 20  # Denoising steps (DPM-Solver++)
    seed: int = 0  # The first seed, of order, noise, weights and samples
    seeds: int = 3  # How many seeds each variant is trained with: seed, seed + 1, …
    preset: str = "laptop"  # Of the diffusion model, and whose batches the longer training has


def variants(run: Path) -> dict[str, dict]:
    """Prices of the latent: weight of the KL term, and of decoding a halved latent into anything
    but the halved image."""
    config = read_config(run)["autoencoder"]["config"]
    if config.get("kind", "kl") != "kl" or config.get("adversarial"):
        raise SystemExit(
            f"ablate_latent: {run.name} has codes or a discriminator. Expected a plain KL"
            " autoencoder. Train one with `brainldm train autoencoder`."
        )
    kept = config["kl_weight"]
    return {
        "as before": dict(kl_weight=kept, scale_weight=0.0),
        "KL x 100": dict(kl_weight=100 * kept, scale_weight=0.0),
        "KL x 1000": dict(kl_weight=1000 * kept, scale_weight=0.0),
        "scale": dict(kl_weight=kept, scale_weight=0.25),
        "scale and KL x 100": dict(kl_weight=100 * kept, scale_weight=0.25),
    }


def priced_loss(model, batch, generator, seen, kl_weight, scale_weight):
    """Mean absolute error, KL, and the error of the halved latent's image.

    Source: Skorokhodov et al. 2025, sec. 3 (scale equivariance)."""
    x = batch["image"]
    mu, logvar = model.encode(x, batch)
    z = reparameterize(mu, logvar, torch.randn(mu.shape, generator=generator, device=x.device))
    l1, kl = F.l1_loss(model.decode(z, batch).float(), x), kl_loss(mu.float(), logvar.float())
    logs, loss = dict(l1=l1.detach(), kl=kl.detach()), l1 + kl_weight * kl
    if not scale_weight:
        return loss, logs
    half = F.l1_loss(model.decode(F.avg_pool2d(z, 2), batch).float(), F.avg_pool2d(x, 2))
    return loss + scale_weight * half, dict(logs, half=half.detach())


def tune(name: str, prices: dict, dataset, job: Ablation) -> Path:
    "A run folder whose autoencoder was trained longer at these prices."
    run = job.out / f"ae {name} seed {job.seed}".replace(" ", "_")
    if (run / "autoencoder.safetensors").is_file():
        return run
    model, info = load_autoencoder(job.run)
    kept = {o: getattr(PRESETS[job.preset][0], o) for o in ("batch_size", "log_every")}
    config = AEConfig(
        **kept,
        precision="no",
        total_images=job.tune_images,
        warmup_images=job.tune_images // 8,
        learning_rate=5e-4,
        seed=job.seed,
    )
    learner = Learner(model.train(), partial(priced_loss, **prices), config)
    with tqdm(total=job.tune_images, unit="img", desc=f"autoencoder, {name}") as bar:

        def tell(seen, means):
            bar.update(seen - bar.n)
            bar.set_postfix({k: f"{v:.4f}" for k, v in means.items() if k in ("l1", "kl", "half")})

        fit(
            learner.step,
            train_batches(dataset.subset("train"), config),
            config.total_images,
            0,
            learner.images_per_step,
            config.log_every,
            (tell,),
        )
    run.mkdir(parents=True, exist_ok=True)
    shutil.copy(job.run / "train_mean.safetensors", run)
    settings = dict(read_config(job.run)["autoencoder"])
    settings["config"] = dict(settings["config"], kl_weight=prices["kl_weight"])
    (run / "config.json").write_text(json.dumps({"autoencoder": settings}))
    save_weights(run / "autoencoder.safetensors", learner.raw.state_dict(), info)
    return run


def measure(name: str, prices: dict, dataset, job: Ablation) -> dict:
    "Reconstructions, then samples, of one variant."
    source = tune(name, prices, dataset, job)
    scores = reconstruction_scores(BrainLDM.load(source), dataset.subset("validate"), source)
    judge = ablate_unet.Ablation(
        job.data,
        (source,),
        job.out,
        images=job.images,
        steps=job.steps,
        seed=job.seed,
        preset=job.preset,
    )
    drawn = ablate_unet.measure(source, "base", ablate_unet.variants(judge)["base"], dataset, judge)
    return {
        "SSIM": scores["ssim"],
        "brain SSIM": scores["ssim_brain"],
        "sharpness": scores["sharpness"],
        **drawn,
    }


def main(job: Ablation) -> pd.DataFrame:
    matplotlib.use("Agg")
    dataset, names = open_dataset(job.data, data_config(job.run, None)), variants(job.run)
    chosen = {"as before": names["as before"]} | ablate_unet.choose(names, job.only)
    rows = {
        k: [measure(k, v, dataset, o) for o in ablate_unet.each_seed(job)]
        for k, v in chosen.items()
    }
    return ablate_unet.tell(rows, "as before", job, "tune_images")


if __name__ == "__main__":
    main(tyro.cli(Ablation))
