"""Write synthetic documents with a question on each: a needle in filler, or a chain of facts that are spread over the document."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any

import typer

from megarl.cli.command_line import run
from megarl.data.document_qa import DocumentPrompts, DocumentQuestion, write_json_lines
from megarl.data.template import load_tokenizer
from megarl.errors import DataError

PROMPT = "{documents}\n{question}"
SYLLABLES = [first + second for first, second in product("bdfgklmnprstvz", "aeiou")]
NAMES = [(first + second).capitalize() for first, second in product(SYLLABLES, SYLLABLES)]
SUBJECTS = ("baker", "old sailor", "grey cat", "teacher", "wind", "young farmer", "night train", "choir")
VERBS = ("watched", "passed", "forgot", "praised", "remembered", "crossed", "painted", "left")
OBJECTS = ("river", "wooden bridge", "garden", "empty market", "hills", "harbour", "white houses", "long road")
SHORT = ("It rained.", "Time went by.", "All was calm.", "Nobody spoke.")
NUM_FILLERS = 400

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """A question and the facts around it.

    Attributes:
        question: what is asked.
        answer: a code, which stands once in the document.
        evidence: the facts that lead to the answer, in the order of reasoning; without any one of them it cannot be found.
        distractors: facts of the same kinds on other people, and the codes of the people on the way.
    """

    question: str
    answer: str
    evidence: tuple[str, ...]
    distractors: tuple[str, ...]


def make_puzzle(chooser: random.Random, hops: int, num_distractors: int, digits: int) -> Puzzle:
    """A chain of ``hops`` people and as many others of the same length; everybody has a code.

    One hop asks for the code of a person: the needle. More ask for the code of the person at the end of the chain. As each chain
    looks like the others, a missing link leaves several codes possible.
    """
    names = chooser.sample(NAMES, hops * (num_distractors + 1))
    codes = [str(code) for code in chooser.sample(range(10 ** (digits - 1), 10**digits), len(names))]
    chains = [names[start : start + hops] for start in range(0, len(names), hops)]
    links = [[f"{one} follows {other}." for one, other in pairwise(chain)] for chain in chains]
    code_facts = [f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True)]
    asked = names[0]
    question = f"What is the code of {asked}?"
    if hops > 1:
        times = "once" if hops == 2 else f"{hops - 1} times"
        question = f"Start at {asked} and move {times} to the one who is followed. What is the code of the one you reach?"
    return Puzzle(
        question=question,
        answer=codes[hops - 1],
        evidence=(*links[0], code_facts[hops - 1]),
        distractors=(*(link for chain in links[1:] for link in chain), *code_facts[: hops - 1], *code_facts[hops:]),
    )


class Writer:
    """Hides puzzles in documents of wanted lengths."""

    def __init__(self, prompts: DocumentPrompts, tokenizer: Any, seed: int) -> None:
        self._prompts = prompts
        sentences = [f"The {one} {verb} the {other}." for one, verb, other in product(SUBJECTS, VERBS, OBJECTS)]
        chosen = [*SHORT, *random.Random(f"filler {seed}").sample(sentences, NUM_FILLERS)]
        costs = {sentence: len(tokenizer.encode(" " + sentence, add_special_tokens=False)) for sentence in chosen}
        self._fillers = sorted(chosen, key=lambda sentence: costs[sentence])
        self._costs = [costs[sentence] for sentence in self._fillers]

    def document(self, puzzle: Puzzle, chooser: random.Random, min_tokens: int, max_tokens: int) -> tuple[DocumentQuestion, int]:
        """The question on a document, and the tokens of its prompt: as many as can be up to a number drawn from the range.

        Raises:
            DataError: the facts alone are too long, or no filler leads into the range.
        """
        placed = _placed(puzzle, chooser)
        wanted = chooser.randint(min_tokens, max_tokens)
        bare = self._measured(puzzle, placed, [])
        if bare[1] > max_tokens:
            raise DataError(
                f"question and facts take {bare[1]} tokens, above --max-tokens {max_tokens}; raise it, or lower --hops or "
                "--distractors"
            )
        fillers: list[str] = []
        room = wanted - bare[1]
        while fitting := bisect_right(self._costs, room):
            index = chooser.randrange(fitting)
            fillers.append(self._fillers[index])
            room -= self._costs[index]
        item, num_tokens = self._measured(puzzle, placed, fillers)
        while num_tokens > max_tokens:  # tokens may split where sentences meet
            fillers.pop()
            item, num_tokens = self._measured(puzzle, placed, fillers)
        if num_tokens < min_tokens:
            item, num_tokens = self._measured(puzzle, placed, [*fillers, self._fillers[0]])
        if not min_tokens <= num_tokens <= max_tokens:
            raise DataError(
                f"a prompt came out at {num_tokens} tokens, not {min_tokens} to {max_tokens}, as the shortest filler has "
                f"{self._costs[0]}; lower --min-tokens"
            )
        return item, num_tokens

    def _measured(
        self, puzzle: Puzzle, placed: Sequence[tuple[float, str]], fillers: Sequence[str]
    ) -> tuple[DocumentQuestion, int]:
        sentences: list[str] = []
        begin = 0
        for depth, fact in placed:
            end = int(depth * (len(fillers) + 1))
            sentences += [*fillers[begin:end], fact]
            begin = end
        text = " ".join([*sentences, *fillers[begin:]])
        item = DocumentQuestion(documents=(text,), question=puzzle.question, answers=(puzzle.answer,))
        return item, self._prompts.num_tokens(item)


def _placed(puzzle: Puzzle, chooser: random.Random) -> list[tuple[float, str]]:
    """All facts with their depths in the document, 0 to 1, ascending: one piece of evidence in each equal part, in any order."""
    evidence = chooser.sample(puzzle.evidence, len(puzzle.evidence))
    depths = [(index + chooser.random()) / len(evidence) for index in range(len(evidence))]
    placed = [*zip(depths, evidence, strict=True), *((chooser.random(), fact) for fact in puzzle.distractors)]
    return sorted(placed)


def make_rows(
    prompts: DocumentPrompts,
    tokenizer: Any,
    *,
    size: int,
    hops: Sequence[int],
    distractors: int,
    digits: int,
    min_tokens: int,
    max_tokens: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """``size`` rows that depend on the arguments and their own number only; tasks take turns."""
    writer = Writer(prompts, tokenizer, seed)
    for index in range(size):
        chooser = random.Random(f"{seed}/{index}")
        row_hops = hops[index % len(hops)]
        puzzle = make_puzzle(chooser, row_hops, distractors, digits)
        item, num_tokens = writer.document(puzzle, chooser, min_tokens, max_tokens)
        task = "needle" if row_hops == 1 else "multi_hop"
        yield {
            **prompts.row(item, num_tokens),
            "task": task,
            "hops": row_hops,
            "evidence": list(puzzle.evidence),
            "worked_answer": " ".join(puzzle.evidence),
        }


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="JSON-lines file to write.")],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face folder with the tokenizer that counts tokens.")],
    min_tokens: Annotated[int, typer.Option(min=1, help="Shortest prompt in tokens, the question and --template included.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt in tokens.")],
    size: Annotated[int, typer.Option(min=1, help="Number of rows.")] = 1000,
    hops: Annotated[list[int], typer.Option(min=1, max=50, help="Facts to combine, 1 for a needle; several take turns.")] = (1,),
    distractors: Annotated[int, typer.Option(min=0, max=50, help="Chains of facts on other people.")] = 2,
    digits: Annotated[int, typer.Option(min=2, max=9, help="Digits of a code; 4 or more where there are many people.")] = 4,
    seed: Annotated[int, typer.Option(help="Other seeds give other rows, for example for a held-out set.")] = 0,
    prompt: Annotated[str, typer.Option(help="Text with {documents} and {question}.")] = PROMPT,
    template: Annotated[str, typer.Option(help="As data.template of the config: chat, or a text with {prompt}.")] = "chat",
) -> None:
    """Write SIZE rows: prompt, answer, documents, question, answers, length, task, hops, evidence and worked_answer."""
    if min_tokens > max_tokens:
        raise DataError(f"--min-tokens {min_tokens} is above --max-tokens {max_tokens}; give a range")
    people, codes = max(hops) * (distractors + 1), 9 * 10 ** (digits - 1)
    if people > codes:
        raise DataError(f"--digits {digits} gives {codes} codes for {people} people; raise it, or lower --hops or --distractors")
    loaded = load_tokenizer(tokenizer)
    rows = make_rows(
        DocumentPrompts(loaded, prompt, template),
        loaded,
        size=size,
        hops=hops,
        distractors=distractors,
        digits=digits,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        seed=seed,
    )
    print(f"{out}: {write_json_lines(out, rows)} rows")


if __name__ == "__main__":
    run(app)
