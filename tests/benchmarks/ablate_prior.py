"""What each choice of the code prior buys: one table, one command, seeds and data named.

python tests/benchmarks/ablate_prior.py DATA RUN                 # RUN: a folder with a trained
VQVAE python tests/benchmarks/ablate_prior.py DATA RUN --only base,rotary

Every variant is trained with the same seeds, sees the same codes in the same order, and its
bits are counted on the same held-out subjects. A difference counts where it is larger than seed
noise (`seeds.py`). Stopped, it goes on with the variant that it was at. Nothing of the data
leaves OUT. With fewer maps than train slices nothing is seen twice: dropout, smoothing and
replaced codes cannot show what they do against learning by memorization."""

import json
import platform
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from torch import nn

from brainldm.engineering.configs import PRIOR_PRESETS, PriorConfig
from brainldm.engineering.devices import pick_precision
from brainldm.data import open_dataset
from brainldm.engineering.loop import Learner, fit, seeded, train_batches
from brainldm.engineering.stage1 import evenly_spaced_rows, load_autoencoder, pick_covariates
from brainldm.engineering.stage2 import LatentDataset
from brainldm.advanced.prior import (
    CodeTransformer,
    cache_codes,
    code_baselines,
    code_bits,
    code_vectors,
    prior_args,
    prior_loss,
)
from brainldm.engineering.cli import data_config

import seeds


@dataclass
class Ablation:
    "Train and price every variant of the prior."

    data: tyro.conf.Positional[Path]  # The data that the autoencoder was trained on
    run: tyro.conf.Positional[Path]  # Run folder with a trained VQVAE; nothing is written there
    out: Path = Path("runs/ablation_prior")  # Codes, one file a variant, and table.json
    only: str = ""  # Names of variants, with commas between; none: all
    maps: int = 4_000  # Code maps that each variant sees
    preset: str = "laptop"  # Of PRIOR_PRESETS: the base
    seed: int = 0  # The first seed, of weights, order and dropout
    seeds: int = 3  # How many seeds each variant is trained with: seed, seed + 1, …


@dataclass
class Variant:
    "One prior: its configuration, and what no configuration decides."

    config: PriorConfig
    positions: str = "learned"  # 'learned', 'rotary' or 'both'
    tied: bool = False  # Whether the output head uses the vectors that codes come in with
    vectors: bool = True  # Whether it is told the autoencoder's vectors


