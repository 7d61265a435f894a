"""The hybrid reward with a real server for a judge."""

import asyncio

import pytest
from aiohttp import web
from pydantic import ValidationError

from judge_server import completion, serve
from megarl.config.checks.run import check_run
from megarl.config.load import describe
from megarl.config.schema import Config, RewardsConfig
from megarl.errors import RewardError
from megarl.rewards.combine import RewardScorer
from megarl.types import FinishReason, Prompt, Rollout

pytestmark = pytest.mark.timeout(60)

DOCUMENT = "Long ago a fox lived in the SECRET-DOCUMENT."
REFERENCE = {"answer": "Paris", "answers": ["Paris", "Lutetia"], "question": "Which city?", "documents": [DOCUMENT]}


def rollout(text, index=0, task="train", **changes):
    reference = {**REFERENCE, **changes}
    prompt = Prompt(prompt_id=f"{task}/3", token_ids=(1,), text=DOCUMENT, reference=reference, task=task)
    return Rollout(
        prompt=prompt,
        sample_index=index,
        token_ids=(),
        from_policy=(),
        logprobs=(),
        weight_versions=(),
        finish_reason=FinishReason.STOP,
        text=text,
    )


def scorer_settings(url, match=("f1",), **judge):
    judge = {"url": url, "model": "judge-7b", "timeout": 10, "retries": 2, "retry_delay": 0.01, **judge}
    return {"type": "document_qa", "extract": "the_answer_is", "match": list(match), "weight": 2.0, "judge": judge}


def score_all(answer, rollouts, *, url=None, rewards=None, **judge):
    """The scored rollouts, and the server that answered."""

    async def main():
        async with serve(answer) as server:
            config = RewardsConfig(scorers=[scorer_settings(url or server.url, **judge)], **(rewards or {}))
            scorer = RewardScorer(config, {}, str)
            try:
                await scorer.check_servers()
                del server.bodies[:]
                return list(await asyncio.gather(*(scorer.score(one) for one in rollouts))), server
            finally:
                await scorer.close()

    return asyncio.run(main())


def after_start(answer):
    """Says yes to the question at the start, whatever it is, then does what the test wants."""
    started = False

    def reply(index, body):
        nonlocal started
        if not started:
            started = True
            return "[[YES]]"
        return answer(index, body)

    return reply


def test_the_higher_of_rule_and_judge_counts_and_the_judge_is_asked_only_where_it_matters():
    def verdict(index, body):
        return "They agree. [[YES]]" if "capital" in body["messages"][0]["content"] else "[[NO]]"

    texts = [
        "the answer is paris",
        "the answer is the capital of France",
        "the answer is Paris or Rome",
        "the answer is Rome",
        "Paris",
        "the answer is capital of Paris",
        "the answer is " + "Paris " * 500,
    ]
    scored, server = score_all(after_start(verdict), [rollout(text) for text in texts])
    names = ("document_qa", "document_qa_rule", "document_qa_judge")
    assert [tuple(one.parts.get(name) for name in names) for one in scored[:6]] == [
        (1.0, 1.0, None),
        (1.0, 0.0, 1.0),
        (0.5, 0.5, 0.0),  # one of three tokens, the gold one: 2 · 1 / (3 + 1)
        (0.0, 0.0, 0.0),
        (0.0, 0.0, None),
        (1.0, 0.5, 1.0),  # the higher one, not the sum
    ]
    assert scored[6].parts["document_qa_judge"] == 0.0  # too long to be shown
    assert [one.reward for one in scored[:6]] == [2.0, 2.0, 1.0, 0.0, 0.0, 2.0]
    assert len(server.bodies) == 4
    for body in server.bodies:
        (message,) = body["messages"]
        assert "Which city?" in message["content"]
        assert "Paris or Lutetia" in message["content"]
        assert "SECRET-DOCUMENT" not in str(body)
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-7b", 0.0, 512)


def test_prompt_verdict_and_arguments_are_the_users():
    prompt = "{answer}|{reference}|{question}|{other}"
    scored, server = score_all(
        lambda index, body: "grade A, no, grade: b",
        [rollout("the answer is {reference}")],
        prompt=prompt,
        verdict=r"grade:? (\w)",
        positive="B",
        max_tokens=9,
        arguments={"chat_template_kwargs": {"enable_thinking": False}},
    )
    assert scored[0].parts["document_qa_judge"] == 1.0
    (body,) = server.bodies
    assert body["messages"] == [{"role": "user", "content": "{reference}|Paris or Lutetia|Which city?|{other}"}]
    assert body["max_tokens"] == 9
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_an_overloaded_or_late_judge_is_asked_again():
    def answer(index, body):
        return [web.Response(status=503, text="loading"), None, "[[YES]]"][index]

    (scored,), server = score_all(after_start(answer), [rollout("the answer is Rome")], timeout=2)
    assert scored.parts["document_qa"] == 1.0
    assert len(server.bodies) == 3


