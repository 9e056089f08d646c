"""The VQGAN tokenizer and its codebook."""
import torch
import torch.nn.functional as F
from torch import nn

from .checkpoints import PretrainedModel


class VectorQuantizer(nn.Module):
    """Nearest-neighbour codebook (van den Oord 2017)."""
    def __init__(self, num_embeddings, dim, commitment_cost=0.25):
        super().__init__()
        self.commitment_cost = commitment_cost
        self.embedding = nn.Embedding(num_embeddings, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_embeddings, 1 / num_embeddings)

    def distances(self, z):
        flat, codes = z.permute(0, 2, 3, 1).flatten(0, 2), self.embedding.weight
        return torch.addmm(flat.square().sum(1, keepdim=True) + codes.square().sum(1), flat, codes.T, alpha=-2)

    def forward(self, z):
        ids = self.distances(z).argmin(1).view(z.shape[0], -1)
        codes = self.lookup(ids, z.shape[-2:])
        loss = F.mse_loss(codes, z.detach()) + self.commitment_cost * F.mse_loss(z, codes.detach())
        return z + (codes - z).detach(), ids, loss

    def lookup(self, ids, grid):
        return self.embedding(ids).unflatten(1, tuple(grid)).permute(0, 3, 1, 2)


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels, dropout=0.0):
        super().__init__()
        self.norm1, self.conv1 = group_norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.dropout = group_norm(out_channels), nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels, with_conv=True):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "conv") else F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    def __init__(self, channels, with_conv=True):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class Level(nn.Module):
    def __init__(self, in_channels, out_channels, num_blocks, attention, dropout):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, dropout) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(num_blocks if attention else 0))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels, attention, dropout):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, dropout)
        self.attn_1 = AttentionBlock(channels) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, dropout)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths = [c.hidden_channels * m for m in c.channel_mult]
        self.conv_in = nn.Conv2d(c.num_channels, c.hidden_channels, 3, padding=1)
        self.down, width, last = nn.ModuleList(), c.hidden_channels, len(widths) - 1
        for i, out in enumerate(widths):
            level = Level(width, out, c.num_res_blocks, c.resolution >> i in c.attn_resolutions, c.dropout)
            if i < last:
                level.downsample = Downsample(out, c.resample_with_conv)
            self.down.append(level)
            width = out
        self.mid = Middle(width, not c.no_attn_mid_block, c.dropout)
        self.norm_out, self.conv_out = group_norm(width), nn.Conv2d(width, c.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths = [c.hidden_channels * m for m in c.channel_mult]
        width = widths[-1]
        self.conv_in = nn.Conv2d(c.z_channels, width, 3, padding=1)
        self.mid = Middle(width, not c.no_attn_mid_block, c.dropout)
        self.up = nn.ModuleList()
        for i, out in reversed(list(enumerate(widths))):
            level = Level(width, out, c.num_res_blocks + 1, c.resolution >> i in c.attn_resolutions, c.dropout)
            if i > 0:
                level.upsample = Upsample(out, c.resample_with_conv)
            self.up.insert(0, level)
            width = out
        self.norm_out, self.conv_out = group_norm(width), nn.Conv2d(width, c.num_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGANModel(PretrainedModel):
    def __init__(
        self, resolution=256, num_channels=3, hidden_channels=128, channel_mult=(1, 1, 2, 2, 4), num_res_blocks=2,
        attn_resolutions=(16,), no_attn_mid_block=False, z_channels=256, num_embeddings=1024, quantized_embed_dim=256,
        dropout=0.0, resample_with_conv=True, commitment_cost=0.25,
    ):
        super().__init__()
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)
        self.quantize = VectorQuantizer(num_embeddings, quantized_embed_dim, commitment_cost)
        self.quant_conv = nn.Conv2d(z_channels, quantized_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(quantized_embed_dim, z_channels, 1)

    @property
    def downsample_factor(self):
        return 2 ** (len(self.config.channel_mult) - 1)

    def latents(self, pixel_values):
        return self.quant_conv(self.encoder(pixel_values))

    def encode(self, pixel_values, return_loss=False):
        quantized, ids, loss = self.quantize(self.latents(pixel_values))
        return (quantized, ids, loss) if return_loss else (quantized, ids)

    def get_code(self, pixel_values):
        return self.encode(pixel_values)[1]

    def get_soft_code(self, pixel_values, temp=1.0, stochastic=False):
        distances = self.quantize.distances(self.latents(pixel_values))
        soft = F.softmax(-distances / temp, -1)
        ids = torch.multinomial(soft, 1)[:, 0] if stochastic else distances.argmin(-1)
        return soft.unflatten(0, (len(pixel_values), -1)), ids.unflatten(0, (len(pixel_values), -1))

    def decode(self, quantized):
        return self.decoder(self.post_quant_conv(quantized))

    def decode_code(self, ids, grid=None):
        side = round(ids.shape[1] ** 0.5)
        return self.decode(self.quantize.lookup(ids, grid or (side, side)))

    def forward(self, pixel_values, return_loss=False):
        quantized, ids, loss = self.encode(pixel_values, return_loss=True)
        images = self.decode(quantized)
        return (images, loss) if return_loss else images