def variants(job: Ablation) -> dict[str, Variant]:
    "One thing changed at a time."
    base = replace(
        PRIOR_PRESETS[job.preset], total_images=job.maps, warmup_images=job.maps // 8, seed=job.seed
    )
    half = base.embed_dim // 2
    return {
        "base": Variant(base),
        "rotary": Variant(base, positions="rotary"),
        "dropout 0": Variant(replace(base, dropout=0.0)),
        "rotary and learned": Variant(base, positions="both"),
        "tied": Variant(base, tied=True),
        "no vectors": Variant(base, vectors=False),
        "replaced codes 0.1": Variant(replace(base, replace_codes=0.1)),
        "label smoothing 0.1": Variant(replace(base, label_smoothing=0.1)),
        "dropout 0.2": Variant(replace(base, dropout=0.2)),
        "half as wide again": Variant(replace(base, embed_dim=base.embed_dim + half)),
        "half as deep again": Variant(
            replace(base, num_layers=base.num_layers + base.num_layers // 2)
        ),
    }


def place_angles(side: int, head_dim: int, before: int, base: float = 100.0) -> torch.Tensor:
    """Angle of each pair of channels at each place (before + side * side, head_dim / 2): half turn
    with the row, half with the column; covariates stay."""
    speed = base ** -torch.linspace(0, 1, head_dim // 4)
    i, j = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    turn = torch.cat([i.flatten()[:, None] * speed, j.flatten()[:, None] * speed], dim=1)
    return F.pad(turn, (0, 0, before, 0))


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn each pair of channels (..., t, c) by its angle (t, c / 2).

    Source: Su et al. 2021, eq. 34; on two axes: Heo et al. 2024, sec. 3.1."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()], dim=-1).to(
        x
    )


class Rotary(nn.Module):
    """A block's `qkv` that turns queries and keys by their place.

    For whole sequences: a place written alone would be taken for the first."""

    def __init__(self, qkv: nn.Linear, num_heads: int, turn: torch.Tensor):
        super().__init__()
        self.qkv, self.num_heads = qkv, num_heads
        self.register_buffer("turn", turn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (qkv n c) -> qkv b n t c", qkv=3, n=self.num_heads)
        turn = self.turn[: x.shape[1]]
        return rearrange([rotate(q, turn), rotate(k, turn), v], "qkv b n t c -> b t (qkv n c)")


class Tied(nn.Module):
    """Scores each code by the vector that it comes in with.

    Source: Press & Wolf 2017; scale: Vaswani et al. 2017, sec. 3.4."""

    def __init__(self, codes: nn.Embedding):
        super().__init__()
        self.codes, self.bias = codes, nn.Parameter(torch.zeros(codes.num_embeddings - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x * x.shape[-1] ** -0.5, self.codes.weight[:-1], self.bias)


def build(variant: Variant, args: dict, vectors: torch.Tensor) -> CodeTransformer:
    "The network of a variant; what it shares with the base starts as there."
    net = CodeTransformer(**args if variant.vectors else dict(args, code_dim=0))
    if variant.vectors:
        net.vectors.copy_(vectors)
    if variant.positions != "learned":
        turn = place_angles(net.side, args["embed_dim"] // net.num_heads, len(net.covariates))
        for block in net.blocks:
            block.qkv = Rotary(block.qkv, net.num_heads, turn)
    if variant.positions == "rotary":
        for name in ("rows", "cols"):
            zeros = torch.zeros_like(getattr(net, name))
            delattr(net, name)
            net.register_buffer(name, zeros)
    if variant.tied:
        net.head = Tied(net.codes)
    return net


def check_relative(side: int = 6, head_dim: int = 16) -> None:
    "Rotary attention between places depends on how far apart they are, not on where they are."
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, head_dim, generator=gen)
    places = (side, side, side, side)  # row and column of the query, then of the key
    turn = place_angles(side, head_dim, before=0)
    scores = (rotate(q.expand(side**2, -1), turn) @ rotate(k.expand(side**2, -1), turn).T).view(
        places
    )
    # all moved by one row and one column
    torch.testing.assert_close(
        scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], atol=1e-4, rtol=0
    )
    assert scores[0, 0].std() > 0.1 and not torch.allclose(
        scores[0, 0], scores[0, 0].T
    ), "attention must depend on rows and on columns"


def load_codes(job: Ablation, autoencoder, dataset) -> dict[str, torch.Tensor]:
    "Codes of train and validation subjects, written once."
    file = job.out / "codes.npz"
    if not file.is_file():
        precision = pick_precision("auto", next(autoencoder.parameters()).device)
        found = {
            o: cache_codes(autoencoder, dataset.subset(o), precision, progress=False).numpy()
            for o in ("train", "validate")
        }
        np.savez(file, **found)
    return {k: torch.from_numpy(v) for k, v in np.load(file).items()}


def measure(
    name: str, variant: Variant, codes: dict, dataset, args: dict, vectors: torch.Tensor, out: Path
) -> dict:
    "Train one variant and price train and held-out subjects."
    config = variant.config
    file = out / f"{name.replace(' ', '_')}_seed_{config.seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    parts = {k: LatentDataset(v, dataset.subset(k).conditions) for k, v in codes.items()}
    args = dict(
        args, **{o: getattr(config, o) for o in ("embed_dim", "num_layers", "num_heads", "dropout")}
    )
    net = seeded(config.seed, lambda: build(variant, args, vectors))
    loss = partial(
        prior_loss,
        config=config,
        covariates=args["covariates"],
        num_embeddings=args["num_embeddings"],
    )
    learner = Learner(net, loss, config)
    learner.model.train()
    clock = (
        time.process_time
        if torch.get_num_threads() == 1 and learner.accelerator.device.type == "cpu"
        else time.perf_counter
    )
    begin = clock()
    seen = fit(learner.step, train_batches(parts["train"], config), config.total_images)
    took = clock() - begin
    # as many train rows as held-out ones
    looks = (evenly_spaced_rows(parts[o], len(parts["validate"])) for o in ("train", "validate"))
    train, held_out = (
        code_bits(learner.ema.module, o["latent"], o, learner.precision) for o in looks
    )
    row = dict(
        parameters=sum(p.numel() for p in net.parameters()),
        train_bits=train.mean().item(),
        seconds=1000 * took / seen,
        held_out=held_out.tolist(),
    )
    file.write_text(json.dumps(row))
    print(f"{name}, seed {config.seed}: {held_out.mean():.4f} bits per code held out", flush=True)
    return row


def tabulate(rows: dict[str, list[dict]], subjects: list[str]) -> pd.DataFrame:
    """Bits per code, and how far from the base; a standard error over subjects, each subject's
    slices and all seeds taken together."""
    table = {}
    held_out = {k: np.mean([o["held_out"] for o in v], axis=0) for k, v in rows.items()}
    people = {k: pd.Series(v).groupby(np.array(subjects)).mean() for k, v in held_out.items()}
    for name, each in rows.items():
        gap = (people[name] - people["base"]) / people["base"].mean()
        table[name] = {
            "parameters, M": each[0]["parameters"] / 1e6,
            "held-out bits": held_out[name].mean(),
            "over base, %": 100 * gap.mean(),
            "(s.e. over subjects)": 100 * gap.sem(),
            "train bits": np.mean([o["train_bits"] for o in each]),
            "seconds / 1,000 maps": np.mean([o["seconds"] for o in each]),
        }
    return pd.DataFrame(table).T


def main(job: Ablation) -> pd.DataFrame:
    check_relative()
    dataset, (autoencoder, about) = open_dataset(
        job.data, data_config(job.run, None)
    ), load_autoencoder(job.run)
    names = variants(job)
    unknown = set(filter(None, job.only.split(","))) - set(names)
    if unknown:
        raise SystemExit(
            f"ablate_prior: unknown variant {sorted(unknown)}. Expected some of {list(names)}."
        )
    job.out.mkdir(parents=True, exist_ok=True)
    where = dict(
        data=job.data.name,
        codes=autoencoder.quantizer.num_embeddings,
        maps=job.maps,
        preset=job.preset,
        seed=job.seed,
        seeds=job.seeds,
        torch=torch.__version__.split("+")[0],
        threads=torch.get_num_threads(),
        machine=platform.machine(),
    )
    began = job.out / "where.json"
    if began.is_file() and json.loads(began.read_text()) != where:
        raise SystemExit(
            f"ablate_prior: {job.out} holds results of {began.read_text()}. Expected {where}. Give"
            " another --out."
        )
    began.write_text(json.dumps(where))
    codes = load_codes(job, autoencoder, dataset)
    args = prior_args(
        names["base"].config, autoencoder, about["size"], pick_covariates(dataset.covariates, None)
    )
    parts = {o: dataset.subset(o).manifest for o in codes}
    heights = {k: torch.tensor(o.slice.to_numpy()) for k, o in parts.items()}
    floors = code_baselines(
        codes["train"],
        heights["train"],
        parts["train"].subject.tolist(),
        codes["validate"],
        heights["validate"],
        args["num_embeddings"],
    )
    floors = {k: v.mean().item() for k, v in floors.items()}
    chosen = ["base"] + [
        k for k in names if k != "base" and (not job.only or k in job.only.split(","))
    ]
    every = [variants(replace(job, seed=job.seed + i)) for i in range(job.seeds)]
    rows = {
        k: [
            measure(k, o[k], codes, dataset, args, code_vectors(autoencoder), job.out)
            for o in every
        ]
        for k in chosen
    }
    table = tabulate(rows, parts["validate"].subject.tolist())
    said = seeds.describe(
        {k: [{"held-out bits": np.mean(o["held_out"])} for o in v] for k, v in rows.items()},
        "base",
        ("held-out bits",),
    )
    print(table.to_string(float_format="{:.3f}".format), said, sep="\n")
    print("baselines, bits per code:", {k: round(v, 3) for k, v in floors.items()})
    print(where)
    (job.out / "table.json").write_text(
        json.dumps(dict(where=where, floors=floors, rows=table.T.to_dict(), said=said), indent=1)
    )
    return table


if __name__ == "__main__":
    main(tyro.cli(Ablation))
