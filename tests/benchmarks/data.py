"""How fast pictures and tokens are read: the kit's loader beside WebDataset with torchvision's transforms,
Parquet beside tars.

    python tests/benchmarks/data.py              # 1,024 JPEGs of 512 x 512 to 256, 9 rounds, in --folder
    python tests/benchmarks/data.py --quick      # 3 rounds of fewer batches
    python tests/benchmarks/data.py --size 1600 1200      # other pictures

All contenders live in one process and take turns, a few batches each, so that whatever else the machine is
doing meets all of them; a ratio is taken within a round, and the median of the rounds is printed with the
smallest and the largest. "core" counts the time that the process and its workers spend on a core, "clock" the
time that passes. Files are read from the disk's cache.
"""
import argparse
import io
import multiprocessing
import shutil
import statistics
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import default_collate

from musekit.data.token_parquet import encode_dataset
from musekit.data.batch_encoder import BatchEncoder
from musekit.data.image_text import ImageTextConfig, make_loader
from musekit.data.packing import write_shards, write_tars
from musekit.data.tokens import open_encoded
from musekit.data.token_tars import member_name, token_members, write_unconditional

RESOLUTION, BATCH, BUFFER = 256, 64, 256
NAMES = dict(vq_checkpoint="vq", text_checkpoint="text")


# ---- the data ----

