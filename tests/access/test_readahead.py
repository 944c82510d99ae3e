"""The policy is pure, so what it promises is checked for any file and any way of reading."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.access.readahead import Credit, LoadOrder, ReadAhead
from obsfs.access.safetensors import Extent, extent_ends, natural_sort_key
from obsfs.blocks import BLOCK

WINDOW = 256


def wanted(policy: ReadAhead, first: int, last: int) -> set[int]:
    return {position for _, position in policy.on_read(first, last)}


@given(
    blocks=st.integers(1, 5000),
    window=st.integers(0, 512),
    reads=st.lists(st.tuples(st.integers(0, 4999), st.integers(1, 8)), max_size=100),
    extent_ends=st.lists(st.integers(1, 5000), max_size=50),
)
def test_it_wants_what_exists_and_no_more_than_its_window(
    blocks: int, window: int, reads: list[tuple[int, int]], extent_ends: list[int]
) -> None:
    policy = ReadAhead(blocks, window, extent_ends=sorted({end for end in extent_ends if end <= blocks}))
    for start, count in reads:
        first = start % blocks
        last = min(first + count, blocks) - 1
        ahead = [position for _, position in policy.on_read(first, last) if position > last]
        assert all(0 <= position < blocks for position in ahead)
        assert len(ahead) <= max(window, 0) + 64


@given(blocks=st.integers(600, 4000), step=st.integers(1, 8))
def test_one_sequential_reader_gets_the_whole_window_and_each_block_once(blocks: int, step: int) -> None:
    policy = ReadAhead(blocks, WINDOW)
    seen: list[int] = []
    furthest = 0
    for first in range(0, blocks, step):
        last = min(first + step, blocks) - 1
        seen += wanted(policy, first, last)
        furthest = max(furthest, max(seen, default=0) - last)
    assert len(seen) == len(set(seen))
    assert furthest >= WINDOW - step - 8
    assert set(range(2 * step, blocks)) <= set(seen)


@given(first=st.integers(0, 7))
def test_far_ahead_a_window_grows_by_groups(first: int) -> None:
    """Block by block, each would be a request of its own wherever a connection is idle."""
    policy = ReadAhead(4000, WINDOW)
    for block in range(first, 300):
        policy.on_read(block, block)
    found = [wanted(policy, block, block) for block in range(300, 380)]
    assert {len(positions) for positions in found} == {0, 8}
    assert all(min(positions) % 8 == 0 for positions in found if positions)


def test_random_readers_get_little() -> None:
    extra = []
    for seed in range(300):
        rng = random.Random(seed)
        policy = ReadAhead(100_000, WINDOW)
        extra.append(sum(len(wanted(policy, block, block)) for block in (rng.randrange(100_000) for _ in range(500))))
    assert max(extra) <= 30, "now and then two of 500 reads lie side by side and look like a stream"
    assert sum(extra) / len(extra) <= 5


@given(seed=st.integers(0, 1000))
def test_jumping_about_after_a_long_scan_soon_gets_little(seed: int) -> None:
    rng = random.Random(seed)
    policy = ReadAhead(100_000, WINDOW)
    for block in range(4000):
        policy.on_read(block, block)
    jumps = [len(wanted(policy, block, block)) for block in (rng.randrange(5000, 100_000) for _ in range(300))]
    assert sum(jumps) <= 3 * WINDOW
    assert sum(jumps[100:]) <= WINDOW


@given(threads=st.integers(2, 8), seed=st.integers(0, 100))
def test_interleaved_streams_run_as_one_would(threads: int, seed: int) -> None:
    """Loaders read one descriptor from several threads: each is sequential, their sum is not."""
    rng = random.Random(seed)
    policy = ReadAhead(8000, WINDOW)
    region = 8000 // threads
    at = [thread * region for thread in range(threads)]
    had: set[int] = set()
    late = 0
    for _ in range(400 * threads):
        thread = rng.randrange(threads)
        if at[thread] < (thread + 1) * region:
            late += at[thread] not in had
            had |= wanted(policy, at[thread], at[thread])
            at[thread] += 1
    assert late <= 10 * threads


def test_the_kernels_own_read_ahead_arrives_out_of_order() -> None:
    policy = ReadAhead(1000, WINDOW)
    had: set[int] = set()
    late = 0
    for start in range(0, 1000, 4):
        for block in (start + 1, start, start + 3, start + 2):
            late += block not in had
            had |= wanted(policy, block, block)
    assert late <= 12


@given(tensor=st.integers(0, 39), size=st.integers(2, 64), around=st.integers(0, 1))
def test_one_tensor_is_given_whole_and_nothing_beyond(tensor: int, size: int, around: int) -> None:
    """Also when the kernel reads around the first page, and so begins in the tensor before. Who begins with the first
    one may be about to copy the file: that comes with as much behind it as the kernel would read ahead."""
    policy = ReadAhead(40 * size, WINDOW, extent_ends=[size * (n + 1) for n in range(40)])
    had: set[int] = set()
    around *= size > 2 and tensor > 0
    for block in range(tensor * size - around, (tensor + 1) * size):
        had |= wanted(policy, block, block) | {block}
    behind = 3 if tensor == 0 else 0
    assert had == set(range(tensor * size - around, (tensor + 1) * size + behind))


def test_a_tensor_comes_with_its_second_read() -> None:
    policy = ReadAhead(400, WINDOW, extent_ends=[8 * n + 1 for n in range(1, 50)])
    assert wanted(policy, 79, 79) == set()
    assert wanted(policy, 80, 80) == set(range(81, 89)), "the tensor goes from the end of block 80 to that of block 88"


def test_who_reads_from_the_first_tensor_on_reads_all() -> None:
    policy = ReadAhead(400, WINDOW, extent_ends=[8 * n for n in range(1, 51)])
    had: set[int] = set()
    late = 0
    for block in range(400):
        late += block not in had
        had |= wanted(policy, block, block)
    assert late <= 2


def test_a_loader_that_looks_at_the_start_of_each_tensor_is_one_stream() -> None:
    size, count = 32, 60
    policy = ReadAhead(size * count, WINDOW, extent_ends=[size * (n + 1) for n in range(count)])
    had: set[int] = set()
    late = 0
    for tensor in range(count):
        late += tensor * size not in had
        had |= wanted(policy, tensor * size, tensor * size + 1)
    assert late <= 6
    assert len(had) >= size * (count - 8)


def shard(*layers: int, size: int = 20) -> list[Extent]:
    """Layers of so many blocks each, in this order."""
    return [Extent(f"layers.{n}", at * size * BLOCK, (at + 1) * size * BLOCK) for at, n in enumerate(layers)]


def test_a_load_is_one_stream_in_its_own_order_through_all_shards() -> None:
    policy = LoadOrder(WINDOW, Credit())
    assert policy.add("one", shard(0, 10, 1, 2, 11, 3))
    assert policy.add("two", shard(9, 8, 7, 6, 5, 4))
    layers = {("one", n): at for at, n in enumerate((0, 10, 1, 2, 11, 3))}
    layers |= {("two", n): at for at, n in enumerate((9, 8, 7, 6, 5, 4))}
    had: set[tuple[str, int]] = set()
    late = 0
    for (file, _), at in sorted(layers.items(), key=lambda item: item[0][1]):
        for block in range(20 * at, 20 * at + 20):
            late += (file, block) not in had
            had |= {(name, number) for _, name, number in policy.on_read(file, block, block)}
    assert late <= 20, "no jump is a jump for a loader"
    assert had <= {(file, block) for file in ("one", "two") for block in range(120)}
    assert len(had) >= 220


def test_a_load_that_begins_has_its_first_blocks_and_goes_on() -> None:
    policy = LoadOrder(WINDOW, Credit())
    policy.add("two", shard(2, 3))
    policy.add("one", shard(0, 1))
    begun = policy.begin(30)
    assert [(name, block) for _, name, block in begun] == [("one", block) for block in range(30)]
    ahead = policy.on_read("one", 0, 0)
    assert ahead[0][1:] == ("one", 30), "what is wanted is not wanted twice"
    policy.add("one", shard(0, 1))
    assert len(policy.begin(1000)) == 80


def test_too_much_to_watch_as_one_model() -> None:
    policy = LoadOrder(WINDOW, Credit())
    assert policy.add("one", [Extent("layers.0", 0, 100 << 30)]), "a file alone is always watched"
    assert not policy.add("two", [Extent("layers.1", 0, 1 << 30)])
    assert policy.on_read("two", 0, 0) == []


def test_what_was_dropped_is_wanted_again() -> None:
    policy = ReadAhead(1000, WINDOW)
    first = [wanted(policy, block, block) for block in range(40)]
    assert any(first)
    policy.forget_wanted()
    assert 41 in wanted(policy, 40, 40)


def cost(policy: ReadAhead, reads: Iterable[tuple[int, int]]) -> tuple[set[int], set[int], int]:
    """What was touched, what was fetched, and how many reads had to wait."""
    touched: set[int] = set()
    fetched: set[int] = set()
    late = 0
    for first, last in reads:
        touched |= set(range(first, last + 1))
        late += not touched & set(range(first, last + 1)) <= fetched
        fetched |= set(range(first, last + 1)) | wanted(policy, first, last)
    return touched, fetched, late


def strided(start: int, stride: float, size: float, end: int) -> Iterator[tuple[int, int]]:
    """Blocks that reads of `size` MiB at each `stride` MiB touch."""
    at = float(start)
    while at + size < end:
        yield int(at), int(at + size)
        at += stride


@given(
    start=st.integers(0, 40),
    stride=st.floats(1, 16),
    size=st.floats(1 / 256, 2),
    count=st.integers(1, 300),
    cheap_gap=st.integers(0, 8),
    footer=st.booleans(),
)
def test_strided_readers_fetch_at_most_twice_what_they_touch(
    start: int, stride: float, size: float, count: int, cheap_gap: int, footer: bool
) -> None:
    policy = ReadAhead(5000, WINDOW, cheap_gap=cheap_gap)
    reads = [*([(4999, 4999)] * footer), *list(strided(start, max(stride, size), size, 4900))[:count]]
    touched, fetched, _ = cost(policy, reads)
    if len(touched) < (max(touched - {4999}, default=0) - start) * 0.9:
        assert len(fetched) <= 2 * len(touched) + 4


@given(
    chunk=st.integers(1, 80),
    gap=st.integers(1, 300),
    column=st.integers(0, 50),
    groups=st.integers(1, 40),
    order=st.permutations(range(4)),
    cheap_gap=st.integers(0, 8),
)
def test_one_column_of_many_row_groups_costs_at_most_twice_its_bytes(
    chunk: int, gap: int, column: int, groups: int, order: list[int], cheap_gap: int
) -> None:
    """After the footer, with the blocks of each four in any order, as the kernel's read-ahead brings them."""
    size = column + groups * (chunk + gap) + 100
    policy = ReadAhead(size, WINDOW, cheap_gap=cheap_gap)
    reads = [size - 1]
    for group in range(groups):
        at = column + group * (chunk + gap)
        reads += [at + base + off for base in range(0, chunk, 4) for off in order if base + off < chunk]
    touched, fetched, _ = cost(policy, ((block, block) for block in reads))
    assert len(fetched) <= 2 * len(touched) + 4


