"""Ids are unique and storable, texts are storable, and nothing else of a product changes."""

import json
import time
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from jaxclip.catalog import ids, mend
from jaxclip.catalog.product import Oddity, Product

ANY_TEXT = st.text(st.characters(codec=None), max_size=8)
ODD_IDS = st.lists(st.sampled_from(["a", "a-2", "a-3", "a-2-2", "a-02", "-2", "", "A", "007", "7"]), max_size=30)


def test_the_first_product_keeps_its_id_and_no_existing_id_is_hit():
    assert ids.unique(["a", "a", "a-3", "a", "b", "a-2", "a"]) == ["a", "a-4", "a-3", "a-5", "b", "a-2", "a-6"]


@given(ODD_IDS)
def test_ids_become_unique_and_an_id_that_occurs_once_never_changes(given_ids):
    result = ids.unique(given_ids)
    assert len(set(result)) == len(result) == len(given_ids)
    counts, first = Counter(given_ids), set()
    for id_, name in zip(given_ids, result, strict=True):
        assert name == id_ if counts[id_] == 1 or id_ not in first else name not in counts
        first.add(id_)


def test_numbering_one_id_many_times_does_not_start_anew_each_time():
    begin = time.perf_counter()
    result = ids.unique(["a"] * 50_000 + [f"a-{n}" for n in range(50_000)])
    assert len(set(result)) == 100_000
    assert time.perf_counter() - begin < 10, "a count from 2 for each would take minutes"


@given(ANY_TEXT)
def test_a_clean_text_can_be_stored_and_keeps_every_other_character(text):
    cleaned = ids.clean(text)
    cleaned.encode()
    assert "\0" not in cleaned and len(cleaned) == len(text)
    assert all(new in (old, "\ufffd") for old, new in zip(text, cleaned, strict=True))
    assert ids.clean(cleaned) == cleaned


def test_slashes_backslashes_case_and_zeros_of_an_id_are_kept():
    written = ["007", "7", "a\\b", "a/b", "A/b", " a  b ", "a.jpg", "é", "e\u0301", "😀"]
    assert [ids.clean(id_) for id_ in written] == written == ids.unique(written)


def test_names_of_other_bytes_become_ids_that_are_numbered():
    names = [name.decode("utf-8", errors="surrogateescape") for name in (b"caf\xe9", b"caf\xe8", b"caf\xc3\xa9")]
    assert ids.unique([ids.clean(name) for name in names]) == ["caf\ufffd", "caf\ufffd-2", "café"]


@given(
    st.builds(
        Product,
        ANY_TEXT,
        st.just(()),
        st.lists(ANY_TEXT).map(tuple),
        ANY_TEXT,
        st.dictionaries(ANY_TEXT, ANY_TEXT),
        ANY_TEXT,
    )
)
def test_every_text_of_a_mended_product_can_be_stored_and_no_attribute_is_lost(product):
    mended, kinds = mend.mended(product)
    texts = [
        mended.id,
        mended.category,
        mended.group,
        *mended.captions,
        *mended.attributes,
        *mended.attributes.values(),
    ]
    json.dumps(texts, ensure_ascii=False).encode()
    assert not any("\0" in text for text in texts)
    assert len(mended.attributes) == len(product.attributes)
    assert (mended == product) == (not kinds) and mend.mended(mended) == (mended, ())


def test_what_was_mended_is_counted_by_its_kind():
    product = Product(
        "caf\udce9", (), ("a\0b", "a\ufffdb"), "x", dict([("\ud800", "1"), ("\udfff", "2")]), "g\ud800", ("query",)
    )
    mended, kinds = mend.mended(product)
    assert mended == Product(
        "caf\ufffd", (), ("a\ufffdb",), "x", {"\ufffd": "1", "\ufffd-2": "2"}, "g\\ud800", ("query",)
    )
    assert kinds == ("broken UTF-8", "NUL character")
    assert mend.mended(Product("1", (), ("a\0b",)))[1] == ("NUL character",)


def test_groups_of_articles_with_other_odd_characters_stay_apart():
    groups = [
        mend.mended(Product("1", (), (), group=f"a{odd}"))[0].group for odd in ("\ud800", "\ud801", "\0", "\ufffd")
    ]
    assert len(set(groups)) == 4


def test_a_mended_product_is_the_same_object_if_nothing_is_odd_and_its_oddities_follow_it():
    plain, odd = Product("1", (), ("café",)), Product("2\udce9", (), ())
    rows = list(mend.rows([plain, Oddity("x\udce9.txt", "kind", True), odd]))
    assert rows[0] is plain
    assert rows[1:] == [
        Oddity("x\ufffd.txt", "kind", True),
        Product("2\ufffd", (), ()),
        Oddity("2\ufffd", "broken UTF-8", False),
    ]