def photo(width, height, seed):
    """A JPEG with the coarse and fine structure of a photograph."""
    rng = np.random.default_rng(seed)
    total = 128 + rng.normal(0, 3, (height, width, 3))
    for cells, strength in ((4, 60), (16, 30), (64, 16), (256, 8)):
        noise = rng.integers(0, 256, (max(2, cells * height // width), cells, 3), np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.BICUBIC)
        total += (np.asarray(layer, np.float32) - 128) / 128 * strength
    data = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()


def picture_shards(folder, size, count):
    """Tars of `count` pictures; 64 different ones, since making them takes longer than reading them."""
    folder = folder / f"pictures-{size[0]}x{size[1]}-{count}"
    if not list(folder.glob("*.tar")):
        photos = [photo(*size, seed) for seed in range(64)]
        rows = (dict(image=photos[n % 64], text=f"a picture of the number {n}", metadata=dict(aesthetic=5.0))
                for n in range(count))
        write_shards(rows, folder, samples_per_shard=256)
    return sorted(map(str, folder.glob("*.tar")))


# ---- pictures: the contenders, endless iterators of batches ----

def kit(urls, workers):
    config = ImageTextConfig(
        resolution=RESOLUTION,
        random_flip=True,
        batch_size=BATCH,
        shuffle_buffer_size=BUFFER,
        num_workers=workers,
    )
    return iter(make_loader(urls, config, training=True))


def resize_shorter(image):
    """torchvision's Resize(256) of a PIL image."""
    width, height = image.size
    if min(width, height) == RESOLUTION:
        return image
    size = (
        (RESOLUTION, RESOLUTION * height // width)
        if width <= height
        else (RESOLUTION * width // height, RESOLUTION)
    )
    return image.resize(size, Image.BILINEAR)


def random_crop(image):
    left, top = (int(torch.randint(0, side - RESOLUTION + 1, ())) for side in image.size)
    return image.crop((left, top, left + RESOLUTION, top + RESOLUTION))


def random_flip(image):
    return image.transpose(Image.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else image


def to_tensor(image):
    """torchvision's ToTensor of an RGB image."""
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True)).view(image.size[1], image.size[0], 3)
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def transform(image):
    for step in (resize_shorter, random_crop, random_flip, to_tensor):
        image = step(image)
    return image


def usual(urls, workers):
    """WebDataset as its manual shows it: pictures decoded by PIL, transformed, batched in the worker."""
    data = (
        webdataset.WebDataset(urls, resampled=True, shardshuffle=False, handler=webdataset.warn_and_continue)
        .shuffle(BUFFER).decode("pilrgb", handler=webdataset.warn_and_continue).to_tuple("jpg", "txt", "json")
        .map_tuple(transform).batched(BATCH, collation_fn=default_collate)
    )
    return iter(webdataset.WebLoader(data, batch_size=None, num_workers=workers))


# ---- tokens ----

class Tokens:
    """In place of an image tokenizer: 256 ids for a picture."""

    def get_code(self, pixels):
        return torch.randint(0, 8192, (len(pixels), 256))


class States:
    """In place of a text encoder: 77 states of 768 numbers and a pooled one."""

    def __call__(self, texts):
        return {
            "encoder_hidden_states": torch.randn(len(texts), 77, 768),
            "cond_embeds": torch.randn(len(texts), 768),
        }

    def unconditional(self, zeros=False):
        return {name: value[0] for name, value in self([""]).items()}


def token_files(folder, count, files=8):
    """The same encoded rows as tars and as Parquet, both in several files."""
    part = [{"pixel_values": torch.zeros(BATCH, 3, 256, 256), "text": ["a picture"] * BATCH,
             "micro_conds": torch.zeros(BATCH, 5)}] * (count // BATCH // files)
    if not (folder / "columns" / f"{files - 1}.parquet").exists():
        shutil.rmtree(folder / "tokens", ignore_errors=True)
        encoder = BatchEncoder(Tokens(), States())
        members = [member_name(name) for name in NAMES.values()]
        rows = (row for batch in part * files for row in token_members(batch, encoder(batch), members))
        write_tars(rows, folder / "tokens", prefix="tokens", samples_per_shard=count // files)
        write_unconditional(folder / "tokens", encoder.unconditional())
        one = {name: row.clone() for name, row in States().unconditional().items()}
        encoder.unconditional = (
            lambda zeros=False: one
        )  # files that belong together have the same empty prompt
        for number in range(files):
            encode_dataset(part, encoder, folder / "columns" / f"{number}.parquet")


def token_contenders(folder, count):
    token_files(folder, count)
    config = ImageTextConfig(batch_size=BATCH, shuffle_buffer_size=BUFFER)
    read = lambda form, dtype: iter(
        open_encoded(folder / form, dtype=dtype, **NAMES).loader(config, training=True)
    )
    return {
        "tars": partial(read, "tokens", torch.float32),
        "Parquet": partial(read, "columns", torch.float32),
        "tars, as stored": partial(read, "tokens", None),
        "Parquet, as stored": partial(read, "columns", None),
    }


# ---- the race ----

def cpu_seconds(workers):
    """Time on a core of this process and of its workers."""
    return time.process_time() + sum(time.clock_gettime(~worker.pid << 3 | 2) for worker in workers)


def start(make):
    """A contender that has filled its buffer, and the workers that it started."""
    before = set(multiprocessing.active_children())
    stream = make()
    list(islice(stream, 3))
    return stream, set(multiprocessing.active_children()) - before


def race(contenders, rounds, batches):
    """Seconds per batch, on a core and by the clock, of every contender in every round."""
    running = {name: start(make) for name, make in contenders.items()}
    names, taken = list(running), {name: [] for name in running}
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            stream, workers = running[name]
            for _ in range(4 if workers else 1):  # what a worker had ready is not counted
                next(stream)
            before = cpu_seconds(workers), time.perf_counter()
            for _ in range(batches):
                next(stream)
            after = cpu_seconds(workers), time.perf_counter()
            taken[name].append([(end - begin) / batches for begin, end in zip(before, after)])
    return taken


def tell(title, taken, items, unit):
    """Rates, and how many times as fast as the first contender each one is."""
    print(f"\n{title}")
    for clock, of in enumerate(("core", "clock")):
        (first, base), width = next(iter(taken.items())), max(map(len, taken))
        for name, seconds in taken.items():
            ratios = [slow[clock] / fast[clock] for slow, fast in zip(base, seconds)]
            rate = items / statistics.median(second[clock] for second in seconds)
            comparison = "" if name == first else (f"   {statistics.median(ratios):.2f} times {first} "
                                             f"({min(ratios):.2f} to {max(ratios):.2f})")
            print(f"  {of:6}{name:{width}} {rate:12,.0f} {unit} a second{comparison}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "musekit-benchmark")
    options = parser.parse_args()
    rounds, batches = (3, 3) if options.quick else (9, 6)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    urls = picture_shards(options.folder, options.size, 1024)
    width, height = options.size
    for workers in (0, 1):
        contenders = {"usual": partial(usual, urls, workers), "kit": partial(kit, urls, workers)}
        taken = race(contenders, rounds, batches)
        tell(f"JPEG {width}x{height} -> {RESOLUTION}, {workers} workers", taken, BATCH, "pictures")
    taken = race(token_contenders(options.folder, 2048), rounds, 4 * batches)
    tell("encoded rows of 256 ids and 78 x 768 numbers of text", taken, 256 * BATCH, "image tokens")


if __name__ == "__main__":
    main()