BAD_REPLIES = [
    (lambda index, body: web.Response(status=500, text="out of\nmemory"), 3, "in 3 requests: it answered with 500: out of memory"),
    (lambda index, body: None, 3, "in 3 requests: no answer within 0.7 seconds"),
    (lambda index, body: web.json_response({"message": "no such model"}, status=404), 1, "refused model judge-7b with 404"),
    (lambda index, body: web.Response(text="<html>"), 1, "no chat completion: '<html>'"),
    (lambda index, body: web.json_response({"choices": []}), 1, "no chat completion"),
    (lambda index, body: completion("It is", "length"), 1, "did not finish its reply within max_tokens 512"),
    (lambda index, body: completion(None), 1, "did not finish its reply"),
    (lambda index, body: "perhaps", 1, "no verdict"),
]


@pytest.mark.parametrize(("answer", "num_requests", "reason"), BAD_REPLIES)
def test_a_failing_judge_leaves_the_rule_or_follows_on_failure(answer, num_requests, reason, caplog):
    one = rollout("the answer is Paris or Rome", index=5)
    timeout = 0.7 if "0.7" in reason else 10
    (scored,), server = score_all(after_start(answer), [one], rewards={"on_failure": "zero"}, timeout=timeout)
    assert scored.reward == 2 * 0.5
    assert scored.parts == {"document_qa": 0.5, "document_qa_rule": 0.5}
    (failure,) = scored.failures
    assert failure in caplog.messages
    assert "\n" not in failure
    assert failure.startswith("document_qa failed on train/3 sample 5: ")
    assert server.url in failure
    assert reason in failure
    assert len(server.bodies) == num_requests


def test_drop_and_stop():
    def refuse(index, body):
        return web.Response(status=400, text="no")

    one = rollout("the answer is Rome")
    assert score_all(after_start(refuse), [one], rewards={"on_failure": "drop"})[0] == [None]
    with pytest.raises(
        RewardError, match=r"document_qa failed on train/3 sample 0: judge http://127\.0\.0\.1:\d+/v1 refused.*on_failure"
    ):
        score_all(after_start(refuse), [one])


def test_a_judge_that_goes_away_during_the_run():
    async def main():
        async with serve(lambda index, body: "[[NO]]") as server:
            scorer = RewardScorer(RewardsConfig(scorers=[scorer_settings(server.url)], on_failure="zero"), {}, str)
            await scorer.check_servers()
        try:
            return await scorer.score(rollout("the answer is Rome"))
        finally:
            await scorer.close()

    (failure,) = asyncio.run(main()).failures
    assert "failed in 3 requests: Cannot connect to host" in failure


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda index, body: web.Response(status=404, text="no model judge-7b"), "refused model judge-7b with 404: no model"),
        (lambda index, body: "I cannot tell", r"no verdict .* in 'I cannot tell'; correct prompt, verdict"),
        (lambda index, body: None, "no answer within 0.1 seconds; start it"),
    ],
)
def test_a_judge_that_does_not_work_is_found_at_the_start(answer, reason):
    with pytest.raises(RewardError, match=reason) as error:
        score_all(answer, [], timeout=0.1 if "0.1" in reason else 10)
    assert "\n" not in str(error.value)


def test_a_judge_that_is_down_is_found_at_the_start():
    with pytest.raises(RewardError, match=r"judge http://127\.0\.0\.1:9/v1 failed in 3 requests: Cannot connect to host"):
        score_all(lambda index, body: "[[YES]]", [], url="http://127.0.0.1:9/v1")


