"""Maps the folders at the root to the import name `ppomax`; everything else is in pyproject.toml."""

from setuptools import setup

# No __init__.py in these folders: a root `kernels/__init__.py` would shadow Hugging Face's `kernels` package and
# break transformers.
FOLDERS = (
    "kernels",
    "engine",
    "engine/parallel",
    "engine/models",
    "engine/data",
    "engine/plan",
    "engine/rollout",
    "engine/ppo",
    "engine/judge",
    "engine/monitor",
    "engine/rewards",
    "tools",
)

setup(
    packages=["ppomax." + folder.replace("/", ".") for folder in FOLDERS],
    package_dir={"ppomax." + folder.replace("/", "."): folder for folder in FOLDERS},
    package_data={"ppomax.kernels": ["*.c", "*.h"], "ppomax.tools": ["report_assets/*"]},
)
