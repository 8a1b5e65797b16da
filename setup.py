"""The distribution: packages ufm_fast and ufm_kernels, and the extras."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path("ufm_fast/version.py").read_text("utf-8").splitlines()
    if line.startswith("__version__")
)

PLOT = ["matplotlib>=3.8"]
DATA = ["scikit-learn>=1.3", "mlxtend>=0.23"]
DOCS = ["sphinx>=8", "furo>=2024.8", "myst-parser>=4"]
TABLES = ["pandas>=2.0", "pyarrow>=14"]

setup(
    name="ufm-fast",
    version=VERSION,
    description="Unconstrained features model solver with fused kernels, optimality certificates "
    "and large-K metrics",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["ufm_fast", "ufm_fast.*"]) + find_packages("kernels"),
    package_dir={"ufm_kernels": "kernels/ufm_kernels"},
    package_data={
        "ufm_fast": ["py.typed", "presets.toml", "studies/ready/*.toml"],
        "ufm_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "typer>=0.12.4",
        "rich>=13",
        "safetensors>=0.4",
        "scipy>=1.11",
        "filelock>=3.20.1",
        "platformdirs>=4",
        "simpleeval>=1.0.3",
        "tomli-w>=1.0",
        'tomli>=2.0; python_version < "3.11"',
        'psutil>=5.9; platform_system != "Linux"',
    ],
    extras_require={
        "plot": PLOT,
        "data": DATA,
        "tables": TABLES,
        "tensorboard": ["tensorboard>=2.15"],
        "docs": PLOT + DATA + DOCS,
        "all": PLOT + DATA + TABLES,
        "test": [
            *PLOT,
            *DATA,
            *TABLES,
            "pytest>=8",
            "hypothesis>=6.100",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "mypy>=1.10",
            "setuptools>=68",
            "wheel",
            'triton>=3.6; platform_system == "Linux"',
        ],
    },
    entry_points={"console_scripts": ["ufm-fast=ufm_fast.cli:main"]},
)
