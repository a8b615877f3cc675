"""Streams: what is held out, which rank reads what, and going on from a place without reading what came before it."""

import itertools
import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

import flash_ladder.data.stream
from flash_ladder.data import batches, split
from flash_ladder.data.batches import TextData, of_all_ranks
from flash_ladder.data.stream import Place, StreamedDocuments
from flash_ladder.errors import UserError
from flash_ladder.schema import DataConfig
from tests.helpers.corpora import END, config, documents, hub_folder, text_data, words_of
from tests.helpers.loading import as_rank, first_batches, fit


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(split, "STREAM_VALIDATION_BYTES", 1000)
    monkeypatch.setattr(flash_ladder.data.stream, "BLOCK", 9)


@pytest.fixture
def stream(tmp_path) -> DataConfig:
    """One file, of thirty documents and a null."""
    hub = hub_folder(tmp_path)
    hub.streaming = True
    return hub


def several_files(tmp_path: Path, sizes: list[int]) -> DataConfig:
    """Documents in files of so many each."""
    folder = tmp_path / "several"
    folder.mkdir()
    texts = iter(documents(sum(sizes)))
    for i, size in enumerate(sizes):
        datasets.Dataset.from_dict({"text": list(itertools.islice(texts, size))}).to_parquet(str(folder / f"train-{i}.parquet"))
    return config(tmp_path, None, hub_name=str(folder), streaming=True)


def test_stream_holds_out_its_first_documents(stream):
    data = text_data(stream)
    assert (data.stats.n_documents, data.stats.n_train_tokens) == (None, None)
    val = words_of(data.tokenizer.decode(data.val_windows(None)["tokens"][:, :-1].flatten().tolist()))
    assert val == {"d0", "d1", "d2", "d3"}
    tokens = first_batches(data.train_dataloader(), 150)[..., :-1].flatten()  # 9,600 tokens: more than one pass
    train = words_of(data.tokenizer.decode(tokens.tolist()).rsplit(maxsplit=1)[0])
    assert "d9" in train
    assert not val & train


def test_a_stream_that_changed_is_validated_on_its_new_text(stream):
    before = text_data(stream)
    path = Path(stream.hub_name) / "train.parquet"
    texts = [text and text.replace("d", "e") for text in datasets.Dataset.from_parquet(str(path))["text"]]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(path))
    after = text_data(stream)
    words = [words_of(d.tokenizer.decode(d.val_windows(None)["tokens"][:, :-1].flatten().tolist())) for d in (before, after)]
    assert words == [{"d0", "d1", "d2", "d3"}, {"e0", "e1", "e2", "e3"}]
    assert after.stats.corpus != before.stats.corpus


def test_stream_passes_differ_and_come_from_the_seed(stream):
    batches = [first_batches(text_data(stream, seed=seed).train_dataloader(), 300) for seed in (0, 0, 1)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    text = text_data(stream).tokenizer.decode(batches[0][..., :-1].flatten().tolist())
    passes = text.split(END)[:26], text.split(END)[26:52]
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]


def test_stream_document_ids(stream):
    stream.document_ids = True
    batch = next(iter(text_data(stream).train_dataloader()))
    assert batch["document_ids"].shape == (4, 16)


# ---- ranks ----


def streamed(cfg: DataConfig, rank: int = 0, world_size: int = 1) -> StreamedDocuments:
    return as_rank(text_data(cfg), rank, world_size).train_dataloader().dataset.documents


