"""Both conversions of a random Qwen2.5-shaped bfloat16 checkpoint against ``cp`` of the same bytes, same disk, same run.

    python benchmarks/conversion.py --size 7B --folder /tmp

Everything is written below a new folder of --folder and removed at the end; three copies of the checkpoint are on the disk at
once. Before each measurement what is unwritten is flushed and the inputs are dropped from the page cache. The tools have everything
on the disk when they end and ``cp`` has not, so ``cp`` is timed alone and with a ``sync`` after it. Peak memory is the process's
highest resident set.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor
from transformers import Qwen2Config

from megarl.families.registry import read_architecture
from megarl.weights.export import shard_name, write_index
from megarl.weights.files.safetensors_files import write_safetensors
from megarl.weights.files.stored_tensors import windows
from megarl.weights.mapping import build_weight_map

TOOLS = Path(__file__).parent.parent / "tools" / "convert"
NUM_FILES = 4
SIZES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}


def make_checkpoint(folder: Path, size: str) -> int:
    """Write config and safetensors with random bits; returns the bytes of the tensors."""
    Qwen2Config(**SIZES[size], dtype="bfloat16").save_pretrained(folder)
    shapes = build_weight_map(read_architecture(folder), 1, with_transformer_engine=False).hugging_face_shapes()
    names = list(shapes)
    per_file = -(-len(names) // NUM_FILES)
    files = [names[start : start + per_file] for start in range(0, len(names), per_file)]
    generator = numpy.random.default_rng(0)

    def overlaps(names: list[str]) -> Iterator[Tensor]:
        for name in names:
            for start, stop in windows(shapes[name], torch.bfloat16):
                count = (stop - start) * int(numpy.prod(shapes[name][1:]))
                yield torch.frombuffer(bytearray(generator.bytes(2 * count)), dtype=torch.bfloat16)

    for number, names_of_file in enumerate(files, start=1):
        with (folder / shard_name(number, len(files))).open("wb") as stream:
            write_safetensors(stream, {name: (shapes[name], torch.bfloat16) for name in names_of_file}, overlaps(names_of_file))
    num_bytes = sum(2 * int(numpy.prod(shape)) for shape in shapes.values())
    write_index(folder, files, num_bytes)
    return num_bytes


def forget(folder: Path) -> None:
    """Flush what is unwritten and drop the folder's files from the page cache, so that every measurement reads from the disk."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(label: str, inputs: list[Path], *command: object) -> float:
    """Run a command whose inputs are not in memory; prints and returns its seconds."""
    for folder in inputs:
        forget(folder)
    start = time.perf_counter()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{label} failed with exit status {process.returncode}")
    processor = usage.ru_utime + usage.ru_stime
    print(
        f"{label:<24} {seconds:>7.1f} s   {processor:>7.1f} s of CPU   peak {usage.ru_maxrss / 2**20:>5.2f} GiB",
        flush=True,
    )
    return seconds


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of ``cp`` alone and with everything on the disk."""
    seconds = measure(f"cp of {source.name}", [source], "cp", "-r", source, target)
    start = time.perf_counter()
    os.sync()
    written = seconds + time.perf_counter() - start
    print(f"{'  and sync':<24} {written:>7.1f} s")
    shutil.rmtree(target)
    return seconds, written


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="1.5B")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="megarl-conversion-") as name:
        folder = Path(name)
        original, converted, again = folder / "hugging-face", folder / "megatron", folder / "again"
        original.mkdir()
        num_bytes = make_checkpoint(original, options.size)
        print(f"Qwen2.5 {options.size}, bfloat16, {num_bytes / 1e9:.2f} GB, {os.cpu_count()} cores")
        ratios = []
        for source, target, tool in ((original, converted, "hf_to_megatron.py"), (converted, again, "megatron_to_hf.py")):
            alone, written = copy(source, folder / "copy")
            seconds = measure(tool, [source], sys.executable, TOOLS / tool, source, target)
            ratios.append(f"{tool}: {seconds / alone:.2f} × cp, {seconds / written:.2f} × cp and sync")
        shutil.rmtree(converted)
        measure("verify.py", [original, again], sys.executable, TOOLS / "verify.py", original, again)
        print("\n".join(ratios))


if __name__ == "__main__":
    main()
