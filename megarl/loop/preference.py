"""The loop of training a policy or a reward model on preference pairs."""

from contextlib import ExitStack
from functools import partial

from megarl.algorithms.batches import build_preference_batch
from megarl.algorithms.preferences import build_pair_objective
from megarl.algorithms.step_metrics import step_metrics
from megarl.config.schema import Config
from megarl.data.sampler import build_pair_source
from megarl.data.template import PreferencePair
from megarl.data.tokenizer import run_tokenizer
from megarl.loop.evaluation import Measure
from megarl.loop.examples import Examples
from megarl.loop.open_run import open_run
from megarl.loop.pairs import HeldOutPairs, pack_for
from megarl.loop.run import Run
from megarl.loop.start_checks import row_sizes
from megarl.observe.reporter import Reporter
from megarl.train.learner import Learner, share_results
from megarl.train.roles import Reference, build_learner


def run_preference(config: Config, resume: bool) -> None:
    """Train on the pairs of data.train; every rank of the world runs this."""
    learner = build_learner(config, total_updates=config.steps)
    reference = Reference(config) if config.has_reference else None
    objective = build_pair_objective(config)
    with open_run(config, {"policy": learner}, partial(_open_data, config, learner, reference), resume=resume) as parts:
        run = parts.run
        parts.evaluation.at_start()
        while not run.is_over:
            with run.timer.phase("data"):
                packed = parts.data.take(config.preference.pairs_per_step)
            with run.timer.phase("score"):
                reference_logprobs = None if reference is None else reference.engine.forward_only(packed)[0]
            with run.timer.phase("update"):
                update = learner.update(build_preference_batch(packed, reference_logprobs), objective)
            metrics = step_metrics(share_results(learner, [update]))
            run.advance()
            metrics |= parts.evaluation.after_step()
            parts.reporter.step(run.step, metrics, run.timer.step_breakdown())
            parts.checkpoints.save_if_due(parts.data)
        parts.checkpoints.export(parts.reporter.message)


def _open_data(
    config: Config, learner: Learner, reference: Reference | None, run: Run, reporter: Reporter, stack: ExitStack
) -> tuple[Examples[PreferencePair], Measure | None]:
    """Open the pairs to train on, and the held-out ones."""
    held_out = None if config.evaluation.data is None else HeldOutPairs(config, learner, reference)
    tokenizer = run_tokenizer(config)
    pairs = Examples(lambda: build_pair_source(config, tokenizer, row_sizes(config, tokenizer)), partial(pack_for, config))
    if held_out is None:
        return pairs, None

    def measure() -> dict[str, float]:
        metrics = held_out.evaluate()
        accuracy, loss = metrics["held_out/accuracy"], metrics["held_out/loss"]
        reporter.message(f"step {run.step}: held-out accuracy {accuracy:.1%}, loss {loss:.4f}")
        return metrics

    return pairs, measure
