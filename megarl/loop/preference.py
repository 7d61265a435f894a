"""The loop of training on preference pairs."""

from functools import partial

from megarl.algorithms.batches import build_preference_batch
from megarl.algorithms.preferences import preference_objective
from megarl.config.models_of import has_reference
from megarl.config.schema import Config
from megarl.loop.held_out_pairs import HeldOutPairs
from megarl.loop.run import Run
from megarl.train.roles import Policy, Reference, share_results


def run_preference(config: Config, resume: bool) -> None:
    """Train on the pairs of data.train; every rank of the world runs this."""
    policy = Policy(config, total_updates=config.steps)
    reference = Reference(config) if has_reference(config) else None
    held_out = HeldOutPairs(config, policy, reference) if config.evaluation.data is not None else None
    objective = partial(preference_objective, config=config.preference)
    with Run(config, policy, resume=resume, held_out=held_out) as run:
        run.evaluate_if_due()
        while run.step < config.steps:
            with run.timer.phase("data"):
                packed = run.examples.take(config.preference.pairs_per_step)
            with run.timer.phase("score"):
                reference_logprobs = None if reference is None else reference.engine.score(packed)[0]
            with run.timer.phase("update"):
                updates = [policy.update(build_preference_batch(packed, reference_logprobs), objective)]
            run.finish_step(share_results(policy, updates))
        run.export()
