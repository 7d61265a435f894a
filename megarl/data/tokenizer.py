"""The tokenizer of a model folder, the tokens that end a response, and the text of a response.

It encodes and decodes exactly as the folder's tokenizer.json does by the tokenizers library.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarl.config.schema import Config
from megarl.config.tokenizer_files import (
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    beyond_embedding,
    end_tokens_of_model,
    read_json_object,
    read_tokenizer_settings,
    tokens_of,
)
from megarl.data.chat_template import read_chat_template
from megarl.errors import DataError, MegaRLError, listed, one_line
from megarl.families.registry import read_architecture

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


SENTENCEPIECE = "tokenizer.model"
PROBES = (
    "Be short:\n  2 + 2 = é?",
    " a space before, two  inside and one after ",
    "tabs\tand lines\n\n\nCRLF\r\n",
    "1234567890 and 3.14, -17 % 5",
    "don't I'LL x_1 <b>&amp;</b> {'k': [0]}",
    "Ünïcode: 中文，日本語 한국어 العربية हिन्दी 🙂👩‍👩‍👧 e\u0301",
)
_REASON_CHARACTERS = 120

Decode = Callable[[Sequence[int]], str]


def run_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a run.

    Raises:
        DataError: it cannot be read, or has a token that the model's embedding has no row for.
    """
    folder = config.model.tokenizer or config.model.path
    tokenizer = load_tokenizer(folder)
    end_tokens_of_model(config.model.path)  # whatever the kind: a malformed file would go on into the export
    vocab_size = read_architecture(config.model.path).vocabulary_size
    if words := beyond_embedding(tokenizer.get_vocab(), vocab_size, {tokenizer.pad_token}):
        raise DataError(f"the tokenizer of {folder} {words}")
    return tokenizer


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a local Hugging Face folder.

    tokenizer.json decides, and tokenizer_config.json, special_tokens_map.json and the chat template only name what it has:
    transformers would build the class that tokenizer_config.json or model_type names, which splits text in its own way. Without
    a tokenizer.json transformers converts tokenizer.model, or vocab.json with merges.txt.

    Raises:
        DataError: no tokenizer can be read from ``path``, its files contradict each other, or it does not encode as they say.
    """
    if not path.is_dir():
        raise DataError(f"tokenizer folder {path} does not exist; set model.tokenizer or model.path to a Hugging Face folder")
    try:
        settings = read_tokenizer_settings(path)
        tokenizer = _from_tokenizer_json(path, settings) if (path / TOKENIZER).is_file() else _converted(path)
        _name_special_tokens(tokenizer, settings, path)
        tokenizer.chat_template = read_chat_template(path, settings)
    except DataError:
        raise
    except MegaRLError as error:
        raise DataError(f"cannot load a tokenizer: {error}") from error
    tokenizer.init_kwargs["add_bos_token"] = settings.get("add_bos_token")
    tokenizer.name_or_path = str(path)
    tokenizer.clean_up_tokenization_spaces = False  # it would take spaces from what was generated
    return tokenizer


def _from_tokenizer_json(path: Path, settings: Mapping[str, object]) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast  # here, because it takes seconds

    file = path / TOKENIZER
    tokens = tokens_of(read_json_object(file), file)
    backend = _read_backend(file)
    for text, token_id in tokens.items():
        if backend.token_to_id(text) != token_id:  # the library counts added tokens on from the model's, whatever the file says
            raise DataError(
                f"{file}: token {text!r} has id {token_id}, which the tokenizers library reads as {backend.token_to_id(text)}; "
                "copy the file again"
            )
    _check_added_tokens(settings, tokens, path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    _require_equal(tokenizer, backend, file, [*PROBES, *_added_token_probes(backend)])
    return tokenizer


def _read_backend(file: Path) -> "Tokenizer":
    """Read the tokenizer of a tokenizer.json, without its padding and truncation, which are for batches of other programs."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"cannot load a tokenizer: {file} is malformed ({_reason(error)}); copy it again") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_added_tokens(settings: Mapping[str, object], tokens: Mapping[str, int], path: Path) -> None:
    """Check that tokenizer_config.json adds no token to tokenizer.json's, but one for padding, and gives none another id."""
    added = settings.get("added_tokens_decoder") or {}
    file = path / TOKENIZER_CONFIG
    if not isinstance(added, dict):
        raise DataError(f"{file}: added_tokens_decoder is no object; copy the file again")
    for token_id, entry in added.items():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not str(token_id).isdecimal():
            raise DataError(f"{file}: added_tokens_decoder has at {token_id[:20]!r} no token with a content; copy the file again")
        if tokens.get(text) != int(token_id) and text != settings.get("pad_token"):
            has = f"has it as {tokens[text]}" if text in tokens else "has no such token"
            raise DataError(
                f"{file}: added_tokens_decoder names {text[:40]!r} as id {token_id}, and tokenizer.json {has}; save the tokenizer "
                "again, so that both agree"
            )


