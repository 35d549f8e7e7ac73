"""Latent diffusion for brain MRI: the names that most programs need, each loaded at its first use.

`import brainldm` loads neither torch nor any module of the package. All other names are reached
through the modules, as `from brainldm.training import loss_weight`."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors read; the table below says the same
    from .data import check_dataset as check_dataset
    from .data import open_dataset as open_dataset
    from .sampling import BrainLDM as BrainLDM
    from .scheduler import NoiseSchedule as NoiseSchedule
    from .scheduler import add_noise as add_noise
    from .scheduler import denoise as denoise
    from .training import train_autoencoder as train_autoencoder
    from .training import train_ldm as train_ldm
    from .unet import UNet as UNet
    from .vae import AutoencoderKL as AutoencoderKL
    from .vqgan import VQVAE as VQVAE
    from .advanced.audit import memorization_audit as memorization_audit
    from .advanced.prior import CodeSampler as CodeSampler
    from .advanced.volume import BrainVolumes as BrainVolumes
    from .engineering.configs import AEConfig as AEConfig
    from .engineering.configs import DataConfig as DataConfig
    from .engineering.configs import LDMConfig as LDMConfig
    from .engineering.configs import PRESETS as PRESETS
    from .engineering.configs import PhantomConfig as PhantomConfig
    from .engineering.phantom import make_cohort as make_cohort
    from .engineering.plotting import show_grid as show_grid
    from .engineering.report import evaluate as evaluate
    from .engineering.report import report as report

_MODULES = {
    "data": "check_dataset open_dataset",
    "sampling": "BrainLDM",
    "scheduler": "NoiseSchedule add_noise denoise",
    "training": "train_autoencoder train_ldm",
    "unet": "UNet",
    "vae": "AutoencoderKL",
    "vqgan": "VQVAE",
    "advanced.audit": "memorization_audit",
    "advanced.prior": "CodeSampler",
    "advanced.volume": "BrainVolumes",
    "engineering.configs": "AEConfig DataConfig LDMConfig PRESETS PhantomConfig",
    "engineering.phantom": "make_cohort",
    "engineering.plotting": "show_grid",
    "engineering.report": "evaluate report",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name):
    "Load a public name from its module, once (PEP 562)."
    if name not in _HOME:
        from difflib import get_close_matches

        lower = {n.lower(): n for n in __all__}
        near = [lower[n] for n in get_close_matches(name.lower(), lower, n=1)]
        raise AttributeError(
            f"brainldm: no name {name!r}. Expected one of {', '.join(__all__)}, or a name of one of"
            f" its modules. Try {f'brainldm.{near[0]}' if near else 'dir(brainldm)'}."
        )
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
