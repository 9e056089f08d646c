"""Small untrained models."""
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from musekit.models.paella_vq import PaellaVQModel
from musekit.models.text_encoders import TextEncoder
from musekit.models.transformer import MaskGitTransformer
from musekit.models.uvit import MaskGiTUViT
from musekit.recipes.clip import train_clip_bpe


def small_transformers(side, num_layers):
    """Builders of a U-ViT, one with biases, and plain transformers of texts and of classes, by name; for
    images of side x side tokens, and as many codes."""
    codes = side**2
    sizes = dict(
        vocab_size=codes + 1,
        codebook_size=codes,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=48,
        encoder_hidden_size=12,
    )
    uvit = dict(
        **sizes,
        in_channels=16,
        block_out_channels=(16,),
        num_res_blocks=1,
        block_num_heads=2,
        cond_embed_dim=12,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        default_shape=(side, side),
    )
    plain = dict(
        **sizes,
        num_vq_tokens=codes,
        max_position_embeddings=codes + 1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    of_classes = {**plain, "vocab_size": codes + 11, "num_classes": 10}
    return {
        "uvit": lambda **changes: MaskGiTUViT(**uvit, **changes),
        "uvit with biases": lambda **changes: MaskGiTUViT(
            **uvit, use_bias=True, norm_type="layernorm", **changes
        ),
        "text": lambda: MaskGitTransformer(
            **plain, add_cross_attention=True, project_encoder_hidden_states=True
        ),
        "class": lambda: MaskGitTransformer(**of_classes),
    }


def random_clip(words, hidden_size=16, projection_dim=16):
    """A text encoder with random weights, for the prompts of a tokenizer of `train_clip_bpe`."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        max_position_embeddings=words.model_max_length,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection_dim,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return TextEncoder(CLIPTextModelWithProjection(config), words, use_pooled=True)


def save_frozen_networks(folder, captions=("a red seven", "a green two"), max_seq_length=12, **sizes):
    """A tokenizer of 32 codes in `vq`, a text encoder in `clip`, both with random weights."""
    torch.manual_seed(0)
    sizes_of_vq = dict(c_hidden=16, c_latent=4, bottleneck_blocks=1, codebook_size=32, scale_factor=1.0)
    PaellaVQModel(levels=2, **sizes_of_vq).save_pretrained(folder / "vq")
    random_clip(train_clip_bpe(list(captions), 600, max_seq_length), **sizes).save_pretrained(folder / "clip")
