"""The text of a response, as scorers, environments and people see it, and the tokens that end it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megarl.config.schema import Config
from megarl.config.tokenizer_files import GENERATION_CONFIG, end_tokens_of_model
from megarl.errors import DataError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[[Sequence[int]], str]


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
