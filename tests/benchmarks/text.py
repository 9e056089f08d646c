"""How many tokens a second the loader of text gives, and what they cost the process that trains.

    python tests/benchmarks/text.py              # the standard library's source, 30 batches
    python tests/benchmarks/text.py --quick      # 5 batches

"process" counts the time that the training process spends on a core: reading, packing and, without workers,
tokenizing. "clock" is the time that passes. A trainer that takes T tokens a second waits for its data for no
longer than T / (tokens a second by the clock); with enough workers only the process's own time is left.
"""
import argparse
import sysconfig
import tempfile
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from musekit.data.text import PACKINGS, TextRows, find_text
from musekit.data.text_tokenizers import ByteTokenizer, TiktokenTokenizer, train_bpe

LENGTH, BATCH = 2048, 16


def write_shards(folder):
    """Two shards of the standard library's source, cut at blank lines into documents."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [*sorted(library.glob("*.py")), *sorted(library.glob("*/*.py"))[:400]]
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    documents = [part for source in sources for part in source.split("\n\n\n") if part.strip()]
    for number in range(2):
        pq.write_table(pa.table({"text": documents}), folder / f"{number}.parquet", row_group_size=1024)
    return documents


def measure(loader, batches):
    """Tokens a second of the process's core and by the clock, and the share that is cropped."""
    stream = loader()
    list(islice(stream, 2))
    before = time.process_time(), time.perf_counter()
    cropped = sum(batch["cropped"] for batch in islice(stream, batches))
    after = time.process_time(), time.perf_counter()
    stream.close()
    tokens = batches * LENGTH * BATCH
    return [tokens / (end - start) for start, end in zip(before, after)], cropped / (cropped + tokens)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        documents = write_shards(Path(name))
        files = find_text(name)
        bpe = train_bpe(documents[:4000], 8192)
        tiktoken = TiktokenTokenizer(bpe.pattern, bpe.pieces[:-1], ["<|bos|>"])
        for title, tokenizer in (("bytes", ByteTokenizer()), ("BPE", bpe), ("tiktoken", tiktoken)):
            for packing in PACKINGS:
                for workers in (0, 1, 2):
                    loader = TextRows(files, tokenizer, LENGTH, BATCH, packing=packing, workers=workers)
                    (core, clock), cropped = measure(loader, 5 if options.quick else 30)
                    print(f"{title:9}{packing:9}{workers} workers: {core / 1e6:6.2f} million tokens a second "
                          f"of the process, {clock / 1e6:6.2f} by the clock; {cropped:5.1%} cropped")


if __name__ == "__main__":
    main()
