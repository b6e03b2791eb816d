# Targets, each with no more than its party may hold:
#   party    the package without torch, and without any model or image: for the dealer
#   client   the same and the bundled images
#   server   the same and exported models, which need no torch: ./given/models, or the bundled one
#   torch    the same and torch: for --device cuda and for models that are not exported
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
# Compiler and headers; Python's own image brings Python's.
ARG BUILD_PACKAGES="gcc libc6-dev"
RUN apt-get update \
 && apt-get install -y --no-install-recommends ${BUILD_PACKAGES} \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1
# What a party imports: the dependencies in pyproject.toml without torch and pandas, and what the
# server's --ledger needs.
RUN python3 -m venv --without-pip /venv \
 && pip --python /venv/bin/python install click cryptography numpy prometheus-client rich safetensors \
      "psycopg[binary]"
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY native native
COPY pi_system pi_system
COPY training training
# Without the kernels the package would install too, and be slow.
RUN pip --python /venv/bin/python install --no-deps . \
 && cd / && /venv/bin/python -c 'from pi_system.backends.fss.kernels import native; assert native()'

FROM build AS export
# The index of torch's builds for the CPU; empty for the package index and its CUDA build.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.0
RUN printf '%s\n' 'set -e' 'pip --python /venv/bin/python install --find-links /given/wheels \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH" pandas' > /torch.sh
# In ./given/models: exported models to serve; in ./given/wheels: wheels preferred to the index.
COPY pyproject.toml give[n] /given/
RUN if [ -d /given/models ]; then cp -r /given/models /model; \
    else sh /torch.sh && /venv/bin/pi-export demo -o /model/demo; fi

FROM export AS with-torch
RUN sh /torch.sh

FROM build AS bare
RUN install -d /images && cd / && /venv/bin/python -c 'import numpy; from pi_system import models; \
      numpy.save("/images/demo.npy", models.demo_images()[0])' \
 && rm -r /venv/lib/python3.*/site-packages/pi_system/demo

FROM ${PYTHON_IMAGE} AS party
RUN groupadd --gid 10001 pi \
 && useradd --uid 10001 --gid pi --no-create-home --shell /usr/sbin/nologin pi \
 && for role in server client dealer; do install -d -o pi -g pi -m 0700 /certs/${role}; done \
 && install -d -o pi -g pi -m 0700 /store
COPY --from=bare /venv /venv
ENV PATH=/venv/bin:$PATH PI_PARTY_CERTS=/run/secrets PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /
ENTRYPOINT ["pi-party"]

FROM party AS client
COPY --from=bare /images /images

FROM party AS server
COPY --from=export /model /model

FROM party AS torch
COPY --from=with-torch /venv /venv
COPY --from=export /model /model
