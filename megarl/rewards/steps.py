"""Reasoning steps of a response: where its text is divided, and with which token each step ends."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

_INCOMPLETE = "\ufffd"  # what decoders write for the bytes of a character that has not come to its end


def split_steps(text: str, separator: str) -> list[str]:
    """Return the text divided after each separator, which stays at the end of its step; together the steps are the text.

    Several separators in a row divide once, and those at the start of the text belong to the first step, so that no step is blank.
    """
    mark = f"(?:{re.escape(separator)})"
    return re.findall(rf"{mark}*.+?(?:{mark}+|\Z)", text, re.DOTALL)


def step_ends(
    steps: Sequence[str], token_ids: Sequence[int], decode: Callable[[Sequence[int]], str], prefill: str = ""
) -> list[int]:
    """Return index of the last token of each step: the one with which the step's last character is there.

    The last step ends with the response, so that the token that stops it, which has no text, belongs to it. Steps that end within
    one token get the same index.

    Args:
        steps: of ``prefill + decode(token_ids)``.
        token_ids: of the whole response.
        decode: gives the text of any run of tokens.
        prefill: text that stands before the first token; a step that ends in it gets that token.
    """
    lengths = [len(prefill) + length for length in decoded_lengths(token_ids, decode)]
    ends = [bisect_left(lengths, characters) for characters in accumulate(map(len, steps))]
    return [*ends[:-1], len(token_ids) - 1] if ends else []


def decoded_lengths(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """Return how many characters of the whole text are complete after each token; ascending, the last is the length of the text.

    A token may hold a part of a character, several characters, or none; bytes that make no character count with the next
    character, or with the last token. Only a few tokens are decoded at a time, beginning where a character began; the tokens just
    before go with them, because some decoders drop a space at the start of what they are given.
    """
    lengths: list[int] = []
    context, start, complete = 0, 0, 0  # complete: characters up to token ``start``
    for index in range(len(token_ids)):
        known = len(decode(token_ids[context:start]))
        text = decode(token_ids[context : index + 1])
        so_far = complete + max(0, len(text.rstrip(_INCOMPLETE)) - known)
        lengths.append(so_far)
        if len(text) > known and not text.endswith(_INCOMPLETE):
            context, start, complete = start, index + 1, so_far
    if lengths:
        lengths[-1] = len(decode(token_ids))
    return lengths