@given(start=st.integers(0, 300), size=st.integers(1, 200), looks=st.lists(st.integers(0, 999), max_size=30))
def test_one_part_of_a_zip_file_costs_at_most_twice_its_bytes(start: int, size: int, looks: list[int]) -> None:
    """As torch.load(mmap=True) reads: the start, the directory at the end, a header here and there; then one tensor."""
    policy = ReadAhead(1000, WINDOW)
    reads = [0, 999, *(min(look * 7 % 1000, 999) for look in looks), *range(start, min(start + size, 1000))]
    touched, fetched, _ = cost(policy, ((block, block) for block in reads))
    assert len(fetched) <= 2 * len(touched) + 4


@given(
    start=st.integers(0, 40),
    reorder=st.integers(1, 4),
    seed=st.integers(0, 1000),
    footer=st.booleans(),
    cheap_gap=st.integers(0, 8),
)
def test_who_reads_all_stays_ahead_though_reads_come_out_of_order(
    start: int, reorder: int, seed: int, footer: bool, cheap_gap: int
) -> None:
    dice = random.Random(seed)
    blocks = sorted(range(start, 1500), key=lambda block: block + dice.random() * reorder)
    policy = ReadAhead(1500, WINDOW, cheap_gap=cheap_gap)
    _, fetched, late = cost(policy, [*([(1499, 1499)] * footer), *((block, block) for block in blocks)])
    assert late <= 16 + footer
    assert fetched >= set(range(start, 1500))


