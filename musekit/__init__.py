"""A research kit for masked generative transformers."""
__version__ = "0.1.0"

_MODULES = {  # names of each module that `musekit` offers; the module is imported when one is first used
    "inference.pipeline": ["Pipeline", "ImagePipeline", "TokenPipeline"],
    "recipes.configure": ["configure"],
    "recipes.text_to_image": ["train"],
    "training.config": ["load_config"],
    "training.trainer": ["Trainer"],
    "evaluation.evaluate": ["evaluate_pipeline"],
    "models.transformer": ["MaskGitTransformer"],
    "models.uvit": ["MaskGiTUViT"],
    "models.text_transformer": ["TextTransformer"],
    "models.vqgan": ["VQGANModel"],
    "models.maskgit_vqgan": ["MaskGitVQGAN"],
    "models.movq": ["MOVQ"],
    "models.paella_vq": ["PaellaVQModel"],
    "models.text_encoders": ["TextEncoder", "ClassEncoder", "NoEncoder"],
    "core.guidance": ["GenerationConfig", "generate_guided"],
    "core.masking": ["MaskingConfig", "mask_tokens"],
    "core.decoding": ["generate_ids"],
    "core.samplers": [
        "SamplerState", "sampler_names", "get_sampler", "register_sampler", "confidence_order", "random_order",
        "entropy_order", "left_to_right", "halton_order", "entropy_bounded", "confidence_threshold",
        "first_hitting", "remasking",
    ],
    "core.schedules": [
        "schedule_names", "get_schedule", "register_schedule", "cosine", "arccos", "linear", "power", "sigmoid",
    ],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str):
    import sys
    from importlib import import_module, util

    from musekit.utils.validation import did_you_mean

    if name in _HOMES:
        return getattr(import_module(f"musekit.{_HOMES[name]}"), name)
    hint = did_you_mean(name, _HOMES)
    # `from musekit import NAME` replaces an AttributeError by its own error, which has no hint
    imported = sys._getframe(1).f_code.co_name == "_handle_fromlist"
    if imported and not name.startswith("_") and util.find_spec(f"musekit.{name}") is None:
        raise ImportError(f"cannot import name {name!r} from 'musekit'.{hint}")
    raise AttributeError(f"module 'musekit' has no attribute {name!r}.{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
