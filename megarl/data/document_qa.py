"""Questions on documents: read from rows of any source, written as prompts, cut in the middle where asked for."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.data.sources import Row
from megarl.data.template import PromptTemplate
from megarl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = (
    "Read the text and answer the question.\n\n<text>\n{documents}\n</text>\n\n{question}\n\n"
    'Reason first, then end with "the answer is" and a short answer.'
)
MARK = "\n\n[... the middle is left out ...]\n\n"
_SEPARATOR = "\n\n"  # between documents


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentQuestion:
    """A question, the documents that answer it, and its gold answers; none of them is empty."""

    documents: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
    """What a source calls the three fields."""

    documents: str = "documents"
    question: str = "question"
    answers: str = "answers"


def read_document_question(fields: Mapping[str, object], names: FieldNames, location: str, max_characters: int) -> DocumentQuestion:
    """Read the question of one row.

    Args:
        fields: the row. Documents are a text or a list of texts; answers a text, a number, a list of these, or SQuAD's mapping with
            a list ``text``.
        names: of the fields.
        location: of the row, for errors.
        max_characters: most characters of all documents together.

    Raises:
        DataError: a field is missing, of another type, empty or absurdly long; the message has place and field.
    """
    for option, name in (("documents", names.documents), ("question", names.question), ("answers", names.answers)):
        if name not in fields:
            raise DataError(f"{location}: no field '{name}' (it has: {', '.join(fields)}); add it or set --{option}-field")
    documents = _texts(fields[names.documents], f"{location}: field '{names.documents}'")
    num_characters = sum(map(len, documents))
    if num_characters > max_characters:
        raise DataError(
            f"{location}: field '{names.documents}' has {num_characters:,} characters, above --max-characters {max_characters:,}; "
            "leave the row out, divide it, or raise the limit"
        )
    question = fields[names.question]
    if not isinstance(question, str):
        raise DataError(f"{location}: field '{names.question}' is a {type(question).__name__}; it must be a text")
    (question,) = _texts(question, f"{location}: field '{names.question}'")
    answers = fields[names.answers]
    if isinstance(answers, Mapping) and "text" in answers:
        answers = answers["text"]
    if isinstance(answers, int | float) and not isinstance(answers, bool):
        answers = str(answers)
    if isinstance(answers, list):
        answers = [str(one) if isinstance(one, int | float) and not isinstance(one, bool) else one for one in answers]
    answers = _texts(answers, f"{location}: field '{names.answers}'")
    return DocumentQuestion(documents=documents, question=question, answers=tuple(dict.fromkeys(answers)))


def _texts(value: object, location: str) -> tuple[str, ...]:
    """Return a text or list of texts as a tuple; DataError when there is none, or a blank one."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        found = (
            f"list with a {next(type(one).__name__ for one in texts if not isinstance(one, str))}"
            if isinstance(texts, list)
            else ""
        )
        raise DataError(f"{location} is a {found or type(value).__name__}; it must be a text or a list of texts")
    if not texts:
        raise DataError(f"{location} is an empty list; fill it or leave the row out")
    for index, text in enumerate(texts):
        if not text.strip():
            which = f" has an empty text at {index}" if isinstance(value, list) else " is empty"
            raise DataError(f"{location}{which}; fill it or leave the row out")
    return tuple(texts)


class DocumentPrompts:
    """Writes questions as rows of prompt and answer, and counts their tokens as the trainer does."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: str, template: str) -> None:
        """Prepare for one tokenizer.

        Args:
            tokenizer: of the model that is to read the prompts.
            prompt: text with {documents} and {question}.
            template: as in ``data.template``.

        Raises:
            ConfigError: a place is missing in ``prompt`` or ``template``.
            DataError: the tokenizer lacks what the template needs.
        """
        for location in ("{documents}", "{question}"):
            if prompt.count(location) != 1:
                raise ConfigError(f"--prompt {prompt!r} has {location} {prompt.count(location)} times; write it once")
        self._tokenizer = tokenizer
        self._before, self._between, self._after = _parts(prompt)
        self._is_question_first = prompt.index("{question}") < prompt.index("{documents}")
        self._template = PromptTemplate(tokenizer, template)

    def prompt(self, item: DocumentQuestion) -> str:
        """Return the prompt before the model's template."""
        documents = _SEPARATOR.join(item.documents)
        first, second = (item.question, documents) if self._is_question_first else (documents, item.question)
        return f"{self._before}{first}{self._between}{second}{self._after}"

    def num_tokens(self, item: DocumentQuestion) -> int:
        """Return the tokens of the prompt as the model reads it, template included."""
        row = Row(row_id="of the documents", prompt=self.prompt(item), answer=item.answers[0], rejected=None, task="", reference={})
        return len(self._template.encode_prompt(row, sys.maxsize).token_ids)

    def row(self, item: DocumentQuestion, num_tokens: int) -> dict[str, Any]:
        """Return the row that is written: prompt, answer, documents, question, answers and the prompt's length in tokens."""
        return {
            "prompt": self.prompt(item),
            "answer": item.answers[0],
            "documents": list(item.documents),
            "question": item.question,
            "answers": list(item.answers),
            "length": num_tokens,
        }

    def cut_in_the_middle(self, item: DocumentQuestion, max_tokens: int, location: str) -> DocumentQuestion:
        """Return the question with one document: head and tail of all documents, in equal tokens, and a mark between them.

        Args:
            item: whose prompt is longer than ``max_tokens``.
            max_tokens: most tokens of the prompt as the model reads it.
            location: of its row, for errors.

        Raises:
            DataError: nothing of the documents could stay, or the tokenizer does not tell which characters a token stands for.
        """
        if not self._tokenizer.is_fast:
            raise DataError(f"the tokenizer of {self._tokenizer.name_or_path} has no offsets, so --truncate cannot be used with it")
        text = _SEPARATOR.join(item.documents)
        starts = [
            start for start, _ in self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ]
        kept = max_tokens - self.num_tokens(replace(item, documents=(MARK,)))
        while kept >= 2:
            head = kept // 2
            cut = replace(item, documents=(text[: starts[head]] + MARK + text[starts[len(starts) - (kept - head)] :],))
            # Tokens merge and split at the new borders, so the sum of the parts may be a little too much.
            excess = self.num_tokens(cut) - max_tokens
            if excess <= 0:
                return cut
            kept -= excess
        raise DataError(
            f"{location}: question, mark and template leave no room for documents in {max_tokens} tokens; raise --max-tokens or "
            "leave the row out"
        )


def _parts(prompt: str) -> tuple[str, str, str]:
    """Return the text before, between and after the two places."""
    first, second = sorted(("{documents}", "{question}"), key=prompt.index)
    before, _, rest = prompt.partition(first)
    between, _, after = rest.partition(second)
    return before, between, after


def write_json_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write the rows and return their number; the file appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    count = 0
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count
