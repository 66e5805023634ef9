"""What tokenises: offsets stand for the text they say, and a control token's text in a row stays text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from finetune.base import Base, read_base
from finetune.data.encoder import Encoder, Encoding, goes_backwards
from finetune.data.template import Rendered
from finetune.errors import UserError
from tests.data.conftest import base_around

NAMES = ["pocket", "llama2", "mistral", "llama3.2-instruct"]
REAL = [pytest.param(name, marks=[] if name == "pocket" else pytest.mark.real) for name in NAMES]
ODD_TEXTS = [
    "",
    " ",
    "\n",
    " a  b\t",
    "日本 語",
    "👍🏽 x👨‍👩‍👧",
    "e\u0301 é",
    "a\0b",
    "\u200b\ufeffz",
    "<0x0A> ▁ Ġ",
    "\U00100000",
]
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
POCKET = read_base("builtin:pocket-llama")
ENCODER = Encoder(POCKET)
REFERENCE = Tokenizer.from_str(POCKET.tokenizer.to_str())
REFERENCE.encode_special_tokens = True


@pytest.fixture(scope="session")
def encoder_of(real_base: Callable[[str], Base]) -> Callable[[str], Encoder]:
    known: dict[str, Encoder] = {"pocket": ENCODER}

    def get(name: str) -> Encoder:
        if name not in known:
            known[name] = Encoder(real_base(name))
        return known[name]

    return get


@pytest.fixture(scope="session")
def real_texts(shared: Path) -> list[str]:
    """Real rows as they stand in the files, 40 of each."""
    files = [shared / "alpaca" / "alpaca_en_demo.json", *sorted((shared / "chat").iterdir())]
    rows = []
    for file in files:
        text = file.read_text()
        rows += ([json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text))[:40]
    return [json.dumps(row, ensure_ascii=False, indent=1) for row in rows]


def one(encoder: Encoder, text: str, literals: Sequence[tuple[int, int]] = ()) -> Encoding:
    (encoding,) = encoder.encode([Rendered(text, (), tuple(literals))])
    return encoding


def walked(pieces: Sequence[bytes], text: str, *, dummy: bytes) -> list[tuple[int, int]]:
    """The character range of every piece, by counting the bytes of the text; a dummy space stands nowhere."""
    encoded, ranges, at = text.encode(), [], 0
    character_of = [index for index, character in enumerate(text) for _ in character.encode()]
    for piece in pieces:
        if not encoded.startswith(piece, at) and dummy and piece.startswith(dummy):
            piece = piece.removeprefix(dummy)
        assert encoded.startswith(piece, at), (piece, encoded[at : at + 20])
        # A lone dummy space takes the range of the character it was put before.
        ranges.append((character_of[at], character_of[max(at + len(piece) - 1, at)] + 1))
        at += len(piece)
    assert at == len(encoded)
    return ranges


def bytes_of(token: str, *, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(BYTE_OF[character] for character in token)
    if token.startswith("<0x") and len(token) == 6:
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


@pytest.mark.parametrize("name", REAL)
def test_offsets_are_what_counting_bytes_gives(
    encoder_of: Callable[[str], Encoder],
    oracle: Callable[[str], PreTrainedTokenizerBase],
    real_texts: list[str],
    name: str,
) -> None:
    """Also for tokens of half a character, and for those before and behind control tokens."""
    encoder, tokenizer = encoder_of(name), oracle(name)
    special = tokenizer.eos_token
    texts = [*real_texts, *ODD_TEXTS, *(f"{special}{odd}{special}{special} {odd}" for odd in ODD_TEXTS)]
    encodings = encoder.encode(texts)
    theirs = tokenizer([text for text in texts if text], add_special_tokens=False)["input_ids"]
    assert [encoding.ids.tolist() for encoding in encodings if len(encoding.ids)] == theirs
    byte_level = name in {"pocket", "llama3.2-instruct"}
    for text, encoding in zip(texts, encodings, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(encoding.ids.tolist())
        pieces = [x.encode() if x == special else bytes_of(x, byte_level=byte_level) for x in tokens]
        # To SentencePiece "▁" is a space.
        read = text if byte_level else text.replace("▁", " ")
        expected = walked(pieces, read, dummy=b"" if byte_level else b" ")
        assert [tuple(pair) for pair in encoding.offsets.tolist()] == expected
        assert encoding.ids.dtype == encoding.offsets.dtype == np.int32
        assert (np.diff(encoding.offsets, axis=0) >= 0).all()


ranges = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=4)


@given(st.lists(ranges, max_size=4))
def test_offsets_that_go_backwards_are_seen(texts: list[list[tuple[int, int]]]) -> None:
    """Within a text, not from one to the next. No tokenizer is known that does it; labels rely on that."""
    steps = [step for text in texts for step in pairwise(text)]
    expected = any(after[0] < before[0] or after[1] < before[1] for before, after in steps)
    flat = np.array([pair for text in texts for pair in text], np.int32).reshape(-1, 2)
    assert goes_backwards(flat, list(accumulate(map(len, texts), initial=0))) == expected


def test_a_post_processor_neither_trims_offsets_nor_adds_tokens(tmp_path: Path) -> None:
    """GPT-2's byte-level post-processor takes the space of " red" out of the token's offsets."""
    tokenizer = Tokenizer.from_str(POCKET.tokenizer.to_str())
    added = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), added])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    assert len(tokenizer.encode("a red").ids) == 9
    (encoding,) = Encoder(base_of(tokenizer, tmp_path)).encode(["a red a red"])
    assert encoding.offsets.tolist() == [[0, 1], [1, 5], [5, 7], [7, 11]]


# --- the text of a control token inside a row ---


@pytest.mark.parametrize("name", REAL)
def test_every_control_token_can_be_plain_text(
    encoder_of: Callable[[str], Encoder], oracle: Callable[[str], PreTrainedTokenizerBase], name: str
) -> None:
    """As text alone it is what the library makes of it when told to ignore all of them; the template's own stay."""
    encoder, tokenizer = encoder_of(name), oracle(name)
    reference = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    reference.encode_special_tokens = True
    assert len(encoder.special_texts) == {"pocket": 2, "llama2": 3, "mistral": 771, "llama3.2-instruct": 256}[name]
    for special in encoder.special_texts:
        number = tokenizer.convert_tokens_to_ids(special)
        text = f"say {special} or x{special}{special}"
        found = [(at, at + len(special)) for at in range(len(text)) if text.startswith(special, at)]
        plain = one(encoder, text, found)
        assert plain.ids.tolist() == reference.encode(text, add_special_tokens=False).ids
        assert encoder.special_ids.isdisjoint(plain.ids.tolist())
        assert tokenizer.decode(plain.ids, skip_special_tokens=False) == text
        for kept in range(3):  # one of the three is the template's
            mixed = one(encoder, text, found[:kept] + found[kept + 1 :])
            (place,) = np.flatnonzero(np.isin(mixed.ids, list(encoder.special_ids)))
            assert (mixed.ids[place], tuple(mixed.offsets[place].tolist())) == (number, found[kept])
            before = plain.offsets[:, 1] <= found[kept][0] - 1  # the tokens before do not notice
            assert mixed.ids[: before.sum() - 1].tolist() == plain.ids[before][:-1].tolist()
            assert mixed.offsets[-1, 1] == len(text)


