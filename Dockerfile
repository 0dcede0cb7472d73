# syntax=docker/dockerfile:1
# Two images: `build` merges, quantizes and exports; `runtime` verifies and runs bundles, without
# torch, as a user without rights. Pin PYTHON_IMAGE by digest for a release:
#   docker build --target runtime --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:... -t medexport .
#   docker run --rm --network none --read-only -v "$PWD/bundle:/bundle:ro" medexport verify /bundle
# Not yet built by a Docker engine: its commands were run one by one in fresh environments instead.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS locked
COPY requirements.lock /tmp/
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements.lock

FROM locked AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY exporter exporter
COPY profiles profiles
COPY calibration calibration
# hatchling comes from the lock, at its hash.
RUN python -m hatchling build --target wheel --directory /wheels

FROM ${PYTHON_IMAGE} AS runtime
COPY requirements-runtime.lock /tmp/
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/requirements-runtime.lock
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl \
    && useradd --no-create-home --uid 10001 medexport
USER medexport
ENV PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
WORKDIR /bundle
ENTRYPOINT ["medexport"]

FROM locked AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" "${TORCH}"
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl \
    && useradd --create-home --uid 10001 medexport
USER medexport
WORKDIR /data
ENTRYPOINT ["medexport"]
