"""What loaders are about to read: pure, with a clock of the test's own."""

from __future__ import annotations

from obsfs.access.loaders import Loads, companions, shards
from obsfs.store.types import ObjectInfo
from obsfs.vfs.listings import Entry

WEIGHTS = "model-00001-of-00002.safetensors"


class Setup:
    def __init__(self, available: int) -> None:
        self.now = 100.0
        self.loads = Loads(lambda: available, lambda: self.now)


def test_weights_are_read_whole_after_their_config() -> None:
    setup = Setup(available=4000)
    assert setup.loads.take(7, WEIGHTS, 600) == 0, "whoever opens weights alone may want one tensor of them"
    setup.loads.on_open(7, "vocab.json")
    assert not setup.loads.is_loading(7)
    setup.loads.on_open(7, "config.json")
    assert setup.loads.is_loading(7)
    assert setup.loads.take(7, "vocab.json", 10) == 0
    assert setup.loads.take(7, WEIGHTS, 600) == 600
    assert setup.loads.take(8, WEIGHTS, 600) == 0, "another directory"


def test_no_more_is_read_than_a_quarter_of_the_memory() -> None:
    setup = Setup(available=4000)
    setup.loads.on_open(7, "config.json")
    assert [setup.loads.take(7, WEIGHTS, 600) for _ in range(3)] == [600, 400, 0]


def test_a_load_is_over_after_a_while() -> None:
    setup = Setup(available=4000)
    setup.loads.on_open(7, "config.json")
    setup.now += 29
    assert setup.loads.take(7, WEIGHTS, 600) == 600
    setup.now += 2
    assert setup.loads.take(7, WEIGHTS, 100) == 0
    assert not setup.loads.is_loading(7)


def listing(*names: str, size: int = 1000) -> dict[str, Entry]:
    return {name: Entry(name, ObjectInfo(f"models/m/{name}", size, 0.0, '"e"')) for name in names}


def names(found: list[ObjectInfo]) -> list[str]:
    return [info.key.rpartition("/")[2] for info in found]


def test_who_opens_the_config_is_about_to_read_the_small_files_and_the_headers() -> None:
    small = listing("config.json", "tokenizer.json", "model.safetensors.index.json")
    large = listing("pytorch_model.bin", WEIGHTS, size=1 << 30)
    entries = {**small, **large, "onnx": Entry("onnx", None)}
    expected = ["tokenizer.json", "model.safetensors.index.json", WEIGHTS]
    assert names(companions("config.json", entries)) == expected
    assert companions("tokenizer.json", entries) == []
    many = listing("config.json", *(f"{n}.json" for n in range(1000)))
    assert len(companions("config.json", many)) == 32


def test_who_opens_an_index_is_about_to_load_its_shards() -> None:
    shards_of_both = ("model.fp16-00001-of-00001.safetensors", "model-00002-of-00002.safetensors", WEIGHTS)
    entries = listing("model.safetensors.index.json", "model.fp16.safetensors.index.json", *shards_of_both)
    assert set(names(shards("model.safetensors.index.json", entries))) == set(shards_of_both[1:])
    assert names(shards("model.fp16.safetensors.index.json", entries)) == list(shards_of_both[:1])
    assert shards("config.json", entries) == []