def one_pass(documents: StreamedDocuments, number: int) -> list[str]:
    """The documents of a rank's pass, in order."""
    passes = ((place.turn // documents.n_shards, text) for place, text in documents.read(documents.beginning))
    return [text for n, text in itertools.takewhile(lambda one: one[0] <= number, passes) if n == number]


@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [([40], 2), ([2, 1, 20, 17], 2), ([2, 1, 9, 9, 9, 10], 3), ([2, 1, 20, 17], 3)],
    ids=["one file", "a file each", "files left over", "fewer files than ranks"],
)
def test_ranks_together_read_each_document_once_a_pass_and_none_held_out(tmp_path, sizes, world_size):
    """Four documents are held out; where there are several files, their text ends inside the third."""
    cfg = several_files(tmp_path, sizes)
    ranks = [streamed(cfg, rank, world_size) for rank in range(world_size)]
    for number in range(3):
        shares = [one_pass(rank, number) for rank in ranks]
        assert all(shares)
        assert sorted(itertools.chain(*shares)) == sorted(documents(sum(sizes))[4:])


def test_a_rank_that_has_no_text_says_so(tmp_path):
    """Of the two files that are not all held out, one has a single row without text."""
    cfg = several_files(tmp_path, [5, 5])
    Path(cfg.hub_name, "train-1.parquet").unlink()
    datasets.Dataset.from_dict({"text": [""]}).to_parquet(str(Path(cfg.hub_name, "train-1.parquet")))
    with pytest.raises(UserError, match=r"no text for device 1 of 2; set data\.streaming=false"):
        next(iter(as_rank(text_data(cfg), 1, 2).train_dataloader()))


# ---- going on ----


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("sizes", "rank", "world_size"), [([30], 0, 1), ([2, 1, 14, 13], 0, 1), ([2, 1, 14, 13], 1, 2), ([2, 1, 14, 13], 1, 3)]
)
def test_from_any_place_on_the_batches_are_the_same(tmp_path, sizes, rank, world_size, num_workers):
    """Places inside documents, at the ends of blocks, of files and of passes; three processes read two files by rows."""
    cfg = replace(several_files(tmp_path, sizes), seq_len=50)
    n = 90
    whole = list(itertools.islice(as_rank(text_data(cfg), rank, world_size).train_dataloader(), n))
    documents = streamed(cfg, rank, world_size)
    assert whole[-1]["place"].turn >= documents.beginning.turn + documents.n_shards  # of a later pass
    data = text_data(replace(cfg, num_workers=num_workers))
    for k in range(0, n - 3, 30 if num_workers else 4):
        as_rank(data, rank, world_size, global_step=k + 1)
        places = [whole[k]["place"]._asdict()] * world_size
        data.load_state_dict({"step": k + 1, "tokens": 0, "stream": {"n_shards": len(sizes), "seed": 0, "places": places}})
        for resumed, expected in zip(data.train_dataloader(), whole[k + 1 : k + 4], strict=False):
            assert torch.equal(resumed["tokens"], expected["tokens"]) and resumed["place"] == expected["place"]


@pytest.mark.filterwarnings("ignore")  # Lightning would like more workers
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_training_sees_the_same_batches(tmp_path, stream, num_workers, accumulate):
    """The loading process is ahead of what was trained on; the checkpoint has the place of the latter."""
    stream = replace(stream, num_workers=num_workers, seq_len=200)
    reads = Counter()

    def run(name: str, steps: int, resume: str | None = None) -> tuple[list, str]:
        data = text_data(stream, accumulate=accumulate)
        encode = data.tokenizer.encode
        data.tokenizer.encode = lambda text: (reads.update([name]), encode(text))[1]
        return fit(tmp_path, data, steps, resume)

    whole, _ = run("whole", 6)
    before, checkpoint = run("before", 3)
    after, again = run("after", 6, checkpoint)
    assert before + after == whole
    assert reads["after"] <= reads["whole"] * 2 / 3  # half, and a batch that was read ahead
    state = torch.load(again, weights_only=True)["TextData"]["stream"]
    assert (state["n_shards"], state["seed"]) == (1, 0) and [type(value) for value in state["places"][0].values()] == [int] * 5


def test_batches_of_another_size_go_on_at_the_same_token(stream):
    whole = list(itertools.islice(text_data(stream).train_dataloader(), 40))
    data = as_rank(text_data(replace(stream, seq_len=20, batch_size=3)), 0, 1, global_step=1)
    places = [whole[4]["place"]._asdict()]
    data.load_state_dict({"step": 1, "tokens": 5 * 64, "stream": {"n_shards": 1, "seed": 0, "places": places}})
    expected = torch.stack([batch["tokens"] for batch in whole[5:]])[..., :-1].flatten()
    assert torch.equal(first_batches(data.train_dataloader(), 30)[..., :-1].flatten(), expected[: 30 * 60])


