"""Packaging of MegaRL."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Lines of requirements/NAME.txt without comments."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


setup(
    name="megarl",
    version="0.1.0",
    description="Reinforcement learning for large language models on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megarl", "megarl.*"]),
    package_data={
        "megarl.config": ["presets/*.yaml"],
        "megarl.engines": ["plugin/*.py", "plugin/*/*", "sglang_cpu/*.py", "sglang_cpu/*/*"],
    },
    install_requires=requirements("runtime"),
    extras_require={name: requirements(name) for name in ("dev", "gpu", "sglang", "vllm")},
    entry_points={"console_scripts": ["megarl=megarl.cli:main"]},
)
