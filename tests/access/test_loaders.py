"""What loaders are about to read: pure, with a clock of the test's own."""

from __future__ import annotations

from obsfs.access.loaders import Files, LoadTracker, companions, model_of, shards

WEIGHTS = "model-00001-of-00002.safetensors"


class Setup:
    def __init__(self, available: int) -> None:
        self.now = 100.0
        self.loads = LoadTracker(lambda: available, lambda: self.now)


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


def files(*names: str, size: int = 1000) -> Files:
    return lambda: [(name, size) for name in names]


def test_opening_the_config_announces_the_small_files_and_the_headers() -> None:
    small = files("config.json", "tokenizer.json", "model.safetensors.index.json")
    large = files("pytorch_model.bin", WEIGHTS, size=1 << 30)

    def both() -> list[tuple[str, int]]:
        return [*small(), *large()]

    assert companions("config.json", both) == ["tokenizer.json", "model.safetensors.index.json", WEIGHTS]
    assert companions("tokenizer.json", both) == []
    many = files("config.json", *(f"{n}.json" for n in range(1000)))
    assert len(companions("config.json", many)) == 32


def test_opening_an_index_announces_its_shards() -> None:
    shards_of_both = ("model.fp16-00001-of-00001.safetensors", "model-00002-of-00002.safetensors", WEIGHTS)
    listed = files("model.safetensors.index.json", "model.fp16.safetensors.index.json", *shards_of_both)
    assert set(shards("model.safetensors.index.json", listed)) == set(shards_of_both[1:])
    assert shards("model.fp16.safetensors.index.json", listed) == list(shards_of_both[:1])
    assert shards("config.json", listed) == []


def test_a_directory_is_not_looked_through_for_other_files() -> None:
    """It may have 100,000 names, and each of them may be opened."""

    def never() -> list[tuple[str, int]]:
        raise AssertionError

    setup = Setup(available=4000)
    setup.loads.on_open(7, "config.json")
    for name in ("a.bin", WEIGHTS, "config.json.bak"):
        assert companions(name, never) == shards(name, never) == []
        assert setup.loads.hints(7, name, never) == ([], [])


def test_an_index_alone_announces_no_shards() -> None:
    """Its reader may want one tensor. After the config, it is a load."""
    setup = Setup(available=4000)
    listed = files("config.json", "model.safetensors.index.json", WEIGHTS)
    assert setup.loads.hints("m", "model.safetensors.index.json", listed) == ([], [])
    setup.loads.on_open("m", "config.json")
    assert setup.loads.hints("m", "config.json", listed).starts == ["model.safetensors.index.json", WEIGHTS]
    assert setup.loads.hints("m", "model.safetensors.index.json", listed) == ([], [WEIGHTS])
    assert setup.loads.hints("other", "model.safetensors.index.json", listed).shards == []
    setup.now += 31
    assert setup.loads.hints("m", "model.safetensors.index.json", listed).shards == []


def test_shards_of_one_model_have_one_name() -> None:
    assert model_of("m/model-00001-of-00003.safetensors") == model_of("m/model-00003-of-00003.safetensors")
    assert model_of("m/model-00001-of-00003.safetensors") != model_of("m/model-00001-of-00002.safetensors")
    assert model_of("a/model-00001-of-00003.safetensors") != model_of("b/model-00001-of-00003.safetensors")
    assert model_of("m/model.safetensors") != model_of("m/model.fp16.safetensors")
