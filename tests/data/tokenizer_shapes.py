"""Tiny tokenizers in the shapes of published models, written by the tokenizers library as their folders have them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["The answer is 42. Be short: what is 2 + 2?\n  It's 4, isn't it?\n\nüber é 中文 and more text, more text."] * 20
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A folder: its tokenizer.json, tokenizer_config.json and config.json."""

    tokenizer: Callable[[], Tokenizer]
    settings: dict[str, Any]
    config: dict[str, Any]
    bos: str | None = None  # that the model's texts begin with
    generation: dict[str, Any] = field(default_factory=dict)


def special(*texts: str, **flags: Any) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False, **flags) for text in texts]


def byte_level(split: pre_tokenizers.PreTokenizer, added: list[AddedToken], **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(added)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def by_regex(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    token = (bos, tokenizer.token_to_id(bos))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[token])
    return tokenizer


def llama_3() -> Tokenizer:
    added = special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = with_bos(byte_level(by_regex(LLAMA_3), added), "<|begin_of_text|>")
    template = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def qwen_2(*more: AddedToken) -> Tokenizer:
    added = special("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_level(by_regex(QWEN_2), [*added, *more], normalizer=normalizers.NFC())


def qwen_3() -> Tokenizer:
    return qwen_2(*(AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>", "<tool_call>")))


DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")


def deepseek_llama() -> Tokenizer:
    return with_bos(byte_level(by_regex(LLAMA_3), special(*DEEPSEEK_TOKENS, "<think>", "</think>")), DEEPSEEK_TOKENS[0])


def deepseek_qwen() -> Tokenizer:
    return byte_level(by_regex(QWEN_2), special(*DEEPSEEK_TOKENS), post_processor=processors.ByteLevel(trim_offsets=False))


def deepseek_v3() -> Tokenizer:
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3)]
    split = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return byte_level(split, special(*DEEPSEEK_TOKENS))


def smollm_2() -> Tokenizer:
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return byte_level(digits, special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def gpt_2() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), special("<|endoftext|>"))


def sentencepiece_like(added: list[AddedToken], **parts: Any) -> Tokenizer:
    """BPE over ▁ with a token for each byte that no character has, as converters write sentencepiece models."""
    corpus = [text.replace(" ", "▁") for text in CORPUS]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {text: index for index, text in enumerate([*texts, *sorted(model["vocab"], key=model["vocab"].get)])}
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens([*special("<unk>", "<s>", "</s>"), *added])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return with_bos(tokenizer, "<s>")


def llama_2() -> Tokenizer:
    return sentencepiece_like([], normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def mistral() -> Tokenizer:
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return sentencepiece_like(special("[INST]", "[/INST]"), pre_tokenizer=metaspace)


def phi_3() -> Tokenizer:
    prepended = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens = special("<|endoftext|>", "<|assistant|>", "<|user|>", "<|end|>", rstrip=True)
    tokenizer = sentencepiece_like(tokens, normalizer=prepended)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return tokenizer


def gemma() -> Tokenizer:
    return sentencepiece_like(
        special("<start_of_turn>", "<end_of_turn>"),
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )


def word_level() -> Tokenizer:
    words = ["<unk>", "<eos>", *sorted({word for text in CORPUS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


LLAMA_3_NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True}
SENTENCEPIECE_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATML_NAMES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "add_bos_token": False}
DEEPSEEK_NAMES = {
    "tokenizer_class": "LlamaTokenizerFast",
    "bos_token": {"__type": "AddedToken", "content": DEEPSEEK_TOKENS[0], "normalized": True},
    "eos_token": {"__type": "AddedToken", "content": DEEPSEEK_TOKENS[1], "normalized": True},
    "add_bos_token": True,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
}
SHAPES = {
    "Llama 3": Shape(
        llama_3, {"tokenizer_class": "PreTrainedTokenizerFast"} | LLAMA_3_NAMES, {"model_type": "llama"}, "<|begin_of_text|>"
    ),
    "Llama 3 as LlamaTokenizer": Shape(
        llama_3, {"tokenizer_class": "LlamaTokenizer"} | LLAMA_3_NAMES, {"model_type": "llama"}, "<|begin_of_text|>"
    ),
    "Qwen 2": Shape(qwen_2, {"tokenizer_class": "Qwen2Tokenizer"} | CHATML_NAMES, {"model_type": "qwen2"}),
    "Qwen 3": Shape(qwen_3, {"tokenizer_class": "Qwen2Tokenizer"} | CHATML_NAMES, {"model_type": "qwen3"}),
    "DeepSeek-R1-Distill-Llama": Shape(deepseek_llama, DEEPSEEK_NAMES, {"model_type": "llama"}, DEEPSEEK_TOKENS[0]),
    "DeepSeek-R1-0528-Qwen3": Shape(deepseek_qwen, DEEPSEEK_NAMES, {"model_type": "qwen3"}, DEEPSEEK_TOKENS[0]),
    "DeepSeek-V3": Shape(deepseek_v3, DEEPSEEK_NAMES, {"model_type": "deepseek_v3"}, DEEPSEEK_TOKENS[0]),
    "Mistral": Shape(mistral, {"tokenizer_class": "LlamaTokenizer"} | SENTENCEPIECE_NAMES, {"model_type": "mistral"}, "<s>"),
    "Mistral Nemo": Shape(
        lambda: with_bos(byte_level(by_regex(TEKKEN), special("<unk>", "<s>", "</s>", "[INST]")), "<s>"),
        {"tokenizer_class": "GPT2Tokenizer"} | SENTENCEPIECE_NAMES,
        {"model_type": "mistral"},
        "<s>",
    ),
    "Llama 2": Shape(
        llama_2,
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False} | SENTENCEPIECE_NAMES,
        {"model_type": "llama"},
        "<s>",
    ),
    "Phi 3": Shape(
        phi_3,
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False} | SENTENCEPIECE_NAMES | {"eos_token": "<|endoftext|>"},
        {"model_type": "phi3"},
    ),
    "Gemma": Shape(gemma, {"tokenizer_class": "GemmaTokenizer"} | SENTENCEPIECE_NAMES, {"model_type": "gemma2"}, "<s>"),
    "SmolLM 2": Shape(smollm_2, {"tokenizer_class": "GPT2Tokenizer"} | CHATML_NAMES, {"model_type": "llama"}),
    "GPT 2": Shape(gpt_2, {"model_max_length": 1024}, {"model_type": "gpt2", "eos_token_id": 300}),
    "words in a Qwen 2 folder": Shape(word_level, {"eos_token": "<eos>", "unk_token": "<unk>"}, {"model_type": "qwen2"}),
    "unigram": Shape(
        unigram, {"tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}, {"model_type": "llama"}
    ),
    "word pieces": Shape(
        word_piece,
        {"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]", "do_lower_case": False, "clean_up_tokenization_spaces": True},
        {"model_type": "llama"},
    ),
    "bytes, no class named": Shape(qwen_2, {"eos_token": "<|im_end|>"}, {}),
    "bytes in a Qwen 2 folder": Shape(gpt_2, {"eos_token": "<|endoftext|>"}, {"model_type": "qwen2"}),
}


def write_tokenizer(folder: Path, shape: Shape, **settings: Any) -> Path:
    """Write the folder, with ``settings`` more in tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    shape.tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(shape.settings | settings), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config), encoding="utf-8")
    if shape.generation:
        (folder / "generation_config.json").write_text(json.dumps(shape.generation), encoding="utf-8")
    return folder
