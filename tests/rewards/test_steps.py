"""Steps of a response and their last tokens, against decoding every prefix."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megarl.rewards.steps import decoded_lengths, split_steps, step_ends


def byte_level_tokenizer():
    """Every byte is a token, and some runs of bytes, which cut characters anywhere."""
    alphabet = bytes_to_letters()
    runs = ["é", "€uro", "\n\n", "\n\n\n", ".\n", " the", "😀😀"]
    pieces = [bytes([byte]) for byte in range(256)] + [run.encode() for run in runs]
    pieces += ["😀".encode()[1:] + b"x", "é".encode()[1:], b" " + "😀".encode()[:2]]
    vocabulary = {"".join(alphabet[byte] for byte in piece): index for index, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces) - 1  # b"\xa9" is there twice
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return with_stop_token(tokenizer)


def bytes_to_letters():
    """GPT-2's printable letter of each byte (Radford et al. 2019, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def sentencepiece_tokenizer():
    """Words with a mark for the space before them, which is dropped at the start of a text, and bytes for what is no word."""
    words = ["▁", "▁a", "b", "▁the", "▁▁", "\n", "\n\n", "é", "."]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_stop_token(tokenizer)


def with_stop_token(tokenizer):
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)


def decoder_of(tokenizer):
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)


def ends_by_prefixes(steps, token_ids, decode):
    """The first token whose prefix has all characters of the step; the last step ends with the response."""
    text, ends, num_characters = decode(token_ids), [], 0
    for step in steps:
        num_characters += len(step)
        wanted = text[:num_characters]
        ends.append(next(i for i in range(len(token_ids)) if decode(token_ids[: i + 1])[:num_characters] == wanted))
    return [*ends[:-1], len(token_ids) - 1] if ends else []


def test_ends_of_random_bytes():
    """Random tokens: half characters, stop tokens in between, separators cut and joined in every way."""
    tokenizer = byte_level_tokenizer()
    assert_ends_of_runs(tokenizer, [[token] for token in range(len(tokenizer))])


def test_ends_of_words_and_characters_in_bytes():
    """A byte fallback shows a run of bytes with a wrong one in it as other characters altogether, so these are whole characters."""
    tokenizer = sentencepiece_tokenizer()
    words = [[token] for token in range(9)]
    characters = [tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in char.encode()]) for char in "a\n€é😀語"]
    assert_ends_of_runs(tokenizer, words + characters + [[tokenizer.eos_token_id]])


def assert_ends_of_runs(tokenizer, pieces):
    """Ends of 150 random runs of pieces, each piece a list of token ids, are those that all prefixes give."""
    decode = decoder_of(tokenizer)
    generator = random.Random(0)
    line_ends = [piece for piece in pieces if "\n" in decode(piece)] + [[tokenizer.eos_token_id]]
    several = 0
    for _ in range(150):
        token_ids = []
        for _ in range(generator.randint(0, 30)):
            token_ids += generator.choice(line_ends if generator.random() < 0.3 else pieces)
        text = decode(token_ids)
        assert (decoded_lengths(token_ids, decode) or [0])[-1] == len(text)
        for separator in ("\n\n", "\n"):
            steps = split_steps(text, separator)
            assert step_ends(steps, token_ids, decode) == ends_by_prefixes(steps, token_ids, decode)
            several += len(steps) > 2
    assert several > 50


def test_ends_by_hand():
    tokenizer = byte_level_tokenizer()
    decode = decoder_of(tokenizer)
    text = "a😀\n\né!\n\nz"
    token_ids = [*text.encode(), tokenizer.eos_token_id]  # a, four bytes, two line ends, two bytes, !, two line ends, z, <end>
    steps = split_steps(text, "\n\n")
    assert steps == ["a😀\n\n", "é!\n\n", "z"]
    assert step_ends(steps, token_ids, decode) == [6, 11, 13]
    assert step_ends([], [], decode) == []


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\n\n", ["a\n\n"]),
        ("a\n\n\n\n\nb", ["a\n\n\n\n", "\nb"]),
        ("\n\na\n\nb\n\n", ["\n\na\n\n", "b\n\n"]),
        ("\n\n", ["\n\n"]),
        ("one\ntwo", ["one\ntwo"]),
    ],
)
def test_steps(text, steps):
    assert split_steps(text, "\n\n") == steps
    assert "".join(steps) == text
