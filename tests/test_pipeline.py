"""Pipelines as scripts use them: outputs, edits, samplers, saved settings, and pictures that are made
again from themselves."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from musekit.utils import progress
from musekit.cli import main
from musekit.recipes.clip import train_clip_bpe
from musekit.data.masks import token_mask
from musekit.models.lora import add_lora, lora_parameters, save_lora
from musekit.core.guidance import GenerationConfig
from musekit.models.pretrained import find_model_class
from musekit.models.transformer import MaskGitTransformer
from musekit.models.uvit import MaskGiTUViT
from musekit.models.vqgan import VQGANModel
from musekit.inference.pipeline import OUTPUT_TYPES, ImagePipeline, Pipeline
from musekit.core.samplers import sampler_names
from musekit.inference.sheets import GenerationTask, draw_again, draw_sheet, read_task, write_sheet
from small_models import random_clip

PROMPTS = ["a red three on white paper", "two"]
UVIT = dict(
    hidden_size=16,
    in_channels=8,
    block_out_channels=(8,),
    block_num_heads=2,
    num_res_blocks=1,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    micro_cond_encode_dim=4,
    micro_cond_embed_dim=20,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A pipeline of random weights, 8 x 8 tokens of 2 x 2 pixels, saved."
    torch.manual_seed(0)
    words = train_clip_bpe(PROMPTS * 4, vocab_size=530, max_seq_length=12)
    text = random_clip(words, projection_dim=12)
    uvit = MaskGiTUViT(33, 32, encoder_hidden_size=16, cond_embed_dim=12, default_shape=(8, 8), **UVIT)
    for parameter in uvit.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    vq_model = VQGANModel(16, 3, 32, (1, 1), 1, (), z_channels=8, quantized_embed_dim=8, num_embeddings=32)
    folder = tmp_path_factory.mktemp("pipelines") / "random"
    settings = GenerationConfig(steps=4, sampler="halton", guidance_interval=(0.25, 1.0))
    Pipeline(uvit, vq_model, text, generation=settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return Pipeline.from_pretrained(folder)


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def test_sampler_and_interval_are_kept_in_the_folder(folder, pipeline):
    written = json.loads((folder / "pipeline.json").read_text())["generation"]
    assert (written["sampler"], written["guidance_interval"]) == ("halton", [0.25, 1.0])
    assert pipeline.generation == GenerationConfig(steps=4, sampler="halton", guidance_interval=(0.25, 1.0))


@pytest.mark.parametrize("sampler", sampler_names())
def test_every_sampler_draws_the_same_for_any_batch_size(pipeline, sampler):
    many = PROMPTS * 5  # more than one batch holds
    drawn = pipeline(many, seed=3, sampler=sampler, num_images_per_prompt=2, output_type="ids")
    assert drawn.shape == (20, 8, 8) and len(drawn.flatten(1).unique(dim=0)) == 20
    for batch_size in (1, 7):
        assert torch.equal(
            drawn,
            pipeline(
                many,
                seed=3,
                sampler=sampler,
                num_images_per_prompt=2,
                output_type="ids",
                batch_size=batch_size,
            ),
        )
    assert not torch.equal(
        drawn, pipeline(many, seed=4, sampler=sampler, num_images_per_prompt=2, output_type="ids")
    )


def test_pictures_numbers_tensors_and_tokens_are_one_thing(pipeline):
    kinds = {kind: pipeline(PROMPTS, seed=1, output_type=kind, return_steps=True) for kind in OUTPUT_TYPES}
    images, steps = kinds["pil"]
    assert (
        np.array_equal(kinds["numpy"][0], pixels(images).astype(np.float32) / 255)
        and kinds["numpy"][0].dtype == np.float32
    )
    assert np.array_equal(kinds["tensor"][0].permute(0, 2, 3, 1).numpy(), kinds["numpy"][0])
    assert np.array_equal(pixels(pipeline.decode(kinds["ids"][0].flatten(1))), pixels(images))
    assert {len(shown) for _, shown in kinds.values()} == {4}
    hidden = [int((grid == pipeline.mask_token_id).sum()) for grid in kinds["ids"][1]]
    assert hidden[-1] == 0 and hidden == sorted(hidden, reverse=True) and hidden[0] > 64
    with pytest.raises(ValueError, match="pil, numpy, tensor, ids"):
        pipeline("two", output_type="png")


def test_a_callback_sees_every_step(pipeline):
    seen = []
    pipeline(
        "two", seed=0, steps=3, callback=lambda step, record: seen.append((step, tuple(record["ids"].shape)))
    )
    assert seen == [(0, (1, 64)), (1, (1, 64)), (2, (1, 64))]


def test_edits_change_what_they_say_and_nothing_else(pipeline):
    image, = pipeline(PROMPTS[0], seed=0)
    hole = np.zeros((16, 16), bool)
    hole[4:9, 6:12] = True
    for kind in ("pil", "numpy"):
        painted = pipeline.inpaint(image, hole, PROMPTS, seed=1, num_images_per_prompt=2, output_type=kind)
        painted = pixels(painted) if kind == "pil" else (painted * 255).round().astype(np.uint8)
        assert painted.shape == (4, 16, 16, 3) and (painted[:, ~hole] == np.asarray(image)[~hole]).all()
    larger, = pipeline.outpaint(image, (3, 0, 5, 8), PROMPTS[1], seed=2)
    assert larger.size == (24, 24) and np.array_equal(np.asarray(larger)[:16, 3:19], np.asarray(image))
    ids, _ = pipeline.encode(image)
    varied = pipeline.vary(image, 0.25, PROMPTS, seed=3, num_images_per_prompt=2, output_type="ids").flatten(
        1
    )
    assert varied.shape == (4, 64) and ((varied != ids).sum(1) <= 16).all() and (varied != ids).any()
    embedded = pipeline.text_encoder(PROMPTS[1:])
    again = pipeline.vary(image, 0.25, conditions=embedded, seed=3, output_type="ids")
    assert torch.equal(again, pipeline.vary(image, 0.25, PROMPTS[1], seed=3, output_type="ids"))
    with pytest.raises(ValueError, match="4 whole numbers"):
        pipeline.outpaint(image, (0, -1, 0, 0), "two")


@pytest.mark.parametrize("kind", ("halving", "patches"))
def test_pictures_of_any_size_are_edited_by_models_that_take_even_grids_only(pipeline, kind):
    torch.manual_seed(0)
    if kind == "halving":
        model = MaskGiTUViT(
            33,
            32,
            encoder_hidden_size=16,
            cond_embed_dim=12,
            default_shape=(8, 8),
            force_down_up_sample=True,
            **UVIT,
        )
    else:
        model = MaskGitTransformer(
            33,
            16,
            None,
            1,
            2,
            32,
            codebook_size=32,
            num_vq_tokens=64,
            add_cross_attention=True,
            encoder_hidden_size=16,
            use_conv_in_out=True,
            patch_size=2,
        )
    even, sizes = (
        ImagePipeline(model, pipeline.vq_model, pipeline.text_encoder, generation=GenerationConfig(steps=2)),
        [],
    )
    model.register_forward_pre_hook(
        lambda module, args, options: sizes.append(options["grid"]), with_kwargs=True
    )
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (17, 10, 3), dtype=np.uint8)
    )  # 9 x 5 tokens
    hole = np.zeros((17, 10), bool)
    hole[12:, 3:] = True
    drawn, = even.inpaint(image, hole, "two", seed=0)
    assert drawn.size == image.size and np.array_equal(np.asarray(drawn)[~hole], np.asarray(image)[~hole])
    assert (np.asarray(drawn)[hole] != np.asarray(image)[hole]).any()
    larger, = even.outpaint(image, (0, 0, 1, 0), "two", seed=0)
    assert larger.size == (11, 17) and np.array_equal(np.asarray(larger)[:, :10], np.asarray(image))
    varied, = even.vary(image, 1.0, "two", seed=0)
    assert varied.size == image.size
    assert set(sizes) == {(10, 6)}
    with pytest.raises(ValueError, match="even sides|multiples of 2"):
        even("two", grid=(7, 8))


def test_what_continues_a_masked_edge_is_drawn_anew_too():
    "Beyond the edge the picture's last pixels are repeated, and those under the mask must not be seen."
    hole = np.zeros((6, 5), bool)
    hole[:, 4] = True
    assert (
        token_mask(hole, 1, 2).view(6, 6)[:, 5].all() and not token_mask(hole, 1, 2).view(6, 6)[:, :4].any()
    )


@pytest.fixture(scope="module")
def tasks(pipeline, folder):
    image, = pipeline(PROMPTS[0], seed=0)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 8, 16, 16))
    common = dict(seed=5, model=str(folder), num_images_per_prompt=2)
    return {
        "generate": GenerationTask(
            PROMPTS, negative_prompt="red", generation={"steps": 3, "sampler": "remasking"}, **common
        ),
        "inpaint": GenerationTask(PROMPTS[0], image=image, mask=mask, **common),
        "outpaint": GenerationTask(PROMPTS[0], image=image, margins=(4, 0, 4, 0), **common),
        "vary": GenerationTask(PROMPTS[0], image=image, ratio=0.5, **common),
    }


@pytest.mark.parametrize("kind", ("generate", "inpaint", "outpaint", "vary"))
def test_a_picture_is_made_again_from_itself(pipeline, tasks, kind, tmp_path):
    sheet, task = draw_sheet(pipeline, tasks[kind])
    write_sheet(sheet, task, tmp_path / "one.png")
    again, same_task = draw_again(tmp_path / "one.png")  # the model is found by its name
    assert np.array_equal(again, sheet) and same_task.seed == 5
    other, _ = draw_again(tmp_path / "one.png", pipeline, seed=6)
    assert not np.array_equal(other, sheet)
    assert set(task.generation) == set(vars(GenerationConfig())), "every setting is written out"


def test_later_defaults_of_the_model_do_not_change_a_written_picture(tasks, folder, tmp_path):
    pipeline = Pipeline.from_pretrained(folder)
    sheet, task = draw_sheet(pipeline, tasks["inpaint"])
    write_sheet(sheet, task, tmp_path / "one.png")
    pipeline.generation = GenerationConfig(steps=2, guidance_scale=7.0, sampler="random")
    assert np.array_equal(draw_again(tmp_path / "one.png", pipeline)[0], sheet)


@pytest.mark.parametrize("words", (["generate", *PROMPTS], ["inpaint", "image.png", "mask.png", PROMPTS[0]]))
def test_single_pictures_are_made_again_from_themselves(tasks, folder, tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    tasks["inpaint"].image.save("image.png")
    tasks["inpaint"].mask.save("mask.png")
    drawn = lambda *words: main([str(word) for word in words]) == 0 and capsys.readouterr().out.split()
    how = ["--model", folder, "--num-images", 2, "--seed", 4, "--batch-size", 3]
    sheet, *singles = drawn(*words, *how, "--out", "sheet.png", "--singles", "drawn")
    assert singles == [f"drawn/{number:03}.png" for number in range(len(words[words.index(PROMPTS[0]):]) * 2)]
    images = [np.asarray(Image.open(path)) for path in singles]
    assert {image.shape for image in images} == {(16, 16, 3)} and len(
        {image.tobytes() for image in images}
    ) == len(images)
    for path, image in zip(singles, images):
        assert drawn("generate", "--again", path, "--out", "again.png") == ["again.png"]
        assert np.array_equal(Image.open("again.png"), image) and read_task("again.png") == read_task(path)
    assert drawn("generate", "--again", singles[1], "--singles", "other", "--seed", 5) == [
        "generated.png",
        "other/001.png",
    ]
    assert not np.array_equal(Image.open("other/001.png"), images[1])
    assert drawn("generate", "--again", singles[1], "--num-images", 3) == ["generated-1.png"]
    assert Image.open("generated-1.png").size != (16, 16)
    Path("taken").write_text("")
    assert main(["generate", "two", "--model", str(folder), "--singles", "taken/inside"]) == 2
    assert "--singles taken/inside cannot be written" in capsys.readouterr().err


def test_animate_writes_the_decoding_beside_the_sheet(tasks, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = ["--model", str(folder), "--num-images", "2", "--seed", "4", "--steps", "3"]
    assert main(["generate", *PROMPTS[:2], *how, "--out", "alone.png"]) == 0
    assert main(["generate", *PROMPTS[:2], *how, "--animate", "gifs/two.gif"]) == 0
    assert capsys.readouterr().out.split() == ["alone.png", "generated.png", "gifs/two.gif"]
    sheet = np.asarray(Image.open("generated.png").convert("RGB"), dtype=float)
    assert np.array_equal(sheet, Image.open("alone.png").convert("RGB"))
    with Image.open("gifs/two.gif") as gif:
        assert gif.n_frames == 3 + 1
        start = np.asarray(gif.convert("RGB"), dtype=float)
        gif.seek(3)
        assert (
            np.abs(np.asarray(gif.convert("RGB"), dtype=float) - sheet).mean()
            < 6
            < np.abs(start - sheet).mean()
        )
    assert main(["generate", PROMPTS[0], *how, "--animate", "two.mp4"]) == 2
    assert "--animate two.mp4 is no GIF; give a name that ends in .gif" in capsys.readouterr().err
    tasks["inpaint"].image.save("image.png")
    tasks["inpaint"].mask.save("mask.png")
    assert main(["inpaint", "image.png", "mask.png", PROMPTS[0], *how, "--out", "edited.png"]) == 0
    assert main(["generate", "--again", "edited.png", "--animate", "edit.gif"]) == 2
    assert "edited.png is an edit" in capsys.readouterr().err and not Path("edit.gif").exists()


def test_generate_inpaint_and_again_on_the_command_line(tasks, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = lambda *words: main([str(word) for word in words]) == 0 and capsys.readouterr().out
    tasks["inpaint"].image.save("image.png")
    tasks["inpaint"].mask.save("mask.png")
    how = [
        "--num-images",
        2,
        "--sampler",
        "remasking",
        "--set",
        "sampler_params.eta=0.3",
        "--set",
        "guidance_interval=[0, 0.5]",
    ]
    assert (
        drawn("inpaint", "image.png", "mask.png", PROMPTS[0], "--model", folder, "--out", "one.png", *how)
        == "one.png\n"
    )
    generation = read_task("one.png").generation
    assert generation["sampler_params"] == {"eta": 0.3} and generation["guidance_interval"] == [0, 0.5]
    Path("image.png").unlink(), Path("mask.png").unlink()
    assert drawn("generate", "--again", "one.png", "--out", "two.png")
    assert np.array_equal(Image.open("one.png"), Image.open("two.png"))
    shutil.copytree(folder, "moved")
    assert drawn(
        "generate",
        "--again",
        "one.png",
        "--out",
        "three.png",
        "--model",
        "moved",
        "--seed",
        9,
        "--sampler",
        "random",
    )
    assert not np.array_equal(Image.open("one.png"), Image.open("three.png"))
    assert (
        read_task("three.png").generation["sampler_params"] == {} and read_task("three.png").model == "moved"
    )


@pytest.mark.parametrize(
    "words, message",
    (
        (["inpaint", "missing.png", "mask.png", "two"], "no image missing.png"),
        (["inpaint", "here.png"], "MASK"),
        (["generate"], "is no pipeline"),
        (["generate", "--again", "here.png"], "holds no task"),
        (["generate", "two", "--set", "steps"], "KEY=VALUE"),
    ),
)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo" / "pipeline").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("here.png")
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err
    assert (
        status == 2
        and message in said
        and said.count("\n") == 1
        and not (tmp_path / "generated.png").exists()
    )


def error_of(capsys, *words):
    "The one line on standard error of a command that is refused."
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("musekit: ") and said.count("\n") == 1
    return said


def test_a_picture_that_cannot_be_made_again_is_named(pipeline, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sheet, task = draw_sheet(pipeline, GenerationTask("two", num_images_per_prompt=2))
    write_sheet(sheet, task, "no model.png")
    assert "no model.png does not name the model" in error_of(capsys, "generate", "--again", "no model.png")
    assert (
        main(["generate", "--again", "no model.png", "--model", str(folder)]) == 0
        and not capsys.readouterr().err
    )
    for text in (
        "[1, 2]",
        '{"seed": 1}',
        '{"generation": [1]}',
        "not json",
        '{"prompts": ["two"], "generation": [1]}',
    ):
        info = PngImagePlugin.PngInfo()
        info.add_text("musekit", text)
        sheet.save("damaged.png", pnginfo=info)
        assert "damaged.png holds no task that can be read" in error_of(
            capsys, "generate", "--again", "damaged.png"
        )
    shutil.copytree(folder, "runs/of/mine")
    write_sheet(sheet, task.change(model="runs/of/mine"), "moved.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    said = error_of(capsys, "generate", "--again", "../moved.png")
    assert "../moved.png was generated with runs/of/mine" in said and "--model" in said
    assert main(["generate", "--again", "../moved.png", "--model", "../runs/of/mine"]) == 0


def test_a_picture_is_never_written_over_what_it_is_made_from(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = lambda *words: main([str(word) for word in words]) == 0 and capsys.readouterr().out.split()
    assert (
        drawn("generate", "two", "--model", folder, "--num-images", 2, "--singles", "singles")[0]
        == "generated.png"
    )
    before = {path: Path(path).read_bytes() for path in ("generated.png", "singles/001.png")}
    assert drawn("generate", "--again", "generated.png", "--seed", 7) == ["generated-1.png"]
    assert drawn("generate", "two", "--model", folder, "--num-images", 1) == ["generated-2.png"]
    Image.new("RGB", (16, 16), "white").save("mask.png")
    for words in (
        ["generate", "--again", "generated.png", "--out", "./generated.png"],
        ["inpaint", "singles/001.png", "mask.png", "two", "--out", "mask.png"],
    ):
        assert "is also an input" in error_of(capsys, *words)
    assert "singles/001.png has the name of one" in error_of(
        capsys, "generate", "--again", "singles/001.png", "--singles", "singles", "--seed", 7
    )
    assert before == {path: Path(path).read_bytes() for path in before}


TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sampler", sampler_names())
def test_a_picture_with_its_own_seed_is_the_same_in_any_company(folder, dtype, sampler):
    pipeline, prompts = Pipeline.from_pretrained(folder, dtype=TYPES[dtype]), [
        *PROMPTS,
        "a blue four",
        "five",
    ]
    together = pixels(pipeline(prompts, seed=[3, 4, 5, 6], sampler=sampler))
    for number, prompt in enumerate(prompts):
        assert np.array_equal(pixels(pipeline(prompt, seed=3 + number, sampler=sampler))[0], together[number])
    assert np.array_equal(pixels(pipeline(prompts[:3], seed=[3, 4, 5], sampler=sampler)), together[:3])
    assert len({picture.tobytes() for picture in together}) == 4


def test_seeds_on_the_command_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = lambda *words: main([str(word) for word in words]) == 0 and capsys.readouterr().out.split()
    how = ["--model", folder, "--singles"]
    _, *three = drawn("generate", *PROMPTS, "--seed", "4,5", *how, "three")
    _, *alone = drawn("generate", PROMPTS[1], "--num-images", 1, "--seed", 5, *how, "alone")
    assert len(three) == 2 and len(alone) == 1 and np.array_equal(Image.open(three[1]), Image.open(alone[0]))
    _, *four = drawn("generate", *PROMPTS, "--seed", "1,2,3,4", *how, "four")
    assert len(four) == 4 and read_task(four[2]).seed == [1, 2, 3, 4]
    assert drawn("generate", "--again", four[2], "--out", "again.png")
    assert np.array_equal(Image.open("again.png"), Image.open(four[2]))
    assert drawn("generate", "--again", "generated.png", "--seed", "7,8,9,10", "--out", "other.png")
    assert "one for each of the 6 images" in error_of(
        capsys, "generate", *PROMPTS, "--num-images", 3, "--seed", "1,2", "--model", folder
    )
    assert "one for each of the 8 images" in error_of(
        capsys, "generate", *PROMPTS, "--seed", "1,2,3", "--model", folder
    )
    for seed in ("1,", "1,x", "-1,2", "1.5"):
        with pytest.raises(SystemExit):
            main(["generate", "two", f"--seed={seed}"])
        assert "is not a whole number" in capsys.readouterr().err


def test_updates_on_the_command_line(folder, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = lambda *words: main([str(word) for word in words]) == 0 and capsys.readouterr().out.split()
    adapted = add_lora(Pipeline.from_pretrained(folder).transformer, rank=2)
    for parameter in lora_parameters(adapted).values():
        torch.nn.init.normal_(parameter, std=0.7)
    save_lora(adapted, "updates")
    adapted.save_pretrained("run/pipeline/transformer")
    how = ["generate", "two", "--model", folder, "--num-images", 2, "--out"]
    for name, options in {
        "plain": (),
        "whole": ("--lora", "updates"),
        "run": ("--lora", "run"),
        "none": ("--lora", "updates", "--lora-scale", 0),
        "half": ("--lora", "updates", "--lora-scale", 0.5),
    }.items():
        assert drawn(*how, f"{name}.png", *options) == [f"{name}.png"]
    picture = {path.stem: np.asarray(Image.open(path)) for path in tmp_path.glob("*.png")}
    assert np.array_equal(picture["plain"], picture["none"]) and np.array_equal(
        picture["whole"], picture["run"]
    )
    assert len({picture[name].tobytes() for name in ("plain", "whole", "half")}) == 3
    assert (read_task("half.png").lora, read_task("half.png").lora_scale) == ("updates", 0.5)
    assert drawn("generate", "--again", "half.png", "--out", "again.png") and np.array_equal(
        Image.open("again.png"), picture["half"]
    )
    assert drawn("generate", "--again", "half.png", "--lora-scale", 1, "--out", "again.png")
    assert np.array_equal(Image.open("again.png"), picture["whole"]) and np.array_equal(
        draw_again("half.png")[0], picture["half"]
    )
    tasks["inpaint"].image.save("image.png"), tasks["inpaint"].mask.save("mask.png")
    inpainted = [
        drawn("inpaint", "image.png", "mask.png", "two", *how[2:], f"in{name}.png", *options)
        and np.asarray(Image.open(f"in{name}.png"))
        for name, options in (("a", ()), ("b", ("--lora", "updates")))
    ]
    assert not np.array_equal(*inpainted)
    assert "lora_scale=0.5 must be a number, and needs lora" in error_of(
        capsys, *how, "x.png", "--lora-scale", 0.5
    )
    assert "no low-rank updates in" in error_of(capsys, *how, "x.png", "--lora", folder)
    assert "scale must be a finite number" in error_of(
        capsys, *how, "x.png", "--lora", "updates", "--lora-scale", "nan"
    )
    assert "nowhere" in error_of(capsys, *how, "x.png", "--lora", "nowhere") and not Path("x.png").exists()


@pytest.mark.parametrize("part", ["transformer", "vq_model", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_numbers_that_are_not_finite_are_named_with_their_part(
    folder, tmp_path, capsys, monkeypatch, part, value
):
    """Weights that are NaN when they are loaded, and weights that are finite and make infinity when they
    are used."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "broken")
    path, = Path("broken", part).glob("*.safetensors")
    weights = load_file(path)
    last = {
        "transformer": "mlm_layer.conv2.weight",
        "vq_model": "decoder.conv_out.weight",
        "text_encoder": "text_projection.weight",
    }[part]
    weights[last].fill_(value)
    save_file(weights, path, metadata={"format": "pt"})
    said = error_of(capsys, "generate", "two", "--model", "broken", "--num-images", 1)
    names = {"transformer": "transformer", "vq_model": "image tokenizer", "text_encoder": "text encoder"}
    assert (
        f"broken/{part}: {last}" if value != 3e38 else f"the {names[part]} returned "
    ) in said and "not finite" in said
    assert not Path("generated.png").exists()