def _added_token_probes(backend: "Tokenizer") -> Iterator[str]:
    contents = [token.content for token in backend.get_added_tokens_decoder().values()]
    for first in range(0, len(contents), 100):
        yield "".join(f"a{content}b {content} c" for content in contents[first : first + 100])


def _require_equal(tokenizer: "PreTrainedTokenizerBase", backend: "Tokenizer", file: Path, probes: Sequence[str]) -> None:
    """Refuse a tokenizer that does not encode and decode the probes as the tokenizers library does by the file."""
    for probe in probes:
        ids = backend.encode(probe, add_special_tokens=False).ids
        is_equal = tokenizer.encode(probe, add_special_tokens=False) == ids and all(
            tokenizer.decode(ids, skip_special_tokens=skips) == backend.decode(ids, skip_special_tokens=skips)
            for skips in (False, True)
        )
        if not is_equal:
            raise DataError(
                f"{file}: transformers encodes or decodes {probe[:40]!r} otherwise than the tokenizers library; use another "
                "version of transformers or tokenizers"
            )


def _converted(path: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that transformers makes of a folder without tokenizer.json, compared with what it was made of."""
    import transformers

    has_sentencepiece = (path / SENTENCEPIECE).is_file()
    if not has_sentencepiece and not all((path / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise DataError(
            f"cannot load a tokenizer: {path} has no tokenizer.json, nor tokenizer.model, nor vocab.json with merges.txt; copy "
            "tokenizer.json and tokenizer_config.json into it, or set model.tokenizer"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of any kind, for malformed files
        raise DataError(f"cannot load a tokenizer from {path}: {_reason(error)}; give the folder a tokenizer.json") from error
    right = _sentencepiece_encoder(path / SENTENCEPIECE) if has_sentencepiece else None
    for probe in PROBES:
        ids = tokenizer.encode(probe, add_special_tokens=False)
        # byte-level merges lose nothing, whatever they are
        if ids != right(probe) if right is not None else tokenizer.decode(ids) != probe:
            source = SENTENCEPIECE if has_sentencepiece else "vocab.json and merges.txt"
            raise DataError(
                f"{path}: the {type(tokenizer).__name__} that transformers makes of {source} does not encode {probe[:30]!r} "
                "as it should; give the folder the model's tokenizer.json"
            )
    return tokenizer


def _sentencepiece_encoder(file: Path) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot load a tokenizer: {file} is no sentencepiece model ({_reason(error)}); copy it again") from None
    return lambda text: list(processor.encode(text))


def _name_special_tokens(tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any], path: Path) -> None:
    """Give the special tokens their names; none becomes a new token.

    A bos or eos token must be there; one that is only named, e.g. for padding, is left out. Where no file of the tokenizer names an
    eos token, it is the first of generation_config.json or config.json.
    """
    vocabulary = tokenizer.get_vocab()
    for name in SPECIAL_TOKENS:
        text = settings.get(name)
        if text is not None and text not in vocabulary and name in ("bos_token", "eos_token"):
            raise DataError(
                f"the tokenizer of {path} has no token {text[:40]!r}, which {TOKENIZER_CONFIG} or special_tokens_map.json names as "
                f"{name}; correct the name, or save the tokenizer with that token"
            )
        if text in vocabulary:
            setattr(tokenizer, name, text)
    if tokenizer.eos_token is None:
        ids, _ = end_tokens_of_model(path)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0]) if ids and ids[0] < len(tokenizer) else None


def bos_prefix(tokenizer: "PreTrainedTokenizerBase", adds_bos: bool | None) -> tuple[int, ...]:
    """Return the tokens that a text of the model begins with, one BOS token or none.

    Args:
        tokenizer: of ``load_tokenizer``.
        adds_bos: whether there is one; None for what the tokenizer does: its post-processor, or ``add_bos_token`` of a
            tokenizer_config.json whose tokenizer.json leaves that to it (DeepSeek's).

    Raises:
        DataError: one is wanted and the tokenizer has none.
    """
    if adds_bos is False:
        return ()
    text: list[int] = tokenizer.encode(PROBES[0], add_special_tokens=False)
    whole: list[int] = tokenizer.encode(PROBES[0], add_special_tokens=True)
    starts = [start for start in range(len(whole) - len(text) + 1) if whole[start : start + len(text)] == text]
    before = tuple(whole[: starts[0]]) if text and starts else ()
    if before or not (adds_bos or tokenizer.init_kwargs.get("add_bos_token") is True):
        return before
    if tokenizer.bos_token_id is not None:
        return (tokenizer.bos_token_id,)
    if adds_bos is None:
        return ()
    raise DataError(f"data.add_bos: the tokenizer of {tokenizer.name_or_path} has no BOS token; name one in its {TOKENIZER_CONFIG}")


def _reason(error: BaseException) -> str:
    return one_line(error)[:_REASON_CHARACTERS]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTokens:
    """What ends a response.

    Attributes:
        of_model: ids of the model's own end tokens, ascending: the tokenizer's, and what generation_config.json names.
        stopping: those and the run's ``rollout.stop_token_ids``, ascending.
        notices: lines for people about files that seem to name a wrong token.
    """

    of_model: tuple[int, ...]
    stopping: tuple[int, ...]
    notices: tuple[str, ...]


def find_end_tokens(config: Config, tokenizer: "PreTrainedTokenizerBase") -> EndTokens:
    """Return the end tokens of a run.

    config.json counts where generation_config.json names none, but only for added tokens: many have the default of their class in
    it, which is another model's.

    Raises:
        DataError: there is none, or one is no token of the tokenizer.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {tokenizer.name_or_path} has no eos_token; name one in its tokenizer_config.json")
    ids, file = end_tokens_of_model(config.model.path)
    if unknown := [str(token_id) for token_id in ids if tokenizer.convert_ids_to_tokens(token_id) is None]:
        raise DataError(f"{config.model.path / file}: eos_token_id {listed(unknown)} is no token of the tokenizer; correct it")
    is_added = tokenizer.added_tokens_decoder.keys() | {tokenizer.eos_token_id}
    ordinary = [token_id for token_id in ids if token_id not in is_added]
    does = "end responses" if file == GENERATION_CONFIG else "are not used"
    notices: tuple[str, ...] = ()
    if ordinary:
        named = listed([f"{token_id} = {str(tokenizer.convert_ids_to_tokens(token_id))!r}" for token_id in ordinary], limit=3)
        notices = (
            f"eos_token_id of {file} names tokens of ordinary text, {named}: they {does}; correct the file if that is wrong",
        )
    taken = ids if file == GENERATION_CONFIG else [token_id for token_id in ids if token_id in is_added]
    of_model = {*taken, int(tokenizer.eos_token_id)}
    return EndTokens(
        of_model=tuple(sorted(of_model)), stopping=tuple(sorted(of_model | {*config.rollout.stop_token_ids})), notices=notices
    )


def response_decoder(config: Config, tokenizer: "PreTrainedTokenizerBase", ends: EndTokens) -> Decode:
    """Return what makes the text of a run of response tokens: all that was generated, but for end and padding tokens.

    ``rollout.stop_token_ids`` are the user's, and may be such as </answer>, which scorers look for.
    """
    hidden = {*ends.of_model, tokenizer.pad_token_id}
    skips = not config.rollout.show_special_tokens

    def decode(token_ids: Sequence[int]) -> str:
        shown = [token_id for token_id in token_ids if token_id not in hidden]
        return str(tokenizer.decode(shown, skip_special_tokens=skips))

    return decode
