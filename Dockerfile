# syntax=docker/dockerfile:1
# Training, sampling and evaluation in one image. It needs the network while it is built, and never afterwards.
#
#   docker build -t tread .
#   docker run --rm tread                                            # the quickstart; no GPU needed
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/app/runs" -v "$PWD/data:/app/data" tread \
#       composer train.py yamls/dit_xl_tread.yaml data.local=data/latents
#
# Base: NVIDIA's smallest CUDA image, not a plain Python one. torch's wheels bring CUDA's libraries, so "base" (the
# runtime alone) is enough; what it adds over plain Ubuntu is the declared CUDA version, by which `docker run` refuses
# a driver that is too old in words instead of "no CUDA device" later, and NVIDIA's compatibility libraries.
# CUDA must be the version that torch was built for. Another stack: --build-arg TORCH=2.7 --build-arg CUDA=12.6.3.
ARG CUDA=13.2.1
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04

# The stack, as for make: newest, 2.11 (with CUDA=13.0.2) or 2.7. Its packages are pinned in constraints/.
ARG TORCH=newest
# diffusers: the VAE. dev: the tests and linters as well.
ARG EXTRA=diffusers
# The owner of runs/ and data/. A folder mounted from the host must be writable for this user: --build-arg UID=$(id -u).
ARG UID=1000

# bash: `${TORCH/#2./torch2}` below makes torch211 of 2.11 and leaves newest as it is.
SHELL ["/bin/bash", "-c"]

# `compile: true` calls a C++ compiler, and triton links Python's headers. Not pinned: Ubuntu's archive keeps only the
# newest build of each package, so a pin breaks the image at the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu 24.04 has a user of its own with id 1000, the usual id of whoever builds this.
RUN userdel ubuntu && useradd --create-home --uid "${UID}" trainer

ENV VIRTUAL_ENV=/opt/venv
ENV PATH=/opt/venv/bin:${PATH}

WORKDIR /app

# Packages before code: an edit of the code then leaves the layer of several GB as it is. Bytecode is compiled here,
# since the user below may not write it, and every start would take 15 s instead of 6.
COPY pyproject.toml ./
COPY constraints/ constraints/
# The linter overlooks SHELL.
# hadolint ignore=SC3060
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint "constraints/${TORCH/#2./torch2}.txt" uv \
    && uv pip install --no-cache --compile-bytecode --constraint "constraints/${TORCH/#2./torch2}.txt" \
        --requirement pyproject.toml --extra "${EXTRA}"

COPY . .
RUN uv pip install --no-cache --no-deps --editable . && python -m compileall -q tread_composer train.py

RUN mkdir -p runs data && chown trainer:trainer runs data
VOLUME ["/app/runs", "/app/data"]
USER ${UID}
CMD ["composer", "train.py", "yamls/digits_tread.yaml"]

# Smoke check, as the user and without a network: a few batches with TREAD, an evaluation, a checkpoint.
RUN --network=none composer train.py yamls/digits_tread.yaml run_name=smoke max_duration=3ba save_folder=/tmp/smoke/run \
        data.local=/tmp/smoke/data loggers.mlflow=null callbacks.sample_grid=null callbacks.digits_quality=null \
    && test -f /tmp/smoke/run/latest-rank0.pt \
    && rm -rf /tmp/smoke
