"""Which differences between variants are larger than what another seed does to the same variant.

Every variant is trained with the same seeds. The standard deviation over seeds, pooled over all
variants, is the seed noise of a measure. A variant differs from the base where its mean over
the seeds does so by more than a two-sided t test at 5 % allows, divided by the number of
variants compared (Bonferroni). With one seed there is no estimate of that noise, and so no
finding."""

import numpy as np
import pandas as pd
from scipy.stats import t


def mean_over_seeds(
    rows: dict[str, list[dict]],  # By variant: the numbers of each seed
) -> pd.DataFrame:  # One row a variant
    "Mean of each number over the seeds."
    return pd.DataFrame({k: pd.DataFrame(v).astype(float).mean() for k, v in rows.items()}).T


def seed_noise(
    rows: dict[str, list[dict]],  # By variant: the numbers of each seed
) -> pd.Series:  # One number a measure; NaN where no variant has two seeds
    "Standard deviation over seeds, pooled over the variants."
    tables = [pd.DataFrame(v).astype(float) for v in rows.values()]
    squares = sum(((o - o.mean()) ** 2).sum(min_count=1) for o in tables)
    freedom = sum(len(o) - 1 for o in tables)
    return (squares / freedom) ** 0.5 if freedom else squares * np.nan


def findings(
    rows: dict[str, list[dict]],  # By variant: the numbers of each seed
    base: str,  # The variant that the others are compared with
    measures: tuple[str, ...],  # Which numbers to compare
    # By variant: the measures that differ from the base by more than seed noise
) -> dict[str, list[str]]:
    "Differences that the seeds alone do not explain."
    means, noise = mean_over_seeds(rows), seed_noise(rows)
    freedom = sum(len(v) - 1 for v in rows.values())
    others = [k for k in rows if k != base]
    out = {}
    for name in others:
        per_mean = 1 / len(rows[name]) + 1 / len(rows[base])
        limit = t.ppf(1 - 0.025 / len(others), freedom) if freedom else np.inf
        gap = (means.loc[name] - means.loc[base]).abs()
        out[name] = [m for m in measures if gap[m] > limit * noise[m] * per_mean**0.5]
    return out


def describe(
    rows: dict[str, list[dict]],  # By variant: the numbers of each seed
    base: str,  # The variant that the others are compared with
    measures: tuple[str, ...],  # Which numbers to compare
) -> str:  # A few lines
    "Seed noise and findings, for a terminal."
    seeds = min(map(len, rows.values()))
    if seeds < 2:
        return "One seed: no difference in this table is told from seed noise. Try --seeds 3."
    noise = ", ".join(f"{k} {v:.3g}" for k, v in seed_noise(rows)[list(measures)].items())
    lines = [
        f"Seed noise (standard deviation over {seeds} seeds, pooled over {len(rows)} variants):"
        f" {noise}."
    ]
    lines += [
        f"{k}:"
        f" {'differs from ' + base + ' in ' + ', '.join(v) if v else 'no difference from ' + base + ' beyond seed noise'}."
        for k, v in findings(rows, base, measures).items()
    ]
    return "\n".join(lines)
