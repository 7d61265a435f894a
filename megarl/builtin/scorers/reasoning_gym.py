"""The ``reasoning_gym`` scorer: a task's own generator judges the answer."""

from collections.abc import Mapping
from typing import Any, Literal

from megarl.builtin.scorers.answers import AnswerScorer, of_first_group
from megarl.builtin.scorers.base import RunApart, Scorer
from megarl.section import key

# Those of reasoning_gym 0.1.25 whose score_answer was read and takes the answer as text, numbers or JSON. The others give it to
# eval or to sympy's parse_expr, which is eval; so may those of later versions, until they are read. (bitwise_arithmetic and
# number_sorting evaluate what their own generators wrote.)
_NAMES = """
ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation bitwise_arithmetic
boxnet caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio coin_flip color_cube_rotation complex_arithmetic
count_bits count_primes course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
family_relationships figlet_font fraction_simplification futoshiki game_of_life game_of_life_halting gcd graph_color
group_anagrams gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm leg_counting
letter_counting letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid needle_haystack
number_filtering number_format number_sequence number_sorting palindrome_generation palindrome_partitioning path_star
polynomial_equations pool_matrix power_function prime_factorization products propositional_logic quantum_lock ransom_note
rearc rectangle_count rotate_matrix rotten_oranges rubiks_cube rush_hour self_reference sentence_reordering shortest_path
simple_equations simple_geometry sokoban spell_backward string_manipulation string_splitting string_synthesis sudoku survo
syllogism time_intervals tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting zebra_puzzles
"""

READING_TASKS = frozenset(_NAMES.split())


class ReasoningGymScorer(AnswerScorer):
    """The score that the task's own generator gives to the answer, 0 to 1; for rows of type reasoning_gym."""

    type: Literal["reasoning_gym"] = key("reasoning_gym", "-", "Asks the generator of the row.")

    def build(self, run_apart: RunApart | None) -> Scorer:
        """Make the scorer. Some generators execute the answer: in a process of its own, or not at all."""
        import reasoning_gym  # here, because it takes seconds and other scorers do without

        generators: dict[str, Any] = {}

        def score(answer: str, reference: Mapping[str, Any]) -> float:
            if "entry" not in reference:
                raise ValueError("the prompt is not of a reasoning_gym source, so its answer cannot be scored by one")
            # Some generators score by their options, so these are part of the key.
            name = repr((reference["task"], reference["options"]))
            if name not in generators:
                generators[name] = reasoning_gym.create_dataset(reference["task"], **reference["options"])
            arguments = (generators[name], answer.strip(), reference["entry"])
            if reference["task"] in READING_TASKS:
                return _task_score(*arguments)
            if run_apart is None:
                raise ValueError(f"scoring {reference['task']} executes the answer, which needs bubblewrap; see docs/sandbox.md")
            return float(run_apart(_task_score, *arguments))

        return of_first_group(self.pattern, score)

    def compared_with(self, reference: Mapping[str, object]) -> list[Any]:
        """Return what ``why_refused`` looks at in a row."""
        return ["entry" in reference]

    @staticmethod
    def why_refused(*values: object) -> str | None:
        """Say why no response can be compared with the row's answer; None where one can."""
        return None if values[0] else "the row is not of a reasoning_gym source, so its answer cannot be scored by one"


def _task_score(generator: Any, answer: str, entry: Mapping[str, Any]) -> float:
    return float(generator.score_answer(answer, entry))
