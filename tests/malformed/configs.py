"""Malformed configuration files, overrides, layouts and command lines."""

from pathlib import Path

from table import Case, Templates, config_in, sft_config_in, yaml_of

MODEL = "MODEL"  # stands for the template's folder
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{depth}: &a{depth} [{', '.join([f'*a{depth - 1}'] * 10)}]\n" for depth in range(1, 9)
)
DIGITS = "9" * 5000
NEST = "[" * 2000 + "]" * 2000


def _file(label: str, text: str | bytes, *names: str | tuple[str, ...]) -> Case:
    """``megarl config`` of a file with this text."""

    def make(folder: Path, templates: Templates) -> list[str]:
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        (folder / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
        (folder / "c.yaml").write_bytes(content.replace(MODEL.encode(), str(templates.model).encode()))
        return ["config", "c.yaml"]

    return Case(f"config: {label}", make, names)


def _valid(extra: str = "", **values: object) -> str:
    return yaml_of(**({"model": {"path": MODEL}} | values)) + extra


def _set(label: str, override: str, *names: str | tuple[str, ...], command: str = "config") -> Case:
    """An override of a good file."""

    def make(folder: Path, templates: Templates) -> list[str]:
        scorers = {"scorers": [{"type": "exact"}, {"type": "regex", "pattern": "a"}]}
        return [command, config_in(folder, templates, rewards=scorers), "--set", override]

    return Case(f"set: {label}", make, names)


def _run(label: str, *names: str | tuple[str, ...], overrides: tuple[str, ...] = (), **values: object) -> Case:
    """``megarl train`` of a file with these values."""

    def make(folder: Path, templates: Templates) -> list[str]:
        path = sft_config_in(folder, templates, **values)
        return ["train", path, *(part for override in overrides for part in ("--set", override))]

    return Case(f"run: {label}", make, names)


def _layout(label: str, layout: str, *names: str | tuple[str, ...]) -> Case:
    """A layout of ``megarl parity``."""

    def make(folder: Path, templates: Templates) -> list[str]:
        return ["parity", config_in(folder, templates), "--layouts", layout]

    return Case(f"layout: {label}", make, names)


def _line(label: str, arguments: list[str], *names: str | tuple[str, ...], environment: dict[str, str] | None = None) -> Case:
    """A whole command line, in which CONFIG stands for the path of a good file."""

    def make(folder: Path, templates: Templates) -> list[str]:
        path = sft_config_in(folder, templates)
        (folder / "a_file").write_text("text")
        return [argument.replace("CONFIG", path).replace(MODEL, str(templates.model)) for argument in arguments]

    return Case(f"line: {label}", make, names, environment=environment or {})


FILES = [
    _file("empty", "", "c.yaml"),
    _file("only a comment", "# nothing\n", "c.yaml"),
    _file("a list", "- 1\n- 2\n", "c.yaml"),
    _file("a number", "3\n", "c.yaml"),
    _file("a text", "hello\n", "c.yaml"),
    _file("an empty mapping", "{}\n", "kind"),
    _file("not UTF-8", b"kind: \xff\xfe\n", "c.yaml", "UTF-8"),
    _file("UTF-16", "kind: rl\n".encode("utf-16"), "c.yaml", "UTF-8"),
    _file("NUL bytes", b"kind: rl\x00\n", "c.yaml"),
    _file("bytes of a picture", bytes(range(256)) * 20, "c.yaml"),
    _file("control characters", "kind: rl\x1b[31m\n", "c.yaml"),
    _file("a tab as indent", "kind: rl\nmodel:\n\tpath: m\n", "c.yaml:3"),
    _file("an open bracket", "kind: [rl\n", "c.yaml"),
    _file("an open quote", 'kind: "rl\n', "c.yaml"),
    _file("a key twice", _valid("steps: 2\n"), "steps", "already given"),
    _file("a number as key", _valid("3: x\n"), "3", "text"),
    _file("null as key", _valid("~: x\n"), "text"),
    _file("a list as key", _valid("? [a, b]\n: x\n"), "c.yaml", "key"),
    _file("two documents", _valid("---\nkind: rl\n"), "c.yaml", "document"),
    _file("alias bomb", BOMB + _valid(), "c.yaml", "alias"),
    _file("alias of itself", _valid("a: &a [*a]\n"), "c.yaml", "alias"),
    _file("unknown alias", _valid("a: *nowhere\n"), "c.yaml", "nowhere"),
    _file("merge of a number", _valid("optimizer: {<<: 3}\n"), "c.yaml", "merg"),
    _file("2,000 nested brackets", _valid(f"a: {NEST}\n"), "c.yaml", "nested"),
    _file("2,000 nested mappings", _valid("a: " + "{a: " * 2000 + "1" + "}" * 2000 + "\n"), "c.yaml", "nested"),
    _file("500 nested indents", _valid("".join(f"{' ' * depth}a:\n" for depth in range(500))), "c.yaml", "nested"),
    _file("2,000 nested sequences in a line", _valid("a: " + "- " * 2000 + "1\n"), "c.yaml"),
    _file("30 MB of one list", "a: [" + "1, " * 10_000_000 + "1]\n", "c.yaml", ("MB", "large")),
    _file("300,000 values", _valid("a: [" + "1, " * 300_000 + "1]\n"), "c.yaml", ("values", "large")),
    _file("integer of 5,000 digits", _valid(steps=None) + f"steps: {DIGITS}\n", "steps", "5000 digits"),
    _file("octal integer of 5,000 digits", _valid(steps=None) + f"steps: 0{'7' * 5000}\n", "steps"),
    _file("hexadecimal of 5,000 digits", _valid(steps=None) + f"steps: 0x{'f' * 5000}\n", "steps"),
    _file("sexagesimal of 5,000 parts", _valid(steps=None) + f"steps: 1{':59' * 5000}\n", "steps"),
    _file("binary tag that is not base64", _valid(kind=None) + "kind: !!binary '%%%'\n", "c.yaml", "binary"),
    _file("binary tag", _valid(kind=None) + "kind: !!binary cmw=\n", "c.yaml", "binary"),
    _file("python object tag", _valid("a: !!python/object/apply:os.system ['touch owned']\n"), "c.yaml", "python"),
    _file("python tuple tag", _valid("a: !!python/tuple [1]\n"), "c.yaml", "tuple"),
    _file("local tag", _valid("a: !mine 3\n"), "c.yaml", "!mine"),
    _file("set tag", _valid("a: !!set {b, c}\n"), "c.yaml", "set"),
    _file("ordered map tag", _valid("a: !!omap [b: 1]\n"), "c.yaml", "omap"),
    _file("timestamp tag", _valid("a: !!timestamp 2001-99-99\n"), "c.yaml", "timestamp"),
    _file("integer tag on a text", _valid(steps=None) + "steps: !!int many\n", "c.yaml", "many"),
    _file("integer tag on a list", _valid(steps=None) + "steps: !!int [1]\n", "c.yaml", "whole number"),
    _file("float tag on a text", _valid("optimizer: {learning_rate: !!float fast}\n"), "c.yaml", "fast"),
    _file("bool tag on a text", _valid("optimizer: {learning_rate: !!bool maybe}\n"), "c.yaml", "maybe"),
    _file("steps of 10^30", _valid(steps=10**30), "steps"),
    _file("steps negative", _valid(steps=-1), "steps"),
    _file("steps a half", _valid(steps=1.5), "steps"),
    _file("steps a flag", _valid(steps=True), "steps", "True"),
    _file("steps a list", _valid(steps=[1]), "steps"),
    _file("seed of 2^64", _valid(seed=2**64), "seed"),
    _file("seed negative", _valid(seed=-1), "seed"),
    _file("distributed_timeout 1e300", _valid(distributed_timeout=1e300), "distributed_timeout"),
    _file("distributed_timeout 0", _valid(distributed_timeout=0), "distributed_timeout"),
    _file("distributed_timeout a flag", _valid(distributed_timeout=True), "distributed_timeout"),
    _file("learning rate infinite", _valid("optimizer: {learning_rate: .inf}\n"), "optimizer.learning_rate"),
    _file("learning rate NaN", _valid("optimizer: {learning_rate: .nan}\n"), "optimizer.learning_rate"),
    _file("learning rate 1e400", _valid("optimizer: {learning_rate: 1e400}\n"), "optimizer.learning_rate"),
    _file("learning rate a text", _valid("optimizer: {learning_rate: fast}\n"), "optimizer.learning_rate", "fast"),
    _file("tp true", _valid(policy={"parallel": {"tp": True}}), "policy.parallel.tp"),
    _file("tp of 10^20", _valid(policy={"parallel": {"tp": 10**20}}), "policy.parallel.tp"),
    _file("tp 0", _valid(policy={"parallel": {"tp": 0}}), "policy.parallel.tp"),
    _file("micro-batch of 10^30 tokens", _valid(policy={"max_tokens_per_micro_batch": 10**30}), "max_tokens_per_micro_batch"),
    _file("max_new_tokens of 10^12", _valid(rollout={"max_new_tokens": 10**12}), "rollout.max_new_tokens"),
    _file("stop token of 10^30", _valid(rollout={"stop_token_ids": [10**30]}), "rollout.stop_token_ids"),
    _file("stop token negative", _valid(rollout={"stop_token_ids": [-1]}), "rollout.stop_token_ids"),
    _file("sequence_parallel 7", _valid(policy={"parallel": {"sequence_parallel": 7}}), "sequence_parallel"),
    _file("sequence_parallel a text", _valid(policy={"parallel": {"sequence_parallel": "yes please"}}), "sequence_parallel"),
    _file("a section as a list", _valid(optimizer=[]), "optimizer"),
    _file("a section as a text", _valid(rollout="fast"), "rollout", "'fast'"),
    _file("a section as a long text", _valid(rollout="fast " * 200), "rollout"),
    _file("a required section null", _valid(data=None) + "data:\n", "data"),
    _file("kind unknown", _valid(kind="ppo"), "kind", "ppo"),
    _file("kind of 5,000 characters", _valid(kind="k" * 5000), "kind"),
    _file("kind with a newline", _valid(kind="r\nl"), "kind"),
    _file("kind with right-to-left override", _valid(kind="r\u202el"), "kind"),
    _file("unknown key", _valid("optimiser: {}\n"), "optimiser", "optimizer"),
    _file("unknown key with a newline", _valid('"a\\nb": 1\n'), "a", "unknown key"),
    _file("unknown key with an escape sequence", _valid('"a\\x1b[31mb": 1\n'), "unknown key"),
    _file("unknown key with a surrogate", _valid('"a\\ud800b": 1\n'), "c.yaml"),
    _file("unknown key of 5,000 characters", _valid("k" * 1000 + "k" * 4000 + ": 1\n"), "c.yaml"),
    _file("unknown key empty", _valid("'': 1\n"), "unknown key"),
    _file("unknown keys, a hundred", _valid("".join(f"key{index}: 1\n" for index in range(100))), "key0", "unknown key"),
    _file("engine URL of another scheme", _valid(rollout={"engine": "vllm", "vllm": {"url": "ftp://host:1"}}), "rollout.vllm.url"),
    _file("engine URL without a scheme", _valid(rollout={"engine": "vllm", "vllm": {"url": "host:8000"}}), "rollout.vllm.url"),
    _file("engine URL without a host", _valid(rollout={"engine": "sglang", "sglang": {"url": "http://"}}), "rollout.sglang.url"),
    _file("engine URL with a space", _valid(rollout={"sglang": {"url": "http://my host:1"}}), "rollout.sglang.url"),
    _file("engine URL with port 99999", _valid(rollout={"sglang": {"url": "http://host:99999"}}), "rollout.sglang.url"),
    _file("engine URL with a query", _valid(rollout={"sglang": {"url": "http://host:1/?a=b"}}), "rollout.sglang.url"),
    _file("engine URL empty", _valid(rollout={"sglang": {"url": ""}}), "rollout.sglang.url"),
    _file("engine URL with a newline", _valid(rollout={"sglang": {"url": "http://host:1\nx"}}), "rollout.sglang.url"),
    _file(
        "reward server URL of another scheme",
        _valid(rewards={"scorers": [{"type": "reward_server", "url": "file:///etc/passwd", "engine": "vllm"}]}),
        "rewards.scorers.0.url",
    ),
    _file(
        "judge URL without a host",
        _valid(rewards={"scorers": [{"type": "document_qa", "judge": {"url": "http:///v1", "model": "m"}}]}),
        "rewards.scorers.0.judge.url",
    ),
    _file("model.path of 5,000 characters", _valid(model={"path": "m" * 5000}), "model.path"),
    _file("model.path with a newline", _valid(model={"path": "a\nb"}), "model.path"),
    _file("model.path with NUL", _valid(model={"path": "a\0b"}), "model.path"),
    _file("model.path empty", _valid(model={"path": ""}), "model.path"),
    _file("model.path a number", _valid(model={"path": 3}), "model.path"),
    _file("model.path missing", _valid(model={"path": "nowhere"}), "model.path", "nowhere"),
    _file("scorer without a type", _valid(rewards={"scorers": [{}]}), "rewards.scorers.0.type"),
    _file("scorer a text", _valid(rewards={"scorers": ["exact"]}), "rewards.scorers.0"),
    _file("scorers a mapping", _valid(rewards={"scorers": {"type": "exact"}}), "rewards.scorers"),
    _file("pattern that is no regular expression", _valid(rewards={"scorers": [{"type": "regex", "pattern": "("}]}), "pattern"),
    _file(
        "function with a space", _valid(rewards={"scorers": [{"type": "python", "function": "os:sys tem"}]}), "rewards.scorers.0"
    ),
    _file("data source unknown", _valid(data={"train": {"type": "csvv", "path": "a"}}), "data.train.type", "csvv"),
    _file("data source a text", _valid(data={"train": "rows.jsonl"}), "data.train"),
    _file("template without {prompt}", _valid(data={"train": {"type": "jsonl", "path": "a"}, "template": "x"}), "data.template"),
    _file("beta1 of 1", _valid(optimizer={"beta1": 1}), "optimizer.beta1"),
    _file("top_p of 2", _valid(rollout={"top_p": 2}), "rollout.top_p"),
    _file("port of 70000", _valid(rollout={"vllm": {"port": 70000}}), "rollout.vllm.port"),
    _file(
        "weights of a scorer 1e300", _valid(rewards={"scorers": [{"type": "exact", "weight": 1e300}]}), "rewards.scorers.0.weight"
    ),
    _file("request_timeout 1e300", _valid(rollout={"request_timeout": 1e300}), "rollout.request_timeout"),
    _file("rewards.timeout of 10^18", _valid(rewards={"timeout": 10**18}), "rewards.timeout"),
    _file("rewards.concurrency of 10^18", _valid(rewards={"concurrency": 10**18}), "rewards.concurrency"),
    _file(
        "size of 10^30", _valid(data={"train": {"type": "reasoning_gym", "task": "chain_sum", "size": 10**30}}), "data.train.size"
    ),
    _file("keep of 10^30", _valid(checkpoint={"keep": 10**30}), "checkpoint.keep"),
    _file("threads of 10^9", _valid(rollout={"embedded": {"threads": 10**9}}), "rollout.embedded.threads"),
    _file("tensor_parallel_size of 2^63", _valid(rollout={"vllm": {"tensor_parallel_size": 2**63}}), "tensor_parallel_size"),
]

SETS = [
    _set("without a value", "optimizer.learning_rate", "optimizer.learning_rate"),
    _set("without a key", "=3", "=3"),
    _set("empty", "", "--set"),
    _set("empty part of a key", "optimizer..x=3", "optimizer..x"),
    _set("unknown key", "optimizer.learning_rat=3", "optimizer.learning_rat", "learning_rate"),
    _set("unknown key with a newline", "opti\nmizer=3", "--set"),
    _set("key of 5,000 characters", "k" * 5000 + "=3", "--set"),
    _set("key of 2,000 parts", ".".join(["a"] * 2000) + "=3", "--set"),
    _set("section replaced by a number", "rollout=5", "--set", "rollout", "5"),
    _set("section replaced by a list", "policy.parallel=[1, 2]", "policy.parallel"),
    _set("key below a number", "steps.more=3", "steps"),
    _set("index beyond the list", "rewards.scorers.7.weight=1", "scorers", "7"),
    _set("index of 5,000 digits", f"rewards.scorers.{DIGITS}.weight=1", "scorers"),
    _set("index in other digits", "rewards.scorers.²=1", "scorers"),
    _set("2,000 nested brackets", f"steps={NEST}", "steps"),
    _set("5,000-digit value", f"steps={DIGITS}", "steps"),
    _set("alias", "steps=*a", "steps"),
    _set("python tag", "steps=!!python/name:os.system", "steps", "python"),
    _set("binary tag", "steps=!!binary AA==", "steps", "binary"),
    _set("two documents", "steps=1\n---\n2", "steps"),
    _set("a control character", "kind=\x07", "kind"),
    _set("an open bracket", "steps=[1", "steps"),
    _set("a surrogate", "kind=\udcff", "kind"),
    _set("steps of 10^30 in a run", f"steps={10**30}", "steps", command="train"),
    _set("run_dir with NUL", 'run_dir="a\\0b"', "run_dir", command="train"),
]

RUNS = [
    _run("steps of 10^30", "steps", steps=10**30),
    _run("seed of 2^64", "seed", seed=2**64),
    _run("distributed_timeout 1e300", "distributed_timeout", distributed_timeout=1e300),
    _run("run_dir with NUL", "run_dir", run_dir="a\0b"),
    _run("run_dir with a newline", "run_dir", run_dir="a\nb"),
    _run("run_dir of 5,000 characters", "run_dir", run_dir="r" * 5000),
    _run("run_dir empty", "run_dir", run_dir=""),
    _run("run_dir a file", "run_dir", run_dir="/dev/null"),
    _run("run_dir below a file", "run_dir", run_dir="/dev/null/run"),
    _run("run_dir on a file system without space for it", "run_dir", run_dir="/proc/run"),
    _run("model.tokenizer missing", "model.tokenizer", overrides=("model.tokenizer=nowhere",)),
]

LAYOUTS = [
    _layout("unknown key", "foo=2", "foo"),
    _layout("a key twice", "tp=2,tp=1", "tp"),
    _layout("a comma alone", ",", "layout"),
    _layout("without a value", "tp", "tp"),
    _layout("empty value", "tp=", "tp"),
    _layout("value a text", "tp=two", "tp", "two"),
    _layout("value 0", "tp=0", "tp"),
    _layout("value a half", "tp=1.5", "tp"),
    _layout("value of 5,000 digits", f"tp={DIGITS}", "tp"),
    _layout("value of 10^20", f"tp={10**20}", "tp"),
    _layout("dp of 10^20", f"dp={10**20}", "dp"),
    _layout("dp a text", "dp=many", "dp", "many"),
    _layout("other digits", "tp=²", "tp"),
    _layout("a model that the run has not", "critic.tp=2", "critic"),
    _layout("a model that is none", "writer.tp=2", "writer"),
    _layout("control characters", "tp=2\x1b[31m", "tp"),
    _layout("5,000 characters", "x" * 5000 + "=1", "layout"),
    _layout("does not divide the heads", "tp=3", "tp"),
]

LINES = [
    _line("nproc 0", ["train", "CONFIG", "--nproc", "0"], "nproc", "0"),
    _line("nproc a text", ["train", "CONFIG", "--nproc", "two"], "nproc", "two"),
    _line("nproc of 10^30", ["train", "CONFIG", "--nproc", str(10**30)], "nproc"),
    _line("nproc of 100,000", ["train", "CONFIG", "--nproc", "100000"], "nproc"),
    _line("nproc without a value", ["train", "CONFIG", "--nproc"], "nproc"),
    _line("unknown command", ["trian", "CONFIG"], "trian"),
    _line("unknown command with an escape sequence", ["tr\x1b[31m"], "command"),
    _line("unknown option", ["train", "CONFIG", "--set-all", "1"], "--set-all"),
    _line("no config", ["train"], "CONFIG"),
    _line("two configs", ["config", "CONFIG", "CONFIG"], "argument"),
    _line("config missing", ["train", "nowhere.yaml"], "nowhere.yaml"),
    _line("config a folder", ["train", MODEL], "cannot be read"),
    _line("config not YAML", ["train", "a_file"], "a_file"),
    _line("config of 5,000 characters", ["train", "c" * 5000], "cannot be read"),
    _line("config with a newline in its name", ["train", "a\nb.yaml"], "b.yaml"),
    _line("config with an escape sequence in its name", ["train", "a\x1b[2Jb.yaml"], "b.yaml"),
    _line("config that does not decode", ["train", "a\udcff.yaml"], ".yaml"),
    _line("run-dir a file", ["train", "CONFIG", "--run-dir", "a_file"], "a_file"),
    _line("resume of nothing", ["train", "CONFIG", "--resume"], "checkpoint"),
    _line("eval without a checkpoint", ["eval", "CONFIG"], "--checkpoint"),
    _line("eval of nothing", ["eval", "CONFIG", "--checkpoint", "nowhere"], ("nowhere", "evaluation.data")),
    _line("parity without layouts", ["parity", "CONFIG"], "--layouts"),
    _line("parity bound a text", ["parity", "CONFIG", "--layouts", "tp=1", "--bound", "small"], "bound", "small"),
    _line("parity bound NaN", ["parity", "CONFIG", "--layouts", "tp=1", "--bound", "nan"], "bound"),
    _line("plan without a command", ["plan", "nothing"], "nothing"),
    _line("plan sync without a target", ["plan", "sync", "CONFIG"], "--engine"),
    _line("plan sync engine unknown", ["plan", "sync", "CONFIG", "--engine", "tgi"], "engine", "tgi"),
    _line("plan sync tp 0", ["plan", "sync", "CONFIG", "--engine", "vllm", "--tp", "0"], "tp"),
    _line("plan sync tp of 10^20", ["plan", "sync", "CONFIG", "--engine", "vllm", "--tp", str(10**20)], "tp"),
    _line("plan sync to a bad layout", ["plan", "sync", "CONFIG", "--to", "tp=x"], "tp"),
    _line("plan memory of nothing", ["plan", "memory", "nowhere.yaml"], "nowhere.yaml"),
    _line("RANK a text", ["train", "CONFIG"], "RANK", environment={"RANK": "first", "WORLD_SIZE": "2"}),
    _line("RANK beyond the world", ["train", "CONFIG"], "RANK", environment={"RANK": "3", "WORLD_SIZE": "2"}),
    _line("WORLD_SIZE 0", ["train", "CONFIG"], "WORLD_SIZE", environment={"RANK": "0", "WORLD_SIZE": "0"}),
    _line(
        "MASTER_PORT a text",
        ["train", "CONFIG"],
        "MASTER_PORT",
        environment={"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "http"},
    ),
    _line(
        "MASTER_PORT of 70000",
        ["train", "CONFIG"],
        "MASTER_PORT",
        environment={"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "70000"},
    ),
]

CASES = [*FILES, *SETS, *RUNS, *LAYOUTS, *LINES]
