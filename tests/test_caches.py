"""Cache sizes, as the system tells of them."""

import pytest

from etcompile.lowering import caches


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A way to have the system tell of caches: level, kind, size."""
    caches.shared_cache.cache_clear()
    monkeypatch.setattr(caches, "_FOLDER", tmp_path)

    def tell(*found):
        for k, one in enumerate(found):
            folder = tmp_path / f"index{k}"
            folder.mkdir()
            for name, text in zip(("level", "type", "size"), one, strict=True):
                (folder / name).write_text(f"{text}\n")

    yield tell
    caches.shared_cache.cache_clear()


FIRST = ("1", "Data", "32K"), ("1", "Instruction", "32K")


def test_the_last_level_counts(told):
    told(*FIRST, ("2", "Unified", "512K"), ("3", "Unified", "8M"))
    assert caches.caches() == {2: 512 << 10, 3: 8 << 20}
    assert caches.shared_cache() == 8 << 20


def test_of_a_cache_that_others_share_a_part_counts(told):
    told(*FIRST, ("2", "Unified", "2048K"), ("3", "Unified", "266240K"))
    assert caches.shared_cache() == 32 << 20


def test_a_system_that_does_not_tell(told, tmp_path):
    assert caches.caches() == {} and caches.shared_cache() == 32 << 20
    (tmp_path / "index0").mkdir()
    assert caches.caches() == {}
