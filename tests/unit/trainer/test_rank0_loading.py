"""No rank holds a model that is to be sharded: what it needs beside its shard does not grow with the model."""

from pathlib import Path

from benchmarks.rank0_loading import MIB, make_model, run_ranks


def test_what_a_rank_needs_beside_its_shard_does_not_grow_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    small = run_ranks(make_model(tmp_path / "small", 8), "sharded")
    large = run_ranks(make_model(tmp_path / "large", 32), "sharded")
    grown = 4 * (large[0].parameters - small[0].parameters)
    assert grown > 64 * MIB
    for before, after in zip(small, large, strict=True):
        assert after.held * 2 == 4 * after.parameters
        assert after.besides - before.besides < grown / 8
