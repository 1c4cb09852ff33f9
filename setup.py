"""Installation. Versions are those that the tests run with; megamod.versions refuses the ones known not to fit."""

from setuptools import find_packages, setup

setup(
    name="megamod",
    version="0.1.0",
    description="Training content-moderation language models on megatron-core, every part of the run open to the researcher",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megamod", "megamod.*"]), "megamod_kernels"],
    package_dir={"megamod": "megamod", "megamod_kernels": "kernels/megamod_kernels"},  # a top-level `kernels` is another package's name
    install_requires=[
        "torch==2.13.0",
        "megatron-core==0.16.1",
        "transformers==5.23.0",
        "tokenizers==0.23.3",
        "safetensors==0.8.0",
        "sentencepiece==0.2.3",
        "numpy>=2.2,<2.5",
        "numba==0.68.1",  # what nf4 does on a CPU
        "scikit-learn>=1.7,<1.10",
        "matplotlib>=3.10,<3.12",
        "jinja2==3.1.6",
        "rich==15.0.0",
        "tensorboard==2.21.0",
        "tqdm==4.70.1",
    ],
    extras_require={
        "gguf": ["gguf==0.19.0"],  # tools/real_weights.py
        "cuda": ["transformer-engine[pytorch]", "flash-attn", "triton"],
        "test": [
            "pytest==9.2.0",
            "hypothesis==6.170.15",
            "peft==0.21.2",
            "trl==1.16.0",
            "bitsandbytes==0.50.2",
            "mistralrs==0.9.5",
            "gguf==0.19.0",
            "triton==3.9.0; sys_platform == 'linux'",
            "ruff==0.17.5",
            "mypy==2.4.1",
        ],
    },
)
