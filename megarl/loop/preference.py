"""The loop of training a policy or a reward model on preference pairs."""

from megarl.algorithms.batches import build_preference_batch
from megarl.algorithms.preferences import build_pair_objective
from megarl.config.models_of import has_reference
from megarl.config.schema import Config
from megarl.loop.pairs import HeldOutPairs
from megarl.loop.run import Run
from megarl.train.roles import Reference, build_learner, share_results


def run_preference(config: Config, resume: bool) -> None:
    """Train on the pairs of data.train; every rank of the world runs this."""
    learner = build_learner(config, total_updates=config.steps)
    reference = Reference(config) if has_reference(config) else None
    held_out = HeldOutPairs(config, learner, reference) if config.evaluation.data is not None else None
    objective = build_pair_objective(config)
    with Run(config, learner, resume=resume, held_out=held_out) as run:
        run.evaluate_if_due()
        while run.step < config.steps:
            with run.timer.phase("data"):
                packed = run.examples.take(config.preference.pairs_per_step)
            with run.timer.phase("score"):
                reference_logprobs = None if reference is None else reference.engine.forward_only(packed)[0]
            with run.timer.phase("update"):
                updates = [learner.update(build_preference_batch(packed, reference_logprobs), objective)]
            run.finish_step(share_results(learner, updates))
        run.export()
