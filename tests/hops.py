"""The stack between the RL loop and the surrogate: one real update on one rank."""

import inspect
from dataclasses import replace
from pathlib import Path

import megarl
from megarl.algorithms.surrogates import SURROGATES, Surrogate, SurrogateInput
from megarl.cli.parity import synthetic_batch
from megarl.config.schema import AlgorithmConfig, Config
from megarl.loop.models import build_models
from megarl.loop.rl import train
from megarl.parallel.launch import run_local_ranks
from own_batches import OWN_LOGPROBS, parts_of
from tiny import PROMPTS, tiny_config, write_tiny_model

PACKAGE = Path(megarl.__file__).parent


def frames_to_the_surrogate(folder: Path) -> list[str]:
    """Return MegaRL's own functions on the stack at the surrogate, from the loop's to the surrogate's.

    A comprehension counts as the function that it stands in, as Python 3.12 and later run it.

    Args:
        folder: empty, for a tiny model.
    """
    write_tiny_model(folder, "llama")
    config = tiny_config(folder, observe=OWN_LOGPROBS)
    run_local_ranks(_train, (config, folder / "stack"), 1, 60)
    return (folder / "stack").read_text().splitlines()


def _train(config: Config, output: Path) -> None:
    original = SURROGATES[config.algorithm.surrogate]

    def surrogate(inputs: SurrogateInput, settings: AlgorithmConfig) -> Surrogate:
        own = [frame for frame in reversed(inspect.stack()[1:]) if Path(frame.filename).is_relative_to(PACKAGE)]
        names = [f"{Path(frame.filename).relative_to(PACKAGE)}: {frame.function}" for frame in own if frame.function[0] != "<"]
        names.append(f"algorithms/surrogates.py: {original.function.__name__}")
        output.write_text("\n".join(names[names.index("loop/rl.py: train") :]))
        return original.function(inputs, settings)

    SURROGATES[config.algorithm.surrogate] = replace(original, function=surrogate)
    train(parts_of(config, synthetic_batch(PROMPTS, config)), build_models(config), config.observe)
