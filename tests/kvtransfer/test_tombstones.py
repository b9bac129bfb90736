from kvtransfer.tombstones import Tombstones


def test_remembers_for_a_while() -> None:
    stones: Tombstones[int, str] = Tombstones(60.0)
    stones.add(1, "one", 0.0)
    stones.add(2, "two", 30.0)
    stones.add(1, "again", 40.0)
    stones.expire(89.0)
    assert (stones.get(1), stones.get(2), stones.get(3)) == ("again", "two", None)
    stones.expire(90.0)
    assert (stones.get(1), stones.get(2), len(stones)) == ("again", None, 1)
    stones.expire(100.0)
    assert len(stones) == 0


def test_is_bounded() -> None:
    stones: Tombstones[int, int] = Tombstones(60.0, limit=3)
    for key in range(5):
        stones.add(key, key, 0.0)
    assert [stones.get(key) for key in range(5)] == [None, None, 2, 3, 4]
