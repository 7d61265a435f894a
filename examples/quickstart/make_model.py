"""Write a small Qwen2 model with random weights and a byte-level tokenizer as a Hugging Face folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

MAX_VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(corpus: Sequence[str] = ()) -> Qwen2Tokenizer:
    """<pad> is 0, <eos> is 1, then one token per byte, so that every text round-trips, then merges learnt from ``corpus``.

    Digits are never merged. Without a corpus each ASCII character is one token.
    """
    vocabulary = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer.train_new_from_iterator(corpus, vocab_size=MAX_VOCABULARY) if corpus else tokenizer


def questions(task: str) -> list[str]:
    """Some questions of a reasoning-gym task, for the words in them."""
    return [entry["question"] for entry in reasoning_gym.create_dataset(task, size=500, seed=0)]


def make_model(
    out: Path,
    hidden: int = 128,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 512,
    max_positions: int = 2048,
    seed: int = 0,
    corpus: Sequence[str] = (),
) -> int:
    """Write the model folder ``out``, its tokenizer fitted to ``corpus``, and return its number of parameters."""
    tokenizer = make_tokenizer(corpus)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=max_positions,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads")
    parser.add_argument("--intermediate", type=int, default=512, help="size of the MLP")
    parser.add_argument("--max-positions", type=int, default=2048, help="longest sequence")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--task", help="reasoning-gym task whose words become single tokens")
    arguments = vars(parser.parse_args())
    task = arguments.pop("task")
    num_parameters = make_model(**arguments, corpus=questions(task) if task else ())
    print(f"{arguments['out']}: Qwen2, {num_parameters / 1e6:.2f} million parameters")


if __name__ == "__main__":
    main()
