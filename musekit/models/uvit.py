"""The U-ViT: convolutions around a transformer, conditioned on text and a pooled vector."""
import torch
import torch.nn.functional as F
from torch import nn

from .checkpoints import PretrainedModel
from .layers import (
    AdaLNModulation, Attention, GLU, GlobalResponseNorm, PointwiseConv, conv_channels_last, make_norm, sinusoidal_code,
)


class _Norm(nn.Module):
    "Holds a norm one level deeper, where published checkpoints keep it."
    def __init__(self, norm):
        super().__init__()
        self.norm = norm
    def forward(self, x):
        return self.norm(x)


class TokenEmbedding(nn.Module):
    def __init__(self, vocab_size, dim, out_dim, norm, use_bias):
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, dim)
        self.layer_norm = norm(dim)
        self.conv = PointwiseConv(dim, out_dim, bias=use_bias)
    def forward(self, input_ids, grid):
        return self.conv(self.layer_norm(self.embeddings(input_ids))).unflatten(1, grid)


class ResBlock(nn.Module):
    def __init__(self, dim, cond_dim, norm, use_bias, dropout):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=use_bias)
        self.norm = _Norm(norm(dim))
        self.channelwise = nn.Sequential(
            nn.Linear(dim, 4 * dim, bias=use_bias), nn.GELU(), GlobalResponseNorm(4 * dim), nn.Dropout(dropout),
            nn.Linear(4 * dim, dim, bias=use_bias),
        )
        self.adaLN_modulation = AdaLNModulation(cond_dim, dim, use_bias)
    def forward(self, x, cond):
        x = x + self.channelwise(self.norm(conv_channels_last(self.depthwise, x)))
        return self.adaLN_modulation(x, cond)


class AttentionBlock(nn.Module):
    def __init__(self, dim, num_heads, text_dim, norm, use_bias, dropout):
        super().__init__()
        if dim != text_dim:
            self.kv_mapper = nn.Linear(text_dim, dim, bias=use_bias)
        self.attn_layer_norm = norm(dim)
        self.attention = Attention(dim, num_heads, use_bias=use_bias, dropout=dropout)
        self.crossattn_layer_norm = norm(dim)
        self.crossattention = Attention(dim, num_heads, use_bias=use_bias, dropout=dropout)
    def forward(self, x, text, text_mask=None):
        grid, x = x.shape[1:3], x.flatten(1, 2)
        if hasattr(self, "kv_mapper"):
            text = self.kv_mapper(F.silu(text))
        x = x + self.attention(self.attn_layer_norm(x), text, text_mask)
        x = x + self.crossattention(self.crossattn_layer_norm(x), text, text_mask)
        return x.unflatten(1, grid)


class Stage(nn.Module):
    "Pairs of residual and attention blocks, with an optional 2x change of resolution before or after."
    def __init__(self, dim, num_blocks, res_block, attention_block, downsample=None, upsample=None):
        super().__init__()
        if downsample is not None:
            self.downsample = downsample
        self.res_blocks = nn.ModuleList(res_block() for _ in range(num_blocks))
        self.attention_blocks = nn.ModuleList(attention_block() for _ in range(num_blocks))
        if upsample is not None:
            self.upsample = upsample
    def forward(self, x, cond, text, text_mask=None):
        if hasattr(self, "downsample"):
            x = _resample(self.downsample, x)
        for res_block, attention_block in zip(self.res_blocks, self.attention_blocks):
            x = attention_block(res_block(x, cond), text, text_mask)
        return _resample(self.upsample, x) if hasattr(self, "upsample") else x


def _resample(modules, x):
    norm, conv = modules
    return conv_channels_last(conv, norm(x))


class TransformerLayer(nn.Module):
    def __init__(self, dim, num_heads, intermediate, norm, use_bias, hidden_dropout, attention_dropout, eps, affine):
        super().__init__()
        self.attn_layer_norm = norm(dim)
        self.self_attn_adaLN_modulation = AdaLNModulation(dim, dim, use_bias)
        self.attention = Attention(dim, num_heads, use_bias=use_bias, dropout=attention_dropout)
        self.crossattn_layer_norm = norm(dim)
        self.crossattention = Attention(dim, num_heads, use_bias=use_bias, dropout=attention_dropout)
        self.cross_attn_adaLN_modulation = AdaLNModulation(dim, dim, use_bias)
        self.ffn = GLU(dim, intermediate, hidden_dropout, eps, use_bias, affine, cond_dim=dim)
    def forward(self, x, cond, text, text_mask=None):
        x = x + self.attention(self.self_attn_adaLN_modulation(self.attn_layer_norm(x), cond))
        normed = self.cross_attn_adaLN_modulation(self.crossattn_layer_norm(x), cond)
        x = x + self.crossattention(normed, text, text_mask)
        return x + self.ffn(x, cond)


class TokenHead(nn.Module):
    def __init__(self, dim, in_channels, codebook_size, norm, use_bias):
        super().__init__()
        self.conv1 = PointwiseConv(dim, in_channels, bias=use_bias)
        self.layer_norm = _Norm(norm(in_channels))
        self.conv2 = PointwiseConv(in_channels, codebook_size, bias=use_bias)
    def forward(self, x):
        return self.conv2(self.layer_norm(self.conv1(x)))


