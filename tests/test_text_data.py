"""Text from the converter's folder to rows of tokens, with the tokenizer of autoresearch's cache."""
import pickle
import signal
import subprocess
import sys
import sysconfig
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch

from musekit.data.text import TextRows, find_text
from musekit.data.text_tokenizers import load_text_tokenizer, train_bpe
from musekit.shards.rechunk import Layout, rechunk
from musekit.training.loop import endless_batches

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
PATTERN = (  # autoresearch's
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL = [f"<|reserved_{number}|>" for number in range(4)]
WORLD = ["Привет, мир", "नमस्ते दुनिया", "你好，世界", "مرحبا", "안녕", "👩‍🚀"]
ODD = ["<|reserved_0|>", "", " \t\r\n\n"]


def library_texts() -> list[str]:
    """More than a thousand documents, also in other alphabets."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(LIBRARY.glob("[a-d]*.py"))]
    return [part for source in sources for part in source.split("\n\n")][:1500] + WORLD + ODD


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache folder as `musekit-shards` and autoresearch's own preparation leave it."""
    folder = tmp_path_factory.mktemp("cache")
    texts = library_texts()
    source = tmp_path_factory.mktemp("source") / "source.parquet"
    pq.write_table(pa.table({"text": texts * 2}), source)
    rechunk([source], folder / "data", layout=Layout(1000, 128, num_shards=2))
    rustbpe = pytest.importorskip("rustbpe")
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(texts), 1024, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trained.get_mergeable_ranks()}
    special = {name: len(ranks) + number for number, name in enumerate(SPECIAL)}
    encoding = tiktoken.Encoding(
        "rustbpe", pat_str=trained.get_pattern(), mergeable_ranks=ranks, special_tokens=special
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    decoded = [encoding.decode([number]) for number in range(encoding.n_vocab)]
    lengths = [0 if text in SPECIAL else len(text.encode()) for text in decoded]
    torch.save(torch.tensor(lengths, dtype=torch.int32), folder / "tokenizer" / "token_bytes.pt")
    return folder


def original(cache: Path) -> tiktoken.Encoding:
    return pickle.loads((cache / "tokenizer" / "tokenizer.pkl").read_bytes())


def test_the_ids_are_those_of_the_cache_s_own_encoding(cache):
    tokenizer, encoding = load_text_tokenizer(cache), original(cache)
    texts = library_texts()
    assert len(texts) > 1000
    assert tokenizer.encode_many(texts) == [encoding.encode_ordinary(text) for text in texts]
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (encoding.n_vocab, encoding.n_vocab - 4)
    written = torch.load(cache / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert torch.equal(tokenizer.token_bytes(decoded=True), written.long())
    assert tokenizer.token_bytes()[tokenizer.encode(WORLD[3])].sum() == len(WORLD[3].encode())


def autoresearch_rows(texts, encoding, length):
    """Rows as its loader makes them, without an end: the text is read again and again."""
    waiting = []
    bos = encoding.encode_single_token(SPECIAL[0])

    def chunks():
        while True:
            for group in texts:
                for first in range(0, len(group), 128):
                    yield [[bos, *encoding.encode_ordinary(text)] for text in group[first : first + 128]]

    stream = chunks()
    while True:
        row = []
        while len(row) < length:
            while len(waiting) < 1000:
                waiting += next(stream)
            fitting = [number for number, ids in enumerate(waiting) if len(ids) <= length - len(row)]
            if fitting:
                chosen = max(fitting, key=lambda number: len(waiting[number]))
            else:
                chosen = min(range(len(waiting)), key=lambda number: len(waiting[number]))
            row += waiting.pop(chosen)[: length - len(row)]
        yield row


@pytest.mark.parametrize("split, mix_epochs, rows", [
    ("train", False, 100),  # before its buffer reaches the next pass over the text
    ("train", True, 1000), ("validation", True, 600),
])
def test_rows_are_those_of_autoresearch_s_loader(cache, split, mix_epochs, rows):
    files, tokenizer, encoding = find_text(cache), load_text_tokenizer(cache), original(cache)
    assert {Path(group.path).name for group in files.validation} == {"shard_06542.parquet"}
    assert {Path(group.path).name for group in files.train} == {"shard_00000.parquet", "shard_00001.parquet"}
    texts = [group.read(files.column).to_pylist() for group in getattr(files, split)]
    expected = list(islice(autoresearch_rows(texts, encoding, 129), rows))
    loader = TextRows(files, tokenizer, 129, 10, split=split, mix_epochs=mix_epochs)
    batches = list(islice(loader(), rows // 10))
    assert [row for batch in batches for row in batch["ids"].tolist()] == expected
    assert (batches[-1]["epoch"] > 1) == mix_epochs


def test_a_pass_over_the_validation_shard_ends(cache):
    files, tokenizer = find_text(cache), load_text_tokenizer(cache)
    loader = TextRows(files, tokenizer, 129, 10, split="validation", packing="cut", shuffle_seed=1)
    ids = [number for batch in loader() for row in batch["ids"].tolist() for number in row]
    texts = "".join(text for group in files.validation for text in group.read("text").to_pylist())
    assert texts.startswith(tokenizer.decode(ids)[:-3]) and len(tokenizer.decode(ids)) > len(texts) - 1000


def test_endless_batches_take_the_loader(cache):
    rows = TextRows(find_text(cache), load_text_tokenizer(cache), 64, 2, shuffle_seed=0)
    straight = [batch["ids"] for batch in islice(endless_batches(rows), 8)]
    resumed = [batch["ids"] for batch in islice(endless_batches(rows, 5), 3)]
    assert all(map(torch.equal, straight[5:], resumed))


CHILD = """
import hashlib, sys
import musekit.data.text as text
from musekit.data.text_tokenizers import load_text_tokenizer
text._STATE_EVERY = 7
packing, cache, states, workers, start = sys.argv[1:]
rows = text.TextRows(text.find_text(cache), load_text_tokenizer(cache), 32, 4, packing=packing,
                     buffer_size=100, shuffle_seed=5, workers=int(workers), state_folder=states)
for number, batch in enumerate(rows(int(start)), int(start)):
    print(number, batch["epoch"], hashlib.sha256(batch["ids"].numpy().tobytes()).hexdigest(), flush=True)
"""


def run_child(packing, cache, states, workers, start, lines):
    """The first lines that a process prints before it is killed."""
    command = [sys.executable, "-c", CHILD, packing, cache, states, str(workers), str(start)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        printed = [process.stdout.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
    return printed


@pytest.mark.parametrize("packing", ["best_fit", "cut"])
def test_a_killed_process_goes_on_where_it_was(cache, tmp_path, packing):
    straight = run_child(packing, cache, tmp_path / "a", 0, 0, 60)
    assert [line.split()[0] for line in straight] == [str(number) for number in range(60)]
    assert len(set(line.split()[2] for line in straight)) == 60
    assert run_child(packing, cache, tmp_path / "b", 2, 0, 40) == straight[:40]
    assert list((tmp_path / "b").glob("rows-*-35.npz"))
    assert run_child(packing, cache, tmp_path / "b", 1, 37, 23) == straight[37:]


def test_two_epochs_read_each_document_twice(tmp_path):
    """Packed best-fit in rows that hold every document, so that none is cropped."""
    names = [f"{number:03}" for number in range(320)]
    pq.write_table(pa.table({"text": names}), tmp_path / "a.parquet", row_group_size=40)
    pq.write_table(pa.table({"text": names}), tmp_path / "b.parquet")
    tokenizer = load_text_tokenizer("bytes")
    shares = []
    for rank in range(2):
        rows = TextRows(find_text(tmp_path), tokenizer, 4, 5, rank=rank, world_size=2, shuffle_seed=0)
        batches = list(islice(rows(), 64))
        texts = [tokenizer.decode(row) for batch in batches for row in batch["ids"]]
        first, second = texts[:160], texts[160:]
        assert len(set(first)) == len(set(second)) == 160 and sorted(first) != first
        assert [batch["epoch"] for batch in batches] == [1] * 32 + [2] * 32
        shares.append(set(first))
    assert not shares[0] & shares[1] and shares[0] | shares[1] == set(names)


def test_without_tiktoken_one_line_says_what_to_install(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    message = r"tokenizer.pkl cannot be used: this tokenizer needs tiktoken, .*pip install 'musekit\[text\]'"
    with pytest.raises(ValueError, match=message):
        load_text_tokenizer(cache)
    assert train_bpe(["some text"], 260).decode([115]) == "s"  # needs none


@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "builtins.exec", "subprocess.getoutput"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_something_is_refused(tmp_path, function, protocol):
    module, _, name = function.rpartition(".")
    touched = tmp_path / "touched"
    code = f"open({str(touched)!r}, 'w')" if module == "builtins" else f"touch {touched}"

    class Calls:
        def __reduce__(self):
            return getattr(sys.modules[module], name), (code,)

    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps({"name": [Calls()]}, protocol))
    with pytest.raises(ValueError, match=f"no pickled tiktoken Encoding: it names .*{name}, where only"):
        load_text_tokenizer(tmp_path)
    assert not touched.exists()
    Calls().__reduce__()[0](code)  # the attack works where it is let in
    assert touched.exists()
