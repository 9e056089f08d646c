"""The command line as people meet it: help, a folder of pictures, mistakes, interruptions, two processes."""
import io
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from importlib import resources

import pytest
import yaml
from PIL import Image
from torch import distributed

from musekit.utils import progress
from musekit.data.packing import write_shards
from musekit.models.transformer import MaskGitTransformer
from musekit.training.log import read_log
from musekit.training.checkpoint import checkpoints
from musekit.training.distributed import on_main_process
from commands import ENVIRONMENT, TINY, assert_refused, launch_two, make_photos, musekit, some_digits


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with photos/ and a run of them in runs/small."""
    folder = tmp_path_factory.mktemp("place")
    make_photos(folder / "photos")
    return folder


@pytest.fixture(scope="module")
def trained(place):
    process = musekit(place, "train", "data=photos/", *TINY)
    assert process.returncode == 0, process.stderr
    return process


def test_help_of_a_process(tmp_path):
    process = musekit(tmp_path, "--help")
    assert process.returncode == 0 and not process.stderr and "generate images from prompts" in process.stdout


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "musekit demo"),
        (["demo"], "--prompts"),
        (["train"], "musekit train data=photos/"),
        (["generate"], "--negative-prompt"),
    ],
)
def test_help(tmp_path, here, arguments, text):
    process = here(tmp_path, *arguments, "--help")
    assert process.returncode == 0 and not process.stderr and text in process.stdout
    assert max(map(len, process.stdout.splitlines())) <= 110


def test_no_command_shows_the_help(tmp_path, here):
    process = here(tmp_path)
    assert process.returncode == 2 and "musekit demo" in process.stdout


def test_a_process_finds_a_wrong_argument_at_once(tmp_path):
    start = time.perf_counter()
    assert_refused(musekit(tmp_path, "generate", "a two", "--model", "nowhere"), "no folder and no hub id")
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["paint"], "invalid choice"),
        (["demo", "--prompts", "0"], "1 to 400"),
        (["demo", "--prompts", "401"], "1 to 400"),
        (["demo", "--seed", "one"], "--seed"),
        (["generate", "--model", "nowhere"], "no folder and no hub id"),
        (["generate", "a two", "--num-images", "0"], "--num-images"),
        (["generate", "a two", "--steps", "0"], "--steps"),
        (["generate", "a two", "--model", "nowhere"], "no folder and no hub id"),
        (["generate", "a two", "--out", "two.mp5"], "--out two.mp5"),
        (["generate", "a two", "--out", "/proc/no/two.png"], "cannot be written"),
        (["train", "data=digits", "training.max_train_steps=few"], "steps='few' must be a whole number"),
        (
            ["train", "data=digits", "dataset.preprocessing.random_flip=true"],
            "set training.encode_first=false",
        ),
        (
            ["train", "data=digits", "mask_schedule.schedule=sigmoid", "mask_schedule.params.tau=abc"],
            "needs a number for tau",
        ),
        (["train", "data=digits", "lr_scheduler.params.options.num_cycles=abc"], "num_cycles"),
        (
            ["train", "data=digits", "optimizer.name=lion", "optimizer.params.epsilon=1e-3"],
            "lion has no epsilon",
        ),
        (["train", "data=digits", "training.eval_mask_ratios=[]"], "must hold a ratio"),
        (["train", "data=digits", "training.seed=99999999999999999999"], "at most"),
        (["train", "data=digits", "experiment.trackers=tensorboard"], "must be a list"),
        (["train", "data=digits", "model.text_encoder.train.hidden_size=7"], "must be even"),
        (["train", "data=digits", "model.transformer.codebook_size=10"], "belong together"),
        (["train", "data=digits", "dataset.preprocessing.max_seq_length=1"], "at least 2"),
        (["evaluate", "digits", "data=digits", "--prompts", "nowhere"], "no file of prompts nowhere"),
        (["train", "--check", "data=digits", "--chekc"], "unrecognized arguments: --chekc"),
        (
            ["evaluate", "digits", "data=digits", "--prompts", "nowhere", "more"],
            "['digits', 'more'] needs a feature extractor",
        ),
        (["push", "here", "me/mine", "--private", "more"], "unrecognized arguments: more"),
        (
            ["evaluate", "digits", "data=digits", "--out", "/proc/no/numbers.json"],
            "--out /proc/no/numbers.json cannot be written",
        ),
        (
            ["train", "data=digits", "experiment.output_dir=/proc/version/run"],
            "/proc/version is a file; choose a folder",
        ),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(tmp_path, here, arguments, message):
    assert_refused(here(tmp_path, *arguments), message)
    assert not list(tmp_path.iterdir())


def test_settings_may_stand_on_both_sides_of_an_option(tmp_path, here):
    assert_refused(
        here(tmp_path, "encode", "data=digits", "--out", "codes", "training.batch_size=0"),
        "batch_size=0 must be at least 1",
    )
    assert_refused(
        here(tmp_path, "train", "data=digits", "--check", "training.batch_size=0"),
        "batch_size=0 must be at least 1",
    )


def test_singles_and_the_sheet_have_names_of_their_own(tmp_path, here):
    for out in ("singles/000.png", "./singles/../singles/12.png"):
        assert_refused(
            here(tmp_path, "generate", "a two", "--singles", "singles", "--out", out, "--model", "digits"),
            "choose another name",
        )
    assert_refused(
        here(
            tmp_path,
            "generate",
            "a two",
            "--singles",
            "singles",
            "--out",
            "singles/all.png",
            "--model",
            "none",
        ),
        "none",
    )


@pytest.mark.parametrize("name, library", [("8bit_adamw", "bitsandbytes"), ("lion", "lion_pytorch")])
def test_a_library_that_is_missing_here_is_no_mistake_of_the_file(tmp_path, here, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    settings = "data=digits", f"optimizer.name={name}"
    for command in (["check"], ["train", "--check"]):
        process = here(tmp_path, *command, *settings)
        assert process.returncode == 0 and "training, one process" in process.stdout
        assert process.stderr.startswith("musekit: warning: ") and "pip install" in process.stderr
    assert_refused(here(tmp_path, "train", *settings), "pip install")
    assert not list(tmp_path.iterdir())


def test_a_warm_up_longer_than_the_run_is_reported(tmp_path, here):
    with pytest.warns(UserWarning, match="warmup_steps=6 is above steps=5"):
        here(
            tmp_path,
            "check",
            "data=digits",
            "lr_scheduler.params.warmup_steps=6",
            "training.max_train_steps=5",
        )


def test_bad_folders(tmp_path, here):
    few = make_photos(tmp_path / "few", count=3)
    process = here(tmp_path, "train", "data=few")
    assert_refused(process, "3 images", "fewer than the tokenizer's 256 codes")
    (few / "00.txt").unlink()
    (few / "01.png").write_bytes(b"no picture")
    process = here(tmp_path, "train", "data=few")
    assert_refused(process, "00.png", "1 unreadable: 01.png", "dataset.params.skip_bad=true")
    packed = tmp_path / "runs" / "small" / "data" / "train"
    assert [path.name for path in packed.glob("*.tar")], "the shards that were packed before are still there"
    assert [path.name for path in packed.parent.iterdir()] == ["train"]


def test_a_folder_from_end_to_end(place, trained):
    assert trained.stderr == "" and "musekit generate" in trained.stdout
    command = shlex.split(trained.stdout.splitlines()[-1].split("generate images with: ")[1])
    process = musekit(place, *command[1:], "--out", "new/drawn.png", "--num-images", "2")
    assert (process.returncode, process.stderr, process.stdout) == (0, "", "new/drawn.png\n")
    assert Image.open(place / "new" / "drawn.png").width == 210


def test_a_plain_transformer_from_end_to_end(place, here):
    config = yaml.safe_load((resources.files("musekit") / "configs" / "small.yaml").read_text())
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config["model"] |= {"architecture": "transformer", "transformer": sizes}
    config["dataset"]["params"]["eval_shards_path_or_url"] = "photos"
    config["training"]["mask_contiguous_region_prob"] = 0.5
    (place / "plain.yaml").write_text(yaml.safe_dump(config))
    options = [option for option in TINY if not option.startswith("model.transformer")]
    run = place / "runs" / "plain"
    process = here(
        place,
        "train",
        "plain.yaml",
        "data=photos",
        f"experiment.output_dir={run}",
        "experiment.eval_every=5",
        *options,
    )
    assert (process.returncode, process.stderr) == (0, "")
    log = read_log(run)
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 11)) and any(
        "eval_loss" in line for line in log
    )
    model = MaskGitTransformer.from_pretrained(run / "pipeline" / "transformer")
    assert model.config.add_cross_attention and model.default_shape == (8, 8)
    drawn = here(
        place,
        "generate",
        "a blue two on white paper",
        "--model",
        run / "pipeline",
        "--out",
        "plain.png",
        "--num-images",
        "2",
    )
    assert (drawn.returncode, drawn.stderr) == (0, "") and Image.open(place / "plain.png").width == 210


def test_a_model_of_texts_says_what_to_give(place, trained, here):
    model = "--model", "runs/small"
    assert_refused(here(place, "generate", *model), "at least one PROMPT", "a blue three")
    process = here(place, "inpaint", "photos/00.png", "photos/01.png", *model)
    assert_refused(process, "at least one PROMPT", "for the whole image")
    assert "--again" not in process.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_lines(place, trained, here, monkeypatch):
    """Every half minute in truth: here after every step."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    changes = [
        "experiment.output_dir=runs/lines",
        "model.vq_model.pretrained=null",
        "training.max_grad_norm=null",
    ]
    process = here(place, "train", "data=photos", *TINY, *changes)
    lines = process.stderr.splitlines()
    assert process.returncode == 0 and "\r" not in process.stderr
    for steps in (10, 5, 10):  # of tokenizer, text encoder, transformer
        last = [line for line in lines if line.startswith(f"step {steps} of {steps}, loss=")]
        assert last and all(re.search(r", 00:\d\d elapsed, 00:\d\d left$", line) for line in last), lines
    assert "step 3 of 10" in process.stderr and any(line.startswith("train: batch 1, ") for line in lines)
    networks = (
        "model.vq_model.pretrained=runs/small/vq_model",
        "model.text_encoder.pretrained=runs/small/clip",
    )
    process = here(
        place, "encode", "small", f"data={place}/runs/small/data/train", *networks, "--out", "codes"
    )
    assert process.returncode == 0 and "shard 1 of 1, left_out=0, samples=40, " in process.stderr
    process = here(
        place,
        "train-tokenizer",
        "data=photos",
        "training.max_train_steps=2",
        "training.batch_size=2",
        "experiment.output_dir=runs/tokenizer",
        "experiment.log_every=1",
    )
    assert process.returncode == 0 and "step 2 of 2, loss=" in process.stderr, process.stderr


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress.watched(range(3)))
    assert "100%|" in sys.stderr.getvalue() and "\r" in sys.stderr.getvalue()


