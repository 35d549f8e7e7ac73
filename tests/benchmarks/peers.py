"""The networks of this project beside those of MONAI and diffusers, of equal size, behind one
interface."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from timing import count
from torch import Tensor, nn

from brainldm.engineering.configs import CODE_PRESETS, PRESETS
from brainldm.engineering.covariates import Covariate
from brainldm.vae import kl_loss
from brainldm.unet import UNet
from brainldm.engineering.loop import seeded
from brainldm.engineering.stage1 import autoencoder_args, build_autoencoder
from brainldm.engineering.stage2 import unet_args

COVARIATES = (
    Covariate('slice', 'continuous', range=(0, 31)),
    Covariate('diagnosis', 'categorical', values=('AD', 'NC')),
)
TOLERANCE = 0.03  # Largest difference in parameters that counts as equal
# Channels that make a peer as large as our network of a preset, in the proportions of the peer's
# own examples
WIDTHS = {
    'MONAI AutoencoderKL': dict(tiny=(8, 16, 32, 44), laptop=(28, 48, 72), gpu=(56, 112, 224, 232)),
    'diffusers AutoencoderKL': dict(
        tiny=(4, 8, 16, 32), laptop=(24, 48, 48), gpu=(48, 88, 176, 184)
    ),
    'MONAI VQVAE': dict(tiny=(24, 24, 40), laptop=(64, 64, 120), gpu=(144, 144, 280)),
    'MONAI DiffusionModelUNet': dict(tiny=(40, 32), laptop=(64, 88, 120), gpu=(152, 304, 456)),
    'diffusers UNet2DConditionModel': dict(
        tiny=(40, 32), laptop=(64, 88, 120), gpu=(152, 304, 456)
    ),
}


@dataclass
class Side:
    "A network in a comparison, and how it is asked."

    net: nn.Module  # The network
    loss: Callable[[nn.Module, dict], Tensor]  # loss(net, batch): what training minimizes
    answer: Callable[[nn.Module, dict], Tensor]  # answer(net, batch): what it is for


def equal(
    name: str, preset: str, build: Callable[[tuple], nn.Module], num_params: int
) -> nn.Module:
    "A peer of equal size. Raises ValueError where `WIDTHS` no longer makes it one."
    net = seeded(0, lambda: build(WIDTHS[name][preset]))
    if abs(count(net) / num_params - 1) > TOLERANCE:
        raise ValueError(
            f'equal: {name} with channels {WIDTHS[name][preset]} has {count(net):,} parameters,'
            f' ours of preset {preset} has {num_params:,}. Expected at most {TOLERANCE:.0%} apart.'
            ' Change its entry in WIDTHS.'
        )
    return net


def our_autoencoder(preset: str, size: int, device: torch.device) -> Side:
    "The preset's KL autoencoder."
    config = PRESETS[preset][0]
    side = size // (config.patch * 2 ** (len(config.channels) - 1))

    def loss(net, batch):
        eps = torch.randn(len(batch['image']), config.latent_channels, side, side, device=device)
        recon, mu, logvar = net(batch['image'], None, eps)
        return F.l1_loss(recon.float(), batch['image']) + 1e-6 * kl_loss(mu.float(), logvar.float())

    return Side(
        seeded(0, lambda: build_autoencoder('kl', autoencoder_args(config))),
        loss,
        lambda net, batch: net(batch['image'])[0],
    )


def monai_autoencoder(preset: str, num_params: int) -> Side:
    """MONAI's AutoencoderKL with latents of the preset's shape, trained as its tutorial does: KL
    summed over the latents of an image."""
    from monai.networks.nets import AutoencoderKL

    config = PRESETS[preset][0]

    def build(c):
        return AutoencoderKL(
            2,
            1,
            1,
            config.num_res_blocks,
            c,
            (False,) * len(c),
            config.latent_channels,
            4,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )

    def loss(net, batch):
        recon, mu, sigma = net(batch['image'])
        mu, var = mu.float(), sigma.float().square()
        return (
            F.l1_loss(recon.float(), batch['image'])
            + 1e-6 * 0.5 * (mu.square() + var - var.log() - 1).sum((1, 2, 3)).mean()
        )

    return Side(
        equal('MONAI AutoencoderKL', preset, build, num_params),
        loss,
        lambda net, batch: net.reconstruct(batch['image']),
    )


def diffusers_autoencoder(preset: str, num_params: int) -> Side:
    "diffusers' AutoencoderKL with latents of the preset's shape."
    from diffusers import AutoencoderKL

    config = PRESETS[preset][0]

    def build(c):
        return AutoencoderKL(
            1,
            1,
            ('DownEncoderBlock2D',) * len(c),
            ('UpDecoderBlock2D',) * len(c),
            c,
            config.num_res_blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )

    def loss(net, batch):
        posterior = net.encode(batch['image']).latent_dist
        return (
            F.l1_loss(net.decode(posterior.sample()).sample.float(), batch['image'])
            + 1e-6 * posterior.kl().float().mean()
        )

    return Side(
        equal('diffusers AutoencoderKL', preset, build, num_params),
        loss,
        lambda net, batch: net(batch['image']).sample,
    )


def autoencoders(preset: str, size: int, device: torch.device) -> dict[str, Side]:
    "KL autoencoders with the same latents, ours first."
    ours = our_autoencoder(preset, size, device)
    return {
        'brainldm': ours,
        'MONAI AutoencoderKL': monai_autoencoder(preset, count(ours.net)),
        'diffusers AutoencoderKL': diffusers_autoencoder(preset, count(ours.net)),
    }


def vqvaes(preset: str, device: torch.device) -> dict[str, Side]:
    "Autoencoders with a codebook, ours first."
    from monai.networks.nets import VQVAE

    config = replace(CODE_PRESETS[preset], latent_channels=8)
    ours = seeded(0, lambda: build_autoencoder('vq', autoencoder_args(config)))

    def build(c):
        return VQVAE(
            2,
            1,
            1,
            c,
            config.num_res_blocks,
            c,
            ((2, 4, 1, 1),) * len(c),
            ((2, 4, 1, 1, 0),) * len(c),
            num_embeddings=config.num_embeddings,
            embedding_dim=config.latent_channels,
            ddp_sync=False,
        )

    def our_loss(net, batch):
        recon, _, price = net(
            batch['image'], None, torch.rand(config.num_embeddings, device=device)
        )
        return F.l1_loss(recon.float(), batch['image']) + price

    def monai_loss(net, batch):
        recon, price = net(batch['image'])
        return F.l1_loss(recon.float(), batch['image']) + price

    return {
        'brainldm': Side(ours, our_loss, lambda net, batch: net(batch['image'])[0]),
        'MONAI VQVAE': Side(
            equal('MONAI VQVAE', preset, build, count(ours)),
            monai_loss,
            lambda net, batch: net(batch['image'])[0],
        ),
    }


def denoiser(net: nn.Module, answer: Callable) -> Side:
    "A UNet, trained on a squared error."
    return Side(
        net, lambda net, batch: F.mse_loss(answer(net, batch).float(), batch['target']), answer
    )


def our_unet(preset: str) -> Side:
    "The preset's UNet, told slice and diagnosis."
    ae, config = PRESETS[preset]
    net = seeded(0, lambda: UNet(**unet_args(config, ae.latent_channels, COVARIATES)))
    return denoiser(
        net, lambda net, o: net(o['latent'], o['t'], {c.name: o[c.name] for c in COVARIATES})
    )


def monai_unet(preset: str, num_params: int) -> Side:
    "MONAI's DiffusionModelUNet with attention at the same levels, handed ready tokens."
    from monai.networks.nets import DiffusionModelUNet

    (ae, config), name = PRESETS[preset], 'MONAI DiffusionModelUNet'

    def build(c):
        return DiffusionModelUNet(
            2,
            ae.latent_channels,
            ae.latent_channels,
            config.num_res_blocks,
            c,
            config.attention_levels,
            4,
            num_head_channels=[o // config.num_heads for o in c],
            with_conditioning=True,
            cross_attention_dim=config.cond_channels,
            use_flash_attention=True,
        )

    return denoiser(
        equal(name, preset, build, num_params), lambda net, o: net(o['latent'], o['t'], o['tokens'])
    )


def diffusers_unet(preset: str, num_params: int) -> Side:
    "diffusers' UNet2DConditionModel with attention at the same levels, handed ready tokens."
    from diffusers import UNet2DConditionModel

    (ae, config), name = PRESETS[preset], 'diffusers UNet2DConditionModel'
    down = ['CrossAttnDownBlock2D' if o else 'DownBlock2D' for o in config.attention_levels]
    up = ['CrossAttnUpBlock2D' if o else 'UpBlock2D' for o in config.attention_levels[::-1]]

    def build(c):
        return UNet2DConditionModel(
            None,
            ae.latent_channels,
            ae.latent_channels,
            down_block_types=down,
            up_block_types=up,
            block_out_channels=c,
            layers_per_block=config.num_res_blocks,
            norm_num_groups=4,
            cross_attention_dim=config.cond_channels,
            attention_head_dim=config.num_heads,
        )

    return denoiser(
        equal(name, preset, build, num_params),
        lambda net, o: net(o['latent'], o['t'], o['tokens']).sample,
    )


def unets(preset: str) -> dict[str, Side]:
    "Conditional UNets, ours first."
    ours = our_unet(preset)
    return {
        'brainldm': ours,
        'MONAI DiffusionModelUNet': monai_unet(preset, count(ours.net)),
        'diffusers UNet2DConditionModel': diffusers_unet(preset, count(ours.net)),
    }


def images(n: int, size: int, device: torch.device) -> dict[str, Tensor]:
    "A batch of noise in the shape of images: no time depends on what is in them."
    return dict(
        image=torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0))
        .mul(2)
        .sub(1)
        .to(device)
    )


def latents(
    n: int, preset: str, device: torch.device, size: int | None = None
) -> dict[str, Tensor]:
    "A batch as the UNets take it."
    ae, config = PRESETS[preset]
    side, gen = (size or ae.data.size) // (
        ae.patch * 2 ** (len(ae.channels) - 1)
    ), torch.Generator().manual_seed(0)
    shape = (n, ae.latent_channels, side, side)
    batch = dict(
        latent=torch.randn(shape, generator=gen),
        target=torch.randn(shape, generator=gen),
        t=torch.randint(1000, (n,), generator=gen),
        slice=torch.rand(n, generator=gen),
        diagnosis=torch.randint(2, (n,), generator=gen),
        tokens=torch.randn(n, len(COVARIATES), config.cond_channels, generator=gen),
    )
    return {k: v.to(device) for k, v in batch.items()}
