r"""Where the final answer stands in a response: in one pass, however long the response and whatever is in it.

Outside of any thinking, the first of these that the response has: the last ``\boxed{...}``; the last ``<answer>...</answer>``; what
follows the last "answer is", "Answer:" or "####"; its last line. A box or a tag that was begun later and never closed, or that
holds nothing, is an answer that was not given: what stood before it does not count.
"""

import re

_THOUGHT = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"[^\s${}\\]+|\\[A-Za-z]+")
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_ANCHOR = re.compile(
    r"####|(?:\bfinal\s+answer\b|答案)[*_\s]*[:=：是为]?"
    r"|\banswers?\b[*_\s]*[:=：]|\banswers?\b[^.:=\n]{0,60}?\b(?:is|are|equals)\b:?",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.。](?:[\s*]|$)")
# dollars around mathematics have spaces inside both or none, and no digit behind: "$5 + $13" is money
_MATH = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\\)\$(?=\S)((?:\\\$|[^$])+)(?<=\S)\$(?!\d)|(?<!\\)\$ ([^$]+) \$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)
_BETWEEN = re.compile(r"[\s,;]*(?:and|or)?[\s,;]*")
_PROSE_IN_MATH = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s+[A-Za-z]{2,}")
_ASIDE = re.compile(r",? (?:because|since|as|which|so|not|where|instead|rather)\b.*", re.DOTALL)
_LEAD = re.compile(
    r"(?:(?:therefore|thus|so|then|hence|simply|just|exactly|indeed|that|equal to|given by|be)\b[\s,:]*)+", re.IGNORECASE
)
_NUMBER = re.compile(r"[-−+]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+|[eE][+-]?\d+)?%?")
_MOST_OF_A_SENTENCE = 400  # characters; what is longer is no answer


def final_answers(response: str) -> list[str]:
    """Return what the response may mean as its answer, the likeliest first; a text in a box or tag is the only one."""
    text = outside_of_thoughts(response)
    if (box := last_box(text)) is not None:
        return [box] if box else []
    tags = list(_ANSWER_TAG.finditer(text))
    if tags:
        if len(tags) < 2 or not tags[-1][1] or tags[-2][1]:  # the last one is not closed
            return []
        text = text[tags[-2].end() : tags[-1].start()]
    return _in_prose(text)


def given_answer(text: str) -> str:
    """Return a reference's answer: what its last box holds or what follows its last ####, as in GSM8K; else the whole text."""
    if (box := last_box(text)) is not None:
        return box
    return text.rpartition("####")[2].strip()


def outside_of_thoughts(response: str) -> str:
    """Return the response without ``<think>...</think>``.

    Nothing is left before a closing tag whose opening one stands in the prompt, nor after an opening one that is never closed.
    """
    pieces, begin, depth = [], 0, 0
    for tag in _THOUGHT.finditer(response):
        if not tag[1]:
            if depth == 0:
                pieces.append(response[begin : tag.start()])
            depth += 1
        elif depth:
            depth = 0  # a thought that mentions the tag is over at the first closing one
        else:
            pieces.clear()
        begin = tag.end()
    return "".join(pieces if depth else [*pieces, response[begin:]])


def last_box(text: str) -> str | None:
    """Return what the last box holds; empty for one that is never closed, None for no box."""
    box = None
    for box in _BOX.finditer(text):  # noqa: B007  (the last one)
        pass
    return None if box is None else _content(text, box.end())


def has_different_boxes(text: str) -> bool:
    """Tell whether a text, which is an answer that was given and no response, puts several answers into boxes."""
    return len({_content(text, box.end()) for box in _BOX.finditer(text[:4000])}) > 1


def _content(text: str, begin: int) -> str:
    if text[begin : begin + 1] != "{":
        token = _UNBRACED.match(text, begin)
        return token[0].rstrip(".,;") if token else ""
    depth = 0
    for brace in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[begin + 1 : brace.start()].strip()
    return ""


def _in_prose(text: str) -> list[str]:
    anchor = None
    for anchor in _ANCHOR.finditer(text):  # noqa: B007  (the last one)
        pass
    answers: list[str] = []
    if anchor is not None:
        answers = _of_sentence(_first_line(text[anchor.end() :]), is_anchored=True)
    elif lines := text.strip().splitlines():
        last = lines[-1] if lines[-1].strip() not in ("$$", "\\]") else " ".join(lines[-3:])
        answers = _of_sentence(last, is_anchored=False)
    numbers = _NUMBER.findall(text[-_MOST_OF_A_SENTENCE:])
    return [*answers, *numbers[-1:]] if anchor is None else answers


def _first_line(text: str) -> str:
    """Return the first line with something in it; of display mathematics its content."""
    stripped = text.lstrip(" \t\r\n*_:=")
    for begin, end in (("$$", "$$"), ("\\[", "\\]")):
        if stripped.startswith(begin):
            return stripped[len(begin) :].partition(end)[0].strip()
    return stripped.partition("\n")[0]


def _of_sentence(sentence: str, *, is_anchored: bool) -> list[str]:
    """Return what a sentence may give as its answer: the first number after "the answer is" at its begin, the last of any other."""
    sentence = sentence.strip().strip("*_`").strip()
    if end := _SENTENCE_END.search(sentence):
        sentence = sentence[: end.start()]
    sentence = sentence[:_MOST_OF_A_SENTENCE]
    if mathematics := _mathematics(sentence, first=is_anchored):
        return [mathematics]
    sentence = _LEAD.sub("", _ASIDE.sub("", sentence.strip("*_` ")), count=1) if is_anchored else sentence
    answers = [sentence.strip("*_` ")]
    after_equals = sentence.rpartition("=")[2].strip("*_` ")
    if "=" in sentence and after_equals:
        answers.append(after_equals)
    if numbers := _NUMBER.findall(sentence):
        answers.append(numbers[0] if is_anchored and "=" not in sentence else numbers[-1])
    else:
        answers.append(re.split(r"\b(?:is|are|was)\b", sentence)[-1].strip("*_` "))
    return [answer for answer in answers if answer]


def _mathematics(sentence: str, *, first: bool) -> str | None:
    """Return what stands between marks of mathematics; several with nothing but "and" between them are one list."""
    found = [math for math in _MATH.finditer(sentence) if not _PROSE_IN_MATH.search(math[0])]
    if not found:
        return None
    if not first:
        found.reverse()
    chosen = [found[0]]
    for math in found[1:]:
        left, right = sorted((chosen[-1], math), key=re.Match.start)
        if not _BETWEEN.fullmatch(sentence[left.end() : right.start()]):
            break
        chosen.append(math)
    contents = [next(group for group in math.groups() if group is not None) for math in sorted(chosen, key=re.Match.start)]
    return ", ".join(content.strip() for content in contents)