control, piece = st.sampled_from(["<s>", "</s>"]), st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=8)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["text", "literal", "control"]), control, piece), max_size=8))
def test_text_literals_and_control_tokens_in_any_order(parts: list[tuple[str, str, str]]) -> None:
    """Between two control tokens stands what the library makes of that stretch when it ignores all of them."""
    parts = [part for part in parts if part[0] != "text" or not {"<", ">"} & set(part[2])]
    text, literals, expected, stretch = "", [], [], ""
    for kind, special, ordinary in parts:
        if kind == "control":
            expected += REFERENCE.encode(stretch, add_special_tokens=False).ids
            expected.append(POCKET.tokenizer.token_to_id(special))
            stretch = ""
        else:
            stretch += special if kind == "literal" else ordinary
        if kind == "literal":
            literals.append((len(text), len(text) + len(special)))
        text += ordinary if kind == "text" else special
    expected += REFERENCE.encode(stretch, add_special_tokens=False).ids
    encoding = one(ENCODER, text, literals)
    assert encoding.ids.tolist() == expected
    assert POCKET.tokenizer.decode(expected, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", REAL)
def test_rows_beside_one_with_literals_are_encoded_as_ever(encoder_of: Callable[[str], Encoder], name: str) -> None:
    encoder = encoder_of(name)
    special = encoder.special_texts[-1]
    batch = ["", f"a{special}b", Rendered(f"a{special}b", (), ((1, 1 + len(special)),)), "", f"{special}👍", ""]
    encodings = encoder.encode(batch)
    for each, encoding in zip(batch, encodings, strict=True):
        (alone,) = encoder.encode([each])
        assert encoding.ids.tolist() == alone.ids.tolist()
        assert encoding.offsets.tolist() == alone.offsets.tolist()
    assert encodings[1].ids.tolist() != encodings[2].ids.tolist()
    assert encoder.encode([]) == []


def base_of(tokenizer: Tokenizer, folder: Path) -> Base:
    source = folder / "tokenizer"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return base_around(source, folder / "base")


def byte_pairs(*added: AddedToken, merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    letters = [*"</s>ab e|", *dict.fromkeys(left + right for left, right in merges)]
    vocabulary = {piece: index for index, piece in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("?", -9.0), ("</s>", -1.0), *((letter, -3.0) for letter in "</s>ab ")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


MERGED = [("<", "/"), ("</", "s"), ("</s", ">"), ("</s>", "a"), ("a", "b")]
PLAIN_END = AddedToken("</s>", normalized=False)


@pytest.mark.parametrize(
    ("tokenizer", "pieces"),
    [
        (byte_pairs(PLAIN_END), ["a", *"</s>", "b", "</s>", "a"]),
        # Merges that make the very piece of the control token, and go on from there, are left out.
        (byte_pairs(PLAIN_END, merges=MERGED), ["a", "</s", ">", "b", "</s>", "a"]),
        (unigram(), ["a", *"</s>", "b", "</s>", "a"]),
        # A number that is not the next free one, as when a vocabulary has gaps.
        (byte_pairs(AddedToken("<a>"), PLAIN_END), ["a", *"</s>", "b", "</s>", "a"]),
    ],
    ids=["outside", "merged", "unigram", "second"],
)
def test_tokenizers_of_other_kinds(tmp_path: Path, tokenizer: Tokenizer, pieces: list[str]) -> None:
    base = base_of(tokenizer, tmp_path)
    encoding = one(Encoder(base), "a</s>b</s>a", [(1, 5)])
    lengths = np.cumsum([0, *map(len, pieces)])
    assert encoding.offsets.tolist() == [[int(a), int(b)] for a, b in zip(lengths, lengths[1:], strict=False)]
    special = tokenizer.token_to_id("</s>")
    assert np.flatnonzero(encoding.ids == special).tolist() == [len(pieces) - 2]
    others = [index for index in range(len(pieces)) if index != len(pieces) - 2]
    assert [tokenizer.id_to_token(int(encoding.ids[index])) for index in others] == [pieces[index] for index in others]


def test_longer_control_tokens_win_and_their_flags_are_kept(tmp_path: Path) -> None:
    """Of </s> and </s>e the longer is found; <a> takes the space behind it; <b> is one only as a word of its own."""
    longer, strips, word = AddedToken("</s>e"), AddedToken("<a>", rstrip=True), AddedToken("<b>", single_word=True)
    tokenizer = byte_pairs(PLAIN_END, longer, strips, word)
    encoder = Encoder(base_of(tokenizer, tmp_path))
    assert encoder.special_texts == ("</s>e", "</s>", "<a>", "<b>")
    text = "</s>e|<a> |<b>|a<b>a"
    untouched = tokenizer.encode(text)
    with_literal = one(encoder, f"</s>{text}", [(0, 4)])
    assert with_literal.ids[4:].tolist() == untouched.ids
    assert (with_literal.offsets[4:] - 4).tolist() == [list(pair) for pair in untouched.offsets]
    assert with_literal.offsets[:4].tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert [tuple(x) for x in with_literal.offsets.tolist() if x[1] - x[0] > 1] == [(4, 9), (10, 14), (15, 18)]


def test_a_tokenizer_that_cannot_keep_them_apart_is_told(tmp_path: Path) -> None:
    """Its normalizer writes every e as the control token's letter, so that the text of another one becomes it."""
    tokenizer = byte_pairs(AddedToken("|", normalized=False), AddedToken("e", normalized=True))
    tokenizer.normalizer = normalizers.Replace("|", "\U00100000")
    with pytest.raises(UserError, match=r"cannot be told from the same text inside a row; set data.special_tokens"):
        one(Encoder(base_of(tokenizer, tmp_path)), "a|b", [(1, 2)])


def test_private_characters_beside_literals_are_the_templates_to_refuse() -> None:
    with pytest.raises(AssertionError):
        one(Encoder(POCKET), "a</s>\U00100000", [(1, 5)])


def test_no_other_file_tokenises() -> None:
    """One place: add_special_tokens is said there, and nobody else encodes."""
    package = Path(__file__).parents[2] / "finetune"
    callers = [file.name for file in package.rglob("*.py") if "encode_batch(" in file.read_text()]
    assert callers == ["encoder.py"]