def test_no_more_questions_are_open_than_responses_may_be_scored():
    """Nobody answers until a fourth question comes, which must not happen, or time is up."""
    three_open, fourth = asyncio.Event(), asyncio.Event()

    def answer(index, body):
        (fourth if index > 3 else three_open if index == 3 else asyncio.Event()).set()
        return None if index else "[[YES]]"  # the first is the question at the start

    async def main():
        async with serve(answer) as server:
            settings = scorer_settings(server.url)
            scorer = RewardScorer(RewardsConfig(scorers=[settings], concurrency=3), {}, str)
            await scorer.check_servers()
            tasks = [asyncio.create_task(scorer.score(rollout(f"the answer is {index}", index))) for index in range(12)]
            await three_open.wait()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(fourth.wait(), 0.5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await scorer.close()

    asyncio.run(main())


def test_tasks_have_judges_of_their_own():
    """Two tasks with two judges and two kinds of verdict under one name; each is asked at the start and for its own task alone."""

    async def main():
        async with serve(lambda index, body: "[[YES]] grade: F") as general, serve(lambda index, body: "[[NO]] grade: A") as law:
            own = scorer_settings(law.url, verdict=r"grade: (\w)", positive="A") | {"weight": 3.0}
            never = scorer_settings(law.url, verdict=r"(maybe)")
            task_scorers = {"law": RewardsConfig(scorers=[own]).scorers, "odd": RewardsConfig(scorers=[never]).scorers}
            config = RewardsConfig(scorers=[scorer_settings(general.url)], on_failure="zero")
            scorer = RewardScorer(config, task_scorers, str)
            try:
                with pytest.raises(RewardError, match="no verdict '\\(maybe\\)' in"):
                    await scorer.check_servers()
                asked = len(general.bodies), len(law.bodies)
                rome = "the answer is Rome"
                scored = [await scorer.score(rollout(rome, task=task)) for task in ("law", "train", "odd")]
                return asked, (len(general.bodies), len(law.bodies)), scored, scorer.failure_counts
            finally:
                await scorer.close()

    asked, in_the_end, (law, general, odd), failures = asyncio.run(main())
    assert (asked, in_the_end) == ((1, 2), (2, 4))
    assert law.parts == general.parts == {"document_qa": 1.0, "document_qa_rule": 0.0, "document_qa_judge": 1.0}
    assert (law.reward, general.reward, odd.reward) == (3.0, 2.0, 0.0)
    assert odd.parts == {"document_qa": 0.0, "document_qa_rule": 0.0}
    assert failures == {"odd/document_qa": 1}


def test_a_prompt_without_question_is_a_failure():
    (scored,), server = score_all(
        lambda index, body: "[[YES]]", [rollout("the answer is 4", question=None)], rewards={"on_failure": "zero"}
    )
    assert "the prompt's field 'question' is None" in scored.failures[0]
    assert not server.bodies


def mistakes(*scorers, **rollout_settings):
    data = {"train": {"type": "reasoning_gym", "task": "chain_sum"}}
    config = {"kind": "rl", "steps": 1, "model": {"path": "m"}, "data": data, "rewards": {"scorers": list(scorers)}}
    try:
        return list(check_run(Config.model_validate({**config, "rollout": rollout_settings})))
    except ValidationError as error:
        return [describe(detail, "run.yaml") for detail in error.errors()]


def test_scorers_of_tasks_are_checked_too():
    task = {"name": "law", "source": {"type": "reasoning_gym", "task": "chain_sum"}}
    scorers = [scorer_settings("http://j/v1", timeout=300), {"type": "regex", "pattern": "a", "name": "document_qa_judge"}]
    settings = {"kind": "rl", "steps": 1, "model": {"path": "m"}, "rewards": {"scorers": [{"type": "exact"}]}}
    mixture = {"type": "mixture", "tasks": [{**task, "scorers": scorers}]}
    name, time = check_run(Config.model_validate({**settings, "data": {"train": mixture}}))
    assert name.startswith("data.train.tasks.0.scorers.0.name: the scorer logs its part document_qa_judge")
    assert time.startswith("data.train.tasks.0.scorers.0.judge.timeout: 3 requests of 300 s")


def test_good_settings_pass():
    assert mistakes(scorer_settings("http://judge:8000/v1")) == []
    assert mistakes({"type": "document_qa"}) == []


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        ({"type": "exact", "extract": "boxed"}, "rewards.scorers.0.extract: 'boxed' has no use for type exact"),
        ({**scorer_settings("http://j/v1"), "type": "exact", "extract": None, "match": []}, "0.judge: has no use for type exact"),
        ({"type": "document_qa", "extract": "boxed", "pattern": "(a)"}, "boxed is given beside pattern '(a)'"),
        ({"type": "document_qa", "pattern": "a"}, "pattern: 'a' has no group"),
        ({"type": "document_qa", "match": ["substring"]}, "match: substring over the whole response gives 1"),
        (scorer_settings("http://[::1]", retries=20), "21 requests of 10 s and the waits between them take up to 10695.8 s"),
        (scorer_settings("http://j/v1", prompt="{answer} {question}"), "has no {reference}; add it"),
        (scorer_settings("http://j/v1", verdict="yes"), "judge.verdict: 'yes' has no group"),
        (scorer_settings("http://j/v1", verdict="("), "judge.verdict: '(' is not a regular expression"),
        (scorer_settings("http://j/v1", arguments={"temperature": 1}), "judge.arguments.temperature: is set by MegaRL"),
        (scorer_settings("http://j/v1", timeout=300), "3 requests of 300 s and the waits between them take up to 900.03 s"),
    ],
)
def test_mistakes_are_one_line(scorer, expected):
    (line,) = mistakes(scorer)
    assert expected in line


def test_names_of_parts_must_be_free():
    (line,) = mistakes({"type": "document_qa"}, {"type": "exact", "name": "document_qa_rule"})
    assert "logs its part document_qa_rule, another scorer's name" in line