@given(streams=st.integers(2, 8), stride=st.integers(2, 16), seed=st.integers(0, 100))
def test_strided_streams_side_by_side_fetch_at_most_twice_what_they_touch(streams: int, stride: int, seed: int) -> None:
    dice = random.Random(seed)
    at = [1000 * number + dice.randrange(50) for number in range(streams)]
    reads = []
    for _ in range(60 * streams):
        number = dice.randrange(streams)
        reads.append((at[number], at[number]))
        at[number] += stride
    touched, fetched, _ = cost(ReadAhead(20_000, WINDOW), reads)
    assert len(fetched) <= 2 * len(touched) + 4 * streams


def test_gaps_that_are_cheap_are_fetched_on_the_way() -> None:
    """Three of four blocks: to ask for each part anew would wait for an answer each time."""
    reads = [(block, block) for block in range(100, 1000) if block % 4]
    touched, fetched, late = cost(ReadAhead(2000, WINDOW, cheap_gap=2), reads)
    assert late <= 8
    assert len(fetched) <= 2 * len(touched) + 4


def test_a_reader_that_stops_skipping_has_its_window_again() -> None:
    policy = ReadAhead(8000, WINDOW)
    cost(policy, ((block, block) for block in range(100, 700, 6)))
    _, _, late = cost(policy, ((block, block) for block in range(700, 2000)))
    assert late <= 20


