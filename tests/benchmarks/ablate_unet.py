"""What each choice of stage 2 buys: one table, one command, seeds and data named.

python tests/benchmarks/ablate_unet.py DATA RUN [RUN ...]        # RUN: folders with a trained
autoencoder, such as 4, 8 and 16 channels python tests/benchmarks/ablate_unet.py DATA RUN --only
base,wide

Every variant is trained with the same seeds, sees the same latents in the same order, and is
evaluated by samples that are generated for exactly the conditions of the held-out subjects. A
difference counts where it is larger than seed noise (`seeds.py`). Stopped, it goes on where it
was. Nothing of the data leaves OUT."""

import json
import platform
import shutil
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import matplotlib
import pandas as pd
import torch
import tyro

from brainldm import unet
from brainldm.engineering.configs import AUGMENTED, PRESETS, AugmentConfig, LDMConfig
from brainldm.engineering.plotting import save_figure, show_grid
from brainldm.data import open_dataset
from brainldm.scheduler import NoiseSchedule
from brainldm.engineering.runs import read_config, read_log
from brainldm.training import train_ldm
from brainldm.sampling import BrainLDM
from brainldm.advanced.fidelity import feature_net, match_rows
from brainldm.engineering.report import evaluate_samples, sample_matched
from brainldm.engineering.cli import data_config

import seeds

# compared with the base
MEASURES = ("Frechet", "excess KID", "recall", "slice error", "CSF d", "MS-SSIM")


@dataclass
class Ablation:
    "Train and evaluate every variant of stage 2."

    data: tyro.conf.Positional[Path]  # The data that the autoencoders were trained on
    # Run folders with an autoencoder each; the first also takes every variant
    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("runs/ablation_unet")  # Runs, table.json and a figure
    only: str = ""  # Names of variants, with commas between; none: all
    images: int = 20_000  # Latents that each variant sees
    steps: int = 20  # Denoising steps (DPM-Solver++)
    seed: int = 0  # The first seed, of weights, order, noise and samples
    seeds: int = 3  # How many seeds each variant is trained with: seed, seed + 1, …
    preset: str = "laptop"  # From which one thing at a time is changed


def widths(channels: tuple[int, ...], times: float) -> tuple[int, ...]:
    "Features at each level, so many times as many, in steps of 32."
    return tuple(32 * max(1, round(times * c / 32)) for c in channels)