def test_a_batch_that_broke_off_is_not_counted(stream):
    data = as_rank(text_data(stream, accumulate=2), 0, 1)
    batches = list(itertools.islice(data.train_dataloader(), 3))
    places = [batch["place"]._asdict() for batch in batches]
    for batch, step in zip(batches, (0, 0, 1), strict=True):  # the third begins another step, which does not end
        as_rank(data, 0, 1, global_step=step)
        assert "place" not in data.on_before_batch_transfer(batch, 0)
    assert data.state_dict()["stream"] == {"n_shards": 1, "seed": 0, "places": [places[1]]}


def test_what_was_read_before_is_not_read_again():
    """A place in the third file of four: of the first two nothing is read, and of its own no document is made a batch's again."""
    opened = []

    def rows(files):
        for file in files:
            opened.append(file)
            yield from ({"text": f"f{file}d{i} "} for i in range(20))

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"files": [0, 1, 2, 3]})
    whole = StreamedDocuments(stream, (0, 0), seed=0, rank=0, world_size=1)
    places = [place for place, _ in itertools.islice(whole.read(whole.beginning), 50)]
    opened.clear()
    assert next(whole.read(places[49]))[0] == places[49]
    assert opened == [2]
    other = StreamedDocuments(stream, (0, 0), seed=0, rank=1, world_size=2)
    opened.clear()
    assert len(list(itertools.islice(other.read(other.beginning), 80))) == 80
    assert set(opened) == {1, 3}


def test_a_checkpoint_without_a_place_or_of_other_devices_is_read_from_the_beginning(stream):
    whole = first_batches(text_data(stream).train_dataloader(), 9)
    data = as_rank(text_data(stream, accumulate=2), 0, 1, global_step=3)
    assert torch.equal(first_batches(data.train_dataloader(), 3), whole[6:])
    assert "stream" not in data.state_dict()
    fits = {"n_shards": 1, "seed": 0, "places": [Place(0, 0, 0)._asdict()]}
    assert data.fits_stream(fits, 1)
    for other in ({"n_shards": 2}, {"seed": 1}, {"places": fits["places"] * 2}):
        assert not data.fits_stream(fits | other, 1)
        data.load_state_dict({"step": 3, "tokens": 6 * 4 * 16, "stream": fits | other})
        assert torch.equal(first_batches(data.train_dataloader(), 3), whole[6:])


def test_of_ranks_that_share_sequences_one_place_is_kept(stream, monkeypatch):
    monkeypatch.setattr(batches, "of_all_ranks", lambda place, n: [Place(rank // 2, 0, 0) for rank in range(n)])
    data = as_rank(text_data(stream, context_parallel=2), 3, 4, global_step=1)
    state = data.state_dict()["stream"]
    assert [place["turn"] for place in state["places"]] == [0, 1] and data.fits_stream(state, 2)


def test_a_document_that_became_shorter(stream):
    """The text at a place may have changed on the hub; the place is then the document's end."""
    data = as_rank(text_data(stream), 0, 1, global_step=1)
    place = Place(0, 9, 1, 2, 10**6)._asdict()
    data.load_state_dict({"step": 1, "tokens": 64, "stream": {"n_shards": 1, "seed": 0, "places": [place]}})
    ends, following = read_from(data, place)
    assert first_batches(data.train_dataloader(), 1).flatten()[:11].tolist() == [ends, *following[:10]]


def read_from(data: TextData, place: dict[str, int]) -> tuple[int, list[int]]:
    """<|endoftext|>, and the tokens of the document after the one at a place."""
    documents = data.train_dataloader().dataset.documents.read(Place(**place))
    return data.tokenizer.eos_id, data.tokenizer.encode(list(itertools.islice(documents, 2))[1][1])


def gather(rank: int, folder: str, results) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    results.put((rank, of_all_ranks(Place(rank, 1, 2, 3, 4), 2)))
    torch.distributed.destroy_process_group()


def test_a_checkpoint_has_the_places_of_all_ranks(tmp_path):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=gather, args=(rank, str(tmp_path), results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    both = [Place(0, 1, 2, 3, 4), Place(1, 1, 2, 3, 4)]
    assert sorted(results.get(timeout=60) for _ in processes) == [(0, both), (1, both)]
