"""Prepare a document question answering set for long-context training, and show how long its prompts are."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy
import typer
from rich.console import Console
from rich.table import Table

from megarl.cli.command_line import run
from megarl.config.schema import DatasetsSource
from megarl.data.document_qa import PROMPT, DocumentPrompts, FieldNames, read_document_question, write_json_lines
from megarl.data.sources import load_dataset, read_objects
from megarl.data.template import load_tokenizer
from megarl.errors import ConfigError, DataError

SHOWN = 20  # rows that are listed on the terminal
QUANTILES = {"min": 0, "25%": 25, "median": 50, "75%": 75, "95%": 95, "max": 100}

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Truncation(StrEnum):
    """What happens to prompts above --max-tokens."""

    NONE = "none"
    MIDDLE_OUT = "middle_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Prompt lengths of one stage of a curriculum, in tokens, both ends included."""

    low: int
    high: int


@dataclass(slots=True, kw_only=True)
class Report:
    """What was seen of all rows.

    Attributes:
        lengths: tokens of each prompt before any cut.
        written: tokens of each prompt that was written.
        too_long: place and tokens of each row that was left out.
        num_cut: rows that were cut in the middle.
        num_cut_answers: rows among them whose document held a gold answer before the cut, and none after it.
    """

    lengths: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)
    num_cut: int = 0
    num_cut_answers: int = 0


def parse_stages(texts: Sequence[str]) -> list[Stage]:
    """Stages of texts such as ``1-20000``; ConfigError when one is no range, or they overlap or do not ascend."""
    stages: list[Stage] = []
    for text in texts:
        low, dash, high = text.partition("-")
        if not (dash and low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high)):
            raise ConfigError(f"--stage {text}: not a range of tokens; give for example --stage 1-20000")
        if stages and int(low) <= stages[-1].high:
            raise ConfigError(
                f"--stage {text}: begins at {low}, within or below {stages[-1].low}-{stages[-1].high}; give stages that ascend "
                "and do not overlap"
            )
        stages.append(Stage(low=int(low), high=int(high)))
    return stages


