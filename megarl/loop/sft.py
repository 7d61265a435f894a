"""The supervised fine-tuning loop."""

from megarl.algorithms.batches import build_supervised_batch
from megarl.algorithms.objectives import supervised_objective
from megarl.config.schema import Config
from megarl.loop.run import Run
from megarl.train.roles import Policy, share_results


def run_sft(config: Config, resume: bool) -> None:
    """Train on the answers of data.train; every rank of the world runs this."""
    policy = Policy(config, total_updates=config.steps)
    with Run(config, policy, resume=resume) as run:
        run.evaluate_if_due()
        while run.step < config.steps:
            with run.timer.phase("data"):
                packed = run.examples.take(config.sft.examples_per_step)
            with run.timer.phase("update"):
                updates = [policy.update(build_supervised_batch(packed), supervised_objective)]
            run.finish_step(share_results(policy, updates))
        run.export()