def variants(job: Ablation) -> dict[str, LDMConfig]:
    """One thing changed at a time, from the preset with a ceiling on SNR + 1; what would change
    nothing is left out."""
    often = dict(validate_every=job.images, checkpoint_every=max(1, job.images // 4))
    base = replace(
        PRESETS[job.preset][1],
        total_images=job.images,
        seed=job.seed,
        snr_gamma=20.0,
        snr_offset=1.0,
        early_images=0,
        **often,
    )
    alike, levels = replace(base, snr_gamma=None, snr_offset=0.0), len(base.channels)
    between = (base.channels[-2] + base.channels[-1]) // 2
    rows = {
        "attention at every level": replace(base, attention_levels=(True,) * levels),
        "attention at the deepest level": replace(
            base, attention_levels=(False,) * (levels - 1) + (True,)
        ),
        "no attention": replace(base, attention_levels=(False,) * levels),
        "a block more": replace(base, num_res_blocks=base.num_res_blocks + 1),
        "narrow": replace(base, channels=widths(base.channels, 2 / 3)),
        "wide": replace(base, channels=widths(base.channels, 5 / 4)),
        "a level more": replace(
            base,
            channels=(*base.channels[:-1], between, base.channels[-1]),
            attention_levels=(*base.attention_levels, True),
        ),
        "dropout 0.1": replace(base, dropout=0.1),
        "epsilon": replace(
            alike, schedule=NoiseSchedule(1000, "scaled_linear", 0.00085, 0.012, False, "epsilon")
        ),
        "rectified flow": replace(
            alike, schedule=NoiseSchedule(beta_schedule="flow", prediction_type="v_prediction")
        ),
        "every step equally": alike,
        "a lower ceiling": replace(base, snr_gamma=5.0),
        "augmented": replace(base, augment=AUGMENTED, copies=3),
        "not augmented": replace(base, augment=AugmentConfig(), copies=0),
        "min-SNR 5": replace(base, snr_gamma=5.0, snr_offset=0.0),
        "short EMA": replace(base, ema_images=100),
        "batch x 4": replace(
            base, batch_size=4 * base.batch_size, learning_rate=2 * base.learning_rate
        ),
        "half the rate": replace(base, learning_rate=base.learning_rate / 2),
        "twice the rate": replace(base, learning_rate=2 * base.learning_rate),
        "a quarter of the rate": replace(base, learning_rate=base.learning_rate / 4),
    }
    return {"base": base, "skips added": base, **{k: v for k, v in rows.items() if v != base}}


def narrow_level(
    channels: tuple[int, ...], i: int, num_res_blocks: int, **kwargs
) -> torch.nn.ModuleList:
    "One level on the way up whose blocks have no room for a skip beside what they receive."
    blocks = [unet.UNetBlock(channels[i], channels[i], **kwargs) for _ in range(num_res_blocks)]
    return torch.nn.ModuleList(
        ([unet.Upsample(channels[i + 1], channels[i])] if i + 1 < len(channels) else []) + blocks
    )


def add_skips(self, x: torch.Tensor, skips: list, *told) -> torch.Tensor:
    "The way up with skips added to what comes from below, instead of laid beside it."
    skips = list(skips)
    for block in [block for level in self.levels for block in level]:
        x = block(x) if isinstance(block, unet.Upsample) else block(x + skips.pop(), *told)
    return self.head(x)


@contextmanager
def added_skips():
    "While it is open, a UNet is built and run with added skips."
    with patch.object(unet, "up_level", narrow_level), patch.object(
        unet.UNetUp, "forward", add_skips
    ):
        yield


def measure(source: Path, name: str, config: LDMConfig, dataset, job: Ablation) -> dict:
    "Train one variant on the latents of one run, sample, and evaluate."
    run = job.out / f"{source.name} {name} seed {job.seed}".replace(" ", "_")
    if not (run / "config.json").is_file():
        run.mkdir(parents=True, exist_ok=True)
        for part in ("autoencoder.safetensors", "train_mean.safetensors"):
            shutil.copy(source / part, run / part)
        (run / "config.json").write_text(
            json.dumps({"autoencoder": read_config(source)["autoencoder"]})
        )
    if (run / "judged.json").is_file():
        return json.loads((run / "judged.json").read_text())
    begin = time.time()
    train_ldm(dataset, run, config, resume=True)
    took = time.time() - begin
    rows, model = match_rows(
        dataset.subset("validate").manifest, dataset.subset("train").manifest, seed=job.seed
    ), BrainLDM.load(run)
    images = sample_matched(
        model,
        dataset.subset("train").manifest.iloc[rows],
        generator="ldm",
        seed=job.seed,
        steps=job.steps,
        sampler="dpmpp",
    )
    save_figure(
        show_grid(images[:64, 0], ncols=16, title=f"{source.name}: {name}", size=0.5),
        run / "drawn.png",
    )
    errors = [
        o["val_mse"] for o in read_log(run / "log.jsonl") if o["stage"] == "ldm" and "val_mse" in o
    ]
    row = {
        "parameters, M": sum(p.numel() for p in model.unet.parameters()) / 1e6,
        "val_mse": errors[-1],
        **judge(images, rows, dataset, job),
        "seconds": took,
    }
    (run / "judged.json").write_text(json.dumps(row))
    return row


def decoded(source: Path, dataset, job: Ablation) -> dict:
    """What scans get that only went through the autoencoder: nothing that is generated in its
    latents can be expected to score better."""
    train, model = dataset.subset("train"), BrainLDM.load(source)
    rows = match_rows(dataset.subset("validate").manifest, train.manifest, seed=job.seed)
    batches = (train.__getitems__(rows[i : i + 32]) for i in range(0, len(rows), 32))
    return judge(torch.cat([model.reconstruct(o["image"], o) for o in batches]), rows, dataset, job)


def judge(images: torch.Tensor, rows, dataset, job: Ablation) -> dict:
    "The numbers that decide, beside their baselines."
    (job.out / "judge").mkdir(parents=True, exist_ok=True)
    net = feature_net(job.out / "judge", dataset)
    scores = evaluate_samples(
        net,
        images,
        rows,
        dataset.subset("train"),
        dataset.subset("validate"),
        utility=None,
        detection=None,
    )
    drawn, real = scores["conditioning"]["synthetic"], scores["conditioning"]["train"]
    fidelity, reference = scores["fidelity"]["synthetic"], scores["fidelity"]["reference"]
    power = {f"power {k}": o["ratio"] for k, o in scores["spectrum"]["synthetic"].items()}
    return {
        "Frechet": fidelity["frechet"],
        "(real)": reference["frechet"],
        "excess KID": scores["fidelity"]["excess"]["kid"],
        "recall": fidelity["recall"],
        "slice error": drawn["slice_error"]["value"],
        "(held)": scores["conditioning"]["held_out"]["slice_error"]["value"],
        "CSF d": drawn["diagnosis_effect"]["value"],
        "(train)": real["diagnosis_effect"]["value"],
        "MS-SSIM": scores["diversity"]["synthetic"]["ms_ssim"],
        "(held) ": scores["diversity"]["held_out"]["ms_ssim"],
        **power,
    }


def choose(known: dict, only: str) -> dict:
    "The variants that were asked for. Raises SystemExit for a name that is none."
    requested = [k for k in only.split(",") if k] or list(known)
    unknown = sorted(set(requested) - set(known))
    if unknown:
        raise SystemExit(f"ablation: unknown variant {unknown}. Expected some of {list(known)}.")
    return {k: v for k, v in known.items() if k in requested}


def each_seed(job) -> list:
    "The job once for each of its seeds."
    return [replace(job, seed=job.seed + i) for i in range(job.seeds)]


def tell(rows: dict[str, list[dict]], base: str, job, *sizes: str) -> pd.DataFrame:
    """Print means over the seeds, what is more than seed noise, and the circumstances; write all
    of it."""
    where = {o: getattr(job, o) for o in ("preset", "images", "steps", "seed", "seeds", *sizes)}
    where |= dict(
        data=job.data.name,
        torch=torch.__version__.split("+")[0],
        threads=torch.get_num_threads(),
        machine=platform.machine(),
    )
    table, said = seeds.mean_over_seeds(rows).round(3), seeds.describe(rows, base, MEASURES)
    print(table.to_string(), said, where, sep="\n")
    (job.out / "table.json").write_text(
        json.dumps(dict(where=where, rows=rows, said=said), indent=1)
    )
    return table


def main(job: Ablation) -> pd.DataFrame:
    matplotlib.use("Agg")
    dataset, jobs = open_dataset(job.data, data_config(job.runs[0], None)), each_seed(job)
    # the base is what all others are compared with
    requested = ["base", *(k for k in choose(variants(job), job.only) if k != "base")]
    todo = [(job.runs[0], k) for k in requested] + [(run, "base") for run in job.runs[1:]]
    rows = {}
    for run, k in todo:
        with added_skips() if k == "skips added" else nullcontext():
            rows[f"{run.name}: {k}"] = [measure(run, k, variants(o)[k], dataset, o) for o in jobs]
    rows |= {
        f"{run.name}: scans, decoded": [decoded(run, dataset, o) for o in jobs] for run in job.runs
    }
    return tell(rows, f"{job.runs[0].name}: base", job)


if __name__ == "__main__":
    main(tyro.cli(Ablation))
