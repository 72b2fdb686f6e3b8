ARG BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-devel
FROM ${BASE}

# The base image's torch stays: it satisfies pyproject.toml, so pip leaves it alone.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
COPY setup.py pyproject.toml README.md LICENSE /opt/ppomax/
COPY engine /opt/ppomax/engine
COPY kernels /opt/ppomax/kernels
COPY tools /opt/ppomax/tools
COPY examples /opt/ppomax/examples
RUN python -m pip install "/opt/ppomax[datasets]" && python -c "import torch, ppomax.engine.cli" && ppomax version

RUN useradd --uid 10001 --create-home --shell /bin/bash ppomax && mkdir -p /workspace && chown ppomax /workspace
USER ppomax
WORKDIR /workspace
CMD ["ppomax", "help"]