def read_source(source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, a folder of save_to_disk or a dataset by name, with their places."""
    if Path(source).suffix == ".jsonl" or Path(source).is_file():
        yield from read_objects(Path(source))
        return
    dataset = load_dataset(DatasetsSource(path=source, split=split))
    if len(dataset) == 0:
        raise DataError(f"dataset {source} split '{split}' has no rows; choose another split")
    for index, fields in enumerate(dataset):
        yield f"dataset {source} split '{split}' row {index}", fields


def prepared_rows(
    source: Iterator[tuple[str, dict[str, Any]]],
    prompts: DocumentPrompts,
    names: FieldNames,
    *,
    max_tokens: int | None,
    max_characters: int,
    truncate: Truncation,
    report: Report,
) -> Iterator[dict[str, Any]]:
    """The rows to write; what happened to each is added to ``report``."""
    for location, fields in source:
        item = read_document_question(fields, names, location, max_characters)
        num_tokens = prompts.num_tokens(item)
        report.lengths.append(num_tokens)
        if max_tokens is not None and num_tokens > max_tokens:
            if truncate is Truncation.NONE:
                report.too_long.append((location, num_tokens))
                continue
            had_answer = holds_answer(item.documents, item.answers)
            item = prompts.cut_in_the_middle(item, max_tokens, location)
            num_tokens = prompts.num_tokens(item)
            report.num_cut += 1
            report.num_cut_answers += had_answer and not holds_answer(item.documents, item.answers)
        report.written.append(num_tokens)
        yield prompts.row(item, num_tokens)


def holds_answer(documents: Sequence[str], answers: Sequence[str]) -> bool:
    """Whether a gold answer stands in a document, letter by letter but for case."""
    return any(answer.casefold() in document.casefold() for document in documents for answer in answers)


def show(report: Report, stages: Sequence[Stage], console: Console) -> None:
    """Print the lengths and how many rows fall into which stage."""
    columns = {"all rows": report.lengths, "written": report.written}
    table = Table("tokens of a prompt", *columns)
    table.add_row("rows", *(str(len(lengths)) for lengths in columns.values()))
    for name, percent in QUANTILES.items():
        table.add_row(name, *(f"{numpy.percentile(lengths, percent):.0f}" if lengths else "-" for lengths in columns.values()))
    console.print(table)
    if not stages:
        return
    table = Table("stage", *columns)
    inside = dict.fromkeys(columns, 0)
    for number, stage in enumerate(stages, start=1):
        counts = {name: sum(stage.low <= one <= stage.high for one in lengths) for name, lengths in columns.items()}
        table.add_row(f"{number}: {stage.low} to {stage.high} tokens", *map(str, counts.values()))
        inside = {name: inside[name] + counts[name] for name in columns}
    table.add_row("in no stage", *(str(len(lengths) - inside[name]) for name, lengths in columns.items()))
    console.print(table)


def plot(path: Path, lengths: Sequence[int], stages: Sequence[Stage]) -> None:
    """Write a histogram of the lengths of all rows as SVG, with the stages' ends."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; install requirements/dev.txt, or leave --plot out") from error
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "lengths"  # the same rows give the same file
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    low, high = max(1, min(lengths)), max(lengths) + 1
    axes.hist(lengths, bins=numpy.geomspace(low, high, 40), color="tab:blue")
    axes.set(xscale="log", xlabel="tokens of a prompt", ylabel="rows")
    for number, stage in enumerate(stages, start=1):
        axes.axvspan(stage.low, stage.high, alpha=0.12, color=f"C{number}", label=f"stage {number}: {stage.low} to {stage.high}")
    if stages:
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


@app.command()
def main(
    source: Annotated[str, typer.Argument(help="A file of rows, a folder written by save_to_disk, or a name for load_dataset.")],
    out: Annotated[Path, typer.Argument(help="JSON-lines file to write.")],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face folder with the tokenizer that counts tokens.")],
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    documents_field: Annotated[str, typer.Option(help="Field with a text or a list of texts.")] = "documents",
    question_field: Annotated[str, typer.Option(help="Field with the question alone.")] = "question",
    answers_field: Annotated[str, typer.Option(help="Field with a text, a number or a list, or SQuAD's mapping.")] = "answers",
    prompt: Annotated[str, typer.Option(help="Text with {documents} and {question}.")] = PROMPT,
    template: Annotated[str, typer.Option(help="As data.template of the config: chat, or a text with {prompt}.")] = "chat",
    stage: Annotated[list[str], typer.Option(help="Prompt lengths of a stage, e.g. 1-20000; once for each stage.")] = (),
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt written; default: the last stage's end.")] = None,
    truncate: Annotated[Truncation, typer.Option(help="Longer prompts: left out and listed, or cut.")] = Truncation.NONE,
    max_characters: Annotated[int, typer.Option(min=1, help="More in one row's documents is an error.")] = 50_000_000,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="SVG file for a histogram of the lengths.")] = None,
) -> None:
    """Write rows with the fields prompt, answer, documents, question, answers and length, and print their lengths.

    Nothing is cut unless --truncate middle_out asks for it: it keeps head and tail of the documents and marks the gap. Rows
    that are left out are in OUT.too_long.jsonl.

    \b
    Example:
      python tools/prepare_document_qa.py data/docqa data/docqa.jsonl --tokenizer models/Qwen2.5-7B \\
        --stage 1-20000 --stage 20001-60000 --plot data/docqa.svg
    """
    stages = parse_stages(stage)
    limit = max_tokens if max_tokens is not None else stages[-1].high if stages else None
    if truncate is not Truncation.NONE and limit is None:
        raise ConfigError(f"--truncate {truncate} needs --max-tokens or --stage")
    if Path(source).exists() and out.exists() and out.samefile(source):
        raise ConfigError(f"{out} is the source itself; write to another file")
    loaded = load_tokenizer(tokenizer)
    loaded.model_max_length = sys.maxsize  # else it warns of every long document
    report = Report()
    rows = prepared_rows(
        read_source(source, split),
        DocumentPrompts(loaded, prompt, template),
        FieldNames(documents=documents_field, question=question_field, answers=answers_field),
        max_tokens=limit,
        max_characters=max_characters,
        truncate=truncate,
        report=report,
    )
    count = write_json_lines(out, rows)
    left_out = out.with_name(f"{out.name}.too_long.jsonl")
    left_out.unlink(missing_ok=True)  # of an earlier call
    show(report, stages, Console(width=100))
    if report.num_cut:
        lost = f"{report.num_cut_answers} of them lost their answer's text"
        print(f"cut in the middle to at most {limit} tokens: {report.num_cut} rows; {lost}")
    for location, num_tokens in report.too_long[:SHOWN]:
        print(f"too long, left out: {location}: {num_tokens} tokens, above {limit}")
    if report.too_long:
        write_json_lines(left_out, ({"row": location, "length": num_tokens} for location, num_tokens in report.too_long))
        print(f"left out: {len(report.too_long)} rows, all in {left_out}; --truncate middle_out would cut them")
    if plot_file is not None:
        plot(plot_file, report.lengths, stages)
        print(f"{plot_file}: plot")
    print(f"{out}: {count} rows")


if __name__ == "__main__":
    run(app)
