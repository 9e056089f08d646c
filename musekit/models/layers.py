"""The parts that both transformers share. Image tensors are channels-last, (B, H, W, C), everywhere."""
import math

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; the bias is there only if asked for."""

    def __init__(self, dim, eps=1e-6, use_bias=False, elementwise_affine=True):
        super().__init__()
        self.dim, self.eps = (dim,), eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if elementwise_affine and use_bias else None

    def forward(self, x):
        return F.layer_norm(x, self.dim, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019, eq. 4), computed in float32."""

    def __init__(self, dim, eps=1e-6, elementwise_affine=True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None

    def forward(self, x):
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return y if self.weight is None else y * self.weight


def make_norm(norm_type, dim, eps=1e-6, use_bias=False, elementwise_affine=True):
    if norm_type == "rmsnorm":
        return RMSNorm(dim, eps, elementwise_affine)
    if norm_type == "layernorm":
        return LayerNorm(dim, eps, use_bias, elementwise_affine)
    raise ValueError(f"norm_type {norm_type!r} is unknown; choose 'layernorm' or 'rmsnorm'.")


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution over channels-last tensors of any shape (..., C): one matrix product."""

    def __init__(self, in_channels, out_channels, bias=True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x):
        return F.linear(x, self.weight.flatten(1), self.bias)


def conv_channels_last(conv, x):
    """Applies a convolution module to (B, H, W, C)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class AdaLNModulation(nn.Module):
    """Scale and shift by a condition vector (Peebles & Xie 2023, section 3.2). Starts as the identity."""

    def __init__(self, cond_dim, dim, use_bias=False):
        super().__init__()
        self.mapper = nn.Linear(cond_dim, 2 * dim, bias=use_bias)

    def forward(self, x, cond):
        scale, shift = self.mapper(F.silu(cond)).unflatten(0, (-1,) + (1,) * (x.ndim - 2)).chunk(2, -1)
        return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """Multi-head attention from x (B, N, dim) to a context (B, M, context_dim), through PyTorch's SDPA."""

    def __init__(self, dim, num_heads, context_dim=None, use_bias=False, dropout=0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not split into {num_heads} heads; choose a divisor of {dim}.")
        context_dim = context_dim or dim
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim, bias=use_bias)
        self.key = nn.Linear(context_dim, dim, bias=use_bias)
        self.value = nn.Linear(context_dim, dim, bias=use_bias)
        self.out = nn.Linear(dim, dim, bias=use_bias)

    def forward(self, x, context=None, attention_mask=None):
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.query(x), self.key(context), self.value(context))
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))


class GLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, GEGLU) with its norm in front."""

    def __init__(self, dim, hidden, dropout=0.0, eps=1e-6, use_bias=False, elementwise_affine=True, cond_dim=None):
        super().__init__()
        self.pre_mlp_layer_norm = LayerNorm(dim, eps, use_bias, elementwise_affine)
        self.adaLN_modulation = AdaLNModulation(cond_dim, dim, use_bias) if cond_dim else None
        self.wi_0 = nn.Linear(dim, hidden, bias=use_bias)
        self.wi_1 = nn.Linear(dim, hidden, bias=use_bias)
        self.dropout = nn.Dropout(dropout)
        self.wo = nn.Linear(hidden, dim, bias=use_bias)

    def forward(self, x, cond=None):
        x = self.pre_mlp_layer_norm(x)
        if self.adaLN_modulation is not None:
            x = self.adaLN_modulation(x, cond)
        return self.wo(self.dropout(F.gelu(self.wi_0(x)) * self.wi_1(x)))


class GlobalResponseNorm(nn.Module):
    """Lets channels compete by their energy over the whole image (Woo 2023, ConvNeXt V2, section 3)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):
        energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        relative = energy / (energy.mean(-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta, x, 1 + self.gamma * relative)


def sinusoidal_code(values, dim, max_period=10_000):
    """(B, K) values -> (B, K * dim): cosines, then sines, in float32 (Vaswani 2017, section 3.5)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=values.device))
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).flatten(1)