def tensors(sizes: Iterable[int]) -> list[Extent]:
    """Layers of so many bytes each, as transformers writes them: in lexicographic order, after a header."""
    lengths = list(sizes)
    at, found = 9000, []
    for name, size in zip(sorted(f"layers.{n}" for n in range(len(lengths))), lengths, strict=True):
        found.append(Extent(name, at, at + size))
        at += size
    return found


def blocks_of(chosen: Iterable[Extent], step: int = 1) -> Iterator[tuple[int, int]]:
    for extent in chosen:
        stop = -(-extent.stop // BLOCK)
        for block in range(extent.start // BLOCK, stop, step):
            yield block, min(block + step, stop) - 1


class Loading:
    """A file that is watched in its own order and in a loader's, after its header has been read."""

    def __init__(self, file: list[Extent]) -> None:
        self.ahead = LoadOrder(WINDOW, Credit())
        assert self.ahead.add("f", file)
        ends = extent_ends(file, BLOCK)
        self.policy = ReadAhead(ends[-1], WINDOW, extent_ends=ends)
        self.touched, self.fetched, self.late = {0}, {0}, 0

    def read(self, first: int, last: int) -> None:
        blocks = set(range(first, last + 1))
        self.touched |= blocks
        self.late += not blocks <= self.fetched
        self.fetched |= blocks | wanted(self.policy, first, last)
        self.fetched |= {block for _, _, block in self.ahead.on_read("f", first, last)}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("is_natural", [False, True])
@pytest.mark.parametrize("every", [2, 3, 4, 7, 9])
def test_who_leaves_tensors_out_fetches_at_most_twice_what_is_touched(
    every: int, is_natural: bool, mixed: bool
) -> None:
    """Every third tensor, in the order of the file or of their names, of small files and large ones."""
    touched = fetched = 0
    for kib in (700, 1024, 2500, 4000, 20_000):
        for count in (30, 100, 200):
            dice = random.Random(count)
            file = tensors(int(kib * 1024 * (dice.choice([0.1, 0.1, 1, 2]) if mixed else 1)) for _ in range(count))
            order = sorted(file, key=lambda extent: natural_sort_key(extent.name)) if is_natural else file
            loading = Loading(file)
            for first, last in blocks_of(order[1::every], 1 + count % 3):
                loading.read(first, last)
            touched += len(loading.touched)
            fetched += len(loading.fetched)
            # Now and then the ends of three small tensors lie as if a load began.
            assert len(loading.fetched) <= 2.5 * len(loading.touched) + 4
    assert fetched <= 2 * touched


@given(count=st.integers(10, 200), kib=st.integers(64, 6000), seed=st.integers(0, 1000), many=st.integers(1, 12))
def test_tensors_picked_at_random_cost_at_most_twice_their_bytes(count: int, kib: int, seed: int, many: int) -> None:
    file = tensors([kib * 1024] * count)
    loading = Loading(file)
    for first, last in blocks_of(random.Random(seed).sample(file, min(many, count // 2))):
        loading.read(first, last)
    # A run of three by chance begins as a load does.
    assert len(loading.fetched) <= 2 * len(loading.touched) + 4 + 16


@given(threads=st.integers(1, 8), seed=st.integers(0, 1000), is_natural=st.booleans(), left_out=st.integers(0, 99))
def test_who_loads_all_tensors_waits_for_few(threads: int, seed: int, is_natural: bool, left_out: int) -> None:
    """By several threads, each of which takes the next tensor when it has read one; also but for one tensor."""
    dice = random.Random(seed)
    file = tensors(int(dice.choice([0.01, 0.5, 1, 4, 9]) * BLOCK) for _ in range(100))
    order = sorted(file, key=lambda extent: natural_sort_key(extent.name)) if is_natural else list(file)
    del order[left_out]
    loading = Loading(file)
    tasks = iter([list(blocks_of([extent])) for extent in order])
    active = [next(tasks) for _ in range(threads)]
    while active:
        task = dice.choice(active)
        loading.read(*task.pop(0))
        if not task:
            active.remove(task)
            active += [another for another in [next(tasks, None)] if another]
    assert loading.late <= 24 + 4 * threads
    assert loading.fetched >= loading.touched