def test_the_folder_of_a_run_belongs_to_it(place, trained, here):
    run = place / "runs" / "small"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert_refused(here(place, "train", "data=photos", *TINY, "training.seed=1"), "training.seed: 0 -> 1")
    extra = place / "photos" / "extra"
    sample = next(iter(some_digits([50])))
    sample["image"].save(extra.with_suffix(".png"))
    extra.with_suffix(".txt").write_text(sample["text"])
    process = here(place, "train", "data=photos", *TINY)
    extra.with_suffix(".png").unlink()
    extra.with_suffix(".txt").unlink()
    assert_refused(process, "changed: files", "output=")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before


def wait_for(ready, running=lambda: True):
    give_up = time.perf_counter() + 60
    while not ready() and running() and time.perf_counter() < give_up:
        time.sleep(0.02)


def test_interrupted_run_goes_on(place, trained, here):
    run = place / "runs" / "stopped"
    command = ["train", "data=photos", f"experiment.output_dir={run}", *TINY, "training.max_train_steps=120"]
    process = subprocess.Popen([sys.executable, "-m", "musekit", *command], cwd=place, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((run / "log.jsonl").is_file, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    complaints = process.communicate(timeout=60)[1]
    assert process.returncode == 130, complaints
    assert complaints.count("\n") == 1 and "Traceback" not in complaints
    saved = checkpoints(run)[-1]
    assert saved.name in complaints and not (run / "pipeline").exists()
    command = shlex.split(complaints.strip().split("resume with: ")[1])
    resumed = here(place, *command[1:])
    assert resumed.returncode == 0 and checkpoints(run)[-1].name == "checkpoint-120"
    steps = [line["step"] for line in read_log(run) if "loss" in line]
    assert steps == list(range(1, 121))


def test_interrupted_stage_leaves_nothing_half_made(place, trained, here):
    run = place / "runs" / "early"

    def terminate():
        wait_for((run / "partial-vq_model" / "log.jsonl").is_file)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=terminate)
    killer.start()
    process = here(
        place,
        "train",
        "data=photos",
        f"experiment.output_dir={run}",
        *TINY,
        "model.vq_model.train.steps=100000",
    )
    killer.join()
    assert (
        process.returncode == 130
        and process.stderr.count("\n") == 1
        and "interrupted; finished stages are kept" in process.stderr
    )
    assert [path.name for path in run.iterdir()] == ["data"]


def test_two_processes_make_every_stage_once(place, trained):
    process = launch_two(place, "train", "data=photos", "experiment.output_dir=runs/two", *TINY)
    run = place / "runs" / "two"
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("transformer ...") == process.stdout.count("generate images with") == 1
    assert json.loads((run / "checkpoint-10" / "trainer_state.json").read_text())["num_processes"] == 2
    alone, together = (
        (place / "runs" / name / "vq_model" / "model.safetensors").read_bytes() for name in ("small", "two")
    )
    assert alone == together
    assert not list(run.glob("partial-*"))


def test_two_processes_fail_together(tmp_path):
    (make_photos(tmp_path / "photos", count=4) / "02.txt").unlink()
    start = time.perf_counter()
    process = launch_two(tmp_path, "train", "data=photos", *TINY)
    assert time.perf_counter() - start < 50, "nobody waits for the one that failed"
    assert process.returncode != 0
    assert process.stderr.count("musekit: photos: 1 without a caption") == 1
    assert process.stderr.count("(exitcode: 2)") + process.stderr.count("exitcode  : 2") >= 2


class Mistake(Exception):
    "What no library knows."


def make_by_turns(rank, store, answers):
    "What this process of two gets of some work that goes well and some that fails."
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)

    def outcome(make):
        try:
            return on_main_process(make)
        except BaseException as error:
            return type(error).__name__, str(error)

    def fail(error):
        raise error

    errors = ValueError("bad"), FileNotFoundError("gone"), Mistake("ours"), KeyboardInterrupt()
    answers.put((rank, [outcome(lambda: os.getpid()), *(outcome(lambda: fail(error)) for error in errors)]))
    distributed.destroy_process_group()


