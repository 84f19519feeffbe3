"""The queue of shards against a plain list that is searched from the front."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster.shards import Piece, PieceQueue, Shard

WORKERS = 4


class PlainQueue:
    """Every piece with the worker that had its shard when the piece was put here."""

    def __init__(self, pieces: list[Piece], home: dict[int, int]) -> None:
        self.home = home
        self.waiting = [(home.get(piece.shard.index), piece) for piece in pieces]

    def put_back(self, *pieces: Piece) -> None:
        self.waiting[:0] = [(self.home.get(piece.shard.index), piece) for piece in pieces]

    def take(self, idle: set[int], first: int) -> tuple[int, Piece]:
        order = [worker for worker in [*range(first, WORKERS), *range(first)] if worker in idle]
        for worker in order:
            for place, (home, _) in enumerate(self.waiting):
                if home in (worker, None):
                    return self._give(worker, place)
        return self._give(order[0], 0)

    def _give(self, worker: int, place: int) -> tuple[int, Piece]:
        _, piece = self.waiting.pop(place)
        self.home[piece.shard.index] = worker
        return worker, piece


def _pieces(count: int) -> list[Piece]:
    return [Piece(Shard(index, (index,)), 0, (index,)) for index in range(count)]


IDLE = st.sets(st.integers(0, WORKERS - 1), min_size=1)
STEPS = st.lists(st.tuples(IDLE, st.integers(0, 2), st.integers(0, WORKERS - 1)), max_size=40)
HOMES = st.dictionaries(st.integers(0, 11), st.integers(0, WORKERS - 1))


@given(count=st.integers(0, 12), home=HOMES, steps=STEPS)
def test_gives_out_what_the_plain_list_does(
    count: int, home: dict[int, int], steps: list[tuple[set[int], int, int]]
) -> None:
    """Some pieces come back whole, some in two halves, as after a loss or a failure."""
    queue, plain = PieceQueue(_pieces(count), dict(home)), PlainQueue(_pieces(count), dict(home))
    for idle, halves, first in steps:
        assert len(queue) == len(plain.waiting)
        if not queue:
            break
        taken = queue.take(idle, first)
        assert taken == plain.take(idle, first)
        back = [Piece(taken[1].shard, half, (half,), retries=1) for half in range(halves)]
        queue.put_back(*back)
        plain.put_back(*back)


def test_a_shard_goes_back_to_the_worker_that_had_it() -> None:
    home: dict[int, int] = {}
    first = PieceQueue(_pieces(3), home)
    assert [first.take({worker})[1].shard.index for worker in (2, 0, 1)] == [0, 1, 2]
    again = PieceQueue(_pieces(3), home)
    assert again.take({0, 1, 2}) == (0, _pieces(3)[1])
    assert again.take({2}) == (2, _pieces(3)[0])
    # Nobody is at home: the first that waits goes to whoever is free.
    assert again.take({0}) == (0, _pieces(3)[2]) and home == {0: 2, 1: 0, 2: 0}
    assert not again
