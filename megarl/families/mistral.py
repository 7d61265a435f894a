"""Mistral: Llama with a sliding window, which config.json switches off with null."""

from dataclasses import replace

from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import DEFAULT_SLIDING_WINDOW, ConfigJson, read_decoder, sliding_window
from megarl.families.llama import Llama


class Mistral(Llama):
    """Mistral 7B and its successors of the same layers."""

    def read(self, config: ConfigJson) -> Architecture:
        """Read a dense decoder with the window."""
        return replace(read_decoder(config), sliding_window=sliding_window(config, DEFAULT_SLIDING_WINDOW))


FAMILY = Mistral()
