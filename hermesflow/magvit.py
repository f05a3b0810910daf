"""MAGVIT-v2, the image tokenizer: pixels <-> codes.

Parameter names are those of the published `showlab/magvitv2`.

Shapes in comments: B images, c channels, h × w positions of a feature map, N = h·w codes of the
coarsest one.
"""

import json
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from hermesflow.checkpoints import check_fields, read_config, refuse
from hermesflow.files import InputError, atomic
from hermesflow.weights import full_precision, load_checkpoint


@dataclass
class MagvitConfig:
    """Defaults are `showlab/magvitv2`: 16 px per token, 2^13 codes, 95.4 M parameters."""

    ch: int = 128
    bits: int = 13
    encoder_mult: tuple = (1, 2, 2, 4, 4)
    encoder_blocks: tuple = (4, 3, 4, 3, 4)
    decoder_mult: tuple = (1, 1, 2, 2, 4)
    decoder_blocks: tuple = (4, 4, 3, 4, 3)


NUMBERS = {"ch": (int, 2**14), "bits": (int, 24)}
LISTS = {"encoder_mult": 1, "encoder_blocks": 0, "decoder_mult": 1, "decoder_blocks": 0}  # at least
GROUPS = 32  # of channels, in every normalisation


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return h + x


class PixelAttention(nn.Module):
    """Single-head attention over all positions of the coarsest map."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        n = self.norm(x)
        q, k, v = (f(n).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, h*w, c)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).view_as(x))


class Level(nn.Module):
    """Residual blocks at one resolution, and the step to the next one."""

    def __init__(self, c_in, c_out, blocks, step=None):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.block = nn.ModuleList(ResBlock(widths[i], c_out) for i in range(blocks))
        if step == "downsample":
            self.downsample = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, stride=2)})
        if step == "upsample":
            self.upsample = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, padding=1)})

    def forward(self, x):
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):  # the border is padded at the right and the bottom only
            x = self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            x = self.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1 = ResBlock(c, c)
        self.attn_1 = PixelAttention(c)
        self.block_2 = ResBlock(c, c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, config: MagvitConfig):
        super().__init__()
        widths = [config.ch * m for m in config.encoder_mult]
        inputs = [config.ch, *widths]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out, blocks) in enumerate(zip(inputs, widths, config.encoder_blocks)):
            step = "downsample" if i < last else None
            self.down.append(Level(c_in, c_out, blocks, step))
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.bits, config.bits, 1)

    def forward(self, x):  # (B, 3, H, W) -> (B, bits, H/16, W/16), before the sign
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    def __init__(self, config: MagvitConfig):
        super().__init__()
        widths = [config.ch * m for m in config.decoder_mult]
        inputs = [*widths[1:], widths[-1]]
        self.post_quant_conv = nn.Conv2d(config.bits, config.bits, 1)
        self.conv_in = nn.Conv2d(config.bits, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, (c_in, c_out, blocks) in enumerate(zip(inputs, widths, config.decoder_blocks)):
            step = "upsample" if i > 0 else None
            self.up.append(Level(c_in, c_out, blocks, step))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, bits):  # (B, bits, h, w) of ±1 -> (B, 3, 16h, 16w)
        x = self.mid(self.conv_in(self.post_quant_conv(bits)))
        for level in reversed(self.up):  # the coarsest level has the highest number
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Magvit(nn.Module):
    """MAGVIT-v2 with lookup-free quantisation.

    A code is the signs of `bits` channels, most significant first.
    """

    def __init__(self, config: MagvitConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        powers = 2 ** torch.arange(config.bits - 1, -1, -1)
        bits = (torch.arange(2**config.bits)[:, None] & powers) > 0  # (C, bits)
        self.quantize = nn.Module()
        self.quantize.register_buffer("embedding", bits.float() * 2 - 1)
        self.quantize.register_buffer("power_vals", powers)

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.config.encoder_mult) - 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N) codes, row by row."""
        bits = self.encoder(pixels.to(self.encoder.conv_in.weight.dtype)) > 0
        return (bits.flatten(2).transpose(1, 2) * self.quantize.power_vals).sum(-1)

    def decode(self, codes: torch.Tensor, height: int | None = None) -> torch.Tensor:
        """(B, N) codes -> (B, 3, H, W) pixels, about [-1, 1]; `height` in tokens [a square]."""
        height = height or math.isqrt(codes.shape[1])
        bits = self.quantize.embedding[codes].to(self.decoder.conv_in.weight.dtype)  # (B, N, bits)
        return self.decoder(bits.transpose(1, 2).unflatten(2, (height, -1)))


def magvit_config(folder) -> MagvitConfig:
    """The sizes in a folder or hub repository. Raises InputError naming the field that is wrong."""
    values = asdict(MagvitConfig())
    values |= {name: value for name, value in read_config(folder).items() if name in values}
    where = f"{folder}/config.json"
    check_fields(values, NUMBERS, where)
    if values["ch"] % GROUPS:
        refuse(where, "ch", f"a multiple of {GROUPS}", values["ch"])
    for name, least in LISTS.items():
        value = values[name]
        listed = isinstance(value, (list, tuple)) and len(value) > 0
        if not listed or not all(type(n) is int and least <= n <= 64 for n in value):
            refuse(where, name, f"a list of whole numbers from {least} to 64", value)
    lengths = {name: len(values[name]) for name in LISTS}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"'{name}' {length}" for name, length in lengths.items())
        raise InputError(f"{where}: fields of one number per level have different lengths: {found}")
    return MagvitConfig(**values)


def load_magvit(folder) -> Magvit:
    """The frozen image tokenizer of a folder or hub repository."""
    config = magvit_config(folder)
    with torch.device("meta"):
        vq = Magvit(config)
    load_checkpoint(vq, folder)
    return vq.eval().requires_grad_(False)


def save_magvit(vq: Magvit, folder) -> None:
    """Write config.json and the weights, in float32."""
    with atomic(folder) as temporary:
        temporary.mkdir()
        text = json.dumps(asdict(vq.config), indent=1) + "\n"
        (temporary / "config.json").write_text(text)
        weights = full_precision(vq.state_dict())
        save_file(weights, temporary / "pytorch_model.safetensors", {"format": "pt"})
