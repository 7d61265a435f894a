"""The supervised fine-tuning loop."""

from contextlib import ExitStack
from functools import partial

from megarl.algorithms.batches import build_supervised_batch
from megarl.algorithms.objectives import supervised_objective
from megarl.algorithms.step_metrics import step_metrics
from megarl.config.schema import Config
from megarl.data.packing import pack_examples
from megarl.data.sampler import build_sft_source
from megarl.data.template import SFTExample
from megarl.data.tokenizer import run_tokenizer
from megarl.loop.evaluation import Measure, measure_responses
from megarl.loop.examples import Examples
from megarl.loop.main_rank import on_main_rank
from megarl.loop.open_run import open_run
from megarl.loop.prompts import read_prompts
from megarl.loop.rollout_manager import RolloutManager
from megarl.loop.run import Run
from megarl.loop.start_checks import row_sizes
from megarl.observe.reporter import Reporter
from megarl.train.learner import share_results
from megarl.train.roles import Policy


def run_sft(config: Config, resume: bool) -> None:
    """Train on the answers of data.train; every rank of the world runs this."""
    policy = Policy(config, total_updates=config.steps)
    with open_run(config, {"policy": policy}, partial(_open_data, config, policy), resume=resume) as parts:
        run = parts.run
        parts.evaluation.at_start()
        while not run.is_over:
            with run.timer.phase("data"):
                packed = parts.data.take(config.sft.examples_per_step)
            with run.timer.phase("update"):
                update = policy.update(build_supervised_batch(packed), supervised_objective)
            metrics = step_metrics(share_results(policy, [update]))
            run.advance()
            metrics |= parts.evaluation.after_step()
            parts.reporter.step(run.step, metrics, run.timer.step_breakdown())
            parts.checkpoints.save_if_due(parts.data)
        parts.checkpoints.export(parts.reporter.message)


def _open_data(
    config: Config, policy: Policy, run: Run, reporter: Reporter, stack: ExitStack
) -> tuple[Examples[SFTExample], Measure | None]:
    """Open the examples and, where answers to held-out prompts are measured, an engine for them."""
    tokenizer = run_tokenizer(config)
    examples = Examples(lambda: build_sft_source(config, tokenizer, row_sizes(config, tokenizer)), pack_examples)
    if config.evaluation.data is None:
        return examples, None
    prompts = on_main_rank(lambda: read_prompts(config, tokenizer))
    rollout = RolloutManager(config, tokenizer, policy, reporter.message, prompts, with_greedy=False)
    stack.callback(rollout.close)

    def measure() -> dict[str, float]:
        rollout.push_weights(run.weight_version)
        return measure_responses(run, rollout, reporter)

    return examples, measure