class MaskGiTUViT(PretrainedModel):
    ignored_config = {"mask_token_id"}
    class_aliases = ("MaskGiTUViT_v2",)

    def __init__(
        self, vocab_size=8256, codebook_size=8192, hidden_size=1024, in_channels=768, block_out_channels=(768,),
        num_res_blocks=3, force_down_up_sample=False, block_num_heads=12, num_hidden_layers=22, num_attention_heads=16,
        intermediate_size=2816, encoder_hidden_size=768, cond_embed_dim=768, micro_cond_encode_dim=256,
        micro_cond_embed_dim=1280, norm_type="rmsnorm", layer_norm_eps=1e-6, ln_elementwise_affine=True, use_bias=False,
        hidden_dropout=0.0, attention_dropout=0.0, add_cond_embeds=True, add_micro_cond_embeds=True,
    ):
        super().__init__()
        C, D = block_out_channels[0], hidden_size
        def norm(dim): return make_norm(norm_type, dim, layer_norm_eps, use_bias, ln_elementwise_affine)
        def res_block(): return ResBlock(C, D, norm, use_bias, hidden_dropout)
        def attention_block(): return AttentionBlock(C, block_num_heads, D, norm, use_bias, attention_dropout)
        def resample(conv):
            return nn.Sequential(_Norm(norm(C)), conv(C, C, 2, stride=2, bias=use_bias)) if force_down_up_sample else None
        self.encoder_proj = nn.Linear(encoder_hidden_size, D, bias=use_bias)
        self.encoder_proj_layer_norm = norm(D)
        self.embed = TokenEmbedding(vocab_size, in_channels, C, norm, use_bias)
        cond_dim = cond_embed_dim * add_cond_embeds + micro_cond_embed_dim * add_micro_cond_embeds
        self.cond_embed = nn.Sequential(nn.Linear(cond_dim, D, bias=use_bias), nn.SiLU(), nn.Linear(D, D, bias=use_bias))
        self.down_blocks = nn.ModuleList([Stage(C, num_res_blocks, res_block, attention_block, downsample=resample(nn.Conv2d))])
        self.project_to_hidden_norm = norm(C)
        self.project_to_hidden = nn.Linear(C, D, bias=use_bias)
        self.transformer_layers = nn.ModuleList(
            TransformerLayer(D, num_attention_heads, intermediate_size, norm, use_bias, hidden_dropout, attention_dropout,
                             layer_norm_eps, ln_elementwise_affine) for _ in range(num_hidden_layers))
        self.project_from_hidden_norm = norm(D)
        self.project_from_hidden = nn.Linear(D, C, bias=use_bias)
        self.up_blocks = nn.ModuleList([Stage(C, num_res_blocks, res_block, attention_block, upsample=resample(nn.ConvTranspose2d))])
        self.mlm_layer = TokenHead(C, in_channels, codebook_size, norm, use_bias)
        self._init_weights()

    def _init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, AdaLNModulation):
                nn.init.zeros_(module.mapper.weight)
        embeddings = self.embed.embeddings.weight
        nn.init.xavier_uniform_(self.embed.conv.weight, 0.02)
        nn.init.normal_(embeddings, std=self.config.vocab_size ** -0.5)
        nn.init.zeros_(self.mlm_layer.conv1.weight)
        with torch.no_grad():
            self.mlm_layer.conv2.weight.copy_(embeddings[: self.config.codebook_size, :, None, None])

    def condition(self, cond_embeds, micro_conds):
        parts = []
        if self.config.add_cond_embeds:
            parts.append(cond_embeds)
        if self.config.add_micro_cond_embeds:
            parts.append(sinusoidal_code(micro_conds, self.config.micro_cond_encode_dim))
        dtype = self.cond_embed[0].weight.dtype
        return self.cond_embed(torch.cat([p.to(dtype) for p in parts], -1))

    def forward(self, input_ids, encoder_hidden_states, cond_embeds=None, micro_conds=None, *, token_mask=None, grid=None,
                encoder_attention_mask=None):
        grid = grid or _square(input_ids.shape[1])
        text = self.encoder_proj_layer_norm(self.encoder_proj(encoder_hidden_states))
        text_mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None]
        cond = self.condition(cond_embeds, micro_conds)
        x = self.down_blocks[0](self.embed(input_ids, grid), cond, text, text_mask)
        inner, x = x.shape[1:3], self.project_to_hidden(self.project_to_hidden_norm(x)).flatten(1, 2)
        for layer in self.transformer_layers:
            x = layer(x, cond, text, text_mask)
        x = self.project_from_hidden(self.project_from_hidden_norm(x)).unflatten(1, inner)
        x = self.up_blocks[0](x, cond, text, text_mask).flatten(1, 2)
        return self.mlm_layer(x if token_mask is None else x[token_mask])


def _square(num_tokens):
    side = round(num_tokens ** 0.5)
    if side * side != num_tokens:
        raise ValueError(f"{num_tokens} tokens are no square; pass grid=(height, width).")
    return side, side