def test_a_type_that_overflows_is_named(folder):
    pipeline = Pipeline.from_pretrained(folder)
    torch.nn.init.constant_(pipeline.vq_model.decoder.conv_out.weight, 6e4)
    assert pipeline("two", seed=0)
    with pytest.raises(
        ValueError,
        match=(
            "the image tokenizer returned pixels .* float16 overflows early: load the pipeline with"
            " dtype=torch.bfloat16"
        ),
    ):
        pipeline.to(dtype=torch.float16)("two", seed=0)
    torch.nn.init.constant_(pipeline.vq_model.float().decoder.conv_out.weight, 1e5)
    pipeline.vq_model.note(force_upcast=True)
    assert pipeline.to(dtype=torch.float16).vq_model.dtype == torch.float32 and pipeline("two", seed=0)


def test_long_work_shows_progress_and_a_far_too_large_image_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    for side, warned in (32, False), (33, True):  # the model's pictures have 16 x 16 pixels
        Image.new("RGB", (side, side), "red").save("image.png")
        Image.new("L", (side, side), "white").save("mask.png")
        assert (
            main([
                "inpaint",
                "image.png",
                "mask.png",
                "two",
                "--model",
                str(folder),
                "--steps",
                "3",
                "--num-images",
                "1",
            ])
            == 0
        )
        said = capsys.readouterr().err
        assert "step 2 of 3, " in said and ("warning: 33x33 pixels are more than 4 times" in said) == warned
    assert main(["generate", "two", "--model", str(folder), "--steps", "3", "--out", "two.jpg"]) == 0
    said = capsys.readouterr().err
    assert "step 2 of 3, " in said and said.count("two.jpg stores no settings") == 1


def test_an_interrupted_drawing_promises_nothing(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImagePipeline, "__call__", interrupt)
    assert main(["generate", "two", "--model", str(folder)]) == 130
    assert capsys.readouterr().err == "musekit: interrupted\n" and not list(tmp_path.iterdir())


def test_an_option_of_what_has_none_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--set", "sampler_params=3", "--set", "sampler_params.eta=2"]
    assert "sampler_params is 3 already" in error_of(capsys, "generate", "two", "--model", folder, *options)


def test_model_classes_are_found_by_name_alone():
    assert find_model_class("MaskGiTUViT_v2") is MaskGiTUViT
    with pytest.raises(ValueError, match="choose one of"):
        find_model_class("os.system")