def test_an_error_of_any_kind_reaches_both_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [
        context.Process(target=make_by_turns, args=(rank, f"{tmp_path}/store", answers)) for rank in range(2)
    ]
    for child in children:
        child.start()
    answers_by_rank = dict(answers.get(timeout=30) for _ in children)
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert answers_by_rank[0][0] == answers_by_rank[1][0] == children[0].pid
    assert answers_by_rank[0][1:] == [
        ("ValueError", "bad"),
        ("FileNotFoundError", "gone"),
        ("Mistake", "ours"),
        ("KeyboardInterrupt", ""),
    ]
    assert answers_by_rank[1][1:] == [
        ("ValueError", "bad"),
        ("ValueError", "gone"),
        ("RuntimeError", "The main process failed: Mistake: ours"),
        ("KeyboardInterrupt", ""),
    ]


def test_demo(tmp_path, here):
    digits = tmp_path / "run" / "data" / "digits"
    write_shards(some_digits(range(40)), digits / "train")
    write_shards(some_digits(range(1000, 1010)), digits / "test")
    (digits / "test_prompts.json").write_text("[]")  # the digits are there already, a handful of them
    process = here(tmp_path, "demo", "--out", "run", "--prompts", "20", "--export", "copy", *TINY)
    assert (process.returncode, process.stderr) == (0, "")
    assert "copy in half precision: copy, all three right" in process.stdout
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "`musekit demo --out run --seed 0 --prompts 20 --export copy model.vq_model" in card
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["overall"]["count"] == 20 and set(results["groups"]) == {
        "unseen combination",
        "unseen wording",
    }
    assert {"l1", "mse", "psnr", "ssim", "codes_used", "codebook_size", "perplexity", "clean"} == set(
        results["tokenizer"]
    )
    assert {"data", "transformer", "judging", "all"} <= set(results["seconds"]) and results[
        "peak_memory_gb"
    ] > 0.1
    for name in ("samples.png", "decoding.png", "training.png", "stages.png", "confusion.png"):
        Image.open(tmp_path / "run" / name).verify()
    assert_refused(
        here(tmp_path, "demo", "--out", "run", "--seed", "1", *TINY),
        "holds another run (training.seed: 0 -> 1)",
    )
